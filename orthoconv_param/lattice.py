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
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Size: TypeAlias = tuple[int, ...]


def centre(taps: int) -> int:
    """Index of the tap that multiplies the output's own position, for "same" padding."""
    return (taps - 1) // 2


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
    ) -> "Lattice":
        """The torus for kernels of ``size = (out, in/groups, *taps)``; checks that they fit.

        Args:
            size: of the kernel.
            is_complex: whether it is complex.
            domain: as many numbers as the kernel has axes, or one for all; None: its own taps.
            stride: likewise.
            groups: of the convolution.

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
        if any(n < k for n, k in zip(domain, taps, strict=True)):
            raise ValueError(f"domain should be at least the kernel's taps {taps}. Found {domain}")
        if any(n % s for n, s in zip(domain, stride, strict=True)):
            which = f"the kernel's own grid {taps} (domain=None)" if own else f"domain={domain}"
            raise ValueError(f"{which} should be divisible by the stride. Found stride={stride}")
        if size[0] % groups:
            raise ValueError(
                f"groups should divide the {size[0]} channels of the weight's first axis. Found {groups}"
            )
        return cls(domain, stride, groups, is_complex)

    @classmethod
    def of_degree(cls, degree: int, taps: Size, stride: Size, groups: int, is_complex: bool) -> "Lattice":
        """The smallest torus that holds a polynomial of ``degree`` in a kernel and its adjoint."""
        domain = tuple(s * (2 * degree * r + 1) for s, r in zip(stride, reach(taps, stride), strict=True))
        return cls(domain, stride, groups, is_complex, compact=True)

    @property
    def grid(self) -> Size:
        """Size of the coarse grid, on which the polyphase components live."""
        return tuple(n // s for n, s in zip(self.domain, self.stride, strict=True))

    @property
    def taps(self) -> Size:
        """Taps of the kernels that `kernel` returns: one for each point of the domain.

        A `compact` lattice has ``s - 2`` empty ones before them where the stride ``s`` is 3 or more,
        which put the kernel's centre where "same" padding expects it.
        """
        extra = (max(s - 2, 0) if self.compact else 0 for s in self.stride)
        return tuple(n + e for n, e in zip(self.domain, extra, strict=True))

    @property
    def frequencies(self) -> int:
        """How many frequencies a spectrum holds."""
        return prod(self.grid if self.is_complex else half(self.grid))

    def blocks(self, kernel_size: Size) -> Size:
        """``(out/groups, in/groups * s^d)``: the size of a kernel's matrix at each frequency."""
        return kernel_size[0] // self.groups, kernel_size[1] * prod(self.stride)

    def spectrum(self, kernel: Tensor) -> Tensor:
        """The operator's matrices, one per group and frequency.

        Args:
            kernel: ``(out, in/groups, *taps)``; with more taps than the domain has points it is
                folded, taps summed modulo the size, which changes nothing of what it does there.

        Returns:
            ``(groups, frequencies, out/groups, in/groups * s^d)``, complex.
        """
        d = len(self.domain)
        rows, columns = self.blocks(kernel.shape)
        torus = _wrap(kernel, self.domain)
        for axis in reversed(range(2, d + 2)):  # each axis becomes (coarse, phase)
            torus = torch.unflatten(torus, axis, (-1, self.stride[axis - 2]))
        coarse, phase = range(2, 2 * d + 2, 2), range(3, 2 * d + 2, 2)
        phases = torus.permute(0, 1, *phase, *coarse).reshape(-1, columns, *self.grid)
        axes = tuple(range(2, d + 2))
        if self.is_complex:
            spectrum = torch.fft.ifftn(phases, dim=axes, norm="forward")
        else:
            spectrum = torch.fft.rfftn(phases, dim=axes).conj()
        spectrum = spectrum.reshape(self.groups, rows, columns, self.frequencies)
        return spectrum.movedim(-1, 1).resolve_conj().contiguous()

    def kernel(self, spectrum: Tensor) -> Tensor:
        """The inverse of `spectrum`: the kernel ``(out, in/groups, *taps)`` of these matrices."""
        d = len(self.domain)
        grid, axes = self.grid, tuple(range(2, d + 2))
        frequencies = grid if self.is_complex else half(grid)
        spectrum = spectrum.movedim(1, -1).flatten(0, 1).unflatten(-1, frequencies)
        if self.is_complex:
            phases = torch.fft.fftn(spectrum, dim=axes, norm="forward")
        else:
            phases = torch.fft.irfftn(spectrum.conj(), s=grid, dim=axes)
        torus = phases.unflatten(1, (-1, *self.stride))
        order = [axis for i in range(2, d + 2) for axis in (i + d, i)]  # (coarse, phase) pairs
        torus = torus.permute(0, 1, *order).reshape(*torus.shape[:2], *self.domain)
        if not self.compact:
            return torch.roll(torus, [centre(n) for n in self.domain], axes)
        origin = [s * centre(n) for n, s in zip(grid, self.stride, strict=True)]
        extra = [t - n for t, n in zip(self.taps, self.domain, strict=True)]
        padding = [p for e in reversed(extra) for p in (e, 0)]
        return F.pad(torch.roll(torus, origin, axes), padding)

    def choose(self, choice: Callable[..., Tensor], *spectra: Tensor) -> Tensor:
        """``choice(*spectra)``, made once for each pair of frequencies ``+w, -w`` and conjugated.

        Where a frequency is its own negative the arguments are real, and so is the choice. What
        is not unique (a null space, a random matrix) then still belongs to a real kernel.
        """
        chosen = choice(*spectra)
        if self.is_complex:
            return chosen
        own, first, second = _mirror(self.grid)
        chosen[:, second] = chosen[:, first].conj()
        chosen[:, own] = choice(*(x[:, own].real for x in spectra)).to(chosen.dtype)
        return chosen

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


def half(grid: Size) -> Size:
    """Size of the half-spectrum that ``rfftn`` keeps on a ``grid``."""
    return (*grid[:-1], grid[-1] // 2 + 1)


def reach(taps: Size, stride: Size) -> Size:
    """How far from its centre a kernel goes, in coarse points: the larger of the two sides."""
    return tuple(
        max(-(-centre(k) // s), (k - 1 - centre(k)) // s) for k, s in zip(taps, stride, strict=True)
    )


def sampling(taps: Size, stride: Size) -> tuple[Size, float]:
    """A coarse grid that sees the norm of a kernel's spectrum at *all* frequencies.

    A real trigonometric polynomial of degree ``r`` is at most ``1 / cos(pi r / n)`` times its
    maximum over ``n > 2 r`` equispaced points (near its maximum it lies above a cosine of
    frequency ``r``: M. Riesz); ``u^H iA(w) u`` is one, for each vector ``u`` and each axis.

    Returns:
        The grid, and the factor by which the maximum over its frequencies is to be multiplied.
    """
    radii = reach(taps, stride)
    grid = tuple(8 * r + 1 for r in radii)
    return grid, 1 / prod(cos(pi * r / n) for r, n in zip(radii, grid, strict=True))


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


def _wrap(kernel: Tensor, domain: Size) -> Tensor:
    """Embeds or folds a kernel into a torus, its centre at the origin."""
    taps = kernel.shape[2:]
    padding = [p for k, n in zip(taps, domain, strict=True) for p in (ceil(k / n) * n - k, 0)]
    kernel = F.pad(kernel, padding[::-1]) if any(padding) else kernel
    for axis, (k, n) in enumerate(zip(taps, domain, strict=True), start=2):
        if k > n:
            kernel = kernel.unflatten(axis, (-1, n)).sum(axis)
    return torch.roll(kernel, [-centre(k) for k in taps], tuple(range(2, kernel.ndim)))


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
