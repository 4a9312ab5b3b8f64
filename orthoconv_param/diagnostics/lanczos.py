r"""Extreme singular values of an operator that can only be applied, by Golub-Kahan-Lanczos iteration.

From a random vector ``v_1`` on the smaller side of ``A`` it builds orthonormal ``U`` and ``V`` with

    A V = U B,    A^H U = V B^H + beta v_next e^T,

where ``B`` is small and upper triangular (bidiagonal but for rounding). The singular values of ``B`` are
those of ``A`` restricted to the span of ``V``. So they lie between the smallest and the largest one of
``A``: an estimate of the defect is never larger than the defect. The extremes converge first. With
``B = P S Q^H``, a value ``s_i`` is within the residual ``beta |P_last,i|`` of a singular value of ``A``.
New vectors are made orthogonal to all earlier ones. Else rounding brings copies of converged values.

Source: Golub, Kahan, *Calculating the singular values and pseudo-inverse of a matrix*, SIAM J. Numer.
Anal. 2, 1965.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import Size
from .forward import Forward

_STEPS = 600  # which 8 channels between zeros on 16x16 images take at most
_NUMBERS = 2**22  # in both bases together, but for the fewest steps
_FEWEST = 40
_RELATIVE = 1e-2  # residual at which a value counts as converged
_ABSOLUTE = 1e-6
_ROUNDING = 1e-13  # of a vector: what is left is none

_Map: TypeAlias = Callable[[Tensor], Tensor]


def extremes(operator: Forward) -> tuple[float, float]:
    """Estimate the smallest and the largest of the ``min(rows, columns)`` singular values, from inside.

    It ends when both have converged, or after as many steps as time and memory allow.

    Cost: one application of the operator and one of its adjoint a step: 600 steps at most, and fewer for
    more than 7000 rows and columns together, down to 40.
    """

    def random(seed: int, size: Size) -> Tensor:
        return operator.random(1, size, seed)[0]

    near, far = operator.taken, operator.given
    there: _Map = operator.apply
    back: _Map = operator.adjoint
    if prod(far) < prod(near):  # the null space of the larger side does not count
        near, far, there, back = far, near, back, there
    n, m = prod(near), prod(far)
    steps = min(n, _STEPS, max(_NUMBERS // (n + m), _FEWEST))

    start = random(0, near)
    V, U, B = (start.new_zeros(size) for size in ((steps + 1, n), (steps, m), (steps, steps)))
    V[0] = start / start.norm()
    precision = max(_ABSOLUTE, torch.finfo(operator.dtype).eps)
    S, check, met = start, 10, False
    for k in range(steps):
        B[:k, k], B[k, k], U[k] = _orthonormalised(there(V[k]), U[:k], partial(random, 2 * k + 1, far))
        _, beta, V[k + 1] = _orthonormalised(back(U[k]), V[: k + 1], partial(random, 2 * k + 2, near))
        if k + 1 not in (check, steps):
            continue
        P, S, _ = torch.linalg.svd(B[: k + 1, : k + 1])
        values = S[[-1, 0]]
        residuals = beta * P[k, [-1, 0]].abs()
        residuals[0] = torch.minimum(residuals[0], values[0])  # the true one is not below zero
        error = (_RELATIVE * (values - 1).abs().max()).clamp(min=precision)  # of the defect
        bound = torch.minimum((_RELATIVE * values).clamp(min=precision), error)
        before, met = met, bool((residuals <= bound).all())
        if met and before:  # twice: once it may be another value near by
            break
        check = check * 6 // 5 + 1
    return S[-1].item(), S[0].item()


def _orthonormalised(
    x: Tensor, basis: Tensor, fresh: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a vector's coefficients in an orthonormal basis, and the rest: its norm, and its direction.

    A rest that is nothing but rounding counts as zero, and a fresh vector takes its place: its span is one
    that the operator maps to itself.
    """
    length = x.norm()
    coefficients, rest = _split(x, basis)
    if rest.norm() < 0.7 * length:  # then rounding may have left much of the basis in it
        more, rest = _split(rest, basis)
        coefficients = coefficients + more
    norm = rest.norm()
    if norm > _ROUNDING * length:
        return coefficients, norm, rest / norm
    _, rest = _split(_split(fresh(), basis)[1], basis)
    return coefficients, torch.zeros_like(norm), rest / rest.norm()


def _split(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector's coefficients in an orthonormal basis, and the rest."""
    coefficients = basis.conj() @ x
    return coefficients, x - coefficients @ basis
