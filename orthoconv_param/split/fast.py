"""The weight of kernels of three taps on each axis, in few operations, with a gradient written by hand.

What a layer adds to its convolution is this, so that each operation counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import runtime
from ..matrices import by_hand, maps
from ..matrices.squaring import expm_and_keep, vjp_of_kept
from .chain import Chain
from .compose import JOINED, kernel
from .generators import factors


def generated(chain: Chain, X: Tensor, base: Tensor | None, triv: str | maps.Trivialization) -> Tensor:
    """Return the weight ``(out, in/groups, *taps)`` of a generator.

    Args:
        chain: of its factors.
        X: the generator, see `Chain.split`.
        base: of the coins, see `Chain.bases`; None for identities.
        triv: the map from skew to unitary matrices.
    """
    square = chain.rows == chain.columns > 2 and not chain.is_strided
    short = {*chain.taps} <= {1, 3} and chain.pairs > 0
    if triv == "expm" and base is not None and square and short and runtime.may_wait(X.device):
        return by_hand.apply(_Generated(chain), X, base)
    return kernel(chain, factors(chain, X, base, triv))


class _Generated:
    """The rule of `generated`, for as many channels out as in, and one pair on each axis."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the weight."""
        X, base = inputs
        return kernel(self.chain, factors(self.chain, X, base, "expm"))

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
            W, matrices = JOINED.value(W.flatten(2).unsqueeze(2), Q[:, n + 1 + i], coins[:, i + 1])
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
            dW, dQ[:, n + 1 + i], dcoins[:, i + 1] = JOINED.gradient(
                dW.reshape(groups, m, 3, -1), (W, Q[:, n + 1 + i], coins[:, i + 1]),
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
        W = W.view(*W.shape[:2], *(3,) * n, -1)
        W = W.permute(0, 1, n + 2, *range(n + 1, 1, -1)).flatten(0, 1)
        return W.reshape(*W.shape[:2], *self.chain.taps)

    def _unplaced(self, G: Tensor) -> Tensor:
        """Return the inverse of `_placed`, of a gradient."""
        n, groups = self.chain.pairs, self.chain.groups
        G = G.reshape(groups, -1, G.shape[1], *(3,) * n)
        return G.permute(0, 1, *range(n + 2, 2, -1), 2).contiguous()
