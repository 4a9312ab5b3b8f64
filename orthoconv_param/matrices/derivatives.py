r"""The exponential of skew-Hermitian matrices as one differentiable function, on any device.

The registered operators compute its value and its gradient. The autograd Functions differentiate them, in
either mode and to second order. For small matrices on a GPU the operators run the kernels of `fused`.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from . import by_hand
from .batches import flatten, in_pieces, pieces
from .closed_forms import expm_2x2, vjp_2x2
from .products import product, skew
from .squaring import expm_and_keep, expm_batch, vjp_batch, vjp_of_kept

# Of the matrices, for each of their rows up to 64. Ten times as much is kept until the backward pass.
_KEPT_BYTES = 2**17


def exponential(A: Tensor, norm: float | None = None) -> Tensor:
    """Return ``exp(skew(A))`` of matrices ``(..., n, n)``, in single or double precision.

    Args:
        A: the matrices.
        norm: a bound on their spectral norms, which spares computing one. (Off the CPU it is not used.)
    """
    # see Note [operator and Function]
    if runtime.is_compiling():
        return torch.ops.orthoconv_param.expm_skew(A, norm)
    size, n = A.numel() * A.element_size(), A.shape[-1]
    if runtime.may_wait(A.device) and 0 < size <= _KEPT_BYTES * min(n, 64) and n > 2:
        return by_hand.apply(_Kept(norm), A)
    return _Expm.apply(A, norm)


class _Kept:
    """The rule of `exponential` where what is computed on the way may be kept for the gradient."""

    def __init__(self, norm: float | None) -> None:
        self.norm = norm
        self.counts: list[int] = []  # of what is kept, for each piece of the batch

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the exponential."""
        return _Expm.apply(*inputs, self.norm)

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the exponential, and what is kept."""
        A = flatten(inputs[0].resolve_conj())
        Q, kept = torch.empty_like(A, memory_format=torch.contiguous_format), []
        with runtime.no_autocast(A.device.type):
            for piece in pieces(A):
                Q[piece], some = expm_and_keep(A[piece], self.norm)
                kept += some
                self.counts.append(len(some))
        return runtime.reshaped(Q, inputs[0].shape), kept

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor]:
        """Return the gradient by the matrices."""
        flat, start = flatten(G.resolve_conj()), 0
        result = torch.empty_like(flat, memory_format=torch.contiguous_format)
        for piece, count in zip(pieces(flat), self.counts, strict=True):
            result[piece] = vjp_of_kept(flat[piece], kept[start : start + count])
            start += count
        return (result.view(G.shape),)


# Operators: see Note [operator and Function]


@torch.library.custom_op("orthoconv_param::expm_skew", mutates_args=())
def _expm(A: Tensor, norm: float | None = None) -> Tensor:
    fused = _fused(A)
    if fused is not None:
        return fused.expm(A)
    with runtime.no_autocast(A.device.type):
        if A.shape[-1] == 2:
            return in_pieces(expm_2x2, A)
        return in_pieces(lambda A: expm_batch(A, norm), A)


@torch.library.custom_op("orthoconv_param::expm_skew_vjp", mutates_args=())
def _expm_vjp(A: Tensor, G: Tensor, norm: float | None = None) -> Tensor:
    fused = _fused(A)
    if fused is not None:
        return fused.expm_vjp(A, G)
    with runtime.no_autocast(A.device.type):
        if A.shape[-1] == 2:
            return in_pieces(vjp_2x2, A, G)
        return in_pieces(lambda A, G: vjp_batch(A, G, norm), A, G)


@_expm.register_fake
def _(A: Tensor, norm: float | None = None) -> Tensor:
    return torch.empty_like(A, memory_format=torch.contiguous_format)


@_expm_vjp.register_fake
def _(A: Tensor, G: Tensor, norm: float | None = None) -> Tensor:
    return torch.empty_like(A, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, float | None], output: Tensor) -> None:
    A, ctx.norm = inputs
    ctx.save_for_backward(A)


_expm.register_autograd(
    lambda ctx, G: (torch.ops.orthoconv_param.expm_skew_vjp(*ctx.saved_tensors, G, ctx.norm), None),
    setup_context=_save,
)


def _fused(A: Tensor) -> ModuleType | None:
    """Return the module of kernels that take a small matrix as a whole, where they take this one."""
    fused = _kernels() if A.is_cuda and A.shape[-1] != 2 else None
    return fused if fused and A.shape[-1] <= fused.LARGEST and A.dtype in fused.DTYPES else None


@cache
def _kernels() -> ModuleType | None:
    """Return the module of kernels, where triton is there."""
    try:
        from . import fused  # takes a while
    except ImportError:
        return None
    return fused if fused.IS_SUPPORTED else None


# Functions


class _Expm(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, norm: float | None) -> Tensor:
        return torch.ops.orthoconv_param.expm_skew(A, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | None], output: Tensor) -> None:
        A, ctx.norm = inputs
        ctx.save_for_backward(A)
        ctx.save_for_forward(A, output)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (A,) = ctx.saved_tensors
        return _ExpmVjp.apply(A, G, ctx.norm), None

    @staticmethod
    def jvp(ctx: Any, E: Tensor, _: None) -> Tensor:
        A, Q = ctx.saved_tensors
        # dQ = Q phi1(-ad_A)(skew(E)), and phi1(-ad_A)(M) is the vjp at -A of exp(-A) M
        return product(Q, _ExpmVjp.apply(-A, product(Q.mH.resolve_conj(), skew(E)), ctx.norm))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], A: Tensor, norm: float | None
    ) -> tuple[Tensor, int]:
        return _Expm.apply(*align((A,), in_dims[:1], info.batch_size), norm), 0


class _ExpmVjp(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, G: Tensor, norm: float | None) -> Tensor:
        return torch.ops.orthoconv_param.expm_skew_vjp(A, G, norm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, N: Tensor) -> tuple[Tensor, Tensor, None]:
        # The function is skew(L(-A)[G]); the adjoint of X -> L2(a)[X, Y] is N -> L2(a^H)[N, Y^H].
        A, G = ctx.saved_tensors
        grad_G, grad_a = _second_derivative(skew(A), skew(N), G.mH, torch.zeros_like(G))
        return -skew(grad_a), grad_G, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, dG: Tensor, _: None) -> Tensor:
        A, G = ctx.saved_tensors
        return skew(_second_derivative(-skew(A), G, -skew(dA), dG)[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, A: Tensor, G: Tensor, norm: float | None) -> tuple[Tensor, int]:
        return _ExpmVjp.apply(*align((A, G), in_dims[:2], info.batch_size), norm), 0


def align(tensors: tuple[Tensor, ...], dims: tuple[int | None, ...], size: int) -> list[Tensor]:
    """Return tensors with the dimension first that ``vmap`` maps, expanded where they have none."""
    return [
        x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip(tensors, dims, strict=True)
    ]


def _second_derivative(a: Tensor, X: Tensor, Y: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``L(a)[X]`` and ``L2(a)[X, Y] + L(a)[Z]``, the first and second derivatives of ``exp``.

    Both are read from one exponential of a block matrix (Higham and Relton, SIAM J. Matrix Anal. Appl. 35
    (2014) 1019), which torch differentiates to any order.
    """
    n, o = a.shape[-1], torch.zeros_like(a)
    rows = ((a, X, Y, Z), (o, a, o, Y), (o, o, a, X), (o, o, o, a))
    blocks = torch.cat([torch.cat(row, -1) for row in rows], -2)
    top = torch.linalg.matrix_exp(blocks)[..., :n, :]
    return top[..., n : 2 * n], top[..., 3 * n :]
