"""`Partition`: which blocks of a weight are made by a parametrization, and what is left free."""

from typing import TypeAlias

import torch
from torch import Tensor

from ..checks import Size

Block: TypeAlias = tuple[slice, slice]


class Partition:
    """Blocks of a weight's first two axes, and the other pairs of channels.

    Args:
        blocks: pairs of slices, all alike, each within one group of the convolution, none of them
            overlapping.
        size: of the weight, ``(out, in/groups, *taps)``.
        groups: of the convolution.

    Raises:
        TypeError, ValueError: if the blocks are not as above.
    """

    def __init__(self, blocks: list[Block], size: Size, groups: int) -> None:
        self.blocks = resolve_blocks(blocks, size, groups)
        self.size = tuple(size)
        self.groups = groups
        free = torch.ones(size[0], size[1], dtype=torch.bool)
        for rows, columns in self.blocks:
            free[rows, columns] = False
        # The other pairs of channels, among all of them. No buffer: `to_empty` would fill it with anything,
        # and vmap of an ensemble would batch it, for which indexing (torch 2.13) gives wrong results.
        self._others = free.flatten().nonzero().flatten()

    @property
    def part(self) -> tuple[int, int, int]:
        """Channels out and in, and groups, of the stacked blocks."""
        rows, columns = self.blocks[0]
        count = len(self.blocks)
        return count * (rows.stop - rows.start), columns.stop - columns.start, count

    @property
    def is_all(self) -> bool:
        """Return True if nothing is left free."""
        return not len(self._others)

    def stacked(self, W: Tensor) -> Tensor:
        """Return the blocks of a weight, one after the other along its first axis."""
        return torch.cat([W[rows, columns] for rows, columns in self.blocks])

    def rest(self, W: Tensor) -> Tensor:
        """Return the other taps of a weight, ``(pairs, 1, *taps)``, in its order."""
        self.check(W)
        return W.flatten(0, 1)[self.free(W.device)].unsqueeze(1)

    def check(self, W: Tensor) -> None:
        """Raise if a tensor cannot be the weight.

        Raises:
            ValueError: then.
        """
        if W.ndim != len(self.size) or tuple(W.shape[:2]) != self.size[:2]:
            raise ValueError(f"the weight should be of size {self.size}. Found {tuple(W.shape)}")
        if not bool(torch.isfinite(W).all()):
            raise ValueError("the weight should be finite. Found nan or inf")

    def assembled(self, blocks: Tensor, rest: Tensor | None) -> Tensor:
        """Return the weight of stacked blocks and other taps; zeros where these are None."""
        taps = tuple(blocks.shape[2:])
        W = blocks.new_zeros(self.size[0] * self.size[1], *taps)
        if rest is not None:
            W[self.free(W.device)] = rest.squeeze(1).to(W.dtype)
        W = W.unflatten(0, self.size[:2])
        for (rows, columns), block in zip(self.blocks, blocks.chunk(len(self.blocks)), strict=True):
            W[rows, columns] = block
        return W

    def free(self, device: torch.device) -> Tensor:
        """Return the places of the other pairs of channels, among all of them."""
        if device.type == "meta":  # from which it would not come back
            return self._others.to(device)
        if self._others.device != device:
            self._others = self._others.to(device)
        return self._others

    def channels(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the convolution's channels out, and in, of each block."""
        height, width = self.size[0] // self.groups, self.size[1]
        out, into = [], []
        for rows, columns in self.blocks:
            shift = rows.start // height * width
            out.append([*range(rows.start, rows.stop)])
            into.append([*range(columns.start + shift, columns.stop + shift)])
        return out, into

    def __str__(self) -> str:
        return ", ".join(f"[{r.start}:{r.stop}, {c.start}:{c.stop}]" for r, c in self.blocks)


def resolve_blocks(blocks: list[Block], size: Size, groups: int) -> list[Block]:
    """Return blocks with their starts and ends.

    Raises:
        TypeError, ValueError: if they are not pairs of slices, all alike, each within one of the groups,
            none overlapping.
    """
    resolved: list[Block] = []
    for block in blocks:
        pair = isinstance(block, (tuple, list)) and len(block) == 2
        if not pair or not all(isinstance(part, slice) for part in block):
            raise TypeError(f"blocks should be pairs of slices (out, in). Found {block!r}")
        ends = [part.indices(n) for part, n in zip(block, size, strict=False)]
        ranges = [range(*end) for end in ends]
        outside = any((part.stop or 0) > n for part, n in zip(block, size, strict=False))
        if outside or any(r.step != 1 or not len(r) for r in ranges):
            raise ValueError(
                f"blocks should be within the weight's {size[0]} x {size[1]} channels, not empty and of "
                f"step 1. Found {block!r}.{_separate(block, size)}"
            )
        height = size[0] // groups
        if ranges[0].start // height != ranges[0][-1] // height:
            raise ValueError(f"blocks should each be within one of the {groups} groups. Found {block!r}")
        rows, columns = (slice(r.start, r.stop) for r in ranges)
        resolved.append((rows, columns))
    if not resolved:
        raise ValueError("blocks should be at least one pair of slices. Found none")
    first = resolved[0]
    for block in resolved:
        if _sides(block) != _sides(first):
            raise ValueError(f"blocks should all be of one size. Found {first} and {block}")
    for i, (rows, columns) in enumerate(resolved):
        for others, across in resolved[:i]:
            if _overlap(rows, others) and _overlap(columns, across):
                raise ValueError(
                    f"blocks should not overlap. Found {(others, across)} and {(rows, columns)}"
                )
    return resolved


def _separate(block: Block, size: Size) -> str:
    """Say what to do with a convolution that is that of one gate."""
    rows, columns = block
    if (rows.start or 0) >= size[0] and (columns.stop or 0) <= size[1]:
        return f" If each gate has a convolution of its own, each has one block: gate_blocks({size[0]}, 1)"
    return ""


def _sides(block: Block) -> tuple[int, int]:
    rows, columns = block
    return rows.stop - rows.start, columns.stop - columns.start


def _overlap(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop
