"""Reading back: a generator and bases of a split kernel, or of one that is near a given kernel.

Peeling gives the factors of a kernel of the family, up to rounding, and a start for any other. From there
the distance is descended by the quasi-Newton method L-BFGS, as long as that pays. Nothing is random.
"""

import torch
from torch import Tensor

from ..matrices import maps
from . import fast
from .chain import Chain
from .compose import kernel
from .generators import factors, folded, identities, join_bases
from .peeling import Peeled, peel

_STEPS = 20  # of a round of the descent
_ROUNDS = 10  # of which another follows while one more than halves the distance
_FAR = 1e-3  # of an entry from the family
_EXACT = 32  # units of rounding to which a kernel is read back


def read(
    chain: Chain, W: Tensor, triv: str | maps.Trivialization, eps: float, proper: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the generator, whose coins' parts are zero, and the coins' bases, of a kernel near ``W``.

    Args:
        chain: of the factors.
        W: ``(out, in/groups, *taps)``, in double precision.
        triv: the map of the pairs.
        eps: rounding of the kernel.
        proper: whether the coins of a real kernel are to have determinant 1, where it is not of the family.
    """
    if W.is_meta:
        return W.new_empty(chain.groups * chain.numbers), identities(chain, W)
    peeled = peel(chain, W)
    X, base = _generator(chain, peeled, triv), join_bases(peeled.coins)
    distance = _distance(chain, X, base, W, triv)
    if distance <= _EXACT * eps or not chain.steps:  # the polar factor of patches is the nearest frame
        return X, base
    if proper:  # a near kernel with other coins
        coins, K = _proper(chain, peeled.coins, chain.split(X)[1])
        coins[-1][torch.linalg.det(coins[-1]).real < 0, -1] *= -1
        X, base = chain.join(chain.split(X)[0], K), join_bases(coins)
    # far from the family, there is nothing that double precision would show
    dtype = W.dtype if distance < _FAR else torch.complex64 if W.is_complex() else torch.float32
    near = _descended(chain, X.to(dtype), base.to(dtype), W.to(dtype), triv)
    found = kernel(chain, factors(chain, near.to(W.dtype), base, triv))
    peeled = peel(chain, found)  # canonical, so that between walls too a kernel has one operator
    X, canonical = _generator(chain, peeled, triv), join_bases(peeled.coins)
    if _distance(chain, X, canonical, found, triv) <= _EXACT * eps:
        return X, canonical
    return folded(chain, near.to(W.dtype), base, triv)


def logarithms(chain: Chain, X: Tensor, base: Tensor, triv: str | maps.Trivialization) -> Tensor:
    """Return a generator of the same kernel without bases.

    Raises:
        ValueError: if there is none, or the map has no inverse.
    """
    inverse = maps.inverse(triv)
    assert inverse is not None  # checked by the constructor
    coins, K = _proper(chain, chain.bases(base), chain.split(X)[1])
    return chain.join([inverse(C) for C in coins], K)


def _generator(chain: Chain, peeled: Peeled, triv: str | maps.Trivialization) -> Tensor:
    """Return the generator of canonical factors, whose coins are in the bases."""
    sizes = maps.generators_of_angles(triv, peeled.angles).unsqueeze(-2)
    K = (peeled.left * sizes) @ peeled.right.mH
    zeros = [K.new_zeros(chain.groups, *size) for size in chain.coins]
    return chain.join(zeros, K)


def _distance(chain: Chain, X: Tensor, base: Tensor, W: Tensor, triv: str | maps.Trivialization) -> Tensor:
    return (kernel(chain, factors(chain, X, base, triv)) - W).abs().amax()


@torch.enable_grad()
def _descended(chain: Chain, X: Tensor, base: Tensor, W: Tensor, triv: str | maps.Trivialization) -> Tensor:
    """Return a generator whose kernel is nearer to ``W``, on the same bases."""
    X, base, W = X.detach().clone().requires_grad_(), base.clone(), W.detach().clone()
    optimizer = torch.optim.LBFGS(
        [X], max_iter=_STEPS, history_size=_STEPS, tolerance_grad=0, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = fast.weight(chain, X, base, triv) - W
        squares = torch.view_as_real(error) if error.is_complex() else error
        value = squares.square().sum()
        value.backward()
        return value

    before = float("inf")
    for _ in range(_ROUNDS):
        optimizer.step(loss)
        now = float(loss().detach())
        if now > before / 4:
            break
        before = now
    return X.detach()


def _proper(chain: Chain, coins: list[Tensor], K: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return factors of the same kernel, of which real coins, but the last, have determinant 1.

    A change of the sign of ``A``'s first channel passes through pairs and shifts.
    """
    if K.is_complex():
        return coins, K
    coins, K, pair = [C.clone() for C in coins], K.clone(), 0
    for i, step in enumerate(chain.steps):
        flips = torch.linalg.det(coins[i]) < 0
        patch = chain.coins[i + 1][1] // chain.channels
        coins[i][flips, 0] *= -1
        coins[i + 1][flips, :, :patch] *= -1
        if step.is_pair:
            K[flips, pair, :, 0] *= -1
        pair += step.is_pair
    return coins, K
