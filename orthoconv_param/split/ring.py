r"""Kernels of 3x3 taps between walls, on images of two axes, in few operations.

With the further taps of `fast.with_ends`, what the walls add is

    y[p] += sum_d E_f[d] x[p + d]   along each of the four walls f,    y[c] += E_c x[c]   at the corners,

so that all walls are one batched product. The gradient is written by hand: it adds along the walls
in place, where torch's own would copy the image for each of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime
from ..matrices import by_hand


class Ring(NamedTuple):
    """A kernel between walls.

    Args:
        weight: ``(out, in/groups, 3, 3)``.
        walls: of the first and last pixels on the first axis, and on the second,
            ``(4 * groups, rows, 3 * columns)``.
        corners: first and first, first and last, last and first, last and last,
            ``(4 * groups, rows, columns)``.
        groups: of the convolution.
    """

    weight: Tensor
    walls: Tensor
    corners: Tensor
    groups: int

    def to(self, dtype: torch.dtype) -> "Ring":
        """Return it in another precision."""
        return Ring(self.weight.to(dtype), self.walls.to(dtype), self.corners.to(dtype), self.groups)

    @classmethod
    def of(cls, V: Tensor, groups: int, transposed: bool) -> "Ring":
        """Return the kernel of a weight with ends, ``(out, in/groups, 5, 5)``, or its transpose."""
        V = V.unflatten(0, (groups, -1))
        if transposed:
            V = V.transpose(1, 2)[..., _REVERSED, :][..., _REVERSED]
        weight = V[..., :3, :3].flatten(0, 1).contiguous()
        # each (groups, rows, columns, taps)
        walls = torch.stack([V[..., 3, :3], V[..., 4, :3], V[..., :3, 3], V[..., :3, 4]]).mT
        corners = V[..., 3:, 3:].flatten(3).movedim(3, 0)
        return cls(weight, walls.flatten(3).flatten(0, 1), corners.flatten(0, 1).contiguous(), groups)


_REVERSED = [2, 1, 0, 3, 4]  # taps of the transpose


def apply(ring: Ring, x: Tensor) -> Tensor:
    """Apply a kernel between walls to images ``(batch, channels, height, width)``."""
    rule = _Ringed(ring.groups)
    if x.is_complex():  # torch convolves these part by part
        return rule.plain(x, ring.weight, ring.walls, ring.corners)
    return by_hand.apply(rule, x, ring.weight, ring.walls, ring.corners)


class _Ringed:
    """The rule of `apply`."""

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the images."""
        return self.value(*inputs)[0]

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the images, and the neighbourhoods of the pixels along the walls."""
        x, weight, walls, corners = inputs
        y = F.conv2d(x, weight, padding=1, groups=self.groups)
        strips, at_corners = self._strips(x)
        neighbours = self._neighbours(strips)
        added = torch.bmm(walls, neighbours).view(4, -1, len(x), strips.shape[-1])
        self._add_corners(added, torch.bmm(corners, at_corners), x.shape)
        return _put(y, added), (neighbours, at_corners)

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients by images, weight, walls and corners."""
        x, weight, walls, corners = inputs
        neighbours, at_corners = kept
        dx, dweight = runtime.convolution_gradients(G, x, weight, [1, 1], self.groups, needed[:2])
        g, g_corners = self._strips(G)
        flat = g.reshape(len(walls), -1, neighbours.shape[-1])
        dwalls = torch.bmm(flat, _adjoint(neighbours)) if needed[2] else None
        dcorners = torch.bmm(g_corners, _adjoint(at_corners)) if needed[3] else None
        if dx is not None:
            taps = torch.bmm(_adjoint(walls), flat)
            taps = taps.view(4, self.groups, 3, -1, len(x), g.shape[-1])
            added = taps[:, :, 1].flatten(1, 2)
            added[..., :-1] += taps[:, :, 0, ..., 1:].flatten(1, 2)
            added[..., 1:] += taps[:, :, 2, ..., :-1].flatten(1, 2)
            self._add_corners(added, torch.bmm(_adjoint(corners), g_corners), x.shape)
            dx = _put(dx, added)
        return dx, dweight, dwalls, dcorners

    def _strips(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels along the walls, ``(4, channels, batch, length)``, and at the corners.

        Walls of two lengths are continued by zeros. Corners are ``(4 * groups, channels/group, batch)``.
        """
        t, (height, width) = x.transpose(0, 1), x.shape[2:]
        rows, columns = t[:, :, :: max(height - 1, 1)], t[..., :: max(width - 1, 1)].mT
        if height == 1:
            rows = rows.expand(-1, -1, 2, -1)
        if width == 1:
            columns = columns.expand(-1, -1, 2, -1)
        corners = rows[..., :: max(width - 1, 1)].expand(-1, -1, 2, 2).flatten(2).movedim(2, 0)
        corners = corners.reshape(4 * self.groups, -1, len(x))
        if height != width:
            length = max(height, width)
            rows, columns = F.pad(rows, (0, length - width)), F.pad(columns, (0, length - height))
        return torch.cat([rows, columns], 2).movedim(2, 0).contiguous(), corners

    def _neighbours(self, strips: Tensor) -> Tensor:
        """Return the pixels before, at and after each of a strip, ``(4 * groups, 3 * columns, rest)``."""
        x = F.pad(strips, (1, 1)).unflatten(1, (self.groups, -1))
        n = strips.shape[-1]
        taps = torch.stack([x[..., t : t + n] for t in range(3)], 2)
        return taps.reshape(4 * self.groups, -1, strips.shape[2] * n)

    def _add_corners(self, added: Tensor, corners: Tensor, size: torch.Size) -> None:
        """Add what corners take to the ends of the strips on the first axis."""
        corners = corners.view(2, 2, -1, size[0])
        added[:2, ..., 0] += corners[:, 0]
        added[:2, ..., size[3] - 1] += corners[:, 1]


def _put(y: Tensor, strips: Tensor) -> Tensor:
    """Add strips along the walls of images, in place."""
    t, (height, width) = y.transpose(0, 1), y.shape[2:]
    t[:, :, 0] += strips[0, ..., :width]
    t[:, :, height - 1] += strips[1, ..., :width]
    t[..., 0] += strips[2, ..., :height]
    t[..., width - 1] += strips[3, ..., :height]
    return y


def _adjoint(X: Tensor) -> Tensor:
    return X.mH.resolve_conj() if X.is_complex() else X.mT
