r"""The skew kernel of a generator, on the coarse grid, and the images on which it acts.

A convolution of stride ``s`` is one of stride 1 between polyphase components. Padded by zeros to
``m = max(out, in * s^d)`` channels in each group it is square, and its skew part ``T`` is again a
convolution: of the kernel ``a = (w - w^*) / 2``, where ``w^*`` is ``w`` with its taps in reverse order, and
the adjoint of its matrix at each of them. Continued by zeros, or around a torus, ``T`` is exactly a skew
matrix on images of every size, because the adjoint of such a convolution is that with the kernel ``w^*``.

A complex matrix acts on real and imaginary parts as ``[[Re, -Im], [Im, Re]]``, which is real, and skew
where it is skew. So everything here ends in real kernels and images. TorchScript compiles the functions.
"""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Size
from ..matrices.products import adjoint, conjugate, mixed
from ..torus.geometry import Geometry
from ..torus.lattice import Placement
from ..torus.phases import join_phases, split_phases, spread


@dataclass(frozen=True)
class Layout:
    """Where a generator's taps stand in its skew kernel.

    Args:
        stride: of the convolution.
        groups: of it.
        rows: channels on the coarse side, in each group.
        columns: phases on the fine side, in each group.
        spread: with which the generator's taps are to be set apart.
        sides: taps to be added before and after them, on each axis.
        taps: of the skew kernel, an odd number on each axis.
        dilation: of it.
        is_complex: whether the generator is complex.
    """

    stride: Size
    groups: int
    rows: int
    columns: int
    spread: Size
    sides: tuple[Size, ...]
    taps: Size
    dilation: Size
    is_complex: bool

    @classmethod
    def of(cls, geometry: Geometry, placement: Placement) -> "Layout":
        """Return that of a generator, whose taps stand at a placement.

        Args:
            geometry: of the generator, which is not transposed.
            placement: of its taps.
        """
        rows, columns = geometry.lattice(geometry.stride).blocks(geometry.size)
        axes = zip(geometry.taps, placement.dilation, placement.origin, geometry.stride, strict=True)
        each = [_axis(*numbers) for numbers in axes]
        spreads, sides, taps, dilation = zip(*each, strict=True)
        return cls(
            geometry.stride, geometry.groups, rows, columns, spreads, sides, taps, dilation,
            geometry.is_complex,
        )  # fmt: skip

    @property
    def padding(self) -> Size:
        """Samples by which images are continued on each side."""
        return tuple(r * (k // 2) for k, r in zip(self.taps, self.dilation, strict=True))

    @property
    def numbers(self) -> list[list[int]]:
        """Itself, as TorchScript takes it."""
        sides = [n for side in self.sides[::-1] for n in side]
        return [
            [*self.stride], [self.groups, self.rows, self.columns], [*self.spread], sides,
            [*self.padding], [*self.dilation],
        ]  # fmt: skip


def _axis(taps: int, dilation: int, origin: int, stride: int) -> tuple[int, Size, int, int]:
    """Return of one axis: spread, sides, taps of the skew kernel, and its dilation."""
    after = dilation * (taps - 1) - origin
    if stride == 1 and origin % dilation == 0:
        before, after = origin // dilation, after // dilation
        reach = max(before, after)
        return 1, (reach - before, reach - after), 2 * reach + 1, dilation
    reach = max(-(-origin // stride), after // stride)
    before = stride * reach - origin
    return dilation, (before, stride * (2 * reach + 1) - before - dilation * taps), 2 * reach + 1, 1


def coarse_kernel(w: Tensor, numbers: list[list[int]]) -> Tensor:
    """Return a kernel on the coarse grid, ``(groups, rows, columns, *taps)``.

    Args:
        w: the kernel, ``(out, in/groups, *taps)``.
        numbers: `Layout.numbers`.
    """
    for axis in range(len(numbers[0])):
        w = spread(w, axis + 2, numbers[2][axis])
    return split_phases(F.pad(w, numbers[3]), numbers[0]).unflatten(0, [numbers[1][0], numbers[1][1]])


def skew_kernel(w: Tensor, numbers: list[list[int]]) -> list[Tensor]:
    """Return the skew kernel of a generator, real: one kernel, or two where channels differ.

    Of ``m`` rows and columns all but the first ``k = min(rows, columns)`` meet in zeros. So there are the
    first rows, ``(groups * k, m, *taps)``, and the first columns of the others, ``(groups * (m - k), k,
    *taps)``. Of a complex generator there are twice as many channels: real and imaginary parts, in turn.

    Args:
        w: the generator, ``(out, in/groups, *taps)``.
        numbers: `Layout.numbers`.
    """
    w = coarse_kernel(w, numbers) / 2
    rows, columns = numbers[1][1], numbers[1][2]
    k, rest = min(rows, columns), abs(rows - columns)
    square = w[:, :k, :k]
    square = square - adjoint_kernel(square)
    if rest == 0:
        return [as_real(square)]
    if rows < columns:
        right = w.narrow(2, k, rest)
        return [as_real(torch.cat([square, right], 2)), -as_real(adjoint_kernel(right))]
    below = w.narrow(1, k, rest)
    return [as_real(torch.cat([square, -adjoint_kernel(below)], 2)), as_real(below)]


def adjoint_kernel(w: Tensor) -> Tensor:
    """Return the kernels ``(groups, rows, columns, *taps)`` of the adjoint convolutions."""
    w = w.transpose(1, 2).flip([axis + 3 for axis in range(w.dim() - 3)])
    return conjugate(w) if w.is_complex() else w


def as_real(w: Tensor) -> Tensor:
    """Return kernels ``(groups * rows, columns, *taps)`` that do the same to real and imaginary parts."""
    if not w.is_complex():
        return w.flatten(0, 1)
    re, im = w.real, w.imag
    parts = torch.stack([torch.stack([re, -im], 3), torch.stack([im, re], 3)], 2)
    return parts.flatten(0, 2).flatten(1, 2)


def entering(x: Tensor, coin: Optional[Tensor], numbers: list[list[int]], transposed: bool) -> Tensor:  # noqa: UP045, TorchScript reads no other
    """Return images as the exponential takes them: phases of ``m`` channels in each group, real.

    Args:
        x: images, ``(batch, in, *domain)``; of a transposed convolution ``(batch, out, *grid)``.
        coin: matrices ``(groups, m, m)``. With as many rows as columns in a group, or more, they act after
            the exponential, else before.
        numbers: `Layout.numbers`.
        transposed: whether the transpose is applied. It is the conjugate of the adjoint of the conjugate.
    """
    groups, rows, columns = numbers[1][0], numbers[1][1], numbers[1][2]
    side, channels = max(rows, columns), rows if transposed else columns
    if transposed and x.is_complex():
        x = conjugate(x)
    if not transposed:
        x = split_phases(x, numbers[0])
    if side > channels:
        more = [0, 0] * len(numbers[0])
        more.extend([0, side - channels])
        x = F.pad(x.unflatten(1, [groups, channels]), more).flatten(1, 2)
    if coin is not None and (rows >= columns) == transposed:
        x = mixed(adjoint(coin) if transposed else coin, x)
    if x.is_complex():
        x = torch.stack([x.real, x.imag], 2).flatten(1, 2)
    return x


def leaving(
    x: Tensor,
    coin: Optional[Tensor],  # noqa: UP045, TorchScript reads no other
    numbers: list[list[int]],
    transposed: bool,
    is_complex: bool,
) -> Tensor:
    """Return images as the module gives them, of those that `entering` and the exponential have made."""
    groups, rows, columns = numbers[1][0], numbers[1][1], numbers[1][2]
    side, channels = max(rows, columns), columns if transposed else rows
    if is_complex:
        parts = x.unflatten(1, [groups * side, 2])
        x = torch.complex(parts.select(2, 0), parts.select(2, 1))
    if coin is not None and (rows >= columns) != transposed:
        x = mixed(adjoint(coin) if transposed else coin, x)
    if side > channels:
        x = x.unflatten(1, [groups, side]).narrow(2, 0, channels).flatten(1, 2)
    if transposed:
        x = join_phases(x, numbers[0])
    return conjugate(x) if transposed and is_complex else x
