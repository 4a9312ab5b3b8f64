r"""The exponential of skew-Hermitian matrices, its derivative, and its inverse.

With ``A = (X - X^H) / 2`` the result ``Q = exp(A)`` is unitary. It is computed by scaling and squaring a
polynomial in few products: of degree 8 in three (Bader, Blanes, Casas, *Computing the matrix
exponential with an optimized Taylor polynomial approximation*, Mathematics 7 (2019) 1174), in double
precision of degree 16 in four (Sastre, *Efficient evaluation of matrix polynomials*, Linear Algebra Appl.
539 (2018) 229). Its coefficients are not Taylor's, but those of the Chebyshev series of the exponential on
an interval of the imaginary axis, where the spectrum lies.

The derivative is that of these steps: a squaring ``Q_{j+1} = Q_j^2`` takes a gradient ``G_{j+1}`` to
``G_{j+1} Q_j^H + Q_j^H G_{j+1}``, and the polynomial is differentiated product by product. In closed
form, with ``M = skew(Q^H G)``, it is ``phi1(ad_A)(M) = int_0^1 e^{tA} M e^{-tA} dt``. No eigenvalue gap
ever appears in a denominator.
"""

from functools import cache
from math import ceil, isfinite, log2, pi, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Polynomial(NamedTuple):
    """A polynomial ``p(z)``, near ``exp(z)`` for imaginary ``|z| <= radius``.

    Args:
        radius: up to which it is.
        products: pairs of factors, each given by its coefficients of ``I``, ``A``, ``A^2`` and of the
            products before.
        rest: what is to be added to the last product, likewise.
    """

    radius: float
    products: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    rest: tuple[float, ...]


# Solved in 50 digits from the coefficients of the Chebyshev series of exp(ix), |x| <= radius, of degree 8
# and (but for the power 16, which the others fix) 15. At the radius the errors, 8e-8 and 2e-17, are below
# one unit in the last place; those of the derivative, 5e-6 and 5e-15 there, fall off fast inside.
_POLYNOMIALS = {
    torch.float32: _Polynomial(
        1.25,
        (
            ((0, 0, 1), (0.12476724388829292073, 0.01938569596317006364, 0.004872977244797974363)),
            (
                (0, 0, 0, 1),
                (2.9208438131949077631, 0.881956701207185371, -0.041930443980911806474, 1),
            ),
        ),
        (0.99999999514806502175, 0.99999944227057861029, 0.13557421213395347867),
    ),
    torch.float64: _Polynomial(
        1.25,
        (
            ((0, 0, 1), (0, 0.0029263366787830838205, 0.00039948627431315138242)),
            ((0, 0.40469775974528775564, -0.0078953754696291241518, 1), (0, 0, 0.032482337219295251112, 1)),
            (
                (0, 2.1897013881354623883, 0.26022888911072817756, 5.7094009220490963657, 1),
                (0, -0.027405896015848997569, 0.022605747663850828414, -0.0513502837309801422, 1),
            ),
        ),
        (
            0.99999999999999997691,
            0.99999999999999997461,
            0.5600107285489987949,
            -3.2480258599810098876,
            10.17862815960577983,
        ),
    ),
}
_LARGEST_NORM = 1e4  # that the fixed schedule, for devices that must not be waited for, covers
_ROUNDING = 16  # units in the last place from the unitary group, above which the result is polished
_POLISH_EVERY = 6  # squarings: 64 times the rounding error, which is then squared
_NARROW = 8  # times as many rows as columns, from which torch's exponential of a small matrix is faster
_CLOSER_BOUND = 256  # the size from which a closer bound costs less than the squarings that it spares
_CHUNK_BYTES = 3 * 2**18  # of one temporary: several fit in a core's cache
_DEVICE_CHUNK_BYTES = 2**27  # so that those of a large spectrum do not fill a GPU

FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)  # computed in single precision


def check_dtype(name: str, X: Tensor) -> None:
    """That a tensor is of a dtype that is computed with.

    Raises:
        TypeError: if it is not, or no tensor.
    """
    if not isinstance(X, Tensor) or X.dtype not in (*FLOATS, *HALF):
        found = X.dtype if isinstance(X, Tensor) else type(X).__name__
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*FLOATS, *HALF))
        raise TypeError(
            f"{name} should be a tensor of a floating or complex dtype: {allowed}. Found {found}"
        )


def skew(X: Tensor) -> Tensor:
    """The skew-Hermitian part ``(X - X^H) / 2`` of matrices ``(..., n, n)``."""
    # Note [lazy conjugates]
    # Inside an operator that runs under AOTAutograd (torch 2.13) an elementwise operation takes a
    # conjugate view for what lies in memory, without a word, and products of batches copy such a view
    # matrix by matrix. So conjugates are made, which costs as much as adding does anyway.
    return (X - X.mH.resolve_conj()) * 0.5


def expm_skew(A: Tensor) -> Tensor:
    r"""Exponential of skew-symmetric or skew-Hermitian matrices, with its analytic derivative.

    .. math:: Q = \exp\big(\tfrac12 (A - A^H)\big), \qquad Q^H Q = I.

    Only the skew part of ``A`` is read, so that ``A`` may be any free matrix. First and second
    derivatives, forward mode and ``vmap`` work, at repeated eigenvalues and at zero as anywhere.

    Args:
        A: ``(..., n, n)``; float32, float64, complex64, complex128, or half precision, which is
            computed in float32.

    Returns:
        ``(..., n, n)``, of the dtype of ``A``, unitary to ``10 * n * eps`` at every norm up to 1e9
        (double precision: 1e70); beyond, and where ``A`` is not finite, that matrix is NaN. The error of
        the values grows as ``eps * norm(A)``, as it must. Off the CPU nothing is waited for. There, up to
        size 32 and where triton is installed, each matrix is one program, with the squarings that it needs;
        otherwise the cost is that of norm 1e4, and a larger one gives NaN.

    Raises:
        TypeError: if ``A`` is no tensor of a floating dtype.
        ValueError: if the matrices are not square.

    Cost: elementwise up to size 2. Beyond, ``3 + s`` products of ``n x n`` matrices forward and
    ``7 + 3 s`` backward, with ``s`` about ``log2(norm(A))``; in double precision ``4 + s`` and
    ``10 + 3 s``; two more forward where ``s > 4``. Memory: the result, and temporaries of a few
    megabytes, off the CPU of up to 128 MB each.

    Source: Bader, Blanes, Casas (2019) and Sastre (2018) for the polynomials; Magnasco,
    arXiv:2302.07396, for their use.

    Example:
        >>> import torch
        >>> from orthoconv_param import expm_skew
        >>> Q = expm_skew(torch.randn(7, 4, 4, dtype=torch.complex128))
        >>> torch.allclose(Q.mH @ Q, torch.eye(4, dtype=Q.dtype))
        True

        It is a trivialization for geotorch's own manifolds:

        >>> import geotorch
        >>> SO = geotorch.SO((4, 4), triv=expm_skew)
        >>> SO.in_manifold(SO(torch.randn(4, 4)))
        True
    """
    check_dtype("A", A)
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A should be square matrices (..., n, n). Found {tuple(A.shape)}")
    if A.dtype not in FLOATS:
        return expm_skew(A.float()).to(A.dtype)
    if A.shape[-1] == 1:
        # not by `conj`: its views fail in forward mode within vmap, and conj_physical has no batching rule
        return torch.complex(A.imag * 0, A.imag).exp() if A.is_complex() else torch.exp(A * 0)
    return exponential(A)


def exponential(A: Tensor, norm: float | None = None) -> Tensor:
    """`expm_skew` of matrices ``(..., n, n)``, of which a bound on the spectral norm may be known.

    It is not computed then. (Off the CPU it is not used.)
    """
    # Note [operator and Function]
    # torch.compile cannot trace through an autograd.Function that has a jvp, and torch.func cannot
    # differentiate an operator with register_autograd (its jvp is silently zero). So each is used
    # where it works, and both run the same operator.
    if torch.compiler.is_compiling():
        return torch.ops.orthoconv_param.expm_skew(A, norm)
    return _Expm.apply(A, norm)


def expm_frame(X: Tensor, norm: float | None = None) -> Tensor:
    """The columns of `exponential` of tall matrices, padded to square ones by zeros; of wide ones, rows.

    With ``X1`` the square upper part of a tall ``X`` and ``X2`` the rest, ``skew([X, 0])`` takes
    ``(u, X2 v)`` to ``(skew(X1) u - X2^H X2 v / 2, X2 u / 2)``. So the first columns of its exponential are
    ``(U, X2 V)``, where ``(U, V)`` are those of the exponential of a small matrix, which unlike the form
    with a QR factor has derivatives where ``X2`` has no full rank.
    """
    rows, columns = X.shape[-2:]
    m = max(rows, columns)
    if m < _NARROW * min(rows, columns) or not _may_wait(X.device):
        Q = exponential(X if rows == columns else F.pad(X, (0, m - columns, 0, m - rows)), norm)
        return Q[..., :rows, :columns]
    if rows < columns:
        return expm_frame(X.mH.resolve_conj()).mH.resolve_conj()
    small = X.to(torch.promote_types(X.dtype, torch.float64))  # its matrix is not normal
    X1, X2 = small[..., :columns, :], small[..., columns:, :]
    gram = product(X2.mH.resolve_conj(), X2)
    with torch.no_grad():  # balances the matrix, and changes nothing
        c = (_frobenius(gram).sqrt() / 2).clamp(min=1e-8)[..., None, None]
    eye = torch.eye(columns, dtype=gram.dtype, device=gram.device)
    lower = torch.cat([eye * c, torch.zeros_like(gram)], -1)
    upper = torch.cat([skew(X1), gram / (-4 * c)], -1)
    UV = torch.linalg.matrix_exp(torch.cat([upper, lower], -2))[..., :columns]
    U, V = UV[..., :columns, :], UV[..., columns:, :]
    return torch.cat([U, product(X2, V / (2 * c))], -2).to(X.dtype)


def norm_bound(A: Tensor) -> Tensor:
    """An upper bound on the spectral norm of skew matrices ``(..., n, n)``.

    From the traces of ``A^8`` and ``A^16``, three products; 1.02 times the norm for random matrices of
    size 64.
    """
    # divided by a norm, so that no power overflows; one whose square underflows is as good as 0
    size = _frobenius(A).clamp(min=torch.finfo(A.dtype).tiny ** 0.5)
    A = A * (1 / size)[..., None, None]
    A2 = A @ A
    A4 = A2 @ A2
    bound = _largest_eigenvalue(_frobenius(A4), _frobenius(A4 @ A4), A) ** 0.125 * size
    return torch.where(size.isfinite(), bound, size)


def _largest_eigenvalue(X: Tensor, square: Tensor, A: Tensor) -> Tensor:
    """A bound on that of ``X^2``, given the Frobenius norms of ``X`` and ``X^2``, powers of a skew ``A``.

    With the mean ``a`` and the deviation ``s`` of ``n`` eigenvalues, one that is there ``m`` times is at
    most ``a + s sqrt(n/m - 1)`` (Wolkowicz and Styan, Linear Algebra Appl. 29 (1980) 471). Of a real skew
    matrix's square each but 0 is there twice.
    """
    n = A.shape[-1]
    mean, root = X.square() / n, square / n**0.5
    deviation = (root - mean).clamp(min=0).sqrt() * (root + mean).sqrt()
    return mean + deviation * (n / (1 if A.is_complex() else 2) - 1) ** 0.5


def log_unitary(Q: Tensor) -> Tensor:
    """The principal logarithm of unitary matrices ``(..., n, n)``; real for real ones.

    With ``C`` and ``K`` the Hermitian and skew parts of ``Q``, ``log(Q) = g(C) K`` with
    ``g(cos t) = t / sin t``: a function of one Hermitian matrix, smooth until ``t = pi``. Angles
    near ``pi`` are taken from ``-Q``. Not differentiable.

    Raises:
        ValueError: if a real matrix has determinant -1, and so no real logarithm.
    """
    with torch.no_grad():
        cosines, V = torch.linalg.eigh((Q + Q.mH) / 2)
        angles = 2 * torch.atan2((1 - cosines).clamp(min=0).sqrt(), (1 + cosines).clamp(min=0).sqrt())
        log = (V * (1 / torch.sinc(angles / pi)).unsqueeze(-2)) @ V.mH @ skew(Q)
        for index in (cosines < -0.5).any(-1).nonzero().tolist():
            log[tuple(index)] = _log_far(Q[tuple(index)], cosines[tuple(index)], V[tuple(index)])
    return skew(log)


def _log_far(Q: Tensor, cosines: Tensor, V: Tensor) -> Tensor:
    """`log_unitary` of one matrix with angles above ``2 pi / 3``, on two invariant subspaces."""
    near, far = V[:, cosines >= -0.5], V[:, cosines < -0.5]
    log = near @ log_unitary(near.mH @ Q @ near) @ near.mH if near.shape[1] else torch.zeros_like(Q)
    # R = -Q has angles t - pi * sign(t) here, small and precise; J = polar(log(R)) is i * sign
    # of them, and log(Q) = log(R) - pi * J.
    R = log_unitary(-far.mH @ Q @ far)
    U, sizes, Wh = torch.linalg.svd(R)
    null = sizes < 100 * len(R) * torch.finfo(Q.dtype).eps
    J = U[:, ~null] @ Wh[~null]
    Z = U[:, null]  # the eigenvalue -1: +pi and -pi are equally good, but a real J pairs them
    if Q.is_complex():
        J = J - 1j * Z @ Z.mH
    else:
        if Z.shape[1] % 2:
            raise ValueError("a real matrix of determinant -1 has no real logarithm")
        pairs = Z[:, 0::2] @ Z[:, 1::2].mT
        J = J + pairs - pairs.mT
    return log + far @ (R - pi * skew(J)) @ far.mH


def refine(Q: Tensor) -> Tensor:
    """Matrices with orthonormal columns (or rows) to single precision, in double precision.

    What is added is of the size of rounding, and so has no derivative.
    """
    exact = Q.to(torch.complex128, memory_format=torch.contiguous_format)
    with torch.no_grad():
        tall, flat = Q.shape[-2] >= Q.shape[-1], exact.view(prod(Q.shape[:-2]), *Q.shape[-2:])
        for piece in [slice(None)] if torch.compiler.is_compiling() else _pieces(flat):
            X = flat[piece]
            adjoint = X.mH.resolve_conj()
            defect = adjoint @ X if tall else X @ adjoint
            defect.diagonal(dim1=-2, dim2=-1).sub_(1)
            # which is small, so that single precision is enough for the product with it
            defect, X32 = defect.to(torch.complex64), X.to(torch.complex64)
            flat[piece] -= 0.5 * (X32 @ defect if tall else defect @ X32)
    return exact


def product(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B`` of batches of matrices, with derivatives that are products of adjoints as fast as it is.

    (Torch's own are products of lazily conjugated batches, which it copies matrix by matrix.)
    """
    # see Note [operator and Function]
    return A @ B if torch.compiler.is_compiling() or not A.is_complex() else _Product.apply(A, B)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, B: Tensor) -> Tensor:
        return A @ B

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None]:
        A, B = ctx.saved_tensors
        dA = product(G, B.mH.resolve_conj()) if ctx.needs_input_grad[0] else None
        dB = product(A.mH.resolve_conj(), G) if ctx.needs_input_grad[1] else None
        return dA, dB

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, dB: Tensor | None) -> Tensor:
        A, B = ctx.saved_tensors
        terms = [product(X, Y) for X, Y in ((dA, B), (A, dB)) if X is not None and Y is not None]
        return sum(terms[1:], start=terms[0])


def polar_frame(X: Tensor) -> Tensor:
    """A unitary ``m x m`` matrix whose first columns (rows, if ``X`` is wide) are polar to ``X``.

    The polar factor ``U V^H`` of the singular value decomposition is the nearest matrix with
    orthonormal columns (rows) in the Frobenius norm; the rest completes it. Not differentiable.
    """
    return polar_decomposition(X.clone())[0]


def polar_decomposition(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``X = Q P``, or ``P Q`` if it is wide, of the smaller Hermitian factor ``P = V diag(S) V^H``.

    Square matrices are overwritten by their polar factors: memory for one spectrum less.

    Returns:
        `polar_frame` of ``X``, which contains ``Q``; ``V``; and ``S``, in descending order.
    """
    rows, columns = X.shape[-2:]
    k, m = min(rows, columns), max(rows, columns)
    flat = X.reshape(prod(X.shape[:-2]), rows, columns)
    frame = flat if rows == columns else flat.new_empty(len(flat), m, m)
    V, S = flat.new_empty(len(flat), k, k), flat.new_empty(len(flat), k, dtype=X.dtype.to_real())
    with torch.no_grad():
        for piece in _pieces(flat):
            U, S[piece], Vh = torch.linalg.svd(flat[piece], full_matrices=True)
            if rows >= columns:
                frame[piece, :, :k], frame[piece, :, k:] = U[..., :k] @ Vh, U[..., k:]
                V[piece] = Vh.mH
            else:
                frame[piece, :k], frame[piece, k:] = U @ Vh[..., :k, :], Vh[..., k:, :]
                V[piece] = U
    batch = X.shape[:-2]
    return frame.reshape(*batch, m, m), V.reshape(*batch, k, k), S.reshape(*batch, k)


def polish(Q: Tensor) -> Tensor:
    """One step of Newton and Schulz's iteration for the polar factor, ``Q (3 I - Q^H Q) / 2``.

    It squares the distance to the unitary group. The factor is made exactly Hermitian.
    """
    factor = Q.mH.resolve_conj() @ Q
    factor = (factor + factor.mH.resolve_conj()).mul_(-0.25)  # see Note [lazy conjugates]
    factor.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return Q @ factor


# Scaling and squaring


def _combine(basis: list[Tensor], coefficients: tuple[float, ...]) -> Tensor:
    """The sum of ``I`` and the matrices of a basis, times their coefficients."""
    first, *others = [j for j, c in enumerate(coefficients[1:]) if c]
    if not others and coefficients[first + 1] == 1:
        return basis[first]
    X = basis[first] * coefficients[first + 1]
    for j in others:
        X.add_(basis[j], alpha=coefficients[j + 1])
    if coefficients[0]:
        X.diagonal(dim1=-2, dim2=-1).add_(coefficients[0])
    return X


def _factors(A: Tensor, A2: Tensor, polynomial: _Polynomial) -> tuple[list[Tensor], list[Any]]:
    """The basis of which the polynomial is made, and the two factors of each product."""
    basis, factors = [A, A2], []
    for k, (left, right) in enumerate(polynomial.products, start=1):
        factors.append((_combine(basis, left), _combine(basis, right)))
        if k < len(polynomial.products):
            basis.append(torch.bmm(*factors[-1]))
    return basis, factors


def _evaluate(A: Tensor, A2: Tensor, polynomial: _Polynomial) -> Tensor:
    basis, factors = _factors(A, A2, polynomial)
    return _combine(basis, polynomial.rest).baddbmm_(*factors[-1])


def _evaluate_vjp(A: Tensor, A2: Tensor, polynomial: _Polynomial, G: Tensor) -> Tensor:
    """A matrix whose skew part is that of the gradient at ``A`` of `_evaluate` with ``A2 = A @ A``.

    ``G``, the gradient at its value, and the result are conjugated: then every adjoint factor is
    a transposed one, which BLAS takes as it lies in memory.
    """
    basis, factors = _factors(A, A2, polynomial)
    gradients: dict[int, Tensor] = {}

    def spread(coefficients: tuple[float, ...], G: Tensor) -> None:
        for j, c in enumerate(coefficients[1:]):
            if c:
                gradients[j] = gradients[j].add_(G, alpha=c) if j in gradients else G * c

    spread(polynomial.rest, G)
    for k in reversed(range(len(factors))):
        (left, right), (X, Y) = polynomial.products[k], factors[k]
        spread(left, torch.bmm(G, Y.mT))
        spread(right, torch.bmm(X.mT, G))
        if k > 0:
            G = gradients.pop(len(basis) - len(factors) + k)
    G_A, G_A2 = gradients[0], gradients[1]
    # A2 = A @ A adds G_A2 A^H + A^H G_A2. Its skew part is that of A^H (G_A2 + G_A2^H), one product less.
    return G_A.baddbmm_(A.mT, torch.conj_physical(G_A2.mT) + G_A2)


def _may_wait(device: torch.device) -> bool:
    return device.type == "cpu"


class _Scaled(NamedTuple):
    """``A / 2^s`` and its square, with what is to be done with them.

    Args:
        A: scaled.
        A2: its square.
        polynomial: that is the exponential there.
        squarings: how many are made.
        counts: which of them count, if they are more than the norm needs.
        scale: ``2^-s``.
    """

    A: Tensor
    A2: Tensor
    polynomial: _Polynomial
    squarings: int
    counts: Tensor | None
    scale: float | Tensor


def _scale(A: Tensor, norm: float | None) -> _Scaled:
    """Scales skew matrices, of a norm that may be known, to where the polynomial is the exponential.

    On the CPU ``s`` is read. Elsewhere reading it would wait for the device: there the squarings
    are as many as the largest norm needs, and a mask says which of them are to be made.
    """
    polynomial = _POLYNOMIALS[A.dtype.to_real()]
    radius = polynomial.radius
    A2 = A @ A
    if _may_wait(A.device):
        A, A2, bound = _read_norm(A, A2, radius) if norm is None else (A, A2, norm)
        bound /= radius
        s = ceil(log2(bound)) if bound > 1 else 0
        if s > 0:
            A, A2 = A * 0.5**s, A2 * 0.25**s
        return _Scaled(A, A2, polynomial, s, None, 0.5**s)
    bounds = _largest_eigenvalue(_frobenius(A), _frobenius(A2), A).sqrt() / radius
    finite = bounds.isfinite()
    most = ceil(log2(_LARGEST_NORM / radius))
    A, A2 = (torch.where(finite[..., None, None], X, torch.nan) for X in (A, A2))
    steps = torch.where(finite, bounds, 0).amax().clamp(min=1).log2().ceil()
    steps = torch.where(steps <= most, steps, torch.nan)
    counts = torch.arange(most, device=A.device) < steps
    scale = torch.exp2(-steps)
    return _Scaled(A * scale, A2 * scale**2, polynomial, most, counts, scale)


def _read_norm(A: Tensor, A2: Tensor, radius: float) -> tuple[Tensor, Tensor, float]:
    """Skew matrices and their squares, NaN where they are not finite, and a bound on the norm of the rest.

    The bound is as close as is worth its cost where norms up to ``radius`` need no squarings.
    """
    bounds, n = _largest_eigenvalue(_frobenius(A), _frobenius(A2), A).sqrt(), A.shape[-1]
    bound = bounds.amax().item()
    if not isfinite(bound):  # a bad matrix spoils no other
        finite = bounds.isfinite()
        A, A2 = (torch.where(finite[..., None, None], X, torch.nan) for X in (A, A2))
        bound = torch.where(finite, bounds, 0).amax().item()
    # Traces of higher powers, one product, may spare all squarings, and of large matrices pay anyway.
    if radius < bound and (bound < radius * n**0.125 or n >= _CLOSER_BOUND):
        closer = _largest_eigenvalue(_frobenius(A2), _frobenius(A2 @ A2), A) ** 0.25
        bound = min(bound, closer.nan_to_num(0).amax().item())
    return A, A2, bound


def _frobenius(X: Tensor) -> Tensor:
    # torch's norms of complex numbers take ten times as long as of their parts
    return torch.linalg.vector_norm(
        torch.view_as_real(X) if X.is_complex() else X[..., None], dim=(-3, -2, -1)
    )


def _squarings(Q: Tensor, s: int, counts: Tensor | None) -> list[Tensor]:
    """``Q``, ``Q^2``, ``Q^4``, ... up to ``s`` squarings, of which a mask says which are to be made.

    A squaring doubles the distance to the unitary group, so after each few of them it is squared.
    """
    chain = [Q]
    for j in range(s):
        Q = chain[-1] @ chain[-1]
        if j % _POLISH_EVERY == _POLISH_EVERY - 1:
            Q = polish(Q)
        chain.append(Q if counts is None else torch.where(counts[j], Q, chain[-1]))
    return chain


def _expm_chunk(A: Tensor, norm: float | None = None) -> Tensor:
    if A.shape[-1] == 2:
        return _expm_2x2(skew(A))
    A, A2, polynomial, s, counts, _ = _scale(skew(A), norm)
    Q = _squarings(_evaluate(A, A2, polynomial), s, counts)[-1]
    return Q if 2**s <= min(_ROUNDING, 5 * Q.shape[-1]) else polish(Q)


def _expm_vjp_chunk(A: Tensor, G: Tensor, norm: float | None = None) -> Tensor:
    if A.shape[-1] == 2:
        return _expm_vjp_2x2(skew(A), G)
    A, A2, polynomial, s, counts, scale = _scale(skew(A), norm)
    G = torch.conj_physical(G)
    if s > 0:
        G = G * scale
        chain = _squarings(_evaluate(A, A2, polynomial), s - 1, counts)
        for j in reversed(range(s)):
            Q = chain[j].mT
            step = torch.baddbmm(Q @ G, G, Q)
            G = step if counts is None else torch.where(counts[j], step, G)
    return skew(_evaluate_vjp(A, A2, polynomial, G)).conj_physical_()


def _traceless(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A 2x2 skew matrix as ``t I + B``, of which ``B^2 = -r^2 I``: ``t``, ``B`` and ``r > 0``."""
    t = (A.diagonal(dim1=-2, dim2=-1).sum(-1) / 2)[..., None, None]
    B = A.clone()
    B.diagonal(dim1=-2, dim2=-1).sub_(t[..., 0])
    r = (_frobenius(B) * 0.5**0.5).clamp(min=torch.finfo(A.dtype).tiny)
    return t, B, r[..., None, None]


def _expm_2x2(A: Tensor) -> Tensor:
    """``e^t (cos(r) I + sin(r) / r B)``."""
    t, B, r = _traceless(A)
    Q = B * (r.sin() / r)
    Q.diagonal(dim1=-2, dim2=-1).add_(r.cos()[..., 0])
    return Q.mul_(t.exp()) if A.is_complex() else Q


def _expm_vjp_2x2(A: Tensor, G: Tensor) -> Tensor:
    """``phi1(ad_A)(M)``, ``M = skew(Q^H G)``: ``ad_A^2`` is 0 on ``I`` and ``B``, and else ``-4 r^2``."""
    _, B, r = _traceless(A)
    M = skew(_expm_2x2(A).mH.resolve_conj() @ G)
    _, across, _ = _traceless(M)
    along = B / r  # of which the norm is sqrt(2), or 0
    across = across - along * (torch.conj_physical(along) * across).real.sum((-2, -1), keepdim=True) / 2
    sinc, commutator = r.sin() / r, skew(B @ M)  # of which this is half
    return M - across * (1 - sinc * r.cos()) + commutator * sinc.square()


def _in_chunks(function: Any, *tensors: Tensor) -> Tensor:
    """Applies a function of matrix batches in pieces whose temporaries stay in the cache."""
    shape = tensors[0].shape
    flat = [x.resolve_conj().reshape(prod(shape[:-2]), *shape[-2:]) for x in tensors]
    result = torch.empty_like(flat[0], memory_format=torch.contiguous_format)
    for piece in _pieces(result):
        result[piece] = function(*(x[piece] for x in flat))
    return result.reshape(shape)


def _pieces(batch: Tensor) -> list[slice]:
    """A batch of matrices cut into pieces: of the size of a cache, off the CPU of some of the memory."""
    if not batch.numel():
        return []
    limit = _CHUNK_BYTES if _may_wait(batch.device) else _DEVICE_CHUNK_BYTES
    size = max(1, limit // (batch[0].numel() * batch.element_size()))
    return [slice(start, start + size) for start in range(0, len(batch), size)]


@cache
def _kernels() -> Any | None:
    """The module of kernels for a GPU that take a small matrix as a whole, where triton is there."""
    try:
        from . import fused  # takes a while
    except ImportError:
        return None
    return fused if fused.IS_SUPPORTED else None


def _fused(A: Tensor) -> Any | None:
    fused = _kernels() if A.is_cuda and A.shape[-1] != 2 else None
    return fused if fused and A.shape[-1] <= fused.LARGEST and A.dtype in fused.DTYPES else None


# Operators and their derivatives: see Note [operator and Function]


@torch.library.custom_op("orthoconv_param::expm_skew", mutates_args=())
def _expm(A: Tensor, norm: float | None = None) -> Tensor:
    fused = _fused(A)
    return fused.expm(A) if fused else _in_chunks(lambda A: _expm_chunk(A, norm), A)


@torch.library.custom_op("orthoconv_param::expm_skew_vjp", mutates_args=())
def _expm_vjp(A: Tensor, G: Tensor, norm: float | None = None) -> Tensor:
    fused = _fused(A)
    if fused:
        return fused.expm_vjp(A, G)
    return _in_chunks(lambda A, G: _expm_vjp_chunk(A, G, norm), A, G)


@_expm.register_fake
def _(A: Tensor, norm: float | None = None) -> Tensor:
    return torch.empty_like(A, memory_format=torch.contiguous_format)


@_expm_vjp.register_fake
def _(A: Tensor, G: Tensor, norm: float | None = None) -> Tensor:
    return torch.empty_like(A, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, float | None], output: Tensor) -> None:
    A, ctx.norm = inputs
    ctx.save_for_backward(A)


_expm.register_autograd(
    lambda ctx, G: (torch.ops.orthoconv_param.expm_skew_vjp(*ctx.saved_tensors, G, ctx.norm), None),
    setup_context=_save,
)


def _second_derivative(a: Tensor, X: Tensor, Y: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """``L(a)[X]`` and ``L2(a)[X, Y] + L(a)[Z]``, the first and second derivatives of ``exp``.

    Read from one exponential of a block matrix (Higham and Relton, SIAM J. Matrix Anal. Appl. 35
    (2014) 1019), which torch differentiates to any order.
    """
    n, o = a.shape[-1], torch.zeros_like(a)
    rows = ((a, X, Y, Z), (o, a, o, Y), (o, o, a, X), (o, o, o, a))
    blocks = torch.cat([torch.cat(row, -1) for row in rows], -2)
    top = torch.linalg.matrix_exp(blocks)[..., :n, :]
    return top[..., n : 2 * n], top[..., 3 * n :]


def align(tensors: tuple[Tensor, ...], dims: tuple[int | None, ...], size: int) -> list[Tensor]:
    """Puts the dimension that ``vmap`` maps first in each tensor; those that have none get one."""
    return [
        x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip(tensors, dims, strict=True)
    ]


class _Expm(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, norm: float | None) -> Tensor:
        return torch.ops.orthoconv_param.expm_skew(A, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | None], output: Tensor) -> None:
        A, ctx.norm = inputs
        ctx.save_for_backward(A)
        ctx.save_for_forward(A, output)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (A,) = ctx.saved_tensors
        return _ExpmVjp.apply(A, G, ctx.norm), None

    @staticmethod
    def jvp(ctx: Any, E: Tensor, _: None) -> Tensor:
        A, Q = ctx.saved_tensors
        # dQ = Q phi1(-ad_A)(skew(E)), and phi1(-ad_A)(M) is the vjp at -A of exp(-A) M
        return product(Q, _ExpmVjp.apply(-A, product(Q.mH.resolve_conj(), skew(E)), ctx.norm))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], A: Tensor, norm: float | None
    ) -> tuple[Tensor, int]:
        return _Expm.apply(*align((A,), in_dims[:1], info.batch_size), norm), 0


class _ExpmVjp(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, G: Tensor, norm: float | None) -> Tensor:
        return torch.ops.orthoconv_param.expm_skew_vjp(A, G, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, N: Tensor) -> tuple[Tensor, Tensor, None]:
        # The function is skew(L(-A)[G]); the adjoint of X -> L2(a)[X, Y] is N -> L2(a^H)[N, Y^H].
        A, G = ctx.saved_tensors
        grad_G, grad_a = _second_derivative(skew(A), skew(N), G.mH, torch.zeros_like(G))
        return -skew(grad_a), grad_G, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, dG: Tensor, _: None) -> Tensor:
        A, G = ctx.saved_tensors
        return skew(_second_derivative(-skew(A), G, -skew(dA), dG)[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, A: Tensor, G: Tensor, norm: float | None) -> tuple[Tensor, int]:
        return _ExpmVjp.apply(*align((A, G), in_dims[:2], info.batch_size), norm), 0
