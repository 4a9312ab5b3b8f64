r"""Kernels and their spectra on a periodic grid: every index convention of the package.

PyTorch's convolution is a cross-correlation: with a kernel ``w`` of ``k`` taps centred at
``c = (k - 1) // 2`` and stride ``s``,

    y[o, q] = sum_{i, d} w[o, i, d] x[i, s q + d - c].

Split into its ``s^d`` polyphase components ``x_r[q] = x[s q + r]``, the input of a strided
convolution sees a convolution of stride 1 on the coarse grid ``n / s``. So on a torus every
convolution is block diagonal in frequency, with one ``out x (in * s^d)`` matrix per coarse frequency

    M(v)[o, (i, r)] = sum_e w[o, i, c + s e + r] exp(2 pi i v.e s / n),

which is `Lattice.spectrum`. For a real kernel ``M(-v) = conj(M(v))``, and only the half that
``rfftn`` keeps is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, pi, prod
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**17  # complex numbers that are transformed at once: a megabyte in single precision

Size: TypeAlias = tuple[int, ...]
Chosen = TypeVar("Chosen", Tensor, tuple[Tensor, ...])


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


@dataclass(frozen=True)
class Lattice:
    """A torus, and the kernels that act on it.

    Args:
        domain: size of the (fine) grid, in samples.
        stride: of the convolution; divides ``domain``.
        groups: of the convolution; divides both of its channel counts.
        is_complex: whether kernels are complex.
        compact: whether the torus only serves to compute the kernel of an infinite grid. It then
            has an odd number of coarse points, and kernels are read from it without wrapping.
    """

    domain: Size
    stride: Size
    groups: int = 1
    is_complex: bool = False
    compact: bool = False

    @classmethod
    def of_kernel(
        cls,
        size: Size,
        is_complex: bool,
        domain: int | Size | None = None,
        stride: int | Size = 1,
        groups: int = 1,
        dilation: Size | None = None,
        folds: bool = False,
    ) -> "Lattice":
        """The torus for kernels of ``size = (out, in/groups, *taps)``; checks that they fit.

        Args:
            size: of the kernel.
            is_complex: whether it is complex.
            domain: as many numbers as the kernel has axes, or one for all; None: its own taps.
            stride: likewise.
            groups: of the convolution.
            dilation: of the kernel.
            folds: whether a kernel larger than the domain is folded onto it, rather than refused.

        Raises:
            ValueError: if the kernel has no taps, does not fit into the domain, the stride
                does not divide the domain, or the groups do not divide the channels.
        """
        taps = tuple(size[2:])
        if not taps or 0 in size:
            raise ValueError(
                f"a convolution's kernel is (out, in/groups, *taps), none of them 0. Found {tuple(size)}"
            )
        own = domain is None
        domain = taps if domain is None else per_axis("domain", domain, len(taps))
        stride = per_axis("stride", stride, len(taps))
        extent = Placement.centred(taps, dilation).extent(taps)
        if not folds and any(n < k for n, k in zip(domain, extent, strict=True)):
            what = "taps" if extent == taps else "taps with their dilation,"
            raise ValueError(f"domain should be at least the kernel's {what} {extent}. Found {domain}")
        if any(n % s for n, s in zip(domain, stride, strict=True)):
            which = f"the kernel's own grid {taps} (domain=None)" if own else f"domain={domain}"
            raise ValueError(f"{which} should be divisible by the stride. Found stride={stride}")
        if size[0] % groups:
            raise ValueError(
                f"groups should divide the {size[0]} channels of the weight's first axis. Found {groups}"
            )
        return cls(domain, stride, groups, is_complex)

    @classmethod
    def of_degree(cls, degree: int, reach: Size, stride: Size, groups: int, is_complex: bool) -> "Lattice":
        """The smallest torus that holds a polynomial of ``degree`` in a kernel and its adjoint."""
        domain = tuple(s * (2 * degree * r + 1) for s, r in zip(stride, reach, strict=True))
        return cls(domain, stride, groups, is_complex, compact=True)

    @property
    def grid(self) -> Size:
        """Size of the coarse grid, on which the polyphase components live."""
        return tuple(n // s for n, s in zip(self.domain, self.stride, strict=True))

    @property
    def taps(self) -> Size:
        """Taps of the kernels that `kernel` returns: one for each point of the domain.

        A `compact` lattice has ``s - 1`` empty ones before them where the stride is ``s``: the
        kernel then has an odd number of taps, its origin in the middle, as padding of ``K // 2`` expects.
        """
        extra = (s - 1 if self.compact else 0 for s in self.stride)
        return tuple(n + e for n, e in zip(self.domain, extra, strict=True))

    @property
    def stored(self) -> Size:
        """Size of the part of the Fourier grid that a spectrum holds."""
        return self.grid if self.is_complex else half(self.grid)

    @property
    def frequencies(self) -> int:
        """How many frequencies a spectrum holds."""
        return prod(self.stored)

    def blocks(self, kernel_size: Size) -> Size:
        """``(out/groups, in/groups * s^d)``: the size of a kernel's matrix at each frequency."""
        return kernel_size[0] // self.groups, kernel_size[1] * prod(self.stride)

    def phases(self, x: Tensor) -> Tensor:
        """The polyphase components ``(batch, channels * s^d, *grid)`` of ``(batch, channels, *domain)``."""
        d = len(self.domain)
        if all(s == 1 for s in self.stride):
            return x
        for axis in reversed(range(2, d + 2)):  # each axis becomes (coarse, phase)
            x = torch.unflatten(x, axis, (-1, self.stride[axis - 2]))
        coarse, phase = range(2, 2 * d + 2, 2), range(3, 2 * d + 2, 2)
        return x.permute(0, 1, *phase, *coarse).flatten(1, d + 1)

    def interleave(self, phases: Tensor) -> Tensor:
        """The inverse of `phases`."""
        d = len(self.domain)
        if all(s == 1 for s in self.stride):
            return phases
        phases = phases.unflatten(1, (-1, *self.stride))
        order = [axis for i in range(2, d + 2) for axis in (i + d, i)]  # (coarse, phase) pairs
        return phases.permute(0, 1, *order).reshape(*phases.shape[:2], *self.domain)

    def spectrum(self, kernel: Tensor, placement: Placement | None = None) -> Tensor:
        """The operator's matrices, one per group and frequency.

        Args:
            kernel: ``(out, in/groups, *taps)``; with more taps than the domain has points it is
                folded, taps summed modulo the size, which changes nothing of what it does there.
            placement: where its taps stand. Default: centred.

        Returns:
            ``(groups, frequencies, out/groups, in/groups * s^d)``, complex.
        """
        placement = placement or Placement.centred(tuple(kernel.shape[2:]))
        # Some output channels at a time, so that they are transformed and transposed within the cache.
        height, columns = self.blocks(kernel.shape)
        portion = max(1, _CHUNK // (columns * self.frequencies))
        if self.groups > 1:  # whole groups
            portion = max(1, portion // height) * height
        if portion >= len(kernel) or kernel.device.type != "cpu" or torch.compiler.is_compiling():
            return self._spectrum(kernel, placement, height).contiguous()
        axis, pieces = (0 if self.groups > 1 else 2), kernel.split(portion)
        if torch.is_grad_enabled() and kernel.requires_grad:
            return torch.cat([self._spectrum(piece, placement, height) for piece in pieces], axis)
        # each in its place, without a second copy of all of them
        size, dtype = (self.groups, self.frequencies, height, columns), kernel.dtype.to_complex()
        spectrum, first = kernel.new_empty(size, dtype=dtype), 0
        for piece in pieces:
            x = self._spectrum(piece, placement, height)
            spectrum.narrow(axis, first, x.shape[axis]).copy_(x)
            first += x.shape[axis]
        return spectrum

    def _spectrum(self, kernel: Tensor, placement: Placement, height: int) -> Tensor:
        """`spectrum` of some of the output channels, of which a group has ``height``, as a view."""
        taps, axes = tuple(kernel.shape[2:]), tuple(range(2, kernel.ndim))
        if self.is_complex:
            phases = self.phases(_wrap(kernel, self.domain, placement))
            spectrum = torch.fft.ifftn(phases, dim=axes, norm="forward")
        else:
            # The conjugate of a transform is that of the reversed kernel, which costs less to reverse.
            if max(self.stride) == 1:
                phases = _wrap(kernel.flip(axes), self.domain, placement.reversed(taps))
            else:
                phases = _reverse(self.phases(_wrap(kernel, self.domain, placement)), axes)
            spectrum = torch.fft.rfftn(phases, dim=axes)
        matrices = spectrum.reshape(
            -1, min(len(kernel), height), self.blocks(kernel.shape)[1], self.frequencies
        )
        return matrices.movedim(-1, 1)

    def kernel(self, spectrum: Tensor) -> Tensor:
        """The inverse of `spectrum`: the kernel ``(out, in/groups, *taps)`` of these matrices."""
        d = len(self.domain)
        grid, axes = self.grid, tuple(range(2, d + 2))
        spectrum = spectrum.movedim(1, -1).flatten(0, 1).unflatten(-1, self.stored)
        if self.is_complex:
            phases = torch.fft.fftn(spectrum, dim=axes, norm="forward")
        else:
            phases = _reverse(torch.fft.irfftn(spectrum, s=grid, dim=axes), axes)
        torus = self.interleave(phases)
        if not self.compact:
            return torch.roll(torus, [centre(n) for n in self.domain], axes)
        origin = [s * centre(n) for n, s in zip(grid, self.stride, strict=True)]
        extra = [t - n for t, n in zip(self.taps, self.domain, strict=True)]
        padding = [p for e in reversed(extra) for p in (e, 0)]
        return F.pad(torch.roll(torus, origin, axes), padding)

    def choose(self, choice: Callable[..., Chosen], *spectra: Tensor) -> Chosen:
        """``choice(*spectra)``, made once for each pair of frequencies ``+w, -w`` and conjugated.

        Where a frequency is its own negative the arguments are real, and so is the choice, of one
        tensor or of several. What is not unique (a null space, a random matrix) then still belongs to
        a real kernel.
        """
        if self.is_complex:
            return choice(*spectra)
        own, first, second = _mirror(self.grid)
        real = choice(*(x[:, own].real for x in spectra))
        chosen = choice(*spectra)  # which may overwrite them
        pairs = [(chosen, real)] if isinstance(chosen, Tensor) else zip(chosen, real, strict=True)
        for x, of_own in pairs:
            for to, source in zip(second, first, strict=True):
                x[:, to] = x[:, source].conj()
            x[:, own] = of_own.to(x.dtype)
        return chosen

    def each(self, function: Callable[..., Tensor], *spectra: Tensor) -> Tensor:
        """A function of matrices, given real ones at the frequencies that are their own negatives."""
        if self.is_complex:
            return function(*spectra)
        own = _mirror(self.grid)[0]
        others = sorted({*range(self.frequencies)} - {*own})
        real = function(*(x[:, own].real for x in spectra)).to(spectra[0].dtype)
        result = real.new_empty(real.shape[0], self.frequencies, *real.shape[2:])
        result[:, own] = real
        if others:
            result[:, others] = function(*(x[:, others] for x in spectra))
        return result

    def resolution(self, points: Size) -> "Lattice":
        """The same convolutions on a torus of ``points`` coarse points."""
        domain = tuple(s * n for s, n in zip(self.stride, points, strict=True))
        return Lattice(domain, self.stride, self.groups, self.is_complex)


def per_axis(name: str, value: int | Size, axes: int | None = None) -> Size:
    """One positive integer for each axis.

    Raises:
        TypeError: if ``value`` is neither an integer nor a sequence of integers.
        ValueError: if one is not positive, or there are not as many as ``axes``.
    """
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * (axes or 1)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"{name} should be an integer, or a tuple of them. Found {value!r}")
    if not numbers or min(numbers) < 1 or (axes is not None and len(numbers) != axes):
        count = "" if axes is None else f", one for each of the kernel's {axes} axes"
        raise ValueError(f"{name} should be positive{count}. Found {value!r}")
    return numbers


def count(name: str, value: int) -> int:
    """A positive integer.

    Raises:
        TypeError, ValueError: if it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be an integer. Found {value!r}")
    if value < 1:
        raise ValueError(f"{name} should be positive. Found {value!r}")
    return value


def half(grid: Size) -> Size:
    """Size of the half-spectrum that ``rfftn`` keeps on a ``grid``."""
    return (*grid[:-1], grid[-1] // 2 + 1)


def sampling(reach: Size) -> tuple[Size, float]:
    """A coarse grid that sees the norm of the spectrum of a kernel of ``reach`` at *all* frequencies.

    A real trigonometric polynomial of degree ``r`` is at most ``1 / cos(pi r / n)`` times its
    maximum over ``n > 2 r`` equispaced points (near its maximum it lies above a cosine of
    frequency ``r``: M. Riesz); ``u^H iA(w) u`` is one, for each vector ``u`` and each axis.

    Returns:
        The grid, and the factor by which the maximum over its frequencies is to be multiplied.
    """
    grid = tuple(8 * r + 1 for r in reach)
    return grid, 1 / prod(cos(pi * r / n) for r, n in zip(reach, grid, strict=True))


def pack(kernel: Tensor) -> Tensor:
    """The kernel's Fourier coefficients on its own grid, as a tensor of its own shape and dtype.

    Real kernels by the Hartley transform ``Re f - Im f``, complex ones by the unitary DFT: both
    are orthonormal, so an optimizer sees the geometry that it saw in space.
    """
    axes = tuple(range(2, kernel.ndim))
    torus = torch.roll(kernel, [-centre(k) for k in kernel.shape[2:]], axes)
    if kernel.is_complex():
        return torch.fft.ifftn(torus, dim=axes, norm="ortho")
    return _hartley(torus)


def unpack(generator: Tensor) -> Tensor:
    """The inverse of `pack`: a generator's kernel in space."""
    axes = tuple(range(2, generator.ndim))
    if generator.is_complex():
        torus = torch.fft.fftn(generator, dim=axes, norm="ortho")
    else:
        torus = _hartley(generator)
    return torch.roll(torus, [centre(k) for k in generator.shape[2:]], axes)


def _hartley(x: Tensor) -> Tensor:
    f = torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho")
    return f.real - f.imag  # its own inverse


def clip(kernel: Tensor, domain: Size, stride: Size, dilation: Size) -> tuple[Tensor, Size]:
    """For images between zeros: the taps of a centred kernel that meet one, and a torus for it.

    The torus has as many more points than the domain as the kernel reaches to a side, so that around
    it no image meets itself.
    """
    torus = []
    for axis, (n, s, r) in enumerate(zip(domain, stride, dilation, strict=True), start=2):
        middle = centre(kernel.shape[axis])
        side = min(middle, (n - 1) // r)
        kernel = kernel.narrow(axis, middle - side, 2 * side + 1)
        torus.append(s * ceil((n + r * side) / s))
    return kernel, tuple(torus)


def extend(images: Tensor, size: Size) -> Tensor:
    """Images continued by zeros to a size."""
    missing = [n - have for n, have in zip(size, images.shape[2:], strict=True)]
    return F.pad(images, [p for m in missing[::-1] for p in (0, m)])


def crop(kernel: Tensor, taps: Size, placement: Placement | None = None) -> Tensor:
    """Of a centred kernel with a tap for each point of a torus, those of a smaller kernel there."""
    placement = placement or Placement.centred(taps)
    axes = zip(taps, placement.dilation, placement.origin, strict=True)
    for axis, (k, r, origin) in enumerate(axes, start=2):
        n = kernel.shape[axis]
        index = (centre(n) - origin + r * torch.arange(k, device=kernel.device)) % n
        kernel = kernel.index_select(axis, index)
    return kernel


def surround(images: Tensor, before: Size, after: Size) -> Tensor:
    """Images continued around the torus, by so many points before and after them on each axis."""
    sides = zip(before[::-1], after[::-1], strict=True)
    return F.pad(images, [p for side in sides for p in side], mode="circular")


def cut(images: Tensor, size: Size, start: Size | None = None) -> Tensor:
    """The part of a size, from a position on."""
    for axis, (n, first) in enumerate(zip(size, start or (0,) * len(size), strict=True), start=2):
        images = images.narrow(axis, first, n)
    return images


def _reverse(torus: Tensor, axes: Size) -> Tensor:
    """``torus[-q]`` at ``q``."""
    return torch.roll(torus.flip(axes), (1,) * len(axes), axes)


def fold(kernel: Tensor, domain: Size, dilation: Size) -> Tensor:
    """The same convolution on a torus, by a centred kernel with a tap for each of its points."""
    torus = _wrap(kernel, domain, Placement.centred(tuple(kernel.shape[2:]), dilation))
    return torch.roll(torus, [centre(n) for n in domain], tuple(range(2, kernel.ndim)))


def _wrap(kernel: Tensor, domain: Size, placement: Placement) -> Tensor:
    """Embeds or folds a kernel into a torus, its origin at the torus's own."""
    axes = zip(domain, placement.dilation, placement.origin, strict=True)
    for axis, (n, r, origin) in enumerate(axes, start=2):
        after = (0, 0) * (kernel.ndim - axis - 1)  # for `pad`, which begins with the last axis
        if r > 1:  # zeros between the taps
            kernel = F.pad(kernel.unsqueeze(axis + 1), (*after, 0, r - 1)).flatten(axis, axis + 1)
        k = kernel.shape[axis]
        if k > n:
            kernel = F.pad(kernel, (*after, 0, ceil(k / n) * n - k)).unflatten(axis, (-1, n)).sum(axis)
            kernel = torch.roll(kernel, -origin, axis)
        else:
            before, rest = kernel.narrow(axis, 0, origin), kernel.narrow(axis, origin, k - origin)
            gap = kernel.new_zeros(*kernel.shape[:axis], n - k, *kernel.shape[axis + 1 :])
            kernel = torch.cat([rest, gap, before], axis)
    return kernel


@lru_cache(maxsize=64)
def _mirror(grid: Size) -> tuple[list[int], list[int], list[int]]:
    """Within the half-spectrum: frequencies equal to their own negative, and pairs ``+w, -w``."""
    stored = half(grid)
    index = torch.cartesian_prod(*(torch.arange(n) for n in stored)).reshape(-1, len(grid))
    negative = (-index) % torch.tensor(grid)
    kept = negative[:, -1] < stored[-1]
    position = torch.zeros(len(index), dtype=torch.long)
    for axis, n in enumerate(stored):
        position = position * n + negative[:, axis]
    here = torch.arange(len(index))
    own = here[kept & (position == here)]
    first = here[kept & (here < position)]
    return own.tolist(), first.tolist(), position[first].tolist()
