"""A spectrum that the steps of a loop share; its gradients at all steps are added up as they are made.

The gradient of a loop of ``T`` steps at its spectrum is a sum of ``T`` products ``y^ x^^H``, each as large
as the spectrum. BLAS adds a product to a sum at no cost, where autograd would make it, and then add it.
"""

from typing import Any

import torch
from torch import Tensor

from .. import runtime
from .circular import Apply, Outer, apply, of_transpose, spectral_conv, to_frequencies, weighted
from .lattice import Lattice


class Shared:
    """A spectrum that the steps of a loop share.

    The steps' backward passes leave their products here, and give a gradient of zero to a token, a
    scalar that stands for the spectrum in the graph. Autograd reaches the token's own backward pass after
    all of theirs: it returns the sum.

    Args:
        spectrum: as `spectral_conv` takes it.
        lattice: of the spectrum.
    """

    def __init__(self, spectrum: Tensor, lattice: Lattice) -> None:
        self.spectrum = spectrum
        self.lattice = lattice
        self.sum = _Sum(lattice)
        plain = spectrum.requires_grad and not runtime.is_transformed()
        self.token = _Token.apply(spectrum, self.sum) if plain else None

    def convolve(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Apply the spectrum, or its transpose, as `spectral_conv` does."""
        token = self.token
        if token is None or not torch.is_grad_enabled() or runtime.is_transformed():
            return spectral_conv(x, self.spectrum, self.lattice, transposed)
        shared = self.spectrum, token, self.lattice, transposed, self.sum
        return of_transpose(lambda x: _Step.apply(x, *shared), x, transposed)


class _Sum:
    """The sum of what the steps' backward passes give, until the token's own takes it.

    Each backward pass has its own, because one pass may run within another.
    """

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        self.sums: dict[int, Tensor] = {}

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the product of two transforms, ``y x^H``."""
        task, y, adjoint = runtime.backward_pass(), y.flatten(0, 1), x.flatten(0, 1).conj_physical().mT
        total = self.sums.get(task)
        if total is None:
            self.sums[task] = y @ adjoint
        else:
            total.baddbmm_(y, adjoint)

    def take(self) -> Tensor | None:
        """Return the sum of the running backward pass, and forget it."""
        total = self.sums.pop(runtime.backward_pass(), None)
        return None if total is None else weighted(total, self.lattice)


class _Token(torch.autograd.Function):
    """Makes the token of a shared spectrum."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, sum_: _Sum) -> Tensor:
        ctx.sum = sum_
        return spectrum.new_zeros((), dtype=spectrum.real.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        return ctx.sum.take(), None


class _Step(torch.autograd.Function):
    """Computes the same as `Apply`, with a shared spectrum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, M: Tensor, token: Tensor, lattice: Lattice, adjoint: bool, sum_: _Sum
    ) -> Tensor:
        y, transform = apply(x, M, lattice, adjoint)
        ctx.save_for_backward(x, M, transform)
        ctx.lattice, ctx.adjoint, ctx.sum = lattice, adjoint, sum_
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
        ctx.sum.add(*((transform, g_transform) if ctx.adjoint else (g_transform, transform)))
        return dx, None, g.new_zeros((), dtype=g.real.dtype), None, None, None
