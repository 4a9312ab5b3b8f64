"""Where an operator's matrices come from: a parametrization, or a kernel that is simply there."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from .. import runtime
from ..action.generator import Generator
from ..checks import Size
from ..parametrizations.annealed import Interpolating
from ..parametrizations.blocks import Blocks, Made
from ..parametrizations.exponential import ConvExponential
from ..parametrizations.partition import Partition
from ..parametrizations.split import SplitExponential
from ..parametrizations.walled import WalledGenerator
from ..split.chain import Chain, Factors
from ..torus.lattice import Lattice

_OURS = (ConvExponential, Blocks, SplitExponential, WalledGenerator)


class Blend(NamedTuple):
    """An ordinary convolution, and a share of an orthogonal operator that acts on all or some channels.

    Args:
        kernel: of the ordinary convolution, ``(out, in/groups, *taps)``; None if there is none.
        share: how much of the orthogonal operator; None for all.
        partition: the channels that it joins; None for all.
        orthogonal: where the orthogonal operator's matrices come from.
    """

    kernel: Tensor | None
    share: Tensor | None
    partition: Partition | None
    orthogonal: "Weight"


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
    def has_kernel(self) -> bool:
        """Return False if `kernel` is a generator, and no kernel of what the module does."""
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

    @property
    def chain(self) -> Chain | None:
        """Return of which factors a split kernel is the product; None of any other."""
        ...

    def factors(self) -> tuple[Chain, Factors] | None:
        """Compute the factors of a split kernel; None of any other."""
        ...

    @property
    def is_blended(self) -> bool:
        """Return True if there is more than what generator or factors make: see `blend`."""
        ...

    def blend(self) -> Blend | None:
        """Return what there is besides; None if nothing."""
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
    def has_kernel(self) -> bool:
        """Return True."""
        return True

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

    @property
    def chain(self) -> Chain | None:
        """Return None."""
        return None

    def factors(self) -> tuple[Chain, Factors] | None:
        """Return None."""
        return None

    @property
    def is_blended(self) -> bool:
        """Return False."""
        return False

    def blend(self) -> Blend | None:
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
    def inner(self) -> Made | None:
        """Return `only`, or of blocks the parametrization that makes them."""
        only = self.only
        return only.exponential if isinstance(only, Blocks) else only

    @property
    def taps(self) -> Size | None:
        """Return the taps, if no other parametrization may change them."""
        only = self.only
        return None if only is None else only.taps

    @property
    def has_kernel(self) -> bool:
        """Return True unless the weight, or blocks of it, are a generator."""
        return not isinstance(self.inner, WalledGenerator)

    @property
    def has_matrices(self) -> bool:
        """Return True if a parametrization alone makes the kernel, and from matrices."""
        return isinstance(self.inner, ConvExponential)

    def kernel(self) -> Tensor:
        """Compute the kernel."""
        dtype, only = self.tensors[0].dtype, self.only
        if isinstance(only, ConvExponential):
            return _precise(only.kernel(self.tensors[0]), dtype)
        made = self.spectrum(None, ())
        if made is None:
            return _precise(self.stack(), dtype)
        with runtime.no_autocast(made[1].device.type):
            return _precise(made[0].kernel(made[1]), dtype)

    def reads_more_of(self, images: Size) -> bool:
        """Ask the parametrization."""
        only = self.only
        return isinstance(only, (ConvExponential, Blocks)) and only.reads_more_of(images)

    def spectrum(self, images: Size | None, dilation: Size) -> tuple[Lattice, Tensor] | None:
        """Ask the parametrization."""
        only, tensors = self.only, self.tensors
        if isinstance(only, Blocks) and self.has_matrices:
            return only.spectrum(tensors, images, dilation)
        return only.spectrum(tensors[0], images, dilation) if isinstance(only, ConvExponential) else None

    @property
    def has_generator(self) -> bool:
        """Return True if the parametrization exponentiates on images of every size."""
        inner = self.inner
        return isinstance(inner, WalledGenerator) or (
            isinstance(inner, ConvExponential) and inner.domain == "any"
        )

    @property
    def effort(self) -> tuple[int, int] | None:
        """Ask the parametrization."""
        only = self.only
        return only.effort if isinstance(only, ConvExponential) else None

    def generator(self) -> Generator | None:
        """Ask the parametrization."""
        inner = self.inner
        if not isinstance(inner, (WalledGenerator, ConvExponential)) or not self.has_generator:
            return None
        return inner.generator(self.tensors[0])

    @property
    def chain(self) -> Chain | None:
        """Ask the parametrization."""
        inner = self.inner
        return inner.chain_or_raise() if isinstance(inner, SplitExponential) else None

    def factors(self) -> tuple[Chain, Factors] | None:
        """Ask the parametrization."""
        inner = self.inner
        if not isinstance(inner, SplitExponential):
            return None
        return inner.chain_or_raise(), inner.factors(self.tensors[0])

    @property
    def is_blended(self) -> bool:
        """Return True if generator or factors make some blocks only, or are on the way."""
        only, inner = self.only, self.inner
        if isinstance(inner, ConvExponential):
            return False
        return isinstance(only, Blocks) or (isinstance(inner, Interpolating) and inner.t is not None)

    def blend(self) -> Blend | None:
        """Compute the ordinary convolution."""
        only, inner = self.only, self.inner
        if not self.is_blended:
            return None
        share, kernel, partition = None, None, None
        dtype = torch.promote_types(self.tensors[0].dtype, torch.float32)
        if isinstance(inner, Interpolating):
            share, kernel = inner.t, inner.pretrained_share(dtype)
        if isinstance(only, Blocks):
            partition, rest = only.partition, self.tensors[1:]
            if kernel is None and rest:
                kernel = rest[0].new_zeros(*partition.part[:2], *rest[0].shape[2:], dtype=dtype)
            if kernel is not None:
                kernel = partition.assembled(kernel, rest[0] if rest else None)
        return Blend(kernel, share, partition, Unblended(self.stack))


@dataclass(frozen=True)
class Unblended(Parametrized):
    """The orthogonal part of a blend."""

    @property
    def is_blended(self) -> bool:
        """Return False."""
        return False


def _precise(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel.to(torch.promote_types(dtype, torch.float32))
