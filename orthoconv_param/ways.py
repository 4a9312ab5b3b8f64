"""Ways from a pretrained convolution to an orthogonal one: what `retrofit` installs on each."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .checks import Size, check_finite
from .convert import (
    Conversion,
    boundary_by_default,
    check_module,
    checks_size,
    geometry_of,
    padding,
    with_taps_of,
)
from .module import install
from .operators.operator import Action
from .parametrizations.annealed import Annealed, AnnealedGenerator, AnnealedSplit
from .parametrizations.blocks import Blocks
from .parametrizations.exponential import ConvExponential
from .parametrizations.partition import Block, Partition
from .split.chain import Chain
from .torus.boundary import BOUNDARIES, Boundary, Walls, Zeros, boundary_named, boundary_of
from .torus.geometry import Geometry


@dataclass(frozen=True)
class Plan:
    """What is to be installed on a convolution, once everything about it has been checked.

    Args:
        module: the convolution.
        parametrization: of its weight.
        action: how it is then evaluated; None: by torch's own forward.
        attributes: of the module, to be changed.
    """

    module: Any
    parametrization: nn.Module
    action: Action | None
    attributes: dict[str, Any] = field(default_factory=dict)

    def install(self) -> Callable[[], None]:
        """Install it; return what undoes that."""
        return install(self.module, self.parametrization, self.action, **self.attributes)


@dataclass(frozen=True)
class Way:
    """How convolutions become orthogonal.

    Args:
        method: ``"split"`` or ``"exponential"``.
        boundary: that of all of them; None: circular ones stay circular, zero-padded ones get walls.
        anneal: whether they start from the pretrained operators themselves.
    """

    method: str
    boundary: str | None
    anneal: bool

    def plan(self, name: str, module: Any, seen: list[Size], blocks: list[Block] | None) -> Plan:
        """Decide how one convolution is made orthogonal; change nothing.

        Args:
            name: of the convolution.
            module: the convolution.
            seen: sizes of the images that the example feeds it.
            blocks: of its weight; None for all of it.

        Raises:
            TypeError, ValueError: if it cannot be.
        """
        if not seen:
            raise ValueError(
                "the example should call this module, in evaluation mode too, so that the size of its "
                "images is known. Found no call"
            )
        if module.weight.is_meta:
            raise ValueError("the weight should have values. Found a meta tensor")
        check_module(module, "weight")
        edges = self._boundary(module)
        partition = None
        if blocks is not None:
            partition = Partition(blocks, tuple(module.weight.shape), module.groups)
            if partition.is_all and len(partition.blocks) == module.groups:
                partition = None
        check_finite("the weight", module.weight)
        # a single tap takes every size by polar factors too, and with a stride by these alone
        single = max(module.weight.shape[2:]) == 1 and max(module.stride) > 1
        if single or (self.method == "exponential" and not edges.has_walls):
            return self._polar(name or None, module, seen, edges, partition)
        return self._interpolating(name or None, module, seen, edges, partition)

    def _boundary(self, module: Any) -> Boundary:
        """Return the boundary of a convolution.

        Raises:
            ValueError: if none can be taken for granted.
        """
        if self.boundary is not None:
            return boundary_named(self.boundary)
        own = boundary_of(module)
        if own is None:
            return boundary_by_default(module)  # raises
        return BOUNDARIES[Walls.name] if own.name == Zeros.name else own

    def _polar(
        self, owner: str | None, module: Any, seen: list[Size], edges: Boundary, partition: Partition | None
    ) -> Plan:
        """Return the way by polar factors, on images of one size."""
        if len(seen) > 1 and max(module.weight.shape[2:]) > 1:
            found = ", ".join(map(str, seen))
            raise ValueError(
                'its images should be of one size, the domain, or method be "split", or boundary "walls", '
                f"which accept every size. Found {found}"
            )
        part = None if partition is None else partition.part
        for domain in seen:
            conversion = Conversion.of(module, "weight", domain, edges.name, part, small=True)
        made = conversion.exponential(owner, Annealed if self.anneal else ConvExponential)
        made.to(module.weight.device)
        whole = made if partition is None else Blocks(made, partition)
        return Plan(module, whole, conversion.action)

    def _interpolating(
        self, owner: str | None, module: Any, seen: list[Size], edges: Boundary, partition: Partition | None
    ) -> Plan:
        """Return the way ``(1 - t) W + t Q``, on images of every size."""
        whole = geometry_of(module)
        part = (*whole.size[:2], whole.groups) if partition is None else partition.part
        _check_divisible(seen, whole, edges)
        whole.check_existence((*part[:2], *whole.taps), part[2])
        geometry = replace(whole, size=(*part[:2], *whole.taps), groups=part[2], transposed=False)
        sees = max(whole.placement.reach(whole.taps, whole.stride)) > 0  # beyond its patch
        splits = not sees or (self.method == "split" and not _is_scalar(geometry))
        if not splits and edges.name == Zeros.name:  # one channel in a group
            return self._polar(owner, module, seen, edges, partition)
        context = {"boundary": edges.name, "images": "any"}
        made: Any
        action: Action | None = Action(whole, edges, None, whole.dilation)
        attributes: dict[str, Any] = {}
        if splits:
            made = AnnealedSplit.placed(geometry, edges.has_walls, owner, context)
            chain = Chain.of(geometry, edges.has_walls)
            alone = chain.is_within_patches(with_taps_of(chain, geometry))
            torchs = alone if edges.has_walls else not (edges.is_periodic and whole.transposed)
            if torchs and not checks_size(whole, edges):
                action = None
                if max(whole.taps) > 1:  # which sees a boundary
                    attributes = padding(module, whole, edges)
                    _check_padding(seen, whole, edges)
        else:
            made = AnnealedGenerator(geometry, owner, context, base=True)
        if not self.anneal:
            made.never()
        made.to(module.weight.device)
        return Plan(module, made if partition is None else Blocks(made, partition), action, attributes)


def _is_scalar(geometry: Geometry) -> bool:
    """Return True if pairs act on one channel in each group: such kernels are nothing but shifts."""
    rows = geometry.size[0] // geometry.groups if max(geometry.stride) == 1 else 1
    return max(rows, geometry.size[1]) == 1


def _check_divisible(seen: list[Size], geometry: Geometry, edges: Boundary) -> None:
    """Raise if the stride does not divide the example's images, on which nothing could be orthogonal.

    Raises:
        ValueError: then.
    """
    for size in seen if checks_size(geometry, edges) else ():
        if any(n % s for n, s in zip(size, geometry.stride, strict=True)):
            raise ValueError(
                f"its images should be of a size divisible by the stride {geometry.stride}: pad them, or "
                f"leave it out by select. Found {size}"
            )


def _check_padding(seen: list[Size], geometry: Geometry, edges: Boundary) -> None:
    """Raise if torch cannot continue the example's images around the torus.

    Raises:
        ValueError: then; it names what to do.
    """
    taps, origin = geometry.taps, geometry.placement.origin
    most = [*map(max, origin, geometry.placement.after(taps))]
    for size in seen:
        if edges.is_periodic and any(side > n for side, n in zip(most, size, strict=True)):
            raise ValueError(
                "its images should be at least as large as its padding, since torch's circular padding "
                'wraps only once: use boundary="walls", which accepts every size. '
                f"Found images of {size} and a kernel of {taps} taps"
            )
