r"""Maps from skew-Hermitian matrices to unitary ones, by name: trivializations and retractions.

A trivialization ``triv`` has a scalar function ``f`` (``exp``, Cayley's ``(1 + z/2) / (1 - z/2)``), and is
``triv(A) = V f(D) V^H`` of ``A = V D V^H``.

A map ``R`` with ``R(0) = I`` and ``R'(0) = id`` is a retraction of the unitary group,
``(Q, V) -> R(V Q^H) Q``, and of frames, whose tangent vectors have a skew lift: see `retract`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, pi
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .. import runtime
from .expm import expm_skew
from .products import skew
from .unitary import log_unitary, polish, qr_factor

Trivialization: TypeAlias = Callable[[Tensor], Tensor]


def cayley(A: Tensor) -> Tensor:
    r"""Return Cayley's map ``(I + A/2) (I - A/2)^{-1}`` of skew-Hermitian matrices ``(..., n, n)``."""
    eye = _eye_like(A)
    return torch.linalg.solve(eye - A / 2, eye + A / 2)


def _inverse_cayley(Q: Tensor) -> Tensor:
    eye = _eye_like(Q)
    # an eigenvalue -1 is a pole: solve would raise on some machines and not on others
    if bool((torch.linalg.svdvals(Q + eye)[..., -1] < 1e3 * torch.finfo(Q.dtype).eps).any()):
        raise ValueError("Cayley's map does not reach a matrix with an eigenvalue -1")
    return skew(2 * torch.linalg.solve(Q + eye, Q - eye))


def _eye_like(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


# Trivializations


class _Named(NamedTuple):
    """A map, its inverse, and the ``k`` for which the map of ``[[0, -k], [k, 0]]`` rotates by an angle."""

    apply: Trivialization
    inverse: Trivialization
    of_angle: Trivialization


_BY_NAME = {
    "expm": _Named(expm_skew, log_unitary, torch.clone),
    "cayley": _Named(cayley, _inverse_cayley, lambda angle: 2 * torch.tan(angle / 2)),
}


def trivialization(triv: str | Trivialization) -> Trivialization:
    """Return the map of that name, or ``triv`` itself if it is callable.

    Raises:
        ValueError: if there is no map of that name.
        TypeError: if it is neither a name nor callable.
    """
    if isinstance(triv, str):
        if triv not in _BY_NAME:
            raise ValueError(f"triv should be one of {sorted(_BY_NAME)} or callable. Found {triv!r}")
        return _BY_NAME[triv].apply
    if not callable(triv):
        raise TypeError(f"triv should be one of {sorted(_BY_NAME)} or callable. Found {triv!r}")
    return triv


def inverse(triv: str | Trivialization) -> Trivialization | None:
    """Return the inverse of a map that is given by name, from unitary to skew matrices; else None."""
    return _BY_NAME[triv].inverse if isinstance(triv, str) else None


def name(triv: str | Trivialization) -> str:
    """Return the name of a map."""
    return triv if isinstance(triv, str) else getattr(triv, "__name__", type(triv).__name__)


def check_trivialization(triv: str | Trivialization) -> None:
    """Raise unless a map takes a few skew-Hermitian matrices, complex or real, to unitary ones.

    A map that fails for one of the two fields, and works for the other, is accepted. A map that is given
    by name is not tried.

    Raises:
        ValueError: if there is no map of that name; if a result is not unitary to 1e-6, not finite or of
            another shape; or from the error of a map that fails for both fields.
        TypeError: if ``triv`` is neither a name nor callable.
    """
    apply = trivialization(triv)
    if isinstance(triv, str):
        return
    should = (
        "a triv should map skew-Hermitian to unitary matrices, as torch.matrix_exp, not torch.exp, does"
    )
    errors = []
    for dtype in (torch.complex128, torch.float64):
        # the map, too, makes its tensors there, if this is within another device's context
        with torch.no_grad(), torch.device("cpu"):
            A = some_skew(dtype)
            try:
                Q = apply(A.clone())
            except Exception as error:  # whatever a map of others raises
                errors.append(error)
                continue
            flaw = _flaw(Q, A)
        if flaw is not None:
            raise ValueError(f"{should}. Found triv={name(triv)!r}, whose result {flaw}")
    if len(errors) == 2:
        kind = type(errors[0]).__name__
        raise ValueError(
            f"{should}. Found triv={name(triv)!r}, which raises {kind}: {errors[0]}"
        ) from errors[0]


def some_skew(dtype: torch.dtype) -> Tensor:
    """Return skew matrices ``(2, 3, 3)``, always the same ones."""
    numbers = torch.arange(1, 37, dtype=torch.float64).square().sin().reshape(2, 2, 3, 3)
    return skew(torch.complex(numbers[0], numbers[1]) if dtype.is_complex else numbers[0])


def _flaw(Q: Any, A: Tensor) -> str | None:
    """Describe a map's value at skew matrices if it is not unitary."""
    if not isinstance(Q, Tensor):
        return f"is of type {type(Q).__name__}"
    if Q.shape != A.shape:
        return f"has shape {tuple(Q.shape)}, at matrices {tuple(A.shape)}"
    defect = runtime.read((Q.mH @ Q - _eye_like(Q)).abs().amax())
    if defect is None or defect <= 1e-6:
        return None
    if not isfinite(defect):
        return "is not finite"
    return f"has a defect |Q^H Q - I| = {defect:.1e}"


def generators_of_angles(triv: str | Trivialization, angles: Tensor) -> Tensor:
    """Return ``k`` such that ``triv([[0, -k], [k, 0]])`` rotates by given angles, in ``[0, pi/2]``.

    Of a map that is given as a callable, which has no inverse, they are found by bisection.

    Raises:
        ValueError: if the map reaches no rotation by ``pi/2``.
    """
    if isinstance(triv, str):
        return _BY_NAME[triv].of_angle(angles)
    apply = trivialization(triv)

    def rotates(k: Tensor) -> Tensor:
        rotation = apply(torch.stack([torch.stack([0 * k, -k], -1), torch.stack([k, 0 * k], -1)], -2))
        return torch.atan2(rotation[..., 1, 0], rotation[..., 0, 0])

    top = 1.0
    while bool(0 <= rotates(angles.new_full((1,), top)) < pi / 2):
        top *= 2
        if top > 1e3:
            raise ValueError(f"triv={name(triv)!r} should reach a rotation by a right angle")
    low, high = torch.zeros_like(angles), torch.full_like(angles, top)
    for _ in range(2 + torch.finfo(angles.dtype).bits):
        middle = (low + high) / 2
        reached = rotates(middle)
        below = (reached >= 0) & (reached < angles)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(angles == 0, angles, (low + high) / 2)


def fill_angles(angles: Tensor, init_: Any) -> None:
    """Draw angles by a function, by default uniformly from ``[-pi, pi]``."""
    if init_ is None:
        nn.init.uniform_(angles, -pi, pi)
    else:
        init_(angles)


def skew_of_angles(like: Tensor, init_: Any) -> Tensor:
    """Return skew matrices of given angles: the Lie algebra of a maximal torus of U(m), or of SO(m)."""
    m = like.shape[-1]
    angles = torch.empty(
        *like.shape[:-2], m if like.is_complex() else m // 2, dtype=like.real.dtype, device=like.device
    )
    fill_angles(angles, init_)
    if like.is_complex():
        return torch.diag_embed(1j * angles)
    subdiagonal = angles.new_zeros(*angles.shape[:-1], max(m - 1, 0))
    subdiagonal[..., ::2] = angles
    lower = torch.diag_embed(subdiagonal, offset=-1)
    return lower - lower.mT


# Retractions


def polar_retraction(A: Tensor) -> Tensor:
    r"""Return the polar factor ``(I + A) (I - A^2)^{-1/2}`` of ``I + A``, of skew matrices ``(..., n, n)``.

    Newton's iteration, scaled by what is known of the singular values, converges to double precision
    in nine steps for norms up to 1e16, in single precision 1e8 (Byers and Xu, SIAM J. Matrix Anal. Appl. 30
    (2008) 822). Unlike the singular value decomposition it has derivatives of any order where singular
    values coincide.
    """
    X = A + _eye_like(A)
    # the singular values of I + A are from 1 to this
    largest = (1 + torch.linalg.matrix_norm(A.detach()).square()).sqrt()[..., None, None]
    scale = largest**-0.5
    following = (2 * largest**0.5 / (1 + largest)).sqrt()
    for _ in range(9):
        X = (scale * X + torch.linalg.inv(X).mH / scale) / 2
        scale, following = following, ((following + 1 / following) / 2) ** -0.5
    return X


def qr_retraction(A: Tensor) -> Tensor:
    """Return the unitary factor ``Q`` of ``I + A = Q R``, the diagonal of ``R`` positive."""
    return qr_factor(A + _eye_like(A))


@dataclass(frozen=True)
class Retraction:
    """A map from skew to unitary matrices with ``R(0) = I`` and ``R'(0) = id``.

    Args:
        apply: the map, of ``(..., n, n)``.
        order: 2 if it agrees with the exponential to second order, ``R(A) = I + A + A^2 / 2 + O(A^3)``,
            so that its curves have no acceleration on the group; else 1.
    """

    apply: Trivialization
    order: int


RETRACTIONS = {
    "expm": Retraction(expm_skew, 2),
    "cayley": Retraction(cayley, 2),
    "polar": Retraction(polar_retraction, 2),
    "qr": Retraction(qr_retraction, 1),
}


def retraction(name: str) -> Retraction:
    """Return the retraction of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in RETRACTIONS:
        raise ValueError(f"retraction should be one of {[*RETRACTIONS]}. Found {name!r}")
    return RETRACTIONS[name]


def lift(Q: Tensor, V: Tensor) -> Tensor:
    """Return the skew ``A`` of least norm with ``A Q = V``, for ``V`` tangent at a frame ``Q``."""
    W = V - Q @ (Q.mH @ V) / 2
    A = W @ Q.mH
    return A - A.mH


def retract(name: str, Q: Tensor, V: Tensor) -> Tensor:
    """Return the point ``R(A) Q``, ``A Q = V``, to which a retraction takes a tangent vector.

    Args:
        name: one of ``"expm"`` (the geodesic), ``"cayley"``, ``"polar"``, ``"qr"``.
        Q: ``(..., m, k)``, with orthonormal columns, ``k <= m``.
        V: likewise, tangent: ``Q^H V`` is skew.

    Returns:
        ``(..., m, k)``, with orthonormal columns. Each step restores what rounding takes away from them, so
        that the errors of many do not add up. (Steps of norm 1e6 in single precision are too long.)

    Raises:
        ValueError: if there is no retraction of that name.
    """
    return polish(retraction(name).apply(lift(Q, V)) @ Q)
