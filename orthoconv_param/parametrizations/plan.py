"""`Plan`: how one call makes an orthogonal kernel. All choices that cost or save time are made here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias

import torch
from torch import Tensor

from .. import runtime
from ..checks import Size
from ..matrices.expm import expm_frame
from ..matrices.maps import Trivialization, trivialization
from ..matrices.norms import norm_bound_of_frame
from ..matrices.products import skew
from ..torus.geometry import Geometry
from ..torus.lattice import Lattice, Placement, sampling
from .degree import SINGLE_TOLERANCE, SMALLEST_LEVEL, Degree, smallest_degree
from .truncation import is_affordable, shortest

Reader: TypeAlias = Callable[[Tensor], float | None]

_SINGLE = (torch.float32, torch.complex64)
_LARGEST_NORM_OF_SMALLER = 16  # above which a smaller torus seldom is one
_FEWEST_CHANNELS_OF_SMALLER = 8


@dataclass(frozen=True)
class Family:
    """The orthogonal kernels that generators of one geometry reach.

    Args:
        geometry: of the generator.
        domain: on which they are orthogonal; None for the generator's own grid, ``"any"`` for every one.
        triv: from skew to unitary matrices.
        tolerance: their largest defect, where they are truncated. Half of it is for what is left out.
    """

    geometry: Geometry
    domain: Size | str | None
    triv: str | Trivialization
    tolerance: float

    @property
    def is_compact(self) -> bool:
        """Return True if the kernels are those of an infinite grid, truncated."""
        return self.domain == "any"

    @property
    def reach(self) -> Size:
        """Return how far a generator's taps go from its centre, on the coarse grid."""
        return self.geometry.placement.reach(self.geometry.taps, self.geometry.stride)

    def degree(self, norm: float) -> Degree:
        """Return the degree that no compact kernel of a norm exceeds."""
        return Degree.of(self.triv, self.tolerance, self.reach, norm)

    @torch.no_grad()
    def measured(self, degree: Degree, kernel: Tensor, norm: float) -> Degree:
        """Return the degree that the compact kernel of one generator of that norm needs.

        It is measured on a kernel that is ten times as precise. A generator smaller than the smallest
        level is scaled to it: at zero derivatives need taps where values do not.
        """
        g, scale = self.geometry, max(1.0, SMALLEST_LEVEL / norm) if norm > 0 else 1.0
        ample = smallest_degree(self.triv, degree.level, self.tolerance / 10, self.reach)
        if ample is None:
            return replace(degree, edge=inf)
        lattice = self.lattice(replace(degree, value=ample))
        if not is_affordable(ample, self.reach, lattice.blocks(g.size), g.groups):
            return replace(degree, edge=inf)
        X = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float64)) * scale
        Q = self.unitary(lattice.spectrum(X, g.placement), norm * scale)
        phases = Lattice(lattice.grid, (1,) * g.axes, g.groups, g.is_complex, compact=True)
        value, edge = shortest(phases.kernel(Q), g.groups, ample, self.reach, self.tolerance / 2)
        if value >= degree.proved:  # which is enough whatever the edges become
            return replace(degree, edge=inf)
        return replace(degree, value=value, edge=float(f"{edge:.3g}"))  # the same whatever was rounded

    def unitary(self, spectrum: Tensor, norm: float | None = None) -> Tensor:
        """Return the unitary matrices, or frames, of a spectrum's skew part, whose norm may be known."""
        rows, columns = spectrum.shape[-2:]
        if self.triv == "expm" and max(rows, columns) > 1:
            return expm_frame(spectrum, norm)
        return trivialization(self.triv)(skew(spectrum))[..., :rows, :columns]

    def lattice(self, degree: Degree | None) -> Lattice:
        """Return the torus whose points are the kernel's taps.

        Raises:
            RuntimeError: if the kernel is compact and its degree is not known.
        """
        g = self.geometry
        if not isinstance(self.domain, str):
            return g.lattice(self.domain or g.taps)
        if degree is None:
            raise RuntimeError(
                "the kernel's size is not known yet: call the module once outside of torch.compile and vmap"
            )
        return Lattice.of_degree(degree.value, self.reach, g.stride, g.groups, g.is_complex)

    def reads_more_of(self, images: Size, degree: Degree | None) -> bool:
        """Return True if images are so small that a compact kernel wraps around their torus.

        Their torus then has no more frequencies than the kernel's, and nothing needs to be truncated on it.
        (One frequency is that of a single tap, which does not wrap.)
        """
        return self.is_compact and (
            1 < self.lattice(degree).frequencies >= self.geometry.lattice(images).frequencies
        )


@dataclass(frozen=True)
class Plan:
    """How the matrices of an orthogonal kernel are made from its generator.

    Args:
        lattice: on which they are.
        placement: of the generator's taps there.
        dtype: in which the generator is exponentiated.
        norm: of its skew part, at most; None if it is not known.
        degree: of the compact kernel, from now on.
        smaller: a torus on which the exponential has all the taps that count, if it is taken there.
        refined: the precision in which rounding is removed; None if it is not.
        truncated: whether the matrices are those of a compact kernel.
    """

    lattice: Lattice
    placement: Placement
    dtype: torch.dtype
    norm: float | None
    degree: Degree | None
    smaller: Lattice | None
    refined: torch.dtype | None
    truncated: bool


def make_plan(
    family: Family,
    kernel: Tensor,
    degree: Degree | None,
    reader: Reader,
    images: Size | None = None,
    dilation: Size = (),
    measures: bool = True,
) -> Plan:
    """Decide how to exponentiate a generator.

    Args:
        family: of the kernel.
        kernel: the generator in space, in single precision at least.
        degree: of the compact kernel up to now.
        reader: reads a scalar, or returns None where it has not arrived.
        images: the domain of the images, if the matrices may be made on that: see `Family.reads_more_of`.
        dilation: with which the compact kernel is applied to them.
        measures: whether a degree that follows from the norm is measured on the kernel.
    """
    geometry = family.geometry
    norm = None
    if family.is_compact:
        norm, suffices = norm_of(geometry, kernel, reader), False
        if norm is None and runtime.may_read(kernel) and runtime.is_batched(kernel):
            # under vmap all kernels have as many taps: more, if the one of the largest norm needs them
            norm, measures = norm_of(geometry, kernel, lambda each: reader(runtime.largest(each))), False
            suffices = degree is not None and norm is not None and norm <= degree.level
        if not suffices:
            norm, degree = follow(family.degree, degree, norm, kernel)
        waits = measures and runtime.may_wait(kernel.device)
        if waits and degree is not None and norm is not None and not degree.is_measured:
            degree = family.measured(degree, kernel, norm)
    elif family.triv == "expm" and family.domain is not None and runtime.may_wait(kernel.device):
        norm = norm_of(geometry, kernel, reader)
    lattice, placement, truncated = family.lattice(degree), geometry.placement, family.is_compact
    # dilation permutes the phases of a stride, which makes another generator
    permuted = max(dilation, default=1) > 1 and max(geometry.stride) > 1
    if images is not None and not permuted and family.reads_more_of(images, degree):
        lattice, placement, truncated = geometry.lattice(images), placement.dilated(dilation), False
    # Note [rounding below tol]
    # A compact kernel also has to be orthogonal between the frequencies of its torus, where rounding
    # shows more. Up to norms of 2 it is at most 5 eps in a kernel of single precision, and beyond if a step
    # of Newton and Schulz follows the squarings. That step in double precision leaves eps * norm, and
    # double precision throughout nothing to speak of.
    dtype, refined = kernel.dtype, None
    if truncated and degree is not None and dtype in _SINGLE:
        rounding, double = torch.finfo(dtype).eps, torch.promote_types(dtype, torch.float64)
        if rounding * degree.level > family.tolerance:
            dtype = double
        elif 8 * rounding > family.tolerance:
            refined = torch.complex128
        elif 4 * rounding * degree.level > family.tolerance:
            refined = torch.complex64
    smaller = None if family.is_compact or dtype not in _SINGLE else smaller_torus(family, norm)
    return Plan(lattice, placement, dtype, norm, degree, smaller, refined, truncated)


def smaller_torus(family: Family, norm: float | None) -> Lattice | None:
    """Return a torus whose exponential has all the taps that count on a given one, at half the cost."""
    geometry, lattice = family.geometry, family.lattice(None)
    if norm is None or not norm < _LARGEST_NORM_OF_SMALLER:
        return None
    if max(lattice.blocks(geometry.size)) < _FEWEST_CHANNELS_OF_SMALLER:
        return None
    degree = Degree.of(family.triv, SINGLE_TOLERANCE, family.reach, norm).value
    smaller = Lattice.of_degree(degree, family.reach, geometry.stride, geometry.groups, geometry.is_complex)
    return smaller if 2 * smaller.frequencies < lattice.frequencies else None


def norm_of(geometry: Geometry, kernel: Tensor, reader: Reader) -> float | None:
    """Return a bound on the norm of a generator's skew part at all frequencies, if it can be read."""
    if not runtime.may_read(kernel):
        return None
    points, factor = sampling(geometry.placement.reach(geometry.taps, geometry.stride))
    with torch.no_grad():
        spectrum = geometry.lattice(points).resolution(points).spectrum(kernel.detach(), geometry.placement)
        return reader(norm_bound_of_frame(spectrum).amax() * factor)


def follow(
    needed: Callable[[float], Degree], degree: Degree | None, norm: float | None, kernel: Tensor
) -> tuple[float | None, Degree | None]:
    """Return the norm, if it is known, and the degree that it needs.

    Under `torch.compile`, `vmap` and graph capture a value may not be readable: the degree stays.

    Args:
        needed: the degree that a norm needs.
        degree: up to now.
        norm: as it was read.
        kernel: the generator.
    """
    if degree is None and kernel.is_meta:
        return None, needed(0.0)
    unknown = norm is None or norm != norm or (norm == inf and not runtime.may_wait(kernel.device))
    if norm is None or (unknown and degree is not None):
        return None, degree  # not there yet, or a generator that is not finite: its kernel says so
    if degree is not None and degree.covers(norm):
        return norm, degree
    return norm, needed(norm)
