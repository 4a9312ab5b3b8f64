r"""A split kernel between walls, applied: the zero-padded convolution, and what its edges take.

Let ``Z`` be the zero-padded convolution of a line, and ``E`` what its two ends add, so that
``X = Z_x + E_x`` is the first line between walls, and ``Y = Z_y + E_y`` the second. Their product is

    Y X = Z_y Z_x + Z_y E_x + E_y X,

of which the first term is the zero-padded convolution with the whole kernel. The others read and write
strips along the walls only: each line's strips go through the lines before it, between walls, through its
own ends, and through the lines after it, zero-padded. A frame of patches comes last. The transpose has the
lines in the opposite order, and the frame first.

TorchScript compiles the functions of this file: what removal leaves runs them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Size
from ..torus.geometry import Geometry, convolve, convolve_transposed
from .chain import Chain, Factors
from .compose import lines, weight
from .walls import Walled, between_walls


class Mended(NamedTuple):
    """A kernel between walls, in the form in which it is applied.

    Args:
        weight: ``(out, in/groups, *taps)``.
        kernels: of the lines, ``(groups * rows, columns, taps)``.
        ends: of the lines, see `Walled`.
        shorts: of the lines, likewise.
        frame: of patches, ``(out, m, *patch)``; empty if there is none.
        axes: of space, of the lines.
    """

    weight: Tensor
    kernels: list[Tensor]
    ends: list[Tensor]
    shorts: list[list[Tensor]]
    frame: Tensor
    axes: list[int]


def mended(chain: Chain, factors: Factors, transposed: bool) -> Mended:
    """Return a kernel between walls, or its transpose."""
    of_lines = lines(chain, factors)
    walled = [between_walls(line) for line in of_lines]
    W = weight(chain, factors, of_lines, [line.kernel for line in walled])
    frame = W.new_empty(0)
    if chain.is_strided and walled:
        frame = factors.coins[-1].flatten(0, 1).unflatten(1, (-1, *chain.patch)).contiguous()
    if transposed:
        walled = [_transposed(line) for line in reversed(walled)]
    kernels = [line.kernel.transpose(2, 3).flatten(0, 1).contiguous() for line in walled]
    return Mended(
        W, kernels, [line.ends for line in walled], [[*line.short] for line in walled], frame,
        [line.axis for line in walled],
    )  # fmt: skip


def _transposed(line: Walled) -> Walled:
    """Return the transpose of a line, which is a line with matrices in the opposite order."""
    kernel = line.kernel.transpose(1, 3).flip(2)
    return Walled(line.axis, kernel, line.ends.mT, tuple(E.mT for E in line.short))


def convolved_to(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    size: list[int],
) -> Tensor:
    """Return the transposed convolution that gives images of a size."""
    rest = [0] * len(stride)
    for axis in range(len(stride)):
        least = (x.size(axis + 2) - 1) * stride[axis] - 2 * padding[axis]
        rest[axis] = size[axis] - least - dilation[axis] * (weight.size(axis + 2) - 1) - 1
    return convolve_transposed(x, weight, stride, padding, rest, dilation, groups)


def zero_padded(x: Tensor, kernel: Tensor, axis: int, dilation: list[int], groups: int) -> Tensor:
    """Return the zero-padded convolution of a line along its axis of space."""
    r = dilation[axis]
    last = x.dim() - 1  # (an exporter to ONNX takes no negative axes)
    x = x.movedim(axis + 2, last).movedim(1, last - 1)  # channels and axis last
    shape, count = list(x.shape), 1
    for n in shape[:-2]:
        count *= n
    padding, rows = [r * (kernel.size(2) // 2)], kernel.size(0)
    lines = x.reshape(count, shape[-2], shape[-1])
    y = torch.conv1d(lines, kernel, None, [1], padding, [r], groups)
    size = shape[:-2]
    size.extend([rows, shape[-1]])
    return y.reshape(size).movedim(last - 1, 1).movedim(last, axis + 2)


def at_ends(strips: Tensor, matrices: Tensor, axis: int, dilation: int) -> Tensor:
    """Return what the ends of a line add to its strips.

    Args:
        strips: ``(ends * batch, channels, *size)``, which on the axis are as wide as the matrices.
        matrices: ``(ends, groups, rows, columns)``.
        axis: of space.
        dilation: on this axis: pixels so far apart are on one line.
    """
    ends, groups = matrices.size(0), matrices.size(1)
    at = axis + 2
    shape = strips.shape
    pixels = shape[at] // dilation
    # (ends, batch, groups, columns, before, pixels, lines, after)
    before, after = 1, 1
    for n in shape[2:at]:
        before *= n
    for n in shape[at + 1 :]:
        after *= n
    batch, rows = shape[0] // ends, matrices.size(2) // pixels
    x = strips.reshape(ends, batch, groups, shape[1] // groups, before, pixels, dilation, after)
    rest = batch * before * dilation * after
    x = x.permute(0, 2, 3, 5, 1, 4, 6, 7).reshape(ends * groups, matrices.size(3), rest)
    y = torch.bmm(matrices.flatten(0, 1), x)
    y = y.reshape(ends, groups, rows, pixels, batch, before, dilation, after).permute(
        0, 4, 1, 2, 5, 3, 6, 7
    )
    size = list(shape)
    size[1] = groups * rows
    return y.reshape(size)


def take(x: Tensor, axis: int, width: int) -> Tensor:
    """Return the first and the last strip of images, one after the other in the batch."""
    at = axis + 2
    return torch.cat([x.narrow(at, 0, width), x.narrow(at, x.size(at) - width, width)])


def both(strips: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last strips of `take`."""
    return strips.narrow(0, 0, batch), strips.narrow(0, batch, batch)


def put(y: Tensor, strips: Tensor, axis: int) -> Tensor:
    """Return images with strips added to the first and the last pixels."""
    at, width = axis + 2, strips.size(axis + 2)
    first, last = both(strips, y.size(0))
    rest = y.size(at) - width
    after = [0, 0] * (y.dim() - 1 - at)
    before = after[:]
    after.extend([0, rest])
    before.extend([rest, 0])
    return y + F.pad(first, after) + F.pad(last, before)


def between(
    x: Tensor, kernel: Tensor, ends: Tensor, shorts: list[Tensor], axis: int, dilation: list[int]
) -> Tensor:
    """Return what a line does to images between walls."""
    y = zero_padded(x, kernel, axis, dilation, ends.size(1))
    n, r = x.size(axis + 2), dilation[axis]
    width = len(shorts) * r
    if n >= width:
        return put(y, at_ends(take(x, axis, width), ends, axis, r), axis)
    for first in range(min(r, n)):
        index = torch.arange(first, n, r, device=x.device)
        part = x.index_select(axis + 2, index)
        y = y.index_add(axis + 2, index, at_ends(part, shorts[len(index) - 1].unsqueeze(0), axis, 1))
    return y


def patched(x: Tensor, frame: Tensor, stride: list[int], groups: int, transposed: bool) -> Tensor:
    """Return the coarse images of the patches of fine ones; transposed, the fine of coarse ones."""
    axes = len(stride)
    none, ones = [0] * axes, [1] * axes
    if not transposed:
        return convolve(x, frame, stride, none, ones, groups)
    size = [x.size(axis + 2) * stride[axis] for axis in range(axes)]
    return convolved_to(x, frame, stride, none, ones, groups, size)


def take_fine(x: Tensor, axis: int, width: int, frame: Tensor, stride: list[int], groups: int) -> Tensor:
    """Return the strips, on the fine grid, of images on the coarse one."""
    at, s = axis + 2, stride[axis]
    fine = patched(take(x, axis, (width + s - 1) // s), frame, stride, groups, True)
    first, last = both(fine, x.size(0))
    return torch.cat([first.narrow(at, 0, width), last.narrow(at, last.size(at) - width, width)])


def put_coarse(
    y: Tensor, strips: Tensor, axis: int, frame: Tensor, stride: list[int], groups: int
) -> Tensor:
    """Return images on the coarse grid with strips on the fine one added."""
    missing = -strips.size(axis + 2) % stride[axis]
    to_first, to_last = [0, 0] * (len(stride) - axis - 1), [0, 0] * (len(stride) - axis - 1)
    to_first.extend([0, missing])
    to_last.extend([missing, 0])
    first, last = both(strips, y.size(0))
    padded = torch.cat([F.pad(first, to_first), F.pad(last, to_last)])
    return put(y, patched(padded, frame, stride, groups, False), axis)


def through(
    x: Tensor,
    matrices: Tensor,
    i: int,
    spacing: int,
    kernels: list[Tensor],
    ends: list[Tensor],
    shorts: list[list[Tensor]],
    axes: list[int],
    dilation: list[int],
) -> Tensor:
    """Return strips after the lines before a line, its ends, and the lines after it.

    Args:
        x: the strips.
        matrices: of the ends.
        i: which line.
        spacing: of pixels of one line, in the strips.
        kernels: see `Mended`, like those that follow.
        ends: of the lines.
        shorts: of the lines.
        axes: of the lines.
        dilation: of the convolution.
    """
    for j in range(i):
        x = between(x, kernels[j], ends[j], shorts[j], axes[j], dilation)
    x = at_ends(x, matrices, axes[i], spacing)
    for j in range(i + 1, len(axes)):
        x = zero_padded(x, kernels[j], axes[j], dilation, ends[j].size(1))
    return x


def mend(
    x: Tensor,
    y: Tensor,
    kernels: list[Tensor],
    ends: list[Tensor],
    shorts: list[list[Tensor]],
    frame: Tensor,
    axes: list[int],
    stride: list[int],
    dilation: list[int],
    transposed: bool,
) -> Tensor:
    """Return ``y``, the zero-padded convolution of ``x``, with what its edges take.

    Args:
        x: images, ``(batch, channels, *size)``.
        y: likewise.
        kernels: see `Mended`, like those that follow.
        ends: of the lines.
        shorts: of the lines.
        frame: of patches.
        axes: of the lines.
        stride: of the convolution.
        dilation: of the convolution.
        transposed: whether it is transposed.
    """
    patches = frame.numel() > 0
    for i in range(len(axes)):
        axis, r, groups = axes[i], dilation[axes[i]], ends[i].size(1)
        n, width = x.size(axis + 2), len(shorts[i]) * r
        if patches and transposed:
            n *= stride[axis]
        if n >= width:
            if patches and transposed:
                part = take_fine(x, axis, width, frame, stride, groups)
            else:
                part = take(x, axis, width)
            part = through(part, ends[i], i, r, kernels, ends, shorts, axes, dilation)
            if patches and not transposed:
                y = put_coarse(y, part, axis, frame, stride, groups)
            else:
                y = put(y, part, axis)
            continue
        whole = patched(x, frame, stride, groups, True) if patches and transposed else x
        for first in range(min(r, n)):
            index = torch.arange(first, n, r, device=x.device)
            matrices = shorts[i][len(index) - 1].unsqueeze(0)
            part = whole.index_select(axis + 2, index)
            part = through(part, matrices, i, 1, kernels, ends, shorts, axes, dilation)
            size = list(part.shape)
            size[axis + 2] = n
            added = part.new_zeros(size).index_add(axis + 2, index, part)
            if patches and not transposed:
                added = patched(added, frame, stride, groups, False)
            y = y + added
    return y


def pads(taps: Size, geometry: Geometry) -> list[int]:
    """Return by how much images are padded before a kernel of so many taps is applied."""
    axes = zip(taps, geometry.stride, geometry.dilation, geometry.placement.origin, strict=True)
    return [r * (k // 2) if s == 1 else origin for k, s, r, origin in axes]
