r"""Closed forms: the exponential of skew-Hermitian matrices of sizes 1 and 2, and its gradient.

A 2x2 skew matrix is ``A = t I + B`` with a trace-free ``B``, of which ``B^2 = -r^2 I``. So
``exp(A) = e^t (cos(r) I + sin(r) / r B)``.
"""

import torch
from torch import Tensor

from .norms import frobenius
from .products import skew


def expm_1x1(A: Tensor) -> Tensor:
    """Return ``exp(skew(A))``, elementwise and with torch's own derivatives.

    None of them reads the result, so that it may be changed in place.
    """
    if not A.is_complex():
        return A * 0 + 1
    # not by `conj`: its views fail in forward mode within vmap, and conj_physical has no batching rule
    angle = A.imag + A.real * 0
    return torch.complex(angle.cos(), angle.sin())


def expm_2x2(A: Tensor) -> Tensor:
    """Return ``exp(skew(A))``."""
    t, B, r = _traceless(skew(A))
    Q = B * (r.sin() / r)
    Q.diagonal(dim1=-2, dim2=-1).add_(r.cos()[..., 0])
    return Q.mul_(t.exp()) if A.is_complex() else Q


def vjp_2x2(A: Tensor, G: Tensor) -> Tensor:
    """Return the gradient at ``A`` of `expm_2x2`, given the gradient ``G`` at its value.

    It is ``phi1(ad_A)(M)``, ``M = skew(Q^H G)``. On ``I`` and ``B`` the square of ``ad_A`` is 0, and else
    ``-4 r^2``.
    """
    A = skew(A)
    _, B, r = _traceless(A)
    M = skew(expm_2x2(A).mH.resolve_conj() @ G)
    _, across, _ = _traceless(M)
    along = B / r  # of which the norm is sqrt(2), or 0
    across = across - along * (torch.conj_physical(along) * across).real.sum((-2, -1), keepdim=True) / 2
    sinc, commutator = r.sin() / r, skew(B @ M)  # of which this is half
    return M - across * (1 - sinc * r.cos()) + commutator * sinc.square()


def _traceless(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``t``, ``B`` and ``r > 0`` of a skew matrix."""
    t = (A.diagonal(dim1=-2, dim2=-1).sum(-1) / 2)[..., None, None]
    B = A.clone()
    B.diagonal(dim1=-2, dim2=-1).sub_(t[..., 0])
    r = (frobenius(B) * 0.5**0.5).clamp(min=torch.finfo(A.dtype).tiny)
    return t, B, r[..., None, None]
