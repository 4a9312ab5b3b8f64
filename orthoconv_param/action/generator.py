"""`Generator`: what is exponentiated, where the exponential is applied by its series.

Note [terms in compiled code]
Compilers see no values, so that a norm in their code is that of the last ordinary call, and so would be the
number of terms. On a CPU the norm is therefore read by an operator that they do not look into, and the
operator that applies the series takes the terms for it. A compiled generator is known to them by a number.
"""

from itertools import count
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import runtime
from ..torus.geometry import Geometry


class Follower(Protocol):
    """Knows how many terms the norm of a generator takes."""

    def level(self, kernel: Tensor) -> float:
        """Return the norm of a generator, rounded up."""
        ...

    def coefficients(self, level: float) -> tuple[float, ...]:
        """Return those of the series for that norm."""
        ...


FOLLOWERS: WeakValueDictionary[int, Follower] = WeakValueDictionary()
_numbers = count()


def number_of(follower: Follower) -> int:
    """Return a new number, under which compiled code finds a follower."""
    number = next(_numbers)
    FOLLOWERS[number] = follower
    return number


class Generator(NamedTuple):
    """A convolution whose skew part is exponentiated.

    Args:
        kernel: ``(out, in/groups, *taps)``, in single precision at least.
        geometry: of it, which is not transposed.
        norm: which its skew part does not exceed.
        coefficients: of the map's series for that norm: see `matrices.chebyshev`.
        coin: ``(groups, m, m)``, orthogonal matrices that act on each pixel besides; or None.
        number: under which compiled code finds what follows its norm; None if nothing does.
    """

    kernel: Tensor
    geometry: Geometry
    norm: float
    coefficients: tuple[float, ...]
    coin: Tensor | None
    number: int | None = None


@torch.library.custom_op("orthoconv_param::level", mutates_args=())
def level(kernel: Tensor, number: int) -> Tensor:
    """Return the norm of a generator now, rounded up, as a scalar: see Note [terms in compiled code]."""
    return torch.tensor(FOLLOWERS[number].level(kernel), dtype=torch.float64)


@level.register_fake
def _(kernel: Tensor, number: int) -> Tensor:
    return torch.empty((), dtype=torch.float64)


def few_of(coefficients: tuple[float, ...], reduced: torch.dtype | None) -> tuple[float, ...]:
    """Return the coefficients that count in a dtype to which convolutions are reduced; for None all."""
    count = len(coefficients)
    if reduced is not None:
        left_out, tol = 0.0, runtime.rounding(reduced)
        while count > 3 and left_out + abs(coefficients[count - 1]) <= tol:
            left_out += abs(coefficients[count - 1])
            count -= 1
    return coefficients[:count]
