r"""What a convolution does to the size of its input: singular values and their distance from 1."""

import torch
from torch import Tensor

from .lattice import Lattice, Size


def singular_values(
    kernel: Tensor, domain: int | Size, *, stride: int | Size = 1, groups: int = 1
) -> Tensor:
    r"""All singular values of the convolution with a kernel on periodic images.

    Exact: the operator is block diagonal in frequency, and is computed in double precision
    whatever the kernel's own, so that what is measured is the kernel. A kernel larger than the
    domain is folded onto it, which is what it does there.

    Args:
        kernel: ``(out, in/groups, *taps)``, of any convolution, or ``(in, out/groups, *taps)`` of a
            transposed one.
        domain: size of the images (of a transposed convolution: of its output), one for each axis or one
            for all.
        stride: of the convolution.
        groups: of the convolution.

    Returns:
        ``(groups, frequencies, min(out/groups, in/groups * s^d))``, float64, in descending order for
        each frequency; of a real kernel, the half of the frequencies that ``rfftn`` keeps.

    Raises:
        TypeError, ValueError: for arguments that do not describe a convolution.

    Cost: one singular value decomposition for each frequency.

    Source: Sedghi, Gupta, Long, *The singular values of convolutional layers*, arXiv:1805.10408.

    Example:
        >>> import torch
        >>> from orthoconv_param import singular_values
        >>> singular_values(torch.ones(1, 1, 1, 2), domain=(1, 4)).flatten().tolist()
        [2.0, 1.4142135623730951, 0.0]
    """
    if not isinstance(kernel, Tensor) or not (kernel.is_floating_point() or kernel.is_complex()):
        found = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
        raise TypeError(f"kernel should be a tensor of a floating or complex dtype. Found {found}")
    # a larger kernel is folded, so only its channels have to fit
    size = (*kernel.shape[:2], *(1 for _ in kernel.shape[2:]))
    lattice = Lattice.of_kernel(size, kernel.is_complex(), domain, stride, groups)
    double = torch.complex128 if kernel.is_complex() else torch.float64
    with torch.no_grad():
        return torch.linalg.svdvals(lattice.spectrum(kernel.to(double)))


def orthogonality_defect(
    kernel: Tensor, domain: int | Size, *, stride: int | Size = 1, groups: int = 1
) -> float:
    r"""How far a convolution is from orthogonal: ``max |singular value - 1|`` on periodic images.

    Args:
        kernel: as in `singular_values`.
        domain: size of the images.
        stride: of the convolution.
        groups: of the convolution.

    Returns:
        0 for an orthogonal convolution, and for a semi-orthogonal one where channels differ.

    Raises:
        TypeError, ValueError: for arguments that do not describe a convolution.

    Cost: one singular value decomposition for each frequency.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional, orthogonality_defect
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> w = functional.nearest_orthogonal(torch.randn(8, 8, 3, 3, dtype=torch.float64))
        >>> [f"{orthogonality_defect(w, n):.0e}" for n in (3, 32)]  # its own grid, and a larger one
        ['1e-15', '1e+00']
    """
    values = singular_values(kernel, domain, stride=stride, groups=groups)
    return (values - 1).abs().max().item()
