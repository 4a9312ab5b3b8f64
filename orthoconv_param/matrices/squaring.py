r"""Scaling and squaring: the exponential of a batch of skew-Hermitian matrices, and its gradient.

With a polynomial ``p`` that is the exponential up to a radius, ``Q = exp(A) = p(A / 2^s)^(2^s)``. A
squaring ``Q_{j+1} = Q_j^2`` takes a gradient ``G_{j+1}`` to ``G_{j+1} Q_j^H + Q_j^H G_{j+1}``. In closed
form, with ``M = skew(Q^H G)``, the gradient is ``phi1(ad_A)(M) = int_0^1 e^{tA} M e^{-tA} dt``. No
eigenvalue gap ever appears in a denominator.
"""

from collections.abc import Sequence
from math import ceil, isfinite, log2
from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime
from .norms import frobenius, largest_eigenvalue
from .polynomials import (
    POLYNOMIALS,
    Polynomial,
    evaluate,
    evaluate_and_keep,
    evaluate_vjp,
    evaluate_vjp_of_kept,
)  # fmt: skip
from .products import skew
from .unitary import polish

_LARGEST_NORM = 1e4  # up to which matrices are squared whose norm must not be read
_ROUNDING = 16  # units in the last place from the unitary group, above which the result is polished
_POLISH_EVERY = 6  # squarings: 64 times the rounding error, which is then squared
_CLOSER_BOUND = 256  # the size from which a closer bound costs less than the squarings that it spares


def expm_batch(A: Tensor, norm: float | None) -> Tensor:
    """Return ``exp(skew(A))`` of matrices ``(count, n, n)``, of which a bound on the norm may be known."""
    A, A2, polynomial, s, counts, _ = _scale(skew(A), norm)
    Q = _squarings(evaluate(A, A2, polynomial), s, counts)[-1]
    return Q if 2**s <= min(_ROUNDING, 5 * Q.shape[-1]) else polish(Q)


def vjp_batch(A: Tensor, G: Tensor, norm: float | None) -> Tensor:
    """Return the gradient at ``A`` of `expm_batch`, given the gradient ``G`` at its value."""
    A, A2, polynomial, s, counts, scale = _scale(skew(A), norm)
    G = torch.conj_physical(G)
    if s > 0:
        G = G * scale
        chain = _squarings(evaluate(A, A2, polynomial), s - 1, counts)
        for j in reversed(range(s)):
            Q = chain[j].mT
            step = torch.baddbmm(Q @ G, G, Q)
            G = step if counts is None else torch.where(counts[j], step, G)
    return skew(evaluate_vjp(A, A2, polynomial, G)).conj_physical_()


def expm_and_keep(A: Tensor, norm: float | None) -> tuple[Tensor, list[Tensor]]:
    """Return `expm_batch` where norms may be read, and what `vjp_of_kept` takes, for two products less."""
    A, A2, polynomial, s, _, _ = _scale(skew(A), norm)
    value, factors = evaluate_and_keep(A, A2, polynomial)
    chain = _squarings(value, s, None)
    Q = chain.pop()
    kept = [A, *(X for factor in factors for X in factor), *chain]
    return (Q if 2**s <= min(_ROUNDING, 5 * Q.shape[-1]) else polish(Q)), kept


def vjp_of_kept(G: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Return `vjp_batch` of matrices of which `expm_and_keep` has kept this."""
    A, polynomial = kept[0], POLYNOMIALS[kept[0].dtype.to_real()]
    ends = 1 + 2 * len(polynomial.products)
    factors, chain = [*zip(kept[1:ends:2], kept[2:ends:2], strict=True)], kept[ends:]
    G = torch.conj_physical(G) * 0.5 ** len(chain)
    for Q in reversed(chain):
        G = torch.baddbmm(Q.mT @ G, G, Q.mT)
    return skew(evaluate_vjp_of_kept(A, factors, polynomial, G)).conj_physical_()


class _Scaled(NamedTuple):
    """Matrices that are scaled to where a polynomial is their exponential.

    Args:
        A: the matrices, times ``2^-s``.
        A2: their squares.
        polynomial: the exponential there.
        squarings: how many are made.
        counts: which of them count; None if all do.
        scale: ``2^-s``.
    """

    A: Tensor
    A2: Tensor
    polynomial: Polynomial
    squarings: int
    counts: Tensor | None
    scale: float | Tensor


def _scale(A: Tensor, norm: float | None) -> _Scaled:
    """Scale skew matrices, of which a bound on the norm may be known."""
    polynomial = POLYNOMIALS[A.dtype.to_real()]
    A2 = A @ A
    if runtime.may_wait(A.device):
        return _scale_by_reading(A, A2, norm, polynomial)
    return _scale_unread(A, A2, polynomial)


def _scale_by_reading(A: Tensor, A2: Tensor, norm: float | None, polynomial: Polynomial) -> _Scaled:
    """Scale by the norm, known or read, with as many squarings as it needs."""
    A, A2, bound = _read_norm(A, A2, polynomial.radius) if norm is None else (A, A2, norm)
    bound /= polynomial.radius
    s = ceil(log2(bound)) if bound > 1 else 0
    if s > 0:
        A, A2 = A * 0.5**s, A2 * 0.25**s
    return _Scaled(A, A2, polynomial, s, None, 0.5**s)


def _scale_unread(A: Tensor, A2: Tensor, polynomial: Polynomial) -> _Scaled:
    """Scale by the norm where the host must not read it: a mask tells which of the most squarings count."""
    bounds = largest_eigenvalue(frobenius(A), frobenius(A2), A).sqrt() / polynomial.radius
    finite = bounds.isfinite()
    most = ceil(log2(_LARGEST_NORM / polynomial.radius))
    A, A2 = (torch.where(finite[..., None, None], X, torch.nan) for X in (A, A2))
    steps = torch.where(finite, bounds, 0).amax().clamp(min=1).log2().ceil()
    steps = torch.where(steps <= most, steps, torch.nan)
    counts = torch.arange(most, device=A.device) < steps
    scale = torch.exp2(-steps)
    return _Scaled(A * scale, A2 * scale**2, polynomial, most, counts, scale)


def _read_norm(A: Tensor, A2: Tensor, radius: float) -> tuple[Tensor, Tensor, float]:
    """Return the matrices and squares, NaN where they are not finite, and a bound on the norm of the rest.

    The bound is as close as is worth its cost where norms up to ``radius`` need no squarings.
    """
    bounds, n = largest_eigenvalue(frobenius(A), frobenius(A2), A).sqrt(), A.shape[-1]
    bound = bounds.amax().item()
    if not isfinite(bound):  # a bad matrix spoils no other
        finite = bounds.isfinite()
        A, A2 = (torch.where(finite[..., None, None], X, torch.nan) for X in (A, A2))
        bound = torch.where(finite, bounds, 0).amax().item()
    # Traces of higher powers, one product, may spare all squarings, and of large matrices pay anyway.
    if radius < bound and (bound < radius * n**0.125 or n >= _CLOSER_BOUND):
        closer = largest_eigenvalue(frobenius(A2), frobenius(A2 @ A2), A) ** 0.25
        bound = min(bound, closer.nan_to_num(0).amax().item())
    return A, A2, bound


def _squarings(Q: Tensor, s: int, counts: Tensor | None) -> list[Tensor]:
    """Return ``Q``, ``Q^2``, ``Q^4``, ... up to ``s`` squarings; those that do not count change nothing.

    A squaring doubles the distance to the unitary group. So after each few of them `polish` squares it.
    """
    chain = [Q]
    for j in range(s):
        Q = chain[-1] @ chain[-1]
        if j % _POLISH_EVERY == _POLISH_EVERY - 1:
            Q = polish(Q)
        chain.append(Q if counts is None else torch.where(counts[j], Q, chain[-1]))
    return chain
