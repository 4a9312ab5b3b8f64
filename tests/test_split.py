"""Split kernels: orthogonal at every size, on a torus and between walls, and read back.

What holds for every parametrization and every evaluator is in the tests of their contracts.
"""

import copy
import functools
import itertools
import pickle
from math import prod

import pytest
import torch
import torch.nn.functional as F
from geotorch.exceptions import InManifoldError
from geotorch.utils import update_base
from oracles import operator as matrix_of
from oracles import random
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import register_parametrization

from orthoconv_param import (
    SplitExponential,
    generators,
    orthogonal,
    orthogonality_defect,
    plot_spectrum,
    report,
)
from orthoconv_param.walled import WalledConvolution

close = torch.testing.assert_close
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.complex64: 1e-5, torch.complex128: 1e-11}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make(taps, cin, out, dtype=torch.float64, transposed=False, seed=0, **options):
    """A convolution that keeps the size over its stride, or the transpose of one."""
    torch.manual_seed(seed)
    axes = len(taps)
    stride = options.get("stride", 1)
    stride = stride if isinstance(stride, tuple) else (stride,) * axes
    dilation = options.get("dilation", 1)
    dilation = dilation if isinstance(dilation, tuple) else (dilation,) * axes
    spans = [r * (k - 1) for r, k in zip(dilation, taps, strict=True)]
    padding = options.pop("padding", None)
    if padding is None:
        odd = any(span % 2 and s == 1 for span, s in zip(spans, stride, strict=True))
        padding = (
            "same"
            if odd
            else tuple(max(0, -(-(span + 1 - s) // 2)) for span, s in zip(spans, stride, strict=True))
        )
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if not transposed:
        return kinds[0][axes - 1](cin, out, taps, padding=padding, dtype=dtype, **options)
    rest = tuple(s - 1 - span + 2 * p for s, span, p in zip(stride, spans, padding, strict=True))
    return kinds[1][axes - 1](out, cin, taps, padding=padding, output_padding=rest, dtype=dtype, **options)


GEOMETRIES = {  # taps, channels on the fine side, on the coarse side, options
    "3x3": ((3, 3), 4, 4, {}),
    "3x3, more out": ((3, 3), 4, 8, {}),
    "3x3, fewer out": ((3, 3), 8, 4, {}),
    "3x3, 3 to 16": ((3, 3), 3, 16, {}),
    "3x3, 5 channels": ((3, 3), 5, 5, {}),
    "3x3, 2 channels": ((3, 3), 2, 2, {}),
    "1x1": ((1, 1), 4, 4, {}),
    "1x1, strided": ((1, 1), 4, 3, {"stride": 2}),
    "2x2": ((2, 2), 4, 4, {}),
    "4x4": ((4, 4), 4, 4, {}),
    "5x5": ((5, 5), 4, 4, {}),
    "7x7": ((7, 7), 3, 3, {}),
    "1x5": ((1, 5), 4, 4, {}),
    "3x4": ((3, 4), 4, 4, {}),
    "groups": ((3, 3), 4, 8, {"groups": 2}),
    "dilated": ((3, 3), 4, 4, {"dilation": (2, 3)}),
    "5x5, dilated": ((5, 5), 3, 3, {"dilation": 2}),
    "stride 2, 3x3": ((3, 3), 4, 8, {"stride": 2, "padding": (1, 1)}),
    "stride 2, 4x4": ((4, 4), 4, 8, {"stride": 2}),
    "stride 2, 5x5, tall": ((5, 5), 3, 16, {"stride": 2}),
    "stride 3, 7x7": ((7, 7), 2, 6, {"stride": 3}),
    "stride (1, 2)": ((3, 4), 4, 6, {"stride": (1, 2)}),
    "stride 3, dilated": ((3,), 4, 4, {"stride": 3, "dilation": 2}),
    "stride 2, dilated by 3": ((3, 3), 2, 4, {"stride": (2, 1), "dilation": (3, 1)}),
    "stride (1, 2), fewer taps": ((3, 1), 4, 4, {"stride": (1, 2)}),
    "stride (1, 3), fewer taps": ((3, 2), 4, 4, {"stride": (1, 3)}),
    "patches": ((2, 2), 3, 12, {"stride": 2}),
    "patches of one channel": ((3, 3), 1, 4, {"stride": 3}),
    "1d": ((3,), 4, 4, {}),
    "1d, 7 taps": ((7,), 5, 5, {}),
    "1d, stride 2": ((6,), 4, 8, {"stride": 2}),
    "3d": ((3, 3, 3), 2, 2, {}),
    "3d, mixed": ((3, 1, 2), 3, 3, {"stride": (1, 1, 2)}),
}  # fmt: skip
OFTEN = (
    "stride 3, dilated",
    "stride (1, 2), fewer taps",
    "3x3",
    "3x3, 3 to 16",
    "4x4",
    "5x5",
    "dilated",
    "stride 2, 4x4",
    "stride (1, 2)",
    "1d",
    "3d",
)
SIZES = {1: [(1,), (4,), (17,)], 2: [(1, 1), (1, 4), (2, 2), (5, 7)], 3: [(1, 2, 1), (2, 3, 4)]}
LARGER = {1: [(31,)], 2: [(16, 16), (31, 32)], 3: [(5, 4, 6)]}
every_geometry = pytest.mark.parametrize("name", [n if n in OFTEN else slow(n) for n in GEOMETRIES])


def made(*args, **options):
    """A module with a split kernel, see `_made`, which searches for it once. Skips where there is none."""
    return copy.deepcopy(_made(*args, **options))


@functools.cache
def _made(name, boundary, dtype=torch.float64, transposed=False, seed=0):
    taps, fine, coarse, options = GEOMETRIES[name]
    if transposed and any(
        k % 2 == 0 and s == 1 for k, s in zip(taps, _each(options.get("stride", 1), taps), strict=True)
    ):
        pytest.skip("no padding keeps the size")
    module = make(taps, fine, coarse, dtype, transposed, seed, **options)
    if boundary == "walls" and max(module.dilation) > 1 and max(module.stride) > 1:
        with pytest.raises(ValueError, match="dilation=1"):
            orthogonal(module, method="split", boundary=boundary)
        pytest.skip("a wall would cut its patches")
    return orthogonal(module, method="split", boundary=boundary)


def _each(value, taps):
    return value if isinstance(value, tuple) else (value,) * len(taps)


def sizes_of(module, boundary, larger=False):
    """Fine grids that a module is to be orthogonal on, of not too many numbers."""
    axes, stride = len(module.stride), module.stride
    for size in SIZES[axes] + (LARGER[axes] if larger else []):
        domain = tuple(n * s for n, s in zip(size, stride, strict=True))
        spans = [r * (k - 1) // 2 for r, k in zip(module.dilation, module.kernel_size, strict=True)]
        if boundary == "circular" and any(n < span + 1 for n, span in zip(domain, spans, strict=True)):
            continue  # torch pads no image by more than its size
        if prod(domain) * min(module.in_channels, module.out_channels) <= (2000 if larger else 1100):
            yield domain


def trained(module, steps=10, rate=0.1):
    single = max(module.weight.shape[2:]) == 1 and max(module.stride) > 1
    if single and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("torch 2.13 aborts there, in the gradient of 1x1 convolutions with a stride")
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    domain = tuple(8 * s for s in module.stride)
    size = [n // s for n, s in zip(domain, module.stride, strict=True)] if module.transposed else domain
    x = random(2, module.in_channels, *size, dtype=module.weight.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(x) - 0.5).abs().square().sum().backward()
        optimizer.step()
    return module


def check(module, boundary, larger=False):
    tolerance, domains = TOLERANCE[module.weight.dtype], [*sizes_of(module, boundary, larger)]
    assert domains
    for domain in domains:
        S = torch.linalg.svdvals(matrix_of(module, domain))
        if boundary == "zeros":
            assert S.max() < 1 + tolerance
        else:
            close(S, torch.ones_like(S), atol=tolerance, rtol=0)


# The operator


def geometries_and_kinds():
    """Each geometry with each boundary and transposed; zeros and complex numbers with some of these."""
    for name, boundary, transposed in itertools.product(
        GEOMETRIES, ("circular", "walls", "zeros"), (False, True)
    ):
        often = (name in OFTEN and not transposed) or name in ("3x3", "stride 2, 4x4")
        case = name, boundary, transposed, torch.float32
        if boundary != "zeros":
            yield case if often else slow(*case)
        elif name in OFTEN and not transposed:
            yield slow(*case)
        if name in OFTEN and (boundary, transposed) in (("walls", False), ("circular", True)):
            yield slow(*case[:3], torch.complex128)


@pytest.mark.parametrize(("name", "boundary", "transposed", "dtype"), [*geometries_and_kinds()])
def test_the_modules_own_operator_is_orthogonal_before_training_and_after(
    name, boundary, transposed, dtype
):
    module = made(name, boundary, dtype, transposed)
    check(module, boundary)
    check(trained(module), boundary, larger=name in ("3x3", "3x3, 2 channels", "stride 2, 4x4"))


@pytest.mark.parametrize(
    "name", ["3x3", "5x5", slow("groups"), slow("dilated"), "4x4", slow("1d"), slow("3d")]
)
def test_periodic_ones_are_torchs_own_with_their_own_weight(name):
    module = made(name, "circular")
    taps = GEOMETRIES[name][0]
    plain = parametrize.type_before_parametrizations(module)
    assert plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert type(module).forward is plain.forward
    assert module.padding_mode == "circular"
    assert tuple(module.kernel_size) == tuple(module.weight.shape[2:]) == taps
    domain = (9, 8, 10)[: len(taps)]
    x = random(2, module.in_channels, *domain)
    y = module(x)
    padded, spans = x, [r * (k - 1) for r, k in zip(module.dilation, taps, strict=True)]
    for axis, span in enumerate(spans, start=2):
        n = x.shape[axis]
        padded = padded.index_select(axis, torch.arange(-(span // 2), n + span - span // 2) % n)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
    close(y, convolve(padded, module.weight, module.bias, dilation=module.dilation, groups=module.groups))
    for axis in range(2, x.ndim):
        close(module(x.roll(3, axis)), y.roll(3, axis))


@pytest.mark.parametrize(
    "name", ["3x3", "5x5", slow("groups"), slow("dilated"), slow("1d, 7 taps"), slow("3d")]
)
def test_between_walls_the_inside_is_the_zero_padded_convolution(name):
    module = trained(made(name, "walls"), 3)
    spans = [r * (k - 1) // 2 for r, k in zip(module.dilation, module.kernel_size, strict=True)]
    domain = tuple(2 * span + 5 for span in spans)
    x = random(2, module.in_channels, *domain)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(domain) - 1]
    plain = convolve(
        x,
        module.weight,
        module.bias,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )
    inside = (..., *(slice(span, n - span) for span, n in zip(spans, domain, strict=True)))
    close(module(x)[inside], plain[inside])
    assert module.weight.is_contiguous()
    assert (module(x) - plain).abs().max() > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("boundary", ["circular", "walls", "zeros"])
@pytest.mark.parametrize("taps", [(3, 3), (5, 3), (7,), (3, 1, 3)])
def test_generators_of_zero_and_bases_of_one_are_the_identity(taps, boundary):
    module = orthogonal(make(taps, 4, 4), method="split", boundary=boundary)
    module.weight = module.parametrizations.weight[0].sample("identity")
    x = random(2, 4, *(9, 8, 5)[: len(taps)])
    close(module(x) - module.bias.reshape(-1, *(1,) * len(taps)), x)


@pytest.mark.parametrize("boundary", ["circular", "walls"])
@pytest.mark.parametrize("name", ["3x3, 2 channels", slow("stride 2, 4x4"), slow("groups")])
def test_derivatives(name, boundary):
    module = trained(made(name, boundary), 2)
    (X,) = generators(module)
    x = random(1, module.in_channels, *(2 * s for s in module.stride)).requires_grad_()

    def f(x, X):
        values = {"parametrizations.weight.original": X}
        return torch.func.functional_call(module, values, (x,))

    inputs = (x, X.detach().clone().requires_grad_())
    fast = name != "3x3, 2 channels"
    assert gradcheck(f, inputs, check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("side", [8, slow(16), slow(64)])
@pytest.mark.parametrize("boundary", ["circular", "walls"])
def test_a_thousand_steps_keep_the_norms_of_state_and_gradient(boundary, side):
    module = orthogonal(make((3, 3), 8, 8, torch.float32, bias=False), method="split", boundary=boundary)
    first = random(1, 8, side, side, dtype=torch.float32).requires_grad_()
    last = h = first
    with parametrize.cached():
        for _ in range(1000):
            last = h = module(h)
    G = random(1, 8, side, side, dtype=torch.float32, seed=1)
    (gradient,) = torch.autograd.grad(last, first, G)
    close(last.norm(), first.norm(), atol=0, rtol=1e-3)
    close(gradient.norm(), G.norm(), atol=0, rtol=1e-3)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("name", ["3x3", "groups", "stride 2, 4x4"])
def test_large_images_are_computed_as_small_ones_are(name, keeps, monkeypatch):
    """Whether what is between the factors is kept for the gradient, or computed again."""
    module = made(name, "walls")
    x = random(2, module.in_channels, *(5 * s for s in module.stride)).requires_grad_()
    monkeypatch.setattr("orthoconv_param.split.between._KEPT_BYTES", 2**25 if keeps else 0)
    y = module(x)
    found = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
    monkeypatch.setattr("orthoconv_param.runtime.is_transformed", lambda: True)  # the plain form
    expected = torch.autograd.grad(module(x).sin().sum(), [x, *module.parameters()])
    close(found, expected)


@pytest.mark.parametrize("keeps", [True, False])
def test_large_generators_of_long_kernels_have_the_gradient_of_small_ones(keeps, monkeypatch):
    """Whether what the exponentials are made of is kept for the gradient, or computed again."""
    module = trained(made("5x5", "walls"), 2)
    x = random(1, module.in_channels, 9, 8)
    monkeypatch.setattr("orthoconv_param.split.fast._KEPT_BYTES", 2**25 if keeps else 0)
    found = torch.autograd.grad(module(x).sin().sum(), [*module.parameters()])
    monkeypatch.setattr("orthoconv_param.runtime.is_transformed", lambda: True)  # the plain form
    expected = torch.autograd.grad(module(x).sin().sum(), [*module.parameters()])
    close(found, expected)


@pytest.mark.parametrize("boundary", ["circular", "walls"])
def test_a_cached_loop_makes_the_factors_once(boundary, monkeypatch):
    module = orthogonal(make((3, 3), 4, 4), method="split", boundary=boundary)
    calls = []
    parametrization = module.parametrizations.weight[0]
    monkeypatch.setattr(parametrization, "check_generator", lambda *_: calls.append(1), raising=True)
    x = random(1, 4, 5, 5)
    with parametrize.cached():
        for _ in range(5):
            x = module(x)
    assert len(calls) == 1
    x.sum().backward()
    assert generators(module)[0].grad is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "boundary", "backend"),
    [
        ("5x5", "walls", "inductor"),
        ("3x3", "circular", "aot_eager"),
        ("stride 2, 4x4", "circular", "aot_eager"),
        ("stride 2, 4x4", "walls", "aot_eager"),
    ],
)
def test_compiled_whole(name, boundary, backend):
    torch.compiler.reset()  # what other tests have compiled counts towards torch's limit
    module = made(name, boundary, torch.float32)
    x = random(2, module.in_channels, *(6 * s for s in module.stride), dtype=torch.float32).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    y = compiled(x)
    close(y, module(x), atol=1e-5, rtol=0)
    found = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
    close(found, torch.autograd.grad(module(x).sin().sum(), [x, *module.parameters()]), atol=1e-4, rtol=0)


# What has no split kernel


@pytest.mark.parametrize(
    ("convolution", "options", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), {}, r'two channels.*method="exponential"'),
        (lambda: nn.Conv1d(1, 1, 5, padding=2), {}, r'two channels.*method="exponential"'),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), {"domain": 8}, 'domain should be "any"'),
        (lambda: nn.Conv2d(4, 16, 3, 3, padding=1), {"boundary": "walls"}, "padding=0"),
        (lambda: nn.Conv2d(4, 16, 4, 4, padding=1), {"boundary": "walls"}, "padding=0"),
        (lambda: nn.Conv2d(4, 4, 3, 2, 2, 2), {"boundary": "walls"}, "dilation=1"),
        (lambda: nn.Conv2d(4, 8, 1, 2), {}, r"at most 4 output \(transposed: input\) channels"),
        (lambda: nn.Conv2d(4, 4, 3), {}, "padding"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), {}, "boundary should be given"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), {"boundary": "open"}, "boundary"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), {"triv": torch.exp}, "unitary"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), {"base": False, "triv": torch.matrix_exp}, "inverse"),
    ],
)
def test_what_has_no_member_of_the_family_is_refused_and_unchanged(convolution, options, message):
    module = convolution()
    before = copy.deepcopy(module.__dict__), module.weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match=message):
        orthogonal(module, method="split", **options)
    assert type(module) in (nn.Conv1d, nn.Conv2d)
    assert module.__dict__.keys() == before[0].keys()
    assert module.padding_mode == before[0]["padding_mode"]
    assert torch.equal(module.weight, before[1])


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match='method should be "exponential" or "split"'):
        orthogonal(nn.Conv2d(4, 4, 3, padding=1), method="cayley")


def test_a_weight_with_a_gradient_is_refused_and_unchanged():
    conv = nn.Conv2d(4, 4, 3)
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    before = conv.weight.detach().clone()
    with pytest.raises(ValueError, match="zero_grad"):
        register_parametrization(conv, "weight", SplitExponential())
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv.weight, before)
    orthogonal(nn.Conv2d(4, 4, 3, padding=1), method="split")


# Reading back


def composed(size, dtype=torch.float64, seed=0):
    """A kernel of the family by other means: the impulse response of its factors on a large torus."""
    out, cin, *taps = size
    m, a, axes = max(out, cin), max(out, cin) // 2, len(taps)
    torch.manual_seed(seed)

    def unitary():
        return torch.linalg.qr(torch.randn(m, m, dtype=dtype))[0]

    def mixed(M, x):
        return torch.einsum("ij,bj...->bi...", M, x)

    torus = tuple(2 * k + 1 for k in taps)
    x = torch.zeros(cin, cin, *torus, dtype=dtype)
    x[(range(cin), range(cin), *(k for k in taps))] = 1
    x = mixed(unitary()[:, :cin], x)
    for axis, k in enumerate(taps, start=2):
        for _ in range((k - 1) // 2):
            y = mixed(unitary(), torch.cat([x[:, :a], x[:, a:].roll(-1, axis)], 1))
            x = mixed(unitary(), torch.cat([y[:, :a], y[:, a:].roll(1, axis)], 1))
        if k % 2 == 0:
            x = mixed(unitary(), torch.cat([x[:, :a].roll(-1, axis), x[:, a:]], 1))
    x = x[:, :out]
    # a tap d of the kernel takes the impulse at k to k - d
    inside = (..., *(slice(k - (k - (k - 1) // 2 - 1), k + (k - 1) // 2 + 1) for k in taps))
    rest = x.clone()
    rest[inside] = 0
    assert rest.abs().max() < 1e-12
    return x[inside].flip(tuple(range(2, 2 + axes))).transpose(0, 1).contiguous()


SHAPES = [(4, 4, 3, 3), (5, 5, 3, 3), (8, 4, 3, 3), (4, 9, 3, 3), (16, 3, 3, 3), (3, 16, 5), (4, 4, 5, 5),
          (6, 6, 7), (4, 4, 4, 3), (3, 3, 3, 3, 3), (5, 2, 7), (2, 2, 2)]  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [slow(torch.float32), torch.float64, slow(torch.complex64), slow(torch.complex128)]
)
@pytest.mark.parametrize("size", [size if size in SHAPES[::3] else slow(size) for size in SHAPES])
def test_a_kernel_of_the_family_that_was_composed_elsewhere_reads_back(size, dtype):
    axes = len(size) - 2
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](size[1], size[0], size[2:], dtype=dtype)
    register_parametrization(module, "weight", SplitExponential())
    limit = (1e-5 if max(size[2:]) == 3 else 1e-4) if torch.finfo(dtype).eps > 1e-10 else 1e-9
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for seed in range(2):
        Q = composed(size, wide, seed).to(dtype)
        module.weight = Q
        assert (module.weight - Q).abs().max() < limit
        assert module.parametrizations.weight[0].in_manifold(Q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0, 1e-4, 1e-2, 1])
@pytest.mark.parametrize("taps", [(3, 3), slow((5, 5)), slow((4,))])
def test_kernels_near_the_identity_read_back(taps, scale, dtype):
    module = orthogonal(make(taps, 6, 6, dtype), method="split")
    parametrization = module.parametrizations.weight[0]
    Q = parametrization.sample("identity", lambda X: X.normal_(std=scale) if scale else X.zero_())
    module.weight = Q
    limit = (1e-5 if max(taps) == 3 else 1e-4) if dtype == torch.float32 else 1e-9
    assert (module.weight - Q).abs().max() < limit


def test_reading_back_is_deterministic():
    W = random(6, 6, 3, 3)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        conv = nn.Conv2d(6, 6, 3, dtype=torch.float64)
        register_parametrization(conv, "weight", SplitExponential())
        conv.weight = W
        found.append([*conv.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a.shape != (6,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "seed"), [((4, 4, 3, 3), 0), ((6, 6, 3, 3), 1), ((4, 4, 5, 5), 2), ((8, 4, 3, 3), 3)]
)
def test_a_pretrained_kernel_goes_to_one_that_is_as_near_as_others(size, seed):
    """Within 1.1 times the best of five long descents from random starts."""
    W = 0.3 * random(*size, seed=seed)
    W[..., size[2] // 2, size[3] // 2] += torch.eye(*size[:2])
    conv = nn.Conv2d(size[1], size[0], size[2:], dtype=torch.float64)
    register_parametrization(conv, "weight", SplitExponential())
    parametrization = conv.parametrizations.weight[0]
    conv.weight = W
    distance = (conv.weight - W).norm().item()
    (X,) = generators(conv)
    best = float("inf")
    for start in range(5):
        torch.manual_seed(start)
        conv.weight = parametrization.sample("uniform")
        optimizer = torch.optim.LBFGS([X], max_iter=400, line_search_fn="strong_wolfe")

        def loss(optimizer=optimizer):
            optimizer.zero_grad()
            value = (conv.weight - W).square().sum()
            value.backward()
            return value

        for _ in range(5):
            optimizer.step(loss)
        best = min(best, loss().item() ** 0.5)
    assert distance < 1.1 * best


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64)])
@pytest.mark.parametrize(
    "name", ["3x3", "5x5", "4x4", "3x3, 3 to 16", "stride 2, 4x4", slow("groups"), slow("3d")]
)
def test_updating_the_base_and_checkpoints_keep_the_operator_between_walls(name, dtype):
    module = trained(made(name, "walls", dtype), 10)
    x = random(2, module.in_channels, *(5 * s for s in module.stride), dtype=dtype)
    y = module(x)
    limit = 1e-4 if dtype == torch.float32 else 1e-10
    for _ in range(3):
        update_base(module, "weight")
        assert (module(x) - y).abs().max() < limit
    state = module.state_dict()
    other = made(name, "walls", dtype, seed=3)
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert torch.equal(other(x), module(x))
    check(module, "walls")


@pytest.mark.parametrize("steps", [0, 25])
def test_a_kernel_that_equals_the_present_one_keeps_the_operator_between_walls(steps):
    module = trained(made("3x3", "walls"), steps)
    x, twin = random(2, 4, 5, 5), copy.deepcopy(module)
    y = module(x)
    twin.weight = module.weight.detach()
    close(twin(x), y)
    module.load_state_dict(module.state_dict())
    module.weight = module.weight.detach()
    close(module(x), y)


def test_at_registration_pairs_rotate_by_no_more_than_a_right_angle():
    """So that a kernel of the family has one operator between walls."""
    for seed in range(5):
        module = made("3x3", "walls", seed=seed)
        (X,) = generators(module)
        _, K = module.parametrizations.weight[0].chain.split(X.detach())
        assert torch.linalg.svdvals(K).max() <= torch.pi / 2 + 1e-9


def test_update_base_moves_coins_into_the_base_and_keeps_pairs():
    module = trained(made("3x3", "walls"), 5)
    parametrization, (X,) = module.parametrizations.weight[0], generators(module)
    _, K = parametrization.chain.split(X.detach().clone())
    update_base(module, "weight")
    coins, pairs = parametrization.chain.split(X.detach())
    assert not any(coin.any() for coin in coins)
    assert torch.equal(pairs, K)


@pytest.mark.parametrize("boundary", ["circular", "walls", "zeros"])
def test_a_plain_checkpoint_starts_from_its_weights_and_others_are_refused(boundary):
    plain = nn.Conv2d(4, 4, 3, padding=1)
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), method="split", boundary=boundary)
    module.load_state_dict(plain.state_dict(), strict=True)
    other = orthogonal(copy.deepcopy(plain), method="split", boundary=boundary)
    close(module.weight, other.weight)
    assert torch.equal(module.bias, plain.bias)
    before = module.weight.detach().clone()
    for method, edges in itertools.product(("split", "exponential"), ("circular", "zeros", "walls")):
        if (method, edges) in (("split", boundary), ("exponential", "walls")):
            continue
        found = orthogonal(nn.Conv2d(4, 4, 3, padding=1), method=method, boundary=edges)
        with pytest.raises(RuntimeError, match="the checkpoint should be of a convolution with"):
            module.load_state_dict(found.state_dict())
        assert torch.equal(module.weight, before)


def test_without_a_base_channels_have_to_be_alike():
    for conv in (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 3)):
        with pytest.raises(ValueError, match="other matrices have no logarithm"):
            register_parametrization(conv, "weight", SplitExponential(base=False))
        assert type(conv) is nn.Conv2d


def test_without_a_base_coins_are_exponentials():
    conv = nn.Conv2d(5, 5, 3, dtype=torch.float64)
    register_parametrization(conv, "weight", SplitExponential(base=False))
    parametrization = conv.parametrizations.weight[0]
    assert parametrization.base is None
    for seed in range(8):
        torch.manual_seed(seed)
        Q = parametrization.sample("uniform")
        before = conv.weight.detach().clone()
        sign = torch.linalg.det(Q.sum((2, 3)))  # of all coins, since pairs have determinant 1
        if sign > 0:
            conv.weight = Q
            close(conv.weight, Q, atol=1e-9, rtol=0)
        else:
            with pytest.raises(InManifoldError):
                conv.weight = Q
            assert torch.equal(conv.weight, before)


@pytest.mark.parametrize("triv", ["cayley", torch.matrix_exp])
def test_other_maps(triv):
    module = orthogonal(make((3, 3), 4, 4), method="split", boundary="walls", triv=triv)
    check(trained(module, 5), "walls")
    Q = module.parametrizations.weight[0].sample("uniform")
    module.weight = Q
    close(module.weight, Q, atol=1e-9, rtol=0)


# Removal


@pytest.mark.parametrize(
    ("boundary", "transposed"),
    [
        ("walls", False),
        slow("walls", True),
        slow("circular", False),
        slow("circular", True),
        slow("zeros", False),
    ],
)
@every_geometry
def test_what_removal_leaves_computes_the_same(boundary, name, transposed):
    module = trained(made(name, boundary, torch.float32, transposed), 3)
    images = [
        random(2, module.in_channels, *matrix_size(module, domain), dtype=torch.float32)
        for domain in sizes_of(module, boundary)
    ]
    results = [module(x) for x in images]
    weight = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, weight)
    for subject in (
        module,
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.jit.script(module),
    ):
        for x, y in zip(images, results, strict=True):
            close(subject(x), y, atol=1e-5, rtol=0)
            close(subject(x[0]), y[0], atol=1e-5, rtol=0)
    x, y = images[-1], results[-1]
    close(torch.jit.trace(module, (x,))(x), y, atol=1e-5, rtol=0)
    close(torch.fx.symbolic_trace(nn.Sequential(module))(x), y, atol=1e-5, rtol=0)
    if isinstance(module, WalledConvolution):
        assert not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        assert {*module.state_dict()} == {"weight", "edges", "bias"}
    elif boundary != "circular" or not (transposed or max(module.stride) > 1):
        assert type(module) in (
            nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        )  # fmt: skip


def matrix_size(module, domain):
    return [n // s for n, s in zip(domain, module.stride, strict=True)] if module.transposed else domain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["3x3", "5x5", "stride 2, 4x4"])
def test_what_removal_leaves_between_walls_exports_with_operators_of_aten_alone(name):
    module = made(name, "walls", torch.float32)
    x = random(2, module.in_channels, *(6 * s for s in module.stride), dtype=torch.float32)
    y = module(x)
    parametrize.remove_parametrizations(module, "weight")
    program = torch.export.export(module, (x,))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in")) for target in operators), operators
    close(program.module()(x), y, atol=1e-5, rtol=0)


def test_nothing_folds_into_the_weight_alone_between_walls():
    module = made("3x3", "walls", torch.float32)
    parametrize.remove_parametrizations(module, "weight")
    norm = nn.BatchNorm2d(4).eval()
    weight = module.weight.detach().clone()
    with pytest.raises(TypeError, match="edges"):
        fuse_conv_bn_eval(module.eval(), norm)
    with pytest.raises(TypeError, match="edges"):
        module.weight = nn.Parameter(weight)
    with pytest.raises(TypeError, match="edges"):
        prune.l1_unstructured(copy.deepcopy(module), "weight", 0.5)
    assert torch.equal(module.weight, weight)
    other = made("3x3", "walls", torch.float32, seed=5)
    parametrize.remove_parametrizations(other, "weight")
    x = random(1, 4, 5, 5, dtype=torch.float32)
    for assign in (False, True):
        twin = copy.deepcopy(module)
        twin.load_state_dict(other.state_dict(), assign=assign)
        close(twin(x), other(x))
    for kind in (nn.Conv2d, nn.modules.conv._ConvNd):
        assert not isinstance(module, kind)


def test_removal_in_a_cached_block_leaves_the_edges_too():
    module = trained(made("3x3", "walls"), 3)
    x = random(2, 4, 5, 5)
    y = module(x)
    with parametrize.cached():
        module(x)
        parametrize.remove_parametrizations(module, "weight")
    close(module(x), y)


def test_nothing_stays_on_the_module_when_its_weight_is_read():
    module = made("3x3", "walls")
    with torch.no_grad():
        W = module.weight
    assert module.installed.edges() is not None
    del W
    assert module.installed.edges() is None


# Looking


@pytest.mark.parametrize("boundary", ["circular", "walls"])
def test_report_and_defect_say_the_same(boundary):
    module = made("3x3", boundary, torch.float32)
    model = nn.Sequential(module, nn.ReLU())
    (row,) = report(model, torch.randn(1, 4, 9, 8)).rows
    assert row.defect == pytest.approx(orthogonality_defect(module, (9, 8)), abs=1e-6)
    assert row.defect < 1e-5
    assert row.parametrized == "yes"
    assert boundary in row.geometry


@pytest.mark.parametrize("boundary", ["circular", "walls"])
def test_plot_spectrum_shows_that_all_values_are_one(boundary):
    pytest.importorskip("matplotlib").use("agg")
    _, values = plot_spectrum(made("3x3", boundary, torch.float32), 8)
    heights = torch.as_tensor(values.collections[0].get_offsets().data)[:, 1]
    assert len(heights) >= 64
    assert (heights - 1).abs().max() < 1e-5


def test_between_walls_images_that_the_stride_does_not_divide_are_refused():
    module = made("stride 2, 4x4", "walls")
    with pytest.raises(ValueError, match="divisible by the stride"):
        module(random(1, 4, 5, 6))


def test_its_repr_says_what_it_is():
    module = made("3x3", "walls")
    assert "orthogonal on every domain, boundary='walls'" in repr(module)
    assert "SplitExponential((4, 4, 3, 3), between_walls=True, triv=expm, base=True)" in repr(module)
    parametrize.remove_parametrizations(module, "weight")
    assert "orthogonal between walls" in repr(module)


def test_parameters_and_buffers_are_fewer_than_the_plain_layers():
    for k in (3, 5, 7):
        plain = nn.Conv2d(32, 32, k, padding=k // 2, bias=False)
        count = sum(p.numel() for p in plain.parameters())
        orthogonal(plain, method="split", boundary="walls")
        ours = sum(p.numel() for p in (*plain.parameters(), *plain.buffers()))
        assert ours < count


@pytest.mark.parametrize("boundary", ["circular", "walls"])
@pytest.mark.parametrize(
    ("kind", "taps", "sides"), [(nn.Conv2d, 3, 2), (nn.Conv2d, 2, 2), (nn.Conv1d, 4, 1)]
)
def test_images_that_the_stride_does_not_divide_are_refused(kind, taps, sides, boundary):
    conv = orthogonal(
        kind(4, 8, taps, stride=2, padding=(taps - 1) // 2), method="split", boundary=boundary
    )
    x = torch.randn(1, 4, *(8,) * sides)
    y = conv(x)
    for side in (7, 9):
        with pytest.raises(ValueError, match="divisible by the stride"):
            conv(torch.randn(1, 4, *(side,) * sides))
    parametrize.remove_parametrizations(conv, "weight")
    close(conv(x), y)
