r"""The factors of a split kernel, from its taps.

Seen from the left, ``Q = C L O L^H R``, only ``A``'s rows of ``C^H Q`` have a last tap, and only ``B``'s a
first one. So the columns of the last tap span ``C``'s for ``A``, those of the first tap ``C``'s for
``B``, and an eigenbasis of the difference of their Gram matrices is ``C``. It shortens the kernel by a tap,
as ``A``'s rows move back by one; then ``O`` does the same from the other side. Taps on the other axes count
as columns. Where a kernel has fewer rows than columns, or patches, its adjoint is taken apart.

The factors are not unique: matrices that do not join ``A`` and ``B`` pass through ``L``. The canonical ones
have pairs whose rotations are by angles in ``[0, pi/2]``, ``O = exp([[0, -K^H], [K, 0]])``.

Of a kernel that is none of the family, what does not fit is left out, so that factors of a near one result.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..matrices.unitary import polar, polar_frame
from .chain import Chain


class Peeled(NamedTuple):
    """Canonical factors.

    Args:
        coins: with square frames, whose first rows or columns are the coin's.
        angles: of the pairs' rotations, ``(groups, pairs, a)``.
        left: ``K = left diag(angles) right^H`` of each pair, ``(groups, pairs, m - a, a)``.
        right: ``(groups, pairs, a, a)``.
    """

    coins: list[Tensor]
    angles: Tensor
    left: Tensor
    right: Tensor


def peel(chain: Chain, W: Tensor) -> Peeled:
    """Return factors of a kernel ``(out, in/groups, *taps)``, or of one near it."""
    X = W.unflatten(0, (chain.groups, chain.rows))
    for axis, (first, k) in enumerate(zip(chain.first, chain.lengths, strict=True), start=3):
        X = X.narrow(axis, first, k)
    from_left = not chain.is_strided and chain.rows >= chain.columns
    X = X if from_left else _adjoint(X)
    coins, pairs = [], []
    for step in reversed(chain.steps) if from_left else chain.steps:
        axis = 3 + step.axis
        C, X = _shorten(X, axis, last=step.is_pair or from_left)
        coins.append(C)
        if step.is_pair:
            pair, X = _shorten(X, axis, last=False)
            pairs.append(pair)
    coins.append((X if from_left else _adjoint(X)).flatten(2))
    if from_left:
        coins, pairs = coins[::-1], pairs[::-1]
    else:
        coins, pairs = [*(C.mH for C in coins[:-1]), coins[-1]], [pair.mH for pair in pairs]
    return _canonical(chain, coins, pairs)


def _adjoint(X: Tensor) -> Tensor:
    """Return the adjoint of kernels ``(groups, rows, columns, *taps)``."""
    return X.transpose(1, 2).flip(tuple(range(3, X.ndim))).conj().resolve_conj()


def _shorten(X: Tensor, axis: int, last: bool) -> tuple[Tensor, Tensor]:
    """Return the unitary matrix at the left of a kernel, and what of the kernel is left.

    Args:
        X: ``(groups, m, columns, *taps)``.
        axis: on which a tap is taken off.
        last: whether it is ``A``'s rows, and not ``B``'s, that have a last tap.
    """
    k, half = X.shape[axis], X.shape[1] // 2
    end, start = (X.select(axis, tap).flatten(2) for tap in (k - 1, 0))
    gram = end @ end.mH - start @ start.mH
    U = torch.linalg.eigh(gram if last else -gram).eigenvectors.flip(-1)
    X = (U.mH @ X.flatten(2)).unflatten(2, X.shape[2:])
    A, B = X[:, :half], X[:, half:]
    return U, torch.cat([A.narrow(axis, int(last), k - 1), B.narrow(axis, int(not last), k - 1)], 1)


def _canonical(chain: Chain, coins: list[Tensor], pairs: list[Tensor]) -> Peeled:
    """Return factors of the same kernel whose pairs rotate by angles in ``[0, pi/2]``."""
    half, found = chain.half, []
    places = [i for i, step in enumerate(chain.steps, start=1) if step.is_pair]
    for i, pair in zip(places, pairs, strict=True):
        R = _gauge(pair, half)  # passes through L, into the coin
        turned = R.mT.unsqueeze(1) @ coins[i].unflatten(2, (chain.channels, -1))
        coins[i] = turned.flatten(2)
        found.append(_rotation(R.mH @ pair, half))
    bases = [polar_frame(C.resolve_conj()) for C in coins]
    m, a = chain.channels, half
    if not found:
        none = [bases[0].new_empty(chain.groups, 0, *size) for size in ((a,), (m - a, a), (a, a))]
        return Peeled(bases, none[0].real, *none[1:])
    return Peeled(bases, *(torch.stack(parts, 1) for parts in zip(*found, strict=True)))


def _gauge(pair: Tensor, half: int) -> Tensor:
    """Return a unitary ``R = diag(R_A, R_B)`` such that ``R^H O`` rotates by angles in ``[0, pi/2]``.

    ``R_A`` is the polar factor of ``O_AA``, which is not unique at right angles. With
    ``R^H O = [[C, -S^H], [S, D]]``, ``R_B (D + S S^H) = O_BB - O_BA R_A^H O_AB`` has full rank anyway.
    """
    A, B = slice(half), slice(half, None)
    R = torch.zeros_like(pair)
    R[:, A, A] = polar(pair[:, A, A])
    R[:, B, B] = polar(pair[:, B, B] - pair[:, B, A] @ R[:, A, A].mH @ pair[:, A, B])
    return R


def _rotation(pair: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the angles of a rotation between ``A`` and ``B``, and its planes in ``A`` and in ``B``."""
    left, sines, right = torch.linalg.svd(pair[:, half:, :half], full_matrices=False)
    right = right.mH
    cosines = (right.conj() * (pair[:, :half, :half] @ right)).sum(-2).real
    return torch.atan2(sines, cosines.clamp(min=0)), left, right
