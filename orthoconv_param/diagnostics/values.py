"""Singular values of convolutions: how they change the norm of their input.

A kernel is measured as the operator that it is on periodic images. A module is measured as the operator
that its own forward computes, zero padding included. `OnTorus` is the operator on a torus that a module is,
or is a part of: `report` and the plots show that one.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import runtime
from ..checks import Size, check_dtype, check_finite, count, per_axis
from ..convert import convolves, geometry_of
from ..module import operator_of
from ..torus.boundary import boundary_of
from ..torus.geometry import CONVOLUTIONS, torch_class
from ..torus.lattice import Lattice, Placement

_LARGEST_DENSE = 2**27  # entries, one gigabyte in double precision


def singular_values(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> Tensor:
    """Compute all singular values of a convolution on images of a given size.

    For a kernel they are those of the operator that the kernel is on periodic images. For a module they are
    those of its own forward, the bias aside: with zero padding, of that operator between zeros. They are
    exact. (`report` shows a zero-padded module by the operator on a larger torus instead.)

    An operator that is periodic and keeps the size is block diagonal in frequency. Its values are computed
    in double precision from the kernel. A kernel larger than the domain is folded onto it, which is the
    same operator there. Any other module (with zero padding, or a forward of its own) is applied to each
    unit image, and its dense matrix is decomposed.

    Args:
        convolution: a kernel ``(out, in/groups, *taps)``, or ``(in, out/groups, *taps)`` of a transposed
            convolution; or an ``nn.Conv*`` or ``nn.ConvTranspose*``, orthogonal or not.
        domain: size of the images (of a transposed convolution: of its output), one for each axis or one
            for all.
        stride: of a kernel's convolution; a module has its own.
        groups: of a kernel's convolution.
        dilation: of a kernel's convolution.

    Returns:
        A float64 tensor. For a kernel or a periodic module: ``(groups, frequencies, min(out/groups,
        in/groups * s^d))``, in descending order for each frequency; for a real kernel, the half of the
        frequencies that ``rfftn`` keeps. For any other module: all values, in descending order.

    Raises:
        TypeError, ValueError: for arguments that do not describe a convolution, or are not finite; for a
            module that is not periodic, if its dense matrix has more than ``2^27`` entries.

    Cost: one singular value decomposition for each frequency, or one of the dense matrix.

    Source: Sedghi, Gupta, Long, *The singular values of convolutional layers*, arXiv:1805.10408.

    Example:
        >>> import torch
        >>> from orthoconv_param import singular_values
        >>> singular_values(torch.ones(1, 1, 1, 2), domain=(1, 4)).flatten().tolist()
        [2.0, 1.4142135623730951, 0.0]
    """
    if isinstance(convolution, nn.Module):
        if (stride, groups, dilation) != (1, 1, 1):
            raise ValueError(
                "stride, groups and dilation should not be given with a module, which has its own"
            )
        return _of_module(convolution, domain)
    return kernel_on_torus(convolution, domain, stride, groups, dilation).singular_values()


def orthogonality_defect(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> float:
    """Compute how far a convolution is from orthogonal, on images of a given size.

        orthogonality_defect = max |singular value - 1|

    As in `singular_values`, a module's own forward is measured, zero padding included. A module that was
    made `orthogonal` with zero padding is a part of an orthogonal operator, and loses what leaves the
    image. So in general its defect is not 0.

    Args:
        convolution: a kernel or a module, as in `singular_values`.
        domain: size of the images.
        stride: of a kernel's convolution.
        groups: of a kernel's convolution.
        dilation: of a kernel's convolution.

    Returns:
        0 for an orthogonal convolution, and for a semi-orthogonal one where channels differ.

    Raises:
        TypeError, ValueError: as `singular_values` does.

    Cost: that of `singular_values`.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional, orthogonality_defect
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> w = functional.nearest_orthogonal(torch.randn(8, 8, 3, 3, dtype=torch.float64))
        >>> [f"{orthogonality_defect(w, n):.0e}" for n in (3, 32)]  # its own grid, and a larger one
        ['1e-15', '1e+00']
    """
    values = singular_values(convolution, domain, stride=stride, groups=groups, dilation=dilation)
    return (values - 1).abs().max().item()


def _of_module(module: Any, domain: int | Size) -> Tensor:
    check_convolution(module)
    grid = per_axis("domain", domain, len(module.stride))
    if module.transposed and any(n % s for n, s in zip(grid, module.stride, strict=True)):
        raise ValueError(f"domain should be divisible by the stride {module.stride}. Found {grid}")
    acting = on_torus_if_any(module, grid)
    return acting.singular_values() if acting is not None and acting.is_whole else of_dense(module, grid)


def check_convolution(module: Any) -> None:
    """Raise if a module is no convolution.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(module, CONVOLUTIONS):
        raise TypeError(
            "convolution should be a kernel, an nn.Conv* or an nn.ConvTranspose*. "
            f"Found {type(module).__name__}"
        )


class OnTorus(NamedTuple):
    """The operator that a kernel is on a torus.

    Args:
        kernel: the kernel.
        lattice: the torus.
        placement: of the kernel's taps.
        is_whole: True if the images fill the torus: then this is the module's own operator. False if they
            lie between zeros there: then the module's own operator is a part of this one.
    """

    kernel: Tensor
    lattice: Lattice
    placement: Placement
    is_whole: bool

    def spectrum(self) -> Tensor:
        """Compute the operator's matrices in double precision.

        Raises:
            ValueError: if the kernel is not finite.
        """
        check_finite("convolution", self.kernel)
        double = torch.complex128 if self.kernel.is_complex() else torch.float64
        with torch.no_grad():
            return self.lattice.spectrum(self.kernel.detach().to(double), self.placement)

    def singular_values(self) -> Tensor:
        """Compute the singular values of the operator's matrices, ``(groups, frequencies, rank)``."""
        return torch.linalg.svdvals(self.spectrum())


def kernel_on_torus(
    kernel: Tensor,
    domain: int | Size,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> OnTorus:
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
    return OnTorus(kernel, lattice, placement, True)


def on_torus(module: Any, domain: Size) -> OnTorus:
    """Return the operator on a torus that a module is, or is a part of, for images on a domain.

    A periodic module is the operator on the torus of the domain. A module that pads by zeros is a part of
    the operator on a larger torus, where the images lie between zeros.

    Raises:
        ValueError: if there is none. The module has hooks or a forward of its own; its padding mirrors or
            repeats the image's edge, or does not keep the size; it does not take the domain; or the stride
            does not divide that.
    """
    if not convolves(module) or runtime.is_hooked(module):
        base: Any = torch_class(module)
        its_own = "hooks" if convolves(module) else "a forward"
        raise ValueError(
            f"convolution should compute what nn.{base.__name__} does, so that its weight "
            f"has its spectrum. Found {type(module).__name__}, with {its_own} of its own"
        )
    operator = operator_of(module)
    geometry = geometry_of(module)
    if operator is not None:
        operator.action.check_domain(domain)
    if any(n % s for n, s in zip(domain, geometry.stride, strict=True)):
        raise ValueError(f"domain should be divisible by the stride {geometry.stride}. Found {domain}")
    boundary = operator.boundary if operator is not None else boundary_of(module)
    if boundary is not None and boundary.has_walls:
        raise ValueError(
            "convolution should be periodic, or between zeros, so that it has a spectrum: between walls "
            "what it does depends on the place, and singular_values measures it. Found walls"
        )
    if boundary is None:
        raise ValueError(
            "convolution should be periodic, or between zeros, so that it has a spectrum. "
            f"Found padding_mode={module.padding_mode!r}"
        )
    torus = boundary.torus(domain, geometry.placement.extent(geometry.taps), geometry.stride)
    if operator is not None and operator.action.domain is not None and not boundary.is_periodic:
        torus = geometry.taps  # its kernel has one tap for each point of that torus
    kernel = module.weight.detach()
    return OnTorus(kernel, geometry.lattice(torus), geometry.placement, boundary.is_periodic)


def on_torus_if_any(module: Any, domain: Size) -> OnTorus | None:
    """Return `on_torus`, or None if there is no such operator.

    Raises:
        ValueError: if a module of this package does not take the domain.
    """
    operator = operator_of(module)
    if operator is not None:
        operator.action.check_domain(domain)
    try:
        return on_torus(module, domain)
    except ValueError:
        return None


@torch.no_grad()
def of_dense(module: Any, domain: Size) -> Tensor:
    """Compute the singular values of the dense matrix of a module's own forward, zero padding included.

    Raises:
        ValueError: if the matrix has more than ``2^27`` entries, or is not finite.
    """
    size = domain
    if module.transposed:
        size = tuple(n // s for n, s in zip(domain, module.stride, strict=True))
    numbers = module.in_channels * prod(size)
    zero = torch.zeros(1, module.in_channels, *size, dtype=module.weight.dtype, device=module.weight.device)
    bias = module(zero)
    if numbers * bias.numel() > _LARGEST_DENSE:
        raise ValueError(
            f"domain should be smaller: the dense matrix of a module that is not periodic should have at "
            f"most {_LARGEST_DENSE} entries. Found {bias.numel()} x {numbers}. (The periodic operator of "
            "module.weight is cheap.)"
        )
    pieces = (
        torch.eye(numbers, dtype=zero.dtype, device=zero.device).reshape(-1, *zero.shape[1:]).split(256)
    )
    matrix = torch.cat([(module(piece) - bias).flatten(1) for piece in pieces])
    check_finite("convolution", matrix)
    return torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float64)))
