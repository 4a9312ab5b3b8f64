r"""Maps from skew-Hermitian matrices to unitary ones, by name, and how local they are.

A map ``triv`` with a scalar function ``f`` (``exp``, Cayley's ``(1 + z/2) / (1 - z/2)``) takes a local
generator to a kernel whose taps fall off as the Chebyshev coefficients of ``f`` on
``i [-norm, norm]``: a polynomial of degree ``p`` in a kernel of reach ``r`` has reach ``p r``.

A map ``R`` with ``R(0) = I`` and ``R'(0) = id`` is a retraction of the unitary group,
``(Q, V) -> R(V Q^H) Q``, and of frames, whose tangent vectors have a skew lift: see `retract`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from .exponential import expm_skew, log_unitary, polish, skew
from .lattice import Lattice, Size

Trivialization = Callable[[Tensor], Tensor]

_LARGEST_DEGREE = 512  # a 3x3 generator's kernel then has 1025 x 1025 taps


def cayley(A: Tensor) -> Tensor:
    r"""Cayley's map ``(I + A/2) (I - A/2)^{-1}`` of skew-Hermitian matrices ``(..., n, n)``."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye - A / 2, eye + A / 2)


def _inverse_cayley(Q: Tensor) -> Tensor:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    # an eigenvalue -1 is a pole: solve would raise on some machines and not on others
    if bool((torch.linalg.svdvals(Q + eye)[..., -1] < 1e3 * torch.finfo(Q.dtype).eps).any()):
        raise ValueError("Cayley's map does not reach a matrix with an eigenvalue -1")
    return skew(2 * torch.linalg.solve(Q + eye, Q - eye))


def polar(A: Tensor) -> Tensor:
    r"""The polar factor ``(I + A) (I - A^2)^{-1/2}`` of ``I + A``, of skew matrices ``(..., n, n)``.

    Newton's iteration, scaled by what is known of the singular values, which converges to double precision
    in nine steps for norms up to 1e16, in single precision 1e8 (Byers and Xu, SIAM J. Matrix Anal. Appl. 30
    (2008) 822). Unlike the singular value decomposition it has derivatives of any order where singular
    values coincide.
    """
    X = A + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    # the singular values of I + A are from 1 to this
    largest = (1 + torch.linalg.matrix_norm(A.detach()).square()).sqrt()[..., None, None]
    scale = largest**-0.5
    following = (2 * largest**0.5 / (1 + largest)).sqrt()
    for _ in range(9):
        X = (scale * X + torch.linalg.inv(X).mH / scale) / 2
        scale, following = following, ((following + 1 / following) / 2) ** -0.5
    return X


def qr(A: Tensor) -> Tensor:
    """The unitary factor ``Q`` of ``I + A = Q R``, the diagonal of ``R`` positive."""
    Q, R = torch.linalg.qr(A + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device))
    return Q * torch.sgn(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)


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
    "polar": Retraction(polar, 2),
    "qr": Retraction(qr, 1),
}


def retraction(name: str) -> Retraction:
    """The retraction of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in RETRACTIONS:
        raise ValueError(f"retraction should be one of {[*RETRACTIONS]}. Found {name!r}")
    return RETRACTIONS[name]


def lift(Q: Tensor, V: Tensor) -> Tensor:
    """The skew ``A`` of least norm with ``A Q = V``, for ``V`` tangent at a frame ``Q``."""
    W = V - Q @ (Q.mH @ V) / 2
    A = W @ Q.mH
    return A - A.mH


def retract(name: str, Q: Tensor, V: Tensor) -> Tensor:
    """The point ``R(A) Q``, ``A Q = V``, to which a retraction takes a tangent vector.

    Args:
        name: one of ``"expm"`` (the geodesic), ``"cayley"``, ``"polar"``, ``"qr"``.
        Q: ``(..., m, k)``, with orthonormal columns, ``k <= m``.
        V: likewise, tangent: ``Q^H V`` is skew.

    Returns:
        ``(..., m, k)``, with orthonormal columns: what rounding takes away from them is restored at each
        step, so that many of them do not add up. (Steps of norm 1e6 in single precision are too long.)

    Raises:
        ValueError: if there is no retraction of that name.
    """
    return polish(retraction(name).apply(lift(Q, V)) @ Q)


_BY_NAME: dict[str, tuple[Trivialization, Trivialization]] = {
    "expm": (expm_skew, log_unitary),
    "cayley": (cayley, _inverse_cayley),
}


def trivialization(triv: str | Trivialization) -> Trivialization:
    """The map of that name, or ``triv`` itself if it is callable.

    Raises:
        ValueError: if there is no map of that name.
        TypeError: if it is neither a name nor callable.
    """
    if isinstance(triv, str):
        if triv not in _BY_NAME:
            raise ValueError(f"triv should be one of {sorted(_BY_NAME)} or callable. Found {triv!r}")
        return _BY_NAME[triv][0]
    if not callable(triv):
        raise TypeError(f"triv should be one of {sorted(_BY_NAME)} or callable. Found {triv!r}")
    return triv


def inverse(triv: str | Trivialization) -> Trivialization | None:
    """The inverse of a map that is given by name, from unitary to skew matrices; else None."""
    return _BY_NAME[triv][1] if isinstance(triv, str) else None


def name(triv: str | Trivialization) -> str:
    """How the map is called."""
    return triv if isinstance(triv, str) else getattr(triv, "__name__", type(triv).__name__)


@lru_cache(maxsize=256)
def degree(triv: str | Trivialization, norm: float, tol: float, reach: Size) -> int:
    """The degree ``p`` at which a compact kernel is as good as ``triv`` of the generator, to ``tol``.

    On the torus that holds degree ``p`` in a kernel of ``reach``, ``triv`` of a generator with spectrum in
    ``i [-norm, norm]`` differs from a kernel with all its taps there by at most the sum
    of the Chebyshev coefficients above ``p``. Reading it as a compact kernel interpolates that rest
    between the torus's frequencies, which multiplies it by at most Lebesgue's constant.
    So the operator's error, and its defect, on every domain are below ``tol`` if

        ``(1 + lebesgue(p)) * sum_{q > p} |c_q| <= tol``.

    Raises:
        ValueError: if no degree below 512 does, as for a map with a discontinuity.
    """
    # more than so many oscillations no polynomial of a lesser degree follows
    tails = _chebyshev_tails(triv, norm) if norm < 2 * _LARGEST_DEGREE else ()
    for p in range(2, len(tails)):
        if tails[p] <= tol and tails[p] * (1 + _lebesgue(p, reach)) <= tol:
            return p
    raise ValueError(
        f"triv={name(triv)!r} of a generator of norm {norm:.3g} has no compact kernel to tol={tol:.1e}: "
        "use a given domain, or a smaller generator"
    )


def _lebesgue(degree: int, reach: Size) -> float:
    """Norm of the interpolation by trigonometric polynomials on the torus of that degree."""
    grid = Lattice.of_degree(degree, reach, (1,) * len(reach), 1, False).grid
    return prod(float(np.mean(1 / np.sin(np.pi * (np.arange(n) + 0.5) / n))) for n in grid)


@lru_cache(maxsize=256)
def _chebyshev_tails(triv: str | Trivialization, norm: float) -> np.ndarray:
    """``sum_{q > p} |c_q|`` for each ``p``, from values of the map on 1 x 1 matrices."""
    apply = trivialization(triv)
    count = 64
    while count <= 4 * _LARGEST_DEGREE:
        x = np.cos(np.pi * (np.arange(count) + 0.5) / count)
        f = apply(torch.from_numpy(1j * norm * x).reshape(-1, 1, 1)).flatten().numpy()
        # the discrete cosine transform of f, as the Fourier transform of its even extension
        spectrum = np.fft.fft(np.concatenate([f, f[::-1]]))[:count]
        c = np.abs(spectrum * np.exp(-0.5j * np.pi * np.arange(count) / count)) / count
        c[c < 100 * np.finfo(float).eps * (1 + norm) ** 0.5] = 0  # rounding
        if not c[count // 2 :].any():
            return np.append(np.cumsum(c[::-1])[::-1][1:], 0.0)[:_LARGEST_DEGREE]
        count *= 2
    return np.full(0, np.inf)
