"""`Mending`: a split kernel between walls, by a zero-padded convolution whose edges are mended."""

from math import inf
from typing import NamedTuple

from torch import Tensor

from ..checks import Size
from ..split import mending, ring
from ..torus.geometry import Geometry
from .operator import Operator


class Prepared(NamedTuple):
    """What is prepared: a kernel between walls, for images of every size."""

    kernel: mending.Mended | ring.Ring
    geometry: Geometry


class Mending:
    """Evaluates an operator between walls by its factors."""

    name = "mended"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return 0 between walls, infinity elsewhere."""
        return 0.0 if operator.boundary.has_walls else inf

    def prepare(self, operator: Operator, domain: Size) -> Prepared:
        """Compute the kernel, and what its edges take.

        Raises:
            ValueError: if something else than `SplitExponential` makes the kernel.
        """
        weight, geometry = operator.weight, operator.geometry
        dtype, transposed = weight.tensors[0].dtype, geometry.transposed
        if geometry.taps == (3, 3) and max(geometry.dilation) == 1:
            V = weight.with_ends()
            if V is not None:
                return Prepared(ring.Ring.of(V, geometry.groups, transposed).to(dtype), geometry)
        found = weight.factors()
        if found is None:
            raise ValueError(
                "between walls the weight should have no other parametrization than SplitExponential: what "
                "its edges take comes from its factors. Found another one on top of it"
            )
        return Prepared(mending.mended(*found, transposed).to(dtype), geometry)

    def apply(self, state: Prepared, x: Tensor) -> Tensor:
        """Apply it to images ``(batch, channels, *size)``."""
        if isinstance(state.kernel, ring.Ring):
            return ring.apply(state.kernel, x)
        return mending.apply(state.kernel, x, state.geometry)
