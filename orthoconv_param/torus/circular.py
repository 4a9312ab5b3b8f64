r"""Circular convolution through the Fourier transform, with its derivatives.

With ``x^(v)`` the transform of an image's polyphase components, a convolution on a torus is one product
``y^(v) = M(v) x^(v)`` for each coarse frequency, and its adjoint ``x^(v) = M(v)^H y^(v)``. Derivatives of
every order are made of three maps, which are the partial derivatives of one trilinear form
``t(y, x, M) = <y, M x>``:

    apply(x, M) = dt/dy,      adjoint(y, M) = dt/dx,      outer(y, x) = dt/dM,  y^ x^^H at each frequency.

So the gradient of each is made of the other two.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..matrices.derivatives import align
from ..matrices.products import conjugate
from .dft import whole_of
from .lattice import Lattice

# A batch is transformed in pieces. Each step then reads from the cache what the step before wrote, and
# memory is used again. A piece has at least 16 images: once transposed, neighbours fill two cache lines.
_PIECE_BYTES = 2**22
_PIECE_IMAGES = 16


def spectral_conv(x: Tensor, spectrum: Tensor, lattice: Lattice, transposed: bool = False) -> Tensor:
    """Convolve images around a torus with a kernel that is given by its spectrum, or apply the transpose.

    Args:
        x: ``(batch, in, *domain)``; of the transpose, ``(batch, out, *grid)``. Real or complex, as the
            lattice is, in single or double precision.
        spectrum: ``(groups, frequencies, out/groups, in/groups * s^d)``, complex: `Lattice.spectrum`.
        lattice: of the spectrum; its domain is that of the images. Without a stride, images may be smaller:
            they are continued by zeros, and the result is cut to their size.
        transposed: True to apply the transpose of the operator instead, as ``conv_transpose`` does. Of a
            real operator it is the adjoint; of a complex one, the conjugate of the adjoint.

    Returns:
        ``(batch, out, *grid)``, or of the transpose ``(batch, in, *domain)``. First and second
        derivatives with respect to images and spectrum, forward mode and ``vmap`` work.
    """
    return of_transpose(lambda x: _convolve(x, spectrum, lattice, transposed), x, transposed)


def of_transpose(adjoint_or_not: Callable[[Tensor], Tensor], x: Tensor, transposed: bool) -> Tensor:
    """Apply a function to images. If it computes an adjoint (``transposed``), apply the transpose instead.

    For real images both are the same. For complex ones ``M^T x`` is the conjugate of ``M^H conj(x)``.
    """
    if transposed and x.is_complex():
        return conjugate(adjoint_or_not(conjugate(x)))
    return adjoint_or_not(x)


def _convolve(x: Tensor, spectrum: Tensor, lattice: Lattice, adjoint: bool) -> Tensor:
    # Under compilation or export torch's own operators are used, and torch differentiates them. (This is
    # unlike in Note [operator and Function].) Calls that nobody differentiates use them too: that saves
    # the overhead of a Function.
    if runtime.is_compiling() or runtime.is_plain(x):
        return apply(x, spectrum, lattice, adjoint)[0]
    return Apply.apply(x, spectrum, lattice, adjoint)[0]


def to_frequencies(x: Tensor, lattice: Lattice, fine: bool) -> Tensor:
    """Transform images to ``(groups, frequencies, channels/groups, batch)``.

    They are images on the domain if ``fine``, else on the grid. Smaller ones are continued by zeros. The
    batch comes last: the products with ``M``, with ``M^H`` and of two transforms are then calls to BLAS.
    """

    def piece(x: Tensor) -> Tensor:
        transform = _forward(lattice.phases(x) if fine else x, lattice).flatten(2)
        return transform.unflatten(1, (lattice.groups, -1)).permute(1, 3, 2, 0)

    channels = x.shape[1] // lattice.groups * (prod(lattice.stride) if fine else 1)
    shape = (lattice.groups, lattice.frequencies, channels, x.shape[0])
    return _in_pieces(piece, x, 0, shape, -1, torch.promote_types(x.dtype, torch.complex64))


def _forward(x: Tensor, lattice: Lattice) -> Tensor:
    axes = tuple(range(2, x.ndim))
    if 0 in x.stride():  # an expanded gradient, which MKL refuses before torch 2.9
        x = x.contiguous()
    if lattice.is_complex:
        return torch.fft.fftn(x, s=lattice.grid, dim=axes, norm="ortho")
    if tuple(x.shape[2:]) == lattice.grid:
        return torch.fft.rfftn(x, dim=axes, norm="ortho")
    x = torch.fft.rfft(x, n=lattice.grid[-1], norm="ortho")
    for axis in axes[:-1]:  # one by one: the zeros of other axes are not transformed along the last
        x = torch.fft.fft(x, n=lattice.grid[axis - 2], dim=axis, norm="ortho")
    return x


def from_frequencies(transform: Tensor, lattice: Lattice, fine: bool, like: Tensor) -> Tensor:
    """Transform images back from `to_frequencies`, to the dtype, memory format and size of ``like``.

    (With a stride, images before and after the operator differ in size. The result then fills the torus.)
    """
    axes = tuple(range(2, len(lattice.grid) + 2))
    size = lattice.domain if fine else lattice.grid
    if max(lattice.stride) == 1:
        size = tuple(like.shape[2:])

    def piece(transform: Tensor) -> Tensor:
        phases = transform.permute(3, 0, 2, 1).flatten(1, 2).unflatten(-1, lattice.stored)
        if lattice.is_complex:
            phases = torch.fft.ifftn(phases, dim=axes, norm="ortho")
        else:  # one axis after the other: `irfftn` copies once more
            for axis in axes[:-1]:
                phases = torch.fft.ifft(phases, dim=axis, norm="ortho")
                if max(lattice.stride) == 1:
                    phases = phases.narrow(axis, 0, size[axis - 2])
            last = size[-1] if max(lattice.stride) == 1 else lattice.grid[-1]
            phases = whole_of(phases, lattice.grid[-1], last)
        images = lattice.interleave(phases) if fine else phases
        for axis, n in enumerate(size, start=2):
            images = images.narrow(axis, 0, n)
        return images

    channels = lattice.groups * transform.shape[2] // (prod(lattice.stride) if fine else 1)
    shape = (transform.shape[-1], channels, *size)
    memory_format = runtime.memory_format(like)
    images = _in_pieces(piece, transform, -1, shape, 0, like.dtype, memory_format)
    return runtime.owned(images, memory_format)


def _in_pieces(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    axis: int,
    shape: tuple[int, ...],
    result_axis: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Apply a function to a batch piece by piece, given the batch axes of its argument and its result."""
    batch = size = x.shape[axis]
    if runtime.may_wait(x.device) and not runtime.is_compiling():
        each = max(1, dtype.itemsize * prod(shape) // max(batch, 1))
        size = max(1, _PIECE_BYTES // each // _PIECE_IMAGES) * _PIECE_IMAGES
    if 0 < batch <= size:
        return function(x).contiguous(memory_format=memory_format)
    result = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
    for start in range(0, batch, max(size, 1)):
        length = min(size, batch - start)
        result.narrow(result_axis, start, length).copy_(function(x.narrow(axis, start, length)))
    return result


def _product(M: Tensor, x: Tensor, adjoint: bool) -> Tensor:
    """Return ``M x``, or ``M^H x``; without BLAS for one inner channel, as depthwise convolutions have."""
    if adjoint:  # as the conjugate of M^T conj(x), which reads M, the larger, as it lies in memory
        return _product(M.mT, x.conj().resolve_conj(), False).conj().resolve_conj()
    return M * x if M.shape[-1] == 1 else M @ x


def apply(x: Tensor, M: Tensor, lattice: Lattice, adjoint: bool) -> tuple[Tensor, Tensor]:
    """Return ``M x``, or for ``adjoint`` ``M^H x``, and the transform of ``x``."""
    transform = to_frequencies(x, lattice, fine=not adjoint)
    return from_frequencies(_product(M, transform, adjoint), lattice, adjoint, x), transform


def outer(
    y: Tensor, x: Tensor, y_transform: Tensor | None, x_transform: Tensor | None, lattice: Lattice
) -> Tensor:
    """Return the gradient at the spectrum, ``y^ x^^H``; transforms that are known already may be given."""
    if y_transform is None:
        y_transform = to_frequencies(y, lattice, fine=False)
    if x_transform is None:
        x_transform = to_frequencies(x, lattice, fine=True)
    flat = [t.flatten(0, 1) for t in (y_transform, x_transform)]
    return weighted(flat[0] @ flat[1].mH, lattice)


def weighted(G: Tensor, lattice: Lattice) -> Tensor:
    """Turn products ``(groups * frequencies, out, in)`` into the gradient at the spectrum, in place."""
    G = G.unflatten(0, (lattice.groups, -1))
    if not lattice.is_complex:
        # The inverse transform of a half-spectrum reads every frequency twice but those on its edges.
        planes = G.unflatten(1, lattice.stored).movedim(len(lattice.grid), 0)
        planes[1 : (lattice.grid[-1] + 1) // 2] *= 2
    return G


# The same as registered operators. Code that cannot look into them (a fallback for batches, a profiler)
# takes each as a whole.


def _apply_fields(
    x: Tensor, M: Tensor, domain: list[int], stride: list[int], groups: int, adjoint: bool
) -> tuple[Tensor, Tensor]:
    return apply(x, M, Lattice(tuple(domain), tuple(stride), groups, x.is_complex()), adjoint)


def _outer_fields(
    y: Tensor,
    x: Tensor,
    y_transform: Tensor | None,
    x_transform: Tensor | None,
    domain: list[int],
    stride: list[int],
    groups: int,
) -> Tensor:
    lattice = Lattice(tuple(domain), tuple(stride), groups, x.is_complex())
    return outer(y, x, y_transform, x_transform, lattice)


# (The schemas are spelt out because torch's versions infer them from different annotations.)
_GRID = "SymInt[] domain, SymInt[] stride, SymInt groups"
_OPERATORS: dict[str, tuple[Callable[..., Any], str]] = {
    "spectral_conv": (_apply_fields, f"(Tensor x, Tensor M, {_GRID}, bool adjoint) -> (Tensor, Tensor)"),
    "spectral_conv_outer": (
        _outer_fields,
        f"(Tensor y, Tensor x, Tensor? y_transform, Tensor? x_transform, {_GRID}) -> Tensor",
    ),
}
for _name, (_function, _schema) in _OPERATORS.items():
    _operator = torch.library.custom_op(
        f"orthoconv_param::{_name}", _function, mutates_args=(), schema=_schema
    )
    _operator.register_fake(_function)  # made of torch's operators, it tells sizes of results too


class Apply(torch.autograd.Function):
    """Computes ``M x``, or for ``adjoint`` ``M^H x``; and the transform of ``x``, to be used again."""

    @staticmethod
    def forward(x: Tensor, M: Tensor, lattice: Lattice, adjoint: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.orthoconv_param.spectral_conv(
            x, M, lattice.domain, lattice.stride, lattice.groups, adjoint
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Lattice, bool], output: Any) -> None:
        x, M, ctx.lattice, ctx.adjoint = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, M, output[1])
        ctx.save_for_forward(x, M)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, M, transform = ctx.saved_tensors
        dx = dM = g_transform = None
        if ctx.needs_input_grad[0]:
            dx, g_transform = Apply.apply(g, M, ctx.lattice, not ctx.adjoint)
        if ctx.needs_input_grad[1]:
            # the operator takes images on the domain to images on the grid
            if ctx.adjoint:
                dM = Outer.apply(x, g, transform, g_transform, ctx.lattice)
            else:
                dM = Outer.apply(g, x, g_transform, transform, ctx.lattice)
        return dx, dM, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dM: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        x, M = ctx.saved_tensors
        terms = [
            Apply.apply(*pair, ctx.lattice, ctx.adjoint)[0]
            for pair in ((dx, M), (x, dM))
            if pair[0] is not None and pair[1] is not None
        ]
        return sum(terms[1:], start=terms[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, M: Tensor, lattice: Lattice, adjoint: bool) -> Any:
        # mapped images make a larger batch; if spectra are mapped too, they make more groups
        if in_dims[1] is None:
            x = x.movedim(in_dims[0], 0)
            y, transform = Apply.apply(x.flatten(0, 1), M, lattice, adjoint)
            sizes = x.shape[:2]
            return (y.unflatten(0, sizes), transform.unflatten(-1, sizes)), (0, 3)
        x, M = align((x, M), in_dims[:2], info.batch_size)
        y, transform = Apply.apply(_merge(x), M.flatten(0, 1), _times(lattice, len(M)), adjoint)
        return (y.unflatten(1, (len(M), -1)), transform.unflatten(0, (len(M), -1))), (1, 0)


class Outer(torch.autograd.Function):
    """Computes ``outer(y, x)``; transforms that are known already may be given."""

    @staticmethod
    def forward(
        y: Tensor, x: Tensor, y_transform: Tensor | None, x_transform: Tensor | None, lattice: Lattice
    ) -> Tensor:
        return torch.ops.orthoconv_param.spectral_conv_outer(
            y, x, y_transform, x_transform, lattice.domain, lattice.stride, lattice.groups
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        y, x, _, _, ctx.lattice = inputs
        ctx.save_for_backward(y, x)
        ctx.save_for_forward(y, x)

    @staticmethod
    def backward(ctx: Any, N: Tensor) -> tuple[Tensor | None, ...]:
        y, x = ctx.saved_tensors
        dy = Apply.apply(x, N, ctx.lattice, False)[0] if ctx.needs_input_grad[0] else None
        dx = Apply.apply(y, N, ctx.lattice, True)[0] if ctx.needs_input_grad[1] else None
        return dy, dx, None, None, None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor | None, dx: Tensor | None, *_: Any) -> Tensor:
        y, x = ctx.saved_tensors
        terms = [
            Outer.apply(*pair, None, None, ctx.lattice)
            for pair in ((dy, x), (y, dx))
            if pair[0] is not None and pair[1] is not None
        ]
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        y: Tensor,
        x: Tensor,
        y_transform: Tensor | None,
        x_transform: Tensor | None,
        lattice: Lattice,
    ) -> Any:
        tensors = [
            t if t is None else align((t,), (dim,), info.batch_size)[0]
            for t, dim in zip((y, x, y_transform, x_transform), in_dims, strict=False)
        ]
        images = [t if t is None else _merge(t) for t in tensors[:2]]
        transforms = [t if t is None else t.flatten(0, 1) for t in tensors[2:]]
        dM = Outer.apply(*images, *transforms, _times(lattice, info.batch_size))
        return dM.unflatten(0, (info.batch_size, -1)), 0


def _merge(x: Tensor) -> Tensor:
    """Return ``(maps, batch, channels, ...)`` as ``(batch, maps * channels, ...)``."""
    return x.movedim(0, 1).flatten(1, 2)


def _times(lattice: Lattice, maps: int) -> Lattice:
    return replace(lattice, groups=maps * lattice.groups)
