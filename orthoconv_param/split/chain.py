r"""`Chain`: of which factors a split kernel is the product.

Split ``m`` channels into ``A``, the first ``m // 2``, and ``B``. For a skew matrix that joins ``A`` with
``B`` only, ``S = [[0, -K^H], [K, 0]]``, and an axis of space, the antisymmetric kernel of symbol
``L S L^H``, ``L(w) = diag(e^{iw} I_A, I_B)``, joins ``A`` at a pixel with ``B`` at the next one and nothing
else. So its exponential has finite support: ``L exp(S) L^H`` has three taps, and is orthogonal at every
size. A split kernel of ``k`` taps on each axis is a product of these, its pairs, and of orthogonal matrices
on the channels of one pixel, its coins:

    Q = C_n S_n C_(n-1) ... S_1 C_0,    S_i = L O_i L^H,    O_i = exp([[0, -K_i^H], [K_i, 0]]),

first all ``S_i`` of the first axis, ``(k - 1) / 2`` of them, then those of the next. An even ``k`` has one
more factor on its axis, ``S_i = L``. With a stride ``s`` the last coin is a frame: it maps each patch of
``s`` samples a side to one pixel. Where the channels differ, one coin is the frame: the first (its columns)
if there are more output than input channels, else the last (its rows).
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Size
from ..torus.geometry import Geometry


class Step(NamedTuple):
    """What stands between two coins: a pair, or the shift ``L`` of an axis of space."""

    axis: int
    is_pair: bool


class Factors(NamedTuple):
    """The matrices of a chain.

    Args:
        coins: ``C_0 ... C_n``, each ``(groups, rows, columns)``.
        pairs: ``O_i`` of the steps that are pairs, ``(groups, pairs, m, m)``.
    """

    coins: tuple[Tensor, ...]
    pairs: Tensor


@dataclass(frozen=True)
class Chain:
    """The factors of split kernels of one shape.

    Args:
        groups: of the convolution, each of which has factors of its own.
        rows: channels out of each group.
        columns: channels in.
        taps: of the weight.
        first: index in the weight of the kernel's first tap, on each axis; before it taps are 0.
        patch: samples that the last coin maps to one, on each axis.
        stride: from one patch to the next.
        steps: between the coins, in the order in which they act.
    """

    groups: int
    rows: int
    columns: int
    taps: Size
    first: Size
    patch: Size
    stride: Size
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, geometry: Geometry, between_walls: bool = False) -> "Chain":
        """Return the chain of a convolution.

        Between walls the kernel is symmetric about a pixel, so that an even one with stride 1 has a tap
        less, and no patch is cut.

        Raises:
            ValueError: if the geometry has no split kernels; it names what to use.
        """
        axes = [_axis(geometry, axis, between_walls) for axis in range(geometry.axes)]
        steps = tuple(step for part in axes for step in part.steps)
        first, patch, taps, stride = (
            tuple(getattr(part, name) for part in axes) for name in ("first", "patch", "taps", "stride")
        )
        groups, (out, columns) = geometry.groups, geometry.size[:2]
        self = cls(groups, out // groups, columns, taps, first, patch, stride, steps)
        self._check(geometry)
        return self

    def _check(self, geometry: Geometry) -> None:
        """Raise if there are no kernels of these channels.

        Raises:
            ValueError: then.
        """
        if self.steps and self.channels == 1:
            fewer = tuple(s + 1 for s in self.stride)
            patches = f", or a kernel of at most {fewer} taps" if self.is_strided else ""
            raise ValueError(
                "a split kernel should have at least two channels in each group: with one it is only a "
                f'shift. Use method="exponential"{patches}. Found a weight of size {geometry.size} with '
                f"{self.groups} groups"
            )
        seen = self.columns * prod(self.patch)
        if self.rows > seen and any(t < s for t, s in zip(self.patch, self.stride, strict=True)):
            raise ValueError(
                f"each group should have at most {seen} output (transposed: input) channels, since a "
                f"kernel of {geometry.taps} taps with stride {geometry.stride} skips samples: "
                f"use {self.stride} taps or more. Found {self.rows}"
            )

    def is_within_patches(self, geometry: Geometry) -> bool:
        """Return True if no tap of a kernel leaves the patch of its pixel, so that it meets no boundary."""
        axes = zip(
            self.first,
            self.lengths,
            geometry.dilation,
            geometry.placement.origin,
            geometry.stride,
            strict=True,
        )
        return all(r * first >= o and r * (first + k - 1) - o < s for first, k, r, o, s in axes)

    # The factors' sizes

    @property
    def is_strided(self) -> bool:
        """Return True if the last coin maps patches, one for each pixel of a coarser grid."""
        return max(self.stride) > 1

    @property
    def lengths(self) -> Size:
        """Return how many taps the kernel has on each axis, empty ones of the weight aside."""
        lengths = [*self.patch]
        for step in self.steps:
            lengths[step.axis] += 1 + step.is_pair
        return tuple(lengths)

    @property
    def channels(self) -> int:
        """Channels ``m`` of a group on which the pairs act."""
        return self.columns if self.is_strided else max(self.rows, self.columns)

    @property
    def half(self) -> int:
        """Channels in ``A``."""
        return self.channels // 2

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return sum(step.is_pair for step in self.steps)

    @property
    def coins(self) -> list[tuple[int, int]]:
        """Rows and columns of each coin."""
        m, n, patch = self.channels, len(self.steps), prod(self.patch)
        sizes = [(m, m)] * (n + 1)
        sizes[0] = (m, self.columns)
        sizes[n] = (self.rows if self.is_strided else min(self.rows, m), sizes[n][1] * patch)
        return sizes

    @property
    def numbers(self) -> int:
        """How many numbers the generators of one group are."""
        m, a = self.channels, self.half
        return sum(rows * columns for rows, columns in self.coins) + self.pairs * (m - a) * a

    # The factors' generators, and the coins' bases, as numbers

    def split(self, X: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the generators of coins and pairs that are a tensor ``(groups * numbers,)``.

        Returns:
            ``(groups, rows, columns)`` for each coin, and the pairs' ``K``, ``(groups, pairs, m - a, a)``.
        """
        sizes, m, a = self.coins, self.channels, self.half
        counts = [rows * columns for rows, columns in sizes]
        *coins, K = X.reshape(self.groups, -1).split([*counts, self.pairs * (m - a) * a], 1)
        shaped = [x.unflatten(1, size) for x, size in zip(coins, sizes, strict=True)]
        return shaped, K.reshape(self.groups, self.pairs, m - a, a)

    def join(self, coins: list[Tensor], K: Tensor) -> Tensor:
        """Return the tensor of these generators: the inverse of `split`."""
        return torch.cat([x.flatten(1) for x in (*coins, K)], 1).flatten()

    def bases(self, numbers: Tensor) -> list[Tensor]:
        """Return the coins' bases, square matrices, that are a tensor ``(groups, ...)``."""
        sides = [max(size) for size in self.coins]
        parts = numbers.split([side * side for side in sides], 1)
        return [x.unflatten(1, (side, side)) for x, side in zip(parts, sides, strict=True)]

    def skew_pairs(self, K: Tensor) -> Tensor:
        """Return matrices ``(groups, pairs, m, m)`` whose skew part is ``[[0, -K^H], [K, 0]]``."""
        m, a = self.channels, self.half
        return F.pad(2 * K, (0, m - a, a, 0))


class _Axis(NamedTuple):
    """What of a chain belongs to one axis of space."""

    taps: int
    first: int
    patch: int
    stride: int
    steps: list[Step]


def _axis(geometry: Geometry, axis: int, between_walls: bool) -> _Axis:
    """Return the steps of one axis of space.

    Raises:
        ValueError: if a wall would cut a patch.
    """
    k, s = geometry.taps[axis], geometry.stride[axis]
    r, origin = geometry.dilation[axis], geometry.placement.origin[axis]
    before = origin // r
    if between_walls and s > 1 and (r > 1 or not 0 <= before <= max(0, k - s)):
        padding = max(0, -(-(k - s) // 2))
        raise ValueError(
            f"with a stride of {s}, a wall cuts the patches of a kernel of {k} taps, dilation {r} and "
            f'padding {origin}: use padding={padding} and dilation=1, or boundary="circular"'
        )
    s //= gcd(s, r)  # samples that are never read count for nothing
    if s == 1:
        k -= between_walls and k % 2 == 0
        steps = [Step(axis, True)] * ((k - 1) // 2)
        return _Axis(k, 0, 1, 1, [*steps, *[Step(axis, False)] * (k % 2 == 0)])
    # on a torus every place is as good as any other
    before = min(before, max(0, k - s))
    pairs = max(0, min(before, k - s - before))
    return _Axis(k, before - pairs, min(k, s), s, [Step(axis, True)] * pairs)
