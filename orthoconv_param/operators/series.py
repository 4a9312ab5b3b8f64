"""`Series`: an exponential by its Chebyshev series, one convolution for each term, without a kernel."""

from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..action import recurrence
from ..action.generator import Generator, few_of, level
from ..action.skew import Layout, entering, leaving, skew_kernel
from ..checks import HALF, Size
from ..torus.boundary import fold
from ..torus.lattice import Placement
from .operator import Operator, with_bias


class Prepared(NamedTuple):
    """What is prepared.

    Args:
        generator: what is exponentiated.
        layout: of its skew kernel.
        B: `skew_kernel` over the generator's norm; of the transpose with the opposite sign.
        step: how each term's convolution is applied.
        transposed: whether the transpose is applied.
        reduced: the dtype of the convolutions, if it is not that of the images.
        level: the generator's norm as it is when compiled code runs: see Note [terms in compiled code].
            None elsewhere.
    """

    generator: Generator
    layout: Layout
    B: tuple[Tensor, ...]
    step: recurrence.Step
    transposed: bool
    reduced: torch.dtype | None
    level: Tensor | None


class Series:
    """Evaluates the exponential of a generator by its action on images, between walls or around a torus."""

    name = "series"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return its estimated time: see Note [cost model]. Infinite where nothing is exponentiated."""
        action, weight = operator.action, operator.weight
        if weight.is_blended:
            return inf
        if action.boundary.has_walls or not weight.has_kernel:
            return 0.0 if weight.has_generator else inf
        geometry, effort = action.geometry, weight.effort
        # dilation permutes the phases of a stride, which makes another generator
        permuted = max(action.dilation) > 1 and max(geometry.stride) > 1
        if effort is None or permuted or not action.boundary.is_periodic:
            return inf
        rows, columns = geometry.lattice(domain).blocks(geometry.size)
        k, m = min(rows, columns), max(rows, columns)
        pixels = batch * prod(geometry.coarse(domain)) * geometry.groups
        taps = Layout.of(geometry, geometry.placement).taps
        term = 1e5 + pixels * (0.9 * m + 0.0085 * prod(taps) * k * (2 * m - k))
        norm = 5e5 + 0.07 * geometry.groups * prod([4 * t - 3 for t in taps]) * min(m, 2 * k) ** 3
        return norm + 3 * effort[1] * term  # a backward pass takes more of its time than of others'

    def prepare(self, operator: Operator, domain: Size) -> Prepared:
        """Compute the skew kernel, for images of every size but those so small that it wraps around."""
        generator = operator.weight.generator()
        assert generator is not None
        geometry, action = generator.geometry, operator.action
        layout = Layout.of(geometry, geometry.placement)
        transposed = action.geometry.transposed
        norm = -generator.norm if transposed else generator.norm
        B = [b / norm for b in skew_kernel(generator.kernel, layout.numbers)]
        reduced = operator.reduced  # around a torus, no other evaluator takes less than single precision
        step = recurrence.Step([*layout.padding], [*layout.dilation], layout.groups, [])
        if not action.boundary.has_walls:
            reduced = None
            # a compact kernel is of undilated taps where it may be
            outer = action.dilation if operator.weight.has_kernel else (1,) * action.geometry.axes
            dilation = tuple(a * r for a, r in zip(layout.dilation, outer, strict=True))
            grid = action.geometry.coarse(domain)
            if any(r * (k - 1) >= n for k, r, n in zip(layout.taps, dilation, grid, strict=True)):
                B, dilation = [fold(b, grid, dilation) for b in B], (1,) * len(grid)
            taps = tuple(B[0].shape[2:])
            placement = Placement.centred(taps, dilation)
            sides = zip(placement.origin[::-1], placement.after(taps)[::-1], strict=True)
            surround = [n for side in sides for n in side]
            step = recurrence.Step([0] * len(grid), [*dilation], layout.groups, surround)
        now = None if generator.number is None else level(generator.kernel.detach(), generator.number)
        return Prepared(generator, layout, tuple(B), step, transposed, reduced, now)

    def apply(self, state: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply it to images ``(batch, channels, *size)``, and add a bias."""
        generator, layout = state.generator, state.layout
        dtype, numbers, coin = x.dtype, layout.numbers, generator.coin
        x = entering(x.float() if dtype in HALF else x, coin, numbers, state.transposed)
        coefficients = few_of(generator.coefficients, state.reduced)
        rule = recurrence.Series(coefficients, state.step, state.reduced)
        if state.level is None or generator.number is None:
            y = recurrence.applied(rule, x, *state.B)
        else:
            followed = recurrence.Followed(state.level, generator.norm, generator.number)
            y = recurrence.compiled(rule, followed, x, *state.B)
        y = leaving(y, coin, numbers, state.transposed, layout.is_complex)
        return with_bias(y.to(dtype), bias)
