"""`Spectral`: a convolution through the Fourier transform, however large its kernel."""

from math import inf, log2, prod
from typing import NamedTuple

import torch
from torch import Tensor

from .. import keeping, runtime
from ..checks import HALF, Size
from ..torus.boundary import cut, extend
from ..torus.circular import spectral_conv
from ..torus.lattice import Lattice
from ..torus.shared import Shared
from .operator import Operator, with_bias


class Spectrum(NamedTuple):
    """What is prepared: matrices on a torus, for images of a domain."""

    lattice: Lattice
    matrices: Tensor | Shared  # shared by the steps of a loop, of which it gathers the gradients
    domain: Size
    transposed: bool


class Spectral:
    """Evaluates an operator by its matrices, one product for each frequency."""

    name = "spectral"

    def cost(self, operator: Operator, domain: Size, batch: int) -> float:
        """Return its estimated time: see Note [cost model]. Infinite where it cannot be exported."""
        weight, geometry = operator.weight, operator.geometry
        if operator.boundary.has_walls or not weight.has_kernel:
            return inf
        if runtime.is_exported_directly() and not weight.has_matrices:
            return inf
        out, inner = geometry.size[:2]
        points, kernels = prod(domain), out * inner
        images = batch * (inner * geometry.groups * points + out * prod(geometry.coarse(domain)))
        cost = (
            operator.exponentiating(domain)
            + 3e5
            + 0.25 * images * log2(2 * points)
            + 0.1 * batch * kernels * points
        )
        if keeping.is_cached():  # its kernel is transformed once for many steps
            return cost
        return cost + 1e5 + 0.4 * kernels * points * log2(2 * points)

    def prepare(self, operator: Operator, domain: Size) -> Spectrum:
        """Compute the matrices."""
        lattice, M = operator.spectrum(domain)
        matrices = Shared(M, lattice) if keeping.is_cached() else M
        return Spectrum(lattice, matrices, domain, operator.geometry.transposed)

    def apply(self, state: Spectrum, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply them to images ``(batch, channels, *size)``, and add a bias."""
        return with_bias(self._apply(state, x), bias)

    def _apply(self, state: Spectrum, x: Tensor) -> Tensor:
        lattice, domain = state.lattice, state.domain
        dtype = x.dtype
        x = x.float() if dtype in HALF else x
        if lattice.domain == domain or max(lattice.stride) == 1:
            return self._convolve(state, x).to(dtype)
        x = extend(x, lattice.grid if state.transposed else lattice.domain)
        size = domain
        if not state.transposed:
            size = tuple(n // s for n, s in zip(domain, lattice.stride, strict=True))
        return cut(self._convolve(state, x), size).to(dtype)

    def _convolve(self, state: Spectrum, x: Tensor) -> Tensor:
        if isinstance(state.matrices, torch.Tensor):
            return spectral_conv(x, state.matrices, state.lattice, state.transposed)
        return state.matrices.convolve(x, state.transposed)
