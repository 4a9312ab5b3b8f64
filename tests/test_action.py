"""The exponential of a convolution, applied by its Chebyshev series: between walls, and around a torus."""

import copy
import pickle
import weakref
from math import prod

import pytest
import scipy.linalg
import scipy.special
import torch
from models import evaluated, tells_compiling_from_exporting
from oracles import defect, exponential_between_walls, operator, random
from test_conversion import TOLERANCE, make
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from orthoconv_param import generators, orthogonal, orthogonality_defect, retrofit, set_orthogonality
from orthoconv_param.action import recurrence
from orthoconv_param.matrices import chebyshev, norms
from orthoconv_param.matrices.products import skew
from orthoconv_param.walled_exponential import WalledExponential

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

close = torch.testing.assert_close


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def generator_of(module):
    return module.parametrizations.weight[0]


def scaled_to(conv, norm):
    """A copy between walls whose skew part has a norm, and what it is the exponential of."""
    plain = copy.deepcopy(conv)
    module = orthogonal(copy.deepcopy(conv), boundary="walls")
    with torch.no_grad():
        plain.weight.mul_(norm / generator_of(module).norm.degree.level)
        module.weight = plain.weight.detach()
    return module, plain


# Against scipy

CASES = [  # kernel, options, domain
    ((2,), {}, (5,)),
    ((3,), {}, (1,)),
    ((4,), {"dilation": 2}, (9,)),
    ((5,), {"cin": 2, "out": 5}, (3,)),
    ((7,), {"stride": 3, "cin": 2, "out": 4}, (9,)),
    ((3,), {"complex": True, "dilation": 3}, (8,)),
    ((2,), {"dilation": 3}, (7,)),
    ((3, 3), {}, (1, 1)),
    ((3, 3), {}, (4, 5)),
    ((2, 5), {"cin": 2, "out": 2}, (5, 3)),
    ((4, 6), {"cin": 2, "out": 1}, (4, 4)),
    ((3, 3), {"groups": 2, "cin": 4, "out": 6}, (3, 4)),
    ((3, 3), {"groups": 3}, (4, 3)),
    ((3, 3), {"stride": 2, "cin": 2, "out": 4}, (6, 4)),
    ((4, 3), {"stride": (2, 1), "cin": 3, "out": 2, "complex": True}, (4, 3)),
    ((3, 3), {"complex": True}, (3, 4)),
    ((3, 3), {"complex": True, "stride": 2, "cin": 1, "out": 6, "groups": 1}, (4, 4)),
    ((3, 3, 3), {"cin": 2, "out": 2}, (2, 3, 3)),
    ((2, 1, 3), {"cin": 2, "out": 3, "dilation": (1, 1, 2)}, (3, 2, 4)),
    ((3, 3, 2), {"stride": 2, "cin": 1, "out": 3}, (4, 2, 2)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kernel", "options", "domain"), CASES)
@pytest.mark.parametrize("norm", [0.01, 1.0, 8.0])
def test_it_is_scipys_exponential_of_the_dense_matrix(kernel, options, domain, norm):
    options = {"cin": 3, "out": 3, **options}
    for single in (False, True):
        base = torch.float32 if single else torch.float64
        given = {**options, "dtype": base.to_complex() if options.get("complex") else base}
        given.pop("complex", None)
        module, plain = scaled_to(make(kernel, **given), norm)
        double = copy.deepcopy(plain).to(torch.promote_types(given["dtype"], torch.float64))
        expected = exponential_between_walls(double, domain)
        found = operator(module, domain).to(expected.dtype)
        close(found, expected, atol=1e-5 if single else 1e-11, rtol=0)
        assert defect(found) < TOLERANCE[given["dtype"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "options", "domain"),
    [
        ((3,), {"cin": 2, "out": 2}, (4,)),
        ((3, 3), {"cin": 2, "out": 2}, (2, 3)),
        ((2, 2), {"cin": 1, "out": 2, "dilation": 2}, (3, 2)),
    ],
)
@pytest.mark.parametrize("norm", [0.3, 3.0])
def test_its_gradient_is_scipys(kernel, options, domain, dtype, norm):
    """The derivative in a direction of the weight, by `scipy.linalg.expm_frechet`."""
    module, plain = scaled_to(make(kernel, **options, dtype=dtype, bias=False), norm)
    columns = plain.in_channels * prod(domain)
    x = torch.eye(columns, dtype=dtype).reshape(columns, -1, *domain)
    G = random(columns, plain.out_channels, *domain, dtype=dtype)
    X = generators(module)[0]
    y = module(x)
    (gradient,) = torch.autograd.grad(y, X, G)
    plain = plain.double()
    m = max(plain.in_channels, plain.out_channels)

    def squared(weight):
        acting = copy.deepcopy(plain)
        acting.weight.data = weight
        M = operator(acting, domain)
        square = torch.zeros(m * prod(domain), m * prod(domain), dtype=torch.float64)
        square[: M.shape[0], : M.shape[1]] = M
        return ((square - square.T) / 2).numpy()

    for seed in range(3):
        E = random(*X.shape, dtype=dtype, seed=seed)
        with torch.no_grad():
            direction = module.parametrizations.weight[0](X + E) - module.weight
        derivative = scipy.linalg.expm_frechet(
            squared(plain.weight.data), squared(direction.double()), compute_expm=False
        )
        derivative = torch.from_numpy(derivative)[: y[0].numel(), :columns]
        expected = (derivative.T.reshape(y.shape) * G.double()).sum().item()
        found = (gradient * E).sum().item()
        size = G.norm().item() * E.norm().item()
        assert abs(found - expected) < (1e-5 if dtype == torch.float32 else 1e-10) * size


@pytest.mark.parametrize("norm", [0.01, 0.25, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("tol", [2e-7, 1e-6, 1e-12])
def test_the_coefficients_are_bessels_and_their_tail_is_below_the_tolerance(norm, tol):
    found = chebyshev.series("expm", norm, tol)
    m = len(found) - 1
    bessel = [scipy.special.jv(k, norm) * (1 if k == 0 else 2) for k in range(m + 100)]
    assert max(abs(a - b) for a, b in zip(found, bessel, strict=False)) < 1e-13
    assert sum(map(abs, bessel[m + 1 :])) <= tol
    assert m == 2 or sum(map(abs, bessel[m:])) > tol


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize(
    ("kernel", "options", "domain"),
    [
        ((3, 3), {}, (3, 4)),
        ((3, 3), {"cin": 2, "out": 4, "stride": 2}, (4, 6)),
        ((3, 5), {"cin": 4, "out": 2, "groups": 2}, (3, 2)),
    ],
)
def test_a_coin_starts_it_at_the_nearest_pixelwise_matrix(kernel, options, domain, dtype, transposed):
    conv = make(kernel, **options, dtype=dtype, transposed=transposed)
    centre = copy.deepcopy(conv)
    centre.bias = None
    # of stride 1 the nearest matrix is the polar factor of the middle tap
    module = orthogonal(conv, boundary="walls", base=True)
    first = operator(module, domain)
    assert defect(first) < TOLERANCE[dtype]
    if max(centre.stride) == 1 and centre.groups == 1:
        W = centre.weight.detach()[..., kernel[0] // 2, kernel[1] // 2]
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        Q = (U @ Vh).mT if transposed else U @ Vh
        close(first, torch.kron(Q.contiguous(), torch.eye(prod(domain), dtype=dtype)))
    with torch.no_grad():
        X = generators(module)[0]
        X.add_(0.2 * random(*X.shape, dtype=X.dtype))
    moved = operator(module, domain)
    assert (moved - first).abs().max() > 1e-2
    assert defect(moved) < TOLERANCE[dtype]
    if not transposed:
        plain = copy.deepcopy(centre)
        plain.weight.data = module.weight.detach()
        coin = generator_of(module).coin(dtype)
        double = torch.promote_types(dtype, torch.float64)
        expected = exponential_between_walls(plain.to(double), domain, coin.to(double))
        close(moved.to(double), expected, atol=TOLERANCE[dtype], rtol=0)
    twin = orthogonal(
        make(kernel, **options, dtype=dtype, transposed=transposed, seed=5), boundary="walls", base=True
    )
    twin.load_state_dict(module.state_dict())
    close(operator(twin, domain), moved)
    parametrize.remove_parametrizations(module, "weight")
    close(operator(module, domain), moved)


def test_a_coin_reaches_the_other_component():
    conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        nn.init.dirac_(conv.weight)
        conv.weight[0].neg_()
    M = operator(orthogonal(conv, boundary="walls", base=True), (1, 1))
    assert torch.linalg.det(M) < 0


@pytest.mark.parametrize("triv", ["cayley", torch.matrix_exp])
def test_other_maps_that_act_on_eigenvalues(triv):
    plain = make((3, 3), 2, 2)
    module = orthogonal(copy.deepcopy(plain), boundary="walls", triv=triv)
    M = operator(plain, (3, 4))
    A = skew(M)
    eye = torch.eye(len(A), dtype=A.dtype)
    expected = torch.linalg.solve(eye - A / 2, eye + A / 2) if triv == "cayley" else torch.matrix_exp(A)
    close(operator(module, (3, 4)), expected, atol=1e-11, rtol=0)


def of_qr(A):
    return torch.linalg.qr(torch.eye(A.shape[-1], dtype=A.dtype) + A)[0]


def turned(A):
    return torch.matrix_exp(A) * torch.tensor(1j, dtype=torch.complex128)


@pytest.mark.parametrize("triv", [of_qr, turned])
def test_maps_without_a_real_series_are_refused(triv):
    conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.complex128)
    weight = conv.weight
    with pytest.raises(ValueError, match="between walls triv should be"):
        orthogonal(conv, boundary="walls", triv=triv)
    assert conv.weight is weight
    assert type(conv) is nn.Conv2d


# The norm


@pytest.mark.parametrize("shape", [(3, 12), (12, 3), (4, 8), (5, 5), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_the_bound_of_a_frame_is_one(shape, dtype):
    X = random(4, *shape, dtype=dtype)
    X[0], X[1, 0] = 0, 0  # of no rank, and of less
    X[2] *= 1e-8
    exact = torch.linalg.matrix_norm(skew(X), 2)
    found = norms.norm_bound_of_frame(X)
    assert (found >= exact * (1 - 1e-5)).all()
    assert (found <= exact * 2 + 1e-12).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_follow_a_norm_that_training_raises(dtype):
    module = orthogonal(make((3, 3), 4, 4, dtype=dtype), boundary="walls")
    before, counts = generator_of(module).norm.degree, []
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    x = random(4, 4, 5, 5, dtype=dtype)
    for _ in range(60):
        optimizer.zero_grad()
        # a loss that lets the generator grow
        (-generators(module)[0].square().sum() * 0.03 + 1e-3 * module(x).square().mean()).backward()
        optimizer.step()
        counts.append(generator_of(module).norm.degree.value)
        assert defect(operator(module, (3, 4)).double()) < TOLERANCE[dtype]
    assert generator_of(module).norm.degree.level > 10 * before.level
    assert counts[-1] > before.value


def test_a_norm_that_takes_too_many_terms_is_refused_and_nothing_is_lost():
    module = orthogonal(nn.Conv2d(2, 2, 3, padding=1), boundary="walls")
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="more than 200 terms"):
        module.weight = 1e4 * before
    close(module.weight, before)
    with torch.no_grad():
        generators(module)[0].mul_(1e4)
    with pytest.raises(ValueError, match="more than 200 terms"):
        module(torch.zeros(1, 2, 4, 4))
    with torch.no_grad():
        generators(module)[0].div_(1e4)
    assert orthogonality_defect(module, 4) < 1e-5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", [1, 8, slow(16)])
def test_a_thousand_steps_keep_the_norms_of_state_and_gradient(side):
    module = orthogonal(make((3, 3), 16, 16, dtype=torch.float32, bias=False), boundary="walls")
    start = random(1, 16, side, side, dtype=torch.float32).requires_grad_()
    x = start
    with parametrize.cached():
        for _ in range(1000):
            x = module(x)
    G = random(1, 16, side, side, dtype=torch.float32, seed=1)
    (gradient,) = torch.autograd.grad(x, start, G)
    assert abs(x.norm() / start.norm() - 1) < 1e-3
    assert abs(gradient.norm() / G.norm() - 1) < 1e-3


# How it is computed


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and the most that ever did."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for y in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(y, torch.Tensor):
                storage = y.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self.freed, size)
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, size):
        self.now -= size


def peak_of(module, x, G):
    with Live() as live:
        for given in (x, G, *module.parameters()):
            live.known.add(given.untyped_storage())
        y = module(x)
        y.backward(G)
    x.grad = None
    module.zero_grad()
    return live.peak


@pytest.mark.parametrize("norm", [1.0, 20.0])
@pytest.mark.parametrize("batch", [4, slow(64)])
def test_memory_does_not_grow_with_the_terms(norm, batch):
    conv = nn.Conv2d(8, 8, 3, padding=1)
    module, plain = scaled_to(conv, norm)
    assert generator_of(module).norm.degree.value >= (7 if norm == 1 else 30)
    x = torch.randn(batch, 8, 64, 64, requires_grad=True)
    G = torch.randn(batch, 8, 64, 64)
    image = x.numel() * x.element_size()
    fixed = recurrence._BETWEEN_BYTES
    assert peak_of(module, x, G) - peak_of(plain, x, G) < max(6 * image, 4 * image + fixed)


def test_peak_is_within_six_images_of_the_plain_layers():
    x, G = (torch.randn(16, 32, 48, 48) for _ in range(2))
    x.requires_grad_()
    image = x.numel() * x.element_size()
    for norm in (0.9, 8.0):
        module, plain = scaled_to(nn.Conv2d(32, 32, 3, padding=1), norm)
        assert peak_of(module, x, G) - peak_of(plain, x, G) < 6 * image


@pytest.mark.parametrize("boundary", ["circular", "walls"])
@pytest.mark.parametrize(
    ("kernel", "options", "domain"),
    [
        ((3, 3), {}, (4, 5)),
        ((3, 3), {"stride": 2, "cin": 2, "out": 4, "groups": 2}, (6, 4)),
        ((5,), {"cin": 2}, (7,)),
    ],
)
def test_in_little_memory_it_is_the_same(boundary, kernel, options, domain, monkeypatch):
    """A few images at a time, nothing kept, and the recurrence run backwards."""
    evaluated(monkeypatch, "series")
    module = orthogonal(make(kernel, **options), boundary=boundary)
    x = random(5, module.in_channels, *domain).requires_grad_()
    outcomes = []
    for little in (False, True):
        if little:
            for name in ("_CACHED_BYTES", "_KEPT_BYTES", "_BETWEEN_BYTES"):
                monkeypatch.setattr(recurrence, name, 1)
            monkeypatch.setattr(recurrence, "_BETWEEN_IMAGES", 0)
        y = module(x)
        outcomes.append([y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])])
    close(outcomes[1], outcomes[0])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_autocast_reduces_convolutions_and_terms_between_walls(low, stride, monkeypatch):
    module = orthogonal(
        make((3, 3), 8, 8, stride=stride, dtype=torch.float32, bias=False), boundary="walls"
    )
    domain = (8, 6)
    single = operator(module, domain)
    used, convolve = [], recurrence.convolve
    monkeypatch.setattr(recurrence, "convolve", lambda x, *rest: used.append(x.dtype) or convolve(x, *rest))
    operator(module, domain)
    many, used[:] = len(used), []
    with torch.autocast("cpu", dtype=low):
        M = operator(module, domain)
        assert set(used) == {low}
        assert 0 < len(used) < many
        x = random(2, 8, *domain, dtype=torch.float32).requires_grad_()
        y = module(x)
    assert M.dtype == torch.float32
    assert defect(M) < 5e-2
    assert defect(M) < 4 * defect(single.to(low).float())
    close(torch.autograd.grad(y.square().sum(), x)[0].isfinite().all(), torch.tensor(True))
    # and it is no other operator
    close(M, single, atol=8 * torch.finfo(low).eps, rtol=0)


def test_around_a_torus_autocast_leaves_single_precision(monkeypatch):
    """As it does where the same operator is evaluated in another way."""
    evaluated(monkeypatch, "series")
    module = orthogonal(nn.Conv2d(8, 8, 3, padding=1, bias=False))
    single = operator(module, (5, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(module, (5, 6)), single)


def test_a_cached_loop_makes_the_skew_kernel_once(monkeypatch):
    from orthoconv_param.operators import series

    made = []
    monkeypatch.setattr(series, "skew_kernel", lambda *a, of=series.skew_kernel: made.append(1) or of(*a))
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    x = torch.randn(2, 4, 5, 5)
    for size in ((2, 4, 5, 5), (1, 4, 3, 7)):
        module(torch.randn(size))
    made.clear()
    with parametrize.cached():
        for _ in range(5):
            x = module(x)
        module(torch.randn(1, 4, 5, 5))
    assert len(made) == 1
    x.square().sum().backward()
    assert generators(module)[0].grad is not None


@pytest.mark.filterwarnings("ignore")  # torch's own, of complex numbers, and of what it imports
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "removed", "transposed", "backend"),
    [
        (1, True, True, "inductor"),
        (1, False, False, "aot_eager"),
        (2, False, True, "aot_eager"),
        (2, True, False, "aot_eager"),
    ],
)
def test_compiled_whole(stride, removed, transposed, backend):
    torch.compiler.reset()
    module = orthogonal(
        make((3, 3), 4, 6, stride=stride, groups=2, transposed=transposed, dtype=torch.float32),
        boundary="walls",
    )
    if removed:
        parametrize.remove_parametrizations(module, "weight")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for size in ((4, 6), (8, 6), (10, 12)):
        x = random(2, module.in_channels, *size, dtype=torch.float32).requires_grad_()
        values = [x, *module.parameters()]
        outcomes = [[y, *torch.autograd.grad(y.sin().sum(), values)] for y in (module(x), compiled(x))]
        for one, other in zip(*outcomes, strict=True):
            close(other, one, atol=1e-5 * max(1, one.abs().max().item()), rtol=0)
    torch.compiler.reset()


def test_the_registered_operators_are_sound():
    B = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    fields = ([0.5, 0.3, 0.1, 0.05], [1, 1], [1, 1], 1, [], None, 1.0)
    B = ((B - B.flip(2, 3).transpose(0, 1)) / 8).detach().requires_grad_()
    torch.library.opcheck(torch.ops.orthoconv_param.series, (x, B, None, None, *fields, 0))
    rows = B[:2].detach().clone().requires_grad_()
    others = (-B[:2, 2:].flip(2, 3).transpose(0, 1)).detach().requires_grad_()
    torch.library.opcheck(torch.ops.orthoconv_param.series, (x, rows, others, None, *fields, 0))
    conv = orthogonal(nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64), boundary="walls")
    number = conv.parametrizations.weight[0].norm.number
    level = torch.ops.orthoconv_param.level(10 * conv.weight.detach(), number)
    assert level > 1
    torch.library.opcheck(torch.ops.orthoconv_param.level, (conv.weight.detach(), number))
    torch.library.opcheck(torch.ops.orthoconv_param.series, (x, rows, others, level, *fields, number))


def compiled_walls(kind):
    """A convolution between walls whose terms follow a norm, and an image for it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=torch.complex64 if kind == "complex" else None)
    x = torch.randn(2, 4, 6, 5, dtype=conv.weight.dtype)
    if kind == "annealed":
        set_orthogonality(retrofit(conv, x, method="exponential"), 1)
        return conv, x
    if kind == "blocks":
        blocks = {"": [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 4))]}
        return retrofit(conv, x, method="exponential", blocks=blocks, anneal=False), x
    if kind == "copied":
        return copy.deepcopy(orthogonal(conv, boundary="walls")), x
    if kind == "transposed":
        conv = nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False)
    return orthogonal(conv, boundary="walls", base=kind == "base"), x


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore")  # torch's own, of complex numbers, and of what it imports
@pytest.mark.parametrize(
    "kind", ["plain", "blocks", *map(slow, ("base", "complex", "transposed", "copied", "annealed"))]
)
def test_terms_follow_the_norm_in_compiled_code(kind):
    if not tells_compiling_from_exporting():
        pytest.skip("this torch takes compiling for exporting")
    torch.compiler.reset()
    module, x = compiled_walls(kind)
    module(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(20):  # no ordinary call
        optimizer.zero_grad()
        (compiled(x) - x.roll(1, -1)).abs().square().mean().backward()
        optimizer.step()
    values = [x.clone().requires_grad_(), *module.parameters()]
    y = compiled(values[0])
    gradients = torch.autograd.grad(y.abs().square().sin().sum(), values)
    z = module(values[0])
    close(y, z, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(z.abs().square().sin().sum(), values)
    for one, other in zip(gradients, expected, strict=True):
        close(one, other, atol=1e-5 * max(1, other.abs().max().item()), rtol=0)
    if kind != "blocks":
        assert (y.norm() / x.norm() - 1).abs() < 1e-5
    torch.compiler.reset()


# Being a module


def test_the_weight_is_the_generator():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    W = conv.weight.detach().clone()
    parameter = conv.weight
    module = orthogonal(conv, boundary="walls")
    close(module.weight, W)
    assert module.weight.shape == (4, 4, 3, 3)
    assert any(p is parameter for p in module.parameters())
    other = torch.randn_like(W)
    module.weight = other
    close(module.weight, other)
    assert orthogonality_defect(module, 5) < 1e-5
    assert module.padding_mode == "zeros"
    assert module.padding == (1, 1)
    assert module.kernel_size == (3, 3)
    assert "boundary='walls'" in repr(module)
    assert "its skew part is exponentiated" in repr(module)


@pytest.mark.parametrize("base", [False, True])
def test_checkpoints(base):
    plain = nn.Conv2d(4, 4, 3, padding=1)
    module = orthogonal(copy.deepcopy(plain), boundary="walls", base=base)
    with torch.no_grad():
        generators(module)[0].mul_(3).add_(0.1)
    twin = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls", base=base)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 6, 5)
    close(twin(x), module(x))
    twin.load_state_dict(plain.state_dict())  # starts from these weights
    close(twin(x), orthogonal(copy.deepcopy(plain), boundary="walls", base=base)(x))
    before = twin(x)
    for other in (
        orthogonal(copy.deepcopy(plain)),
        orthogonal(copy.deepcopy(plain), method="split", boundary="walls"),
        orthogonal(copy.deepcopy(plain), boundary="walls", base=not base),
    ):
        with pytest.raises(RuntimeError, match=r"the checkpoint should be of|Unexpected|size mismatch"):
            twin.load_state_dict(other.state_dict())
        close(twin(x), before)


def test_updating_the_base_keeps_the_operator():
    from geotorch.utils import update_base

    for base in (False, True):
        module = orthogonal(nn.Conv2d(3, 3, 3, padding=1), boundary="walls", base=base)
        x = torch.randn(1, 3, 4, 4)
        before = module(x)
        update_base(module, "weight")
        close(module(x), before)


REMOVED = [
    ((3, 3), {"cin": 3, "out": 3}, (4, 5)),
    ((3, 3), {"cin": 4, "out": 6, "groups": 2, "stride": 2}, (4, 6)),
    ((4,), {"cin": 2, "out": 3}, (6,)),
    slow((3, 3), {"cin": 3, "out": 2, "stride": 2, "transposed": True}, (6, 4)),
    slow((3, 1, 2), {"cin": 2, "out": 2, "dilation": 2}, (3, 2, 4)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        (True, torch.float32),
        (True, torch.complex64),
        slow(False, torch.float32),
        slow(False, torch.complex64),
    ],
)
@pytest.mark.parametrize(("kernel", "options", "domain"), REMOVED)
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it calls deprecated
def test_what_removal_leaves_computes_the_same(kernel, options, domain, dtype, base):
    module = orthogonal(make(kernel, **options, dtype=dtype), boundary="walls", base=base)
    with torch.no_grad():
        X = generators(module)[0]
        X.add_(0.1 * random(*X.shape, dtype=dtype))
    size = (
        tuple(n // s for n, s in zip(domain, module.stride, strict=True)) if module.transposed else domain
    )
    x = random(3, module.in_channels, *size, dtype=dtype)
    y, single = module(x), module(x[0])
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is WalledExponential
    assert sorted(module.state_dict()) == ["_extra_state", "bias", *(["coin"] if base else []), "weight"]
    close(module(x), y)
    close(module(x[0]), single)
    close(copy.deepcopy(module)(x), y)
    close(pickle.loads(pickle.dumps(module))(x), y)
    close(torch.fx.symbolic_trace(module)(x), y)
    for made in (torch.jit.script(module), torch.jit.trace(module, x[:1])):
        close(made(x), y)
    program = torch.export.export(module, (x,))
    close(program.module()(x), y)
    assert all(
        getattr(node.target, "namespace", "aten") == "aten"
        for node in program.graph.nodes
        if node.op == "call_function"
    )
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.zeros(1, module.in_channels + 1, *size, dtype=dtype))


def test_what_removal_leaves_stays_orthogonal_whatever_its_weight_is():
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        module.weight.copy_(5 * torch.randn(4, 4, 3, 3))
    assert orthogonality_defect(module, (5, 4)) < 1e-5
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(2, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    assert orthogonality_defect(module, (5, 4)) < 1e-5
    twin = copy.deepcopy(module)
    state = module.state_dict()
    twin.load_state_dict({**state, "weight": 0.1 * state["weight"]})
    assert orthogonality_defect(twin, (5, 4)) < 1e-5
    with torch.no_grad():
        module.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="should be finite"):
        module(torch.zeros(1, 4, 5, 5))


@pytest.mark.parametrize("method", ["exponential", "split"])
def test_nothing_is_folded_into_what_removal_leaves_between_walls(method):
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), method=method, boundary="walls").eval()
    x = torch.randn(2, 4, 6, 6)
    y = module(x)
    parametrize.remove_parametrizations(module, "weight")
    names = [*module.state_dict()]
    for fold in (
        lambda: fuse_conv_bn_eval(module, nn.BatchNorm2d(4).eval()),
        lambda: prune.l1_unstructured(module, "weight", amount=0.3),
        lambda: setattr(module, "weight", nn.Parameter(torch.zeros(4, 4, 3, 3))),
    ):
        with pytest.raises(TypeError, match="weight should not be"):
            fold()
        assert [*module.state_dict()] == names
        close(module(x), y)


def test_a_generator_that_removal_leaves_is_no_plain_checkpoint():
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    parametrize.remove_parametrizations(module, "weight")
    plain, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 6)
    y = module(x)
    with pytest.raises(RuntimeError, match="_extra_state"):
        plain.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="should hold a generator"):
        module.load_state_dict(nn.Conv2d(4, 4, 3, padding=1).state_dict())
    close(module(x), y)
    other = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    parametrize.remove_parametrizations(other, "weight")
    other.load_state_dict(module.state_dict())
    close(other(x), y)


def left(base=False, dtype=torch.float32, weight=None, **options):
    """What removal leaves, with a weight."""
    module = orthogonal(make((3, 3), dtype=dtype, bias=False, **options), boundary="walls", base=base)
    if weight is not None:
        module.weight = weight
    parametrize.remove_parametrizations(module, "weight")
    return module


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it calls deprecated
@pytest.mark.parametrize("how", ["load", "assign", "move"])
@pytest.mark.parametrize("made", ["script", "trace", "fx", "export", "compile"])
def test_what_is_made_of_it_has_the_terms_of_its_present_weight(made, how):
    W = 3 * random(4, 4, 3, 3, dtype=torch.float32)
    source, module = left(weight=W), left()
    x = random(2, 4, 6, 6, dtype=torch.float32)
    if how == "load":
        module.load_state_dict(source.state_dict())
    elif how == "assign":
        module.load_state_dict(source.state_dict(), assign=True)
    else:
        module.weight.data = W.double()
        module.float()
    make_ = {
        "script": torch.jit.script,
        "trace": lambda m: torch.jit.trace(m, x),
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,)).module(),
        "compile": lambda m: torch.compile(m, backend="eager", fullgraph=True),
    }[made]
    torch.compiler.reset()
    close(make_(module)(x), source(x))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", ["script", "trace", "fx"])
def test_scripts_and_traces_read_a_weight_that_was_changed_in_place(made):
    module = left()
    x = random(2, 4, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        module.weight.normal_().mul_(2)
    make_ = {
        "script": torch.jit.script,
        "trace": lambda m: torch.jit.trace(m, x),
        "fx": torch.fx.symbolic_trace,
    }[made]
    y = make_(module)(x)
    close(y.norm(), x.norm())
    close(y, module(x))


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_what_removal_leaves_moves_to_other_precisions(dtype, base):
    module = left(base, dtype)
    double = torch.promote_types(dtype, torch.float64)
    assert defect(operator_of_bare(copy.deepcopy(module).to(double), double)) < 1e-11
    if not dtype.is_complex:
        half = copy.deepcopy(module).half()
        M = operator_of_bare(half, torch.float16).float()
        assert defect(M) < 5e-3
        assert defect(operator_of_bare(half.double(), torch.float64)) < 1e-11
    other = left(base, torch.float64, weight=random(4, 4, 3, 3)).float()
    assert defect(operator_of_bare(other, torch.float32)) < 1e-5


def operator_of_bare(module, dtype, size=(4, 3)):
    eye = torch.eye(module.in_channels * prod(size), dtype=dtype)
    with torch.no_grad():
        return module(eye.reshape(len(eye), -1, *size)).flatten(1).mT


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_under_autocast_what_removal_leaves_computes_the_same(base, stride):
    module = orthogonal(make((3, 3), stride=stride, dtype=torch.float32), boundary="walls", base=base)
    x = random(2, 4, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        parametrize.remove_parametrizations(module, "weight")
        assert torch.equal(module(x), y)
        assert torch.equal(module(x.bfloat16()), module(x.bfloat16().float()))


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 4, 4, 4, dtype=torch.float64), torch.zeros(1, 3, 4, 4), torch.zeros(4, 4)]
)
def test_what_removal_leaves_refuses_other_images(x):
    for module in (left(), torch.jit.script(left())):
        with pytest.raises(Exception, match="input should have the module's channels"):
            module(x)


@pytest.mark.parametrize("boundary", ["circular", "walls"])
@pytest.mark.parametrize("triv", ["expm", torch.matrix_exp])
def test_transforms_follow_a_norm_that_was_never_met(boundary, triv):
    """The level's coefficients are computed within the transform."""
    chebyshev.coefficients.cache_clear()
    chebyshev.series.cache_clear()
    module = orthogonal(make((3, 3), dtype=torch.float64), boundary=boundary, triv=triv)
    key = "parametrizations.weight.original"
    W = 5.3 * module.parametrizations.weight.original.detach()
    x = random(1, 4, 5, 5)

    def loss(w):
        return torch.func.functional_call(module, {key: w}, (x,)).pow(3).sum()

    W.requires_grad_()
    (expected,) = torch.autograd.grad(loss(W), W)
    twin = orthogonal(make((3, 3), dtype=torch.float64), boundary=boundary, triv=triv)
    chebyshev.coefficients.cache_clear()
    chebyshev.series.cache_clear()
    module = twin
    close(torch.func.grad(loss)(W.detach()), expected)


@pytest.mark.parametrize("boundary", ["circular", "walls"])
def test_a_move_in_a_cached_block_is_seen(boundary):
    module = orthogonal(make((3, 3), dtype=torch.float32), boundary=boundary)
    x = random(2, 4, 6, 6)
    with parametrize.cached():
        module(x.float())
        module.double()
        y = module(x)
    close(y, module(x))


def test_a_weight_whose_transform_overflows_is_refused():
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match="should be finite"):
        module.weight = 3e38 * torch.ones(4, 4, 3, 3)
    close(module.weight, before)


def test_removal_without_the_value_gives_the_free_parameter_back():
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    X = generators(module)[0].detach().clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert type(module) is nn.Conv2d
    close(module.weight, X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"domain": 8}, ValueError, 'domain should be "any" between walls'),
        ({"base": 1}, TypeError, "base should be None, True or False"),
        ({"triv": "exp"}, ValueError, "triv should be one of"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(options, error, message):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    weight, value = conv.weight, conv.weight.detach().clone()
    with pytest.raises(error, match=message):
        orthogonal(conv, boundary="walls", **options)
    assert type(conv) is nn.Conv2d
    assert conv.weight is weight
    close(conv.weight, value)


@pytest.mark.parametrize("base", [None, False, True])
@pytest.mark.parametrize(
    ("kernel", "options", "domain"),
    [((1, 1), {"cin": 3, "out": 5}, (3, 4)), ((2, 2), {"stride": 2}, (4, 2))],
)
def test_a_kernel_that_sees_no_wall_has_none(kernel, options, domain, base):
    module = orthogonal(make(kernel, **options), boundary="walls", base=base)
    assert defect(operator(module, domain)) < 1e-11
    parametrize.remove_parametrizations(module, "weight")
    assert isinstance(module, nn.Conv2d)
    assert defect(operator(module, domain)) < 1e-11


def test_another_parametrization_on_top_is_refused():
    class Twice(nn.Module):
        def forward(self, X):
            return 2 * X

    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1), boundary="walls")
    parametrize.register_parametrization(module, "weight", Twice())
    with pytest.raises(ValueError, match="no other parametrization"):
        module(torch.zeros(1, 4, 5, 5))


# Around a torus


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("channels", "stride", "side", "batch", "least"),
    [
        (64, 1, 32, 1, "series"),
        (64, 2, 32, 8, "series"),
        (64, 1, 32, 32, "spectral"),
        (16, 1, 64, 8, "spectral"),
        (24, 1, 48, 24, "spectral"),
    ],
)
def test_circular_operators_are_applied_by_their_series_where_that_costs_less(
    channels, stride, side, batch, least
):
    from orthoconv_param.operators import evaluate

    module = orthogonal(nn.Conv2d(channels, channels, 3, stride=stride, padding=1))
    assert evaluate.choose(module.operator, (side, side), batch).name == least
    with parametrize.cached():  # the exponential is shared by the steps of a loop
        assert evaluate.choose(module.operator, (side, side), batch).name != "series"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize(
    ("axes", "stride", "groups"), [(1, 2, 2), (1, 1, 2), (2, 2, 2), (2, 1, 1), (2, 2, 1)]
)
def test_gradients_of_a_single_pixel(axes, stride, groups, dtype):
    """Its strides mean nothing, in whatever layout torch has left them."""
    torch.manual_seed(0)
    cls = (nn.Conv1d, nn.Conv2d)[axes - 1]
    conv = cls(2, 2, 3, stride=stride, padding=1, groups=groups, bias=False, dtype=dtype)
    module = orthogonal(conv, boundary="walls")
    X = module.parametrizations.weight.original
    weights = torch.arange(1.0, 3.0).reshape(2, *(1,) * axes)

    def gradients(x):
        x = x.requires_grad_()
        return torch.autograd.grad((module(x).abs().square() * weights).sum(), [X, x])

    x = torch.randn(1, 2, *(stride,) * axes, dtype=dtype)
    of_one, of_two = gradients(x), gradients(torch.cat([x, x]).detach())
    torch.testing.assert_close(of_one[0], of_two[0] / 2)
    torch.testing.assert_close(of_one[1], of_two[1][:1])
