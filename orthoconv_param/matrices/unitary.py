"""Unitary matrices: the polar and QR factors of others, the principal logarithm, Haar's measure.

The polar decomposition is ``X = Q P`` with ``Q = U V^H`` and ``P = V S V^H``, from the singular value
decomposition ``X = U S V^H``. Nothing here has derivatives, but for `polish`, `refine` and `qr_factor`.
"""

from math import pi

import torch
from torch import Tensor

from .. import runtime
from .batches import flatten, pieces
from .products import skew


def semi_orthogonal(X: Tensor, eps: float) -> bool:
    """Return True if ``X^H X = I``, or ``X X^H = I`` for wide matrices, to ``eps`` in each entry."""
    gram = X.mH @ X if X.shape[-2] >= X.shape[-1] else X @ X.mH
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return bool(((gram - eye).abs() <= eps).all())


def qr_factor(X: Tensor) -> Tensor:
    """Return the unitary factor ``Q`` of ``X = Q R``, where the diagonal of ``R`` is positive."""
    Q, R = torch.linalg.qr(X)
    return Q * torch.sgn(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)


def haar(like: Tensor) -> Tensor:
    """Draw unitary (orthogonal) matrices from Haar's measure, as many and of the kind of ``like``."""
    return qr_factor(torch.randn_like(like))


# Nearly unitary matrices


def polish(Q: Tensor) -> Tensor:
    """Return ``Q (3 I - Q^H Q) / 2``, one step of Newton and Schulz's iteration for the polar factor.

    The step squares the distance to the unitary group.
    """
    factor = Q.mH.resolve_conj() @ Q
    factor = (factor + factor.mH.resolve_conj()).mul_(-0.25)  # Hermitian; see Note [lazy conjugates]
    factor.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return Q @ factor


def refine(Q: Tensor, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Return matrices whose columns (or rows) are orthonormal but for rounding, after a step of `polish`.

    The correction is of the size of rounding, and so has no derivative.

    Args:
        Q: the matrices, whose columns (or rows) are orthonormal to single precision.
        dtype: in which the step is made, and of the result.
    """
    exact = Q.to(dtype, memory_format=torch.contiguous_format, copy=True)
    with torch.no_grad():
        tall, flat = Q.shape[-2] >= Q.shape[-1], flatten(exact)
        for piece in [slice(None)] if runtime.is_compiling() else pieces(flat):
            X = flat[piece]
            adjoint = X.mH.resolve_conj()
            defect = adjoint @ X if tall else X @ adjoint
            defect.diagonal(dim1=-2, dim2=-1).sub_(1)
            # which is small, so that single precision is enough for the product with it
            defect, X32 = defect.to(torch.complex64), X.to(torch.complex64)
            flat[piece] -= 0.5 * (X32 @ defect if tall else defect @ X32)
    return exact


# The polar decomposition


def polar(X: Tensor) -> Tensor:
    """Return the polar factor ``U V^H`` of matrices ``(..., rows, columns)``.

    It is the nearest matrix with orthonormal columns (rows, if ``X`` is wide) in the Frobenius norm.
    """
    rows, columns = X.shape[-2:]
    return polar_frame(X)[..., :rows, :columns]


def polar_frame(X: Tensor) -> Tensor:
    """Return unitary ``m x m`` matrices; their first columns (rows, if wide) are the polar factors."""
    return polar_decomposition(X.clone())[0]


def polar_decomposition(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``X = Q P``, or ``P Q`` if it is wide, with the smaller Hermitian ``P = V diag(S) V^H``.

    Square matrices are overwritten by their polar factors, which spares the memory of one spectrum.

    Returns:
        `polar_frame` of ``X``, which contains ``Q``; ``V``; and ``S``, in descending order.
    """
    rows, columns = X.shape[-2:]
    k, m = min(rows, columns), max(rows, columns)
    flat = flatten(X)
    frame = flat if rows == columns else flat.new_empty(len(flat), m, m)
    V, S = flat.new_empty(len(flat), k, k), flat.new_empty(len(flat), k, dtype=X.dtype.to_real())
    with torch.no_grad():
        for piece in pieces(flat):
            U, S[piece], Vh = torch.linalg.svd(flat[piece], full_matrices=True)
            if rows >= columns:
                frame[piece, :, :k], frame[piece, :, k:] = U[..., :k] @ Vh, U[..., k:]
                V[piece] = Vh.mH
            else:
                frame[piece, :k], frame[piece, k:] = U @ Vh[..., :k, :], Vh[..., k:, :]
                V[piece] = U
    batch = X.shape[:-2]
    return frame.reshape(*batch, m, m), V.reshape(*batch, k, k), S.reshape(*batch, k)


# The logarithm


def log_unitary(Q: Tensor) -> Tensor:
    """Return the principal logarithm of unitary matrices ``(..., n, n)``; real for real ones.

    With ``C`` and ``K`` the Hermitian and skew parts of ``Q``, ``log(Q) = g(C) K`` with
    ``g(cos t) = t / sin t``. It is a function of one Hermitian matrix, smooth until ``t = pi``. Angles
    near ``pi`` are taken from ``-Q``.

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
    """Return `log_unitary` of one matrix with angles above ``2 pi / 3``, on two invariant subspaces."""
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
