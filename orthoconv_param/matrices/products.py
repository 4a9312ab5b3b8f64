"""Products of matrix batches, and the skew-Hermitian part ``(X - X^H) / 2``.

Both make adjoints in memory rather than take torch's lazily conjugated views.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime

# Note [lazy conjugates]
# Inside an operator that runs under AOTAutograd (torch 2.13) an elementwise operation silently reads a
# conjugate view as if it were not conjugated. Products of batches copy such a view matrix by matrix. So
# conjugates are made in memory, which costs no more than the sum that follows.

# Note [operator and Function]
# torch.compile cannot trace through an autograd.Function that has a jvp, and torch.func cannot
# differentiate an operator with register_autograd (its jvp is silently zero). So each is used
# where it works, and both run the same operator.

# Note [fresh results]
# Torch refuses to change in place a view that an autograd.Function returns. So operators and Functions
# return tensors that are no views.


def skew(X: Tensor) -> Tensor:
    """Return the skew-Hermitian part ``(X - X^H) / 2`` of matrices ``(..., n, n)``.

    Rectangular ones are padded to square ones by zeros.
    """
    rows, columns = X.shape[-2:]
    if rows != columns:
        m = max(rows, columns)
        X = F.pad(X, (0, m - columns, 0, m - rows))
    return (X - X.mH.resolve_conj()) * 0.5  # see Note [lazy conjugates]


def adjoint(X: Tensor) -> Tensor:
    """Return the conjugate transpose: a view of a real matrix, made in memory of a complex one."""
    return X.mH.resolve_conj() if X.is_complex() else X.mT


def conjugate(X: Tensor) -> Tensor:
    """Return the conjugate, made in memory: neither forward mode within ``vmap`` nor operators take views.

    TorchScript compiles this, and `mixed`.
    """
    return torch.complex(X.real, -X.imag)


def mixed(M: Tensor, x: Tensor) -> Tensor:
    """Return matrices ``(groups, rows, columns)`` times the channels of each pixel of images."""
    flat = x.flatten(2)
    if M.size(0) == 1:  # `matmul` would transpose the images where the matrix requires a gradient
        return torch.bmm(M.expand(x.size(0), -1, -1), flat).unflatten(2, x.shape[2:])
    y = torch.matmul(M, flat.unflatten(1, [M.size(0), -1]))
    return y.flatten(1, 2).unflatten(2, x.shape[2:])


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return ``A @ B`` of batches of matrices, with derivatives as fast as the product.

    Torch's own derivatives are slower: see Note [lazy conjugates].
    """
    # see Note [operator and Function]
    return A @ B if runtime.is_compiling() or not A.is_complex() else _Product.apply(A, B)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, B: Tensor) -> Tensor:
        if A.shape[:-2] != B.shape[:-2]:  # torch may return a view of one product: see Note [fresh results]
            A = A.expand(*torch.broadcast_shapes(A.shape[:-2], B.shape[:-2]), *A.shape[-2:])
        return A @ B

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None]:
        A, B = ctx.saved_tensors
        dA = product(G, B.mH.resolve_conj()) if ctx.needs_input_grad[0] else None
        dB = product(A.mH.resolve_conj(), G) if ctx.needs_input_grad[1] else None
        return dA, dB

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, dB: Tensor | None) -> Tensor:
        A, B = ctx.saved_tensors
        terms = [product(X, Y) for X, Y in ((dA, B), (A, dB)) if X is not None and Y is not None]
        return sum(terms[1:], start=terms[0])
