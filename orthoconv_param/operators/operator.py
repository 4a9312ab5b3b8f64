"""`Operator`: what a convolution module does, its bias aside. Everything else asks it for its matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import keeping
from ..checks import Size
from ..torus.boundary import Boundary
from ..torus.geometry import Geometry, per_channel
from ..torus.lattice import Lattice, Placement
from .weight import Weight


@dataclass(frozen=True)
class Action:
    """How a kernel acts on images, whatever its values.

    Args:
        geometry: of the convolution as it was registered.
        boundary: what images are continued by.
        domain: the only one that it takes; its kernel is then that of the boundary's torus. None: every.
        dilation: with which the kernel is applied. It is centred.
    """

    geometry: Geometry
    boundary: Boundary
    domain: Size | None
    dilation: Size

    def check_domain(self, domain: Size) -> None:
        """Raise if images of this size (transposed: outputs) are not taken.

        Raises:
            ValueError: then.
        """
        if self.domain is not None and domain != self.domain:
            what = "output" if self.geometry.transposed else "input"
            raise ValueError(f"{what} should be of the domain's size, {self.domain}. Found {domain}")
        self.geometry.check_divisible(domain)


@dataclass(frozen=True)
class Operator:
    """What a convolution does to images.

    Args:
        action: how its kernel acts.
        weight: where its matrices come from.
        reduced: the dtype in which convolutions may be computed, if autocast names one.
    """

    action: Action
    weight: Weight
    reduced: torch.dtype | None = None

    @property
    def geometry(self) -> Geometry:
        """Of the convolution."""
        return self.action.geometry

    @property
    def boundary(self) -> Boundary:
        """What images are continued by."""
        return self.action.boundary

    def kernel(self) -> Tensor:
        """Return its kernel, centred, in single precision at least; computed once in a cached loop."""
        return keeping.once(self.weight.owner, "kernel", self.weight.tensors, self.weight.kernel)

    def wraps(self, domain: Size) -> bool:
        """Return True if its kernel wraps around images of this size: their torus makes it exact."""
        action = self.action
        return action.domain is None and action.boundary.is_periodic and self.weight.reads_more_of(domain)

    def exponentiating(self, domain: Size) -> float:
        """Return the estimated time of what `Series` spares: see Note [cost model].

        It is 0 in a cached loop, whose steps share it, and where `Series` cannot take its place.
        """
        effort = self.weight.effort
        if effort is None or keeping.is_cached():
            return 0.0
        lattice = self.geometry.lattice(domain)
        rows, columns = lattice.blocks(self.geometry.size)
        matrices = self.geometry.groups * min(effort[0], lattice.frequencies)
        k, m = min(rows, columns), max(rows, columns)
        each = 0.3 if k == m else 0.45
        return 8e5 + each * matrices * m * m * k

    def spectrum(self, domain: Size) -> tuple[Lattice, Tensor]:
        """Return its matrices on the torus on which it is computed for images on a domain."""
        action, geometry = self.action, self.geometry
        if action.domain is not None or self.wraps(domain):
            made = self.weight.spectrum(domain, action.dilation)
            if made is not None and made[0].fills(domain):
                lattice, M = made
                return lattice, M.to(torch.promote_types(self.weight.tensors[0].dtype, torch.complex64))
        kernel, torus = action.boundary.embed(
            self.kernel(), domain, geometry.stride, action.dilation, action.domain is not None
        )
        lattice = geometry.lattice(torus)
        placement = Placement.centred(tuple(kernel.shape[2:]), action.dilation)
        return lattice, lattice.spectrum(kernel, placement)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return images with a bias added to each channel."""
    return y if bias is None else y + per_channel(bias, y)
