"""`measure`: the extreme singular values of what a module's own forward does to images of one size.

Small operators are measured by their dense matrix. Periodic ones have a spectrum, which is exact at every
size. What is left, large and not periodic, is estimated.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..checks import Size
from ..parametrizations.partition import Block
from . import lanczos
from .forward import Forward
from .periodic import periodic

_DENSE = 2**20  # entries of a dense matrix that takes about a second
_LARGEST = 2**27  # entries, one gigabyte in double precision
_IMAGES = 4  # random ones, for mean gains


@dataclass(frozen=True)
class Measured:
    """What an operator does to the norm of its input; of its ``min(rows, columns)`` singular values.

    Args:
        smallest: the smallest one.
        largest: the largest one.
        defect: ``max |singular value - 1|``.
        gain: the square root of their mean square: 1 for every semi-orthogonal operator.
        estimated: True if these are estimates. Then ``smallest`` is at least the true one, ``largest`` at
            most, and so ``defect`` at most.
    """

    smallest: float
    largest: float
    defect: float
    gain: float
    estimated: bool

    @classmethod
    def of(cls, smallest: float, largest: float, gain: float, estimated: bool) -> "Measured":
        """Return it with the defect of these extremes."""
        return cls(smallest, largest, max(abs(smallest - 1), abs(largest - 1)), gain, estimated)


@torch.no_grad()
def measure(module: Any, domain: Size, block: Block | None = None, exact: bool = False) -> Measured:
    """Measure a module's own operator, or the block of it that joins some channels with some others.

    Args:
        module: one of `forward.MEASURED`.
        domain: size of the images; of a transposed convolution, of those that it gives.
        block: of the weight's first two axes, within one group. Default: all channels.
        exact: True to raise where only an estimate is possible.

    Raises:
        ValueError: if the module does not take the domain, or is not finite; with ``exact``, if the module
            is not periodic and its dense matrix has more than ``2^27`` entries.
    """
    with parametrize.cached():  # a parametrized weight is computed once
        on_torus = periodic(module, domain)
        forward = Forward(module, domain, block)
        entries = forward.rows * forward.columns
        if entries <= _DENSE:
            return _of_matrix(forward.matrix())
        if on_torus is not None:
            on_torus = on_torus if block is None else on_torus.block(block)
            values = on_torus.singular_values()
            return Measured.of(values.min().item(), values.max().item(), on_torus.gain(), False)
        if exact:
            check_entries(forward)
            return _of_matrix(forward.matrix())
        return _estimated(forward)


def check_entries(forward: Forward) -> None:
    """Raise if an operator's dense matrix is too large to be decomposed.

    Raises:
        ValueError: if it has more than ``2^27`` entries.
    """
    if forward.rows * forward.columns > _LARGEST:
        raise ValueError(
            "domain should be smaller: the dense matrix of a module that is not periodic should have at "
            f"most {_LARGEST} entries. Found {forward.rows} x {forward.columns}. (report estimates the "
            "extreme singular values of larger ones.)"
        )


def kept(forward: Forward, steps: tuple[int, ...]) -> tuple[float, ...]:
    """Measure how much of the norm of random images some steps of the operator leave.

    Args:
        forward: the operator.
        steps: in ascending order. Those after the first are left out if the operator does not map images
            to images of the same size and channels.

    Returns:
        For each number of steps, the norm afterwards, over that which a (semi-)orthogonal operator leaves.
    """
    x = forward.random(_IMAGES, forward.taken)
    before, done, found = x.norm() * min(1.0, sqrt(forward.rows / forward.columns)), 0, []
    for number in steps if forward.taken == forward.given else steps[:1]:
        for _ in range(number - done):
            x = forward.apply_to_each(x)
        done = number
        found.append((x.norm() / before).item())
    return tuple(found)


def _of_matrix(M: Tensor) -> Measured:
    values = torch.linalg.svdvals(M)
    gain = values.square().mean().sqrt().item()
    return Measured.of(values.min().item(), values.max().item(), gain, False)


def _estimated(forward: Forward) -> Measured:
    smallest, largest = lanczos.extremes(forward)
    if forward.columns <= forward.rows:
        x = forward.random(_IMAGES, forward.taken)
        y = forward.apply_to_each(x)
    else:
        x = forward.random(_IMAGES, forward.given)
        y = torch.stack([forward.adjoint(image) for image in x])
    return Measured.of(smallest, largest, (y.norm() / x.norm()).item(), True)
