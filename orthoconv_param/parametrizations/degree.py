r"""`Degree`: how many taps a compact kernel needs, from its generator's norm.

A map with a scalar function ``f`` (``exp``, Cayley's ``(1 + z/2) / (1 - z/2)``) takes a local generator to
a kernel whose taps fall off as the Chebyshev coefficients of ``f`` on ``i [-norm, norm]``: a polynomial of
degree ``p`` in a kernel of reach ``r`` has reach ``p r``.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf, isfinite, log2, prod

import numpy as np
import torch

from ..checks import HALF, Size
from ..matrices.maps import Trivialization, name, trivialization
from ..torus.lattice import Lattice

SINGLE_TOLERANCE = 2e-7

# Norms are rounded up to these many levels per octave, so that the degree changes rarely, and below the
# smallest of them it stays, so that derivatives at zero are as exact as values.
_LEVELS_PER_OCTAVE = 4
_SMALLEST_LEVEL = 0.25
_LARGEST_DEGREE = 512  # a 3x3 generator's kernel then has 1025 x 1025 taps


@dataclass(frozen=True)
class Degree:
    """The degree of the compact kernels of generators up to a norm.

    Args:
        level: the norm.
        value: the degree.
    """

    level: float
    value: int

    @classmethod
    def of(
        cls, triv: str | Trivialization, tol: float, reach: Size, norm: float = _SMALLEST_LEVEL
    ) -> "Degree":
        """Return the degree that a norm needs, rounded up.

        Raises:
            ValueError: if none below 512 does.
        """
        level = _rounded_up(norm)
        return cls(level, smallest_degree(triv, level, tol, reach))

    def covers(self, norm: float) -> bool:
        """Return True if this is the degree of a norm, neither too small nor needlessly large."""
        return _rounded_up(norm) == self.level


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the defect that kernels of a dtype can hold."""
    if dtype in HALF:
        return 1e-4
    return 1e-12 if dtype in (torch.float64, torch.complex128) else SINGLE_TOLERANCE


def _rounded_up(norm: float) -> float:
    if not isfinite(norm):
        return inf
    if norm <= _SMALLEST_LEVEL:
        return _SMALLEST_LEVEL
    return 2 ** (ceil(_LEVELS_PER_OCTAVE * log2(norm)) / _LEVELS_PER_OCTAVE)


@lru_cache(maxsize=256)
def smallest_degree(triv: str | Trivialization, norm: float, tol: float, reach: Size) -> int:
    """Return the degree at which a compact kernel is as good as ``triv`` of the generator, to ``tol``.

    On the torus that holds degree ``p`` in a kernel of ``reach``, ``triv`` of a generator with spectrum
    in ``i [-norm, norm]`` differs from a kernel with all its taps there by at most the sum
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
    """Return the norm of the interpolation by trigonometric polynomials on the torus of that degree."""
    grid = Lattice.of_degree(degree, reach, (1,) * len(reach), 1, False).grid
    return prod(float(np.mean(1 / np.sin(np.pi * (np.arange(n) + 0.5) / n))) for n in grid)


@lru_cache(maxsize=256)
def _chebyshev_tails(triv: str | Trivialization, norm: float) -> np.ndarray:
    """Return ``sum_{q > p} |c_q|`` for each ``p``, from values of the map on 1 x 1 matrices."""
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
