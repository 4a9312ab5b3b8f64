import geotorch
import numpy as np
import pytest
import torch
from oracles import defect, dense, random, skew
from scipy.special import jv

from orthoconv_param import expm_skew
from orthoconv_param.matrices import chebyshev
from orthoconv_param.matrices.maps import (
    RETRACTIONS,
    cayley,
    check_trivialization,
    inverse,
    lift,
    retract,
    retraction,
    trivialization,
)
from orthoconv_param.parametrizations.degree import Degree, smallest_degree
from orthoconv_param.torus.lattice import Lattice

MAPS = ["expm", "cayley", geotorch.SO.trivializations["expm"], geotorch.SO.trivializations["cayley"]]


@pytest.mark.parametrize("triv", MAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_maps_are_unitary_and_start_as_the_identity_does(triv, dtype):
    apply = trivialization(triv)
    A = skew(random(3, 5, 5, dtype=dtype))
    Q = apply(A)
    eye = torch.eye(5, dtype=dtype)
    torch.testing.assert_close(Q.mH @ Q, eye.expand_as(Q))
    h = 1e-5
    torch.testing.assert_close((apply(h * A) - apply(-h * A)) / (2 * h), A, atol=1e-8, rtol=0)


def test_cayley_is_the_formula():
    A = skew(random(4, 4, dtype=torch.complex128))
    eye = torch.eye(4, dtype=A.dtype)
    torch.testing.assert_close(cayley(A), (eye + A / 2) @ torch.linalg.inv(eye - A / 2))


@pytest.mark.parametrize("triv", ["expm", "cayley"])
def test_inverse_undoes_the_map(triv):
    A = skew(random(3, 4, 4, dtype=torch.complex128))
    A = A / torch.linalg.matrix_norm(A, 2).amax() * 3
    undo = inverse(triv)
    torch.testing.assert_close(undo(trivialization(triv)(A)), A)
    assert inverse(expm_skew) is None


def test_cayley_does_not_reach_minus_one():
    with pytest.raises(ValueError, match="eigenvalue -1"):
        inverse("cayley")(-torch.eye(2, dtype=torch.float64))


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"\['cayley', 'expm'\] or callable. Found 'exp'"):
        trivialization("exp")
    with pytest.raises(TypeError, match="callable"):
        trivialization(3)


@pytest.mark.parametrize("norm", [0.25, 1.0, 4.0, 20.0])
def test_tails_of_the_exponential_are_those_of_the_bessel_functions(norm):
    tails = chebyshev.tails("expm", norm)[:30]
    exact = [2 * np.abs(jv(np.arange(p + 1, p + 120), norm)).sum() for p in range(30)]
    # the rounding of 64 values of modulus 1 is all that may differ
    np.testing.assert_allclose(tails, exact, atol=1e-13)


def antisymmetric(theta):
    """One channel with spectrum ``i theta sin(w)``: the worst of its norm, ``exp`` has taps ``J_d``."""
    return torch.tensor([-theta / 2, 0.0, theta / 2], dtype=torch.float64).reshape(1, 1, 3)


def compact_defect(p, theta):
    lattice = Lattice.of_degree(p, (1,), (1,), 1, False)
    kernel = lattice.kernel(expm_skew(lattice.spectrum(antisymmetric(theta))))
    return defect(dense(kernel, (128,)))


def test_the_tail_alone_is_no_bound_and_with_lebesgues_constant_it_is():
    """A compact kernel also interpolates between its torus's frequencies, which enlarges the tail."""
    tol, norm = 2e-7, 1.0
    tails = chebyshev.tails("expm", norm)
    p = int(np.argmax(tails <= tol))
    assert tails[p] <= tol < compact_defect(p, norm)
    bound = smallest_degree("expm", norm, tol, (1,))
    assert bound == p + 1
    assert compact_defect(bound, norm) <= tol


@pytest.mark.parametrize("norm", [0.1, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("tol", [1e-3, 2e-7, 1e-11])
def test_degree_bounds_the_worst_channel_and_is_not_wasteful(norm, tol):
    p = smallest_degree("expm", norm, tol, (1,))
    assert compact_defect(p, norm) <= tol
    if p > 2:
        assert compact_defect(p - 2, norm) > tol


def test_kernels_at_torchs_initial_norms_have_the_taps_that_are_announced():
    sizes = [2 * smallest_degree("expm", norm, 2e-7, (1, 1)) + 1 for norm in (0.25, 0.5, 1.0)]
    assert sizes == [11, 13, 17]
    assert 2 * smallest_degree("expm", 1.0, 1e-12, (1, 1)) + 1 == 25
    # Cayley's map has a pole, and so decays only geometrically
    assert smallest_degree("cayley", 4.0, 2e-7, (1,)) > 2 * smallest_degree("expm", 4.0, 2e-7, (1,))
    assert smallest_degree(geotorch.SO.trivializations["cayley"], 1.0, 2e-7, (1,)) == smallest_degree(
        "cayley", 1.0, 2e-7, (1,)
    )


def test_a_map_that_is_not_smooth_has_no_compact_kernel():
    def jump(A):
        return torch.where(A.imag > 0.3, 1j, 1.0 + 0j).to(A.dtype)

    with pytest.raises(ValueError, match="no kernel of a degree up to 511 reaches"):
        Degree.of(jump, 2e-7, (1,), 1.0)


# Maps that are given


@pytest.fixture(params=[None, "meta", torch.float16])
def surroundings(request):
    """Another device's context, or another default dtype."""
    if request.param is None:
        yield
    elif isinstance(request.param, str):
        with torch.device(request.param):
            yield
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        yield
        assert torch.get_default_dtype() == request.param
        torch.set_default_dtype(before)


def of_complex_matrices(A):
    if not A.is_complex():
        raise TypeError("only complex ones")
    return torch.matrix_exp(A)


def of_real_matrices(A):
    if A.is_complex():
        raise TypeError("only real ones")
    return torch.matrix_exp(A)


def through_a_series(A):
    eye = torch.eye(3)
    return torch.linalg.solve(eye - A, eye + A)


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(
    "triv",
    [
        *MAPS,
        torch.matrix_exp,
        torch.linalg.matrix_exp,
        expm_skew,
        of_complex_matrices,
        of_real_matrices,
        through_a_series,
        *(r.apply for r in RETRACTIONS.values()),
    ],
)
def test_maps_to_unitary_matrices_are_accepted(triv):
    state = torch.get_rng_state()
    assert check_trivialization(triv) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def raises(A):
    raise RuntimeError("no such luck")


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(
    ("triv", "found"),
    [
        (torch.exp, r"triv='exp', whose result has a defect \|Q\^H Q - I\| = \d"),
        (skew, r"triv='skew', whose result has a defect"),
        (lambda A: torch.matrix_exp(A) * (1 + 1e-5), r"a defect \|Q\^H Q - I\| = 2.0e-05"),
        (lambda A: torch.matrix_exp(A) if A.is_complex() else A.exp(), "has a defect"),
        (lambda A: A / 0, "is not finite"),
        (lambda A: torch.matrix_exp(A)[0], r"has shape \(3, 3\), at matrices \(2, 3, 3\)"),
        (lambda A: None, "is of type NoneType"),
        (raises, "triv='raises', which raises RuntimeError: no such luck"),
    ],
)
def test_other_maps_are_refused(triv, found):
    with pytest.raises(ValueError, match=found) as caught:
        check_trivialization(triv)
    assert "should map skew-Hermitian to unitary matrices, as torch.matrix_exp, not torch.exp, does" in str(
        caught.value
    )
    assert (caught.value.__cause__ is not None) == (triv is raises)


def test_a_map_is_tried_without_a_graph_and_twice():
    seen = []

    def triv(A):
        seen.append((A.dtype, A.shape, torch.is_grad_enabled()))
        return torch.matrix_exp(A)

    check_trivialization(triv)
    assert seen == [(dtype, (2, 3, 3), False) for dtype in (torch.complex128, torch.float64)]
    with pytest.raises(ValueError, match=r"Found 'exp'"):
        check_trivialization("exp")
    with pytest.raises(TypeError, match="callable"):
        check_trivialization(3)


def test_a_map_without_values_is_accepted():
    with torch._subclasses.FakeTensorMode():
        check_trivialization(torch.matrix_exp)


# Retractions


def tangent(Q, seed=3):
    """Any tangent vector at a frame: ``Q A`` with skew ``A``, and anything orthogonal to it."""
    V = random(*Q.shape, dtype=Q.dtype, seed=seed)
    return V - Q @ (Q.mH @ V + V.mH @ Q) / 2


FRAMES = [(3, 5, 5), (2, 6, 4), (4, 3, 1), (2, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("size", FRAMES)
@pytest.mark.parametrize("name", RETRACTIONS)
def test_retractions(name, size, dtype):
    """Value and derivative at 0, and the second derivative where it is claimed."""
    Q = torch.linalg.qr(random(*size, dtype=dtype)).Q
    V = tangent(Q)
    torch.testing.assert_close(retract(name, Q, 0 * V), Q)
    for step in (0.1, 1.0, 30.0):
        R = retract(name, Q, step * V)
        torch.testing.assert_close(R.mH @ R, torch.eye(size[-1], dtype=dtype).expand(size[0], -1, -1))
    h = 1e-4
    ahead, behind = retract(name, Q, h * V), retract(name, Q, -h * V)
    torch.testing.assert_close((ahead - behind) / (2 * h), V, atol=1e-6, rtol=0)
    second = (ahead - 2 * Q + behind) / h**2
    geodesic = lift(Q, V) @ V  # the second derivative of exp(tA) Q
    error = (second - geodesic).abs().max().item()
    if retraction(name).order == 2:
        assert error < 1e-5
    elif min(size[1:]) > 1:
        assert error > 1e-2


def test_which_retractions_are_of_second_order():
    assert {name for name, r in RETRACTIONS.items() if r.order == 2} == {"expm", "cayley", "polar"}
    with pytest.raises(ValueError, match=r"should be one of \['expm', 'cayley', 'polar', 'qr'\]"):
        retraction("exp")


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.complex128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RETRACTIONS)
def test_derivatives_of_retractions(name, dtype):
    """At any matrices, and at zero, where all eigenvalues coincide."""
    apply = retraction(name).apply
    for A in (skew(random(2, 3, 3, dtype=dtype)), torch.zeros(1, 3, 3, dtype=dtype)):
        # of a free matrix: torch's QR is not differentiable beside the skew ones
        def of_free(X, A=A):
            return apply(A + skew(X))

        X = (0 * A).requires_grad_()
        assert torch.autograd.gradcheck(of_free, X, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(of_free, X)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e4])
def test_polar_and_qr_are_what_they_are_called(norm):
    for dtype in (torch.float64, torch.complex128):
        A = norm * skew(random(3, 4, 4, dtype=dtype))
        X = A + torch.eye(4, dtype=dtype)
        U, _, Vh = torch.linalg.svd(X)
        torch.testing.assert_close(retraction("polar").apply(A), U @ Vh)
        Q = retraction("qr").apply(A)
        R = Q.mH @ X
        assert R.tril(-1).abs().max() < 1e-12 * norm + 1e-12
        diagonal = R.diagonal(dim1=-2, dim2=-1)
        assert (diagonal.real > 0).all()
        assert diagonal.imag.abs().max() < 1e-11 * (1 + norm) if dtype.is_complex else True


# In geotorch's own manifolds


@pytest.mark.parametrize(
    "make",
    [
        lambda triv: geotorch.SO((2, 6, 6), triv=triv),
        lambda triv: geotorch.Stiefel((2, 6, 4), triv=triv),
        lambda triv: geotorch.Grassmannian((2, 6, 3), triv=triv),
        lambda triv: geotorch.LowRank((5, 4), rank=2, triv=triv),
    ],
)
def test_it_is_a_trivialization_of_geotorchs_manifolds(make):
    """The same values and gradients as with geotorch's own exponential."""
    outcomes = []
    for triv in ("expm", expm_skew):
        torch.manual_seed(0)
        manifold = make(triv).double()
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(manifold.sample())
        torch.nn.utils.parametrize.register_parametrization(holder, "weight", manifold)
        with torch.no_grad():
            for i, parameter in enumerate(holder.parameters()):
                parameter.add_(0.3 * random(*parameter.shape, seed=i))
        weight = holder.weight
        gradients = torch.autograd.grad(weight.sin().sum(), list(holder.parameters()))
        outcomes.append((weight, *gradients))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)
