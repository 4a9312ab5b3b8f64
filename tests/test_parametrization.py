import copy
import io
import itertools
from functools import partial

import geotorch
import numpy as np
import pytest
import torch
from geotorch.exceptions import InManifoldError
from oracles import defect, dense, phases_first, random, skew
from scipy.linalg import expm
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.parametrize import (
    cached,
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from orthoconv_param import ConvExponential, functional, generators, orthogonal, orthogonality_defect
from orthoconv_param.torus.lattice import Lattice, pack, unpack

close = torch.testing.assert_close

# (out, in/groups, taps), domain, stride, groups
GEOMETRIES = [
    ((2, 2, 3), None, 1, 1),
    ((2, 2, 4), None, 1, 1),
    ((2, 2, 3), 8, 1, 1),
    ((3, 3, 2, 5), None, 1, 1),
    ((2, 2, 3, 4), (5, 4), 1, 1),
    ((4, 2, 3, 3), None, 1, 2),
    ((4, 2, 2, 3), (4, 3), 1, 2),
    ((2, 2, 2, 1, 3), None, 1, 1),
    ((2, 1, 3, 3), None, 1, 2),
    ((4, 2, 3), None, 1, 1),
    ((2, 5, 2, 3), None, 1, 1),
    ((4, 1, 4, 4), None, 2, 1),
    ((4, 4, 3, 3), (6, 4), 2, 2),
    ((2, 3, 5), 9, 3, 1),
]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
geometries = pytest.mark.parametrize(("size", "domain", "stride", "groups"), GEOMETRIES)


class Holder(nn.Module):
    """A module with nothing but a weight, of any size and dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def registered(weight, **options):
    holder = Holder(weight)
    register_parametrization(holder, "weight", ConvExponential(**options), unsafe=True)
    return holder, holder.parametrizations.weight[0]


def per_axis(value, size):
    axes = len(size) - 2
    return tuple(value) if isinstance(value, tuple) else (value,) * axes


def train(module, steps=25, lr=0.1, optimizer=torch.optim.Adam):
    """Steps down a linear function of the weight, which moves each generator; returns the weight before."""
    before = module.weight.detach().clone()
    optimizer = optimizer(module.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        weight = module.weight
        slope = torch.cos(torch.arange(weight.numel(), dtype=weight.real.dtype)).reshape(weight.shape)
        (torch.view_as_real(weight).sum(-1) if weight.is_complex() else weight).mul(slope).sum().backward()
        optimizer.step()
    return before


# The map


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@geometries
def test_kernel_is_the_exponential_of_the_dense_operator(size, domain, stride, groups, dtype):
    generator = random(*size, dtype=dtype)
    weight = ConvExponential(domain, stride=stride, groups=groups)(generator)
    grid, strides = per_axis(domain or size[2:], size), per_axis(stride, size)
    out, cin = size[0], size[1] * groups
    # Square by channels that do nothing, in the basis (channel, phase) of a strided convolution
    phases = 1
    for s in strides:
        phases *= s
    matrices = dense(unpack(generator), grid, strides, groups), dense(weight, grid, strides, groups)
    order = phases_first(cin, grid, strides)
    points = matrices[0].shape[0] // out
    rows, columns = size[0] // groups, size[1] * phases
    m = max(rows, columns)
    square = torch.zeros(groups, m, points, groups, m, points, dtype=dtype)
    blocks = matrices[0][:, order].reshape(groups, rows, points, groups, columns, points)
    square[:, :rows, :, :, :columns] = blocks
    exact = torch.from_numpy(expm(skew(square.reshape(groups * m * points, -1)).numpy()))
    exact = exact.reshape(square.shape)[:, :rows, :, :, :columns]
    close(matrices[1][:, order].reshape(blocks.shape), exact, atol=1e-10, rtol=0)
    assert not (blocks - exact).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(3, 3, 3), (5, 3, 3), (3, 5, 3)])
def test_base_multiplies_the_exponential(size):
    m, lattice = max(size[:2]), Lattice((3,), (1,))
    holder, parametrization = registered(random(*size))
    generator = random(*size, seed=1)
    with torch.no_grad():
        holder.parametrizations.weight.original.copy_(generator)
    base = torch.view_as_complex(parametrization.base.unflatten(-1, (m, m, 2)))
    base = dense(lattice.kernel(base), (3,))
    kernel = torch.nn.functional.pad(unpack(generator), (0, 0, 0, m - size[1], 0, m - size[0]))
    exponential = torch.from_numpy(expm(skew(dense(kernel, (3,))).numpy()))
    whole = base @ exponential if size[0] >= size[1] else exponential @ base
    close(dense(holder.weight.detach(), (3,)), whole[: 3 * size[0], : 3 * size[1]])


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 4, 3), {}),
    "1d, even": (lambda: nn.Conv1d(3, 3, 4), {}),
    "2d": (lambda: nn.Conv2d(4, 4, 3), {}),
    "2d, unequal": (lambda: nn.Conv2d(5, 4, (2, 5)), {}),
    "2d, tall": (lambda: nn.Conv2d(3, 8, 3), {}),
    "2d, 1x1": (lambda: nn.Conv2d(6, 6, 1), {}),
    "2d, groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), {"groups": 2}),
    "2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), {"groups": 4}),
    "2d, depthwise as one frame": (lambda: nn.Conv2d(4, 4, 3, groups=4), {}),
    "2d, stride": (lambda: nn.Conv2d(3, 8, 4, stride=2), {"stride": 2}),
    "3d": (lambda: nn.Conv3d(3, 3, (2, 3, 1)), {}),
    "1d, transposed": (lambda: nn.ConvTranspose1d(4, 3, 4), {}),
    "2d, transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), {"groups": 2}),
    "3d, transposed": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), {"stride": 2}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "triv",
    [
        "expm",
        *(
            pytest.param(triv, marks=pytest.mark.slow)
            for triv in ("cayley", geotorch.SO.trivializations["cayley"])
        ),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_any_convolution_by_the_plain_torch_call(name, dtype, triv):
    torch.manual_seed(0)
    make, options = CONVOLUTIONS[name]
    conv = make().to(dtype)
    size, original = conv.weight.shape, conv.weight
    tolerance = 1e-5 if torch.finfo(dtype).bits == 32 else 1e-12
    register_parametrization(conv, "weight", ConvExponential(triv=triv, **options))
    assert conv.parametrizations.weight.original is original
    for stage in ("registered", "trained"):
        if stage == "trained":
            before = train(conv)
            moves = not (
                conv.weight.dtype.is_floating_point and size[1] == 1 and options.get("groups") == 4
            )
            assert not moves or (conv.weight - before).abs().max() > 1e-3
        assert conv.weight.shape == size
        assert conv.weight.dtype == dtype
        matrix = dense(
            conv.weight.detach().to(torch.promote_types(dtype, torch.float64)),
            size[2:],
            per_axis(options.get("stride", 1), size),
            options.get("groups", 1),
        )
        assert defect(matrix) < tolerance


@pytest.mark.sampled(3)
@geometries
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives(size, domain, stride, groups, dtype):
    if len(size) == 5 or (domain and len(size) == 4):
        pytest.skip("the dense Jacobian is large; the same code with fewer numbers is tested")
    _, parametrization = registered(random(*size, dtype=dtype), domain=domain, stride=stride, groups=groups)
    for X in (torch.zeros(size, dtype=dtype), random(*size, dtype=dtype, seed=1)):
        X.requires_grad_()
        assert gradcheck(parametrization, X, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(parametrization, X, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("triv", ["expm", "cayley"])
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.complex128, marks=pytest.mark.slow)])
def test_derivatives_of_a_small_case_entry_by_entry(triv, dtype):
    _, own = registered(random(2, 2, 2, dtype=dtype), triv=triv)
    _, compact = registered(random(2, 2, 2, dtype=dtype), triv=triv, domain="any", tol=1e-3)
    for parametrization in (own, compact):
        for X in (torch.zeros(2, 2, 2, dtype=dtype), 0.1 * random(2, 2, 2, dtype=dtype, seed=1)):
            X.requires_grad_()
            assert gradcheck(parametrization, X, check_forward_ad=True)
            assert gradgradcheck(parametrization, X)


# Assigning


@pytest.mark.parametrize("dtype", DTYPES)
@geometries
def test_assigning_reads_back_what_is_orthogonal_and_projects_the_rest(size, domain, stride, groups, dtype):
    tolerance = 100 * torch.finfo(dtype).eps
    holder, parametrization = registered(
        random(*size, dtype=dtype), domain=domain, stride=stride, groups=groups
    )
    grid, strides = per_axis(domain or size[2:], size), per_axis(stride, size)
    Q = parametrization.sample()
    assert Q.shape == (*size[:2], *grid)
    assert parametrization.in_manifold(Q)
    holder.weight = Q
    close(holder.weight, Q, atol=tolerance, rtol=0)
    assert torch.equal(holder.parametrizations.weight.original, torch.zeros(size, dtype=dtype))
    for W in (random(*size, dtype=dtype, seed=1), random(*size[:2], *grid, dtype=dtype, seed=2)):
        assert not parametrization.in_manifold(W)
        holder.weight = W
        wide = torch.promote_types(dtype, torch.float64)
        U, S, Vh = torch.linalg.svd(dense(W.to(wide), grid, strides, groups), full_matrices=False)
        assert S[-1] > 1e-3 * S[0]  # else the polar factor would not be unique
        got = dense(holder.weight.detach().to(wide), grid, strides, groups)
        close(got, U @ Vh, atol=tolerance * (S[0] / S[-1]).item(), rtol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@geometries
def test_update_base_keeps_the_weight(size, domain, stride, groups, dtype):
    torch.manual_seed(0)
    holder, parametrization = registered(
        random(*size, dtype=dtype), domain=domain, stride=stride, groups=groups
    )
    base = parametrization.base
    train(holder, steps=3)
    weight = holder.weight.detach()
    original = holder.parametrizations.weight.original
    assert size[1:] == (1, 3, 3) or original.abs().max() > 0
    geotorch.utils.update_base(holder, "weight")
    close(holder.weight.detach(), weight, atol=1e-5, rtol=0)
    assert original.abs().max() == 0
    assert parametrization.base is base
    assert holder.parametrizations.weight.original is original


def test_check_in_manifold():
    _, parametrization = registered(random(3, 3, 3))
    with pytest.raises(InManifoldError):
        parametrization.right_inverse(random(3, 3, 3, seed=1), check_in_manifold=True)
    parametrization.right_inverse(parametrization.sample(), check_in_manifold=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 3, 3, 3), torch.ones(4, 4, 2, 3), torch.zeros(4, 2, 4), torch.ones(2, 5, 3)],
)
def test_rank_deficient_weights(weight, dtype):
    weights = [registered(weight.to(dtype))[0].weight.detach() for _ in range(3)]
    assert all(torch.equal(w, weights[0]) for w in weights)
    assert weights[0].dtype == dtype
    assert orthogonality_defect(weights[0], tuple(weight.shape[2:])) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("triv", ["expm", "cayley"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_without_a_base_assigning_takes_the_logarithm(triv, dtype):
    X = 0.5 * random(4, 2, 3, 4, dtype=dtype)
    parametrization = ConvExponential(triv=triv, groups=2, base=False)
    W = ConvExponential(triv=triv, groups=2)(X)
    holder = Holder(W)
    register_parametrization(holder, "weight", parametrization)
    assert parametrization.base is None
    close(holder.weight, W)
    reflection = W.detach().clone()
    reflection[0] *= -1  # one channel of it: the determinant changes sign at each frequency
    if dtype.is_complex and triv == "expm":
        holder.weight = reflection  # which is no component of its own
        close(holder.weight, reflection)
    elif not dtype.is_complex:
        with pytest.raises(InManifoldError, match=r"determinant -1|eigenvalue -1"):
            holder.weight = reflection
        close(holder.weight, W)


def test_without_a_base_a_frame_is_refused():
    conv = nn.Conv2d(3, 5, 3)
    with pytest.raises(ValueError, match="only square matrices have logarithms"):
        register_parametrization(conv, "weight", ConvExponential(base=False))
    assert not is_parametrized(conv)


# Every domain


def norm_of(kernel):
    points = (64,) * (kernel.ndim - 2)
    spectrum = Lattice(points, (1,) * len(points), 1, kernel.is_complex()).spectrum(kernel)
    return torch.linalg.matrix_norm(skew(spectrum), 2).max()


def compact(channels, taps, norm, dtype, **options):
    kernel = random(channels, channels, *taps, dtype=dtype)
    return registered(kernel * (norm / norm_of(kernel)), domain="any", **options)


def check_compact(channels, taps, norm, dtype, steps=25):
    side = {1: 512, 2: 96}[len(taps)]
    torch.manual_seed(0)
    holder, _ = compact(channels, taps, norm, dtype)
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    assert orthogonality_defect(holder.weight, side) < tol
    taps_before = holder.weight.shape[2:]
    optimizer = torch.optim.Adam(holder.parameters(), lr=0.1)
    for _ in range(steps):  # away from the identity: its taps are at the centre
        optimizer.zero_grad()
        weight = holder.weight
        weight[(..., *(k // 2 for k in weight.shape[2:]))].diagonal().sum().backward()
        optimizer.step()
    moved = unpack(holder.parametrizations.weight.original.detach())
    if steps and norm <= 0.5:
        assert norm_of(moved) > 2 * norm
        assert holder.weight.shape[-1] > taps_before[-1]
    assert orthogonality_defect(holder.weight, side) < tol


SINGLE_OR_DOUBLE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@SINGLE_OR_DOUBLE
@pytest.mark.parametrize(("channels", "taps", "norm"), [(1, (3,), 0.5), (3, (5,), 2.0), (4, (3, 3), 0.5)])
def test_compact_kernel_is_orthogonal_at_every_size_and_stays_so(channels, taps, norm, dtype):
    check_compact(channels, taps, norm, dtype)


@pytest.mark.slow
@SINGLE_OR_DOUBLE
@pytest.mark.parametrize("norm", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("channels", [1, 16])
def test_compact_kernels_of_the_whole_grid(channels, taps, axes, norm, dtype):
    # Steps of 0.1 in each of 7x7 taps between 16 channels take any norm to 20, and K to 250: minutes.
    steps = 25 if channels * taps**axes <= 16 * 3**2 else 0
    check_compact(channels, (taps,) * axes, norm, dtype, steps)


@pytest.mark.parametrize("norm", [0.1, *(pytest.param(n, marks=pytest.mark.slow) for n in (1.0, 2.0))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("taps", [(3, 3), pytest.param((2, 4), marks=pytest.mark.slow), (1, 5)])
def test_compact_kernel_is_the_exponential_of_this_generator(taps, dtype, tolerance, norm):
    kernel = random(2, 2, *taps, dtype=dtype)
    kernel = kernel * (norm / norm_of(kernel))
    holder, _ = registered(kernel.clone(), domain="any")
    exact = torch.linalg.matrix_exp(skew(dense(kernel, (17, 17))).double())
    close(dense(holder.weight.detach(), (17, 17)).double(), exact, atol=tolerance, rtol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("size", "stride", "groups"),
    [
        ((4, 4, 3), 1, 1),
        ((5, 3, 3), 1, 1),
        ((3, 5, 4), 1, 1),
        ((4, 2, 3), 1, 2),
        ((2, 2, 3), 2, 1),
        ((4, 1, 5), 3, 1),
        ((4, 1, 2, 3), 2, 1),
        ((2, 3, 3), 3, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("triv", ["expm", "cayley"])
def test_compact_kernels_of_any_geometry(size, stride, groups, dtype, triv):
    holder, parametrization = registered(
        0.3 * random(*size, dtype=dtype), domain="any", stride=stride, groups=groups, triv=triv
    )
    domains = ((6,), (12,), (90,)) if len(size) == 3 else ((6, 6), (10, 36))
    for domain in domains:
        matrix = dense(holder.weight.detach(), domain, per_axis(stride, size), groups)
        assert defect(matrix) < 1e-12
    assert parametrization.in_manifold(holder.weight)
    assert holder.weight.shape[2:] == parametrization.taps


def test_any_keeps_the_weight_as_the_generator():
    kernel = random(3, 3, 3, 3)
    holder, parametrization = registered(kernel.clone(), domain="any")
    assert parametrization.base is None
    close(holder.parametrizations.weight.original, pack(kernel))
    other = random(3, 3, 3, 3, seed=1)
    holder.weight = other
    close(holder.parametrizations.weight.original, pack(other))
    with pytest.raises(ValueError, match="should be assigned a generator"):
        holder.weight = holder.weight.detach()
    with pytest.raises(ValueError, match="Found the compact kernel that was read"):
        geotorch.utils.update_base(holder, "weight")
    with pytest.raises(ValueError, match="check_in_manifold"):
        parametrization.right_inverse(other, check_in_manifold=True)
    close(holder.parametrizations.weight.original, pack(other))


def test_taps_follow_the_norm_up_and_down_and_are_integers():
    holder, parametrization = compact(3, (3,), 0.2, torch.float32)
    sizes = []
    for factor in (1, 3, 3, 3, 1 / 27):
        with torch.no_grad():
            holder.parametrizations.weight.original.mul_(factor)
        sizes.append(holder.weight.shape[-1])
        assert all(type(k) is int for k in parametrization.taps)
        assert type(parametrization.degree) is int
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]
    assert sizes[4] == sizes[0]
    loose, _ = compact(3, (3,), 0.2, torch.float32, tol=1e-2)
    assert loose.weight.shape[-1] < sizes[0]


@pytest.mark.parametrize("factor", [1e5, 1e12])
def test_a_norm_that_no_compact_kernel_holds_is_an_error(factor):
    holder, _ = compact(2, (3,), 0.5, torch.float32)
    with torch.no_grad():
        holder.parametrizations.weight.original.mul_(factor)
    with pytest.raises(ValueError, match="no kernel of a degree up to 511 reaches"):
        _ = holder.weight


@pytest.mark.parametrize(("triv", "held"), [("expm", (4.0, 47.0)), ("cayley", (4.0,))])
def test_every_norm_has_a_kernel_to_tol_or_an_error(triv, held):
    torch.manual_seed(0)
    taps = torch.randn(2, 2, 3)
    taps /= norm_of(taps)
    for norm in (4.0, 47.0, 470.0, 600.0, 900.0, 3000.0):
        conv = orthogonal(nn.Conv1d(2, 2, 3, padding=1, bias=False), triv=triv)
        before, message = conv.weight, ""
        try:
            conv.weight = norm * taps
        except ValueError as error:
            message = str(error)
        if message:
            assert "no kernel of a degree up to 511 reaches" in message
            assert norm not in held
            assert torch.equal(conv.weight, before)
        else:
            assert orthogonality_defect(conv, 3000) < 1.5e-6, norm


@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_memory_format_of_a_registered_module(domain):
    conv = nn.Conv2d(3, 3, 3)
    register_parametrization(conv, "weight", ConvExponential(domain), unsafe=True)
    before = conv.weight.detach()
    conv.to(memory_format=torch.channels_last)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize("size", [1e18, 1e28, 1e37, 3e38])
def test_huge_weights_have_no_compact_kernel(size):
    conv = nn.Conv1d(2, 2, 3)
    with torch.no_grad():
        conv.weight.fill_(0)[0, 1, 0] = size
    with pytest.raises(ValueError, match="no kernel of a degree up to 511 reaches"):
        register_parametrization(conv, "weight", ConvExponential("any"), unsafe=True)
    assert not is_parametrized(conv)


@pytest.mark.parametrize("domain", [None, 6, "any"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_generator_that_is_not_finite_is_named(domain, bad):
    holder, _ = registered(random(3, 3, 3, 3), domain=domain)
    with torch.no_grad():
        holder.parametrizations.weight.original[0, 0, 0, 1] = bad
    with pytest.raises(ValueError, match=r"the generator should be finite\. Found nan or inf: a step"):
        _ = holder.weight


# Being a module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_state_dict_into_a_fresh_model(domain, dtype):
    torch.manual_seed(0)
    holder, _ = registered(0.1 * random(3, 3, 3, 3, dtype=dtype), domain=domain)
    train(holder, steps=10)
    buffer = io.BytesIO()
    torch.save(holder.state_dict(), buffer)
    buffer.seek(0)
    fresh, _ = registered(0.1 * random(3, 3, 3, 3, dtype=dtype, seed=5), domain=domain)
    assert fresh.weight.shape != holder.weight.shape or not torch.allclose(fresh.weight, holder.weight)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(fresh.weight, holder.weight)


@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_deepcopy_is_equal_and_of_its_own(domain):
    holder, _ = registered(random(3, 3, 3, 3), domain=domain)
    twin = copy.deepcopy(holder)
    assert torch.equal(twin.weight, holder.weight)
    with torch.no_grad():
        twin.parametrizations.weight.original.add_(random(3, 3, 3, 3, seed=1))
    if domain != "any":
        twin.weight = random(3, 3, 3, 3, seed=2)
    assert twin.weight.shape != holder.weight.shape or not torch.allclose(twin.weight, holder.weight)


@pytest.mark.parametrize("domain", [None, 6, "any"])
@pytest.mark.parametrize(
    ("low", "high"), [(torch.float32, torch.float64), (torch.complex64, torch.complex128)]
)
def test_precision_that_rises_is_used(domain, low, high):
    torch.manual_seed(0)
    holder, parametrization = registered(0.1 * random(3, 3, 3, 3, dtype=low), domain=domain)
    train(holder, steps=5)
    before = holder.weight.detach()
    holder.to(high)
    assert holder.weight.dtype == high
    if domain != "any":
        assert parametrization.base.dtype == torch.float64
        close(holder.weight.detach(), before.to(high), atol=1e-5, rtol=0)
    assert orthogonality_defect(holder.weight, 3 if domain is None else 6) < 1e-12
    holder.to(low)
    assert holder.weight.dtype == low
    assert orthogonality_defect(holder.weight, 3 if domain is None else 6) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_half_precision(domain, dtype, bound):
    torch.manual_seed(0)
    holder, parametrization = registered(0.1 * random(4, 4, 3, 3).to(dtype), domain=domain)
    train(holder, steps=2, lr=0.01, optimizer=torch.optim.SGD)
    assert holder.weight.dtype == dtype
    assert holder.parametrizations.weight.original.dtype == dtype
    side = 3 if domain is None else 6
    assert 1e-5 < orthogonality_defect(holder.weight, side) < bound
    single, wide = registered(0.1 * random(4, 4, 3, 3).float(), domain=domain)
    single.to(dtype)
    if domain != "any":
        assert parametrization.base.dtype == wide.base.dtype == torch.float32
    single.float()
    assert orthogonality_defect(single.weight, side) < 1e-5


def test_autocast_does_not_reach_the_exponential():
    holder, _ = registered(random(4, 4, 1).float())
    exact = holder.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(holder.weight, exact)


@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_remove_parametrizations_leaves_the_weight(domain):
    holder, _ = registered(random(3, 3, 3, 3), domain=domain)
    original, weight = holder.parametrizations.weight.original, holder.weight.detach()
    remove_parametrizations(holder, "weight")
    assert type(holder) is Holder
    assert list(holder.state_dict()) == ["weight"]
    assert holder.weight is original
    assert torch.equal(holder.weight, weight)


def test_an_optimizer_made_before_registering_trains_the_generator():
    conv = nn.Conv2d(3, 3, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    register_parametrization(conv, "weight", ConvExponential())
    before = conv.weight.detach()
    conv(torch.randn(1, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert (conv.weight - before).abs().max() > 1e-4
    assert generators(nn.Sequential(conv, nn.Linear(2, 2))) == [conv.parametrizations.weight.original]
    assert generators(nn.Linear(2, 2)) == []


def test_cached_computes_the_exponential_once():
    calls = []

    def counting(A):
        calls.append(A)
        return torch.linalg.matrix_exp(A)

    conv = nn.Conv2d(3, 3, 3, padding=1)
    register_parametrization(conv, "weight", ConvExponential(triv=counting))
    calls.clear()
    x = torch.randn(1, 3, 5, 5)
    with cached():
        for _ in range(10):
            x = conv(x)
    x.sum().backward()
    assert len(calls) == 1


class Double(nn.Module):
    def forward(self, X):
        return 2 * X

    def right_inverse(self, X):
        return X / 2


@pytest.mark.parametrize("domain", [None, "any"])
def test_stacked_on_another_parametrization(domain):
    kernel = 0.1 * random(3, 3, 3)
    holder = Holder(kernel.clone())
    register_parametrization(holder, "weight", Double())
    register_parametrization(holder, "weight", ConvExponential(domain), unsafe=True)
    exact = torch.linalg.matrix_exp(skew(dense(unpack(kernel), (9,))))
    if domain == "any":
        close(dense(holder.weight.detach(), (9,)), exact)
    else:
        close(
            dense(holder.weight.detach(), (3,)), torch.linalg.matrix_exp(skew(dense(unpack(kernel), (3,))))
        )
        parametrization = holder.parametrizations.weight[1]
        Q = parametrization.sample()
        holder.weight = Q
        close(holder.weight, Q)
    assert generators(holder) == [holder.parametrizations.weight.original]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("domain", [None, 5, "any"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_compile_and_transforms(domain, dtype):
    holder, parametrization = registered(0.2 * random(3, 3, 3, dtype=dtype), domain=domain)
    X = 0.2 * random(3, 3, 3, dtype=dtype, seed=1)
    compiled = torch.compile(parametrization, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        holder.parametrizations.weight.original.copy_(X)
    weight = holder.weight.detach()
    X.requires_grad_()
    G = random(*weight.shape, dtype=dtype, seed=2)
    close(compiled(X), weight)
    gradients = [torch.autograd.grad(f(X), X, G)[0] for f in (compiled, parametrization)]
    close(*gradients)
    batch = torch.stack([X.detach(), X.detach() / 2])
    close(torch.func.vmap(parametrization)(batch)[0], weight)

    def f(X):
        return (parametrization(X) * G).sum().real if dtype.is_complex else (parametrization(X) * G).sum()

    per_sample = torch.func.vmap(torch.func.grad(f))(batch)
    close(per_sample[0], torch.func.grad(f)(batch[0]))


def test_meta_device():
    for domain in (None, 5, "any"):
        holder, _ = registered(torch.empty(3, 3, 3, device="meta"), domain=domain)
        assert holder.weight.is_meta
        twin, _ = registered(random(3, 3, 3).float(), domain=domain)
        holder.to_empty(device="cpu").load_state_dict(twin.state_dict())
        assert torch.equal(holder.weight, twin.weight)


# geotorch's verbs


@pytest.mark.parametrize("distribution", ["uniform", "torus", "identity"])
@pytest.mark.parametrize("dtype", DTYPES)
@geometries
def test_samples_are_orthogonal_kernels(size, domain, stride, groups, dtype, distribution):
    _, parametrization = registered(random(*size, dtype=dtype), domain=domain, stride=stride, groups=groups)
    Q = parametrization.sample(distribution)
    assert Q.dtype == dtype
    assert parametrization.in_manifold(Q)
    grid, strides = per_axis(domain or size[2:], size), per_axis(stride, size)
    wide = torch.promote_types(dtype, torch.float64)
    assert defect(dense(Q.to(wide), grid, strides, groups)) < 100 * torch.finfo(dtype).eps


def test_samples_are_what_they_are_called():
    torch.manual_seed(0)
    _, parametrization = registered(random(2, 2, 1, 4))
    signs = {
        tuple(torch.linalg.det(matrix).real.sign().int().tolist())
        for matrix in (
            torch.fft.fft(parametrization.sample(), dim=-1)[..., 0, (0, 2)].permute(2, 0, 1)
            for _ in range(64)
        )
    }
    assert len(signs) == 4  # both determinants at both real frequencies
    angle = 0.7
    torus = parametrization.sample("torus", init_=lambda t: t.fill_(angle))
    eigenvalues = torch.linalg.eigvals(dense(torus, (1, 4)))
    assert (eigenvalues.angle().abs() - angle).abs().max() < 1e-12
    close(dense(parametrization.sample("identity"), (1, 4)), torch.eye(8, dtype=torch.float64))
    for bad in ({"distribution": "normal"}, {"init_": nn.init.zeros_}):
        with pytest.raises(ValueError, match="should be"):
            parametrization.sample(**bad)
    _, compact_one = registered(random(2, 2, 3), domain="any")
    assert torch.equal(compact_one.sample("identity"), torch.zeros(2, 2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="distribution should be one of"):
        compact_one.sample("uniform")


def test_in_manifold_is_about_the_domain():
    _, own = registered(random(3, 3, 3, 3))
    _, every = registered(random(3, 3, 3, 3), domain="any")
    Q = own.sample()
    assert own.in_manifold(Q)
    assert not every.in_manifold(Q)
    assert not own.in_manifold(Q[:2])
    assert not own.in_manifold(Q[..., :2])
    assert not own.in_manifold(Q.to(torch.complex128))
    assert own.in_manifold(Q + 1e-3, eps=0.1)
    assert not own.in_manifold(Q + 1e-3)


def test_before_registration_the_size_is_not_known():
    parametrization = ConvExponential()
    for call in (
        parametrization.sample,
        lambda: parametrization.in_manifold(torch.ones(2, 2, 3)),
        lambda: parametrization.taps,
    ):
        with pytest.raises(RuntimeError, match="should be registered on a weight first"):
            call()


def test_repr_says_what_it_is():
    assert repr(ConvExponential(stride=2)) == (
        "ConvExponential(domain=None, stride=2, triv=expm, base=True)"
    )
    _, parametrization = compact(2, (3, 3), 0.2, torch.float32, tol=1e-5)
    assert repr(parametrization) == (
        "ConvExponential((2, 2, 3, 3), domain='any', taps=(9, 9), triv=expm, base=False, tol=1e-05)"
    )


# Bad input


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"domain": "every"}, 'domain should be None, a size, or "any"'),
        (ValueError, {"domain": 0}, "domain should be a positive integer"),
        (TypeError, {"domain": 3.0}, "domain should be an integer"),
        (TypeError, {"stride": "2"}, "stride should be an integer"),
        (ValueError, {"stride": 0}, "stride should be a positive integer"),
        (TypeError, {"groups": 1.0}, "groups should be an integer"),
        (ValueError, {"groups": -1}, "groups should be a positive integer"),
        (TypeError, {"groups": (2,)}, "groups should be an integer"),
        (TypeError, {"base": torch.zeros(2)}, "base should be None, True or False"),
        (ValueError, {"domain": "any", "tol": "small"}, "tol should be a float between"),
        (ValueError, {"triv": "exp"}, r"triv should be one of \['cayley', 'expm'\]"),
        (TypeError, {"triv": 1}, "triv should be one of"),
        (TypeError, {"base": "yes"}, "base should be None, True or False"),
        (ValueError, {"domain": "any", "base": True}, "base should be None or False"),
        (ValueError, {"domain": 8, "base": False}, "base should be None or True"),
        (ValueError, {"triv": torch.matrix_exp, "base": False}, "needs triv's inverse"),
        (ValueError, {"tol": 1e-5}, 'tol should be None unless domain="any"'),
        (ValueError, {"domain": "any", "tol": 0.0}, "tol should be a float between"),
    ],
)
def test_arguments_are_checked_when_given(error, options, message):
    with pytest.raises(error, match=message):
        ConvExponential(**options)


@pytest.mark.parametrize(
    ("error", "weight", "options", "message"),
    [
        (ValueError, torch.ones(2, 2, 5, 5), {"domain": (8, 4)}, "at least the kernel's taps"),
        (ValueError, torch.ones(2, 2, 5, 5), {"domain": (8, 8, 8)}, "one for each"),
        (ValueError, torch.ones(2, 2, 3, 3), {"domain": 7, "stride": 2}, "divisible by the stride"),
        (ValueError, torch.ones(2, 2, 3, 3), {"stride": 2}, "own size"),
        (ValueError, torch.ones(4, 2, 3, 3), {"groups": 3}, "groups should divide"),
        (ValueError, torch.ones(4, 2, 3, 3), {"domain": "any", "groups": 3}, "groups should divide"),
        (ValueError, torch.ones(4, 2, 3, 3), {"domain": "any", "stride": (1, 1, 1)}, "one for each"),
        (ValueError, torch.full((2, 2, 3), torch.nan), {}, "finite"),
        (ValueError, torch.full((2, 2, 3), torch.inf), {"domain": "any"}, "finite"),
        (ValueError, torch.ones(2, 2), {}, "a convolution's kernel"),
        (TypeError, torch.ones(2, 2, 3, dtype=torch.int32), {}, "floating or complex dtype"),
    ],
)
def test_registering_what_does_not_fit_leaves_the_module_untouched(error, weight, options, message):
    module = nn.Module()
    module.register_buffer("weight", weight.clone())
    with pytest.raises(error, match=message):
        register_parametrization(module, "weight", ConvExponential(**options), unsafe=True)
    assert type(module) is nn.Module
    assert not is_parametrized(module)
    assert torch.equal(module.weight.nan_to_num(), weight.nan_to_num())
    with pytest.raises(ValueError, match="does not have a parameter"):
        register_parametrization(module, "wait", ConvExponential(), unsafe=True)


@pytest.mark.parametrize("domain", [None, 6, "any"])
def test_assigning_what_does_not_fit_changes_nothing(domain):
    holder, parametrization = registered(random(3, 3, 3, 3), domain=domain)
    with torch.no_grad():
        holder.parametrizations.weight.original.add_(0.1 * random(3, 3, 3, 3, seed=1))
    before = {key: value.clone() for key, value in holder.state_dict().items()}
    for error, bad in (
        (ValueError, random(3, 3, 4, 4)),
        (ValueError, random(3, 2, 3, 3)),
        (ValueError, random(3, 3, 3)),
        (ValueError, random(3, 3, 3, 3) * torch.nan),
        (TypeError, random(3, 3, 3, 3, dtype=torch.complex128)),
        (TypeError, random(3, 3, 3, 3, dtype=torch.float32)),
        (TypeError, torch.ones(3, 3, 3, 3, dtype=torch.int64)),
    ):
        with pytest.raises(error, match="the weight should be"):
            holder.weight = bad
    with pytest.raises(ValueError, match="the generator should be of size"):
        parametrization(random(3, 3, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in holder.state_dict().items())


def test_a_checkpoint_of_another_shape_is_refused():
    holder, _ = registered(random(3, 3, 3, 3))
    other, _ = registered(random(3, 3, 5, 5))
    with pytest.raises(RuntimeError, match=r"size mismatch for parametrizations\.weight\.original"):
        holder.load_state_dict(other.state_dict())


# As a manifold of geotorch


@pytest.mark.parametrize(
    "distribution", ["uniform", *(pytest.param(d, marks=pytest.mark.slow) for d in ("torus", "identity"))]
)
@pytest.mark.parametrize("triv", ["expm", pytest.param("cayley", marks=pytest.mark.slow)])
def test_the_pattern_of_geotorchs_own_tests(triv, distribution):
    """All sizes from 1 to 8: registered, sampled, trained by SGD, its base updated."""
    torch.manual_seed(0)
    for taps in itertools.product(range(1, 9), repeat=2):
        conv = nn.Conv2d(5, 4, taps)
        parametrization = ConvExponential(triv=triv)
        register_parametrization(conv, "weight", parametrization)
        assert conv.weight.shape == (4, 5, *taps)
        sample = parametrization.sample(distribution)
        assert parametrization.in_manifold(sample)
        conv.weight = sample
        assert (conv.weight - sample).abs().max() < 1e-5
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        x = torch.randn(2, 5, taps[0] + 3, taps[1] + 2)
        for _ in range(3):
            optimizer.zero_grad()
            (conv(x) - 1).square().mean().backward()
            optimizer.step()
            assert parametrization.in_manifold(conv.weight)
        before = conv.weight.detach().clone()
        geotorch.utils.update_base(conv, "weight")
        assert conv.weight.shape == (4, 5, *taps)
        assert (conv.weight - before).abs().max() < 1e-6
        assert not parametrization_of(conv).original.any()


def parametrization_of(conv):
    return conv.parametrizations.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("triv", ["expm", "cayley"])
@pytest.mark.parametrize(("size", "groups"), [((3, 3, 5), 1), ((4, 4, 3, 4), 1), ((4, 2, 4, 3), 2)])
def test_sgd_with_update_base_is_riemannian_gradient_descent(size, groups, triv, dtype):
    """A step from ``W`` is ``R(-lr grad) W`` with the Riemannian gradient, by the dense matrices."""
    from orthoconv_param.manifold import OrthogonalKernels

    holder = nn.Module()
    holder.weight = nn.Parameter(random(*size, dtype=dtype))
    register_parametrization(holder, "weight", ConvExponential(groups=groups, triv=triv))
    manifold = OrthogonalKernels(size[2:], groups=groups, retraction=triv)
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.3)
    C = random(*size, dtype=dtype, seed=4)
    for _ in range(3):
        geotorch.utils.update_base(holder, "weight")
        W = holder.weight.detach()
        Q = dense(W, size[2:], groups=groups)
        W.requires_grad_()
        loss = (W - C).abs().square().sum() + (W.real**3).sum()
        G = torch.autograd.grad(loss, W)[0]
        optimizer.zero_grad()
        ((holder.weight - C).abs().square().sum() + (holder.weight.real**3).sum()).backward()
        optimizer.step()
        A = skew(Q.mH @ dense(G, size[2:], groups=groups))
        R = torch.linalg.matrix_exp(-0.3 * A)
        if triv == "cayley":
            eye = torch.eye(len(A), dtype=dtype)
            R = torch.linalg.solve(eye + 0.15 * A, eye - 0.15 * A)
        torch.testing.assert_close(dense(holder.weight.detach(), size[2:], groups=groups), Q @ R)
        # the same step on the manifold, whose metric is N times that of torch
        points = np.prod(size[2:])
        step = manifold.retr(W.detach(), -0.3 * points * manifold.egrad2rgrad(W.detach(), G))
        torch.testing.assert_close(holder.weight.detach(), step)


def test_in_a_product_manifold_of_geotorch():
    """Two kernels, one over the other, each orthogonal."""

    class Both(geotorch.ProductManifold):
        def forward(self, X):
            return torch.cat(super().forward(X.chunk(2)))

        def right_inverse(self, W, check_in_manifold=False):
            return torch.cat(super().right_inverse(W.chunk(2), check_in_manifold))

    conv = nn.Conv2d(3, 6, 3).double()
    both = Both([ConvExponential(), ConvExponential(triv="cayley")])
    register_parametrization(conv, "weight", both)
    with torch.no_grad():
        parametrization_of(conv).original.copy_(random(6, 3, 3, 3))
    for manifold, weight in zip(both, conv.weight.chunk(2), strict=True):
        assert manifold.in_manifold(weight, eps=1e-12)
    samples = [manifold.sample() for manifold in both]
    conv.weight = torch.cat(samples)
    torch.testing.assert_close(conv.weight, torch.cat(samples))
    with pytest.raises(InManifoldError):
        both.right_inverse(2 * conv.weight, check_in_manifold=True)


@pytest.mark.parametrize("domain", [None, (6, 5), "any"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_identity_with_a_spread(domain, dtype):
    conv = nn.Conv2d(4, 4, 3, dtype=dtype)
    register_parametrization(conv, "weight", ConvExponential(domain), unsafe=domain is not None)
    parametrization = parametrization_of(conv)[0]
    distances = []
    for spread in (0.0, 1e-2, 1e-1):
        torch.manual_seed(0)
        conv.weight = parametrization.sample("identity", partial(nn.init.normal_, std=spread))
        assert parametrization.in_manifold(conv.weight)
        kernel = conv.weight.detach()
        eye = functional.identity((4, 4, 3, 3), kernel.shape[2:], dtype=dtype)
        distances.append((kernel - eye).norm().item())
    assert distances[0] < 1e-5
    assert distances[2] / distances[1] == pytest.approx(10, rel=0.2)
    if domain != "any":
        with pytest.raises(ValueError, match="init_ should be None"):
            parametrization.sample("uniform", nn.init.normal_)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_torus_samples_have_the_angles_that_were_drawn(dtype):
    conv = nn.Conv1d(4, 4, 5, dtype=dtype)
    register_parametrization(conv, "weight", ConvExponential())
    parametrization = parametrization_of(conv)[0]
    weight = parametrization.sample("torus", lambda x: nn.init.constant_(x, 0.7))
    assert weight.dtype == dtype
    angles = torch.linalg.eigvals(dense(weight, (5,))).angle().abs()
    torch.testing.assert_close(angles, torch.full_like(angles, 0.7))
    parametrization.triv = "expm"
    uniform = torch.cat([
        torch.linalg.eigvals(dense(parametrization.sample("torus"), (5,))).angle() for _ in range(300)
    ])  # fmt: skip
    assert uniform.abs().max() <= np.pi
    assert uniform.abs().mean().item() == pytest.approx(np.pi / 2, abs=0.1)
    assert uniform.square().mean().item() == pytest.approx(np.pi**2 / 3, abs=0.3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_uniform_samples_have_the_spacings_of_the_circular_ensembles(dtype):
    """Of 2x2 Haar unitary matrices the angle between the eigenvalues has density ``(1 - cos) / 2 pi``."""
    conv = nn.Conv1d(2, 2, 4, dtype=dtype)
    register_parametrization(conv, "weight", ConvExponential())
    parametrization = parametrization_of(conv)[0]
    torch.manual_seed(0)
    lattice = Lattice((4,), (1,), 1, dtype.is_complex)
    Q = torch.cat([lattice.spectrum(parametrization.sample()) for _ in range(4000)])[:, 1]
    angles = torch.linalg.eigvals(Q).angle()
    spacing = angles[:, 0] - angles[:, 1]
    # E cos = -1/2, E cos(2 .) = 0, and half of them on each side of pi / 2 by its share, 1/2 - 1/pi
    assert spacing.cos().mean().item() == pytest.approx(-0.5, abs=0.05)
    assert (2 * spacing).cos().mean().item() == pytest.approx(0, abs=0.05)
    assert (spacing.cos() > 0).double().mean().item() == pytest.approx(0.5 - 1 / np.pi, abs=0.03)
    trace = Q.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert trace.abs().square().mean().item() == pytest.approx(1, abs=0.08)
    assert trace.abs().pow(4).mean().item() == pytest.approx(2, abs=0.25)
