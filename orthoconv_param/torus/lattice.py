r"""Kernels and their spectra on a periodic grid: every index convention of the package.

PyTorch's convolution is a cross-correlation: with a kernel ``w`` of ``k`` taps centred at
``c = (k - 1) // 2`` and stride ``s``,

    y[o, q] = sum_{i, d} w[o, i, d] x[i, s q + d - c].

Split the input into its ``s^d`` polyphase components ``x_r[q] = x[s q + r]``. On these a strided
convolution is one of stride 1, on the coarse grid ``n / s``. So on a torus every convolution is block
diagonal in frequency, with one ``out x (in * s^d)`` matrix for each coarse frequency

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
from .phases import join_phases, split_phases, spread

Chosen = TypeVar("Chosen", Tensor, tuple[Tensor, ...])


def centre(taps: int) -> int:
    """Return the index of the tap that multiplies the output's own position, for "same" padding."""
    return (taps - 1) // 2


@dataclass(frozen=True)
class Placement:
    """The positions of a kernel's taps: tap ``d`` multiplies the sample ``dilation * d - origin`` away.

    Args:
        dilation: of the kernel.
        origin: how far the first tap stands before the output's position: the padding on that side.
    """

    dilation: Size
    origin: Size

    @classmethod
    def centred(cls, taps: Size, dilation: Size | None = None) -> "Placement":
        """Return the placement that has the centre tap at the output's own position."""
        dilation = dilation or (1,) * len(taps)
        return cls(dilation, tuple(r * centre(k) for k, r in zip(taps, dilation, strict=True)))

    def dilated(self, factors: Size) -> "Placement":
        """Return the placement of the taps further apart, by these factors."""
        scaled = (
            tuple(a * r for a, r in zip(x, factors, strict=True)) for x in (self.dilation, self.origin)
        )
        return Placement(*scaled)

    def extent(self, taps: Size) -> Size:
        """Return how many samples a kernel spans, from its first tap to its last."""
        return tuple(r * (k - 1) + 1 for k, r in zip(taps, self.dilation, strict=True))

    def after(self, taps: Size) -> Size:
        """Return how far the last tap stands after the output's position: the padding on that side."""
        return tuple(n - 1 - o for n, o in zip(self.extent(taps), self.origin, strict=True))

    def reversed(self, taps: Size) -> "Placement":
        """Return the placement of the taps in reverse order, on the other side of the origin."""
        return Placement(self.dilation, self.after(taps))

    def reach(self, taps: Size, stride: Size) -> Size:
        """Return how far from its centre a kernel goes, in coarse points: the larger of the two sides."""
        sides = zip(self.origin, self.after(taps), stride, strict=True)
        return tuple(max(ceil(before / s), after // s) for before, after, s in sides)


@dataclass(frozen=True)
class Lattice:
    """A torus, and the kernels that act on it.

    Args:
        domain: size of the (fine) grid, in samples.
        stride: of the convolution; divides ``domain``.
        groups: of the convolution; divides both of its channel counts.
        is_complex: True if kernels are complex.
        compact: True if the torus only serves to compute the kernel of an infinite grid. It then
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
        """Return the torus for kernels of ``size = (out, in/groups, *taps)``, if they fit.

        Args:
            size: of the kernel.
            is_complex: True if the kernel is complex.
            domain: one number for each of the kernel's axes of space, or one for all. None: its own taps.
            stride: of the convolution: one number for each of these axes, or one for all.
            groups: of the convolution.
            dilation: of the kernel. None: 1.
            folds: True to fold a kernel larger than the domain onto it; False to refuse it.

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
            raise ValueError(
                f"domain should be at least the kernel's {what} {extent}. Found {domain}: use larger "
                "images, or fewer taps, or what is orthogonal on images of every size"
            )
        if any(n % s for n, s in zip(domain, stride, strict=True)):
            which = f"the kernel's own size {taps} (domain=None)" if own else f"domain={domain}"
            raise ValueError(f"{which} should be divisible by the stride. Found stride={stride}")
        if size[0] % groups:
            raise ValueError(
                f"groups should divide the {size[0]} channels of the weight's first axis. Found {groups}"
            )
        return cls(domain, stride, groups, is_complex)

    @classmethod
    def of_degree(cls, degree: int, reach: Size, stride: Size, groups: int, is_complex: bool) -> "Lattice":
        """Return the smallest torus that holds a polynomial of ``degree`` in a kernel and its adjoint."""
        domain = tuple(s * (2 * degree * r + 1) for s, r in zip(stride, reach, strict=True))
        return cls(domain, stride, groups, is_complex, compact=True)

    @property
    def taps(self) -> Size:
        """Return the number of taps, on each axis, of the kernels that `kernel` returns.

        There is one for each point of the domain. A `compact` lattice of stride ``s`` has ``s - 1`` empty
        ones before them. The number of taps is then odd, and the origin is in the middle, as padding of
        ``K // 2`` expects.
        """
        extra = (s - 1 if self.compact else 0 for s in self.stride)
        return tuple(n + e for n, e in zip(self.domain, extra, strict=True))

    def fills(self, domain: Size) -> bool:
        """Return True if this is the torus of images on a domain, or one that holds them.

        A torus that only serves to compute a compact kernel is not, nor is the single coarse point of a
        kernel of one tap.
        """
        return not self.compact and all(n >= m for n, m in zip(self.domain, domain, strict=True))

    @property
    def stored(self) -> Size:
        """Return the size of the part of the Fourier grid that a spectrum holds."""
        return self.grid if self.is_complex else half(self.grid)

    @property
    def frequencies(self) -> int:
        """Return how many frequencies a spectrum holds."""
        return prod(self.stored)

    def wavenumbers(self) -> Tensor:
        """Return the frequencies themselves, ``(frequencies, d)``, in cycles per point of the domain."""
        last = torch.fft.fftfreq if self.is_complex else torch.fft.rfftfreq
        transforms = [torch.fft.fftfreq] * (len(self.grid) - 1) + [last]
        axes = zip(transforms, self.grid, self.stride, strict=True)
        each = [f(n, d=s, dtype=torch.float64) for f, n, s in axes]
        return torch.stack(torch.meshgrid(*each, indexing="ij"), -1).flatten(0, -2)

    def blocks(self, kernel_size: Size) -> Size:
        """Return the size of a kernel's matrix at each frequency, ``(out/groups, in/groups * s^d)``."""
        return kernel_size[0] // self.groups, kernel_size[1] * prod(self.stride)

    def phases(self, x: Tensor) -> Tensor:
        """Split images ``(batch, channels, *domain)`` into phases ``(batch, channels * s^d, *grid)``.

        These are the polyphase components: phase ``r`` has the samples ``s q + r``.
        """
        return split_phases(x, [*self.stride])

    def interleave(self, phases: Tensor) -> Tensor:
        """Return the images that have these polyphase components: the inverse of `phases`."""
        return join_phases(phases, [*self.stride])

    def spectrum(self, kernel: Tensor, placement: Placement | None = None) -> Tensor:
        """Return the operator's matrices, one for each group and frequency.

        Args:
            kernel: ``(out, in/groups, *taps)``. If it has more taps than the domain has points, it is
                folded: taps are summed modulo the size. On the domain that is the same operator.
            placement: of its taps. Default: centred.

        Returns:
            ``(groups, frequencies, out/groups, in/groups * s^d)``, complex.
        """
        placement = placement or Placement.centred(tuple(kernel.shape[2:]))
        phases, positions = self._polyphase(kernel, placement)
        # With the channels last the matrices need no transposed copy in the end.
        x = phases.flatten(0, 1).movedim(0, -1)
        for axis in reversed(range(len(self.grid))):
            folded = not self.is_complex and axis == len(self.grid) - 1
            x = analyse(x, axis, self.grid[axis], positions[axis], folded)
        height, columns = self.blocks(kernel.shape)
        return x.reshape(self.frequencies, self.groups, height, columns).movedim(1, 0).contiguous()

    def _polyphase(self, kernel: Tensor, placement: Placement) -> tuple[Tensor, list[range]]:
        """Return the kernel ``(out, in/groups * s^d, *taps)`` on the coarse grid, and its taps' places."""
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
        """Return the kernel ``(out, in/groups, *taps)`` of these matrices: the inverse of `spectrum`.

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
        """Return ``choice(*spectra)``, one tensor or several, so that it belongs to a real kernel.

        The choice is made once for each pair of frequencies ``+w, -w``: the value at ``-w`` is the
        conjugate of that at ``w``. Where a frequency is its own negative, the function is given real
        matrices, and returns real ones. This matters where the choice is not unique: a null space, or a
        random matrix. (Complex kernels need none of it.)
        """
        if self.is_complex:
            return choice(*spectra)
        own, first, second = mirror(self.grid)
        real = choice(*(x[:, own].real for x in spectra))
        chosen = choice(*spectra)  # may overwrite them
        pairs = [(chosen, real)] if isinstance(chosen, Tensor) else zip(chosen, real, strict=True)
        for x, of_own in pairs:
            for to, source in zip(second, first, strict=True):
                x[:, to] = x[:, source].conj()
            x[:, own] = of_own.to(x.dtype)
        return chosen

    def each(self, function: Callable[..., Tensor], *spectra: Tensor) -> Tensor:
        """Apply a function to matrices: to real ones where a frequency is its own negative."""
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
        """Return the lattice of the same convolutions on a torus of ``points`` coarse points."""
        domain = tuple(s * n for s, n in zip(self.stride, points, strict=True))
        return Lattice(domain, self.stride, self.groups, self.is_complex)


def sampling(reach: Size, density: int = 8) -> tuple[Size, float]:
    """Return a coarse grid whose frequencies bound a spectrum's norm at *all* frequencies.

    This holds for kernels of that ``reach``. A real trigonometric polynomial of degree ``r`` is at most
    ``1 / cos(pi r / n)`` times its maximum over ``n > 2 r`` equispaced points. (Near its maximum it lies
    above a cosine of frequency ``r``: M. Riesz.) ``u^H iA(w) u`` is such a polynomial, for each vector
    ``u`` and along each axis.

    Args:
        reach: of the kernels.
        density: points for each unit of it, more than 2.

    Returns:
        The grid, and the factor by which the maximum over its frequencies is to be multiplied.
    """
    grid = tuple(density * r + 1 for r in reach)
    return grid, 1 / prod(cos(pi * r / n) for r, n in zip(reach, grid, strict=True))


def pack(kernel: Tensor) -> Tensor:
    """Return the kernel's Fourier coefficients on its own grid, as a tensor of its own shape and dtype.

    Real kernels are transformed by the Hartley transform ``Re f - Im f``, complex ones by the unitary DFT.
    Both are orthonormal, so an optimizer sees the same geometry as in space.
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
