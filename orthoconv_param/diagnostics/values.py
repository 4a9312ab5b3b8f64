"""Singular values of convolutions: how they change the norm of their input.

A kernel is measured as its circular convolution. A module is measured as the operator that its own forward
computes, whatever happens at the image's edges.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import Size
from .forward import Forward, domain_of
from .measured import check_entries, measure
from .periodic import of_kernel, periodic


def singular_values(
    convolution: Tensor | nn.Module,
    domain: int | Size,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
) -> Tensor:
    """Compute all singular values of a convolution on images of a given size.

    For a kernel they are those of the circular convolution with it. For a module they are those of its own
    forward, the bias aside, whatever its boundary. They are exact.

    An operator that is periodic and keeps the size is block diagonal in frequency. Its values are computed
    in double precision from the kernel. A kernel larger than the domain is folded onto it, which is the
    same operator there. Any other module (with zero padding, between walls, or with a forward of its own)
    is applied to each unit image, and its dense matrix is decomposed.

    Args:
        convolution: a kernel ``(out, in/groups, *taps)``, or ``(in, out/groups, *taps)`` of a transposed
            convolution; or an ``nn.Conv*`` or ``nn.ConvTranspose*``, orthogonal or not; or what
            ``remove_parametrizations`` leaves of one.
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
            module that is not periodic, if its dense matrix has more than ``2^27`` entries. `report`
            estimates the extremes of larger ones.

    Cost: one singular value decomposition for each frequency, or one of the dense matrix.

    Source: Sedghi, Gupta, Long, *The singular values of convolutional layers*, arXiv:1805.10408.

    Example:
        >>> import torch
        >>> from orthoconv_param import singular_values
        >>> singular_values(torch.ones(1, 1, 1, 2), domain=(1, 4)).flatten().tolist()
        [2.0, 1.4142135623730951, 0.0]
    """
    if isinstance(convolution, nn.Module):
        _check_options(stride, groups, dilation)
        return _of_module(convolution, domain_of(convolution, domain))
    return of_kernel(convolution, domain, stride, groups, dilation).singular_values()


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

    A module's own forward is measured, as `report` does. A module made `orthogonal` with
    ``boundary="zeros"`` loses what leaves the image, and its defect says so. Between walls it loses
    nothing.

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
        RuntimeError: torch's own, if a module of torch's own class does not accept images of that size.

    Cost: one singular value decomposition for each frequency, or one of the dense matrix. A module whose
    dense matrix has up to ``2^20`` entries is measured by its forward, periodic or not, with the rounding
    of its dtype.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional, orthogonality_defect
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> w = functional.nearest_orthogonal(torch.randn(8, 8, 3, 3, dtype=torch.float64))
        >>> [f"{orthogonality_defect(w, n):.0e}" for n in (3, 32)]  # its own size, and a larger one
        ['1e-15', '1e+00']
    """
    if isinstance(convolution, nn.Module):
        _check_options(stride, groups, dilation)
        return measure(convolution, domain_of(convolution, domain), exact=True).defect
    values = singular_values(convolution, domain, stride=stride, groups=groups, dilation=dilation)
    return (values - 1).abs().max().item()


def _check_options(stride: int | Size, groups: int, dilation: int | Size) -> None:
    """Raise if what a kernel does not say of its convolution is given with a module.

    Raises:
        ValueError: then.
    """
    if (stride, groups, dilation) != (1, 1, 1):
        raise ValueError("stride, groups and dilation should not be given with a module, which has its own")


def _of_module(module: Any, domain: Size) -> Tensor:
    with parametrize.cached():
        on_torus = periodic(module, domain)
        if on_torus is not None:
            return on_torus.singular_values()
        forward = Forward(module, domain)
        check_entries(forward)
        return torch.linalg.svdvals(forward.matrix())
