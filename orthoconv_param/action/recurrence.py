r"""The action of a Chebyshev series, by one convolution for each term.

    f(T) x = sum_k c_k phi_k,    phi_0 = x,  phi_1 = B x,  phi_{k+1} = 2 B phi_k + phi_{k-1},  B = T / rho.

With ``g`` the gradient at the result and ``B^T = -B``, the gradient at ``phi_k`` is

    lam_k = c_k g - 2 B lam_{k+1} + lam_{k+2},    lam_0 = c_0 g - B lam_1 + lam_2,

which for ``k = 0`` is that at ``x``. The gradient at the kernel is the sum of those of each convolution,
from the pairs ``phi_{k-1}, lam_k``. That is ``4 m - 1`` convolutions forward and backward.

The first ``phi`` are kept for the backward pass, three at most, and the others computed again. A few images
at a time are taken through all terms: what is between the terms stays in the cache, and takes no more
memory for more of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import runtime
from ..matrices import by_hand
from ..torus.geometry import convolve, wrapped
from .generator import few_of

_CACHED_BYTES = 2**21  # of images that go through all terms at once, on a CPU
_KEPT_BYTES = 2**24  # of one phi, above which none is kept for the backward pass
_KEPT_IMAGES = 3  # at most so many phi are kept, each of the whole batch
_BETWEEN_BYTES = 2**22  # of what is between the terms of one pass: it may always take so much
_BETWEEN_IMAGES = 2  # likewise, in images of the whole batch


class Step(NamedTuple):
    """How a term's convolution is applied. TorchScript knows it.

    Args:
        padding: samples of zeros on both sides.
        dilation: of the kernel.
        groups: of it.
        surround: samples by which images are continued around the torus, as ``F.pad`` takes them; or none.
    """

    padding: list[int]
    dilation: list[int]
    groups: int
    surround: list[int]


def series(x: Tensor, B: list[Tensor], coefficients: list[float], step: Step) -> Tensor:
    """Apply a series to images. TorchScript compiles this.

    Args:
        x: images, ``(batch, groups * m, *size)``, real.
        B: as of `times`, in the precision of the convolutions.
        coefficients: ``c_0, ..., c_m``, of which there are three or more.
        step: how each convolution is applied.
    """
    before, last = x, times(B, x, step)
    y = coefficients[0] * before + coefficients[1] * last
    for c in coefficients[2:]:
        before, last = last, 2 * times(B, last, step) + before
        y = y + c * last
    return y


def times(B: list[Tensor], x: Tensor, step: Step) -> Tensor:
    """Return ``B x``. TorchScript compiles this.

    Args:
        B: the kernel, ``(groups * m, m, *taps)``; or its first rows ``(groups * k, m, *taps)``, and the
            first columns of the others, ``(groups * (m - k), k, *taps)``.
        x: images, ``(batch, groups * m, *size)``.
        step: how the convolution is applied.
    """
    low, groups = x.to(B[0].dtype), step.groups
    if len(step.surround) > 0:
        low = wrapped(low, step.surround)
    ones = [1] * len(step.padding)
    y = convolve(low, B[0], ones, step.padding, step.dilation, groups)
    if len(B) > 1:
        below = convolve(first(low, groups, B[1].size(1)), B[1], ones, step.padding, step.dilation, groups)
        y = torch.cat([y.unflatten(1, [groups, -1]), below.unflatten(1, [groups, -1])], 2).flatten(1, 2)
    return y.to(x.dtype)


def first(x: Tensor, groups: int, k: int) -> Tensor:
    """Return the first ``k`` channels of each group of images. TorchScript compiles this."""
    return x.unflatten(1, [groups, -1]).narrow(2, 0, k).flatten(1, 2)


@dataclass(frozen=True)
class Series:
    """A series, as a rule of `by_hand`: its plain form, and its value and gradient written by hand.

    Args:
        coefficients: ``c_0, ..., c_m``.
        step: how each convolution is applied.
        reduced: the dtype of the convolutions, if that is not the images'.
    """

    coefficients: tuple[float, ...]
    step: Step
    reduced: torch.dtype | None

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the images."""
        x, *B = inputs
        return series(x, [b.to(self.reduced or b.dtype) for b in B], [*self.coefficients], self.step)

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the images, and if the kernel's gradient may be wanted the first few ``phi``."""
        x, *B = inputs
        early = self._kept_early(x) if B[0].requires_grad else 0
        y, B = torch.empty_like(x), self._doubled(B)
        kept = [torch.empty_like(x, memory_format=_last(x)) for _ in range(early)]
        for (part,), (result, *phis) in _pieces(_images_at_once(x, 4), (x,), (y, *kept)):
            before, last = None, part
            total = self.coefficients[0] * part
            for k, c in enumerate(self.coefficients[1:]):
                before, last = last, self._next(before, last, B)
                total.add_(last, alpha=c)
                if k < early:
                    phis[k].copy_(last)
            result.copy_(total)
        return y, kept

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients by images and kernel."""
        x, *B = inputs
        dx = torch.empty_like(x) if needed[0] else None
        dB = [torch.zeros_like(b) for b in B] if any(needed[1:]) else []
        B = self._doubled(B)
        count = _images_at_once(x, len(self.coefficients) + 3 - len(kept))
        results = () if dx is None else (dx,)
        for (part, g, *phis), into in _pieces(count, (x, G, *kept), results):
            gradient = self._falling([part, *phis], g, B, dB, keeps=count > 0)
            for result in into:
                result.copy_(gradient)
        return (dx, *(d.mul_(2) for d in dB)) if dB else (dx, *(None for _ in B))

    def _kept_early(self, x: Tensor) -> int:
        """Return how many ``phi`` are kept for the backward pass."""
        fit = _KEPT_BYTES // max(x.numel() * x.element_size(), 1)
        return min(fit, _KEPT_IMAGES, len(self.coefficients) - 2)

    def _doubled(self, B: list[Tensor]) -> list[Tensor]:
        """Return ``2 B``, in the precision and memory format of the convolutions."""
        return [(2 * b).to(self.reduced or b.dtype).contiguous(memory_format=_last(b)) for b in B]

    def _times(self, B: list[Tensor], x: Tensor) -> Tensor:
        low = self._continued(x.to(B[0].dtype))
        return times(B, low, self.step._replace(surround=[])).to(x.dtype)

    def _continued(self, x: Tensor) -> Tensor:
        """Return images that are continued around the torus, with the channels last as they are.

        (``F.pad`` puts them first.)
        """
        surround = self.step.surround
        if not surround:
            return x
        sides = [*zip(surround[-2::-2], surround[::-2], strict=True)]
        size = [n + a + b for n, (a, b) in zip(x.shape[2:], sides, strict=True)]
        y = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=_last(x))
        inner = y
        for axis, (n, (a, _)) in enumerate(zip(x.shape[2:], sides, strict=True), start=2):
            inner = inner.narrow(axis, a, n)
        inner.copy_(x)
        for axis, (n, (a, b)) in enumerate(zip(x.shape[2:], sides, strict=True), start=2):
            # what lies before and after on this axis; on later axes it is overwritten
            y.narrow(axis, 0, a).copy_(y.narrow(axis, n, a))
            y.narrow(axis, a + n, b).copy_(y.narrow(axis, a, b))
        return y

    def _next(self, before: Tensor | None, last: Tensor, B: list[Tensor]) -> Tensor:
        """Return ``phi_{k+1}`` of ``phi_{k-1}``, which the first does not have, and ``phi_k``."""
        product = self._times(B, last)
        return product.mul_(0.5) if before is None else product.add_(before)

    def _sinking(self, phis: list[Tensor], B: list[Tensor], keeps: bool) -> Iterator[Tensor]:
        """Go through ``phi_{m-1}, ..., phi_0``, of which the first few are given."""
        m = len(self.coefficients) - 1
        if keeps:
            while len(phis) < m:
                phis.append(self._next(phis[-2] if len(phis) > 1 else None, phis[-1], B))
            while phis:
                yield phis.pop()
            return
        # in the same memory for any number of terms, since the recurrence runs backwards, too
        before, last = None, phis[0]
        for _ in range(m):
            before, last = last, self._next(before, last, B)
        for _ in range(m - 1):
            assert before is not None
            yield before
            before, last = torch.sub(last, self._times(B, before)), before
        yield phis[0]

    def _falling(
        self, phis: list[Tensor], g: Tensor, B: list[Tensor], dB: list[Tensor], keeps: bool
    ) -> Tensor:
        """Return the gradient at the images, and add half of that at the kernel to ``dB``, if any."""
        c, later, last = self.coefficients, None, None
        falling = self._sinking(phis, B, keeps) if dB else iter(())
        for k in range(len(c) - 1, 0, -1):
            lam = c[k] * g
            if last is not None:
                lam.sub_(self._times(B, last))
            if later is not None:
                lam.add_(later)
            later, last = last, lam
            if dB:
                self._add_gradients(dB, 1.0 if k > 1 else 0.5, lam, next(falling), B)
        assert last is not None
        assert later is not None
        return (c[0] * g).sub_(self._times(B, last), alpha=0.5).add_(later)

    def _add_gradients(
        self, dB: list[Tensor], factor: float, lam: Tensor, phi: Tensor, B: list[Tensor]
    ) -> None:
        low, step = self._continued(phi.to(B[0].dtype)), self.step
        read, given = [low], [lam.to(B[0].dtype)]
        if len(B) > 1:
            k = B[1].shape[1]
            read.append(first(low, step.groups, k))
            lams = given[0].unflatten(1, (step.groups, -1))
            given = [lams[:, :, :k].flatten(1, 2), lams[:, :, k:].flatten(1, 2)]
        for d, b, x, g in zip(dB, B, read, given, strict=True):
            gradient = runtime.convolution_gradients(
                g, x, b, step.groups, padding=step.padding, dilation=step.dilation, needed=(False, True)
            )[1]
            d.add_(gradient, alpha=factor)


class Followed(NamedTuple):
    """A norm that compiled code has read: see Note [terms in compiled code].

    Args:
        level: the norm, a scalar.
        norm: by which ``B`` was divided.
        number: of what knows the series for a norm.
    """

    level: Tensor | None
    norm: float
    number: int


def applied(rule: Series, *inputs: Tensor) -> Tensor:
    """Apply a rule, to be differentiated in any way."""
    if runtime.is_compiled_whole():
        return compiled(rule, Followed(None, 1.0, 0), *inputs)
    return by_hand.apply(rule, *inputs)


def compiled(
    rule: Series, followed: Followed, x: Tensor, B: Tensor, others: Tensor | None = None
) -> Tensor:
    """Apply a series as one operator, into which compilers do not look.

    Its backward pass takes no more memory for more terms, as the rule's own. It has no other derivatives.
    """
    fields = (rule.coefficients, *rule.step, rule.reduced, followed.norm, followed.number)
    return torch.ops.orthoconv_param.series(x, B, others, followed.level, *fields)


def _value(x: Tensor, B: Tensor, others: Tensor | None, level: Tensor | None, *fields: Any) -> Tensor:
    rule, factor = _rule(level, *fields)
    return rule.value(x, *_kernels(B, others, factor))[0]


def _gradient(
    G: Tensor, x: Tensor, B: Tensor, others: Tensor | None, level: Tensor | None, *fields: Any
) -> list[Tensor]:
    rule, factor = _rule(level, *fields)
    inputs = x, *_kernels(B, others, factor)
    dx, *dB = (g for g in rule.gradient(G, inputs, (), (True,) * len(inputs)) if g is not None)
    return [dx, *(dB if factor == 1 else [factor * d for d in dB])]


def _kernels(B: Tensor, others: Tensor | None, factor: float = 1) -> list[Tensor]:
    kernels = [B] if others is None else [B, others]
    return kernels if factor == 1 else [factor * b for b in kernels]


def _rule(level: Tensor | None, coefficients: list[float], *fields: Any) -> tuple[Series, float]:
    """Return the rule, and by what the kernels are multiplied."""
    *step, reduced, norm, number = fields
    if level is None:
        return Series(tuple(coefficients), Step(*step), reduced), 1
    terms = few_of(runtime.numbered(number).coefficients(level.item()), reduced)
    return Series(terms, Step(*step), reduced), norm / level.item()


_FIELDS = (
    "Tensor x, Tensor B, Tensor? others, Tensor? level, float[] coefficients, int[] padding, "
    "int[] dilation, int groups, int[] surround, ScalarType? reduced, float norm, int number"
)
_operator = torch.library.custom_op(
    "orthoconv_param::series", _value, mutates_args=(), schema=f"({_FIELDS}) -> Tensor"
)
_operator.register_fake(lambda x, *_: torch.empty_like(x))
torch.library.custom_op(
    "orthoconv_param::series_gradient",
    _gradient,
    mutates_args=(),
    schema=f"(Tensor G, {_FIELDS}) -> Tensor[]",
).register_fake(lambda G, x, B, others, *_: [torch.empty_like(t) for t in (x, *_kernels(B, others))])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.fields = inputs[4:]


def _backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.orthoconv_param.series_gradient(G, *ctx.saved_tensors, *ctx.fields)
    return *gradients, *([None] * (4 - len(gradients))), *(None for _ in ctx.fields)


_operator.register_autograd(_backward, setup_context=_setup)


def _images_at_once(x: Tensor, kept: int) -> int:
    """Return how many images may go through all terms at once, if so many of each are kept: 0 or more."""
    each = max(prod(x.shape[1:]) * x.element_size(), 1)
    count = max(_BETWEEN_BYTES, _BETWEEN_IMAGES * len(x) * each) // (kept * each)
    return min(count, max(_CACHED_BYTES // each, 1)) if runtime.may_wait(x.device) else count


def _pieces(
    count: int, images: Sequence[Tensor], results: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Go through so many images at a time, with their channels last in memory, and as many results."""
    batch = len(images[0])
    pieces = -(-batch // max(count, 1))  # of equal size
    for piece in range(pieces):
        part = slice(piece * batch // pieces, (piece + 1) * batch // pieces)
        yield (
            [x[part].contiguous(memory_format=_last(x)) for x in images],
            [y[part] for y in results],
        )


def _last(x: Tensor) -> torch.memory_format:
    """Return the memory format in which convolutions of so many axes are fastest."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
