"""Bad input, on every public function: a clear error, and all is as it was. And what is merely odd."""

import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from models import ConvLSTM
from oracles import defect, dense, operator, random
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import orthoconv_param as op
from orthoconv_param import ConvExponential, functional, orthogonal, retrofit

manifold = pytest.importorskip("geoopt") and op.manifold


def snapshot(module):
    """All that a module is: classes, attributes, hooks, parameters themselves and their values."""
    found = []
    for name, part in module.named_modules():
        hooks = {k: dict(v) for k, v in vars(part).items() if "hooks" in k and v}
        plain = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
        tensors = [
            (k, t, None if nn.parameter.is_lazy(t) else t.detach().clone(), t.grad, t.requires_grad)
            for group in (part._parameters, part._buffers)
            for k, t in group.items()
            if t is not None
        ]
        found.append((name, type(part), hooks, plain, tensors, [*part._modules]))
    return found


def unchanged(before, after):
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert one[:4] == other[:4]
        assert one[5] == other[5]
        assert len(one[4]) == len(other[4])
        for (k, t, value, grad, free), (k2, t2, value2, grad2, free2) in zip(one[4], other[4], strict=True):
            assert (k, free) == (k2, free2)
            assert t is t2
            assert grad is grad2
            assert value is None or torch.equal(value.nan_to_num(7), value2.nan_to_num(7))


def conv(*size, bad=None, **options):
    torch.manual_seed(0)
    module = nn.Conv2d(*(size or (4, 4, 3)), **{"padding": 1, **options})
    if bad is not None:
        with torch.no_grad():
            module.weight[0, 0, 0, 0] = bad
    return module


def circular(*size, **options):
    return conv(*size, padding_mode="circular", **options)


def register(*arguments, **options):
    # without `unsafe`, whose absence torch itself notices too late
    return lambda m: register_parametrization(
        m, "weight", ConvExponential(*arguments, **options), unsafe=True
    )


def make_orthogonal(**options):
    return lambda m: orthogonal(m, **options)


def make_retrofit(side=8, **options):
    return lambda m: retrofit(m, torch.zeros(1, 4, side, side), **options)


def on_kernel(function, *arguments, **options):
    return lambda m: function(m.weight.detach(), *arguments, **options)


def kernels(domain, size, **options):
    return lambda m: manifold.OrthogonalKernels(domain, **options).random(*size)


def converted(**options):
    module = orthogonal(circular(), **options)
    module(torch.zeros(1, 4, 8, 8))
    return module


def load(state):
    return lambda m: m.load_state_dict({**m.state_dict(), **state})


key = "parametrizations.weight.original"
CASES = {
    "a domain smaller than the dilated kernel": [
        (conv, register((2, 8)), ValueError, "domain should be at least the kernel's taps"),
        (
            lambda: conv(dilation=3, padding=3),
            make_orthogonal(domain=6),
            ValueError,
            r"with their dilation",
        ),
        (
            lambda: nn.Sequential(circular(4, 4, 5, padding=2)),
            make_retrofit(4, method="exponential"),
            ValueError,
            "at least the kernel",
        ),
        (conv, on_kernel(functional.conv_exp, 2), ValueError, "at least the kernel's taps"),
        (conv, on_kernel(functional.nearest_orthogonal, 2), ValueError, "at least the kernel's taps"),
        (conv, kernels((2, 2), (4, 4, 3, 3)), ValueError, "should"),
    ],
    "a domain that the stride does not divide": [
        (conv, register(7, stride=2), ValueError, "divisible by the stride"),
        (lambda: conv(stride=2), make_orthogonal(domain=7), ValueError, "divisible by the stride"),
        (
            lambda: nn.Sequential(circular(stride=2)),
            make_retrofit(9, method="exponential"),
            ValueError,
            "divisible by the stride",
        ),
        (conv, on_kernel(op.singular_values, 7, stride=2), ValueError, "divisible by the stride"),
        (conv, on_kernel(op.orthogonality_defect, 7, stride=2), ValueError, "divisible by the stride"),
        (
            conv,
            on_kernel(functional.nearest_orthogonal, 7, stride=2),
            ValueError,
            "divisible by the stride",
        ),
        (
            conv,
            lambda m: manifold.OrthogonalKernels((7, 7), stride=2),
            ValueError,
            "divisible by the stride",
        ),
    ],
    "groups that do not divide the channels": [
        (conv, register(groups=3), ValueError, "groups should divide"),
        (conv, on_kernel(op.singular_values, 8, groups=3), ValueError, "groups should divide"),
        (conv, on_kernel(functional.conv_exp, 8, groups=3), ValueError, "groups should divide"),
        (conv, on_kernel(functional.skew, 8, groups=3), ValueError, "groups should divide"),
        (conv, on_kernel(functional.nearest_orthogonal, 8, groups=3), ValueError, "groups should divide"),
        (conv, kernels((8, 8), (4, 4, 8, 8), groups=3), ValueError, "divisible by 3"),
    ],
    "a stride without a semi-orthogonal solution": [
        (
            lambda: conv(1, 4, 3, padding=2, stride=2, dilation=2),
            orthogonal,
            ValueError,
            "no semi-orthogonal",
        ),
    ],
    "padding that does not keep the size": [
        (lambda: conv(padding=0), orthogonal, ValueError, "padding should keep the size"),
        (lambda: nn.Sequential(conv(padding=2)), make_retrofit(), ValueError, "(?s)0: padding should keep"),
    ],
    "a module that is no convolution": [
        (lambda: nn.Linear(4, 4), orthogonal, TypeError, "should be an nn.Conv"),
        (
            lambda: nn.Sequential(conv(), nn.ReLU()),
            make_retrofit(select="1"),
            (TypeError, ValueError),
            "convolution",
        ),
        (lambda: nn.Linear(4, 4), lambda m: op.singular_values(m, 8), TypeError, "should be a kernel"),
        (lambda: nn.Linear(4, 4), lambda m: op.plot_spectrum(m, 8), TypeError, "should be a kernel"),
        (lambda: nn.Linear(4, 4), lambda m: op.orthogonality_defect(m, 8), TypeError, "should be a kernel"),
        (lambda: nn.Linear(4, 4), register(), ValueError, "a convolution's kernel is"),
        (lambda: nn.Linear(4, 4), lambda m: op.set_orthogonality(m, 1), ValueError, "Found none"),
        (lambda: nn.Linear(4, 4), lambda m: op.plot_gradient_norms(m, 3), TypeError, "floating tensor"),
    ],
    "a weight that is not finite": [
        (lambda: conv(bad=torch.nan), register(), ValueError, "should be finite"),
        (lambda: conv(bad=torch.inf), register("any"), ValueError, "should be finite"),
        (lambda: conv(bad=torch.nan), make_orthogonal(domain=8), ValueError, "finite"),
        (lambda: conv(bad=torch.inf), orthogonal, ValueError, "finite"),
        (lambda: nn.Sequential(conv(bad=torch.nan)), make_retrofit(), ValueError, "(?s)0: .*finite"),
        (lambda: conv(bad=torch.nan), lambda m: op.singular_values(m, 8), ValueError, "finite"),
        (lambda: conv(bad=torch.nan), on_kernel(op.plot_spectrum, 8), ValueError, "finite"),
        (
            lambda: nn.Sequential(conv(bad=torch.nan)),
            lambda m: op.report(m, torch.zeros(1, 4, 8, 8)),
            ValueError,
            "0 should be finite",
        ),
        (
            lambda: conv(bad=torch.nan),
            on_kernel(functional.nearest_orthogonal, 8),
            ValueError,
            "should be finite",
        ),
    ],
    "an integer dtype": [
        (conv, lambda m: ConvExponential().right_inverse(m.weight.int()), TypeError, "dtype"),
        (conv, lambda m: op.expm_skew(m.weight.int()), TypeError, "A should be a tensor of a floating"),
        (conv, lambda m: op.singular_values(m.weight.int(), 8), TypeError, "floating or complex"),
        (conv, lambda m: functional.conv_exp(m.weight.int(), 8), TypeError, "floating or complex"),
        (conv, lambda m: functional.skew(m.weight.int(), 8), TypeError, "floating or complex"),
        (conv, lambda m: functional.adjoint(m.weight.int(), 8), TypeError, "floating or complex"),
        (
            conv,
            lambda m: functional.nearest_orthogonal(m.weight.int(), 8),
            TypeError,
            "floating or complex",
        ),
        (
            conv,
            lambda m: functional.spectral_conv(torch.ones(1, 4, 8, 8).int(), m.weight),
            TypeError,
            "should be",
        ),
    ],
    "a name that does not exist": [
        (conv, make_orthogonal(name="wait"), ValueError, "name should be that of a parameter"),
        (lambda: nn.Sequential(conv()), make_retrofit(select="conv1"), ValueError, "conv1"),
        (
            lambda: nn.Sequential(conv()),
            make_retrofit(blocks={"gates": [(slice(4), slice(4))]}),
            ValueError,
            "gates",
        ),
    ],
    "an input whose size is not the domain": [
        (
            lambda: converted(domain=8),
            lambda m: m(torch.zeros(1, 4, 9, 8)),
            ValueError,
            r"of the domain's size, \(8, 8\)",
        ),
        (converted, lambda m: m(torch.zeros(1, 3, 8, 8)), ValueError, "should have 4 channels"),
        (converted, lambda m: m(torch.zeros(1, 4, 8, 8).double()), TypeError, "weight's dtype"),
        (
            lambda: retrofit(nn.Sequential(circular()), torch.zeros(1, 4, 8, 8), method="exponential"),
            lambda m: m(torch.zeros(1, 4, 6, 6)),
            ValueError,
            r"of the domain's size, \(8, 8\)",
        ),
    ],
    "a checkpoint of another shape": [
        (converted, load({key: torch.zeros(4, 4, 5, 5)}), RuntimeError, "size mismatch"),
        (lambda: converted(domain=8), load({key: torch.zeros(3, 4, 3, 3)}), RuntimeError, "size mismatch"),
        (
            lambda: retrofit(nn.Sequential(circular()), torch.zeros(1, 4, 8, 8)),
            lambda m: m.load_state_dict({"0.weight": torch.zeros(4, 4, 9, 9)}),
            RuntimeError,
            r"starting from 0\.weight: ",
        ),
    ],
}


@pytest.mark.parametrize(
    ("make", "act", "error", "message"),
    [
        pytest.param(*case, id=f"{name}-{i}")
        for name, cases in CASES.items()
        for i, case in enumerate(cases)
    ],
)
def test_bad_input_is_named_and_changes_nothing(make, act, error, message):
    module = make()
    before = snapshot(module)
    with pytest.raises(error, match=message) as raised:
        act(module)
    assert len(str(raised.value)) > 20
    unchanged(before, snapshot(module))


# Not a number, while training


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_generator_that_diverges_is_named(bad):
    video = torch.randn(1, 2, 2, 8, 8)
    blocks = {"gates": functional.gate_blocks(4, 4, 2)}
    cases = [
        (orthogonal(circular()), "generator of Conv2d(4, 4, kernel_size=(3, 3)", torch.randn(1, 4, 30, 30)),
        (orthogonal(circular(), domain=8), "generator of Conv2d(4, 4", torch.randn(1, 4, 8, 8)),
        (
            retrofit(nn.Sequential(conv()), torch.zeros(1, 4, 8, 8)),
            "generator of 0",
            torch.randn(1, 4, 8, 8),
        ),
        (retrofit(ConvLSTM("zeros"), video, select="gates", blocks=blocks), "generator of gates", video),
    ]
    for model, words, x in cases:
        (generator,) = op.generators(model)
        (model(x).square().sum() * bad).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert not generator.isfinite().all()
        with pytest.raises(
            ValueError, match=r"should be finite\. Found nan or inf: a step of the"
        ) as raised:
            model(x)
        assert words in str(raised.value)


# Odd, but not wrong


def test_a_generator_of_norm_ten_thousand():
    module = circular().double()
    register_parametrization(module, "weight", ConvExponential())
    with torch.no_grad():
        module.parametrizations.weight.original.copy_(1e4 * random(4, 4, 3, 3))
    assert defect(dense(module.weight.detach(), (3, 3))) < 1e-11
    given = orthogonal(circular(), domain=8)
    with torch.no_grad():
        given.parametrizations.weight.original.copy_(1e4 * random(4, 4, 3, 3))
    assert defect(operator(given, (8, 8))) < 1e-5
    every = orthogonal(circular())
    with torch.no_grad():
        every.parametrizations.weight.original.copy_(1e4 * random(4, 4, 3, 3))
    with pytest.raises(ValueError, match="norm"):
        every(torch.zeros(1, 4, 8, 8))
    with torch.no_grad():
        every.parametrizations.weight.original.mul_(1e20)
    with pytest.raises(ValueError, match="norm"):
        every(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("where", ["any", 8])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30])
def test_zeros_and_denormal_numbers(where, scale):
    module = circular()
    with torch.no_grad():
        module.weight.copy_(scale * torch.randn(4, 4, 3, 3).sign())
    orthogonal(module, domain=where)
    x = torch.randn(2, 4, 8, 8)
    module(x).pow(4).mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert defect(operator(module, (8, 8))) < 1e-5


def test_pretrained_kernels_without_full_rank():
    for rank in (0, 1, 3):
        module = circular(8, 8, 3)
        with torch.no_grad():
            module.weight.copy_(torch.einsum("or,ri...->oi...", random(8, rank), random(rank, 8, 3, 3)))
        model = retrofit(nn.Sequential(module), torch.zeros(1, 8, 6, 6), anneal=False)
        assert defect(operator(model[0], (6, 6))) < 1e-5
        model(torch.randn(1, 8, 6, 6)).pow(4).mean().backward()
        assert op.generators(model)[0].grad.isfinite().all()


@pytest.mark.parametrize("where", ["any", 1])
def test_one_channel_and_one_pixel(where):
    module = orthogonal(nn.Conv2d(1, 1, 1, bias=False), domain=where)
    assert defect(operator(module, (1, 1))) < 1e-6
    module = orthogonal(nn.Conv1d(1, 1, 3, padding=1), domain="any")
    assert defect(operator(module, (1,))) < 1e-6


@pytest.mark.parametrize("where", ["any", 8])
def test_four_thousand_channels_depthwise(where):
    module = orthogonal(nn.Conv2d(4096, 4096, 3, padding=1, groups=4096, bias=False), domain=where)
    x = torch.randn(1, 4096, 8, 8)
    y = module(x)
    norms = (y.norm(dim=(2, 3)) / x.norm(dim=(2, 3)) - 1).abs()
    assert norms.max() < 1e-5
    y.pow(4).mean().backward()
    assert op.generators(module)[0].grad.isfinite().all()


# Whatever the geometry


@st.composite
def geometries(draw):
    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    number = st.integers(1, 3)
    channels = [groups * draw(number) for _ in range(2)]
    taps = [draw(st.integers(1, 5)) for _ in range(axes)]
    stride, dilation = ([draw(number) for _ in range(axes)] for _ in range(2))
    transposed = draw(st.booleans())
    spans = [r * (k - 1) for k, r in zip(taps, dilation, strict=True)]
    padding = [draw(st.sampled_from([span // 2, span // 2, max(span // 2 - 1, 0), 1])) for span in spans]
    options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    if transposed:
        options["output_padding"] = [min(s - 1, draw(st.integers(0, 2))) for s in stride]
    elif draw(st.booleans()) and max(stride) == 1:
        options["padding"] = "same"
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.complex128]))
    classes = ((nn.Conv1d, nn.Conv2d), (nn.ConvTranspose1d, nn.ConvTranspose2d))
    domain = tuple(s * draw(st.integers(1, 4)) for s in stride)
    call = {
        "domain": draw(st.sampled_from(["any", domain])),
        "boundary": draw(st.sampled_from(["circular", "circular", "zeros"])),
        "triv": draw(st.sampled_from(["expm", "expm", "cayley"])),
    }
    bias = draw(st.booleans())
    return classes[transposed][axes - 1], (*channels, taps), options, dtype, bias, domain, call


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(geometries())
def test_either_orthogonal_or_a_clear_error(geometry):
    kind, size, options, dtype, bias, domain, call = geometry
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch pads an even kernel by a copy, and says so
        try:
            module = kind(*size, bias=bias, dtype=dtype, **options)
        except (ValueError, RuntimeError):
            return  # no module of torch's
        before = snapshot(module)
        try:
            orthogonal(module, **call)
        except ValueError as error:
            said = str(error)
            unchanged(before, snapshot(module))
        else:
            said = None
            M = operator(module, domain)
    if said is not None:
        assert "should" in said or "semi-orthogonal" in said
    elif call["boundary"] == "zeros" and (call["domain"] == "any" or max(size[2]) > 1):
        assert torch.linalg.matrix_norm(M, 2) <= 1 + 1e-10
    else:
        assert defect(M) < 1e-10
