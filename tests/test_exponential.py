import numpy as np
import pytest
import torch
from oracles import random, skew
from scipy.linalg import expm, expm_frechet
from torch.autograd import gradcheck, gradgradcheck

from orthoconv_param import expm_skew, runtime
from orthoconv_param.matrices import expm as expm_module
from orthoconv_param.matrices.expm import expm_frame, exponential
from orthoconv_param.matrices.norms import norm_bound
from orthoconv_param.matrices.polynomials import POLYNOMIALS, evaluate
from orthoconv_param.matrices.products import product
from orthoconv_param.matrices.unitary import (
    haar,
    log_unitary,
    polar,
    polar_decomposition,
    polar_frame,
    refine,
    semi_orthogonal,
)

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
NORMS = [0.0, 1e-12, 0.1, 1.0, 10.0, 1e3]


def skew_of_norm(norm, n, dtype, batch=(3,), seed=0):
    A = skew(random(*batch, n, n, dtype=dtype, seed=seed))
    size = torch.linalg.matrix_norm(A, 2).amax()
    return A * (norm / size if size > 0 else 0)


@pytest.fixture(params=["read", "fixed"])
def schedule(request, monkeypatch):
    """How many squarings: read from the norm, or the fixed schedule of devices that are not waited for."""
    if request.param == "fixed":
        monkeypatch.setattr(runtime, "may_wait", lambda device: False)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_unitarity(dtype, n, norm):
    A = skew_of_norm(norm, n, dtype)
    Q = expm_skew(A)
    assert Q.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (Q.mH @ Q - torch.eye(n, dtype=dtype)).abs().max() <= 10 * n * eps
    exact = np.stack([expm(a.to(torch.complex128).numpy()) for a in A])
    # the exponential's condition number is the norm; scipy's own rounding is in double precision
    tolerance = 10 * n**0.5 * (eps * max(norm, 1) + 2e-15 * max(norm, 10))
    assert np.abs(Q.numpy() - exact).max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_polynomial_is_the_exponential_on_its_interval(dtype):
    polynomial = POLYNOMIALS[torch.empty(0, dtype=dtype).real.dtype]
    x = np.linspace(-polynomial.radius, polynomial.radius, 1001)
    z = torch.from_numpy(1j * x).reshape(-1, 1, 1)
    values = evaluate(z, z @ z, polynomial).flatten().numpy()
    assert np.abs(values - np.exp(1j * x)).max() < 2 * torch.finfo(dtype).eps


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("norm", [0.0, 1e-12, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_the_frechet_derivative(dtype, n, norm):
    A = skew_of_norm(norm, n, dtype, batch=()).requires_grad_()
    G = random(n, n, dtype=dtype, seed=1)
    (gradient,) = torch.autograd.grad(expm_skew(A), A, G)
    # <G, L(A)[E]> = <L(A^H)[G], E>, and only the skew part of E is seen
    wide = [x.detach().to(torch.complex128).numpy() for x in (A, G)]
    exact = expm_frechet(wide[0].conj().T, wide[1], compute_expm=False)
    exact = (exact - exact.conj().T) / 2
    eps = torch.finfo(dtype).eps
    tolerance = 100 * eps * max(norm, 1) * np.abs(wide[1]).max()
    assert np.abs(gradient.numpy() - exact).max() <= tolerance


REPEATED = torch.diag_embed(torch.tensor([[1.0, 1.0, -2.0], [0.5, 0.5, 0.5]], dtype=torch.float64)) * 1j
REAL = [skew_of_norm(norm, 3, torch.float64, batch=(2,)) for norm in (0.0, 1e-12, 1.0, 9.0)]
COMPLEX = [skew_of_norm(norm, 3, torch.complex128, batch=(1,)) for norm in (0.0, 1.0)] + [REPEATED]
SMALL = [random(2, n, n, dtype=dtype) for n in (1, 2) for dtype in (torch.float64, torch.complex128)]


LATER = [pytest.param(A, marks=pytest.mark.slow) for A in (REAL[1], COMPLEX[0], *COMPLEX[2:], *SMALL[:2])]


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("A", [REAL[0], *REAL[2:], *COMPLEX[1:2], *SMALL[2:], *LATER])
def test_derivatives_of_first_and_second_order(A):
    A = A.clone().requires_grad_()
    assert gradcheck(
        expm_skew, A, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(expm_skew, A, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_func_transforms_agree_with_autograd():
    weights = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)

    def f(A):
        return (expm_skew(A) ** 2 * weights).sum()

    A = random(4, 3, 3)
    one_by_one = torch.stack([torch.autograd.functional.jacobian(f, a) for a in A])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(A), one_by_one)
    torch.testing.assert_close(torch.func.vmap(expm_skew, in_dims=2)(A.permute(1, 2, 0)), expm_skew(A))
    hessian = torch.autograd.functional.hessian(f, A[0])
    torch.testing.assert_close(torch.func.hessian(f)(A[0]), hessian)
    jacobian = torch.func.jacrev(expm_skew)(A[0])
    torch.testing.assert_close(torch.func.jacfwd(expm_skew)(A[0]), jacobian)


def test_only_the_skew_part_is_read():
    X = random(2, 4, 4, dtype=torch.complex128)
    torch.testing.assert_close(expm_skew(X), expm_skew(skew(X)))


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 0, 0), (2, 0, 3, 3), (3, 3), (2, 1, 3, 4, 4)])
def test_any_batch_shape(shape):
    A = random(*shape).requires_grad_()
    Q = expm_skew(A)
    assert Q.shape == shape
    Q.sum().backward()
    assert A.grad.shape == shape


def test_batches_are_split_without_a_trace():
    A = skew_of_norm(5.0, 8, torch.complex64, batch=(3001,)).requires_grad_()
    Q = expm_skew(A)
    G = random(*Q.shape, dtype=A.dtype, seed=1)
    (gradient,) = torch.autograd.grad(Q, A, G)
    B = A.detach()[-5:].requires_grad_()
    torch.testing.assert_close(expm_skew(B), Q[-5:])
    torch.testing.assert_close(torch.autograd.grad(expm_skew(B), B, G[-5:])[0], gradient[-5:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    A = skew_of_norm(3.0, 4, torch.float32).to(dtype)
    assert torch.equal(expm_skew(A), expm_skew(A.float()).to(dtype))


@pytest.mark.usefixtures("schedule")
def test_what_is_not_finite_stays_visible():
    A = torch.full((2, 3, 3), torch.nan)
    assert expm_skew(A).isnan().all()
    A = torch.zeros(2, 3, 3)
    A[1, 0, 1] = torch.inf
    assert expm_skew(A)[1].isnan().any()


@pytest.mark.parametrize("norm", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unitarity_holds_where_values_have_no_digits_left(dtype, norm):
    Q = expm_skew(skew_of_norm(norm, 5, dtype))
    assert (Q.mH @ Q - torch.eye(5, dtype=dtype)).abs().max() <= 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("norm", [1.0, 1e3, 1e8])
def test_large_matrices(norm):
    A = skew_of_norm(norm, 300, torch.float32, batch=(2,)).requires_grad_()
    with_bad = torch.cat([A, A.detach()[:1] * torch.nan])
    Q = expm_skew(with_bad)
    assert (Q[:2].mH @ Q[:2] - torch.eye(300)).abs().max() <= 300 * torch.finfo(torch.float32).eps
    assert Q[2].isnan().all()
    if norm == 1.0:
        G = random(2, 300, 300, dtype=torch.float32, seed=1)
        (gradient,) = torch.autograd.grad(Q[:2], A, G)
        exact = [
            expm_frechet(-a, g, compute_expm=False) for a, g in zip(A.detach().double(), G, strict=True)
        ]
        exact = torch.stack([skew(torch.as_tensor(x)) for x in exact])
        torch.testing.assert_close(gradient.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_norm_beyond_the_fixed_schedule_is_nan(monkeypatch):
    monkeypatch.setattr(runtime, "may_wait", lambda device: False)
    assert expm_skew(skew_of_norm(1e6, 3, torch.float64)).isnan().all()


@pytest.mark.parametrize(
    ("A", "error"),
    [
        (torch.ones(3, 3, dtype=torch.int64), TypeError),
        (torch.ones(3, 3).to(torch.float8_e4m3fn), TypeError),
        ([[0.0]], TypeError),
        (torch.ones(3, 4), ValueError),
        (torch.ones(3), ValueError),
    ],
)
def test_bad_input_is_named(A, error):
    with pytest.raises(error, match="A should be"):
        expm_skew(A)


def test_operator_is_well_formed():
    A = skew_of_norm(3.0, 4, torch.complex128).requires_grad_()
    torch.library.opcheck(torch.ops.orthoconv_param.expm_skew, (A,))
    torch.library.opcheck(torch.ops.orthoconv_param.expm_skew_vjp, (A.detach(), A.detach() * 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_compiles_without_a_graph_break(dtype):
    A = (5 * random(5, 4, 4, dtype=dtype)).requires_grad_()
    G = random(5, 4, 4, dtype=dtype, seed=1)
    compiled = torch.compile(expm_skew, fullgraph=True, backend="aot_eager")
    Q = compiled(A)
    torch.testing.assert_close(Q, expm_skew(A))
    torch.testing.assert_close(torch.autograd.grad(Q, A, G)[0], torch.autograd.grad(expm_skew(A), A, G)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_bound_is_one_and_is_close(dtype):
    A = skew_of_norm(2.0, 32, dtype)
    exact = torch.linalg.matrix_norm(A, 2)
    bound = norm_bound(A)
    assert (bound >= exact * (1 - 1e-6)).all()
    assert (bound <= 1.1 * exact).all()


def special_unitary(angles, dtype, seed=0):
    """A unitary matrix with these angles; a real one has them in pairs."""
    n = len(angles)
    if dtype.is_complex:
        V = torch.linalg.qr(random(n, n, dtype=dtype, seed=seed)).Q
        return (V * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))) @ V.mH
    V = torch.linalg.qr(random(2 * n, 2 * n, dtype=dtype, seed=seed)).Q
    A = torch.zeros(2 * n, 2 * n, dtype=dtype)
    for i, angle in enumerate(angles):
        A[2 * i, 2 * i + 1], A[2 * i + 1, 2 * i] = angle, -angle
    return V @ torch.from_numpy(expm(A.numpy())) @ V.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    "angles",
    [
        (0.0, 0.0),
        (0.3, -1.2, 2.0),
        (3.1, -3.1),
        (3.14159, 3.0, 0.1),
        (np.pi, 0.5, 0.0),
        (np.pi, np.pi, -np.pi),
        (np.pi - 1e-9, 1.0),
        (np.pi - 1e-5, -(np.pi - 1e-5), np.pi, 2.2),
    ],
)
def test_logarithm_inverts_the_exponential_up_to_pi(angles, dtype):
    Q = torch.stack([special_unitary(angles, dtype, seed) for seed in range(3)])
    L = log_unitary(Q)
    assert L.dtype == dtype
    torch.testing.assert_close(L, -L.mH)
    assert torch.linalg.matrix_norm(L, 2).max() <= np.pi + 1e-7
    torch.testing.assert_close(torch.linalg.matrix_exp(L), Q, atol=1e-7, rtol=0)


def test_a_real_matrix_of_determinant_minus_one_has_no_logarithm():
    with pytest.raises(ValueError, match="determinant -1"):
        log_unitary(torch.diag(torch.tensor([1.0, -1.0, 1.0])))


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_polar_frame_completes_the_polar_factor(shape):
    X = random(2, *shape, dtype=torch.complex128)
    frame = polar_frame(X)
    eye = torch.eye(max(shape), dtype=X.dtype)
    torch.testing.assert_close(frame.mH @ frame, eye.expand_as(frame))
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(frame[..., : shape[0], : shape[1]], U @ Vh)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_refine_adds_precision_and_nothing_to_the_derivative(shape):
    Q = polar_frame(random(*shape, dtype=torch.complex128))[: shape[0], : shape[1]].to(torch.complex64)
    Q.requires_grad_()
    R = refine(Q)
    gram = R.mH @ R if shape[0] >= shape[1] else R @ R.mH
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=R.dtype), atol=1e-12, rtol=0)
    assert (R - Q).abs().max() < 1e-6
    G = random(*shape, dtype=torch.complex128, seed=1)
    assert torch.equal(torch.autograd.grad(R, Q, G)[0], G.to(Q.dtype))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_spoils_no_other(bad):
    A = random(3, 4, 4).requires_grad_()
    alone = expm_skew(A.detach()[1:])
    with torch.no_grad():
        A[0, 0, 1] = bad
    Q = expm_skew(A)
    assert Q[0].isnan().any()
    torch.testing.assert_close(Q[1:], alone)
    (gradient,) = torch.autograd.grad(Q[1:].sum(), A)
    assert gradient[1:].isfinite().all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("size", [(5, 1), pytest.param((6, 2), marks=pytest.mark.slow), (2, 4)])
def test_narrow_frames_are_columns_of_the_exponential(size, dtype, monkeypatch):
    monkeypatch.setattr(expm_module, "_NARROW", 2)  # so that small ones are made so too
    rows, columns = size
    m = max(size)
    X = random(3, *size, dtype=dtype)
    X[1, min(size) :, min(size) :] = 0
    X[1] *= torch.arange(columns) == 0  # of rank 1
    X[2] = 0
    full = torch.zeros(3, m, m, dtype=dtype)
    full[:, :rows, :columns] = X
    torch.testing.assert_close(expm_frame(X), expm_skew(full)[:, :rows, :columns])
    torch.testing.assert_close(expm_frame(30 * X), expm_skew(30 * full)[:, :rows, :columns])
    X.requires_grad_()
    assert gradcheck(expm_frame, X, check_forward_ad=True)
    assert gradgradcheck(expm_frame, X[:2].detach().requires_grad_())
    torch.testing.assert_close(torch.func.vmap(expm_frame)(X), expm_frame(X))


def test_narrow_frames_in_single_precision():
    X = random(4, 64, 3, dtype=torch.complex64)
    Q = expm_frame(X).to(torch.complex128)
    assert (torch.linalg.svdvals(Q) - 1).abs().max() < 2 * torch.finfo(torch.float32).eps


# Results may be changed in place


def doubled(function, *arguments, **options):
    result = function(*arguments, **options)
    result.mul_(2)
    return result


BATCHES = [(), (1,), (3,), (2, 1), (1, 1, 1)]


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
def test_the_exponential_may_be_changed_in_place(dtype, batch, n):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    A = (0.3 * random(*batch, n, n, dtype=wide)).to(dtype).requires_grad_()
    Q = expm_skew(A)
    assert not Q._is_view()
    expected = 2 * Q
    (gradient,) = torch.autograd.grad(expected.abs().sum(), A)
    Q = doubled(expm_skew, A)
    assert torch.equal(Q, expected)
    torch.testing.assert_close(torch.autograd.grad(Q.abs().sum(), A)[0], gradient)
    with torch.no_grad():
        assert torch.equal(doubled(expm_skew, A), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_what_was_changed_in_place(dtype, n):
    A = random(1, n, n, dtype=dtype).requires_grad_()
    assert gradcheck(lambda A: doubled(expm_skew, A), A, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda A: doubled(expm_skew, A), A)
    (gradient,) = torch.autograd.grad(expm_skew(A).abs().sum(), A, create_graph=True)
    assert not gradient._is_view()
    gradient.mul_(2)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_transforms_of_what_is_changed_in_place(dtype, n):
    A = random(4, n, n, dtype=dtype).requires_grad_()
    torch.testing.assert_close(torch.func.vmap(lambda A: doubled(expm_skew, A))(A), 2 * expm_skew(A))
    torch.testing.assert_close(doubled(torch.func.vmap(expm_skew), A), 2 * expm_skew(A))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda A: doubled(expm_skew, A).abs().sum()))(A),
        torch.autograd.grad(2 * expm_skew(A).abs().sum(), A)[0],
    )
    compiled = torch.compile(lambda A: doubled(expm_skew, A), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A), 2 * expm_skew(A))
    torch.testing.assert_close(doubled(compiled, A), 4 * expm_skew(A))


@pytest.mark.parametrize("size", [(3, 3), (6, 3), (3, 6), (16, 1), (1, 16), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_frames_may_be_changed_in_place(dtype, size):
    X = random(1, *size, dtype=dtype).requires_grad_()
    expected = 2 * expm_frame(X)
    (gradient,) = torch.autograd.grad(expected.abs().sum(), X)
    frame = doubled(expm_frame, X)
    torch.testing.assert_close(frame, expected)
    torch.testing.assert_close(torch.autograd.grad(frame.abs().sum(), X)[0], gradient)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 3), (3, 3)),
        ((1, 3, 3), (1, 3, 3)),
        ((2, 1, 3, 2), (5, 2, 3)),
        ((3, 3), (4, 3, 3)),
        ((1, 3), (4, 3, 1)),  # torch's own product is a view
        ((1, 1), (2, 4, 1, 1)),
        ((4, 3, 3), (3, 3)),
        ((0, 3, 3), (0, 3, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_products_may_be_changed_in_place(dtype, left, right):
    A = random(*left, dtype=dtype).requires_grad_()
    B = random(*right, dtype=dtype, seed=1).requires_grad_()
    if dtype.is_complex:
        assert not product(A, B)._is_view()
    expected = 2 * (A @ B)
    C = doubled(product, A, B)
    torch.testing.assert_close(C, expected)
    weights = random(*C.shape, dtype=dtype, seed=2)
    for one, other in zip(
        torch.autograd.grad(C, (A, B), weights), torch.autograd.grad(expected, (A, B), weights), strict=True
    ):
        torch.testing.assert_close(one, other)
    for dims in ((0, None), (None, 0), (0, 0)):
        a, b = (x if d is None else torch.stack([x, 3 * x]) for x, d in zip((A, B), dims, strict=True))
        mapped = torch.func.vmap(lambda a, b: doubled(product, a, b), dims)(a, b)
        torch.testing.assert_close(mapped[0], expected)
        doubled(torch.func.vmap(product, dims), a, b)


@pytest.mark.parametrize("name", ["expm_skew", "expm_skew_vjp"])
@pytest.mark.parametrize("shape", [(3, 3), (1, 2, 2), (1, 3, 3), (2, 1, 4, 4), (0, 3, 3)])
def test_operators_return_no_views(name, shape):
    A = random(*shape, dtype=torch.complex128)
    for known in (None, 100.0):
        arguments = (A, known) if name == "expm_skew" else (A, A, known)
        assert not getattr(torch.ops.orthoconv_param, name)(*arguments)._is_view()


def test_schemas_of_the_operators():
    operators = torch.ops.orthoconv_param
    assert [str(f.default._schema) for f in (operators.expm_skew, operators.expm_skew_vjp)] == [
        "orthoconv_param::expm_skew(Tensor A, float? norm=None) -> Tensor",
        "orthoconv_param::expm_skew_vjp(Tensor A, Tensor G, float? norm=None) -> Tensor",
    ]


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_have_a_closed_form_need_none(dtype, n):
    A = 0.3 * random(2, n, n, dtype=dtype)
    torch.testing.assert_close(exponential(A), expm_skew(A))
    assert (norm_bound(skew(A)) >= torch.linalg.matrix_norm(skew(A), 2) * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_known_bound_is_used(dtype):
    A = skew_of_norm(3.0, 5, dtype)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(exponential(A, 3.0), expm_skew(A), atol=tolerance, rtol=0)
    torch.testing.assert_close(exponential(A, 50.0), expm_skew(A), atol=tolerance, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("A", [torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.complex64)])
def test_a_bad_matrix_of_size_1_stays_visible(A, bad):
    assert expm_skew(A + bad).isnan().all()


# Unitary matrices


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (2, 1, 5, 2)])
def test_polar_is_the_nearest_of_orthonormal_columns(shape):
    X = random(*shape, dtype=torch.complex128)
    before = X.clone()
    Q = polar(X)
    assert torch.equal(X, before)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(Q, U @ Vh)
    assert semi_orthogonal(Q, 1e-12)
    assert not semi_orthogonal(1.001 * Q, 1e-4)
    assert not semi_orthogonal(X * torch.nan, 1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 4), (6, 3), (3, 6)])
def test_polar_decomposition_is_one(shape):
    X = random(*shape, dtype=torch.complex128)
    rows, columns = shape[-2:]
    frame, V, S = polar_decomposition(X.clone())
    P, Q = (V * S.unsqueeze(-2)) @ V.mH, frame[..., :rows, :columns]
    torch.testing.assert_close(Q @ P if rows >= columns else P @ Q, X)
    assert (S.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_haar_is_unitary_and_its_mean_is_zero(dtype):
    torch.manual_seed(0)
    Q = haar(torch.empty(4000, 3, 3, dtype=dtype))
    assert Q.dtype == dtype
    assert semi_orthogonal(Q, 1e-12)
    assert Q.mean(0).abs().max() < 0.05
    # E |tr Q|^2 = 1 on both groups; with torch's own signs of R it is not
    trace = Q.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(trace.abs().square().mean() - 1) < 0.1


def test_refine_leaves_its_argument_as_it_is():
    Q = polar(random(4, 3, dtype=torch.complex128)).to(torch.complex64).to(torch.complex128)
    before = Q.clone()
    assert not torch.equal(refine(Q), before)
    assert torch.equal(Q, before)
