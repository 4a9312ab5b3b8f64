"""A split kernel between walls, applied factor by factor.

Coins are products with the channels of each pixel. A pair joins ``A`` at a pixel with ``B`` at the next
one of its line; what has no partner is left alone. That is orthogonal at every size, and of a 3x3 kernel
takes five products a pixel where the convolution takes nine. The transpose has the transposed factors in
the opposite order. The gradient is written by hand. What is between the factors is kept for it where that
is small, as in a recurrent network, and computed again elsewhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime
from ..matrices import by_hand
from ..matrices.products import adjoint, mixed
from ..torus.geometry import Geometry, convolve, convolve_transposed, per_channel
from .chain import Chain, Factors

_KEPT_BYTES = 2**25  # of images between the factors, above which a backward pass computes them again
_IMAGES_AT_ONCE = 32  # of which the gradients by a matrix are summed


def apply(chain: Chain, factors: Factors, x: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Apply a kernel between walls to images ``(batch, channels, *size)``, and add a bias."""
    rule = _Applied(chain, geometry, bias is not None)
    inputs = (x, *(() if bias is None else (bias,)), factors.pairs, *factors.coins)
    # torch convolves complex patches part by part
    return rule.plain(*inputs) if x.is_complex() and chain.is_strided else by_hand.apply(rule, *inputs)


class _Factor(NamedTuple):
    """A factor in the order in which it acts.

    Args:
        number: of the coin, or of the pair.
        axis: of space along which a pair joins; None of a coin.
        is_patch: whether it is the frame of patches.
    """

    number: int
    axis: int | None
    is_patch: bool


class _Applied:
    """The rule of `apply`."""

    def __init__(self, chain: Chain, geometry: Geometry, has_bias: bool) -> None:
        self.chain, self.geometry, self.has_bias = chain, geometry, has_bias
        last = len(chain.steps)
        factors = [_Factor(0, None, chain.is_strided and last == 0)]
        for i, step in enumerate(chain.steps):
            factors.append(_Factor(i, step.axis, False))
            if not (i == last - 1 and chain.is_strided):
                factors.append(_Factor(i + 1, None, False))
        if chain.is_strided and last > 0:
            factors.append(_Factor(last, None, True))
        self.factors = factors[::-1] if geometry.transposed else factors

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the images."""
        x, bias, pairs, coins = self._named(inputs)
        for factor in self.factors:
            x = self._applied(factor, self._matrix(factor, pairs, coins), x)[0]
        return x if bias is None else x + per_channel(bias, x)

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the images, and if they are few what each matrix but the first is multiplied with."""
        x, bias, pairs, coins = self._named(inputs)
        y, read = x, []
        keeps = len(self.factors) * x.numel() * x.element_size() <= _KEPT_BYTES
        for factor in self.factors:
            M = self._matrix(factor, pairs, coins)
            if factor.axis is not None and len(M) == 1 and not keeps and y.is_contiguous():
                y = _joined_at_once(M, y, factor.axis + 2, self.geometry.dilation[factor.axis])
                continue
            y, multiplied = self._applied(factor, M, y)
            read += [multiplied] if keeps else []
        return y if bias is None else y.add_(per_channel(bias, y)), read[1:]

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients by images, bias, pairs and coins."""
        x, bias, pairs, coins = self._named(inputs)
        read = [x, *kept]  # what the matrix of each factor is multiplied with
        if not kept:
            for factor in self.factors[:-1]:
                x, multiplied = self._applied(factor, self._matrix(factor, pairs, coins), x)
                read.append(multiplied)
            read = [*read[1:], x]  # the last factor is a coin
        dbias = None if bias is None else G.sum((0, *range(2, G.ndim)))
        dpairs, dcoins = torch.zeros_like(pairs), list(coins)
        for factor, multiplied in zip(reversed(self.factors), reversed(read), strict=True):
            M = self._matrix(factor, pairs, coins)
            if factor.is_patch:
                G, dM = self._patch_gradients(G, multiplied, M)
            else:
                G, arrived = self._applied(factor, adjoint(M), G)
                dM = self._summed(arrived, multiplied)
            if self.geometry.transposed and not factor.is_patch:
                dM = dM.mT
            if factor.axis is None:
                dcoins[factor.number] = dM.reshape(coins[factor.number].shape)
            else:
                dpairs[:, factor.number] = dM
        return (G, *(() if bias is None else (dbias,)), dpairs, *dcoins)

    def _named(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Sequence[Tensor]]:
        if self.has_bias:
            return inputs[0], inputs[1], inputs[2], inputs[3:]
        return inputs[0], None, inputs[1], inputs[2:]

    def _matrix(self, factor: _Factor, pairs: Tensor, coins: Sequence[Tensor]) -> Tensor:
        """Return the matrices of a factor, ``(groups, rows, columns)``; of patches a kernel."""
        if factor.is_patch:
            patch = self.chain.patch
            return coins[factor.number].flatten(0, 1).unflatten(1, (-1, *patch)).contiguous()
        M = coins[factor.number] if factor.axis is None else pairs[:, factor.number]
        return M.mT if self.geometry.transposed else M

    def _applied(self, factor: _Factor, M: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images after a factor, and what its matrix is multiplied with."""
        if factor.is_patch:
            return self._patched(M, x), x
        if factor.axis is None:
            return mixed(M, x), x
        return _joined(M, x, factor.axis + 2, self.geometry.dilation[factor.axis])

    def _patched(self, kernel: Tensor, x: Tensor) -> Tensor:
        stride, groups = [*self.geometry.stride], self.geometry.groups
        none, ones = [0] * len(stride), [1] * len(stride)
        if not self.geometry.transposed:
            return convolve(x, kernel, stride, none, ones, groups)
        rest = [s - t for s, t in zip(stride, self.chain.patch, strict=True)]
        return convolve_transposed(x, kernel, stride, none, rest, ones, groups)

    def _patch_gradients(self, G: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        stride, groups = [*self.geometry.stride], self.geometry.groups
        if not self.geometry.transposed:
            return runtime.convolution_gradients(G, x, kernel, groups, stride=stride)
        # the weight's gradient is symmetric in images and gradient
        return (
            convolve(G, kernel, stride, [0] * len(stride), [1] * len(stride), groups),
            runtime.convolution_gradients(x, G, kernel, groups, stride=stride)[1],
        )

    def _summed(self, G: Tensor, x: Tensor) -> Tensor:
        """Return the gradient by matrices ``(groups, rows, columns)`` that are multiplied with ``x``."""
        groups = self.chain.groups
        G, x = (part.flatten(2).unflatten(1, (groups, -1)) for part in (G, x))
        pieces = zip(G.split(_IMAGES_AT_ONCE), x.split(_IMAGES_AT_ONCE), strict=True)
        return sum((g @ adjoint(y)).sum(0) for g, y in pieces)


def _joined(M: Tensor, x: Tensor, axis: int, spacing: int) -> tuple[Tensor, Tensor]:
    """Return images after a pair ``M`` along an axis, and the channels that it joins.

    Each pixel's ``A`` is joined with the ``B`` that stands ``spacing`` pixels further. The last ``A`` and
    the first ``B`` are left alone.
    """
    half, joint = M.shape[1] // 2, max(x.shape[axis] - spacing, 0)
    channels = x.unflatten(1, (len(M), -1))
    size = [*channels.shape]
    size[axis + 1] = joint
    together = x.new_empty(size)
    together[:, :, :half] = channels[:, :, :half].narrow(axis + 1, 0, joint)
    together[:, :, half:] = channels[:, :, half:].narrow(axis + 1, x.shape[axis] - joint, joint)
    together = together.flatten(1, 2)
    return _scattered(mixed(M, together), x, len(M), axis), together


def _joined_at_once(M: Tensor, x: Tensor, axis: int, spacing: int) -> Tensor:
    """Return `_joined` of one group, without the channels that it joins.

    They are read where they stand: on the images' pixels in a row, ``B`` is some places further. So the end
    of a line is joined with the start of the next one too, which is left out afterwards.
    """
    half, after, n = M.shape[1] // 2, x.stride(axis), x.shape[axis]
    if n <= spacing:
        return x
    flat, shift = x.flatten(2), spacing * after
    M = M.expand(len(x), -1, -1)
    J = torch.bmm(M[..., :half], flat[:, :half, : flat.shape[2] - shift])
    J.baddbmm_(M[..., half:], flat[:, half:, shift:])
    size, strides = [*x.shape], [J.stride(0), J.stride(1), *x.stride()[2:]]
    size[axis] -= spacing
    return _scattered(J.as_strided(size, strides), x, 1, axis)


def _scattered(moved: Tensor, x: Tensor, groups: int, axis: int) -> Tensor:
    """Return images in which joint channels have moved: ``A`` at the start, ``B`` at the end of lines."""
    joint, rest = moved.shape[axis], x.shape[axis] - moved.shape[axis]
    x, moved = x.unflatten(1, (groups, -1)), moved.unflatten(1, (groups, -1))
    half, axis, y = x.shape[2] // 2, axis + 1, torch.empty_like(x)
    y[:, :, :half].narrow(axis, 0, joint).copy_(moved[:, :, :half])
    y[:, :, half:].narrow(axis, rest, joint).copy_(moved[:, :, half:])
    y[:, :, :half].narrow(axis, joint, rest).copy_(x[:, :, :half].narrow(axis, joint, rest))
    y[:, :, half:].narrow(axis, 0, rest).copy_(x[:, :, half:].narrow(axis, 0, rest))
    return y.flatten(1, 2)
