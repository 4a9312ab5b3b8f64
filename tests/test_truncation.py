"""How many taps a compact kernel has: as few as its tolerance allows, and enough at every size."""

import copy
import io
import warnings

import pytest
import torch
from models import tells_compiling_from_exporting
from oracles import dense, operator, random
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import register_parametrization

from orthoconv_param import ConvExponential, orthogonal, orthogonality_defect, singular_values
from orthoconv_param.parametrizations import plan
from orthoconv_param.parametrizations.degree import Degree, smallest_degree
from orthoconv_param.parametrizations.truncation import is_affordable, outermost, shortest
from orthoconv_param.torus.lattice import pack, unpack

close = torch.testing.assert_close
NORMS = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0]
KINDS = ["random", "shift"]


def generator_of(kind, channels, axes=2, dtype=torch.float32):
    """A kernel of three taps an axis whose skew part has norm 1; of a shift, the slowest to truncate."""
    if kind == "random":
        kernel = random(channels, channels, *(3,) * axes, dtype=torch.float64)
    else:
        kernel = torch.zeros(channels, channels, *(3,) * axes, dtype=torch.float64)
        kernel[(..., *(1,) * (axes - 1), 2)] = torch.eye(channels, dtype=torch.float64)
    return (kernel / norm_of(kernel)).to(dtype)


def norm_of(kernel):
    """The norm of the skew part."""
    axes = [*range(2, kernel.ndim)]
    adjoint = kernel.flip(axes).transpose(0, 1).conj()
    return singular_values((kernel - adjoint) / 2, (24,) * len(axes)).max()


def test_under_vmap_what_was_measured_on_one_kernel_cuts_no_other():
    tol = 1e-3
    generators = [generator_of(kind, 8, 1, torch.float64) for kind in KINDS]
    parametrization = ConvExponential("any", tol=tol)
    short = parametrization(generators[0])
    kernels = torch.func.vmap(parametrization)(torch.stack(generators))
    assert kernels.shape[-1] == 2 * smallest_degree("expm", 1.0, tol, (1,)) + 1 > short.shape[-1]
    for kernel in kernels:
        assert orthogonality_defect(kernel, (97,)) < tol
    assert orthogonality_defect(parametrization(generators[0]), (97,)) < tol
    assert parametrization(generators[0]).shape == short.shape  # it is measured anew


def made(kernel, tol=None, **options):
    axes = kernel.ndim - 2
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    conv = cls(kernel.shape[1], kernel.shape[0], kernel.shape[2:], bias=False, **options, padding="same")
    conv = conv.to(kernel.dtype)
    with torch.no_grad():
        conv.weight.copy_(kernel)
    return orthogonal(conv, tol=tol)


def parametrization_of(module):
    return module.parametrizations["weight"][0]


def exactly(kernel, domain):
    """The exponential of the dense operator's skew part, by torch."""
    A = dense(kernel.double(), domain)
    return torch.linalg.matrix_exp((A - A.mT) / 2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [n if n == 1 else pytest.param(n, marks=pytest.mark.slow) for n in NORMS])
def test_the_default_keeps_1000_linear_steps_to_a_thousandth(norm, kind):
    torch.manual_seed(0)
    module = made(norm * generator_of(kind, 4))
    for domain in ((5, 4), (16, 9)):
        matrix = operator(module, domain).double()
        assert (torch.linalg.svdvals(matrix) - 1).abs().max() < 1e-5
        close(matrix, exactly(norm * generator_of(kind, 4), domain), atol=1e-5, rtol=0)
    state = torch.randn(1, 4, 32, 32)
    before = state.norm()
    with torch.no_grad(), parametrize.cached():
        for _ in range(1000):
            state = module(state)
    close(state.norm(), before, rtol=1e-3, atol=0)
    # no direction drifts more than that: the kernel alone, between the frequencies of its own torus too
    kernel = module.weight.detach().double()
    assert (singular_values(kernel, (64, 64)) - 1).abs().max() < 1.5e-6


@pytest.mark.parametrize("norm", NORMS)
def test_the_default_computes_in_single_precision(norm):
    module = made(norm * generator_of("random", 8))
    parametrization, X = parametrization_of(module), module.parametrizations.weight.original
    made_plan = plan.make_plan(
        parametrization._family(), unpack(X), parametrization.compact, parametrization._reader
    )
    assert made_plan.dtype == torch.float32
    assert made_plan.refined in (None, torch.complex64)
    assert parametrization.kernel(X).dtype == torch.float32
    strict = made(norm * generator_of("random", 8), tol=1e-8)
    precise = parametrization_of(strict).kernel(strict.parametrizations.weight.original).detach()
    assert precise.dtype == torch.float64
    assert (singular_values(precise, 48) - 1).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("axes", "channels"), [(1, 1), (1, 6), (2, 5)])
@pytest.mark.parametrize("norm", [0.3, 1.0, 3.0])
def test_fewer_taps_than_the_norm_asks_for_and_as_good(norm, axes, channels, dtype):
    kernel = norm * generator_of("random", channels, axes).to(dtype)
    parametrization = parametrization_of(made(kernel))
    proved = smallest_degree(
        "expm", parametrization.compact.level, parametrization.compact.tol, (1,) * axes
    )
    assert parametrization.degree <= proved
    if channels > 1 and norm >= 1:
        assert parametrization.degree < proved
    W = made(kernel).weight.detach()
    rounding = 5 * torch.finfo(dtype).eps * W.shape[0] ** 0.5
    error = (singular_values(W, (97, 61)[:axes]) - 1).abs().max()
    assert error < parametrization.compact.tol + rounding


def test_the_slowest_kernel_to_truncate_gets_more_taps_than_others_of_its_norm():
    degrees = {kind: parametrization_of(made(generator_of(kind, 8))).degree for kind in KINDS}
    assert degrees["shift"] > degrees["random"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4, 4, 3, 3), {"groups": 1}),
        ((6, 3, 3, 3), {"groups": 2}),
        ((6, 1, 5, 3), {"groups": 6}),
        ((4, 4, 1, 3), {"groups": 1}),
        ((3, 5, 3, 3), {"groups": 1}),
        ((8, 2, 3, 3), {"groups": 1, "stride": 2}),
    ],
)
def test_what_is_left_out_is_below_the_tolerance_in_every_geometry(size, options):
    holder = nn.Module()
    holder.weight = nn.Parameter(0.6 * random(*size, dtype=torch.float64))
    stride = options.get("stride", 1)
    kernels = []
    for tol in (1e-5, 1e-13):
        parametrization = ConvExponential("any", tol=tol, **options)
        twin = copy.deepcopy(holder)
        register_parametrization(twin, "weight", parametrization, unsafe=True)
        kernels.append(twin.weight.detach())
        assert parametrization.compact.is_measured
        edge = outermost(twin.weight, options["groups"], parametrization._family().reach, (stride,) * 2)
        assert edge <= parametrization.compact.edge
    short, long = kernels
    assert short[0, 0].numel() < long[0, 0].numel()
    defects = []
    for domain in ((4, 6), (8, 4)):
        both = [dense(W, domain, (stride,) * 2, options["groups"]) for W in kernels]
        defects.append((torch.linalg.svdvals(both[0]) - 1).abs().max())
        if stride == 1:  # both are centred on the same tap
            assert torch.linalg.matrix_norm(both[0] - both[1], 2) < 1e-5
    assert 1e-12 < max(defects) < 1e-5


@pytest.mark.parametrize("is_complex", [False, True])
def test_the_bound_holds_between_the_points_of_its_grid(is_complex):
    torch.manual_seed(0)
    dtype = torch.complex128 if is_complex else torch.float64
    decay = torch.exp(-1.7 * torch.arange(-8, 9).abs().double())
    kernel = torch.randn(3, 3, 17, 17, dtype=dtype) * decay[:, None] * decay
    for tol in (1e-1, 1e-2, 1e-3):
        degree, _ = shortest(kernel, 1, 8, (1, 1), tol)
        worst = 0.0
        for fewer in (degree, degree - 1):
            n = 2 * fewer + 1
            index = (torch.arange(-8, 9) + fewer) % n
            folded = kernel.new_zeros(3, 3, n, 17).index_add_(2, index, kernel)
            folded = folded.new_zeros(3, 3, n, n).index_add_(3, index, folded)
            rest = kernel - nn.functional.pad(folded, [8 - fewer] * 4)
            spectrum = torch.fft.fft2(rest, s=(151, 151)).movedim((0, 1), (2, 3))
            worst = torch.linalg.matrix_norm(spectrum, 2).max()
            if fewer == degree:
                assert worst <= tol
        assert worst > tol / 10  # one tap less would not do, or hardly


def test_a_norm_at_the_border_of_its_range_does_not_change_the_kernel(monkeypatch):
    module = made(generator_of("random", 6))
    parametrization, X = parametrization_of(module), module.parametrizations.weight.original
    with torch.no_grad():
        X.mul_(1.02 * parametrization.compact.level)
        module.weight  # noqa: B018
    taps, calls = module.weight.shape, []
    measured = plan.Family.measured
    monkeypatch.setattr(plan.Family, "measured", lambda *args: calls.append(1) or measured(*args))
    for factor in (0.9, 1 / 0.9) * 4:
        with torch.no_grad():
            X.mul_(factor)
        assert module.weight.shape == taps
    assert not calls
    with torch.no_grad():
        X.mul_(0.3)
    assert module.weight.shape[-1] < taps[-1]
    assert len(calls) == 1


def test_a_kernel_whose_shape_changes_at_the_same_norm_is_measured_anew():
    """From a generator that is easy to truncate to the worst one, along a path that keeps the norm."""
    module = made(generator_of("random", 8, dtype=torch.float64))
    parametrization, X = parametrization_of(module), module.parametrizations.weight.original
    start, degrees = X.detach().clone(), [parametrization.degree]
    end = pack(generator_of("shift", 8, dtype=torch.float64))
    for t in torch.linspace(0, 1, 30):
        with torch.no_grad():
            mixed = (1 - t) * start + t * end
            X.copy_(pack(unpack(mixed) / norm_of(unpack(mixed))))
        W = module.weight.detach()
        degrees.append(parametrization.degree)
        assert (singular_values(W, 48) - 1).abs().max() < 1e-12 + 1e-13
    assert degrees[-1] > degrees[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("triv", ["expm", "cayley"])
@pytest.mark.parametrize(("channels", "groups"), [(4, 1), pytest.param(8, 8, marks=pytest.mark.slow)])
def test_training_stays_within_the_tolerance(triv, channels, groups):
    torch.manual_seed(1)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
    module = orthogonal(conv, triv=triv)
    x = torch.randn(4, channels, 20, 20)
    target = x.roll((3, 1), (-2, -1)) + 0.1 * torch.randn_like(x)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
        defect = (singular_values(module.weight.detach(), 72, groups=groups) - 1).abs().max()
        assert defect < 1.5e-6  # a half of the tolerance is for rounding


@pytest.mark.parametrize("factor", [1.12, 1.5, 3.0])
def test_a_single_channel_that_grows_is_seen(factor):
    conv = nn.Conv1d(64, 64, 3, padding=1, groups=64, bias=False).double()
    with torch.no_grad():
        conv.weight.zero_()[:, 0, 2] = 9.625
    module = orthogonal(conv)
    X = module.parametrizations.weight.original
    for channel in (0, 17):
        with torch.no_grad():
            X[channel] *= factor
        assert (singular_values(module.weight.detach(), 96, groups=64) - 1).abs().max() < 1.5e-12


def test_what_would_take_long_to_measure_has_the_proved_degree():
    assert is_affordable(9, (1, 1), (256, 256), 1)
    assert not is_affordable(40, (2, 2, 2), (4, 4), 1)
    conv = nn.Conv3d(3, 3, 5, padding=2, bias=False).double()
    with torch.no_grad():
        conv.weight.mul_(8 / norm_of(conv.weight.detach()))
    compact = parametrization_of(orthogonal(conv)).compact
    assert compact.is_measured
    assert compact.value == compact.proved


def test_two_calls_with_the_same_generator_give_the_same_kernel():
    module = made(0.7 * generator_of("random", 4))
    X = module.parametrizations.weight.original
    for seed in range(4):
        with torch.no_grad():
            X.copy_(random(*X.shape, dtype=torch.float32, seed=seed) * 0.2 * (seed + 1))
        first = module.weight.detach()
        assert torch.equal(module.weight, first)


def test_a_checkpoint_goes_on_with_the_same_taps():
    module = made(generator_of("random", 6))
    with torch.no_grad():
        module.parametrizations.weight.original.mul_(1.3)
        module.weight  # noqa: B018
        module.parametrizations.weight.original.mul_(0.75)  # within the range that was reached
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = made(0.1 * generator_of("random", 6))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.weight, module.weight)
    # one of before, which has no degree, is measured
    words = {k: v for k, v in module.state_dict().items() if "extra" not in k}
    old = made(0.1 * generator_of("random", 6))
    old.load_state_dict(words)
    assert (singular_values(old.weight, 40) - 1).abs().max() < 2e-6


def test_small_generators_have_exact_derivatives():
    for scale in (0.0, 1e-6, 1e-2):
        kernel = scale * generator_of("random", 4)
        single, double = made(kernel), made(kernel.double())
        x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
        gradients = []
        for module in (single, double):
            y = module(x.to(module.parametrizations.weight.original.dtype))
            gradients.append(torch.autograd.grad(y.sin().sum(), module.parametrizations.weight.original)[0])
        close(gradients[0].double(), gradients[1], atol=1e-5 * gradients[1].abs().max().item(), rtol=0)


def test_tol_of_orthogonal():
    kernel = generator_of("random", 4)
    loose, default = made(kernel, tol=1e-2), made(kernel)
    assert loose.weight.shape[-1] < default.weight.shape[-1]
    assert 1e-6 < (singular_values(loose.weight, 40) - 1).abs().max() < 1e-2
    assert "tol=0.01" in repr(loose)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "split"}, 'tol should be None with method="split"'),
        ({"boundary": "walls"}, "tol should be None between walls"),
        ({"domain": 8}, 'tol should be None unless domain="any"'),
        ({"tol": 0.0}, "tol should be a float between 0 and 1"),
        ({"tol": 1}, "tol should be a float between 0 and 1"),
    ],
)
def test_a_tol_without_meaning_is_refused_and_nothing_changes(options, message):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    before = conv.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        orthogonal(conv, **{"tol": 1e-3, **options})
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv.weight, before)


def test_degrees_have_a_range():
    degree = Degree.of("expm", 1e-6, (1, 1), 1.0)
    assert degree.covers(1.0)
    assert degree.covers(0.72)
    assert not degree.covers(0.7)
    assert not degree.covers(1.001)
    assert not degree.covers(float("nan"))
    smallest = Degree.of("expm", 1e-6, (1, 1), 0.0)
    assert smallest.covers(0.0)
    assert smallest.covers(0.25)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:Torchinductor does not support", "ignore:`torch.jit")
@pytest.mark.parametrize("copied", [False, True])
def test_compiled_code_warns_of_a_kernel_that_its_generator_has_outgrown(copied):
    if not tells_compiling_from_exporting():
        pytest.skip("this torch takes compiling for exporting")
    torch.compiler.reset()
    torch.manual_seed(0)
    conv = orthogonal(nn.Conv2d(2, 2, 3, padding=1, bias=False))
    conv = copy.deepcopy(conv) if copied else conv
    x = torch.randn(1, 2, 40, 39)
    conv(x)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(x).sum().backward()
    with torch.no_grad():
        conv.parametrizations.weight.original.mul_(3)
    with pytest.warns(UserWarning, match=r"kernel of Conv2d\(2, 2.*outgrown.*outside of torch.compile"):
        y = compiled(x)
    z = conv(x)
    assert (y - z).norm() > 1e-5 * z.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(x), z, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
