"""`Chained`: a split kernel between walls, factor by factor."""

from math import inf
from typing import NamedTuple

from torch import Tensor

from ..checks import HALF, Size
from ..split import between
from ..split.chain import Chain, Factors
from ..torus.geometry import Geometry
from .operator import Operator, with_bias


class Prepared(NamedTuple):
    """What is prepared: factors, for images of every size."""

    chain: Chain
    factors: Factors
    geometry: Geometry


class Chained:
    """Evaluates an operator between walls by its factors."""

    name = "chained"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return 0 between walls, if factors are all that there is; infinity elsewhere."""
        weight = operator.weight
        blended = weight.has_generator or weight.is_blended
        return 0.0 if operator.boundary.has_walls and not blended else inf

    def prepare(self, operator: Operator, domain: Size) -> Prepared:
        """Compute the factors.

        Raises:
            ValueError: if something else than `SplitExponential` makes the kernel.
        """
        found = operator.weight.factors()
        if found is None:
            raise ValueError(
                "between walls the weight should have no other parametrization than that of orthogonal: "
                "what the module does there comes from its factors, or its generator. Found another one"
            )
        return Prepared(*found, operator.geometry)

    def apply(self, state: Prepared, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply them to images ``(batch, channels, *size)``, and add a bias."""
        if x.dtype in HALF:  # which each factor would round
            y = between.apply(state.chain, state.factors, x.float(), None, state.geometry)
            return with_bias(y.to(x.dtype), bias)
        return between.apply(state.chain, state.factors, x, bias, state.geometry)
