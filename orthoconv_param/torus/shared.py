"""A spectrum that the steps of a loop share; its gradients at all steps are made together.

The gradient of a loop of ``T`` steps at its spectrum is a sum of ``T`` products ``y^ x^^H``, each as large
as the spectrum. One product of all steps' factors side by side costs little more than one step's.
"""

from typing import Any

import torch
from torch import Tensor

from .. import runtime
from .circular import Apply, Outer, apply, of_transpose, spectral_conv, to_frequencies, weighted
from .lattice import Lattice

_GATHERED_FREQUENCIES = 16  # at which products are made at once
_GATHERED_IMAGES = 256  # that may wait: then their products are made


class Shared:
    """A spectrum that the steps of a loop share.

    The steps' backward passes only leave their two factors here, and give a gradient of zero to a token, a
    scalar that stands for the spectrum in the graph. Autograd reaches the token's own backward pass after
    all of theirs: it makes the products.

    Args:
        spectrum: as `spectral_conv` takes it.
        lattice: of the spectrum.
    """

    def __init__(self, spectrum: Tensor, lattice: Lattice) -> None:
        self.spectrum = spectrum
        self.lattice = lattice
        self.factors = _Factors(lattice)
        plain = spectrum.requires_grad and not runtime.is_transformed()
        self.token = _Gather.apply(spectrum, self.factors) if plain else None

    def convolve(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Apply the spectrum, or its transpose, as `spectral_conv` does."""
        token = self.token
        if token is None or not torch.is_grad_enabled() or runtime.is_transformed():
            return spectral_conv(x, self.spectrum, self.lattice, transposed)
        shared = self.spectrum, token, self.lattice, transposed, self.factors
        return of_transpose(lambda x: _Step.apply(x, *shared), x, transposed)


class _Factors:
    """Holds transforms of images and of gradients until their products are made and summed up.

    Each backward pass has its own transforms and sum, because one pass may run within another.
    """

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        self.waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.sums: dict[int, Tensor] = {}

    def add(self, y: Tensor, x: Tensor) -> None:
        task = runtime.backward_pass()
        waiting = self.waiting.setdefault(task, [])
        waiting.append((y, x))
        if sum(x.shape[-1] for _, x in waiting) >= _GATHERED_IMAGES:
            self.multiply(task)

    def multiply(self, task: int) -> None:
        """Make the products of the transforms that wait, and add them to the sum of a backward pass."""
        waiting = self.waiting.pop(task, [])
        if not waiting:
            return
        y, x = ([pair[i].flatten(0, 1) for pair in waiting] for i in (0, 1))
        size = len(y[0]), y[0].shape[1], x[0].shape[1]
        total = self.sums.get(task)
        if total is None:
            total = self.sums[task] = y[0].new_zeros(size)
        for first in range(0, len(total), _GATHERED_FREQUENCIES):
            part = slice(first, first + _GATHERED_FREQUENCIES)
            Y, X = torch.cat([t[part] for t in y], -1), torch.cat([t[part] for t in x], -1)
            total[part].baddbmm_(Y, X.conj_physical_().mT)

    def take(self) -> Tensor | None:
        """Return the sum of the running backward pass, and forget it."""
        task = runtime.backward_pass()
        self.multiply(task)
        total = self.sums.pop(task, None)
        return None if total is None else weighted(total, self.lattice)


class _Gather(torch.autograd.Function):
    """Makes the token of a shared spectrum."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, factors: _Factors) -> Tensor:
        ctx.factors = factors
        return spectrum.new_zeros((), dtype=spectrum.real.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        return ctx.factors.take(), None


class _Step(torch.autograd.Function):
    """Computes the same as `Apply`, with a shared spectrum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, M: Tensor, token: Tensor, lattice: Lattice, adjoint: bool, factors: _Factors
    ) -> Tensor:
        y, transform = apply(x, M, lattice, adjoint)
        ctx.save_for_backward(x, M, transform)
        ctx.lattice, ctx.adjoint, ctx.factors = lattice, adjoint, factors
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, M, transform = ctx.saved_tensors
        dx = dM = g_transform = None
        if ctx.needs_input_grad[0]:
            function = apply if runtime.is_plain(g) else Apply.apply
            dx, g_transform = function(g, M, ctx.lattice, not ctx.adjoint)
        if torch.is_grad_enabled() or runtime.is_batched(g):  # to be differentiated again, or by `vmap`
            pair = (x, g) if ctx.adjoint else (g, x)
            dM = Outer.apply(*pair, None, None, ctx.lattice)
            return dx, dM, None, None, None, None
        token = ctx.next_functions[2][0]
        if not runtime.will_run(token):  # nobody asks for the spectrum's gradient
            return dx, None, None, None, None, None
        if g_transform is None:
            g_transform = to_frequencies(g, ctx.lattice, fine=ctx.adjoint)
        ctx.factors.add(*((transform, g_transform) if ctx.adjoint else (g_transform, transform)))
        return dx, None, g.new_zeros((), dtype=g.real.dtype), None, None, None
