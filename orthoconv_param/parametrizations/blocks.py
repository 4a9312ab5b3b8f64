r"""`Blocks`: a kernel of which some blocks of channels are made by a parametrization, and the rest is free.

A recurrent cell with gates stacks the kernels that act on its input and on its state in one weight. The
blocks are alike, so they are the groups of one parametrization. Where that makes matrices, at each
frequency ``w`` of a torus,

    M(w)[rows_b, columns_b] = Q_b(w),

each ``Q_b`` unitary; elsewhere ``M`` is the spectrum of ordinary taps. Where it makes taps, they stand in
the weight.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import runtime
from ..checks import Size, at_least_single
from ..torus.boundary import crop
from ..torus.lattice import Lattice
from .exponential import ConvExponential
from .partition import Partition
from .registered import made_otherwise
from .split import SplitExponential
from .walled import WalledGenerator

Made: TypeAlias = ConvExponential | SplitExponential | WalledGenerator


class Blocks(nn.Module):
    """Parametrizes a convolution's weight: blocks of it by another parametrization, the rest by itself.

    Args:
        exponential: the parametrization of the stacked blocks, one for each group. `ConvExponential` is on
            a given domain.
        partition: which blocks.
    """

    def __init__(self, exponential: Made, partition: Partition) -> None:
        super().__init__()
        self.exponential = exponential
        self.partition = partition
        exponential.context["blocks"] = self.extra_repr()

    def reads_more_of(self, images: Size) -> bool:
        """Return False: the kernel is that of a given domain, or has its own taps."""
        return False

    def difference(self, state_dict: Mapping[str, object], prefix: str) -> str | None:
        """Say how a checkpoint differs from this parametrization; None if it does not."""
        whole = prefix.removesuffix("0.") + "original"
        if whole in state_dict and not self.partition.is_all:
            return made_otherwise("a generator of the whole weight")
        return self.exponential.difference(state_dict, prefix + "exponential.")

    @property
    def taps(self) -> Size:
        """Taps of the weight: its own, or one for each point of the torus."""
        return self.exponential.taps

    @runtime.in_full_precision
    def forward(self, X: Tensor, rest: Tensor | None = None) -> Tensor:
        """Return the weight of a generator of the blocks and the taps of the rest.

        Args:
            X: the generator, as the exponential takes it.
            rest: ``(pairs, 1, *taps)``, the free taps of each other pair of channels in the order of the
                weight; None if there is no other.

        Returns:
            ``(out, in/groups, *taps)``.
        """
        if not isinstance(self.exponential, ConvExponential):
            return self.partition.assembled(self.exponential(X), rest)
        lattice, M = self.spectrum((X,) if rest is None else (X, rest))
        return lattice.kernel(M).to(X.dtype).contiguous()

    @runtime.in_full_precision
    def spectrum(
        self, X: tuple[Tensor, ...], images: Size | None = None, dilation: Size = ()
    ) -> tuple[Lattice, Tensor]:
        """Return the matrices of the kernel and their lattice, as `ConvExponential.spectrum`."""
        exponential, partition = self.exponential, self.partition
        assert isinstance(exponential, ConvExponential)
        lattice, Q = exponential.spectrum(X[0])
        whole = Lattice(lattice.domain, lattice.stride, partition.groups, lattice.is_complex)
        phases = prod(whole.stride)
        out, cin = partition.size[:2]
        M = Q.new_zeros(whole.frequencies, out * cin, phases)
        if len(X) > 1:
            alone = Lattice(whole.domain, whole.stride, 1, whole.is_complex)
            rest = alone.spectrum(at_least_single(X[1]), exponential.placement)
            M[:, partition.free(M.device)] = rest.squeeze(0).to(M.dtype)
        pairs = M.unflatten(1, (out, cin))
        for (rows, columns), block in zip(partition.blocks, Q, strict=True):
            pairs[:, rows, columns] = block.unflatten(-1, (-1, phases))
        M = M.reshape(whole.frequencies, partition.groups, out // partition.groups, cin * phases)
        return whole, M.movedim(1, 0).contiguous()

    @torch.no_grad()
    @runtime.in_full_precision
    def right_inverse(self, W: Tensor) -> tuple[Tensor, ...]:
        """Return the generator and the rest whose kernel is ``W``, its blocks made orthogonal.

        Raises:
            TypeError, ValueError: as the exponential's `right_inverse`; and if, outside of the blocks,
                ``W`` has taps where the weight had none.
        """
        rest = self._rest(W)
        return (self.exponential.right_inverse(self.partition.stacked(W)), *rest)

    @torch.no_grad()
    @runtime.in_full_precision
    def preimage(self, W: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return what `right_inverse` returns, and the buffers that it sets; change nothing."""
        rest = self._rest(W)
        generator, buffers = self.exponential.preimage(self.partition.stacked(W))
        return (generator, *rest), {f"exponential.{name}": value for name, value in buffers.items()}

    def loaded(self, generator: Tensor, state: Any) -> None:
        """Take note of a generator that has been loaded."""
        self.exponential.loaded(generator, state)

    def extra_repr(self) -> str:
        """Say what ``print`` says of it."""
        return str(self.partition)

    def _rest(self, W: Tensor) -> tuple[Tensor, ...]:
        partition = self.partition
        partition.check(W)
        if partition.is_all:
            return ()
        rest, size = partition.rest(W), partition.size[2:]
        if tuple(W.shape[2:]) == size:
            return (rest,)
        if not isinstance(self.exponential, ConvExponential):
            raise ValueError(f"the weight should be of size {partition.size}. Found {tuple(W.shape)}")
        taps = crop(rest, size, self.exponential.placement)
        lost = (rest.norm() ** 2 - taps.norm() ** 2).clamp(min=0).sqrt()
        if lost > 1e-3 * rest.norm():
            raise ValueError(
                f"outside of its blocks the weight should have the taps of a {size} kernel only. "
                f"Found others, of norm {lost:.1e}"
            )
        return (taps,)
