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
from dataclasses import dataclass, field
from math import ceil, cos, pi, prod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import HALF, Size, per_axis
from .dft import analyse, half, mirror, synthesise

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

    Its ``grid`` is the size of the coarse grid, on which the polyphase components live.
    """

    domain: Size
    stride: Size
    groups: int = 1
    is_complex: bool = False
    compact: bool = False
    grid: Size = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grid = tuple([n // s for n, s in zip(self.domain, self.stride, strict=True)])
        object.__setattr__(self, "grid", grid)  # read at each step of a loop

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
    def taps(self) -> Size:
        """Taps of the kernels that `kernel` returns: one for each point of the domain.

        A `compact` lattice has ``s - 1`` empty ones before them where the stride is ``s``: the
        kernel then has an odd number of taps, its origin in the middle, as padding of ``K // 2`` expects.
        """
        extra = (s - 1 if self.compact else 0 for s in self.stride)
        return tuple(n + e for n, e in zip(self.domain, extra, strict=True))

    def fills(self, domain: Size) -> bool:
        """Return True if this is the torus of images on a domain, or one that holds them.

        It is not if it only serves to compute a compact kernel, or one of a single tap: one coarse point.
        """
        return not self.compact and all(n >= m for n, m in zip(self.domain, domain, strict=True))

    @property
    def stored(self) -> Size:
        """Size of the part of the Fourier grid that a spectrum holds."""
        return self.grid if self.is_complex else half(self.grid)

    @property
    def frequencies(self) -> int:
        """How many frequencies a spectrum holds."""
        return prod(self.stored)

    def wavenumbers(self) -> Tensor:
        """The frequencies themselves, ``(frequencies, d)``, in cycles per point of the domain."""
        last = torch.fft.fftfreq if self.is_complex else torch.fft.rfftfreq
        transforms = [torch.fft.fftfreq] * (len(self.grid) - 1) + [last]
        axes = zip(transforms, self.grid, self.stride, strict=True)
        each = [f(n, d=s, dtype=torch.float64) for f, n, s in axes]
        return torch.stack(torch.meshgrid(*each, indexing="ij"), -1).flatten(0, -2)

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
        phases, positions = self._polyphase(kernel, placement)
        # Channels last: the matrices then come out as they are, without a transposed copy of all of them.
        x = phases.flatten(0, 1).movedim(0, -1)
        for axis in reversed(range(len(self.grid))):
            folded = not self.is_complex and axis == len(self.grid) - 1
            x = analyse(x, axis, self.grid[axis], positions[axis], folded)
        height, columns = self.blocks(kernel.shape)
        return x.reshape(self.frequencies, self.groups, height, columns).movedim(1, 0).contiguous()

    def _polyphase(self, kernel: Tensor, placement: Placement) -> tuple[Tensor, list[range]]:
        """The kernel ``(out, in/groups * s^d, *taps)`` on the coarse grid, and where its taps are."""
        axes = list(zip(placement.dilation, placement.origin, self.stride, strict=True))
        if max(self.stride) == 1:
            sizes = zip(kernel.shape[2:], axes, strict=True)
            return kernel, [range(-o, r * k - o, r) for k, (r, o, _) in sizes]
        sides, starts = [], []
        for axis, (r, origin, s) in enumerate(axes, start=2):
            kernel = spread(kernel, axis, r)
            start = -origin // s
            before = -origin - s * start
            sides.append((before, -(kernel.shape[axis] + before) % s))
            starts.append(start)
        phases = self.phases(F.pad(kernel, [n for side in sides[::-1] for n in side]))
        return phases, [range(e, e + k) for e, k in zip(starts, phases.shape[2:], strict=True)]

    def kernel(self, spectrum: Tensor) -> Tensor:
        """The inverse of `spectrum`: the kernel ``(out, in/groups, *taps)`` of these matrices.

        In memory its channels come last.
        """
        d = len(self.domain)
        groups, _, height, columns = spectrum.shape
        x = spectrum.movedim(0, 1).reshape(*self.stored, -1)
        for axis, n in enumerate(self.grid):
            folded = not self.is_complex and axis == d - 1
            x = synthesise(x, axis, n, range(-centre(n), n - centre(n)), folded)
        phases = x.unflatten(-1, (groups * height, columns)).movedim((-2, -1), (0, 1))
        torus, axes = self.interleave(phases), tuple(range(2, d + 2))
        if self.compact:
            padding = [p for s in reversed(self.stride) for p in (s - 1, 0)]
            return F.pad(torus, padding) if max(padding) else torus
        coarse = zip(self.domain, self.stride, self.grid, strict=True)
        shifts = [centre(n) - s * centre(m) for n, s, m in coarse]
        return torch.roll(torus, shifts, axes) if max(shifts) else torus

    def choose(self, choice: Callable[..., Chosen], *spectra: Tensor) -> Chosen:
        """``choice(*spectra)``, made once for each pair of frequencies ``+w, -w`` and conjugated.

        Where a frequency is its own negative the arguments are real, and so is the choice, of one
        tensor or of several. What is not unique (a null space, a random matrix) then still belongs to
        a real kernel.
        """
        if self.is_complex:
            return choice(*spectra)
        own, first, second = mirror(self.grid)
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
        own = mirror(self.grid)[0]
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
    """Return a generator's kernel in space, the inverse of `pack`, in single precision at least."""
    if generator.dtype in HALF:
        generator = generator.float()
    axes = tuple(range(2, generator.ndim))
    if generator.is_complex():
        torus = torch.fft.fftn(generator, dim=axes, norm="ortho")
    else:
        torus = _hartley(generator)
    return torch.roll(torus, [centre(k) for k in generator.shape[2:]], axes)


def _hartley(x: Tensor) -> Tensor:
    f = torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho")
    return f.real - f.imag  # its own inverse


def spread(kernel: Tensor, axis: int, dilation: int) -> Tensor:
    """The kernel with zeros after each of its taps."""
    if dilation == 1:
        return kernel
    after = (0, 0) * (kernel.ndim - axis - 1)  # for `pad`, which begins with the last axis
    return F.pad(kernel.unsqueeze(axis + 1), (*after, 0, dilation - 1)).flatten(axis, axis + 1)


# Transforms along one axis of ``(*axes, channels)``. With few taps they are products with a matrix, which
# writes the frequencies where they belong; a fast transform would have to be given zeros between the taps.
