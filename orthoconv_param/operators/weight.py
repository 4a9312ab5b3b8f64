"""Where an operator's matrices come from: a parametrization, or a kernel that is simply there."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from .. import runtime
from ..action.generator import Generator
from ..checks import Size
from ..parametrizations.blocks import Blocks
from ..parametrizations.exponential import ConvExponential
from ..parametrizations.split import SplitExponential
from ..parametrizations.walled import WalledGenerator
from ..split.chain import Chain, Factors
from ..torus.lattice import Lattice

_OURS = (ConvExponential, Blocks, SplitExponential, WalledGenerator)


class Weight(Protocol):
    """Where matrices come from."""

    @property
    def owner(self) -> object:
        """Return whose results are kept within `parametrize.cached()`; None if none are."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the free parameters, the generator first; or the kernel."""
        ...

    @property
    def taps(self) -> Size | None:
        """Return the taps of the kernel; None if they are known only once it is computed."""
        ...

    @property
    def has_matrices(self) -> bool:
        """Return True if `spectrum` makes them, without a kernel."""
        ...

    def kernel(self) -> Tensor:
        """Compute the kernel, ``(out, in/groups, *taps)``, centred, in single precision at least."""
        ...

    def reads_more_of(self, images: Size) -> bool:
        """Return True if `spectrum` is better made on the torus of the images."""
        ...

    def spectrum(self, images: Size | None, dilation: Size) -> tuple[Lattice, Tensor] | None:
        """Compute the matrices; None if there is only a kernel."""
        ...

    @property
    def has_generator(self) -> bool:
        """Return True if `generator` makes one."""
        ...

    @property
    def effort(self) -> tuple[int, int] | None:
        """Return at how many frequencies a compact kernel is exponentiated, and the terms of its series.

        Return None where there is no choice between the two.
        """
        ...

    def generator(self) -> Generator | None:
        """Return what is exponentiated on images of every size; None if the kernel is something else."""
        ...

    def factors(self) -> tuple[Chain, Factors] | None:
        """Compute the factors of a split kernel; None of any other."""
        ...


@dataclass(frozen=True)
class Fixed:
    """A kernel that nothing computes.

    Args:
        tensor: the kernel.
    """

    tensor: Tensor

    @property
    def owner(self) -> object:
        """Return None: an optimizer changes it in place, within `parametrize.cached()` too."""
        return None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the kernel."""
        return (self.tensor,)

    @property
    def taps(self) -> Size | None:
        """Return its taps."""
        return tuple(self.tensor.shape[2:])

    @property
    def has_matrices(self) -> bool:
        """Return False."""
        return False

    def kernel(self) -> Tensor:
        """Return the kernel in single precision at least."""
        return _precise(self.tensor, self.tensor.dtype)

    def reads_more_of(self, images: Size) -> bool:
        """Return False."""
        return False

    def spectrum(self, images: Size | None, dilation: Size) -> tuple[Lattice, Tensor] | None:
        """Return None."""
        return None

    @property
    def has_generator(self) -> bool:
        """Return False."""
        return False

    @property
    def effort(self) -> tuple[int, int] | None:
        """Return None."""
        return None

    def generator(self) -> Generator | None:
        """Return None."""
        return None

    def factors(self) -> tuple[Chain, Factors] | None:
        """Return None."""
        return None


@dataclass(frozen=True)
class Parametrized:
    """A kernel that parametrizations make.

    Args:
        stack: of them.
    """

    stack: ParametrizationList

    @property
    def owner(self) -> object:
        """Return the stack."""
        return self.stack

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the free parameters, the generator first."""
        stack = self.stack
        return (stack.original,) if stack.is_tensor else tuple(getattr(stack, name) for name in self.names)

    @property
    def names(self) -> list[str]:
        """Return how torch calls the free parameters."""
        return (
            ["original"] if self.stack.is_tensor else [f"original{i}" for i in range(self.stack.ntensors)]
        )

    @property
    def only(self) -> ConvExponential | Blocks | SplitExponential | WalledGenerator | None:
        """Return the parametrization if it alone makes the kernel, and is one of this package."""
        only = self.stack[0] if len(self.stack) == 1 else None
        return only if isinstance(only, _OURS) else None

    @property
    def exponential(self) -> ConvExponential | Blocks | None:
        """Return the parametrization if it alone makes the kernel, and from matrices."""
        only = self.only
        return only if isinstance(only, (ConvExponential, Blocks)) else None

    @property
    def taps(self) -> Size | None:
        """Return the taps, if no other parametrization may change them."""
        only = self.only
        return None if only is None else only.taps

    @property
    def has_matrices(self) -> bool:
        """Return True if a parametrization alone makes the kernel, and from matrices."""
        return self.exponential is not None

    def kernel(self) -> Tensor:
        """Compute the kernel."""
        dtype = self.tensors[0].dtype
        made = self.spectrum(None, ())
        if made is None:
            return _precise(self.stack(), dtype)
        with runtime.no_autocast(made[1].device.type):
            return _precise(made[0].kernel(made[1]), dtype)

    def reads_more_of(self, images: Size) -> bool:
        """Ask the parametrization."""
        exponential = self.exponential
        return exponential is not None and exponential.reads_more_of(images)

    def spectrum(self, images: Size | None, dilation: Size) -> tuple[Lattice, Tensor] | None:
        """Ask the parametrization."""
        exponential, tensors = self.exponential, self.tensors
        if exponential is None:
            return None
        if isinstance(exponential, Blocks):
            return exponential.spectrum(tensors, images, dilation)
        return exponential.spectrum(tensors[0], images, dilation)

    @property
    def has_generator(self) -> bool:
        """Return True if the parametrization exponentiates on images of every size."""
        only = self.only
        return isinstance(only, WalledGenerator) or (
            isinstance(only, ConvExponential) and only.domain == "any"
        )

    @property
    def effort(self) -> tuple[int, int] | None:
        """Ask the parametrization."""
        only = self.only
        return only.effort if isinstance(only, ConvExponential) else None

    def generator(self) -> Generator | None:
        """Ask the parametrization."""
        only = self.only
        if not isinstance(only, (WalledGenerator, ConvExponential)) or not self.has_generator:
            return None
        return only.generator(self.tensors[0])

    def factors(self) -> tuple[Chain, Factors] | None:
        """Ask the parametrization."""
        only = self.only
        if not isinstance(only, SplitExponential):
            return None
        return only.chain_or_raise(), only.factors(self.tensors[0])


def _precise(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel.to(torch.promote_types(dtype, torch.float32))
