"""Factors and weight of kernels of three taps on each axis, with gradients written by hand.

What a layer adds to its convolution is this, so that each operation counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import runtime
from ..matrices import by_hand, maps
from ..matrices.products import adjoint
from ..matrices.squaring import expm_and_keep, expm_batch, vjp_batch, vjp_of_kept
from . import generators
from .chain import Chain, Factors
from .compose import JOINED, kernel

_KEPT_BYTES = 2**19  # of generators, above which those of long kernels, whose edges are large, keep no more


def factors(chain: Chain, X: Tensor, base: Tensor | None, triv: str | maps.Trivialization) -> Factors:
    """Return the factors of a generator: see `generators.factors`."""
    if not _is_simple(chain) or base is None or triv != "expm" or not runtime.may_wait(X.device):
        return generators.factors(chain, X, base, triv)
    M = by_hand.apply(_Factored(chain), X, base)
    coins, pairs = M.split([len(chain.steps) + 1, chain.pairs], 1)
    return Factors(coins.unbind(1), pairs)


def weight(chain: Chain, X: Tensor, base: Tensor | None, triv: str | maps.Trivialization) -> Tensor:
    """Return the weight ``(out, in/groups, *taps)`` of a generator.

    Args:
        chain: of its factors.
        X: the generator, see `Chain.split`.
        base: of the coins, see `Chain.bases`; None for identities.
        triv: the map from skew to unitary matrices.
    """
    short = {*chain.taps} <= {1, 3} and chain.pairs > 0
    if short and _is_simple(chain) and base is not None and triv == "expm" and runtime.may_wait(X.device):
        return by_hand.apply(_Generated(chain), X, base)
    return kernel(chain, generators.factors(chain, X, base, triv))


def _is_simple(chain: Chain) -> bool:
    """Return True if all coins are square and alike."""
    return chain.rows == chain.columns > 2 and not chain.is_strided


class _Factored:
    """The rule of `factors`: coins and pairs, ``(groups, coins + pairs, m, m)``."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the matrices."""
        X, base = inputs
        made = generators.factors(self.chain, X, base, "expm")
        return torch.cat([torch.stack(made.coins, 1), made.pairs], 1)

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the matrices, and what the exponential keeps, or the generator alone, to save memory."""
        X, base = inputs
        groups, n, m, a = self._sizes()
        X = X.view(groups, -1)
        S = X.new_zeros(groups, n + self.chain.pairs, m, m)
        S[:, :n] = X[:, : n * m * m].view(groups, n, m, m)
        torch.mul(X[:, n * m * m :].view(groups, -1, m - a, a), 2, out=S[:, n:, a:, :a])
        A = S.view(-1, m, m)
        is_large = max(self.chain.taps) > 3 and S.nbytes > _KEPT_BYTES
        Q, kept = (expm_batch(A, None), [A]) if is_large else expm_and_keep(A, None)
        Q = Q.view(S.shape)
        Q[:, :n] = torch.matmul(base.view(groups, n, m, m), Q[:, :n])
        return runtime.reshaped(Q, S.shape), kept

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor, None]:
        """Return the gradient by the generator."""
        groups, n, m, a = self._sizes()
        base = inputs[1].view(groups, n, m, m)
        dQ = torch.cat([torch.matmul(adjoint(base), G[:, :n]), G[:, n:]], 1)
        dQ = dQ.view(-1, m, m)
        dS = vjp_of_kept(dQ, kept) if len(kept) > 1 else vjp_batch(kept[0], dQ, None)
        dS = dS.view(G.shape)
        dK = dS[:, n:, a:, :a].reshape(groups, -1)
        return torch.cat([dS[:, :n].reshape(groups, -1), dK.mul_(2)], 1).flatten(), None

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.chain.groups, len(self.chain.steps) + 1, self.chain.channels, self.chain.half


class _Generated:
    """The rule of `weight`, for one pair on each axis, or none."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.factored = chain, _Factored(chain)

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the weight."""
        X, base = inputs
        return kernel(self.chain, generators.factors(self.chain, X, base, "expm"))

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the weight, and what is kept."""
        M, kept = self.factored.value(*inputs)
        n = self.chain.pairs
        W = M[:, 0].unsqueeze(2)
        steps: list[Tensor] = []
        for i in range(n):
            W, matrices = JOINED.value(W.flatten(2).unsqueeze(2), M[:, n + 1 + i], M[:, i + 1])
            steps += [W, *matrices]
        return self._placed(W), [M, *steps, *kept]

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor, None]:
        """Return the gradient by the generator."""
        groups, n, m = self.chain.groups, self.chain.pairs, self.chain.channels
        M, steps, kept = kept[0], kept[1 : 1 + 3 * n], kept[1 + 3 * n :]
        dW, dM = self._unplaced(G), torch.empty_like(M)
        for i in reversed(range(n)):
            W = (M[:, 0] if i == 0 else steps[3 * i - 3]).flatten(2).unsqueeze(2)
            dW, dM[:, n + 1 + i], dM[:, i + 1] = JOINED.gradient(
                dW.reshape(groups, m, 3, -1), (W, M[:, n + 1 + i], M[:, i + 1]),
                steps[3 * i + 1 : 3 * i + 3], (True,) * 3,
            )  # fmt: skip
        dM[:, 0] = dW.squeeze(2)
        return self.factored.gradient(dM, inputs, kept, needed)

    def _placed(self, W: Tensor) -> Tensor:
        """Return ``(groups, rows, taps, rest)``, later axes first, as a weight."""
        n = self.chain.pairs
        W = W.reshape(*W.shape[:2], *(3,) * n, -1)
        W = W.permute(0, 1, n + 2, *range(n + 1, 1, -1)).flatten(0, 1)
        return runtime.owned(W.reshape(*W.shape[:2], *self.chain.taps))

    def _unplaced(self, G: Tensor) -> Tensor:
        """Return the inverse of `_placed`, of a gradient."""
        n, groups = self.chain.pairs, self.chain.groups
        G = G.reshape(groups, -1, G.shape[1], *(3,) * n)
        return G.permute(0, 1, *range(n + 2, 2, -1), 2).contiguous()
