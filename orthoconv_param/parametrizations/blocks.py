r"""`Blocks`: a kernel of which some blocks of channels are exponentials, and the rest is free.

A recurrent cell with gates stacks the kernels that act on its input and on its state in one weight. Of its
operator, on a torus with frequencies ``w``,

    M(w)[rows_b, columns_b] = Q_b(w),

each ``Q_b`` square and unitary; elsewhere ``M`` is the spectrum of ordinary taps. The blocks are alike, so
they are the groups of one `ConvExponential`.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import runtime
from ..checks import Size, at_least_single
from ..torus.boundary import crop
from ..torus.lattice import Lattice
from .exponential import ConvExponential

Block: TypeAlias = tuple[slice, slice]


class Blocks(nn.Module):
    """Parametrizes a convolution's weight: blocks of it by an exponential, the rest by itself.

    Args:
        exponential: of the stacked blocks, one for each group, on a given domain.
        blocks: of the weight's first two axes: pairs of slices, all square and alike, each within one
            group of the convolution, none of them overlapping.
        size: of the weight, ``(out, in/groups, *taps)``.
        groups: of the convolution.

    Raises:
        TypeError, ValueError: if the blocks are not as above.
    """

    def __init__(self, exponential: ConvExponential, blocks: list[Block], size: Size, groups: int) -> None:
        super().__init__()
        self.exponential = exponential
        self.blocks = resolve_blocks(blocks, size, groups)
        self.size = tuple(size)
        self.groups = groups
        exponential.context["blocks"] = self.extra_repr()
        free = torch.ones(size[0], size[1], dtype=torch.bool)
        for rows, columns in self.blocks:
            free[rows, columns] = False
        # The other pairs of channels, among all of them. No buffer: `to_empty` would fill it with anything,
        # and vmap of an ensemble would batch it, for which indexing (torch 2.13) gives wrong results.
        self._others = free.flatten().nonzero().flatten()

    def reads_more_of(self, images: Size) -> bool:
        """Return False: the kernel is that of a given domain."""
        return False

    def difference(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Say in what a checkpoint is of something else; None if in nothing that it tells."""
        return self.exponential.difference(state_dict, prefix + "exponential.")

    @property
    def taps(self) -> Size:
        """Taps of the weight: one for each point of the torus."""
        return self.exponential.taps

    @runtime.in_full_precision
    def forward(self, X: Tensor, rest: Tensor | None = None) -> Tensor:
        """Return the kernel of a generator of the blocks and the taps of the rest.

        Args:
            X: the generator, ``(blocks * channels, channels, *taps)``.
            rest: ``(pairs, 1, *taps)``, the free taps of each other pair of channels in the order of the
                weight; None if there is no other.

        Returns:
            ``(out, in/groups, *torus)``.
        """
        lattice, M = self.spectrum((X,) if rest is None else (X, rest))
        return lattice.kernel(M).to(X.dtype).contiguous()

    @runtime.in_full_precision
    def spectrum(
        self, X: tuple[Tensor, ...], images: Size | None = None, dilation: Size = ()
    ) -> tuple[Lattice, Tensor]:
        """Return the matrices of the kernel and their lattice, as `ConvExponential.spectrum`."""
        lattice, Q = self.exponential.spectrum(X[0])
        whole = self._whole(lattice)
        phases = prod(whole.stride)
        out, cin = self.size[:2]
        M = Q.new_zeros(whole.frequencies, out * cin, phases)
        if len(X) > 1:
            alone = Lattice(whole.domain, whole.stride, 1, whole.is_complex)
            rest = alone.spectrum(at_least_single(X[1]), self.exponential.placement)
            M[:, self._free(M.device)] = rest.squeeze(0).to(M.dtype)
        pairs = M.unflatten(1, (out, cin))
        for (rows, columns), block in zip(self.blocks, Q, strict=True):
            pairs[:, rows, columns] = block.unflatten(-1, (-1, phases))
        M = M.reshape(whole.frequencies, self.groups, out // self.groups, cin * phases)
        return whole, M.movedim(1, 0).contiguous()

    @torch.no_grad()
    def right_inverse(self, W: Tensor) -> tuple[Tensor, ...]:
        """Return the generator and the rest whose kernel is ``W``, its blocks made orthogonal.

        Raises:
            TypeError, ValueError: as `ConvExponential.right_inverse`; and if, outside of the blocks, ``W``
                has taps where the weight had none.
        """
        rest = self._rest(W)
        return (self.exponential.right_inverse(self.stacked(W)), *rest)

    @torch.no_grad()
    def preimage(self, W: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return what `right_inverse` returns, and the buffers that it sets; change nothing."""
        rest = self._rest(W)
        generator, buffers = self.exponential.preimage(self.stacked(W))
        return (generator, *rest), {f"exponential.{name}": value for name, value in buffers.items()}

    def loaded(self, generator: Tensor) -> None:
        """Take note of a generator that has been loaded."""
        self.exponential.loaded(generator)

    def stacked(self, W: Tensor) -> Tensor:
        """Return the blocks of a weight, one after the other along its first axis."""
        return torch.cat([W[rows, columns] for rows, columns in self.blocks])

    def extra_repr(self) -> str:
        """Say what ``print`` says of it."""
        return ", ".join(f"[{r.start}:{r.stop}, {c.start}:{c.stop}]" for r, c in self.blocks)

    def _free(self, device: torch.device) -> Tensor:
        if device.type == "meta":  # from which it would not come back
            return self._others.to(device)
        if self._others.device != device:
            self._others = self._others.to(device)
        return self._others

    def _whole(self, lattice: Lattice) -> Lattice:
        return Lattice(lattice.domain, lattice.stride, self.groups, lattice.is_complex)

    def _rest(self, W: Tensor) -> tuple[Tensor, ...]:
        if W.ndim != len(self.size) or tuple(W.shape[:2]) != self.size[:2]:
            raise ValueError(f"the weight should be of size {self.size}. Found {tuple(W.shape)}")
        if not bool(torch.isfinite(W).all()):
            raise ValueError("the weight should be finite. Found nan or inf")
        if not len(self._others):
            return ()
        rest = W.flatten(0, 1)[self._free(W.device)].unsqueeze(1)
        if W.shape[2:] == self.size[2:]:
            return (rest,)
        taps = crop(rest, self.size[2:], self.exponential.placement)
        lost = (rest.norm() ** 2 - taps.norm() ** 2).clamp(min=0).sqrt()
        if lost > 1e-3 * rest.norm():
            raise ValueError(
                f"outside of its blocks the weight should have the taps of a {self.size[2:]} kernel only. "
                f"Found others, of norm {lost:.1e}"
            )
        return (taps,)


def resolve_blocks(blocks: list[Block], size: Size, groups: int) -> list[Block]:
    """Return blocks with their starts and ends.

    Raises:
        TypeError, ValueError: if they are not pairs of slices, all square and alike, each within one of
            the groups, none overlapping.
    """
    resolved: list[Block] = []
    for block in blocks:
        pair = isinstance(block, (tuple, list)) and len(block) == 2
        if not pair or not all(isinstance(part, slice) for part in block):
            raise TypeError(f"blocks should be pairs of slices (out, in). Found {block!r}")
        ends = [part.indices(n) for part, n in zip(block, size, strict=False)]
        ranges = [range(*end) for end in ends]
        outside = any((part.stop or 0) > n for part, n in zip(block, size, strict=False))
        sides = [len(r) for r in ranges]
        if outside or any(r.step != 1 for r in ranges) or sides[0] != sides[1] or not sides[0]:
            raise ValueError(
                f"blocks should be square, within the weight's {size[0]} x {size[1]} channels and of step "
                f"1. Found {block!r}, {sides[0]} x {sides[1]}"
            )
        height = size[0] // groups
        if ranges[0].start // height != ranges[0][-1] // height:
            raise ValueError(f"blocks should each be within one of the {groups} groups. Found {block!r}")
        rows, columns = (slice(r.start, r.stop) for r in ranges)
        resolved.append((rows, columns))
    if not resolved:
        raise ValueError("blocks should be at least one pair of slices. Found none")
    first = resolved[0][0]
    for rows, _ in resolved:
        if rows.stop - rows.start != first.stop - first.start:
            raise ValueError(f"blocks should all be of one size. Found {first} and {rows}")
    for i, (rows, columns) in enumerate(resolved):
        for others, across in resolved[:i]:
            if _overlap(rows, others) and _overlap(columns, across):
                raise ValueError(
                    f"blocks should not overlap. Found {(others, across)} and {(rows, columns)}"
                )
    return resolved


def _overlap(a: slice, b: slice) -> bool:
    return a.start < b.stop and b.start < a.stop
