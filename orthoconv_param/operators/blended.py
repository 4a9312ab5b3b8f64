"""`Blended`: an ordinary convolution, and a share of an orthogonal operator on all or some channels."""

from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import HALF, Size
from ..parametrizations.partition import Partition
from .chained import Chained
from .operator import Action, Operator, with_bias
from .series import Series
from .weight import Weight


class Prepared(NamedTuple):
    """What is prepared.

    Args:
        action: of the ordinary convolution.
        kernel: of it, or None.
        share: of the orthogonal operator; None for all.
        gathered: channels that the orthogonal operator takes; None for all.
        scattered: channels that it gives; likewise.
        evaluator: of the orthogonal operator.
        state: what that has prepared.
    """

    action: Action
    kernel: Tensor | None
    share: Tensor | None
    gathered: Tensor | None
    scattered: Tensor | None
    evaluator: Series | Chained
    state: Any


class Blended:
    """Evaluates both parts, and adds them."""

    name = "blended"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return 1 where there are two parts that are not one kernel; infinity elsewhere."""
        weight = operator.weight
        apart = operator.boundary.has_walls or not weight.has_kernel
        return 1.0 if weight.is_blended and apart else inf

    def prepare(self, operator: Operator, domain: Size) -> Prepared:
        """Compute the ordinary kernel, and what the orthogonal operator's evaluator prepares."""
        blend, action = operator.weight.blend(), operator.action
        assert blend is not None
        inner, gathered, scattered = orthogonal_part(operator, blend.partition, blend.orthogonal)
        evaluator: Series | Chained = Series() if blend.orthogonal.has_generator else Chained()
        state = evaluator.prepare(inner, domain)
        return Prepared(action, blend.kernel, blend.share, gathered, scattered, evaluator, state)

    def apply(self, state: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply both to images ``(batch, channels, *size)``, and add a bias."""
        dtype = x.dtype
        x = x.float() if dtype in HALF else x
        images = x if state.gathered is None else x.index_select(1, state.gathered)
        part = state.evaluator.apply(state.state, images)
        if state.share is not None:
            part = state.share * part
        y = part
        if state.kernel is not None:
            action = state.action
            y = action.boundary.convolve_ordinary(x, state.kernel, action.geometry)
        if state.scattered is not None:
            if state.kernel is None:
                y = part.new_zeros(len(x), state.action.geometry.given, *part.shape[2:])
            y = y.index_add(1, state.scattered, part)
        elif state.kernel is not None:
            y = y + part
        return with_bias(y.to(dtype), bias)


def orthogonal_part(
    operator: Operator, partition: Partition | None, weight: Weight
) -> tuple[Operator, Tensor | None, Tensor | None]:
    """Return the orthogonal part, and the channels that it takes and gives; None for all."""
    action = operator.action
    if partition is None:
        return replace(operator, weight=weight), None, None
    out, cin, groups = partition.part
    size = (out, cin, *action.geometry.taps)
    geometry = replace(action.geometry, size=size, groups=groups)
    device = weight.tensors[0].device
    rows, columns = (
        torch.tensor([i for block in channels for i in block], device=device)
        for channels in partition.channels()
    )
    if geometry.transposed:
        rows, columns = columns, rows
    return replace(operator, action=replace(action, geometry=geometry), weight=weight), columns, rows
