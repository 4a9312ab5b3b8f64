r"""`Degree`: how many taps a compact kernel needs, or terms a series, from its generator's norm.

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
from ..matrices.chebyshev import LARGEST_DEGREE, LARGEST_NUMBER_OF_TERMS, series, tails
from ..matrices.maps import Trivialization, name
from ..torus.lattice import Lattice

SINGLE_TOLERANCE = 2e-7  # of series, and on a given torus: a looser one would spare little
COMPACT_TOLERANCE = 1e-6  # of compact kernels: 1000 steps of a linear recurrence keep the norm to 1e-3

# Norms are rounded up to these many levels per octave, so that the degree changes rarely, and below the
# smallest of them it stays, so that derivatives at zero are as exact as values.
_LEVELS_PER_OCTAVE = 4
_KEPT_LEVELS = 2  # below a level that has been reached, so that a norm at its border changes nothing
SMALLEST_LEVEL = 0.25


@dataclass(frozen=True)
class Degree:
    """The degree of the polynomials that map generators up to a norm to orthogonal operators.

    Args:
        level: the norm.
        value: the degree: of compact kernels; or of a series, the number of its terms.
        coefficients: of the map's series for that norm. A term more costs little: of compact kernels it is
            to a fifth of the tolerance. Empty if it is too long.
        tol: the largest defect.
        proved: the degree that is enough for every generator of that norm; ``value`` may be smaller.
        edge: up to which size of the kernel's outermost taps ``value`` is enough, as measured on the
            kernel: see `truncation`. None if nothing has been measured.
    """

    level: float
    value: int
    coefficients: tuple[float, ...]
    tol: float
    proved: int
    edge: float | None = None

    @classmethod
    def of(
        cls, triv: str | Trivialization, tol: float, reach: Size, norm: float = SMALLEST_LEVEL
    ) -> "Degree":
        """Return the degree that a norm needs, rounded up.

        Raises:
            ValueError: if none below 512 does.
        """
        level = _rounded_up(norm)
        value = smallest_degree(triv, level, tol, reach)
        if value is None:
            raise ValueError(
                "the generator's norm should be smaller (scale down the weight that it starts as, or take "
                f"a smaller learning rate), or domain be a size: with triv={name(triv)!r} no kernel of a "
                f"degree up to {LARGEST_DEGREE - 1} reaches tol={tol:.1e}. Found norm {norm:.3g}"
            )
        return cls(level, value, series(triv, level, tol / 5) or (), tol, value)

    @classmethod
    def of_series(cls, triv: str | Trivialization, tol: float, norm: float = SMALLEST_LEVEL) -> "Degree":
        """Return the number of terms that a norm needs, rounded up.

        Raises:
            ValueError: if there are more than 200.
        """
        level = _rounded_up(norm)
        coefficients = series(triv, level, tol)
        if coefficients is None:
            raise ValueError(
                "the generator's norm should be smaller (scale down the weight that it starts as, or take "
                'a smaller learning rate), or method be "split": with '
                f"triv={name(triv)!r} it needs more than {LARGEST_NUMBER_OF_TERMS} terms, each a "
                f"convolution, to tol={tol:.1e}. Found norm {norm:.3g}"
            )
        return cls(level, len(coefficients) - 1, coefficients, tol, len(coefficients) - 1)

    def covers(self, norm: float) -> bool:
        """Return True if this is the degree of a norm, neither too small nor needlessly large."""
        return isfinite(norm) and 0 <= _step(self.level) - _step(norm) < _KEPT_LEVELS

    @property
    def is_measured(self) -> bool:
        """Return True if the degree was measured on the kernel, not deduced from its norm."""
        return self.edge is not None

    def unmeasured(self) -> "Degree":
        """Return the degree that is deduced from the norm alone."""
        return Degree(self.level, self.proved, self.coefficients, self.tol, self.proved)


def default_tolerance(dtype: torch.dtype, single: float = SINGLE_TOLERANCE) -> float:
    """Return the defect that is aimed at in a dtype, given that in single precision."""
    if dtype in HALF:
        return 1e-4
    return 1e-12 if dtype in (torch.float64, torch.complex128) else single


def _rounded_up(norm: float) -> float:
    return 2 ** (_step(norm) / _LEVELS_PER_OCTAVE) if isfinite(norm) else inf


def _step(norm: float) -> int:
    """Return the number of the level to which a norm is rounded up; a level is its own."""
    return ceil(_LEVELS_PER_OCTAVE * log2(max(norm, SMALLEST_LEVEL)) - 1e-9)


@lru_cache(maxsize=256)
def smallest_degree(triv: str | Trivialization, norm: float, tol: float, reach: Size) -> int | None:
    """Return the degree at which a compact kernel is as good as ``triv`` of the generator, to ``tol``.

    On the torus that holds degree ``p`` in a kernel of ``reach``, ``triv`` of a generator with spectrum
    in ``i [-norm, norm]`` differs from a kernel with all its taps there by at most the sum
    of the Chebyshev coefficients above ``p``. Reading it as a compact kernel interpolates that rest
    between the torus's frequencies, which multiplies it by at most Lebesgue's constant.
    So the operator's error, and its defect, on every domain are below ``tol`` if

        ``(1 + lebesgue(p)) * sum_{q > p} |c_q| <= tol``.

    Return None if no degree below 512 does, as for large norms, and for maps with a discontinuity.
    """
    rest = tails(triv, norm)
    for p in range(2, min(len(rest), LARGEST_DEGREE)):
        if rest[p] <= tol and rest[p] * (1 + _lebesgue(p, reach)) <= tol:
            return p
    return None


def _lebesgue(degree: int, reach: Size) -> float:
    """Return the norm of the interpolation by trigonometric polynomials on the torus of that degree."""
    grid = Lattice.of_degree(degree, reach, (1,) * len(reach), 1, False).grid
    return prod(float(np.mean(1 / np.sin(np.pi * (np.arange(n) + 0.5) / n))) for n in grid)
