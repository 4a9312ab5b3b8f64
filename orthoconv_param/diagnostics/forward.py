"""`Forward`: the linear operator that a module's own forward is, on images of one size.

It asks the module and nothing else: neither its weight nor its padding. So it is the operator that runs,
whatever the boundary, and whatever class the module is of. The adjoint is the forward's vector-Jacobian
product, which is exact because the forward is linear but for its bias.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import Size, check_finite, per_axis
from ..parametrizations.partition import Block
from ..torus.geometry import CONVOLUTIONS
from ..walled import WalledConvolution
from ..walled_exponential import WalledExponential

WALLED: tuple[type[nn.Module], ...] = (WalledConvolution, WalledExponential)  # what removal leaves
MEASURED: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, *WALLED)  # what is measured


class Forward:
    """The operator of a module, or the block of it that joins some channels with some others.

    Args:
        module: one of `MEASURED`.
        domain: size of the images; of a transposed convolution, of those that it gives.
        block: of the weight's first two axes, within one group. Default: all channels.

    Raises:
        ValueError: if the stride does not divide the domain of a transposed convolution.
    """

    def __init__(self, module: Any, domain: Size, block: Block | None = None) -> None:
        size = domain
        if module.transposed:
            if any(n % s for n, s in zip(domain, module.stride, strict=True)):
                raise ValueError(
                    f"domain should be divisible by the stride {module.stride}. Found {domain}"
                )
            size = tuple(n // s for n, s in zip(domain, module.stride, strict=True))
        self._module = module
        self._taken, self._given = _channels(module, block)
        weight = module.weight
        self._zero = torch.zeros(1, module.in_channels, *size, dtype=weight.dtype, device=weight.device)
        self._bias = self._call(self._zero)
        self._graph: tuple[Tensor, Tensor] | None = None

    @property
    def taken(self) -> Size:
        """Channels and size of the images that it takes."""
        return tuple(self._zero[0, self._taken].shape)

    @property
    def given(self) -> Size:
        """Channels and size of the images that it gives."""
        return tuple(self._bias[0, self._given].shape)

    @property
    def columns(self) -> int:
        """Count the numbers of an image that it takes."""
        return prod(self.taken)

    @property
    def rows(self) -> int:
        """Count the numbers of an image that it gives."""
        return prod(self.given)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the module computes in."""
        return self._zero.dtype

    @property
    def device(self) -> torch.device:
        """The device that the module computes on."""
        return self._zero.device

    def apply(self, x: Tensor) -> Tensor:
        """Apply it to a vector ``(columns,)``; return ``(rows,)``."""
        return self.apply_to_each(x[None])[0]

    def apply_to_each(self, x: Tensor) -> Tensor:
        """Apply it to vectors ``(batch, columns)``; return ``(batch, rows)``."""
        images = self._zero.repeat(len(x), *(1,) * (self._zero.ndim - 1))
        images[:, self._taken] = x.to(self.dtype).unflatten(1, self.taken)
        y = self._call(images) - self._bias
        return y[:, self._given].flatten(1).to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint to a vector ``(rows,)``; return ``(columns,)``."""
        if self._graph is None:
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.zeros_like(self._zero).requires_grad_()
                with _unseen(self._module):
                    self._graph = x, self._module(x)
        x, output = self._graph
        images = torch.zeros_like(output)
        images[0, self._given] = y.to(output.dtype).unflatten(0, self.given)
        (gradient,) = torch.autograd.grad(output, x, images, retain_graph=True)
        return gradient[0, self._taken].flatten().to(y.dtype)

    def matrix(self) -> Tensor:
        """Return its dense matrix ``(rows, columns)``, in double precision.

        Raises:
            ValueError: if it is not finite.
        """
        unit = torch.eye(self.columns, dtype=self.dtype, device=self.device)
        M = torch.cat([self.apply_to_each(piece) for piece in unit.split(256)]).mT
        check_finite("convolution", M)
        return M.to(torch.promote_types(M.dtype, torch.float64))

    def random(self, images: int, size: Size, seed: int = 0) -> Tensor:
        """Return random images of a size as vectors, the same ones for the same seed."""
        dtype = torch.promote_types(self.dtype, torch.float64)
        generator = torch.Generator().manual_seed(seed)  # the caller's random state is left alone
        return torch.randn(images, prod(size), dtype=dtype, generator=generator).to(self.device)

    def _call(self, images: Tensor) -> Tensor:
        with torch.no_grad(), _unseen(self._module):
            y: Tensor = self._module(images)
            return y


def check_measured(module: Any) -> None:
    """Raise if a module is no convolution.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(module, MEASURED):
        raise TypeError(
            "convolution should be a kernel, an nn.Conv* or an nn.ConvTranspose*. "
            f"Found {type(module).__name__}"
        )


def domain_of(module: Any, domain: int | Size) -> Size:
    """Return a domain as one size for each axis of a module's images.

    Raises:
        TypeError, ValueError: if it is none, or the module no convolution.
    """
    check_measured(module)
    return per_axis("domain", domain, len(module.stride))


def _channels(module: Any, block: Block | None) -> tuple[slice, slice]:
    """Return the channels that a block of the weight reads, and those that it writes."""
    if block is None:
        return slice(None), slice(None)
    first, second = block
    group = first.start // (module.weight.shape[0] // module.groups)
    start = group * module.weight.shape[1]
    second = slice(start + second.start, start + second.stop)
    return (first, second) if module.transposed else (second, first)


@contextmanager
def _unseen(module: Any) -> Iterator[None]:
    """Let a module forget which images it sees meanwhile: on these its removal depends."""
    attributes = vars(module)
    installed = attributes.get("installed")
    if installed is not None:
        attributes["installed"] = copy(installed)
    try:
        yield
    finally:
        if installed is not None:
            attributes["installed"] = installed
