"""Bounds on the spectral norm of skew-Hermitian matrices, from traces of their powers."""

import torch
from torch import Tensor

from .products import skew


def norm_bound(A: Tensor) -> Tensor:
    """Return an upper bound on the spectral norm of each of skew matrices ``(..., n, n)``.

    The bound is read from the traces of ``A^8`` and ``A^16``, which take three products. For random
    matrices of size 64 it is 1.02 times the norm.
    """
    # divided by a norm, so that no power overflows; one whose square underflows is as good as 0
    size = frobenius(A).clamp(min=torch.finfo(A.dtype).tiny ** 0.5)
    A = A * (1 / size)[..., None, None]
    A2 = A @ A
    A4 = A2 @ A2
    bound = largest_eigenvalue(frobenius(A4), frobenius(A4 @ A4), A) ** 0.125 * size
    return torch.where(size.isfinite(), bound, size)


def norm_bound_of_frame(X: Tensor) -> Tensor:
    """Return an upper bound on the norm of the skew part of matrices that zeros make square.

    Of ``X = [S, 2 R]`` with ``k`` rows that is ``[[S, R], [-R^H, 0]]``, with ``S`` skew. Its norm depends
    on ``R R^H = L L^H`` alone, so that ``L`` with ``k`` columns may be taken for ``R`` with many.

    Args:
        X: ``(..., rows, columns)``.
    """
    X = X if X.shape[-2] <= X.shape[-1] else X.mH
    k, m = X.shape[-2:]
    if m <= 2 * k:
        return norm_bound(skew(X))
    S, R = skew(X[..., :k]), X[..., k:] / 2
    RR = R @ R.mH
    # a little more of the identity leaves the bound one, and a factor where there is hardly a rank
    more = frobenius(RR).clamp(min=torch.finfo(X.dtype).tiny) * (4 * k * torch.finfo(X.dtype).eps)
    eye = torch.eye(k, dtype=X.dtype, device=X.device)
    L = torch.linalg.cholesky_ex(RR + more[..., None, None] * eye)[0]
    A = torch.cat([torch.cat([S, L], -1), torch.cat([-L.mH, torch.zeros_like(S)], -1)], -2)
    return norm_bound(A)


def largest_eigenvalue(X: Tensor, square: Tensor, A: Tensor) -> Tensor:
    """Return a bound on the largest eigenvalue of ``X^H X``, for a power ``X`` of a skew ``A``.

    With the mean ``a`` and the deviation ``s`` of ``n`` eigenvalues, one of multiplicity ``m`` is at
    most ``a + s sqrt(n/m - 1)`` (Wolkowicz and Styan, Linear Algebra Appl. 29 (1980) 471). Of a real skew
    matrix's square each eigenvalue but 0 has multiplicity two.

    Args:
        X: the Frobenius norms of the powers, ``(...)``.
        square: those of their squares ``X^2``.
        A: the matrices, of which the size and the field count.
    """
    n = A.shape[-1]
    mean, root = X.square() / n, square / n**0.5
    deviation = (root - mean).clamp(min=0).sqrt() * (root + mean).sqrt()
    return mean + deviation * max(n / (1 if A.is_complex() else 2) - 1, 0) ** 0.5


def frobenius(X: Tensor) -> Tensor:
    """Return the Frobenius norm of each of a batch of matrices."""
    # torch's norms of complex numbers take ten times as long as of their parts
    return torch.linalg.vector_norm(
        torch.view_as_real(X) if X.is_complex() else X[..., None], dim=(-3, -2, -1)
    )
