r"""What a convolution does to the size of its input: singular values and their distance from 1."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import CONVOLUTIONS, convolves, periodic
from .exponential import check_dtype
from .lattice import Lattice, Placement, Size, count, per_axis

_LARGEST_DENSE = 2**27  # entries: one gigabyte


def singular_values(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> Tensor:
    r"""All singular values of a convolution on images of a given size.

    Of a kernel: of the operator that it is on periodic images. Of a module: of the operator that the
    module is, its bias aside. Exact: where the operator is periodic and keeps the size, it is block
    diagonal in frequency, and computed in double precision from the kernel; a kernel larger than the
    domain is folded onto it, which is what it does there. Any other module (with zero padding, or a
    forward of its own) is applied to each unit image, and the dense matrix is decomposed.

    Args:
        convolution: a kernel ``(out, in/groups, *taps)``, or ``(in, out/groups, *taps)`` of a transposed
            convolution; or an ``nn.Conv*`` or ``nn.ConvTranspose*``, orthogonal or not.
        domain: size of the images (of a transposed convolution: of its output), one for each axis or one
            for all.
        stride: of a kernel's convolution; a module has its own.
        groups: likewise.
        dilation: likewise.

    Returns:
        float64. Of a kernel or a periodic module, ``(groups, frequencies, min(out/groups, in/groups *
        s^d))``, in descending order for each frequency; of a real kernel, the half of the frequencies
        that ``rfftn`` keeps. Of any other module all of them, in descending order.

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
    check_dtype("convolution", convolution)
    axes = convolution.ndim - 2
    taps = tuple(convolution.shape[2:])
    per_axis("domain", domain, max(axes, 1))  # not None
    count("groups", groups)
    lattice = Lattice.of_kernel(
        convolution.shape, convolution.is_complex(), domain, stride, groups, folds=True
    )
    return _of_kernel(convolution, lattice, Placement.centred(taps, per_axis("dilation", dilation, axes)))


def orthogonality_defect(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> float:
    r"""How far a convolution is from orthogonal: ``max |singular value - 1|`` on images of a given size.

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


@torch.no_grad()
def _of_kernel(kernel: Tensor, lattice: Lattice, placement: Placement) -> Tensor:
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError("convolution should be finite. Found nan or inf")
    double = torch.complex128 if kernel.is_complex() else torch.float64
    return torch.linalg.svdvals(lattice.spectrum(kernel.to(double), placement))


def _of_module(module: Any, domain: int | Size) -> Tensor:
    if not any(isinstance(module, convolution) for convolution in CONVOLUTIONS):
        raise TypeError(
            "convolution should be a kernel, an nn.Conv* or an nn.ConvTranspose*. "
            f"Found {type(module).__name__}"
        )
    grid = per_axis("domain", domain, len(module.kernel_size))
    if module.transposed and any(n % s for n, s in zip(grid, module.stride, strict=True)):
        raise ValueError(f"domain should be divisible by the stride {module.stride}. Found {grid}")
    hooked = module._forward_pre_hooks or module._forward_hooks
    geometry = periodic(module, grid) if convolves(module) and not hooked else None
    return _of_dense(module, grid) if geometry is None else _of_kernel(module.weight, *geometry)


@torch.no_grad()
def _of_dense(module: Any, domain: Size) -> Tensor:
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
    return torch.linalg.svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float64)))
