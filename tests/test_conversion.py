import copy
import io
import itertools
from math import gcd, prod
from random import Random

import pytest
import torch
import torch.nn.functional as F
from models import evaluated
from oracles import defect, dense, operator, periodic, random, skew
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import ConvExponential, generators, orthogonal, orthogonality_defect
from orthoconv_param.operators import evaluate
from orthoconv_param.parametrizations import plan
from orthoconv_param.torus.lattice import Lattice

close = torch.testing.assert_close

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-11, torch.complex128: 1e-11}


def tupled(value, axes):
    return tuple(value) if isinstance(value, tuple) else (value,) * axes


def make(
    kernel,
    cin=4,
    out=4,
    stride=1,
    groups=1,
    dilation=1,
    transposed=False,
    dtype=torch.float64,
    seed=0,
    **options,
):
    """A convolution that keeps the size, or None where no padding of torch's makes it."""
    torch.manual_seed(seed)
    axes = len(kernel)
    stride, dilation = tupled(stride, axes), tupled(dilation, axes)
    spans = [r * (k - 1) for k, r in zip(kernel, dilation, strict=True)]
    padding = tuple(span // 2 for span in spans)
    options |= {
        "stride": stride,
        "groups": groups,
        "dilation": dilation,
        "padding": padding,
        "dtype": dtype,
    }
    odd = any(s == 1 and span % 2 for s, span in zip(stride, spans, strict=True))
    if transposed:
        if odd:
            return None
        rest = tuple(s - 1 - span % 2 for s, span in zip(stride, spans, strict=True))
        return TRANSPOSED[axes - 1](cin, out, kernel, output_padding=rest, **options)
    if odd and max(stride) > 1:
        return None
    if odd:
        options["padding"] = "same"
    return PLAIN[axes - 1](cin, out, kernel, **options)


def exists(conv):
    """Whether a semi-orthogonal operator does: whether a tall one sees all the samples that there are."""
    axes = zip(conv.stride, conv.dilation, conv.kernel_size, strict=True)
    common = prod(gcd(s, r) if k > 1 else 1 for s, r, k in axes)
    rows, columns = conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
    return common == 1 or rows * common <= columns * prod(conv.stride)


def descend(module, domain, steps=25):
    """Steps of SGD down a linear function of the output."""
    size = domain
    if module.transposed:
        size = tuple(n // s for n, s in zip(domain, module.stride, strict=True))
    dtype = generators(module)[0].dtype
    x = random(2, module.in_channels, *size, dtype=dtype, seed=3)
    optimizer = None
    for _ in range(steps):
        y = module(x)
        loss = (y * torch.cos(torch.arange(y.numel(), dtype=y.real.dtype)).reshape(y.shape)).sum()
        loss = loss.real if loss.is_complex() else loss
        module.zero_grad()
        loss.backward()
        if optimizer is None:
            size = max(generators(module)[0].grad.norm().item(), 1e-3)
            optimizer = torch.optim.SGD(generators(module), lr=0.05 / size)
        optimizer.step()


def can_move(module, domain):
    twin = copy.deepcopy(module)
    before = operator(twin, domain)
    with torch.no_grad():
        X = generators(twin)[0]
        X.add_(0.3 * random(*X.shape, dtype=X.dtype, seed=9))
    return (operator(twin, domain) - before).abs().max() > 1e-3


def check_orthogonal(conv, domain, where, triv="expm"):
    dtype = conv.weight.dtype
    options = {"boundary": "walls"} if where == "walls" else {"domain": where}
    if not exists(conv):
        with pytest.raises(ValueError, match="no semi-orthogonal operator"):
            orthogonal(conv, **options)
        return
    module = orthogonal(conv, triv=triv, **options)
    assert module is conv
    before = operator(module, domain)
    assert defect(before.to(torch.promote_types(dtype, torch.float64))) < TOLERANCE[dtype]
    descend(module, domain)
    after = operator(module, domain)
    assert (after - before).abs().max() > 1e-4 or not can_move(module, domain)
    assert defect(after.to(torch.promote_types(dtype, torch.float64))) < TOLERANCE[dtype]


SOME = [  # kernel, geometry, domain
    ((3,), {}, (8,)),
    ((3,), {"dtype": torch.float32}, (37,)),
    ((4,), {"dilation": 2}, (50,)),
    ((7,), {"stride": 3, "transposed": True, "dtype": torch.complex64}, (24,)),
    ((2,), {"stride": 2, "out": 8, "dilation": 3}, (12,)),
    ((5,), {"groups": 4, "dtype": torch.float32}, (100,)),
    ((1,), {"cin": 3, "out": 16, "stride": 2}, (6,)),
    ((3,), {"stride": 2, "dilation": 2, "cin": 4, "out": 4}, (44,)),
    ((3,), {"stride": 2, "dilation": 2, "cin": 3, "out": 16}, (44,)),  # does not exist
    ((3, 3), {"dtype": torch.float32}, (9, 9)),
    ((3, 3), {}, (23, 4)),
    ((1, 5), {"cin": 4, "out": 8, "dtype": torch.complex128}, (5, 12)),
    ((3, 4), {"stride": (1, 2), "cin": 8, "out": 4}, (7, 8)),
    ((3, 4), {"dilation": (1, 2), "triv": "cayley"}, (7, 9)),
    ((2, 2), {"stride": 2, "cin": 3, "out": 16, "dtype": torch.float32}, (10, 6)),
    ((5, 5), {"stride": 2, "groups": 2, "cin": 4, "out": 8, "transposed": True}, (8, 6)),
    ((3, 3), {"groups": 4, "dtype": torch.complex64}, (6, 11)),
    ((1, 1), {"cin": 1, "out": 1}, (4, 4)),
    ((3, 3), {"cin": 1, "out": 1, "triv": "cayley"}, (19, 21)),
    ((3, 3, 3), {"cin": 2, "out": 2, "dtype": torch.float32}, (5, 4, 3)),
    ((1, 2, 3), {"cin": 2, "out": 3, "stride": (1, 2, 1), "dtype": torch.complex128}, (3, 4, 5)),
    ((3, 1, 2), {"cin": 2, "out": 2, "stride": (1, 1, 2), "transposed": True}, (3, 4, 4)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("where", ["any", "given", "walls"])
@pytest.mark.parametrize(
    ("kernel", "geometry", "domain"),
    [case if i % 2 == 0 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(SOME)],
)
def test_the_operator_is_orthogonal_at_first_and_after_training(kernel, geometry, domain, where):
    geometry = dict(geometry)
    triv = geometry.pop("triv", "expm")
    conv = make(kernel, **geometry)
    assert conv is not None
    spans = [r * (k - 1) + 1 for k, r in zip(kernel, conv.dilation, strict=True)]
    domain = (
        domain
        if where != "given"
        else tuple(max(n, -(-e // s) * s) for n, e, s in zip(domain, spans, conv.stride, strict=True))
    )
    check_orthogonal(conv, domain, domain if where == "given" else where, triv)


KERNELS = {
    1: [(1,), (2,), (3,), (4,), (5,), (7,)],
    2: [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (1, 5), (3, 4)],
    3: [(1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 5, 1), (3, 4, 1)],
}
STRIDES = {1: [1, 2, 3], 2: [1, 2, 3, (1, 2)], 3: [1, 2, (1, 2, 1)]}
CHANNELS = [
    (4, 4, 1),
    (4, 4, 2),
    (4, 4, 4),
    (4, 8, 1),
    (4, 8, 2),
    (8, 4, 1),
    (8, 4, 2),
    (3, 16, 1),
    (1, 1, 1),
]
SIZES = {  # odd, even, unequal, prime, smaller than the compact kernel
    1: [(30,), (37,), (8,), (53,)],
    2: [(7, 7), (6, 9), (4, 13), (5, 8)],
    3: [(3, 4, 3), (5, 2, 3)],
}


def whole_grid():
    """Each kernel with each stride, dilation and channels; the other choices are drawn, always the same."""
    draw = Random(0).choice
    for axes in (1, 2, 3):
        for kernel, stride, dilation, channels in itertools.product(
            KERNELS[axes], STRIDES[axes], (1, 2), CHANNELS
        ):
            cin, out, _ = channels
            if axes == 3 and (cin + out > 8 or (dilation == 2 and max(kernel) > 3)):
                continue  # the dense matrices are large
            size, dtype = draw(SIZES[axes]), draw(list(TOLERANCE))
            triv, where, transposed = draw(["expm", "cayley"]), draw(["any", "given"]), draw([False, True])
            if axes > 1 and dilation * max(tupled(stride, axes)) == 6 and TOLERANCE[dtype] < 1e-8:
                where = (
                    "given"  # trained, compact kernels of such a reach take a minute in double precision
                )
            if make(kernel, stride=stride, dilation=dilation, transposed=transposed) is None:
                transposed = not transposed  # no padding of torch's keeps the size
            yield kernel, stride, dilation, channels, size, dtype, triv, where, transposed


@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, 40, 10))  # a tenth of it: all would take half an hour
def test_the_grid(part):
    made = refused = 0
    for number, case in enumerate(itertools.islice(whole_grid(), part, None, 40)):
        kernel, stride, dilation, (cin, out, groups), size, dtype, triv, where, transposed = case
        geometry = {"stride": stride, "dilation": dilation, "cin": cin, "out": out, "groups": groups}
        conv = make(kernel, **geometry, transposed=transposed, dtype=dtype)
        if conv is None:
            continue
        axes = len(kernel)
        strides = conv.stride
        domain = tuple(max(1, n // s) * s for n, s in zip(size, strides, strict=True))
        if where == "given":
            spans = [r * (k - 1) + 1 for k, r in zip(kernel, conv.dilation, strict=True)]
            domain = tuple(max(n, -(-e // s) * s) for n, e, s in zip(domain, spans, strides, strict=True))
        assert len(domain) == axes
        refused += not exists(conv)
        made += 1
        check_orthogonal(conv, domain, "any" if where == "any" else domain, triv)
        if number % 4 == 0:
            walled = make(kernel, **geometry, transposed=transposed, dtype=dtype)
            check_orthogonal(walled, domain, "walls", triv)
    assert made > refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "geometry", "domain"),
    [
        ((3,), {}, (40,)),
        ((4,), {}, (13,)),
        ((4,), {"dilation": 2}, (60,)),
        ((2,), {"dilation": 3}, (8,)),
        ((3,), {"dilation": 2, "transposed": True}, (60,)),
        ((3, 3), {}, (19, 6)),
        ((2, 4), {"groups": 2}, (5, 6)),
        ((5, 1), {"dilation": (2, 1)}, (9, 20)),
        ((3, 3), {"transposed": True}, (8, 9)),
        ((3, 2, 1), {}, (3, 4, 3)),
    ],
)
def test_the_operator_is_the_exponential_of_what_it_was(kernel, geometry, domain, dtype, monkeypatch):
    conv = make(kernel, cin=2, out=2, dtype=dtype, **geometry)
    spans = [r * (k - 1) for k, r in zip(kernel, conv.dilation, strict=True)]
    plain = dense(
        conv.weight.detach(), domain, None, conv.groups, conv.dilation, tuple(span // 2 for span in spans)
    )
    plain = plain.mT if conv.transposed else plain
    exact = torch.linalg.matrix_exp(skew(plain.double()))
    module = orthogonal(conv)
    close(operator(module, domain).double(), exact, atol=TOLERANCE[dtype], rtol=0)
    # whichever way it is evaluated
    evaluated(monkeypatch, "direct")
    close(operator(module, domain).double(), exact, atol=TOLERANCE[dtype], rtol=0)


def test_before_the_call_the_oracle_is_torchs_own_periodic_convolution():
    conv = nn.Conv2d(
        2, 2, (3, 4), padding="same", padding_mode="circular", dilation=(1, 2), dtype=torch.float64
    )
    plain = dense(conv.weight.detach(), (7, 9), None, 1, conv.dilation, (1, 3))
    close(operator(conv, (7, 9)), plain)


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ((3, 3), {}),
        ((2, 4), {}),
        ((3, 3), {"stride": 2, "out": 16}),
        ((5, 3), {"stride": (1, 2), "cin": 3, "out": 7}),
        ((3, 3), {"dilation": 2}),
        ((2, 2), {"stride": 2, "out": 16}),
    ],
)
def test_a_given_domain_starts_at_the_nearest_orthogonal_operator(kernel, geometry):
    conv = make(kernel, **geometry)
    before = (
        conv.padding
        if conv.padding != "same"
        else tuple(r * (k - 1) // 2 for k, r in zip(kernel, conv.dilation, strict=True))
    )
    plain = dense(conv.weight.detach(), (8, 6), conv.stride, 1, conv.dilation, before)
    U, _, Vh = torch.linalg.svd(plain, full_matrices=False)
    close(operator(orthogonal(conv, domain=(8, 6)), (8, 6)), U @ Vh)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.complex128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("where", ["any", (6, 8)])
def test_zero_boundary_does_not_expand(where, transposed, dtype, stride):
    for kernel in ((3, 3), (1, 5), (4, 2)):
        conv = make(kernel, out=4 * stride**2, stride=stride, transposed=transposed, dtype=dtype)
        if conv is None:
            continue
        module = orthogonal(conv, domain=where, boundary="zeros")
        descend(module, (6, 8), steps=5)
        values = torch.linalg.svdvals(
            operator(module, (6, 8)).to(torch.promote_types(dtype, torch.float64))
        )
        assert values.max() <= 1 + 1e-5
        assert values.max() > 0.9


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("way", ["spectral", "direct"])
def test_zero_boundary_on_every_domain_is_zero_padding(stride, way, monkeypatch):
    evaluated(monkeypatch, way)
    module = orthogonal(make((3, 3), 3, 5, stride=stride, dtype=torch.float32), boundary="zeros")
    for size in ((30, 36), (6, 12), (3, 6), (6, 60)):
        x = torch.randn(2, 3, *(stride * n for n in size))
        W, b = module.weight, module.bias
        padding = tuple(k // 2 for k in W.shape[2:])
        close(module(x), F.conv2d(x, W, b, stride, padding), atol=1e-5, rtol=0)
    twin = make((3, 3), 3, 5, stride=stride, transposed=True, dtype=torch.float32)
    module = orthogonal(twin, boundary="zeros")
    x, W = torch.randn(2, 3, 7, 4), module.weight
    y = F.conv_transpose2d(x, W, module.bias, stride, W.shape[-1] // 2, stride - 1)
    close(module(x), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_boundary_on_a_given_domain_keeps_a_kernel_of_few_taps(stride):
    """An orthogonal kernel of no more taps than the generator: its zero-padded convolution is unchanged."""
    conv = make((3, 2) if stride == 2 else (3, 3), 4, 4 * stride**2, stride=stride)
    with torch.no_grad():  # one tap
        conv.weight.zero_()
        conv.weight[:, :, 1, 0] = torch.linalg.qr(random(4 * stride**2, 4)).Q
    x = random(2, 4, 6, 8)
    before = conv(x)
    if stride == 1:
        close(orthogonal(conv, domain=(6, 8), boundary="zeros")(x), before)
        return
    # at other phases a strided one is completed, which the interior of the image sees as well
    module = orthogonal(conv, domain=(6, 8), boundary="zeros")
    assert torch.linalg.svdvals(operator(module, (6, 8))).max() < 1 + 1e-12


@pytest.mark.parametrize(("stride", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
def test_zero_boundary_on_a_given_domain_reads_the_taps_modulo_the_torus(stride, transposed):
    """That of a larger torus, cut out, is zero padding of the kernel continued as far as images reach."""
    n = (6, 8)
    conv = make((3, 3), 4 * stride**2, 4, stride=stride, transposed=transposed)
    if not transposed:
        conv = make((3, 3), 4, 4 * stride**2, stride=stride)
    module = orthogonal(conv, domain=n, boundary="zeros")
    W = module.weight
    assert W.shape[2:] == tuple(-(-(k + 2) // stride) * stride for k in n)
    for axis, k in enumerate(n, start=2):  # taps at -(n - 1) ... n - 1
        N = W.shape[axis]
        W = W.index_select(axis, (torch.arange(-(k - 1), k) + (N - 1) // 2) % N)
    padding = tuple(k - 1 for k in n)
    x = random(2, module.in_channels, *(k // stride if transposed else k for k in n))
    if transposed:
        close(module(x), F.conv_transpose2d(x, W, module.bias, stride, padding, stride - 1))
    else:
        close(module(x), F.conv2d(x, W, module.bias, stride, padding))


@pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (2, 4), (3, 3), (4, 2), (4, 6), (2, 3), (3, 2)])
@pytest.mark.parametrize(("cin", "out"), [(1, 1), (2, 3), (1, 4), (1, 9), (3, 16)])
def test_what_is_refused_does_not_exist(cin, out, stride, dilation):
    """Singular values of 1 take full rank, which no kernel of that stride and dilation has; or some has."""
    matrix = dense(random(out, cin, 36), (36,), (stride,), 1, (dilation,))
    full = torch.linalg.matrix_rank(matrix) == min(matrix.shape)
    conv = make((3,), cin, out, stride=stride, dilation=dilation)
    assert exists(conv) == full
    if full:
        assert defect(operator(orthogonal(conv), (36,))) < 1e-11
        return
    with pytest.raises(ValueError, match="no semi-orthogonal operator"):
        orthogonal(conv)


def test_the_way_of_evaluation_is_chosen_by_cost(monkeypatch):
    chosen, ways = {}, []

    def record(way):
        return lambda state, x, bias: ways.append(way) or x

    for kernel, side in ((1, 32), (3, 8), (3, 64)):
        module = orthogonal(make((kernel, kernel), 16, 16, dtype=torch.float32))
        chosen[kernel, side] = evaluate.choose(module.operator, (side, side), 8).name
        ways.clear()
        for evaluator in evaluate.EVALUATORS:
            monkeypatch.setattr(evaluator, "prepare", lambda operator, domain: None)
            monkeypatch.setattr(evaluator, "apply", record(evaluator.name))
        module(torch.zeros(8, 16, side, side))
        monkeypatch.undo()
        assert ways == [chosen[kernel, side]]
    assert chosen == {(1, 32): "direct", (3, 8): "spectral", (3, 64): "spectral"}


@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize(
    ("kernel", "geometry", "size"),
    [
        ((3,), {"groups": 2}, (50,)),
        ((3,), {}, (7,)),
        ((3, 3), {}, (21, 30)),
        ((3, 3), {"stride": 2, "out": 6}, (8, 34)),
        ((3, 3), {"stride": 3, "transposed": True}, (4, 9)),
        ((3, 3), {"dilation": 2, "transposed": True}, (30, 11)),
        ((2, 3), {"dilation": 2, "stride": (3, 1)}, (30, 11)),
        ((1, 3, 3), {"cin": 2, "out": 2}, (3, 4, 21)),
    ],
)
def test_both_ways_of_evaluation_agree_and_their_gradients(kernel, geometry, size, boundary, monkeypatch):
    conv = make(kernel, dtype=torch.float32, **geometry)
    modules = [orthogonal(copy.deepcopy(conv), boundary=boundary) for _ in range(2)]
    outcomes = []
    for module, way in zip(modules, ("spectral", "direct"), strict=True):
        evaluated(monkeypatch, way)
        x = random(2, conv.in_channels, *size, dtype=torch.float32).requires_grad_()
        y = module(x)
        inputs = (x, module.bias, *generators(module))
        outcomes.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
    for spectral, direct in zip(*outcomes, strict=True):
        scale = max(1, direct.abs().max().item())
        close(spectral, direct, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("where", ["any", (8, 8)])
def test_the_norms_of_a_state_and_of_its_gradient_are_kept_over_1000_steps(where):
    module = orthogonal(make((3, 3), 16, 16, dtype=torch.float32, bias=False), domain=where)
    start = random(1, 16, 8, 8, dtype=torch.float32).requires_grad_()
    x = start
    with parametrize.cached():
        for _ in range(1000):
            x = module(x)
    G = random(1, 16, 8, 8, dtype=torch.float32, seed=1)
    (gradient,) = torch.autograd.grad(x, start, G)
    assert abs(x.norm() / start.norm() - 1) < 1e-3
    assert abs(gradient.norm() / G.norm() - 1) < 1e-3


@pytest.mark.parametrize("side", [8, 40])
@pytest.mark.parametrize("where", ["any", "given"])
def test_a_cached_loop_computes_the_exponential_and_the_transform_once(where, side, monkeypatch):
    exponentials, transforms = [], []

    def triv(A):
        if A.requires_grad:  # not when the norm's bound, or a degree, is looked for
            exponentials.append(A)
        return torch.linalg.matrix_exp(A)

    module = orthogonal(
        make((3, 3), 4, 4, dtype=torch.float32), triv=triv, domain=where if where == "any" else side
    )
    module(torch.randn(1, 4, side, side))  # K is known
    spectrum = Lattice.spectrum

    def counting(self, kernel, *arguments):
        if kernel.requires_grad and kernel.shape[2:] != (3, 3):
            transforms.append(kernel)
        return spectrum(self, kernel, *arguments)

    monkeypatch.setattr(Lattice, "spectrum", counting)
    evaluated(monkeypatch, "spectral")
    exponentials.clear()
    before = set(vars(module)), set(module._buffers), set(module._modules)
    x = torch.randn(2, 4, side, side)
    with parametrize.cached():
        for _ in range(50):
            x = module(x)
    x.sum().backward()
    assert len(exponentials) == 1
    # on a given domain, and on a small one, the exponential's result is the spectrum already
    assert len(transforms) == (1 if where == "any" and side == 40 else 0)
    assert (set(vars(module)), set(module._buffers), set(module._modules)) == before
    assert not parametrize._cache


def test_cached_results_are_forgotten():
    module = orthogonal(make((3, 3), dtype=torch.float32))
    x = torch.randn(1, 4, 9, 9)
    with parametrize.cached():
        first = module(x)
        assert torch.equal(module(x), first)
    with torch.no_grad():
        generators(module)[0].add_(0.3 * torch.randn(4, 4, 3, 3))
    assert not torch.allclose(module(x), first, atol=1e-3)


# As a module


def test_images_of_several_sizes_unbatched_and_channels_last():
    module = orthogonal(make((3, 3), 4, 4, dtype=torch.float32))
    free = orthogonal(make((3, 3), 4, 4, dtype=torch.float32, bias=False))
    for size in ((5, 5), (40, 31), (16, 17), (1, 1)):
        x = torch.randn(3, 4, *size)
        y = module(x)
        close(free(x).norm(), x.norm(), rtol=1e-5, atol=0)
        close(y - module.bias[:, None, None], free(x), atol=1e-5, rtol=0)
        close(module(x[1]), y[1], atol=1e-5, rtol=0)
        last = module(x.to(memory_format=torch.channels_last))
        close(last, y, atol=1e-5, rtol=0, check_stride=False)
        assert min(size) == 1 or last.is_contiguous(memory_format=torch.channels_last)
    assert module(torch.randn(0, 4, 6, 6)).shape == (0, 4, 6, 6)


def test_transposed_modules_take_the_only_output_size():
    module = orthogonal(make((3, 3), 8, 2, stride=2, transposed=True, dtype=torch.float32))
    x = torch.randn(1, 8, 3, 4)
    assert torch.equal(module(x, output_size=(6, 8)), module(x))
    with pytest.raises(ValueError, match=r"output_size should be \(6, 8\)"):
        module(x, output_size=(5, 8))


def test_registering_keeps_the_parameter_and_training_moves_it():
    conv = make((3, 3), dtype=torch.float32)
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.05)
    weight = conv.weight
    module = orthogonal(conv)
    assert generators(module) == [weight]
    taps = module.weight.shape[-1]
    for _ in range(25):
        optimizer.zero_grad()
        x = torch.randn(4, 4, 8, 8)
        (module(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
    assert module.weight.shape[-1] > taps
    assert defect(operator(module, (8, 8)).double()) < 1e-5


def test_repr_says_what_it_is():
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1))
    assert "ParametrizedOrthogonalConv2d(" in repr(module)
    assert "orthogonal on every domain, boundary='circular'" in repr(module)
    module = orthogonal(nn.ConvTranspose1d(4, 4, 3, padding=1), domain=8, boundary="zeros")
    assert "orthogonal on domain=(8,), boundary='zeros'" in repr(module)
    assert isinstance(module, nn.ConvTranspose1d)


@pytest.mark.parametrize("where", ["any", (8, 8)])
def test_deepcopy_is_independent(where):
    module = orthogonal(make((3, 3)), domain=where)
    twin = copy.deepcopy(nn.Sequential(module, module))[1]
    x = random(1, 4, 8, 8)
    y = module(x)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        generators(twin)[0].add_(0.2 * random(4, 4, 3, 3, seed=5))
    assert torch.equal(module(x), y)
    parametrize.remove_parametrizations(twin, "weight")
    assert torch.equal(module(x), y)
    assert parametrize.is_parametrized(module, "weight")
    module.weight = random(4, 4, 3, 3, seed=6)
    again = copy.deepcopy(module)
    parametrize.remove_parametrizations(module, "weight")
    close(again(x), module(x))
    close(copy.deepcopy(module)(x), module(x))


@pytest.mark.parametrize("where", ["any", (12, 12)])
def test_state_dict_into_a_fresh_module(where):
    module = orthogonal(make((3, 3)), domain=where)
    descend(module, (12, 12), steps=5)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = orthogonal(make((3, 3), seed=1), domain=where)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = random(1, 4, 12, 12)
    assert torch.equal(fresh(x), module(x))


REMOVALS = [  # kernel, geometry, boundary, where, size, whether torch has it
    ((3, 3), {}, "circular", "any", (30, 24), True),
    ((4, 2), {}, "circular", "any", (50, 24), True),
    ((3, 3), {"stride": 2, "out": 16}, "circular", "any", (44, 46), True),
    ((3, 3), {"dilation": 2}, "circular", "any", (30, 30), True),
    ((3, 3), {"groups": 2}, "circular", (7, 8), (7, 8), True),
    ((3, 3), {}, "circular", "any", (5, 30), False),  # torch does not pad an image by more than its size
    ((3, 3), {"stride": 2}, "circular", (8, 8), (8, 8), False),
    ((3, 3), {"transposed": True}, "circular", "any", (30, 24), False),
    ((3, 3), {"transposed": True, "stride": 2}, "circular", (8, 8), (8, 8), False),
    ((3, 3), {}, "zeros", "any", (5, 30), True),
    ((3, 3), {"stride": 2}, "zeros", "any", (6, 30), True),
    ((3, 3), {"transposed": True, "stride": 2}, "zeros", "any", (6, 30), True),
    ((3, 3), {}, "zeros", (8, 8), (8, 8), False),
    ((3,), {}, "circular", "any", (40,), True),
    ((1, 1), {}, "circular", "any", (4, 2), True),
    ((1, 1), {"transposed": True, "dilation": 2}, "circular", "any", (4, 2), True),
    ((3, 3), {}, "circular", (3, 3), (3, 3), True),
    ((3, 2), {"stride": 2, "out": 16}, "circular", (8, 6), (8, 6), False),
    ((3, 1, 1), {}, "circular", "any", (40, 2, 1), True),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kernel", "geometry", "boundary", "where", "size", "plain"), REMOVALS)
@pytest.mark.parametrize("used", [False, True])
def test_removal_leaves_a_module_that_computes_the_same(
    kernel, geometry, boundary, where, size, plain, used
):
    conv = make(kernel, **geometry)
    original = type(conv)
    module = orthogonal(conv, domain=where, boundary=boundary)
    descend(module, size, steps=3)
    coarse = tuple(n // s for n, s in zip(size, module.stride, strict=True)) if module.transposed else size
    x = random(2, module.in_channels, *coarse)
    y = module(x)
    parameter = generators(module)[0]
    parametrize.remove_parametrizations(module, "weight")
    assert list(module.state_dict()) == ["weight", "bias"]
    assert module.weight is parameter
    assert parameter.grad is None
    close(module(x), y, atol=1e-10, rtol=0)
    assert (type(module) is original) == plain
    assert isinstance(module, original)
    if not used:
        return
    # also a module that was saved whole, its weights in a fresh one, and a copy
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    close(torch.load(buffer, weights_only=False)(x), module(x))
    close(copy.deepcopy(module)(x), module(x))
    torch.compiler.reset()
    exported = torch.export.export(module, (x,))
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets
    assert [target for target in targets if not target.startswith("aten.")] == []
    close(exported.module()(x), y, atol=1e-10, rtol=0)


def test_before_any_image_was_seen_removal_leaves_what_works_at_every_size():
    module = orthogonal(make((3, 3)))
    twin = copy.deepcopy(module)
    parametrize.remove_parametrizations(module, "weight")
    for size in ((3, 3), (40, 5)):
        x = random(1, 4, *size)
        close(module(x), twin(x))


def test_removal_beside_a_parametrized_bias():
    class Double(nn.Module):
        def forward(self, X):
            return 2 * X

    module = orthogonal(make((3, 3)))
    parametrize.register_parametrization(module, "bias", Double())
    x = random(1, 4, 30, 30)
    y = module(x)
    parametrize.remove_parametrizations(module, "weight")
    close(module(x), y)
    parametrize.remove_parametrizations(module, "bias")
    close(module(x), y)
    assert type(module) is nn.Conv2d


@pytest.mark.parametrize("size", [(5, 5), (30, 30)])
def test_after_removal_it_is_trained_as_any_and_made_orthogonal_again(size):
    module = orthogonal(make((3, 3)))
    x = random(2, 4, *size)
    module(x)
    parametrize.remove_parametrizations(module, "weight")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with parametrize.cached():  # has nothing to do with it
        for _ in range(3):
            optimizer.zero_grad()
            (module(x) - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
    assert orthogonality_defect(module, size) > 1e-3
    module = orthogonal(module, domain=tuple(max(n, module.weight.shape[-1]) for n in size))
    y = module(random(1, 4, *module.operator.action.domain))
    close((y - module.bias[:, None, None]).norm(), random(1, 4, *module.operator.action.domain).norm())


@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize("where", ["any", (8, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_removal_without_the_parametrization_gives_the_free_parameter_back(transposed, where, boundary):
    conv = make((3, 3), transposed=transposed)
    plain = copy.deepcopy(conv)
    module = orthogonal(conv, domain=where, boundary=boundary)
    free = generators(module)[0].detach().clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert torch.equal(module.weight, free)
    assert type(module) is type(plain)
    assert module.extra_repr() == plain.extra_repr()
    with torch.no_grad():
        plain.weight.copy_(free)
    x = random(1, 4, 8, 8)
    close(module(x), plain(x))


def test_other_parametrizations_are_heard():
    class Half(nn.Module):
        def forward(self, X):
            return X / 2

    module = orthogonal(make((3, 3), bias=False))
    x = random(1, 4, 20, 20)
    y = module(x)
    parametrize.register_parametrization(module, "weight", Half())
    close(module(x), y / 2)


def test_a_subclass_is_kept():
    class Named(nn.Conv2d):
        purpose = "none"

    conv = Named(4, 4, 3, padding=1)
    module = orthogonal(conv)
    assert module.purpose == "none"
    assert isinstance(module, Named)
    x = torch.randn(1, 4, 30, 30)
    y = module(x)
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is Named
    close(module(x), y, atol=1e-5, rtol=0)


class Named(nn.ConvTranspose2d):
    """A subclass that pickle finds."""


def test_a_subclass_that_torch_cannot_replace_is_saved_whole():
    module = orthogonal(Named(4, 4, 3, padding=1))
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(module, io.BytesIO())
    parametrize.remove_parametrizations(module, "weight")
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert isinstance(again, Named)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize("where", ["any", (9, 9)])
def test_conversion_of_precision(where):
    module = orthogonal(make((3, 3), dtype=torch.float32, bias=False), domain=where)
    module.double()
    assert defect(operator(module, (9, 9))) < 1e-11
    module.to(torch.bfloat16)
    x = torch.randn(1, 4, 9, 9, dtype=torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert abs(y.float().norm() / x.float().norm() - 1) < 1e-2
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    close(y.norm(), x.float().norm(), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "side"), [("any", 8), ("any", 40), ("given", 8)])
@pytest.mark.parametrize("boundary", ["circular", "zeros"])
def test_compile_and_transforms(where, side, boundary):
    torch.compiler.reset()
    module = orthogonal(
        make((3, 3), 2, 2), domain=where if where == "any" else (side, side), boundary=boundary
    )
    x = random(2, 2, side, side)
    y = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x), y)
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    key = "parametrizations.weight.original"
    close(per_sample[key][1], torch.func.grad(loss)(parameters, x[1:])[key])


# Bad input


@pytest.mark.parametrize(
    ("error", "conv", "options", "message"),
    [
        (TypeError, lambda: nn.Linear(3, 3), {}, "module should be an nn.Conv"),
        (TypeError, lambda: nn.Conv2d, {}, "module should be an nn.Conv"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3), {}, r"keep the size: use padding=\(1, 1\)"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=2), {}, r"Found padding=\(2, 2\)"),
        (ValueError, lambda: nn.Conv2d(4, 4, 4, padding=2), {}, 'padding="same"'),
        (ValueError, lambda: nn.Conv1d(4, 4, 3, padding=2), {}, "causal convolution should stay"),
        (ValueError, lambda: nn.Conv1d(4, 4, 3), {}, "would read later steps too"),
        (ValueError, lambda: nn.Conv1d(4, 4, 3, padding=4, dilation=2), {}, "only if it joins no steps"),
        (ValueError, lambda: nn.Conv3d(4, 4, 3, padding=(2, 1, 1)), {}, "causal convolution should stay"),
        (
            ValueError,
            lambda: nn.Conv2d(4, 4, 5, stride=2, padding=1),
            {},
            r"keep the size \(divided by the stride \(2, 2\)\): use",
        ),
        (
            ValueError,
            lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
            {},
            r"output_padding=\(1, 1\)",
        ),
        (ValueError, lambda: nn.ConvTranspose2d(4, 4, 4, padding=1), {}, "none does with stride 1"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"name": "wait"}, "name should be that of a"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"name": "bias"}, 'name should be "weight"'),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"domain": "all"}, "domain should be"),
        (TypeError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"domain": None}, "domain should be"),
        (TypeError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"domain": 8.0}, "domain should be"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"domain": (8, 8, 8)}, "one for each"),
        (ValueError, lambda: nn.Conv2d(4, 4, 5, padding=2), {"domain": 4}, "at least the kernel's taps"),
        (
            ValueError,
            lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2),
            {"domain": 4},
            r"with their dilation, \(5, 5\)",
        ),
        (
            ValueError,
            lambda: nn.Conv2d(4, 4, 3, padding=1),
            {"domain": 2, "boundary": "zeros"},
            "at least the kernel's taps",
        ),
        (
            ValueError,
            lambda: nn.Conv2d(4, 4, 3, padding=1, stride=2),
            {"domain": 7},
            "divisible by the stride",
        ),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"boundary": "reflect"}, "boundary should be"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"triv": "exp"}, "triv should be one of"),
        (ValueError, lambda: nn.Conv2d(4, 4, 3, padding=1), {"base": True}, "base should be"),
        (ValueError, lambda: nn.LazyConv2d(4, 3, padding=1), {}, "lazy"),
        (
            ValueError,
            lambda: nn.Conv1d(1, 4, 3, padding=2, stride=2, dilation=2),
            {},
            "no semi-orthogonal operator",
        ),
    ],
)
def test_bad_input_is_named_and_changes_nothing(error, conv, options, message):
    module = conv()
    before = type(module), dict(vars(module))
    with pytest.raises(error, match=message):
        orthogonal(module, **options)
    assert (type(module), dict(vars(module))) == before


def test_weights_that_are_not_finite_leave_the_module_as_it_was():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = torch.nan
    for where in ("any", 8):
        with pytest.raises(ValueError, match="finite"):
            orthogonal(conv, domain=where)
        assert type(conv) is nn.Conv2d
        assert not parametrize.is_parametrized(conv)


def test_modules_that_compute_something_else_are_refused():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1, 0, 1)))

    with pytest.raises(ValueError, match="Padded, with a forward of its own"):
        orthogonal(Padded(4, 4, 3, padding=1))
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match="should not be parametrized yet"):
        orthogonal(module)


def test_inputs_that_do_not_fit_are_named():
    conv = make((3, 3), 4, 4, stride=2, dtype=torch.float32)
    every, one = orthogonal(copy.deepcopy(conv)), orthogonal(copy.deepcopy(conv), domain=(8, 6))
    up = orthogonal(make((3, 3), 4, 4, stride=2, transposed=True, dtype=torch.float32), domain=(8, 6))
    for module, size, message in (
        (every, (1, 4, 7, 8), r"divisible by the stride \(2, 2\). Found \(7, 8\)"),
        (one, (1, 4, 8, 8), r"input should be of the domain's size, \(8, 6\). Found \(8, 8\)"),
        (up, (1, 4, 8, 6), r"output should be of the domain's size, \(8, 6\). Found \(16, 12\)"),
        (every, (1, 3, 8, 8), "input should have 4 channels"),
        (every, (4, 8), "input should have 4 channels"),
        (every, (1, 4, 0, 8), "divisible"),
    ):
        with pytest.raises(ValueError, match=message):
            module(torch.zeros(size))
    with pytest.raises(TypeError, match="input should be of the weight's dtype"):
        every(torch.zeros(1, 4, 8, 8, dtype=torch.float64))


def test_it_is_one_line_of_the_plain_parametrization():
    module = orthogonal(make((3, 3)))
    assert isinstance(module.parametrizations.weight[0], ConvExponential)
    x = random(1, 4, 30, 30)
    y = periodic(x, module.weight, (1, 1)) + module.bias[:, None, None]
    close(module(x), y)
    assert orthogonality_defect(module, 30) < 1e-12


SMALLER = [  # kernel, options of the convolution, domain, norm
    ((3,), {"cin": 8, "out": 8}, (60,), 1.0),
    ((3,), {"cin": 8, "out": 8, "stride": 2}, (120,), 1.0),
    ((3,), {"cin": 4, "out": 9, "dilation": 3}, (162,), 0.5),
    ((2,), {"cin": 4, "out": 8, "stride": 2}, (96,), 1.0),
    ((5,), {"cin": 16, "out": 16, "groups": 2}, (96,), 0.5),
    ((5,), {"cin": 8, "out": 16, "transposed": True}, (96,), 0.5),
    ((3, 1), {"cin": 8, "out": 8}, (48, 3), 0.3),
    ((3,), {"cin": 8, "out": 8, "dtype": torch.complex64}, (60,), 2.0),
    ((3,), {"cin": 1, "out": 9}, (60,), 1.0),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize(("kernel", "options", "domain", "norm"), SMALLER)
def test_the_exponential_of_a_given_domain_on_a_smaller_torus(
    kernel, options, domain, norm, boundary, monkeypatch
):
    """It and its gradient are those of the whole domain, to rounding, and the operator is orthogonal."""
    used = []
    original = plan.smaller_torus

    def record(*arguments):
        used.append(original(*arguments))
        return used[-1]

    monkeypatch.setattr(plan, "smaller_torus", record)
    plain = make(kernel, **{"dtype": torch.float32, **options})
    conv = orthogonal(plain, domain=domain, boundary=boundary)
    generator = conv.parametrizations.weight.original
    with torch.no_grad():
        X = torch.randn_like(generator)
        generator.copy_(X * norm / X.norm() * max(X.shape[:2]) ** 0.5)
    exact = copy.deepcopy(conv).to(torch.promote_types(generator.dtype, torch.float64))
    outcomes = []
    for module in (conv, exact):
        weight = module.weight
        G = random(*weight.shape, dtype=exact.weight.dtype, seed=3).to(weight.dtype)
        outcomes.append(
            (weight, torch.autograd.grad(weight, module.parametrizations.weight.original, G)[0])
        )
    assert used[0] is not None
    assert used[0].frequencies < conv.operator.spectrum(domain)[0].frequencies
    for one, other in zip(*outcomes, strict=True):
        scale = other.abs().max().item()
        assert (one.to(other.dtype) - other).abs().max() < 1e-5 * scale
    if boundary == "circular":
        assert defect(operator(conv, domain)) < 1e-5
    # where a norm cannot be read the whole domain is taken
    compiled = torch.func.vmap(conv.parametrizations.weight[0])(generator.detach()[None])[0]
    assert used[-1] is None
    assert (compiled - conv.weight).abs().max() < 1e-5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"domain": 16},
        {"boundary": "walls"},
        {"method": "split"},
        {"method": "split", "boundary": "walls"},
    ],
)
def test_a_decoder_with_the_encoders_parameter_is_its_inverse_in_training(options, dtype):
    torch.manual_seed(0)
    encoder = orthogonal(nn.Conv2d(4, 16, 4, stride=2, padding=1, bias=False, dtype=dtype), **options)
    transposed = nn.ConvTranspose2d(16, 4, 4, stride=2, padding=1, bias=False, dtype=dtype)
    decoder = orthogonal(transposed, **options)
    decoder.load_state_dict(encoder.state_dict())
    decoder.parametrizations.weight.original = encoder.parametrizations.weight.original
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    x = random(2, 4, 16, 16, dtype=dtype)
    for _ in range(3):
        y = encoder(x)
        y = decoder(y.conj()).conj() if dtype.is_complex else decoder(y)
        close(y, x, atol=1e-5, rtol=0)
        optimizer.zero_grad()
        encoder(x).abs().sum().backward()
        optimizer.step()
