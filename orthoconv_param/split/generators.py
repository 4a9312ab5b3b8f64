"""The factors of a split kernel from free generators.

    C = B exp(skew(X)),    O = exp([[0, -K^H], [K, 0]])

A frame of more columns than rows is ``C = exp(skew(X)) B``. All exponentials of ``m x m`` matrices are one
batch. ``exp`` may be another map from skew to unitary matrices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..matrices import maps
from ..matrices.expm import expm_frame
from ..matrices.products import product, skew
from ..matrices.unitary import polish
from .chain import Chain, Factors


def factors(chain: Chain, X: Tensor, base: Tensor | None, triv: str | maps.Trivialization) -> Factors:
    """Return the factors of a generator.

    Args:
        chain: of the factors.
        X: the generator, see `Chain.split`.
        base: of the coins, see `Chain.bases`; None for identities.
        triv: the map.
    """
    exponentials, pairs = _exponentials(chain, X, triv)
    sizes = chain.coins
    coins = [E[:, :rows, :columns] for E, (rows, columns) in zip(exponentials, sizes, strict=True)]
    if base is not None:
        coins = [*map(_moved, chain.bases(base), coins, sizes)]
    return Factors(tuple(coins), pairs)


def folded(chain: Chain, X: Tensor, base: Tensor, triv: str | maps.Trivialization) -> tuple[Tensor, Tensor]:
    """Return the generator whose coins' are zero, and the base, of the same factors."""
    exponentials, _ = _exponentials(chain, X, triv, whole=True)
    coins = [polish(C) for C in map(_moved, chain.bases(base), exponentials, chain.coins)]
    generators, K = chain.split(X)
    return chain.join([torch.zeros_like(x) for x in generators], K), join_bases(coins)


def join_bases(bases: list[Tensor]) -> Tensor:
    """Return the tensor ``(groups, ...)`` of these bases: the inverse of `Chain.bases`."""
    return torch.cat([B.flatten(1) for B in bases], 1)


def identities(chain: Chain, like: Tensor) -> Tensor:
    """Return the bases that are identities, of the dtype and device of a tensor."""
    eyes = [torch.eye(max(size), dtype=like.dtype, device=like.device) for size in chain.coins]
    return join_bases([eye.expand(chain.groups, -1, -1) for eye in eyes])


def _exponentials(
    chain: Chain, X: Tensor, triv: str | maps.Trivialization, whole: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Return the unitary matrices of the coins' generators, and of the pairs'.

    Args:
        chain: of the factors.
        X: the generator.
        triv: the map.
        whole: whether a frame of patches is to be a square matrix.
    """
    coins, K = chain.split(X)
    m, pairs, found = chain.channels, chain.skew_pairs(K), []
    batch = coins[:-1] if chain.is_strided else coins
    if batch:
        squares = [F.pad(x, (0, m - x.shape[2], 0, m - x.shape[1])) for x in batch]
        Q = _map(torch.cat([torch.stack(squares, 1), pairs], 1), triv)
        found, pairs = [*Q[:, : len(batch)].unbind(1)], Q[:, len(batch) :]
    if chain.is_strided:
        rows, columns = coins[-1].shape[1:]
        missing = (0, max(rows - columns, 0), 0, max(columns - rows, 0)) if whole else (0, 0)
        found.append(_map(F.pad(coins[-1], missing), triv))
    return found, pairs


def _map(X: Tensor, triv: str | maps.Trivialization) -> Tensor:
    """Return the unitary matrices, or frames, of the skew parts of matrices."""
    rows, columns = X.shape[-2:]
    if triv == "expm" and max(rows, columns) > 1:
        return expm_frame(X)
    return maps.trivialization(triv)(skew(X))[..., :rows, :columns]


def _moved(base: Tensor, E: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a coin of a size, the product of its base and a unitary matrix or frame."""
    return product(base, E) if size[0] >= size[1] else product(E, base)
