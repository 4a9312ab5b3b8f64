"""`Direct`: a convolution by torch's own, one multiplication for each tap and pixel."""

from math import inf, prod
from typing import NamedTuple

from torch import Tensor

from ..checks import Size
from .operator import Operator, with_bias


class Taps(NamedTuple):
    """What is prepared: a kernel, and how it acts on images of a domain."""

    operator: Operator
    kernel: Tensor
    domain: Size


class Direct:
    """Evaluates an operator by its kernel, directly."""

    name = "direct"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return its estimated time: see Note [cost model]. Infinite where it never pays."""
        taps, geometry = operator.weight.taps, operator.geometry
        weight = operator.weight
        if taps is None or operator.boundary.has_walls or not weight.has_kernel or operator.wraps(domain):
            return inf
        if operator.action.domain is not None:
            # as many taps as the domain has points never pay; a single tap, or its phases, always does
            return 0.0 if any(k < n for k, n in zip(taps, domain, strict=True)) else inf
        inner = geometry.size[1]
        # Note [cost model]
        # Nanoseconds of one forward pass in single precision, as measured on 2 cores by
        # tests/benchmarks/evaluation.py. Only the ratio matters, and a backward pass changes it little.
        each = 0.02 if inner >= 8 else 0.04  # a multiplication, with many channels or few
        met = prod([min(k, n) for k, n in zip(taps, domain, strict=True)])
        images = batch * prod(geometry.coarse(domain)) * met * geometry.size[0] * inner
        return 2e5 + operator.exponentiating(domain) + each * images

    def prepare(self, operator: Operator, domain: Size) -> Taps:
        """Compute the kernel."""
        return Taps(operator, operator.kernel().to(operator.weight.tensors[0].dtype), domain)

    def apply(self, state: Taps, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply it to images ``(batch, channels, *size)``, and add a bias."""
        action = state.operator.action
        y = action.boundary.convolve(
            x, state.kernel, action.geometry, state.domain, action.dilation, action.domain is not None
        )
        return with_bias(y, bias)
