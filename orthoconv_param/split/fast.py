"""The weight of kernels of three taps on each axis, in few operations, with a gradient written by hand.

What a layer adds to its convolution is this, so that each operation counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..matrices import by_hand, maps
from ..matrices.squaring import expm_and_keep, vjp_of_kept
from .chain import Chain, Factors
from .compose import JOINED, JOINED_WITH_ENDS, kernel
from .generators import factors


def generated(chain: Chain, X: Tensor, base: Tensor | None, triv: str | maps.Trivialization) -> Tensor:
    """Return the weight ``(out, in/groups, *taps)`` of a generator.

    Args:
        chain: of its factors.
        X: the generator, see `Chain.split`.
        base: of the coins, see `Chain.bases`; None for identities.
        triv: the map from skew to unitary matrices.
    """
    if has_three_taps(chain) and base is not None and triv == "expm" and runtime.may_wait(X.device):
        return by_hand.apply(_Generated(chain, JOINED), X, base)
    return kernel(chain, factors(chain, X, base, triv))


def with_ends(chain: Chain, X: Tensor, base: Tensor | None, triv: str | maps.Trivialization) -> Tensor:
    """Return the weight of a generator, and on each axis what its ends between walls add, as further taps.

    Args:
        chain: of its factors, for which `has_three_taps` is true.
        X: the generator, see `Chain.split`.
        base: of the coins, see `Chain.bases`; None for identities.
        triv: the map from skew to unitary matrices.

    Returns:
        ``(out, in/groups, *taps)``. Of the five taps on an axis, the last two read and write at the first
        and at the last pixel only.
    """
    rule = _Generated(chain, JOINED_WITH_ENDS)
    if base is not None and triv == "expm" and runtime.may_wait(X.device):
        return by_hand.apply(rule, X, base)
    return rule.of_factors(factors(chain, X, base, triv))


def has_three_taps(chain: Chain) -> bool:
    """Return True for as many channels out as in, and one pair on each axis, or none."""
    square = chain.rows == chain.columns > 2 and not chain.is_strided
    return square and {*chain.taps} <= {1, 3} and chain.pairs > 0


class _Generated:
    """The rule of `generated` and `with_ends`."""

    def __init__(self, chain: Chain, joined: Any) -> None:
        self.chain, self.joined = chain, joined
        self.count = 5 if joined.ends else 3  # of taps

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the weight."""
        return self.of_factors(factors(self.chain, *inputs, "expm"))

    def of_factors(self, made: Factors) -> Tensor:
        """Return the weight of factors, by differentiable operations."""
        W = made.coins[0].unsqueeze(2)
        for pair, coin in zip(made.pairs.unbind(1), made.coins[1:], strict=True):
            W = self.joined.plain(W.flatten(2).unsqueeze(2), pair, coin)
        return self._placed(W)

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the weight, and what is kept."""
        X, base = inputs
        groups, n, m, a = self.chain.groups, self.chain.pairs, self.chain.channels, self.chain.half
        X = X.view(groups, -1)
        count = (n + 1) * m * m
        S = X.new_zeros(groups, 2 * n + 1, m, m)
        S[:, : n + 1] = X[:, :count].view(groups, n + 1, m, m)
        torch.mul(X[:, count:].view(groups, n, m - a, a), 2, out=S[:, n + 1 :, a:, :a])
        Q, kept = expm_and_keep(S.view(-1, m, m), None)
        Q = Q.view(groups, -1, m, m)
        coins = torch.matmul(base.view(groups, n + 1, m, m), Q[:, : n + 1])
        W = coins[:, 0].unsqueeze(2)
        steps: list[Tensor] = []
        for i in range(n):
            W, matrices = self.joined.value(W.flatten(2).unsqueeze(2), Q[:, n + 1 + i], coins[:, i + 1])
            steps += [W, *matrices]
        return self._placed(W), [Q, coins, *steps, *kept]

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor, None]:
        """Return the gradient by the generator."""
        groups, n, m, a = self.chain.groups, self.chain.pairs, self.chain.channels, self.chain.half
        Q, coins = kept[:2]
        steps, kept = kept[2 : 2 + 3 * n], kept[2 + 3 * n :]
        dW = self._unplaced(G)
        dQ, dcoins = torch.empty_like(Q), torch.empty_like(coins)
        for i in reversed(range(n)):
            W = (coins[:, 0] if i == 0 else steps[3 * i - 3]).flatten(2).unsqueeze(2)
            dW, dQ[:, n + 1 + i], dcoins[:, i + 1] = self.joined.gradient(
                dW.reshape(groups, m, self.count, -1), (W, Q[:, n + 1 + i], coins[:, i + 1]),
                steps[3 * i + 1 : 3 * i + 3], (True,) * 3,
            )  # fmt: skip
        dcoins[:, 0] = dW.squeeze(2)
        base = inputs[1].view(groups, n + 1, m, m)
        dQ[:, : n + 1] = torch.matmul(base.mH.resolve_conj(), dcoins)
        dS = vjp_of_kept(dQ.view(-1, m, m), kept).view(groups, -1, m, m)
        dK = dS[:, n + 1 :, a:, :a].reshape(groups, -1)
        return torch.cat([dS[:, : n + 1].reshape(groups, -1), dK.mul_(2)], 1).flatten(), None

    def _placed(self, W: Tensor) -> Tensor:
        """Return ``(groups, rows, taps, rest)``, later axes first, as a weight."""
        n = self.chain.pairs
        W = W.reshape(*W.shape[:2], *(self.count,) * n, -1)
        W = W.permute(0, 1, n + 2, *range(n + 1, 1, -1)).flatten(0, 1)
        return W.reshape(*W.shape[:2], *(self.count if k > 1 else 1 for k in self.chain.taps))

    def _unplaced(self, G: Tensor) -> Tensor:
        """Return the inverse of `_placed`, of a gradient."""
        n, groups = self.chain.pairs, self.chain.groups
        G = G.reshape(groups, -1, G.shape[1], *(self.count,) * n)
        return G.permute(0, 1, *range(n + 2, 2, -1), 2).contiguous()
