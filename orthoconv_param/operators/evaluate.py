"""Choosing among the ways to evaluate an operator, and doing it."""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import keeping, runtime
from ..checks import Size
from ..torus.geometry import sized
from .blended import Blended
from .chained import Chained
from .direct import Direct
from .mended import Mended
from .operator import Operator
from .series import Series
from .spectral import Spectral

_USUAL_BATCH = 16  # of images, for what is compiled: it is to take batches of any size


class Evaluator(Protocol):
    """A way to evaluate operators: prepare once, apply often."""

    name: str

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return the estimated time of one call, infinite where it cannot."""
        ...

    def prepare(self, operator: Operator, domain: Size) -> Any:
        """Compute all that does not depend on the images."""
        ...

    def apply(self, state: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the operator to images of the domain, ``(batch, channels, *size)``, and add a bias."""
        ...


EVALUATORS: tuple[Evaluator, ...] = (Direct(), Spectral(), Series(), Chained(), Blended(), Mended())


def choose(operator: Operator, domain: Size, batch: int) -> Evaluator:
    """Return the evaluator that costs least."""
    costs = [evaluator.cost(operator, domain, batch) for evaluator in EVALUATORS]
    return EVALUATORS[costs.index(min(costs))]


def prepared(evaluator: Evaluator, operator: Operator, domain: Size) -> Any:
    """Return what an evaluator prepares, once in a cached loop, for batches of any size."""
    weight, key = operator.weight, (evaluator.name, domain, operator.reduced)
    return keeping.once(weight.owner, key, weight.tensors, lambda: evaluator.prepare(operator, domain))


def evaluate(operator: Operator, x: Tensor, domain: Size, bias: Tensor | None = None) -> Tensor:
    """Apply an operator to images ``(batch, channels, *size)`` of a domain, and add a bias."""
    batch = _USUAL_BATCH if runtime.is_compiling() else x.shape[0]
    weight = operator.weight

    def decide() -> "tuple[Evaluator, Any]":  # torch 2.6 compiles no other annotation
        evaluator = choose(operator, domain, batch)
        return evaluator, prepared(evaluator, operator, domain)

    key = domain, batch, operator.reduced
    evaluator, state = keeping.once(weight.owner, key, weight.tensors, decide)
    return evaluator.apply(state, x, bias)


def convolve(operator: Operator, bias: Tensor | None, input: Any, output_size: Any = None) -> Tensor:
    """Do what a module with this operator and bias does.

    Args:
        operator: of the module.
        bias: ``(channels,)``, or None.
        input: ``(batch, in, *size)`` or ``(in, *size)``.
        output_size: of a transposed convolution, whose only one it must be.

    Returns:
        Images of the memory format of the input, that share no memory with anything.

    Raises:
        TypeError: if the input is no tensor, or not of the weight's dtype.
        ValueError: if it is not of the module's channels, or not of a size that it takes.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input should be a tensor. Found {type(input).__module__}.{type(input).__name__}")
    geometry, dtype = operator.geometry, operator.weight.tensors[0].dtype
    axes = geometry.axes
    x = input.unsqueeze(0) if input.ndim == axes + 1 else input
    if x.is_floating_point() and runtime.is_autocast(x.device.type):
        x = x.to(dtype)
    domain = _domain(operator, x, dtype)
    x, reduced = _checked(operator, x), runtime.reduced_dtype(x)
    operator = operator if reduced is None else replace(operator, reduced=reduced)
    if output_size is not None and tuple(output_size[-axes:]) != domain:
        raise ValueError(f"output_size should be {domain}. Found {tuple(output_size)}")
    with runtime.no_autocast(x.device.type):
        y = evaluate(operator, x, domain, bias)
        # torch's own layer gives a single image in the usual format, whatever its format was
        batched = input.ndim == x.ndim
        y = runtime.owned(y, runtime.memory_format(x) if batched else torch.contiguous_format)
    return y if batched else y.squeeze(0)


def _checked(operator: Operator, x: Tensor) -> Tensor:
    """Return images; have what `torch.jit.trace` records check the size of those that it will be given."""
    if not runtime.is_jit_traced() or torch.onnx.is_in_onnx_export():
        return x
    geometry = operator.geometry
    return runtime.scripted_in_trace(sized)(
        x, [*(operator.action.domain or (0,) * geometry.axes)], [*geometry.stride], geometry.transposed
    )


def _domain(operator: Operator, x: Tensor, dtype: torch.dtype) -> Size:
    """Return the fine grid of these images, once they have been checked."""
    geometry = operator.geometry
    if x.ndim != geometry.axes + 2 or x.shape[1] != geometry.taken:
        raise ValueError(
            f"input should have {geometry.taken} channels and {geometry.axes} axes of space. "
            f"Found size {tuple(x.shape)}"
        )
    if x.dtype != dtype:
        raise TypeError(f"input should be of the weight's dtype, {dtype}. Found {x.dtype}")
    if operator.action.domain is not None and runtime.is_jit_traced():
        return operator.action.domain  # at each call of the trace: see `_checked`
    domain = geometry.domain(tuple(x.shape[2:]))
    operator.action.check_domain(domain)
    return domain
