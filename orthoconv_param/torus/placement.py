"""Where the taps of a kernel stand, relative to the output's position."""

from dataclasses import dataclass
from math import ceil

import torch.nn.functional as F
from torch import Tensor

from ..checks import Size


def centre(taps: int) -> int:
    """Index of the tap that multiplies the output's own position, for "same" padding."""
    return (taps - 1) // 2


@dataclass(frozen=True)
class Placement:
    """Where a kernel's taps stand: tap ``d`` multiplies the sample ``dilation * d - origin`` away.

    Args:
        dilation: of the kernel.
        origin: how far before the output's position the first tap stands: the padding on that side.
    """

    dilation: Size
    origin: Size

    @classmethod
    def centred(cls, taps: Size, dilation: Size | None = None) -> "Placement":
        """The centre tap at the output's own position."""
        dilation = dilation or (1,) * len(taps)
        return cls(dilation, tuple(r * centre(k) for k, r in zip(taps, dilation, strict=True)))

    def dilated(self, factors: Size) -> "Placement":
        """The taps further apart by these factors."""
        scaled = (
            tuple(a * r for a, r in zip(x, factors, strict=True)) for x in (self.dilation, self.origin)
        )
        return Placement(*scaled)

    def extent(self, taps: Size) -> Size:
        """How many samples a kernel spans, from its first tap to its last."""
        return tuple(r * (k - 1) + 1 for k, r in zip(taps, self.dilation, strict=True))

    def after(self, taps: Size) -> Size:
        """How far after the output's position the last tap stands: the padding on that side."""
        return tuple(n - 1 - o for n, o in zip(self.extent(taps), self.origin, strict=True))

    def reversed(self, taps: Size) -> "Placement":
        """Of the kernel with its taps in reverse order, which stand on the other side of the origin."""
        return Placement(self.dilation, self.after(taps))

    def reach(self, taps: Size, stride: Size) -> Size:
        """How far from its centre a kernel goes, in coarse points: the larger of the two sides."""
        sides = zip(self.origin, self.after(taps), stride, strict=True)
        return tuple(max(ceil(before / s), after // s) for before, after, s in sides)


def spread(kernel: Tensor, axis: int, dilation: int) -> Tensor:
    """The kernel with zeros after each of its taps."""
    if dilation == 1:
        return kernel
    after = (0, 0) * (kernel.ndim - axis - 1)  # for `pad`, which begins with the last axis
    return F.pad(kernel.unsqueeze(axis + 1), (*after, 0, dilation - 1)).flatten(axis, axis + 1)


# Transforms along one axis of ``(*axes, channels)``. With few taps they are products with a matrix, which
# writes the frequencies where they belong; a fast transform would have to be given zeros between the taps.
