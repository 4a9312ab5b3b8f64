"""`Registered`: what a parametrization knows of its weight, through moves and checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import runtime
from ..checks import Size, count, per_axis
from ..matrices import maps
from ..torus.geometry import Geometry
from ..torus.lattice import Placement
from . import signature

_OF_ANNEALING = {"t", "pretrained", "directions", "values"}  # buffers


def made_otherwise(found: str) -> str:
    """Say that a checkpoint is of a convolution that was made orthogonal in another way."""
    return (
        "the checkpoint should be of a convolution that was made orthogonal in the same way. Found "
        f"{found}: call orthogonal or retrofit with the same options, and blocks, before loading"
    )


def is_sharper(x: Tensor, source: Any) -> bool:
    """Return True if a tensor is more precise than that from which it was made, and may be projected."""
    if not isinstance(source, Tensor) or not source.is_floating_point() or x.is_meta:
        return False
    return torch.finfo(x.dtype).eps < torch.finfo(source.dtype).eps


class Registered(nn.Module, ABC):
    """A parametrization with the size, dtype and device of the weight on which it is registered.

    Args:
        stride: of the convolution.
        groups: of the convolution.
        triv: the map from skew to unitary matrices.
        base: True to multiply what it gives by fixed unitary matrices.

    Raises:
        TypeError, ValueError: if these are not as `ConvExponential` and `SplitExponential` say.
    """

    _reference: Tensor | None
    _unitary: ClassVar[tuple[str, ...]] = ("base",)  # the buffers of unitary matrices

    base: Tensor | None

    def __init__(
        self, stride: int | Size, groups: int, triv: str | maps.Trivialization, base: bool | None
    ) -> None:
        super().__init__()
        strides = per_axis("stride", stride)
        maps.check_trivialization(triv)
        if not (base is None or isinstance(base, bool)):
            raise TypeError(f"base should be None, True or False. Found {base!r}")
        self.stride = strides if isinstance(stride, (tuple, list)) else strides[0]
        self.groups = count("groups", groups)
        self.triv = triv
        self.has_base = base is not False
        self.placement: Placement | None = None  # of the generator's taps, if they are not centred
        self.owner: str | None = None  # the module, in words
        self.context: dict[str, str] = {}  # what else tells checkpoints apart: see `signature`
        self.geometry: Geometry | None = None  # of the generator, once registered
        self.register_buffer("_reference", None, persistent=False)  # an empty tensor: dtype and device
        # The base as real numbers: `Module.to` drops the imaginary part of complex buffers, and gives those
        # of 4 or 5 axes a memory format.
        self.register_buffer("base", None)

    def check_inverse(self) -> None:
        """Raise if there is no base, and the map has no inverse.

        Raises:
            ValueError: then.
        """
        if not self.has_base and maps.inverse(self.triv) is None:
            raise ValueError(
                "base=False needs triv's inverse, which only those with names have: triv should be given "
                f"by name, or base be True. Found {maps.name(self.triv)}"
            )

    def options(self) -> list[str]:
        """Return what ``print`` says of stride and groups."""
        options = (("stride", self.stride), ("groups", self.groups))
        return [f"{key}={value}" for key, value in options if max(per_axis(key, value)) > 1]

    def _registered(self) -> tuple[Geometry, Tensor]:
        if self.geometry is None or self._reference is None:
            raise RuntimeError(
                "the parametrization should be registered on a weight first. Found it unregistered"
            )
        return self.geometry, self._reference

    def _get_name(self) -> str:
        return type(self).__qualname__

    def check_generator(self, X: Tensor, size: Size) -> None:
        """Raise if a generator is sharded, not of its size or kind or, where that is seen, not finite."""
        of = "" if self.owner is None else f" of {self.owner}"
        if self.geometry is not None and X.is_complex() != self.geometry.is_complex:
            kind_of = "complex" if self.geometry.is_complex else "real"
            raise TypeError(
                f"the generator{of} should stay {kind_of}, as the weight was at first. Found {X.dtype}: "
                f"move the module to {kind_of} dtypes only, or make another one orthogonal in that dtype"
            )
        if tuple(X.shape) != size:
            raise ValueError(f"the generator should be of size {size}. Found {tuple(X.shape)}")
        flaw = runtime.flaw(X)
        if flaw is not None:
            kind, words = flaw
            raise kind(f"the generator{of} {words}")

    # Checkpoints

    @abstractmethod
    def signature(self) -> dict[str, str]:
        """Return the settings that a checkpoint must match."""

    def difference(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Say how a checkpoint differs from this parametrization; None if it does not."""
        keys = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        known = {*runtime.buffers_of(self), runtime.EXTRA_STATE}
        unknown = [key for key in keys if key not in known]
        if unknown:
            return self.on_its_way(unknown)
        there = signature.decode(state_dict.get(prefix + runtime.EXTRA_STATE))
        return signature.difference({} if self.geometry is None else self.signature(), there)

    def on_its_way(self, keys: list[str]) -> str:
        """Say that a checkpoint holds buffers which this has not: of annealing, or of another kind."""
        found = ", ".join(sorted(keys))
        if not {key.rpartition(".")[2] for key in keys} & _OF_ANNEALING:
            return made_otherwise(found)
        return (
            f"the checkpoint should not be of a convolution that is still being annealed. Found {found}: "
            "save it after set_orthogonality(model, 1, final=True), or load it into a model that was "
            "retrofitted in the same way, with the same blocks"
        )

    def get_extra_state(self) -> Tensor:
        """Return the settings that a checkpoint must match."""
        return signature.encode({} if self.geometry is None else self.signature())

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: `difference` compares it."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        different = self.difference(state_dict, prefix)
        if different is not None:
            error_msgs.append(different)
            return
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + runtime.EXTRA_STATE
        if key in missing_keys:  # older checkpoints do not have it
            missing_keys.remove(key)
        for name in self._unitary:
            buffer = self._buffers[name]
            if buffer is not None and is_sharper(buffer, state_dict.get(prefix + name)):
                buffer.copy_(self._projected(buffer))
        self._loaded_or_moved(moved=False)

    # Moves to another dtype or device

    def _apply(self, fn: Any, recurse: bool = True) -> "Registered":
        old = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in old.items():
            after = self._buffers[name]
            if name == "_reference" or before is None or after is None:
                continue
            dtype = torch.promote_types(after.dtype.to_real(), torch.float32)
            if after.dtype != dtype:  # never below float32, nor complex
                after = self._buffers[name] = before.to(after.device, dtype)
            if name in self._unitary and is_sharper(after, before):
                self._buffers[name] = self._projected(after)
        self._loaded_or_moved(moved=True)
        return self

    @abstractmethod
    def _projected(self, buffer: Tensor) -> Tensor:
        """Return the unitary matrices nearest to those of a buffer."""

    @abstractmethod
    def _loaded_or_moved(self, moved: bool) -> None:
        """Take note of new values, or if ``moved`` of a new dtype or device."""
