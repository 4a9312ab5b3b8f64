r"""A split kernel between walls as one convolution, and what its edges take in strips along the walls.

With lines ``X = Z_x + E_x`` and ``Y = Z_y + E_y`` as in `split.mending`,

    Y X = Z_y Z_x + Z_y E_x + E_y Z_x + E_y E_x.

The first term is the zero-padded convolution with the whole kernel. The second reads and writes strips
along the walls of one axis, by a convolution along the wall; the third does along those of the other axis;
the last reads and writes the corners. Each is a product of matrices once its taps are side by side. All of
it is a small share of the convolution's work, for kernels of any number of blocks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import runtime
from ..matrices import by_hand
from ..torus.geometry import per_channel
from .chain import Chain, Factors
from .compose import Line, lines, placed, weight
from .walls import extended

_FEW = 16  # columns of a matrix, from which on the order makes no difference


class Strip(NamedTuple):
    """What reads and writes along the walls of some axes, or at the corners.

    Args:
        axes: of images, across which the walls stand: 2 and 3, or one of them; none of the corners.
        width: of the strips; of the corners, on both axes.
        taps: along the walls.
    """

    axes: tuple[int, ...]
    width: tuple[int, int]
    taps: int


class Edges(NamedTuple):
    """A kernel between walls.

    Args:
        kernel: ``(out, in/groups, *taps)``.
        strips: what its edges take.
        matrices: of each strip, ``(ends, groups, rows * width, width * taps * columns)``; ends are the
            first and the last wall of each axis, or the four corners.
    """

    kernel: Tensor
    strips: tuple[Strip, ...]
    matrices: tuple[Tensor, ...]


def edges(chain: Chain, factors: Factors) -> Edges:
    """Return a kernel of two axes of space, of stride 1, and what its edges take."""
    of_lines = lines(chain, factors)
    if not of_lines:
        return Edges(weight(chain, factors, of_lines), (), ())
    pairs = [0, 0]
    for line in of_lines:
        pairs[line.axis] = len(line.pairs)
    K = extended(of_lines[0].right.unsqueeze(2), of_lines[0])
    K = _after(of_lines[1], K) if len(of_lines) > 1 else K.unsqueeze(3 if pairs[1] else 2)
    return _edges(chain, K, *pairs)


def _after(line: Line, K: Tensor) -> Tensor:
    """Return taps and ends of a line after those of another: ``(groups, rows, its, others, columns)``."""
    if len(line.pairs) == 1:  # fewer products than of all with all
        return extended(K.flatten(2).unsqueeze(2), line).unflatten(3, K.shape[2:])
    E = extended(line.right.unsqueeze(2), line)
    product = torch.bmm(E.flatten(1, 2), K.flatten(2))
    return product.unflatten(1, E.shape[1:3]).unflatten(3, K.shape[2:])


def _edges(chain: Chain, K: Tensor, v: int, u: int) -> Edges:
    """Return a kernel and what its edges take.

    Args:
        chain: of the factors.
        K: taps and ends, ``(groups, rows, of the second axis, of the first, columns)``.
        v: pairs on the first axis.
        u: pairs on the second.
    """
    (W, A), (B, C) = (part.split([2 * v + 1, 2 * v**2], 3) for part in K.split([2 * u + 1, 2 * u**2], 2))
    # ends first, then rows and the pixels that they write; the pixels and taps that are read, then columns
    A = A.unflatten(3, (2, v, v)).permute(3, 0, 1, 4, 5, 2, 6).flatten(4).flatten(2, 3)
    B = B.unflatten(2, (2, u, u)).permute(2, 0, 1, 3, 4, 5, 6).flatten(4).flatten(2, 3)
    C = C.unflatten(3, (2, v, v)).unflatten(2, (2, u, u)).permute(5, 2, 0, 1, 6, 3, 7, 4, 8)
    C = C.flatten(6).flatten(3, 5).flatten(0, 1)
    first, second = Strip((2,), (v, v), 2 * u + 1), Strip((3,), (u, u), 2 * v + 1)
    strips = [(first, A), (second, B), (Strip((), (v, u), 1), C)]
    if v == u:
        strips[:2] = [(Strip((2, 3), (v, u), 2 * v + 1), torch.cat([A, B]))]
    strips = [(strip, M) for strip, M in strips if M.numel()]
    return Edges(
        placed(chain, W.permute(0, 1, 4, 3, 2)),
        tuple(strip for strip, _ in strips),
        tuple(M for _, M in strips),
    )


@dataclass(frozen=True)
class Mending:
    """The rule of a convolution whose edges are mended; its inputs are images, kernel, bias and matrices.

    Args:
        strips: that are added.
        padding: of the convolution.
        groups: of the convolution.
        taken: channels of the images that the strips read, ``sets`` times as many as a matrix has columns.
        given: channels that they add to.
        sets: of channels, each with matrices of its own.
        has_bias: whether there is one.
    """

    strips: tuple[Strip, ...]
    padding: tuple[int, ...]
    groups: int
    taken: "Channels"
    given: "Channels"
    sets: int
    has_bias: bool

    def plain(self, *inputs: Tensor) -> Tensor:
        """Return the images."""
        x, kernel, bias, matrices = self._named(inputs)
        y = F.conv2d(x, kernel, bias, 1, self.padding, 1, self.groups)
        part = self.taken.of(x)
        for strip, M in zip(self.strips, matrices, strict=True):
            X = _cut_out(part, strip)
            length = X.shape[4] - strip.taps + 1  # (unfold has no derivative under vmap)
            X = torch.stack([X.narrow(4, t, length) for t in range(strip.taps)], 5)
            X = X.unflatten(2, (self.sets, -1))[:, None, :, :, :, :, None]
            V = torch.bmm(M.flatten(0, 1), _side_by_side(X, _COLUMNS))
            channels, width = V.shape[1] // X.shape[5], X.shape[5]
            V = _apart(V, (X.shape[0], 1, len(x), self.sets, channels, width, 1, length, 1), _ROWS)
            V = V.flatten(3, 4).select(7, 0).squeeze(5).squeeze(1)
            y = self.given.plus(y, _put_in(V, strip, y.shape))
        return y

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the images. What the strips read is read again for the gradient: to keep it costs more."""
        x, kernel, bias, matrices = self._named(inputs)
        y = F.conv2d(x, kernel, bias, 1, self.padding, 1, self.groups)
        part, into = self.taken.of(x), self.given.room(y)
        for strip, M in zip(self.strips, matrices, strict=True):
            X = _side_by_side(_read(part, strip, self.sets, strip.taps), _COLUMNS)
            V = _product(M.flatten(0, 1), X)
            _add(into, _apart(V, _shape(into, strip, self.sets, 1), _ROWS), strip)
        self.given.put(y, into)
        return y, ()

    def gradient(
        self, G: Tensor, inputs: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients by images, kernel, bias and matrices."""
        x, kernel, bias, matrices = self._named(inputs)
        dx, dkernel = runtime.convolution_gradients(
            G, x, kernel, self.groups, padding=self.padding, needed=needed[:2]
        )
        dbias = [G.sum((0, 2, 3))] if bias is not None else []
        part, arrived, dmatrices = self.taken.of(x), self.given.of(G), []
        into = self.taken.room(dx) if needed[0] else None
        for strip, M in zip(self.strips, matrices, strict=True):
            X = _side_by_side(_read(part, strip, self.sets, strip.taps), _COLUMNS)
            V = _side_by_side(_read(arrived, strip, self.sets, 1), _ROWS)
            dmatrices.append(torch.bmm(V, X.mT).view(M.shape))
            if into is not None:
                dX = _product(M.flatten(0, 1).mT, V)
                _add(into, _apart(dX, _shape(into, strip, self.sets, strip.taps), _COLUMNS), strip)
        if into is not None:
            self.taken.put(dx, into)
        return dx, dkernel, *dbias, *dmatrices

    def _named(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
        if self.has_bias:
            return inputs[0], inputs[1], inputs[2], inputs[3:]
        return inputs[0], inputs[1], None, inputs[2:]


# Strips of images: first and last wall of each axis, as long as the longer axis. Their dimensions are ends
# of the first axis and of the second, batch, sets, channels, pixels across on each axis, length, and taps.

_ROWS = (0, 1, 3, 4, 5, 6, 8, 2, 7)  # as the matrices' rows are, and as their columns
_COLUMNS = (0, 1, 3, 5, 6, 8, 4, 2, 7)


def _side_by_side(X: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return strips as matrices, ``(ends * sets, rows or columns, batch * length)``."""
    X = X.permute(order)
    return X.reshape(X.shape[:3].numel(), X.shape[3:7].numel(), X.shape[7:].numel())


def _apart(V: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    """Return strips of matrices, of a shape: the inverse of `_side_by_side`."""
    V = V.reshape([shape[i] for i in order])
    return V.permute([order.index(i) for i in range(9)])


def _shape(x: Tensor, strip: Strip, sets: int, taps: int) -> list[int]:
    """Return the shape of strips."""
    v, u = strip.width
    ends, width = ((2 * len(strip.axes), 1), (v, 1)) if strip.axes else ((2, 2), (v, u))
    return [*ends, len(x), sets, x.shape[1] // sets, *width, _length(strip, x.shape), taps]


def _length(strip: Strip, size: Sequence[int]) -> int:
    """Return how long strips of images of a size are."""
    longest = 1
    for axis in strip.axes:
        longest = max(longest, size[5 - axis])
    return longest


def _read(x: Tensor, strip: Strip, sets: int, taps: int) -> Tensor:
    """Return strips, and zeros beyond their ends."""
    views = _views(x, strip, sets)
    if len(views) == taps == 1:
        return views[0].unsqueeze(8)
    shape = _shape(x, strip, sets, taps)
    X = x.new_zeros(*shape[:7], shape[7] + taps - 1)
    for i, view in enumerate(views):
        X.narrow(0, 2 * i, 2).narrow(7, taps // 2, view.shape[7]).copy_(view)
    return X.unfold(7, taps, 1)


def _add(y: Tensor, V: Tensor, strip: Strip) -> None:
    """Add strips to images, in place: the transpose of `_read`."""
    length, taps = V.shape[7:]
    total = V.select(8, taps // 2)
    for t in range(taps):
        ahead = t - taps // 2
        if abs(ahead) in range(1, length):
            here = total.narrow(7, max(ahead, 0), length - abs(ahead))
            here += V.select(8, t).narrow(7, max(-ahead, 0), length - abs(ahead))
    for i, view in enumerate(_views(y, strip, V.shape[3])):
        here = total.narrow(0, 2 * i, 2).narrow(7, 0, view.shape[7])
        for pixel in range(view.shape[5]):  # since loops over one or two pixels of a row are slow
            view.select(5, pixel).add_(here.select(5, pixel))


def _product(M: Tensor, X: Tensor) -> Tensor:
    """Return ``M X``: its transpose by the transposed factors, since few columns are slow."""
    return torch.bmm(X.mT, M.mT).mT if X.shape[2] < _FEW else torch.bmm(M, X)


def _views(x: Tensor, strip: Strip, sets: int) -> list[Tensor]:
    """Return views of images without taps: of the walls of each axis, or of the corners."""
    (batch, channels, H, W), (n, c, h, w) = x.shape, x.stride()
    v, u = strip.width
    channels //= sets
    middle, strides = (batch, sets, channels), (n, channels * c, c)
    if not strip.axes:
        return [x.as_strided((2, 2, *middle, v, u, 1), ((H - v) * h, (W - u) * w, *strides, h, w, w))]
    found = []
    if 2 in strip.axes:
        found.append(x.as_strided((2, 1, *middle, v, 1, W), ((H - v) * h, w, *strides, h, w, w)))
    if 3 in strip.axes:
        found.append(x.as_strided((2, 1, *middle, u, 1, H), ((W - u) * w, w, *strides, w, w, h)))
    return found


def _places(strip: Strip, size: Sequence[int]) -> list[tuple[slice, slice, int]]:
    """Return the rows and columns of images that strips are, and the axis across which they lie."""
    (v, u), (H, W) = strip.width, size[2:]
    rows, columns = (slice(0, v), slice(H - v, H)), (slice(0, u), slice(W - u, W))
    if not strip.axes:
        return [(r, c, 0) for r in rows for c in columns]
    places = {2: [(r, slice(0, W), 2) for r in rows], 3: [(slice(0, H), c, 3) for c in columns]}
    return [place for axis in strip.axes for place in places[axis]]


def _cut_out(x: Tensor, strip: Strip) -> Tensor:
    """Do what `_read` does, differentiably."""
    parts = []
    longest, side = _length(strip, x.shape), strip.taps // 2
    for r, c, axis in _places(strip, x.shape):
        part = x[:, :, r, c]
        if axis == 0:
            parts.append(part.flatten(2).unsqueeze(3))
        else:
            part = part.transpose(2, 3) if axis == 3 else part
            parts.append(F.pad(part, (side, side + longest - part.shape[3])))
    return torch.stack(parts)


def _put_in(V: Tensor, strip: Strip, size: Sequence[int]) -> Tensor:
    """Return images of zeros to which strips are added, differentiably."""
    H, W = size[2:]
    images = []
    for (r, c, axis), part in zip(_places(strip, size), V, strict=True):
        if axis == 0:
            part = part.squeeze(3).unflatten(2, strip.width)
        else:
            part = part[..., : W if axis == 2 else H]
            part = part.transpose(2, 3) if axis == 3 else part
        images.append(F.pad(part, (c.start, W - c.stop, r.start, H - r.stop)))
    return sum(images[1:], images[0])


class Channels:
    """Some channels of images: a view of them where they follow one another.

    Args:
        index: of the channels.
        device: of the images.
    """

    def __init__(self, index: Sequence[int], device: torch.device) -> None:
        self.first, self.count = index[0], len(index)
        follows = [*index] == [*range(self.first, self.first + self.count)]
        self.index = None if follows else torch.tensor(index, device=device)

    def of(self, x: Tensor) -> Tensor:
        """Return them, of images ``(batch, channels, *size)``."""
        if self.index is None:
            return x.narrow(1, self.first, self.count)
        return x.index_select(1, self.index)

    def room(self, x: Tensor) -> Tensor:
        """Return where to add to them: a view, or zeros, since a channel may be several of them."""
        if self.index is None:
            return x.narrow(1, self.first, self.count)
        return x.new_zeros(len(x), self.count, *x.shape[2:])

    def put(self, x: Tensor, part: Tensor) -> None:
        """Add what has been added to `room`, where that is no view."""
        if self.index is not None:
            x.index_add_(1, self.index, part)

    def plus(self, x: Tensor, part: Tensor) -> Tensor:
        """Return images with a part added to these channels."""
        if self.index is not None:
            return x.index_add(1, self.index, part)
        missing = x.shape[1] - self.count - self.first
        return x + F.pad(part, (0, 0, 0, 0, self.first, missing)) if missing or self.first else x + part


def convolve(rule: Mending, x: Tensor, kernel: Tensor, bias: Tensor | None, *matrices: Tensor) -> Tensor:
    """Apply a kernel between walls to images ``(batch, channels, height, width)``, and add a bias."""
    if not rule.strips:
        y = F.conv2d(x, kernel, None, 1, rule.padding, 1, rule.groups)
        return y if bias is None else y + per_channel(bias, y)
    inputs = (x, kernel, *(() if bias is None else (bias,)), *matrices)
    return by_hand.apply(rule, *inputs)
