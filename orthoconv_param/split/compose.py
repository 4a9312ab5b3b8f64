r"""A split kernel's taps, from its factors.

Along one axis of space a pair and the coin after it take a kernel ``K`` to

    K'(t) = D_A[:, A] K_A(t) + D_B[:, B] K_B(t) + D_A[:, B] K_B(t - 1) + D_B[:, A] K_A(t + 1),
    D_A = C[:, A] O[A],    D_B = C[:, B] O[B],

where ``K_A``, ``K_B`` are rows, and a shift takes it to ``C[:, A] K_A(t - 1) + C[:, B] K_B(t)``. The
kernels of the axes are then multiplied, each tap of one with each of the other.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..matrices import by_hand
from ..matrices.products import adjoint
from .chain import Chain, Factors


class Line(NamedTuple):
    """The factors of one axis of space, and the coins between them.

    Args:
        axis: of space.
        half: channels in ``A``.
        right: the coin that acts first, ``(groups, m, columns)``.
        pairs: ``(O, C)``: each pair, and the coin after it.
        shift: the coin after the shift that acts last; None if there is none.
    """

    axis: int
    half: int
    right: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...]
    shift: Tensor | None

    def kernel(self) -> Tensor:
        """Return the kernel, ``(groups, rows, taps, columns)``."""
        K = self.right.unsqueeze(2)
        for pair, coin in self.pairs:
            K = joined(K, pair, coin)
        return K if self.shift is None else shifted(K, self.shift, self.half)


def lines(chain: Chain, factors: Factors) -> list[Line]:
    """Return the factors axis by axis, in the order in which they act; of patches all but the frame."""
    coins, pairs = list(factors.coins), list(factors.pairs.unbind(1))
    eye = torch.eye(chain.channels, dtype=coins[0].dtype, device=coins[0].device)
    eye = eye.expand(chain.groups, -1, -1)
    if chain.is_strided:
        coins[-1] = eye
    found: list[Line] = []
    for step, coin in zip(chain.steps, coins[1:], strict=True):
        line = Line(step.axis, chain.half, eye if found else coins[0], (), None)
        if found and found[-1].axis == step.axis:
            line = found.pop()
        joint = (*line.pairs, (pairs.pop(0), coin)) if step.is_pair else line.pairs
        shift = line.shift if step.is_pair else coin
        found.append(Line(line.axis, line.half, line.right, joint, shift))
    return found


def joined(K: Tensor, pair: Tensor, coin: Tensor) -> Tensor:
    """Return the kernel ``C L O L^H K``, two taps longer.

    Args:
        K: ``(groups, m, taps, columns)``.
        pair: ``O``, ``(groups, m, m)``.
        coin: ``C``, ``(groups, rows, m)``.
    """
    return by_hand.apply(JOINED, K, pair, coin)


class _Joined:
    """The rule of `joined`. ``V_A`` and ``V_B`` are the matrices that ``K_A`` and ``K_B`` are taken by.

    First stand those of the taps that stay, then of those that move: ``K_A`` a tap back, ``K_B`` a tap on.
    """

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the kernel."""
        K, pair, coin = inputs
        half = K.shape[1] // 2
        (stay_A, back), (stay_B, on) = (
            (V @ rows.flatten(2)).unflatten(2, K.shape[2:]).chunk(2, 1)
            for V, rows in zip(self._matrices(pair, coin), (K[:, :half], K[:, half:]), strict=True)
        )
        stay = F.pad(stay_A + stay_B, (0, 0, 1, 1))
        return stay + F.pad(back, (0, 0, 0, 2)) + F.pad(on, (0, 0, 2, 0))

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the kernel, ``V_A`` and ``V_B``."""
        K, pair, coin = inputs
        half, taps, rows = K.shape[1] // 2, K.shape[2], coin.shape[1]
        V_A, V_B = self._matrices(pair, coin)
        of_A = torch.bmm(V_A, K[:, :half].flatten(2)).unflatten(2, K.shape[2:])
        of_B = torch.bmm(V_B, K[:, half:].flatten(2)).unflatten(2, K.shape[2:])
        result = K.new_empty(K.shape[0], rows, taps + 2, K.shape[3])
        if taps == 1:
            result[:, :, :1], result[:, :, 2:] = of_A[:, rows:], of_B[:, rows:]
            torch.add(of_A[:, :rows], of_B[:, :rows], out=result[:, :, 1:2])
        else:
            result[:, :, 0] = result[:, :, -1] = 0
            torch.add(of_A[:, :rows], of_B[:, :rows], out=result[:, :, 1:-1])
            result[:, :, :-2] += of_A[:, rows:]
            result[:, :, 2:] += of_B[:, rows:]
        return result, (V_A, V_B)

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Any:
        """Return the gradients by ``K``, the pair and the coin."""
        K, pair, coin = inputs
        V_A, V_B = kept
        half, taps, rows = K.shape[1] // 2, K.shape[2], coin.shape[1]
        G_A = torch.cat([G[:, :, 1:-1], G[:, :, :taps]], 1).flatten(2)
        G_B = torch.cat([G[:, :, 1:-1], G[:, :, 2:]], 1).flatten(2)
        dV_A = torch.bmm(G_A, adjoint(K[:, :half].flatten(2)))
        dV_B = torch.bmm(G_B, adjoint(K[:, half:].flatten(2)))
        dK = None
        if needed[0]:
            dK = torch.cat([torch.bmm(adjoint(V_A), G_A), torch.bmm(adjoint(V_B), G_B)], 1).view(K.shape)
        dD_A = torch.cat([dV_A[:, :rows], dV_B[:, rows:]], 2)
        dD_B = torch.cat([dV_A[:, rows:], dV_B[:, :rows]], 2)
        return dK, *products_gradients(dD_A, dD_B, pair, coin)

    def _matrices(self, pair: Tensor, coin: Tensor) -> tuple[Tensor, Tensor]:
        half = pair.shape[1] // 2
        D_A, D_B = torch.bmm(coin[..., :half], pair[:, :half]), torch.bmm(coin[..., half:], pair[:, half:])
        V_A = torch.cat([D_A[..., :half], D_B[..., :half]], 1)
        return V_A, torch.cat([D_B[..., half:], D_A[..., half:]], 1)


JOINED = _Joined()


def products_gradients(dD_A: Tensor, dD_B: Tensor, pair: Tensor, coin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by the pair and the coin, of those by ``D_A`` and ``D_B``."""
    half = pair.shape[1] // 2
    dcoin = [torch.bmm(dD_A, adjoint(pair[:, :half])), torch.bmm(dD_B, adjoint(pair[:, half:]))]
    dpair = [torch.bmm(adjoint(coin[..., :half]), dD_A), torch.bmm(adjoint(coin[..., half:]), dD_B)]
    return torch.cat(dpair, 1), torch.cat(dcoin, 2)


def shifted(K: Tensor, coin: Tensor, half: int) -> Tensor:
    """Return the kernel ``C L K``, one tap longer."""
    rest, on = (
        (part @ rows.flatten(2)).unflatten(2, K.shape[2:])
        for part, rows in ((coin[..., half:], K[:, half:]), (coin[..., :half], K[:, :half]))
    )
    return F.pad(rest, (0, 0, 0, 1)) + F.pad(on, (0, 0, 1, 0))


def kernel(chain: Chain, factors: Factors) -> Tensor:
    """Return the weight ``(out, in/groups, *taps)``."""
    return weight(chain, factors, lines(chain, factors))


def weight(
    chain: Chain, factors: Factors, of_lines: list[Line], kernels: list[Tensor] | None = None
) -> Tensor:
    """Return the weight that is the product of lines.

    Args:
        chain: of the factors.
        factors: themselves.
        of_lines: in the order in which they act.
        kernels: of the lines, if they are known.
    """
    axes, sizes = len(chain.taps), [1] * len(chain.taps)
    W = None  # (groups, rows, taps, columns), the taps of axes that act later before those of earlier ones
    for i, line in enumerate(of_lines):
        if W is not None and len(line.pairs) == 1 and line.shift is None:
            # fewer products than by all taps of both
            columns = W.shape[3]
            W = joined(W.flatten(2).unsqueeze(2), *line.pairs[0]).unflatten(3, (-1, columns)).flatten(2, 3)
            sizes[line.axis] = 3
            continue
        K = line.kernel() if kernels is None else kernels[i]
        sizes[line.axis] = K.shape[2]
        W = K if W is None else _times(K, W)
    if chain.is_strided or W is None:
        frame = factors.coins[-1].unflatten(2, (-1, prod(chain.patch))).mT
        W = frame if W is None else _times(frame, W)
    x = W.unflatten(2, (*chain.patch, *sizes[::-1]))
    # (groups, rows, columns, patch and taps of each axis)
    order = [n for i in range(axes) for n in (2 + i, 2 + 2 * axes - 1 - i)]
    x = x.permute(0, 1, x.ndim - 1, *order)
    for axis in range(axes):
        x = _added(x, 3 + axis)
    return placed(chain, x)


def placed(chain: Chain, x: Tensor) -> Tensor:
    """Return taps ``(groups, rows, columns, *taps)`` where the weight has them."""
    missing = zip(chain.taps, x.shape[3:], chain.first, strict=True)
    padding = [n for k, have, first in reversed([*missing]) for n in (first, k - have - first)]
    x = F.pad(x, padding) if any(padding) else x
    return x.flatten(0, 1).contiguous()


def _times(K: Tensor, W: Tensor) -> Tensor:
    """Return the products of each tap of ``K`` with each of ``W``, those of ``K`` before."""
    product = torch.bmm(K.flatten(1, 2), W.flatten(2))
    return product.reshape(*K.shape[:2], K.shape[2] * W.shape[2], W.shape[3])


def _added(x: Tensor, axis: int) -> Tensor:
    """Return the sum over an axis, each of whose entries has its taps, on the next one, a place further."""
    places = x.shape[axis]
    if places == 1:
        return x.squeeze(axis)
    after = (0, 0) * (x.ndim - axis - 2)
    moved = [F.pad(part, (*after, j, places - 1 - j)) for j, part in enumerate(x.unbind(axis))]
    return torch.stack(moved).sum(0)
