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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compose import Line, joined


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


def between_walls(line: Line, with_short: bool = True) -> Walled:
    """Return what a line does between walls; without what lines as short as the ends do, if so asked."""
    A, B = slice(line.half), slice(line.half, None)
    K = line.right.unsqueeze(2)
    first = last = K.new_zeros(*K.shape[:2], 0, 0, K.shape[3])
    for pair, coin in line.pairs:
        first = _end(first, K, pair, coin, B, A)
        last = _end(last, K.flip(2), pair, coin, A, B)
        K = joined(K, pair, coin)
    ends = torch.stack([_matrix(first), _matrix(last.flip(2, 3))])
    sizes = range(1, len(line.pairs) + 1) if with_short else ()
    return Walled(line.axis, K, ends, tuple(_matrix(_short(line, K, n)) for n in sizes))


def _end(E: Tensor, K: Tensor, pair: Tensor, coin: Tensor, alone: slice, joint: slice) -> Tensor:
    """Return the matrix of an end after one more pair and coin.

    Args:
        E: before, ``(groups, m, pixels out, pixels in, columns)``, counted from the wall.
        K: the kernel before, its taps in the direction away from the wall.
        pair: ``O``.
        coin: ``C``.
        alone: the channels that have no partner at the wall.
        joint: the others.
    """
    h = E.shape[2]
    here = K[:, :, h:]  # the taps by which the first pixel reads q = 0, 1, ...
    beyond = F.pad(here[:, :, 1:], (0, 0, 0, 1))  # the one outside of the wall
    lost = here[:, alone] - _apply(pair[:, alone, alone], here[:, alone])
    lost = lost - _apply(pair[:, alone, joint], beyond[:, joint])
    E = F.pad(E, (0, 0, 0, 1))
    still = E[:, alone, :1]
    further = _apply(pair[:, alone, joint], E[:, joint]) + F.pad(
        _apply(pair[:, alone, alone], E[:, alone, 1:]), (0, 0, 0, 0, 0, min(1, h))
    )
    near = F.pad(_apply(pair[:, joint, joint], E[:, joint]), (0, 0, 0, 0, 0, 1)) + F.pad(
        _apply(pair[:, joint, alone], E[:, alone, 1:]), (0, 0, 0, 0, 0, 1 + min(1, h))
    )
    wall = lost.unsqueeze(2) + (still if h else 0)
    rows = [torch.cat([wall, further], 2), near]
    order = rows if alone.start is None else rows[::-1]
    return _apply(coin, torch.cat(order, 1))


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
