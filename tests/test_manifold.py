import geoopt
import numpy as np
import pytest
import torch
from oracles import defect, dense, random
from scipy.linalg import logm
from scipy.special import iv

from orthoconv_param import functional
from orthoconv_param.manifold import OrthogonalKernels
from orthoconv_param.matrices.maps import RETRACTIONS
from orthoconv_param.torus.lattice import Lattice

close = torch.testing.assert_close

CASES = [  # size of the kernel, stride, groups
    ((4, 4, 5, 6), 1, 1),
    ((5, 3, 4, 3), 1, 1),
    ((2, 5, 6), 1, 1),
    ((9, 2, 5), 1, 1),
    ((8, 2, 4, 6), (1, 2), 2),
    ((4, 1, 4, 6), 2, 1),
    ((3, 1, 4, 2, 3), 1, 3),
]
DTYPES = [torch.float64, torch.complex128]


def make(size, stride, groups, dtype=torch.float64, **options):
    torch.manual_seed(0)
    manifold = OrthogonalKernels(size[2:], stride=stride, groups=groups, **options)
    return manifold, manifold.random(*size, dtype=dtype)


def tangent(manifold, x, length=1.0, seed=1):
    u = manifold.proju(x, random(*x.shape, dtype=x.dtype, seed=seed))
    return length * u / manifold.norm(x, u)


def operator(manifold, x):
    """The dense matrix, by torch's own convolution."""
    return dense(
        torch.as_tensor(x).as_subclass(torch.Tensor), manifold.domain, manifold.stride, manifold.groups
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_points(size, stride, groups, dtype):
    manifold, x = make(size, stride, groups, dtype)
    assert isinstance(x, geoopt.ManifoldTensor)
    assert x.shape == size
    assert x.dtype == dtype
    origin = manifold.origin(*size, dtype=dtype)
    nearest = manifold.projx(random(*size, dtype=dtype))
    for point in (x, origin, nearest):
        assert defect(operator(manifold, point)) < 1e-12
        assert manifold.check_point_on_manifold(point)
    close(manifold.projx(x).as_subclass(torch.Tensor), x.as_subclass(torch.Tensor))
    kernel = random(*size, dtype=dtype)
    polar = functional.nearest_orthogonal(kernel, manifold.domain, stride=stride, groups=groups)
    close(nearest, polar)
    assert not manifold.check_point_on_manifold(kernel)
    assert not manifold.check_point_on_manifold(x * 1.001)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_tangent_vectors(size, stride, groups, dtype):
    manifold, x = make(size, stride, groups, dtype)
    e = random(*size, dtype=dtype, seed=5)
    u, v = tangent(manifold, x), tangent(manifold, x, seed=2)
    Q, U = (operator(manifold, y) for y in (x, u))
    tall = Q.shape[0] >= Q.shape[1]
    for M in (U, operator(manifold, manifold.egrad2rgrad(x, e))):
        product = Q.mH @ M if tall else M @ Q.mH
        assert (product + product.mH).abs().max() < 1e-12
    close(manifold.proju(x, u), u)
    # the projection takes away what is orthogonal to every tangent vector
    assert abs((v.conj() * (e - manifold.proju(x, e))).sum().real) < 1e-12
    # the gradient represents the derivative in the metric
    gradient = manifold.egrad2rgrad(x, e)
    close(manifold.inner(x, gradient, v), (e.conj() * v).sum().real)
    # the metric is that of the shortest lift of the dense operators
    V = operator(manifold, v)
    lifted = 2 * V - (Q @ (Q.mH @ V) if tall else (V @ Q.mH) @ Q)
    close(manifold.inner(x, u, v), (U.conj() * lifted).sum().real)
    assert manifold.inner(x, u, v, keepdim=True).shape == (1,) * len(size)
    close(manifold.norm(x, u), torch.ones((), dtype=torch.float64))
    assert manifold.check_vector_on_tangent(x, u)
    assert not manifold.check_vector_on_tangent(x, e)
    y = manifold.retr(x, u)
    moved = manifold.transp(x, y, v)
    assert manifold.check_vector_on_tangent(y, moved)
    if Q.shape[0] == Q.shape[1]:
        close(manifold.inner(y, manifold.transp(x, y, u), moved), manifold.inner(x, u, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_retractions_start_with_the_vector(size, stride, groups, name, dtype):
    manifold, x = make(size, stride, groups, dtype, retraction=name)
    u = tangent(manifold, x)
    x = x.as_subclass(torch.Tensor)
    assert defect(operator(manifold, manifold.retr(x, 3 * u))) < 1e-12
    close(manifold.retr(x, 0 * u), x)
    h = 1e-5
    close((manifold.retr(x, h * u) - manifold.retr(x, -h * u)) / (2 * h), u, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_geodesics_have_constant_speed_and_logmap_inverts_them(size, stride, groups, dtype):
    manifold, x = make(size, stride, groups, dtype)
    u = tangent(manifold, x)
    y = manifold.expmap(x, u)
    close(manifold.logmap(x, y), u)
    close(manifold.dist(x, y).item(), 1.0)
    half = manifold.expmap(x, u / 2)
    close(manifold.dist(x, half).item(), 0.5)
    close(manifold.dist(half, y).item(), 0.5)
    assert manifold.dist(x, x).item() < 1e-12
    close(manifold.dist(x, y, keepdim=True).flatten()[0], manifold.dist(x, y))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("stride", "groups", "size"), [(1, 1, (3, 3, 3, 4)), (1, 2, (4, 2, 5)), (2, 1, (8, 4, 6))]
)
def test_the_distance_is_that_of_the_dense_matrices(size, stride, groups, dtype):
    """``|log(Q1^H Q2)|``, by scipy, of points that may be far from each other; and it is a distance."""
    manifold, _ = make(size, stride, groups, dtype)
    origin = manifold.origin(*size, dtype=dtype)
    points = [manifold.expmap(origin, 12 * tangent(manifold, origin, seed=i)) for i in range(4)]
    distances = torch.zeros(4, 4, dtype=torch.float64)
    for i, x in enumerate(points):
        for j, y in enumerate(points):
            distances[i, j] = manifold.dist(x, y)
            log = logm((operator(manifold, x).mH @ operator(manifold, y)).numpy())
            close(distances[i, j], torch.tensor(log).abs().square().sum().sqrt(), atol=1e-6, rtol=1e-6)
    close(distances, distances.mT)
    assert distances.diagonal().max() < 1e-11
    assert distances[0, 1] > 1
    for i in range(4):
        assert (distances <= distances[:, i : i + 1] + distances[i : i + 1] + 1e-12).all()


def test_points_of_other_components_are_infinitely_far():
    manifold, x = make((3, 3, 4), 1, 1)
    y = x * -1.0  # determinants at the two real frequencies
    assert manifold.dist(x, y) == torch.inf
    assert manifold.dist(x, y, keepdim=True).shape == (1, 1, 1)
    with pytest.raises(ValueError, match="determinant"):
        manifold.logmap(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        ("RiemannianSGD", "qr"),
        pytest.param("RiemannianSGD", "cayley", marks=pytest.mark.slow),
        pytest.param("RiemannianAdam", "expm", marks=pytest.mark.slow),
        pytest.param("RiemannianAdam", "polar", marks=pytest.mark.slow),
    ],
)
def test_a_thousand_steps_in_single_precision_stay_on_it(optimizer, name):
    size, stride, groups = ((4, 3, 6, 4), (1, 2), 1) if name in ("expm", "qr") else ((4, 4, 4, 4), 1, 1)
    manifold = OrthogonalKernels(size[2:], stride=stride, groups=groups, retraction=name)
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(manifold.random(*size), manifold=manifold)
    start = weight.detach().clone()
    options = {"lr": 1.0, "momentum": 0.5} if optimizer == "RiemannianSGD" else {"lr": 0.05}
    steps = getattr(geoopt.optim, optimizer)([weight], **options)
    draw = torch.Generator().manual_seed(1)
    for _ in range(1000):
        steps.zero_grad()
        (weight * torch.randn(size, generator=draw)).sum().backward()
        steps.step()
    assert weight.dtype == torch.float32
    value = weight.detach().as_subclass(torch.Tensor)
    assert (value - start).norm() > 0.1
    assert defect(operator(manifold, value.double())) < 1e-5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.complex64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("size", "stride"),
    [((3, 3, 4, 4), 1), ((4, 2, 6), 1), pytest.param((2, 2, 6), 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("optimizer", ["RiemannianSGD", "RiemannianAdam"])
def test_a_kernel_is_trained(optimizer, size, stride, dtype):
    """Towards a point that is not far; the closed form is known."""
    manifold = OrthogonalKernels(size[2:], stride=stride)
    torch.manual_seed(0)
    origin = manifold.origin(*size, dtype=dtype)
    u = tangent(manifold, origin.to(torch.promote_types(dtype, torch.float64)), 0.5).to(dtype)
    target = manifold.expmap(origin, u).as_subclass(torch.Tensor)
    weight = geoopt.ManifoldParameter(origin.clone(), manifold=manifold)
    points = manifold._points
    steps = getattr(geoopt.optim, optimizer)(
        [weight], lr=0.3 * points if optimizer == "RiemannianSGD" else 0.02
    )
    for step in range(400):
        if optimizer == "RiemannianAdam":
            steps.param_groups[0]["lr"] = 0.05 * 0.98**step
        steps.zero_grad()
        (weight - target).abs().square().sum().backward()
        steps.step()
    close(weight.detach().as_subclass(torch.Tensor), target, atol=1e-4, rtol=0)


def test_uniform_samples_are_haar_distributed():
    """Moments of traces at a complex and at a real frequency, and both determinants there."""
    manifold, _ = make((3, 3, 4), 1, 1)
    torch.manual_seed(0)
    lattice = Lattice((4,), (1,))
    Q = torch.cat([lattice.spectrum(manifold.random(3, 3, 4, dtype=torch.float64)) for _ in range(4000)])
    for frequency in range(3):
        M = Q[:, frequency]
        trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)
        square = (M @ M).diagonal(dim1=-2, dim2=-1).sum(-1)
        real = frequency != 1
        # E |tr Q|^2 = 1; E tr Q^2 = 1 for orthogonal and 0 for unitary matrices, E |tr Q^2|^2 = 2 (+ 1)
        assert trace.abs().square().mean() == pytest.approx(1, abs=0.08)
        assert square.mean().real == pytest.approx(1 if real else 0, abs=0.1)
        assert square.abs().square().mean() == pytest.approx(3 if real else 2, abs=0.25)
        if real:
            assert (torch.linalg.det(M).real > 0).double().mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((8,), {}, TypeError, "domain should be a tuple"),
        (((8, 0),), {}, ValueError, "domain should be a positive integer"),
        (((8, 8),), {"stride": 3}, ValueError, "divisible by the stride"),
        (
            ((8, 8),),
            {"stride": (1, 1, 1)},
            ValueError,
            "stride should be a positive integer, or one for each",
        ),
        (((8, 8),), {"groups": 0}, ValueError, "groups should be a positive integer"),
        (((8, 8),), {"retraction": "exp"}, ValueError, "retraction should be one of"),
    ],
)
def test_arguments_are_checked(arguments, options, error, message):
    with pytest.raises(error, match=message):
        OrthogonalKernels(*arguments, **options)


def test_shapes_are_checked():
    manifold = OrthogonalKernels((4, 6), groups=2)
    assert "domain=(4, 6)" in repr(manifold)
    for bad in ((4, 2, 4), (4, 2, 4, 5), (3, 2, 4, 6), (2, 3, 2, 4, 6), (0, 4, 2, 4, 6)):
        with pytest.raises(
            ValueError, match=r"have shape \(\.\.\., out, in/groups, 4, 6\) with out divisible by 2"
        ):
            manifold.random(*bad)
        with pytest.raises(ValueError, match="should have shape"):
            geoopt.ManifoldParameter(torch.zeros(bad), manifold=manifold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_the_distance_has_the_gradient_of_a_distance(size, stride, groups, dtype):
    """``grad dist2 = -2 log``, of length ``2 dist``, at both ends."""
    manifold, x = make(size, stride, groups, dtype)
    x = x.as_subclass(torch.Tensor)
    y = manifold.expmap(x, tangent(manifold, x, 0.7))
    for first, second in ((x, y), (y, x)):
        point = first.clone().requires_grad_()
        for arguments in ((point, second), (second, point)):
            (e,) = torch.autograd.grad(manifold.dist2(*arguments), point)
            close(manifold.egrad2rgrad(first, e), -2 * manifold.logmap(first, second))
            (e,) = torch.autograd.grad(manifold.dist(*arguments), point)
            close(manifold.norm(first, manifold.egrad2rgrad(first, e)).item(), 1.0)
    point = x.clone().requires_grad_()
    assert not torch.autograd.grad(manifold.dist(point, x), point)[0].isnan().any()


def test_distances_on_a_sphere_are_angles():
    """A frame of one column on a domain of one point: the metric is twice the sphere's."""
    manifold = OrthogonalKernels((1,))
    for seed in range(40):
        x, y = (torch.nn.functional.normalize(random(4, seed=2 * seed + i), dim=0) for i in (0, 1))
        angle = torch.arccos(x @ y)
        close(manifold.dist(x.view(4, 1, 1), y.view(4, 1, 1)), 2**0.5 * angle)


def test_vectors_are_checked():
    manifold, x = make((3, 3, 4), 1, 1)
    zero = torch.zeros(3, 3, 4)
    for bad in (torch.zeros(3, 3, 5).double(), zero, zero.to(torch.complex128)):
        for method in (manifold.proju, manifold.retr, manifold.logmap):
            with pytest.raises(ValueError, match="points and vectors should be alike"):
                method(x, bad)
    half = x.bfloat16()
    assert manifold.check_point_on_manifold(half)
    assert manifold.dist(half, half).dtype == torch.bfloat16


# Batches


def plain(x):
    return x.as_subclass(torch.Tensor)


def make_batch(size, stride, groups, dtype, batch=(2, 3), **options):
    """Points, tangent vectors there, and points at distance 1."""
    manifold, _ = make(size, stride, groups, dtype, **options)
    x = manifold.random(*batch, *size, dtype=dtype)
    u, v = (manifold.proju(x, random(*x.shape, dtype=dtype, seed=seed)) for seed in (1, 2))
    u = u / manifold.norm(x, u, keepdim=True)
    return manifold, plain(x), u, v, manifold.expmap(x, u)


def loop(method, *batches):
    """A method on each of the kernels."""
    d = batches[0].ndim - 2
    results = [method(*kernels) for kernels in zip(*(b.flatten(0, 1) for b in batches), strict=True)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(r).unflatten(0, (2, 3)) for r in zip(*results, strict=True))
    assert results[0].ndim in (0, d)
    return torch.stack(results).unflatten(0, (2, 3))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_a_batch_is_treated_kernel_by_kernel(size, stride, groups, dtype):
    manifold, x, u, v, y = make_batch(size, stride, groups, dtype, retraction="cayley")
    e = random(*x.shape, dtype=dtype, seed=3)
    assert x.shape == (2, 3, *size)
    assert manifold.check_point_on_manifold(x)
    assert all(defect(operator(manifold, point)) < 1e-12 for point in x.flatten(0, 1))
    assert not torch.equal(x[0, 0], x[1, 2])
    origin = manifold.origin(2, 3, *size, dtype=dtype)
    close(plain(origin[1, 2]), plain(manifold.origin(*size, dtype=dtype)))
    close(manifold.projx(e), loop(manifold.projx, e))
    for method, arguments in [
        ("proju", (x, e)),
        ("egrad2rgrad", (x, e)),
        ("inner", (x, u)),
        ("inner", (x, u, v)),
        ("norm", (x, v)),
        ("transp", (x, y, v)),
        ("retr", (x, u)),
        ("expmap", (x, u)),
        ("logmap", (x, y)),
        ("dist", (x, y)),
        ("dist2", (x, y)),
        ("retr_transp", (x, u, v)),
        ("expmap_transp", (x, u, v)),
        ("transp_follow_retr", (x, u, v)),
        ("transp_follow_expmap", (x, u, v)),
        ("component_inner", (x, u, v)),
    ]:
        close(getattr(manifold, method)(*arguments), loop(getattr(manifold, method), *arguments))
    for method, arguments in [("inner", (x, u, v)), ("norm", (x, v)), ("dist", (x, y)), ("dist2", (x, y))]:
        kept = getattr(manifold, method)(*arguments, keepdim=True)
        assert kept.shape == (2, 3, *(1,) * len(size))
        close(kept.flatten(1), getattr(manifold, method)(*arguments))
    close(manifold.dist(x, y), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(("size", "stride", "groups"), [CASES[0], CASES[2], CASES[4], CASES[5]])
def test_batches_broadcast(size, stride, groups):
    manifold, x, u, v, _ = make_batch(size, stride, groups, torch.float64)
    first, second = x[:, :1], x[0, 0]
    expanded, repeated = first.expand(x.shape), second.expand(x.shape)
    close(manifold.proju(first, u), manifold.proju(expanded, u))
    close(manifold.proju(x, u[0]), manifold.proju(x, u[0].expand(x.shape)))
    close(manifold.inner(second, u, v[:, :1]), manifold.inner(repeated, u, v[:, :1].expand(x.shape)))
    close(manifold.retr(second, u), manifold.retr(repeated, u))
    close(manifold.transp(x, second, v[0, 0]), manifold.transp(x, repeated, v[0, 0].expand(x.shape)))
    near = manifold.expmap(second, 0.1 * u)
    close(manifold.logmap(second, near), manifold.logmap(repeated, near))
    close(manifold.dist(near, second), manifold.dist(near, repeated))
    assert manifold.dist(near, second, keepdim=True).shape == (2, 3, *(1,) * len(size))
    close(manifold.retr_transp(x, u[0], v[0, 0])[1].shape, x.shape)
    point = second.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(manifold.dist2(point, near).sum(), point)
    logs = manifold.logmap(repeated, near)
    close(manifold.egrad2rgrad(second, gradient), -2 * logs.sum((0, 1)))
    with pytest.raises(RuntimeError, match="size of tensor"):
        manifold.proju(x, u[:, :2])


@pytest.mark.parametrize("size", [(4, 4, 5), (4, 2, 5), (2, 4, 5)])
def test_one_bad_kernel_of_a_batch_is_found(size):
    manifold, x, u, *_ = make_batch(size, 1, 1, torch.float64)
    assert manifold.check_vector_on_tangent(x, u)
    bad = x.clone()
    bad[1, 2] *= 1.001
    assert not manifold.check_point_on_manifold(bad)
    bad = 1e6 * u
    bad[0, 1] = 0.1 * x[0, 1]
    assert not manifold.check_vector_on_tangent(x, bad, atol=1e-5, rtol=1e-5)


def test_some_pairs_of_a_batch_are_infinitely_far():
    """Of a batch only those which no geodesic connects; and they have no gradient."""
    manifold, x, u, _, y = make_batch((3, 3, 4), 1, 1, torch.float64)
    y[0, 1] *= -1
    infinite = torch.zeros(2, 3, dtype=torch.bool)
    infinite[0, 1] = True
    assert torch.equal(manifold.dist(x, y) == torch.inf, infinite)
    assert manifold.dist2(x, y, keepdim=True).shape == (2, 3, 1, 1, 1)
    close(manifold.dist(x, y)[~infinite], torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="determinant"):
        manifold.logmap(x, y)
    for method in (manifold.dist, manifold.dist2):
        point = x.clone().requires_grad_()
        (e,) = torch.autograd.grad(method(point, y).sum(), point)
        expected = (1 if method == manifold.dist else 2) * -u
        close(manifold.egrad2rgrad(x, e)[~infinite], expected[~infinite])
        assert not e[infinite].any()


@pytest.mark.parametrize("optimizer", ["RiemannianSGD", "RiemannianAdam"])
@pytest.mark.parametrize(
    ("size", "stride", "groups", "dtype"),
    [
        ((4, 4, 5), 1, 1, torch.float64),
        ((2, 5, 4), 1, 1, torch.float64),
        ((8, 2, 4, 6), (1, 2), 2, torch.complex128),
    ],
)
def test_optimizers_move_a_batch_kernel_by_kernel(size, stride, groups, dtype, optimizer):
    manifold, x, *_ = make_batch(size, stride, groups, dtype)
    together = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
    each = [geoopt.ManifoldParameter(point.clone(), manifold=manifold) for point in x.flatten(0, 1)]
    target = random(*x.shape, dtype=dtype, seed=8)
    options = {"lr": 5.0, "momentum": 0.5} if optimizer == "RiemannianSGD" else {"lr": 0.3}
    for parameters in ([together], each):
        steps = getattr(geoopt.optim, optimizer)(parameters, **options)
        for _ in range(5):
            steps.zero_grad()
            weight = together if parameters == [together] else torch.stack(each).view(x.shape)
            (plain(weight) - target).abs().square().sum().backward()
            steps.step()
    close(together.detach(), torch.stack([plain(w.detach()) for w in each]).view(x.shape))
    assert manifold.check_point_on_manifold(together)
    assert (plain(together.detach()) - x).norm() > 0.1


def test_products():
    """Of kernels, square and frames, with a sphere; a batch of points."""
    square, frames, sphere = OrthogonalKernels((5,)), OrthogonalKernels((4, 2)), geoopt.Sphere()
    product = geoopt.ProductManifold((square, (3, 3, 5)), (frames, (2, 3, 4, 2)), (sphere, 3))
    torch.manual_seed(0)
    x, y = (product.random(4, product.n_elements, dtype=torch.float64) for _ in range(2))
    u = product.proju(x, random(*x.shape))
    assert product.check_point_on_manifold(x)
    assert product.check_vector_on_tangent(x, u)
    close(plain(product.projx(x)), plain(x))
    points, vectors = product.unpack_tensor(plain(x)), product.unpack_tensor(u)
    parts = list(zip((square, frames, sphere), points, vectors, strict=True))
    close(product.inner(x, u), sum(manifold.inner(point, vector) for manifold, point, vector in parts))
    moved = [manifold.retr(point, vector).flatten(1) for manifold, point, vector in parts]
    close(product.retr(x, u), torch.cat(moved, 1))
    assert product.component_inner(x, u).shape == x.shape
    weight = geoopt.ManifoldParameter(x.clone(), manifold=product)
    steps = geoopt.optim.RiemannianAdam([weight], lr=0.1)
    for _ in range(3):
        steps.zero_grad()
        (plain(weight) - plain(y)).square().sum().backward()
        steps.step()
    assert product.check_point_on_manifold(weight)
    kernels = geoopt.ProductManifold((square, (3, 3, 5)), (frames, (2, 3, 4, 2)))
    assert kernels.reversible
    assert not product.reversible
    scaled = geoopt.Scaled(square, 2.0)
    assert scaled.reversible
    point, vector = points[0], vectors[0]
    close(scaled.dist(point, point.roll(1, -1)), 2 * square.dist(point, point.roll(1, -1)))
    close(scaled.retr_transp(point, vector, vector)[0], square.retr(point, vector / 2))


# Steps back, and samplers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_a_step_back_undoes_a_step(size, stride, groups, name, dtype):
    """As geoopt's own test of reversible manifolds, where the retraction says that it is."""
    manifold, x, *_ = make_batch(size, stride, groups, dtype, retraction=name)
    u = manifold.proju(x, random(*x.shape, dtype=dtype, seed=1) / 3)
    y, v = manifold.retr_transp(x, u, u)
    back, w = manifold.retr_transp(y, -v, v)
    error = max((back - x).abs().max(), (w - u).abs().max())
    rows, columns = manifold._blocks(x)
    assert manifold.reversible == (name != "qr")
    if manifold.reversible:
        assert error < 1e-12
    elif max(rows, columns) > 1:
        assert error > 1e-4


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize(("size", "stride", "groups"), CASES)
def test_vectors_that_follow_a_step_keep_their_lengths_and_angles(size, stride, groups, name, dtype):
    manifold, x, u, v, _ = make_batch(size, stride, groups, dtype, retraction=name)
    rows, columns = manifold._blocks(x)
    for both, retraction in (
        (manifold.retr_transp, manifold.retr),
        (manifold.expmap_transp, manifold.expmap),
    ):
        y, moved = both(x, 3 * u, v)
        close(y, retraction(x, 3 * u))
        assert manifold.check_vector_on_tangent(y, moved, atol=1e-12, rtol=1e-12)
        close(manifold.inner(y, moved, both(x, 3 * u, u)[1]), manifold.inner(x, v, u))
        if rows == columns:
            close(moved, manifold.transp(x, y, v))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "epsilon", "size", "retraction"),
    [
        ("RHMC", 4.0, (3, 3, 4), "expm"),
        ("RHMC", 4.0, (3, 3, 4), "cayley"),
        ("RHMC", 4.0, (3, 3, 4), "polar"),
        ("RHMC", 4.0, (3, 2, 4), "expm"),
        ("RHMC", 4.0, (2, 3, 4), "cayley"),
        ("RSGLD", 8.0, (3, 3, 4), "expm"),
        ("RSGLD", 8.0, (3, 2, 4), "cayley"),
        ("SGRHMC", 0.5, (3, 3, 4), "cayley"),
        ("SGRHMC", 0.5, (2, 3, 4), "expm"),
    ],
)
def test_samplers_draw_uniformly(name, epsilon, size, retraction):
    """Many chains at once, which start at the identity; moments of the entries of the matrices."""
    manifold = OrthogonalKernels(size[2:], retraction=retraction)
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(manifold.origin(3000, *size, dtype=torch.float64), manifold=manifold)
    sampler = getattr(geoopt.samplers, name)([weight], epsilon=epsilon)
    sampler.burnin = False
    for _ in range(20):
        sampler.step(lambda: 0 * weight.sum())
    assert manifold.check_point_on_manifold(weight)
    assert sampler.rejection_rate == 0
    w = plain(weight.detach())
    assert w.mean(0).abs().max() < 0.04
    second = w.square().sum(-1).mean(0)  # over the taps, or the frequencies: Parseval
    close(second, torch.full_like(second, 1 / max(size[:2])), atol=0.02, rtol=0)
    # products of different entries
    assert (w[:, 0, 0] * w[:, 1, 1]).sum(-1).mean().abs() < 0.04


def test_langevin_draws_angles_as_von_mises():
    """One channel on three points: at the complex frequency one angle, of density ``exp(2 k cos)``."""
    kernels, points, k = OrthogonalKernels((3,)), 3, 0.7
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(kernels.random(4000, 1, 1, 3, dtype=torch.float64), manifold=kernels)
    sampler = geoopt.samplers.RSGLD([weight], epsilon=0.03 * points**2)
    for _ in range(300):
        sampler.step(lambda: k * points * weight[..., 1].sum() / points)  # the trace is points * weight[1]
    cosine = plain(weight.detach()) @ torch.tensor([-0.5, 1.0, -0.5]).double()
    assert cosine.mean() == pytest.approx(iv(1, 2 * k) / iv(0, 2 * k), abs=0.03)


@pytest.mark.slow
def test_hamiltonian_steps_draw_angles_as_von_mises():
    """A rotation of the plane, on one point."""
    kernels, k = OrthogonalKernels((1,)), 1.4
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # geoopt draws from it
    weight = geoopt.ManifoldParameter(kernels.origin(2, 2, 1, dtype=torch.float64), manifold=kernels)
    sampler = geoopt.samplers.RHMC([weight], epsilon=0.2, n_steps=8)
    cosines = []
    for _ in range(800):
        sampler.step(lambda: k * weight[0, 0, 0])
        cosines.append(weight[0, 0, 0].item())
    # geoopt begins with a whole step of the momentum, not a half one, which adds 0.02
    assert np.mean(cosines) == pytest.approx(iv(1, k) / iv(0, k), abs=0.08)


def test_samplers_refuse_what_they_cannot_undo():
    kernels = OrthogonalKernels((4,), retraction="qr")
    weight = geoopt.ManifoldParameter(kernels.origin(2, 2, 4), manifold=kernels)
    with pytest.raises(ValueError, match="reversible"):
        geoopt.samplers.RHMC([weight])
