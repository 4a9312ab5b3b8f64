"""Boundaries: what a convolution sees beyond the edges of an image, and on which torus it is computed.

- `Circular`: the image is a torus. An operator whose matrices are unitary on it is orthogonal.
- `Zeros`: the image is continued by zeros, an operator of a larger torus is applied, and the image is cut
  out of the result. A part of an orthogonal operator has singular values of at most 1: it never expands,
  and it loses what leaves the image.
- `Walls`: nothing leaves the image. The operator is a zero-padded convolution inside, and another one at
  the edges, orthogonal on the image itself.

Kernels here are centred. With ``on_torus`` a kernel has one tap for each point of the torus that
`Boundary.torus` names, and is read modulo its size; without, it is the kernel of an infinite grid.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime
from ..checks import Size
from .geometry import Geometry, convolve, convolve_as_torch, convolve_transposed, folded, wrapped
from .lattice import Placement, centre
from .phases import spread


class Boundary(ABC):
    """What lies beyond the edges of an image."""

    name: ClassVar[str]  # as users call it
    padding_mode: ClassVar[str]  # as torch calls the padding
    is_periodic: ClassVar[bool]  # whether its operators are block diagonal in frequency
    has_walls: ClassVar[bool] = False  # whether what would leave the image is turned back

    @abstractmethod
    def torus(self, domain: Size, extent: Size, stride: Size) -> Size:
        """Return the torus on which an operator for images on a domain is made orthogonal.

        Args:
            domain: of the images.
            extent: of the generator, in samples.
            stride: of the convolution.
        """

    @abstractmethod
    def embed(
        self, kernel: Tensor, domain: Size, stride: Size, dilation: Size, on_torus: bool
    ) -> tuple[Tensor, Size]:
        """Return what of a kernel meets images on a domain, and the torus on which to apply it to them."""

    @abstractmethod
    def convolve(
        self, x: Tensor, kernel: Tensor, geometry: Geometry, domain: Size, dilation: Size, on_torus: bool
    ) -> Tensor:
        """Apply a kernel directly, by one of torch's convolutions.

        Args:
            x: images, ``(batch, channels, *size)``.
            kernel: centred.
            geometry: of the convolution, but for its taps.
            domain: the fine grid of these images.
            dilation: of the kernel.
            on_torus: see the module.
        """

    @abstractmethod
    def convolve_ordinary(self, x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
        """Apply a kernel whose taps stand where the geometry says, as torch's module does."""

    @abstractmethod
    def is_torchs(
        self, taps: Size, geometry: Geometry, dilation: Size, domain: Size | None, smallest: Size | None
    ) -> bool:
        """Return True if torch's own module computes the same, with the attributes of `attributes`.

        Args:
            taps: of the kernel.
            geometry: of the convolution.
            dilation: of the kernel.
            domain: the only one that it takes; None for every one.
            smallest: size on each axis of the images that it is fed; None if it is not known.
        """

    def attributes(self, taps: Size, geometry: Geometry, dilation: Size) -> dict[str, Any]:
        """Return the attributes of torch's module with a kernel of so many taps."""
        before, after = _sides(taps, dilation)
        found: dict[str, Any] = {
            "kernel_size": taps,
            "dilation": dilation,
            "padding": before if before == after else "same",
            "padding_mode": self.padding_mode,
        }
        if geometry.transposed:
            found["output_padding"] = tuple(s - 1 for s in geometry.stride)
        else:
            sides = zip(before[::-1], after[::-1], strict=True)
            found[runtime.REPEATED_PADDING] = [p for side in sides for p in side]
        return found


@dataclass(frozen=True)
class Circular(Boundary):
    """The image repeats."""

    name = padding_mode = "circular"
    is_periodic = True

    def torus(self, domain: Size, extent: Size, stride: Size) -> Size:
        """Return the domain."""
        return domain

    def embed(
        self, kernel: Tensor, domain: Size, stride: Size, dilation: Size, on_torus: bool
    ) -> tuple[Tensor, Size]:
        """Return the kernel and the domain."""
        return kernel, domain

    def convolve(
        self, x: Tensor, kernel: Tensor, geometry: Geometry, domain: Size, dilation: Size, on_torus: bool
    ) -> Tensor:
        """Apply a kernel to images that are continued around the torus."""
        stride, groups = geometry.stride, geometry.groups
        if any(r * (k - 1) >= n for k, r, n in zip(kernel.shape[2:], dilation, domain, strict=True)):
            kernel, dilation = fold(kernel, domain, dilation), (1,) * len(domain)
        before, after, start = margins(tuple(kernel.shape[2:]), geometry, dilation)
        x, none = surround(x, before, after), [0] * len(domain)
        if not geometry.transposed:
            return convolve(x, kernel, [*stride], none, [*dilation], groups)
        # a kernel of fewer taps than the stride leaves the last samples empty
        rest = [s - 1 for s in stride]
        y = convolve_transposed(x, kernel, [*stride], none, rest, [*dilation], groups)
        return cut(y, domain, start)

    def convolve_ordinary(self, x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
        """Apply a kernel around the torus; of the transpose, fold what leaves it."""
        stride, dilation, none = [*geometry.stride], [*geometry.dilation], [0] * geometry.axes
        origin = geometry.placement.origin
        if not geometry.transposed:
            after = geometry.placement.after(geometry.taps)
            sides = [n for side in zip(origin[::-1], after[::-1], strict=True) for n in side]
            return convolve(wrapped(x, sides), kernel, stride, none, dilation, geometry.groups)
        y = convolve_transposed(x, kernel, stride, none, none, dilation, geometry.groups)
        size = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
        return folded(y, size, [*origin])

    def is_torchs(
        self, taps: Size, geometry: Geometry, dilation: Size, domain: Size | None, smallest: Size | None
    ) -> bool:
        """Return True if torch can pad such images: it pads none by more than its size."""
        before, after = _sides(taps, dilation)
        smallest = domain or smallest
        if (
            smallest is None
            or geometry.transposed
            or any(a > n for a, n in zip(after, smallest, strict=True))
        ):
            return False
        return before == after or max(geometry.stride) == 1


@dataclass(frozen=True)
class Zeros(Boundary):
    """The image is continued by zeros."""

    name = padding_mode = "zeros"
    is_periodic = False

    def torus(self, domain: Size, extent: Size, stride: Size) -> Size:
        """Return a torus around which a kernel of that extent does not see an image twice."""
        axes = zip(domain, extent, stride, strict=True)
        return tuple(smooth(n + e - 1, s) for n, e, s in axes)

    def embed(
        self, kernel: Tensor, domain: Size, stride: Size, dilation: Size, on_torus: bool
    ) -> tuple[Tensor, Size]:
        """Return the taps that meet an image, and a torus around which no image meets itself by them."""
        if on_torus:
            return kernel, tuple(kernel.shape[2:])
        torus = []
        for axis, (n, s, r) in enumerate(zip(domain, stride, dilation, strict=True), start=2):
            middle = centre(kernel.shape[axis])
            side = min(middle, (n - 1) // r)
            kernel = kernel.narrow(axis, middle - side, 2 * side + 1)
            torus.append(smooth(n + r * side, s))
        return kernel, tuple(torus)

    def convolve(
        self, x: Tensor, kernel: Tensor, geometry: Geometry, domain: Size, dilation: Size, on_torus: bool
    ) -> Tensor:
        """Apply a kernel by torch's zero padding."""
        stride, groups = geometry.stride, geometry.groups
        if on_torus:
            kernel = crop(kernel, tuple(2 * n - 1 for n in domain))
        padding = [r * (k // 2) for k, r in zip(kernel.shape[2:], dilation, strict=True)]
        if not geometry.transposed:
            return convolve(x, kernel, [*stride], padding, [*dilation], groups)
        rest = [s - 1 for s in stride]
        return convolve_transposed(x, kernel, [*stride], padding, rest, [*dilation], groups)

    def convolve_ordinary(self, x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
        """Apply a kernel by torch's zero padding."""
        before, dilation = [*geometry.placement.origin], [*geometry.dilation]
        return convolve_as_torch(
            x, kernel, [*geometry.stride], before, dilation, geometry.groups, geometry.transposed
        )

    def is_torchs(
        self, taps: Size, geometry: Geometry, dilation: Size, domain: Size | None, smallest: Size | None
    ) -> bool:
        """Return True unless the kernel is that of a torus."""
        return domain is None


@dataclass(frozen=True)
class Walls(Zeros):
    """The image is continued by zeros, and what the operator would lose at its edges is turned back."""

    name = "walls"
    has_walls = True

    def is_torchs(
        self, taps: Size, geometry: Geometry, dilation: Size, domain: Size | None, smallest: Size | None
    ) -> bool:
        """Return False."""
        return False

    def attributes(self, taps: Size, geometry: Geometry, dilation: Size) -> dict[str, Any]:
        """Return those of the zero-padded convolution whose edges are mended."""
        return {
            "kernel_size": taps,
            "dilation": dilation,
            "padding": geometry.placement.origin,
            "padding_mode": self.padding_mode,
        }


BOUNDARIES: dict[str, Boundary] = {b.name: b for b in (Circular(), Zeros(), Walls())}
CIRCULAR = BOUNDARIES[Circular.name]


def boundary_named(name: Any) -> Boundary:
    """Return the boundary of that name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in BOUNDARIES:
        raise ValueError(f"boundary should be None or one of {tuple(BOUNDARIES)}. Found {name!r}")
    return BOUNDARIES[name]


def boundary_of(module: Any) -> Boundary | None:
    """Return the boundary of one of torch's modules; None if its padding mirrors or repeats the image.

    One tap sees no boundary: it counts as circular.
    """
    if max(module.weight.shape[2:]) == 1:
        return CIRCULAR
    return {Circular.name: CIRCULAR, Zeros.name: BOUNDARIES[Zeros.name]}.get(module.padding_mode)


# Sizes


def margins(taps: Size, geometry: Geometry, dilation: Size) -> tuple[Size, Size, Size]:
    """Return how many samples to continue images by, before and after, and where the result then starts.

    Args:
        taps: of a centred kernel.
        geometry: of the convolution.
        dilation: of the kernel.
    """
    before, after = _sides(taps, dilation)
    if not geometry.transposed:
        return before, after, (0,) * len(taps)
    # each output needs the inputs whose taps reach it
    first, last = (
        tuple(ceil(n / s) for n, s in zip(side, geometry.stride, strict=True)) for side in (after, before)
    )
    return first, last, tuple(b + s * m for b, s, m in zip(before, geometry.stride, first, strict=True))


def _sides(taps: Size, dilation: Size) -> tuple[Size, Size]:
    """Return how far a centred kernel stands before and after the output's position."""
    placement = Placement.centred(taps, dilation)
    return placement.origin, placement.after(taps)


def smooth(n: int, stride: int = 1) -> int:
    """Return the smallest multiple of the stride, at least ``n``, of no larger factors than 5 besides it.

    A Fourier transform of 34 = 2 * 17 points takes twice as long as one of 36.
    """
    coarse = ceil(n / stride)
    while True:
        rest = coarse
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return stride * coarse
        coarse += 1


# Images


def extend(images: Tensor, size: Size) -> Tensor:
    """Continue images by zeros to a size."""
    missing = [n - have for n, have in zip(size, images.shape[2:], strict=True)]
    return F.pad(images, [p for m in missing[::-1] for p in (0, m)])


def surround(images: Tensor, before: Size, after: Size) -> Tensor:
    """Continue images around the torus, by so many points before and after them on each axis."""
    sides = zip(before[::-1], after[::-1], strict=True)
    return F.pad(images, [p for side in sides for p in side], mode="circular")


def cut(images: Tensor, size: Size, start: Size | None = None) -> Tensor:
    """Return the part of a size, from a position on."""
    for axis, (n, first) in enumerate(zip(size, start or (0,) * len(size), strict=True), start=2):
        images = images.narrow(axis, first, n)
    return images


# Kernels


def crop(kernel: Tensor, taps: Size, placement: Placement | None = None) -> Tensor:
    """Return those taps of a centred kernel on a torus that a smaller kernel there has."""
    placement = placement or Placement.centred(taps)
    axes = zip(taps, placement.dilation, placement.origin, strict=True)
    for axis, (k, r, origin) in enumerate(axes, start=2):
        n = kernel.shape[axis]
        index = (centre(n) - origin + r * torch.arange(k, device=kernel.device)) % n
        kernel = kernel.index_select(axis, index)
    return kernel


def fold(kernel: Tensor, domain: Size, dilation: Size) -> Tensor:
    """Return the same convolution on a torus as a centred kernel with a tap for each of its points."""
    torus = _wrap(kernel, domain, Placement.centred(tuple(kernel.shape[2:]), dilation))
    return torch.roll(torus, [centre(n) for n in domain], tuple(range(2, kernel.ndim)))


def _wrap(kernel: Tensor, domain: Size, placement: Placement) -> Tensor:
    """Embed or fold a kernel into a torus, its origin at the torus's own."""
    axes = zip(domain, placement.dilation, placement.origin, strict=True)
    for axis, (n, r, origin) in enumerate(axes, start=2):
        after = (0, 0) * (kernel.ndim - axis - 1)  # for `pad`, which begins with the last axis
        kernel = spread(kernel, axis, r)
        k = kernel.shape[axis]
        if k > n:
            kernel = F.pad(kernel, (*after, 0, ceil(k / n) * n - k)).unflatten(axis, (-1, n)).sum(axis)
            kernel = torch.roll(kernel, (-origin,), (axis,))
        else:
            before, rest = kernel.narrow(axis, 0, origin), kernel.narrow(axis, origin, k - origin)
            gap = kernel.new_zeros(*kernel.shape[:axis], n - k, *kernel.shape[axis + 1 :])
            kernel = torch.cat([rest, gap, before], axis)
    return kernel
