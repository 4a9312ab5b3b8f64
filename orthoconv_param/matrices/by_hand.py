"""Functions whose gradient is written by hand, and of which torch makes all other derivatives.

A rule has a plain form, of torch's differentiable operations, and a faster form of its value and gradient.
The faster one is taken where nothing but a backward pass asks for derivatives. Forward mode, transforms,
second derivatives and compilers see the plain one.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .. import runtime

Tensors: TypeAlias = Sequence[Tensor]


class Rule(Protocol):
    """A function of tensors to one tensor, in two forms."""

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the value, by differentiable operations."""
        ...

    def value(self, *inputs: Tensor) -> tuple[Tensor, Tensors]:
        """Return the value, and what its gradient needs besides the inputs; nothing is recorded."""
        ...

    def gradient(self, G: Tensor, inputs: Tensors, kept: Tensors, needed: Sequence[bool]) -> Any:
        """Return the gradients by the inputs, of those that are needed."""
        ...


def apply(rule: Rule, *inputs: Tensor) -> Tensor:
    """Return the value of a rule, to be differentiated in any way."""
    if runtime.is_transformed() or runtime.is_jit_traced() or any(map(runtime.is_batched, inputs)):
        return rule.plain(*inputs)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return rule.value(*inputs)[0]
    return _ByHand.apply(rule, *inputs)


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, *inputs: Tensor) -> Tensor:
        value, kept = rule.value(*inputs)
        ctx.rule, ctx.count = rule, len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return value

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs, kept = saved[: ctx.count], saved[ctx.count :]
        with runtime.no_autocast(G.device.type):
            if not (torch.is_grad_enabled() or runtime.is_batched(G)):
                return None, *ctx.rule.gradient(G, inputs, kept, needed)
            with torch.enable_grad():  # views, of which none depends on another
                views = [x.view_as(x) for x in inputs]
                wanted = [x for x, need in zip(views, needed, strict=True) if need]
                gradients = iter(
                    torch.autograd.grad(
                        ctx.rule.plain(*views), wanted, G, create_graph=torch.is_grad_enabled()
                    )
                )
        return None, *(next(gradients) if need else None for need in needed)
