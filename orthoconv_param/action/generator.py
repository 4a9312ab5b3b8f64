"""`Generator`: what is exponentiated, where the exponential is applied by its series."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime
from ..torus.geometry import Geometry


class Generator(NamedTuple):
    """A convolution whose skew part is exponentiated.

    Args:
        kernel: ``(out, in/groups, *taps)``, in single precision at least.
        geometry: of it, which is not transposed.
        norm: which its skew part does not exceed.
        coefficients: of the map's series for that norm: see `matrices.chebyshev`.
        coin: ``(groups, m, m)``, orthogonal matrices that act on each pixel besides; or None.
    """

    kernel: Tensor
    geometry: Geometry
    norm: float
    coefficients: tuple[float, ...]
    coin: Tensor | None


def few_of(coefficients: tuple[float, ...], reduced: torch.dtype | None) -> tuple[float, ...]:
    """Return the coefficients that count in a dtype to which convolutions are reduced; for None all."""
    count = len(coefficients)
    if reduced is not None:
        left_out, tol = 0.0, runtime.rounding(reduced)
        while count > 3 and left_out + abs(coefficients[count - 1]) <= tol:
            left_out += abs(coefficients[count - 1])
            count -= 1
    return coefficients[:count]
