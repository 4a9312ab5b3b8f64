"""Operations on convolutions, as operations on their kernels; plain tensors in and out.

A kernel ``(out, in/groups, *taps)`` acts periodically on a ``domain``: a tuple with one size for each
space axis, an integer for all of them, or None for the kernel's own taps. Each function computes one
matrix operation at each frequency of that domain, and returns the resulting operator's kernel
``(out, in/groups, *domain)``, centred as "same" padding expects it. A result has its properties on its
domain: on a larger one its kernel is another operator.
"""

from collections.abc import Callable
from typing import Literal

import torch
from geotorch.exceptions import InManifoldError
from torch import Tensor

from .checks import Size, at_least_single, check_dtype, check_finite, count, integer, per_axis
from .matrices import products, unitary
from .torus import circular
from .torus.lattice import Lattice, Placement

__all__ = [
    "adjoint",
    "compose",
    "conv_exp",
    "conv_log",
    "gate_blocks",
    "identity",
    "nearest_orthogonal",
    "skew",
    "spectral_conv",
]


def conv_exp(
    kernel: Tensor, domain: int | Size | None = None, *, stride: int | Size = 1, groups: int = 1
) -> Tensor:
    """Return the kernel of the exponential of a convolution, skew or not.

        matrix(conv_exp(k)) = exp(matrix(k))

    where ``matrix(k)`` is the dense matrix of the operator on the domain.

    Args:
        kernel: ``(channels, channels/groups, *taps)``; with a stride ``s`` on ``d`` axes,
            ``(in * s^d, in/groups, *taps)``. Any floating or complex dtype.
        domain: size of the periodic images: for each axis, or one for all, or None: the kernel's own taps.
        stride: of the convolution.
        groups: of the convolution.

    Returns:
        ``(channels, channels/groups, *domain)``. Differentiable.

    Raises:
        TypeError, ValueError: for arguments that do not describe a square convolution.

    Cost: a dense matrix exponential for each frequency. For skew kernels `ConvExponential` is faster.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional
        >>> k = functional.skew(torch.randn(4, 4, 3, 3, dtype=torch.float64), domain=8)
        >>> q = functional.conv_exp(k)
        >>> eye = functional.identity(q.shape, dtype=q.dtype)
        >>> torch.allclose(functional.compose(functional.adjoint(q), q), eye)
        True
    """
    return _apply(torch.linalg.matrix_exp, kernel, domain, stride, groups, square=True)


def conv_log(
    kernel: Tensor, domain: int | Size | None = None, *, stride: int | Size = 1, groups: int = 1
) -> Tensor:
    """Return the principal logarithm of an orthogonal convolution: skew, and real for a real kernel.

        conv_exp(conv_log(q)) = q

    At each frequency the matrix of ``conv_log(q)`` has a spectral norm of at most pi.

    Args:
        kernel: ``(channels, channels/groups, *taps)``, orthogonal on the domain.
        domain: size of the periodic images: for each axis, or one for all, or None: the kernel's own taps.
        stride: of the convolution.
        groups: of the convolution.

    Returns:
        ``(channels, channels/groups, *domain)``. Not differentiable.

    Raises:
        geotorch.exceptions.InManifoldError: if the convolution is not orthogonal on the domain to 1e-4; or
            if it has no real logarithm: a real kernel whose matrix has determinant -1 at a frequency where
            it is real.
        TypeError, ValueError: for arguments that do not describe a square convolution.

    Cost: one Hermitian eigendecomposition for each frequency.
    """

    def log(spectrum: Tensor, lattice: Lattice) -> Tensor:
        if not unitary.semi_orthogonal(spectrum, 1e-4):
            raise InManifoldError(kernel, f"the convolutions orthogonal to 1e-4 on {lattice.domain}")
        try:
            return lattice.choose(unitary.log_unitary, spectrum)
        except ValueError as error:
            raise InManifoldError(kernel, f"the image of exp: {error}") from error

    return _apply(log, kernel, domain, stride, groups, square=True, with_lattice=True)


def skew(kernel: Tensor, domain: int | Size | None = None, *, groups: int = 1) -> Tensor:
    """Return the skew part of a convolution with as many output as input channels.

        skew(k) = (k - adjoint(k)) / 2

    Args:
        kernel: ``(channels, channels/groups, *taps)``.
        domain: size of the periodic images: for each axis, or one for all, or None: the kernel's own taps.
        groups: of the convolution.

    Returns:
        ``(channels, channels/groups, *domain)``, with ``adjoint(skew(k)) = -skew(k)``.
    """
    return _apply(products.skew, kernel, domain, 1, groups, square=True)


def adjoint(kernel: Tensor, domain: int | Size | None = None, *, groups: int = 1) -> Tensor:
    """Return the kernel of the adjoint: ``<adjoint(k) * y, x> = <y, k * x>``.

    Args:
        kernel: ``(out, in/groups, *taps)``.
        domain: size of the periodic images: for each axis, or one for all, or None: the kernel's own taps.
        groups: of the convolution.

    Returns:
        ``(in, out/groups, *domain)``.
    """
    return _apply(lambda spectrum: spectrum.mH, kernel, domain, 1, groups)


def compose(after: Tensor, before: Tensor, domain: int | Size | None = None, *, groups: int = 1) -> Tensor:
    """Return the kernel of one convolution after another: ``compose(a, b) * x = a * (b * x)``.

    Args:
        after: ``(out, mid/groups, *taps)``.
        before: ``(mid, in/groups, *taps)``, of the same dtype.
        domain: size of the periodic images: for each axis, or one for all; None, for the kernels' own taps,
            only if both have the same.
        groups: of both.

    Returns:
        ``(out, in/groups, *domain)``.

    Raises:
        ValueError: if the channels, or the taps with ``domain=None``, do not match.
    """
    if domain is None and after.shape[2:] != before.shape[2:]:
        raise ValueError(
            "domain should be given for kernels of different taps. "
            f"Found {tuple(after.shape[2:])} and {tuple(before.shape[2:])}"
        )
    if after.shape[1] * groups != before.shape[0]:
        raise ValueError(
            f"after should have as many input channels as before has output channels, {before.shape[0]}. "
            f"Found {after.shape[1] * groups}"
        )
    other = _lattice(before, domain, 1, groups).spectrum(before)
    return _apply(lambda spectrum: spectrum @ other, after, domain, 1, groups)


def identity(
    kernel_size: Size,
    domain: int | Size | None = None,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the identity's kernel; where channels differ, the identity matrix's first columns or rows.

    Args:
        kernel_size: ``(out, in/groups, *taps)``.
        domain: size of the periodic images: for each axis, or one for all, or None: the kernel's own taps.
        stride: of the convolution. Outputs are then the samples of a stride's cell.
        groups: of the convolution.
        dtype: of the result.
        device: of the result.

    Returns:
        ``(out, in/groups, *domain)``, orthogonal on every domain.
    """
    zero = torch.zeros(kernel_size, dtype=dtype, device=device)
    return _apply(
        lambda X: torch.eye(*X.shape[-2:], dtype=X.dtype, device=X.device).expand_as(X),
        zero, domain, stride, groups,
    )  # fmt: skip


def nearest_orthogonal(
    kernel: Tensor, domain: int | Size | None = None, *, stride: int | Size = 1, groups: int = 1
) -> Tensor:
    """Return the orthogonal convolution nearest to a convolution: the polar factor of its operator.

    At each frequency it is ``U V^H``, where ``U S V^H`` is the singular value decomposition. It minimises
    the Frobenius distance of the operators on the domain.

    Args:
        kernel: ``(out, in/groups, *taps)``. Where its matrices are rank-deficient, the nearest convolution
            is not unique. The one returned is real for a real kernel, and always the same.
        domain: size of the periodic images: for each axis, or one for all, or None: the kernel's own taps.
        stride: of the convolution.
        groups: of the convolution.

    Returns:
        ``(out, in/groups, *domain)``, semi-orthogonal on the domain. Not differentiable.

    Raises:
        TypeError, ValueError: for arguments that do not describe a convolution on the domain, or are not
            finite.

    Cost: one singular value decomposition for each frequency.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional
        >>> w = torch.randn(4, 4, 3, 3)
        >>> functional.nearest_orthogonal(w, domain=16).shape
        torch.Size([4, 4, 16, 16])
    """
    check_dtype("kernel", kernel)
    check_finite("kernel", kernel)
    return _apply(
        lambda spectrum, lattice: lattice.choose(unitary.polar, spectrum),
        kernel,
        domain,
        stride,
        groups,
        with_lattice=True,
    )


def spectral_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    stride: int | Size = 1,
    groups: int = 1,
    dilation: int | Size = 1,
    transposed: bool = False,
) -> Tensor:
    """Convolve periodic images, through the Fourier transform.

        y[o, q] = sum over i and d of w[o, i, d] x[i, s q + r (d - c)],    c = (k - 1) // 2,

    with stride ``s``, dilation ``r`` and ``k`` taps. ``F.conv1d``, ``F.conv2d`` and ``F.conv3d`` compute
    the same on a circularly padded image; here kernels may have any size. With ``transposed`` it is the
    transpose of this operator, as of ``F.conv_transpose1d``, ``2d`` and ``3d``: for a real kernel, the
    adjoint.

    Args:
        x: ``(batch, in, *domain)``; transposed, ``(batch, in, *domain / stride)``. Of the kernel's dtype.
        kernel: ``(out, in/groups, *taps)``; transposed, ``(in, out/groups, *taps)``. Real or complex. With
            half precision, single precision is used within.
        stride: of the convolution; divides the domain.
        groups: of the convolution.
        dilation: of the kernel.
        transposed: True for a transposed convolution.

    Returns:
        ``(batch, out, *domain / stride)``; transposed, ``(batch, out, *domain)``. First and second
        derivatives, forward mode and ``vmap`` work.

    Raises:
        TypeError, ValueError: for arguments that do not describe such a convolution.

    Cost: for each image the transforms of its channels, and one product with an ``out x in`` matrix for
    each frequency, however large the kernel.

    Example:
        >>> import torch
        >>> from orthoconv_param import functional
        >>> x, w = torch.randn(2, 4, 16, 16), torch.randn(8, 4, 3, 3)
        >>> periodic = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        >>> y = torch.nn.functional.conv2d(periodic, w)
        >>> torch.allclose(functional.spectral_conv(x, w), y, atol=1e-4)
        True
    """
    check_dtype("kernel", kernel)
    axes, dtype = kernel.ndim - 2, kernel.dtype
    strides, dilations = per_axis("stride", stride, axes), per_axis("dilation", dilation, axes)
    channels = kernel.shape[0] if transposed else kernel.shape[1] * count("groups", groups)
    check_dtype("x", x)
    if x.ndim != axes + 2 or x.shape[1] != channels or x.dtype != kernel.dtype:
        raise ValueError(
            f"x should have {channels} channels, {axes} axes of space and dtype {kernel.dtype}. "
            f"Found size {tuple(x.shape)} and {x.dtype}"
        )
    domain = tuple(n * s if transposed else n for n, s in zip(x.shape[2:], strides, strict=True))
    lattice = Lattice.of_kernel(kernel.shape, kernel.is_complex(), domain, strides, groups, folds=True)
    x, kernel = at_least_single(x), at_least_single(kernel)
    spectrum = lattice.spectrum(kernel, Placement.centred(tuple(kernel.shape[2:]), dilations))
    return circular.spectral_conv(x, spectrum, lattice, transposed).to(dtype)


def gate_blocks(
    hidden: int, gates: int = 4, inputs: int = 0, order: Literal["xh", "hx"] = "xh"
) -> list[tuple[slice, slice]]:
    """Return the hidden-to-hidden blocks of a recurrent cell's stacked weight, for `retrofit`.

    The weight is of size ``(gates * hidden, inputs + hidden, *taps)``: the gates are stacked along its
    output channels. Each reads input and state. `recurrent_blocks` finds the blocks of a model.

    Args:
        hidden: channels of the state.
        gates: how many are stacked: 4 for a ConvLSTM, 3 for a ConvGRU. (Two calls, of 2 and 1, if its
            candidate is separate.)
        inputs: channels of the input; 0 for a convolution of the state alone.
        order: ``"xh"`` if the input's channels come before the state's, as in ``torch.cat([x, h], 1)``;
            ``"hx"`` if after.

    Returns:
        A pair of slices ``(out, in)`` for each gate.

    Raises:
        TypeError, ValueError: if a count is no positive integer (``inputs``: nor 0), or the order is
            neither ``"xh"`` nor ``"hx"``.

    Example:
        >>> from orthoconv_param import functional
        >>> functional.gate_blocks(16, gates=2, inputs=3)
        [(slice(0, 16, None), slice(3, 19, None)), (slice(16, 32, None), slice(3, 19, None))]
    """
    hidden, gates, inputs = count("hidden", hidden), count("gates", gates), integer("inputs", inputs)
    if inputs < 0:
        raise ValueError(f"inputs should be 0, or positive. Found {inputs}")
    if order not in ("xh", "hx"):
        raise ValueError(f'order should be "xh" or "hx". Found {order!r}')
    first = inputs if order == "xh" else 0
    across = slice(first, first + hidden)
    return [(slice(gate * hidden, (gate + 1) * hidden), across) for gate in range(gates)]


def _lattice(kernel: Tensor, domain: int | Size | None, stride: int | Size, groups: int) -> Lattice:
    check_dtype("kernel", kernel)
    count("groups", groups)
    return Lattice.of_kernel(kernel.shape, kernel.is_complex(), domain, stride, groups)


def _apply(
    function: Callable[..., Tensor],
    kernel: Tensor,
    domain: int | Size | None,
    stride: int | Size,
    groups: int,
    *,
    square: bool = False,
    with_lattice: bool = False,
) -> Tensor:
    lattice = _lattice(kernel, domain, stride, groups)
    rows, columns = lattice.blocks(kernel.shape)
    if square and rows != columns:
        raise ValueError(
            "kernel should have out/groups = in/groups * prod(stride), to be square. "
            f"Found {rows} and {columns}"
        )
    spectrum = lattice.spectrum(at_least_single(kernel))
    result = function(spectrum, lattice) if with_lattice else function(spectrum)
    return lattice.kernel(result).to(kernel.dtype)
