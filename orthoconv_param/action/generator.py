"""`Generator`: what is exponentiated, where the exponential is applied by its series.

Note [terms in compiled code]
Compilers see no values, so that a norm in their code is that of the last ordinary call, and so would be the
number of terms. On a CPU the norm is therefore read by an operator that they do not look into, and the
operator that applies the series takes the terms for it. Both ask what follows the norm, `walled.Norm`.
"""

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
        number: of what follows its norm in compiled code, a `runtime.Numbered`; None elsewhere.
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
    return torch.tensor(runtime.numbered(number).level(kernel), dtype=torch.float64)


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
