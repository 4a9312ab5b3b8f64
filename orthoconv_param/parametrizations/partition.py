"""`Partition`: which blocks of a weight are made by a parametrization, and what is left free."""

from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..checks import Size

Block: TypeAlias = tuple[slice, slice]


class _Band(NamedTuple):
    """Rows of a weight in which the same columns are free.

    Args:
        rows: how many.
        parts: ``(columns, first)`` from left to right: how many columns, and which of the stacked blocks'
            rows begins there; None where columns are free.
    """

    rows: int
    parts: list[tuple[int, int | None]]

    @property
    def free(self) -> int:
        """How many columns are free."""
        return sum(columns for columns, first in self.parts if first is None)

    def goes_on(self, band: "_Band") -> bool:
        """Return True if a band below is alike, and has the rows of stacked blocks that come next."""
        below = [(n, None if first is None else first + self.rows) for n, first in self.parts]
        return below == band.parts


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
        self._bands = _bands(self.blocks, self.size)

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
        # Joined, not written into one tensor: that takes up to six times as long, and of many small writes
        # torch's compiler (2.13, with g++ 12 on CPUs without AVX-512) makes nan.
        taps, bands = tuple(blocks.shape[2:]), self._bands
        if rest is None:
            rest = blocks.new_zeros(len(self._others), 1, *taps)
        free = rest.squeeze(1).to(blocks.dtype).split([band.rows * band.free for band in bands])
        pieces = sorted(
            [(first, band.rows) for band in bands for _, first in band.parts if first is not None]
        )
        stacked = blocks.split([rows for _, rows in pieces])
        made = {first: rows for (first, _), rows in zip(pieces, stacked, strict=True)}
        joined = []
        for band, others in zip(bands, free, strict=True):
            widths = [columns for columns, first in band.parts if first is None]
            between = iter(others.reshape(band.rows, band.free, *taps).split(widths, 1) if widths else ())
            parts = [next(between) if first is None else made[first] for _, first in band.parts]
            joined.append(torch.cat(parts, 1))
        return torch.cat(joined) if len(joined) > 1 else joined[0]

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


def _bands(blocks: list[Block], size: Size) -> list[_Band]:
    """Return the bands of a weight, from top to bottom, as few as there can be."""
    edges = {0, size[0], *(end for rows, _ in blocks for end in (rows.start, rows.stop))}
    bands: list[_Band] = []
    for top, bottom in pairwise(sorted(edges)):
        parts: list[tuple[int, int | None]] = []
        left = 0
        across = [
            (columns, i * (rows.stop - rows.start) + top - rows.start)
            for i, (rows, columns) in enumerate(blocks)
            if rows.start <= top < rows.stop
        ]
        for columns, first in sorted(across, key=lambda part: part[0].start):
            if columns.start > left:
                parts.append((columns.start - left, None))
            parts.append((columns.stop - columns.start, first))
            left = columns.stop
        if left < size[1]:
            parts.append((size[1] - left, None))
        band = _Band(bottom - top, parts)
        if bands and bands[-1].goes_on(band):
            band = _Band(bands[-1].rows + band.rows, bands.pop().parts)
        bands.append(band)
    return bands


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
