"""`Periodic`: what a kernel or a periodic module is on a torus, an operator block diagonal in frequency."""

from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import runtime
from ..checks import Size, check_dtype, check_finite, count, per_axis
from ..convert import convolves, geometry_of
from ..module import operator_of
from ..parametrizations.partition import Block
from ..torus.boundary import boundary_of
from ..torus.lattice import Lattice, Placement


class Periodic(NamedTuple):
    """A kernel on a torus.

    Args:
        kernel: the kernel.
        lattice: the torus.
        placement: of the kernel's taps.
    """

    kernel: Tensor
    lattice: Lattice
    placement: Placement

    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """Compute the operator's matrices in double precision.

        Raises:
            ValueError: if the kernel is not finite.
        """
        check_finite("convolution", self.kernel)
        double = torch.complex128 if self.lattice.is_complex else torch.float64
        return self.lattice.spectrum(self.kernel.detach().to(double), self.placement)

    def singular_values(self) -> Tensor:
        """Compute the singular values of the operator's matrices, ``(groups, frequencies, rank)``."""
        return torch.linalg.svdvals(self.spectrum())

    def gain(self) -> float:
        """Compute the square root of the mean square of all singular values.

        Their squares add up to those of the operator's entries: the taps, once for each coarse point.
        """
        M = self.spectrum()
        values = self.lattice.groups * min(M.shape[-2:])  # for each coarse point
        return self.lattice.kernel(M).norm().item() / sqrt(values)

    def block(self, block: Block) -> "Periodic":
        """Return the operator that joins the channels of a block of the weight."""
        kernel = self.kernel[block]
        lattice = Lattice(self.lattice.domain, self.lattice.stride, 1, kernel.is_complex())
        return self._replace(kernel=kernel, lattice=lattice)

    def at_all_frequencies(self) -> "Periodic":
        """Return the same operator, with the matrices of the negative frequencies of a real kernel too."""
        lattice = Lattice(self.lattice.domain, self.lattice.stride, self.lattice.groups, True)
        return self._replace(lattice=lattice)


def of_kernel(
    kernel: Tensor,
    domain: int | Size,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> Periodic:
    """Return the operator that a kernel is on periodic images, with its taps centred.

    Raises:
        TypeError, ValueError: if the arguments do not describe a convolution.
    """
    check_dtype("convolution", kernel)
    axes = kernel.ndim - 2
    per_axis("domain", domain, max(axes, 1))  # not None
    count("groups", groups)
    lattice = Lattice.of_kernel(kernel.shape, kernel.is_complex(), domain, stride, groups, folds=True)
    placement = Placement.centred(tuple(kernel.shape[2:]), per_axis("dilation", dilation, axes))
    return Periodic(kernel, lattice, placement)


def periodic(module: Any, domain: Size) -> Periodic | None:
    """Return the operator of a periodic module for images on a domain.

    Returns:
        None if the module is not periodic there: it has another boundary, or hooks or a forward of its own;
        its padding does not keep the size, or the stride does not divide the domain.

    Raises:
        ValueError: if a module of this package does not take the domain.
    """
    operator = operator_of(module)
    if operator is not None:
        operator.action.check_domain(domain)
    if not convolves(module) or runtime.is_hooked(module):
        return None
    boundary = operator.boundary if operator is not None else boundary_of(module)
    if boundary is None or not boundary.is_periodic:
        return None
    try:
        geometry = geometry_of(module)
    except ValueError:  # its padding does not keep the size
        return None
    if any(n % s for n, s in zip(domain, geometry.stride, strict=True)):
        return None
    return Periodic(module.weight.detach(), geometry.lattice(domain), geometry.placement)
