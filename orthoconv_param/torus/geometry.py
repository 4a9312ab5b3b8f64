"""`Geometry`: a convolution as torch's modules describe it, apart from what happens at the image's edges.

Its matrix is that of a strided convolution of ``size = (out, in/groups, *taps)``, from a fine grid to a
coarse one. A transposed convolution has the same weight, applies the transpose, and goes from the coarse
grid to the fine one. The fine grid is called the domain in both cases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import Size, per_axis
from .lattice import Lattice, Placement

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """What a convolution is, but for its weight's values and its boundary.

    Args:
        size: of its weight, ``(out, in/groups, *taps)``; transposed, ``(in, out/groups, *taps)``.
        stride: on each axis.
        groups: which divide both channel counts.
        placement: of its taps.
        transposed: whether the transpose is applied.
        is_complex: whether its weight is complex.
    """

    size: Size
    stride: Size
    groups: int
    placement: Placement
    transposed: bool = False
    is_complex: bool = False

    @classmethod
    def of(cls, module: Any) -> "Geometry":
        """Return the geometry of one of torch's convolution modules.

        Raises:
            ValueError: if its padding does not keep the image's size, or a stride or dilation is not
                positive.
        """
        size = tuple(module.weight.shape)
        axes = len(size) - 2
        stride = per_axis("stride", module.stride, axes)
        dilation = per_axis("dilation", module.dilation, axes)
        # the dilation of a single tap says nothing
        dilation = tuple(r if k > 1 else 1 for r, k in zip(dilation, size[2:], strict=True))
        spans = tuple(r * (k - 1) for k, r in zip(size[2:], dilation, strict=True))
        padding = _padding(module, spans)
        _check_padding(module, padding, spans, stride)
        is_complex = module.weight.is_complex()
        placement = Placement(dilation, padding)
        return cls(size, stride, module.groups, placement, module.transposed, is_complex)

    @classmethod
    def of_weight(
        cls,
        size: Size,
        is_complex: bool,
        stride: int | Size,
        groups: int,
        placement: Placement | None,
        domain: int | Size | None,
    ) -> "Geometry":
        """Return the geometry of a weight of which its module says no more.

        Args:
            size: of the weight.
            is_complex: whether it is complex.
            stride: of the convolution.
            groups: of the convolution.
            placement: of the taps; None if they are centred.
            domain: on which the kernel has to fit; None if that is known only later.

        Raises:
            ValueError: if these do not describe a convolution.
        """
        placement = placement or Placement.centred(size[2:])
        if domain is None:
            Lattice.of_kernel(size, is_complex, groups=groups)
        else:
            Lattice.of_kernel(size, is_complex, domain, stride, groups, placement.dilation)
        strides = per_axis("stride", stride, len(size) - 2)
        return cls(size, strides, groups, placement, is_complex=is_complex)

    @property
    def axes(self) -> int:
        """Axes of space."""
        return len(self.stride)

    @property
    def taps(self) -> Size:
        """Taps on each axis."""
        return self.size[2:]

    @property
    def dilation(self) -> Size:
        """Samples from one tap to the next, on each axis."""
        return self.placement.dilation

    @property
    def taken(self) -> int:
        """Channels that it takes."""
        return self.size[0] if self.transposed else self.size[1] * self.groups

    @property
    def given(self) -> int:
        """Channels that it gives."""
        return self.size[1] * self.groups if self.transposed else self.size[0]

    def lattice(self, domain: Size) -> Lattice:
        """Return the torus of this size for kernels of this geometry."""
        return Lattice(domain, self.stride, self.groups, self.is_complex)

    def domain(self, images: Size) -> Size:
        """Return the fine grid of images of this size that it takes."""
        return self._times_stride(images) if self.transposed else images

    def coarse(self, domain: Size) -> Size:
        """Return the coarse grid of a fine one."""
        return tuple(n // s for n, s in zip(domain, self.stride, strict=True))

    def check_divisible(self, domain: Size) -> None:
        """Raise if a fine grid is empty or not divisible by the stride.

        Raises:
            ValueError: then.
        """
        what = "output" if self.transposed else "input"
        if min(domain) < 1:
            raise ValueError(
                f"{what} should have at least one sample on each axis, and a size divisible by the stride "
                f"{self.stride}. Found {domain}"
            )
        if any(n % s for n, s in zip(domain, self.stride, strict=True)):
            raise ValueError(
                f"{what} should be of a size divisible by the stride {self.stride}. Found {domain}"
            )

    def check_existence(self, size: Size, groups: int) -> None:
        """Raise if no semi-orthogonal operator of this stride and dilation exists.

        Args:
            size: of what is to be orthogonal: the weight, or the blocks of it that are.
            groups: likewise.

        Raises:
            ValueError: then.
        """
        common = tuple(gcd(s, r) for s, r in zip(self.stride, self.dilation, strict=True))
        out, seen = size[0] // groups, size[1] * prod(self.stride) // prod(common)
        if out > seen and max(common) > 1:
            raise ValueError(
                f"no semi-orthogonal operator has stride {self.stride} and dilation {self.dilation}: it "
                f"reads only one of {prod(common)} samples. They should have no common factor, or each "
                f"group at most {seen} {'input' if self.transposed else 'output'} channels. Found {out}"
            )

    def _times_stride(self, size: Size) -> Size:
        return tuple(n * s for n, s in zip(size, self.stride, strict=True))


def torch_class(module: Any) -> type[nn.Module] | None:
    """Return the class of torch's convolutions that a module is of, or None."""
    return next((c for c in CONVOLUTIONS if isinstance(module, c)), None)


def convolve(
    x: Tensor, kernel: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Return torch's zero-padded convolution on any number of axes. TorchScript compiles this."""
    if len(stride) == 1:
        return torch.conv1d(x, kernel, None, stride, padding, dilation, groups)
    if len(stride) == 2:
        return torch.conv2d(x, kernel, None, stride, padding, dilation, groups)
    return torch.conv3d(x, kernel, None, stride, padding, dilation, groups)


def convolve_transposed(
    x: Tensor,
    kernel: Tensor,
    stride: list[int],
    padding: list[int],
    rest: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the transpose of `convolve`, with torch's ``output_padding``. TorchScript compiles this."""
    if len(stride) == 1:
        return torch.conv_transpose1d(x, kernel, None, stride, padding, rest, groups, dilation)
    if len(stride) == 2:
        return torch.conv_transpose2d(x, kernel, None, stride, padding, rest, groups, dilation)
    return torch.conv_transpose3d(x, kernel, None, stride, padding, rest, groups, dilation)


def convolve_as_torch(
    x: Tensor,
    kernel: Tensor,
    stride: list[int],
    before: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    """Do what torch's zero-padded module does with a kernel that keeps the size. TorchScript compiles this.

    Args:
        x: images, ``(batch, channels, *size)``.
        kernel: of the convolution.
        stride: of it.
        before: how far before the output's position its first tap stands.
        dilation: of it.
        groups: of it.
        transposed: whether the transpose is applied.
    """
    axes = len(stride)
    rest, more = [0] * axes, [0, 0] * axes
    for axis in range(axes):
        span = dilation[axis] * (kernel.size(axis + 2) - 1)
        rest[axis] = stride[axis] - 1 + 2 * before[axis] - span
        if stride[axis] == 1:  # an even kernel stands further behind than before
            more[2 * (axes - axis) - 1] = span - 2 * before[axis]
    if transposed:
        return convolve_transposed(x, kernel, stride, before, rest, dilation, groups)
    if max(more) > 0:
        x = F.pad(x, more)
    return convolve(x, kernel, stride, before, dilation, groups)


def wrapped(x: Tensor, sides: list[int]) -> Tensor:
    """Return images of any size, continued around the torus. TorchScript compiles this.

    Args:
        x: images, ``(batch, channels, *size)``.
        sides: samples before and after them, of the last axis first, as ``F.pad`` takes them.
    """
    for axis in range(len(sides) // 2):
        at, before, after = x.dim() - 1 - axis, sides[2 * axis], sides[2 * axis + 1]
        n = x.size(at)
        if before + after > 0:
            x = x.index_select(at, torch.arange(-before, n + after, device=x.device) % n)
    return x


def folded(y: Tensor, size: list[int], first: list[int]) -> Tensor:
    """Return images around a torus of what lies beyond them too. TorchScript compiles this.

    Args:
        y: images, ``(batch, channels, *larger)``.
        size: of the torus.
        first: where on ``y`` the torus' first sample is.
    """
    for axis in range(len(size)):
        at, n = axis + 2, size[axis]
        index = (torch.arange(y.size(at), device=y.device) - first[axis]) % n
        shape = list(y.shape)
        shape[at] = n
        y = y.new_zeros(shape).index_add(at, index, y)
    return y


def added(y: Tensor, part: Tensor, channels: list[int]) -> Tensor:
    """Return images with a part added to some channels. TorchScript compiles this.

    (Channels that follow one another are cut out: exporters to ONNX take ``index_add`` of all for a copy.)
    """
    first, count = channels[0], len(channels)
    follow = True
    for i in range(count):
        follow = follow and channels[i] == first + i
    if not follow:
        return y.index_add(1, torch.tensor(channels, device=y.device), part)
    parts = [y.narrow(1, 0, first), y.narrow(1, first, count) + part]
    parts.append(y.narrow(1, first + count, y.size(1) - first - count))
    return torch.cat(parts, 1)


def per_channel(bias: Tensor, x: Tensor) -> Tensor:
    """Return a bias in the shape in which it is added to images ``(batch, channels, *size)``."""
    return bias.reshape(-1, *(1,) * (x.ndim - 2))


def sized(x: Tensor, domain: list[int], stride: list[int], transposed: bool) -> Tensor:
    """Return images, if a module takes their size. TorchScript compiles this.

    Args:
        x: images, ``(batch, channels, *size)``.
        domain: the only one that it takes; zeros for every one.
        stride: which divides it.
        transposed: whether the images are on the coarse grid.

    Raises:
        ValueError: if they are of another size.
    """
    for axis in range(len(stride)):
        n = x.size(axis + 2)
        if transposed:
            n *= stride[axis]
        if n % stride[axis] != 0 or (domain[axis] > 0 and n != domain[axis]):
            raise ValueError("images should be of the module's domain, and divisible by the stride")
    return x


def _padding(module: Any, spans: Size) -> Size:
    """Return how far before the output's position the first tap stands, on each axis."""
    if module.padding == "same":
        return tuple(span // 2 for span in spans)
    return (0,) * len(spans) if module.padding == "valid" else tuple(module.padding)


def _check_padding(module: Any, padding: Size, spans: Size, stride: Size) -> None:
    """Raise if a module does not keep the size of an image, over its stride.

    Raises:
        ValueError: then; it names the padding that does, or says that no causal one does.
    """
    if module.padding == "same":
        return
    axes = list(zip(spans, padding, stride, module.output_padding, strict=True))
    if module.transposed:
        keeps = all(span - 2 * p == s - 1 - rest for span, p, s, rest in axes)
    else:
        keeps = all(0 <= span - 2 * p <= s - 1 for span, p, s, _ in axes)
    if keeps:
        return
    right, found = f"use padding={tuple(span // 2 for span in spans)}", f"padding={module.padding!r}"
    if module.transposed:
        right += f", output_padding={tuple(s - 1 - span % 2 for span, _, s, _ in axes)}"
        found += f", output_padding={module.output_padding}"
    if any(span % 2 and s == 1 for span, _, s, _ in axes):
        possible = not module.transposed and max(stride) == 1
        right = (
            'use padding="same"' if possible else "none does with stride 1, an even kernel and odd dilation"
        )
    by = "" if max(stride) == 1 else f" (divided by the stride {stride})"
    note = ""
    if _may_be_causal(axes):
        note = (
            ". A causal convolution should stay as it is: padding that keeps the size would read later "
            "steps too, and on a finite sequence its operator is block triangular, orthogonal only if it "
            "joins no steps of time"
        )
    raise ValueError(f"padding should keep the size{by}: {right}. Found {found}{note}")


def _may_be_causal(axes: Sequence[Size]) -> bool:
    """Return True if an axis is padded as of convolutions that read the past: twice, or not at all."""
    others = [(span, p) for span, p, _, _ in axes if span != 2 * p]
    one_sided = all(p in (0, span) for span, p in others)
    return one_sided and all(s == 1 for _, _, s, _ in axes) and len(others) == 1
