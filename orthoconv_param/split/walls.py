r"""A line of pixels between walls: what its two ends add to the zero-padded convolution.

Between walls a pair joins what has a partner, and leaves ``A`` at the last pixel and ``B`` at the first one
alone. On a line of ``n >= h`` pixels, ``h`` pairs are then the zero-padded convolution with their kernel
``K``, plus a matrix that reads and writes the first ``h`` pixels only, and another for the last ``h``. Each
pair and coin take the first one, ``E(p, q)`` with pixels counted from the wall, to ``C E'``,

    E'_A(p) = O_AA E_A(p) + O_AB E_B(p + 1),
    E'_B(p) = O_BA E_A(p - 1) + O_BB E_B(p)                                   for p > 0,
    E'_B(0, q) = E_B(0, q) + K_B(q) - O_BA K_A(q + 1) - O_BB K_B(q),

since the zero-padded convolution takes ``B`` at the first pixel from outside. At the last wall ``A`` and
``B`` change places. Shorter lines have one matrix for all of their pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..matrices import by_hand
from ..matrices.products import adjoint
from .compose import Line, products_gradients


class Walled(NamedTuple):
    """A line between walls.

    Args:
        axis: of space.
        kernel: ``(groups, rows, taps, columns)``, of the zero-padded convolution.
        ends: what the first and the last ``h`` pixels add, ``(2, groups, rows * h, columns * h)``.
        short: what all pixels of lines of 1 to ``h`` pixels add, ``(groups, rows * n, columns * n)``.
    """

    axis: int
    kernel: Tensor
    ends: Tensor
    short: tuple[Tensor, ...]


def between_walls(line: Line) -> Walled:
    """Return what a line does between walls."""
    h, K = len(line.pairs), extended(line.right.unsqueeze(2), line)
    kernel, ends = K[:, :, : 2 * h + 1], K[:, :, 2 * h + 1 :].unflatten(2, (2, h, h))
    ends = ends.permute(2, 0, 1, 3, 5, 4).flatten(4).flatten(2, 3)
    return Walled(line.axis, kernel, ends, tuple(_matrix(_short(line, kernel, n)) for n in range(1, h + 1)))


def extended(K: Tensor, line: Line) -> Tensor:
    """Return the kernel of a line's pairs and coins after ``K``, and what its ends add.

    Args:
        K: ``(groups, m, 1, columns)``, of one tap on this axis.
        line: of ``h`` pairs.

    Returns:
        ``(groups, rows, 2 h + 1 + 2 h^2, columns)``: taps, then ``E(p, q)`` of the first wall and of the
        last, with pixels in the order of images.
    """
    for pairs, (pair, coin) in enumerate(line.pairs):
        K = by_hand.apply(_Extended(pairs), K, pair, coin)
    return K


class _Move(NamedTuple):
    """What a matrix makes of some blocks of the kernel before is added to blocks of the one after.

    The taps, ``E`` of the first wall, and ``E`` of the last are three grids of blocks.

    Args:
        matrix: one of those below.
        source: the grid, and the row and column of the first block.
        target: likewise, where it is added.
        size: rows and columns of blocks.
        sign: of what is added.
    """

    matrix: int
    source: tuple[int, int, int]
    target: tuple[int, int, int]
    size: tuple[int, int]
    sign: int = 1


_TAPS, _FIRST, _LAST = range(3)
# what stays; what a pair moves back, out of A, or on, out of B; and what it leaves alone at the walls
_STAYS, _BACK, _ON, _ALONE_A, _ALONE_B = range(5)


def _sizes(h: int) -> list[tuple[int, int]]:
    """Return the rows and columns of the three grids after ``h`` pairs."""
    return [(1, 2 * h + 1), (h, h), (h, h)]


def _moves(h: int) -> list[_Move]:
    """Return how a pair after ``h`` others moves blocks; ``E`` of the last wall ends at its pixel."""
    moves = [
        _Move(_STAYS, (_TAPS, 0, 0), (_TAPS, 0, 1), (1, 2 * h + 1)),
        _Move(_BACK, (_TAPS, 0, 0), (_TAPS, 0, 0), (1, 2 * h + 1)),
        _Move(_ON, (_TAPS, 0, 0), (_TAPS, 0, 2), (1, 2 * h + 1)),
        _Move(_STAYS, (_FIRST, 0, 0), (_FIRST, 0, 0), (h, h)),
        _Move(_BACK, (_FIRST, 0, 0), (_FIRST, 1, 0), (h, h)),
        _Move(_ON, (_FIRST, 1, 0), (_FIRST, 0, 0), (h - 1, h)),
        _Move(_ALONE_B, (_FIRST, 0, 0), (_FIRST, 0, 0), (1, h)),
        _Move(_ALONE_B, (_TAPS, 0, h), (_FIRST, 0, 0), (1, h + 1)),
        _Move(_BACK, (_TAPS, 0, h + 1), (_FIRST, 0, 0), (1, h), -1),
        _Move(_STAYS, (_LAST, 0, 0), (_LAST, 1, 1), (h, h)),
        _Move(_ON, (_LAST, 0, 0), (_LAST, 0, 1), (h, h)),
        _Move(_BACK, (_LAST, 0, 0), (_LAST, 2, 1), (h - 1, h)),
        _Move(_ALONE_A, (_LAST, h - 1, 0), (_LAST, h, 1), (1, h)),
        _Move(_ALONE_A, (_TAPS, 0, 0), (_LAST, h, 0), (1, h + 1)),
        _Move(_ON, (_TAPS, 0, 0), (_LAST, h, 1), (1, h), -1),
    ]
    return [move for move in moves if min(move.size) > 0]


def _view(K: Tensor, h: int, at: tuple[int, int, int], size: tuple[int, int]) -> Tensor:
    """Return a view of a part of a grid of ``h`` pairs, ``(groups, rows, *size, columns)``."""
    grid, row, column = at
    sizes = _sizes(h)
    step = sizes[grid][1]
    first = sum(a * b for a, b in sizes[:grid]) + row * step + column
    groups, rows, block, columns = K.stride()
    return K.as_strided(
        (*K.shape[:2], *size, K.shape[3]),
        (groups, rows, step * block, block, columns),
        K.storage_offset() + first * block,
    )


@dataclass(frozen=True)
class _Extended:
    """The rule by which a pair and a coin after ``pairs`` others extend a kernel and its ends."""

    pairs: int

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the blocks."""
        K, pair, coin = inputs
        before, after = _sizes(self.pairs), _sizes(self.pairs + 1)
        grids = [
            [
                part.unflatten(2, size)
                for part, size in zip(P.split([a * b for a, b in before], 2), before, strict=True)
            ]
            for P in self._products(K, *_matrices(pair, coin))
        ]
        made: list[list[Tensor]] = [[], [], []]
        for matrix, (source, row, column), (target, top, left), (a, b), sign in _moves(self.pairs):
            moved = sign * grids[matrix][source][:, :, row : row + a, column : column + b]
            rows, columns = after[target]
            made[target].append(F.pad(moved, (0, 0, left, columns - left - b, top, rows - top - a)))
        return torch.cat([sum(parts[1:], parts[0]).flatten(2, 3) for parts in made], 2)

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the blocks, and the matrices by which ``A`` and ``B`` are multiplied."""
        K, pair, coin = inputs
        matrices = _matrices(pair, coin)
        blocks = sum(a * b for a, b in _sizes(self.pairs + 1))
        result = K.new_zeros(K.shape[0], coin.shape[1], blocks, K.shape[3])
        for target, moved, sign in self._moved(self._products(K, *matrices), result):
            target.add_(moved, alpha=sign)
        return result, matrices

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Any:
        """Return the gradients by the blocks before, the pair and the coin."""
        K, pair, coin = inputs
        V_A, V_B = kept
        half, rows = K.shape[1] // 2, coin.shape[1]
        # of the products by which matrices, and of them: stays, moves, alone
        G_A = K.new_zeros(K.shape[0], 3 * rows, *K.shape[2:])
        G_B = torch.zeros_like(G_A)
        (stays, back, alone_A), (_, on, alone_B) = G_A.chunk(3, 1), G_B.chunk(3, 1)
        for target, moved, sign in self._moved([stays, back, on, alone_A, alone_B], G):
            moved.add_(target, alpha=sign)
        G_B[:, :rows] = stays
        G_A, G_B = G_A.flatten(2), G_B.flatten(2)
        dV_A = torch.bmm(G_A, adjoint(K[:, :half].flatten(2)))
        dV_B = torch.bmm(G_B, adjoint(K[:, half:].flatten(2)))
        dK = None
        if needed[0]:
            dK = torch.cat([torch.bmm(adjoint(V_A), G_A), torch.bmm(adjoint(V_B), G_B)], 1).view(K.shape)
        (stay_A, back, last), (stay_B, on, first) = dV_A.split(rows, 1), dV_B.split(rows, 1)
        dD_A, dD_B = torch.cat([stay_A - last, on], 2), torch.cat([back, stay_B - first], 2)
        dpair, dcoin = products_gradients(dD_A, dD_B, pair, coin)
        return dK, dpair, dcoin.add_(torch.cat([last, first], 2))

    def _products(self, K: Tensor, V_A: Tensor, V_B: Tensor) -> list[Tensor]:
        """Return what each matrix makes of the blocks."""
        half, size = K.shape[1] // 2, K.shape[2:]
        of_A, of_B = torch.bmm(V_A, K[:, :half].flatten(2)), torch.bmm(V_B, K[:, half:].flatten(2))
        (stay_A, back, alone_A), (stay_B, on, alone_B) = (
            product.unflatten(2, size).chunk(3, 1) for product in (of_A, of_B)
        )
        return [stay_A + stay_B, back, on, alone_A, alone_B]

    def _moved(self, products: Sequence[Tensor], result: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield views of where blocks are added, of the blocks, and with which sign."""
        for move in _moves(self.pairs):
            target = _view(result, self.pairs + 1, move.target, move.size)
            yield target, _view(products[move.matrix], self.pairs, move.source, move.size), move.sign


def _matrices(pair: Tensor, coin: Tensor) -> tuple[Tensor, Tensor]:
    """Return by what ``A`` and ``B`` are multiplied: for what stays, what moves, and what is left alone."""
    half = pair.shape[1] // 2
    C_A, C_B = coin[..., :half], coin[..., half:]
    D_A, D_B = torch.bmm(C_A, pair[:, :half]), torch.bmm(C_B, pair[:, half:])
    V_A = torch.cat([D_A[..., :half], D_B[..., :half], C_A - D_A[..., :half]], 1)
    return V_A, torch.cat([D_B[..., half:], D_A[..., half:], C_B - D_B[..., half:]], 1)


def _short(line: Line, K: Tensor, n: int) -> Tensor:
    """Return what the pixels of a line of ``n`` of them add, ``(groups, rows, n, n, columns)``."""
    half, eye = line.half, torch.eye(n, dtype=K.dtype, device=K.device)
    X = line.right[:, :, None, None] * eye[..., None]
    for pair, coin in line.pairs:
        A, B = X[:, :half], X[:, half:]
        joint = _apply(pair, torch.cat([A[:, :, : n - 1], B[:, :, 1:]], 1))
        X = torch.cat(
            [
                torch.cat([joint[:, :half], A[:, :, n - 1 :]], 2),
                torch.cat([B[:, :, :1], joint[:, half:]], 2),
            ],
            1,
        )
        X = _apply(coin, X)
    h = len(line.pairs)
    zero_padded = torch.stack([K[:, :, h - p : h - p + n] for p in range(n)], 2)
    return X - zero_padded


def _apply(M: Tensor, X: Tensor) -> Tensor:
    """Return the product of matrices with the first axis after the groups."""
    return (M @ X.flatten(2)).unflatten(2, X.shape[2:])


def _matrix(E: Tensor) -> Tensor:
    """Return ``(groups, rows, p, q, columns)`` as matrices, ``(groups, rows * p, columns * q)``."""
    return E.permute(0, 1, 2, 4, 3).flatten(3).flatten(1, 2)
