"""`Mended`: a split kernel between walls as one convolution, whose edges are mended.

A pretrained weight on its way, and the blocks of a weight and its rest, are one convolution too.
"""

from dataclasses import replace
from math import inf
from typing import NamedTuple

from torch import Tensor

from ..checks import HALF, Size
from ..parametrizations.partition import Partition
from ..split.strips import Channels, Edges, Mending, convolve, edges
from .operator import Operator


class Prepared(NamedTuple):
    """What is prepared: how to mend, the kernel, and the matrices of its edges."""

    rule: Mending
    kernel: Tensor
    matrices: tuple[Tensor, ...]


class Mended:
    """Evaluates an operator between walls by one convolution."""

    name = "mended"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return less than `Blended`, with two axes of space, odd taps, no strides or dilation."""
        geometry, chain = operator.geometry, operator.weight.chain
        plain = (
            operator.boundary.has_walls
            and geometry.axes == 2
            and max(*geometry.stride, *geometry.dilation) == 1
            and all(k % 2 for k in geometry.taps)
            and not (geometry.transposed or geometry.is_complex)
        )
        if chain is None or not plain or not operator.weight.is_blended:
            return inf
        widths = [sum(step.axis == axis for step in chain.steps) for axis in range(2)]
        meets = any(2 * width > n for width, n in zip(widths, domain, strict=True))
        return inf if meets else 0.5

    def prepare(self, operator: Operator, domain: Size) -> Prepared:
        """Compute the kernel and its edges."""
        weight = operator.weight
        found, blend = weight.factors(), weight.blend()
        assert found is not None
        made, geometry = edges(*found), operator.geometry
        share = None if blend is None else blend.share
        kernel, matrices = made.kernel, made.matrices
        if share is not None:
            kernel, matrices = share * kernel, tuple(share * M for M in matrices)
        partition = None if blend is None else blend.partition
        if partition is not None:
            kernel = partition.assembled(kernel, None)
        if blend is not None and blend.kernel is not None:
            kernel = kernel + blend.kernel
        taken, given, matrices = _channels(partition, matrices, made, operator)
        sets = matrices[0].shape[1] if matrices else 1
        padding = geometry.placement.origin
        rule = Mending(made.strips, padding, geometry.groups, taken, given, sets, False)
        return Prepared(rule, kernel, matrices)

    def apply(self, state: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply it to images ``(batch, channels, height, width)``, and add a bias."""
        dtype = x.dtype
        if dtype in HALF:
            x, bias = x.float(), None if bias is None else bias.float()
        rule = replace(state.rule, has_bias=bias is not None)
        return convolve(rule, x, state.kernel, bias, *state.matrices).to(dtype)


def _channels(
    partition: Partition | None, matrices: tuple[Tensor, ...], made: Edges, operator: Operator
) -> tuple[Channels, Channels, tuple[Tensor, ...]]:
    """Return the channels that edges read and write, and their matrices.

    Blocks that read the same channels have one set of matrices.
    """
    geometry, device = operator.geometry, made.kernel.device
    if partition is None:
        taken, given = [*range(geometry.taken)], [*range(geometry.given)]
        return Channels(taken, device), Channels(given, device), matrices
    rows, columns = partition.channels()
    given = [i for block in rows for i in block]
    if all(block == columns[0] for block in columns):
        alike = tuple(M.flatten(1, 2).unsqueeze(1) for M in matrices)
        return Channels(columns[0], device), Channels(given, device), alike
    taken = [i for block in columns for i in block]
    return Channels(taken, device), Channels(given, device), matrices
