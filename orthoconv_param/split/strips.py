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
from .compose import Line, extended, lines, weight
from .walls import Walled, between_walls


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
        matrices: of each strip, ``(ends, groups, rows * width, columns * width * taps)``; ends are the
            first and the last wall of each axis, or the four corners.
    """

    kernel: Tensor
    strips: tuple[Strip, ...]
    matrices: tuple[Tensor, ...]


def edges(chain: Chain, factors: Factors) -> Edges:
    """Return a kernel of two axes of space, of stride 1, and what its edges take."""
    of_lines = lines(chain, factors)
    if [len(line.pairs) for line in of_lines] == [1, 1]:
        return _of_two_pairs(chain, *of_lines)
    walled = [between_walls(line, with_short=False) for line in of_lines]
    kernel = weight(chain, factors, of_lines, [line.kernel for line in walled])
    if not walled:
        return Edges(kernel, (), ())
    if len(walled) == 1:
        (line,) = walled
        width = len(of_lines[0].pairs)
        return Edges(kernel, (Strip((line.axis + 2,), (width, width), 1),), (line.ends,))
    v, w = (len(line.pairs) for line in of_lines)
    return Edges(kernel, *_of_two(walled[0], walled[1], v, w))


def _of_two_pairs(chain: Chain, first: Line, second: Line) -> Edges:
    """Return a kernel of one pair on each axis, and what its edges take."""
    groups, columns = chain.groups, chain.columns
    K = first.right
    for line in (first, second):
        ((pair, coin),) = line.pairs
        K = extended(K.flatten(2), pair, coin)
    # (groups, rows, taps and ends of the second axis, of the first, columns)
    K = K.unflatten(3, (5, columns))
    W, A, B, C = K[:, :, :3, :3], K[:, :, :3, 3:], K[:, :, 3:, :3], K[:, :, 3:, 3:]
    W = W.permute(0, 1, 4, 3, 2) if first.axis < second.axis else W.permute(0, 1, 4, 2, 3)
    A, B = A.permute(3, 0, 1, 4, 2), B.permute(2, 0, 1, 4, 3)  # (ends, groups, rows, columns, taps)
    ends = torch.cat([A, B] if first.axis < second.axis else [B, A]).flatten(3)
    C = C.permute(3, 2, 0, 1, 4) if first.axis < second.axis else C.permute(2, 3, 0, 1, 4)
    corners = C.flatten(0, 1)
    taps = [3 if t > 1 else 1 for t in chain.taps]
    kernel = W.reshape(groups * chain.rows, columns, *taps)
    return Edges(kernel, (Strip((2, 3), (1, 1), 3), Strip((), (1, 1), 1)), (ends, corners))


def _of_two(first: Walled, second: Walled, v: int, w: int) -> tuple[tuple[Strip, ...], tuple[Tensor, ...]]:
    """Return the strips of two lines of so many pairs, and their matrices."""
    groups, rows, taps_of_second, m = second.kernel.shape
    _, _, taps_of_first, columns = first.kernel.shape
    # Z_second E_first: rows (row, p), columns (column, q, tap along the walls)
    E = first.ends.reshape(2, groups, m, v * columns * v)
    A = (second.kernel.flatten(1, 2) @ E).reshape(2, groups, rows, taps_of_second, v, columns * v)
    A = A.permute(0, 1, 2, 4, 5, 3).reshape(2, groups, rows * v, columns * v * taps_of_second)
    # E_second Z_first
    E = second.ends.reshape(2, groups, rows * w, m, w).transpose(3, 4).flatten(2, 3)
    B = (E @ first.kernel.flatten(2)).reshape(2, groups, rows * w, w, taps_of_first, columns)
    B = B.permute(0, 1, 2, 5, 3, 4).reshape(2, groups, rows * w, columns * w * taps_of_first)
    # E_second E_first at the corners: the first axis' ends change slower
    C = E.unsqueeze(0) @ first.ends.reshape(2, 1, groups, m, v * columns * v)
    C = C.reshape(4, groups, rows, w, w, v, columns, v).permute(0, 1, 2, 5, 3, 6, 7, 4)
    C = C.reshape(4, groups, rows * v * w, columns * v * w)
    x, y = first.axis + 2, second.axis + 2
    strips = Strip((x,), (v, v), taps_of_second), Strip((y,), (w, w), taps_of_first)
    if x > y:  # rows of images come first
        A, B, strips = B, A, strips[::-1]
        C = _turned(C, rows, columns, v, w)
        v, w = w, v
    corners = Strip((), (v, w), 1)
    if A.shape == B.shape:
        return (Strip((2, 3), (v, w), taps_of_first), corners), (torch.cat([A, B]), C)
    return (*strips, corners), (A, B, C)


def _turned(C: Tensor, rows: int, columns: int, v: int, w: int) -> Tensor:
    """Return the corners' matrices with their axes of space the other way round."""
    C = C.unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1)
    C = C.unflatten(3, (columns, v, w)).transpose(4, 5).flatten(3)
    return C.unflatten(2, (rows, v, w)).transpose(3, 4).flatten(2, 4)


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
            X = self._side_by_side(X)
            V = self._apart(torch.bmm(M.flatten(0, 1), X), strip, x.shape)
            y = self.given.plus(y, _put_in(V, strip, y.shape))
        return y

    def value(self, *inputs: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the images. What the strips read is read again for the gradient: to keep it costs more."""
        x, kernel, bias, matrices = self._named(inputs)
        y = F.conv2d(x, kernel, bias, 1, self.padding, 1, self.groups)
        part, into = self.taken.of(x), self.given.room(y)
        for strip, M in zip(self.strips, matrices, strict=True):
            V = _product(M.flatten(0, 1), self._side_by_side(_read(part, strip, strip.taps)))
            _add(into, self._apart(V, strip, x.shape), strip)
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
            X = self._side_by_side(_read(part, strip, strip.taps))
            V = self._side_by_side(_read(arrived, strip, 1))
            dmatrices.append(torch.bmm(V, X.mT).view(M.shape))
            if into is not None:
                dX = self._apart(_product(M.flatten(0, 1).mT, V), strip, x.shape, strip.taps)
                _add(into, dX, strip)
        if into is not None:
            self.taken.put(dx, into)
        return dx, dkernel, *dbias, *dmatrices

    def _named(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor]]:
        if self.has_bias:
            return inputs[0], inputs[1], inputs[2], inputs[3:]
        return inputs[0], inputs[1], None, inputs[2:]

    def _side_by_side(self, X: Tensor) -> Tensor:
        """Return strips as matrices, ``(ends * sets, channels * width * taps, batch * length)``.

        Args:
            X: ``(ends, batch, sets * channels, width, length, taps)``.
        """
        ends, batch, channels, width, length, taps = X.shape
        sets = self.sets
        if sets > 1:
            X = X.view(ends, batch, sets, channels // sets, width, length, taps)
            X = X.permute(0, 2, 3, 4, 6, 1, 5)
        else:
            X = X.permute(0, 2, 3, 5, 1, 4)
        return X.reshape(ends * sets, channels // sets * width * taps, batch * length)

    def _apart(self, V: Tensor, strip: Strip, size: Sequence[int], taps: int = 1) -> Tensor:
        """Return strips of matrices: the transpose of `_side_by_side`, without what is beyond the ends.

        Args:
            V: the matrices.
            strip: which they are.
            size: of the images.
            taps: along the walls.
        """
        v, w = strip.width
        width, ends = (v, 2 * len(strip.axes)) if strip.axes else (v * w, 4)
        batch, sets, length = size[0], self.sets, _length(strip, size)
        channels = V.shape[1] // (width * taps)
        if taps == sets == 1:
            return V.view(ends, channels, width, batch, length).permute(0, 3, 1, 2, 4)
        V = V.view(ends, sets, channels, width, taps, batch, length).permute(4, 0, 5, 1, 2, 3, 6)
        V = V.flatten(3, 4)  # taps, then as strips are
        if taps == 1:
            return V[0]
        total = V[taps // 2].contiguous()
        for t in range(taps):
            ahead = t - taps // 2
            if abs(ahead) in range(1, length):
                here = total.narrow(-1, max(ahead, 0), length - abs(ahead))
                here += V[t].narrow(-1, max(-ahead, 0), length - abs(ahead))
        return total


# Strips of images: first and last wall of each axis, as long as the longer axis


def _length(strip: Strip, size: Sequence[int]) -> int:
    """Return how long strips of images of a size are."""
    longest = 1
    for axis in strip.axes:
        longest = max(longest, size[5 - axis])
    return longest


def _read(x: Tensor, strip: Strip, taps: int) -> Tensor:
    """Return strips and zeros beyond their ends, ``(ends, batch, channels, width, length, taps)``."""
    views = _views(x, strip)
    batch, channels = x.shape[:2]
    if not strip.axes:  # laid out as the matrices will be, so that they are copied once
        corners = views[0].permute(0, 1, 3, 4, 5, 2).reshape(4, channels, -1, batch)
        return corners.permute(0, 3, 1, 2)[..., None, None]
    if len(views) == 1 and taps == 1:
        return views[0].unsqueeze(5)
    width, length = views[0].shape[3], _length(strip, x.shape)
    X = x.new_zeros(2 * len(views), batch, channels, width, length + taps - 1)
    for i, view in enumerate(views):
        X.narrow(0, 2 * i, 2).narrow(4, taps // 2, view.shape[4]).copy_(view)
    return X.unfold(4, taps, 1)


def _add(y: Tensor, V: Tensor, strip: Strip) -> None:
    """Add strips to images, in place."""
    views = _views(y, strip)
    if not strip.axes:
        views[0].add_(V.reshape(views[0].shape))
        return
    for i, view in enumerate(views):
        here = V.narrow(0, 2 * i, 2).narrow(4, 0, view.shape[4])
        for pixel in range(view.shape[3]):  # since loops over one or two pixels of a row are slow
            view.select(3, pixel).add_(here.select(3, pixel))


def _product(M: Tensor, X: Tensor) -> Tensor:
    """Return ``M X``: its transpose by the transposed factors, since few columns are slow."""
    return torch.bmm(X.mT, M.mT).mT if X.shape[2] < _FEW else torch.bmm(M, X)


def _views(x: Tensor, strip: Strip) -> list[Tensor]:
    """Return views of images: of each axis ``(2, batch, channels, width, length)``, or of the corners."""
    (batch, channels, H, W), (n, c, h, w) = x.shape, x.stride()
    v, u = strip.width
    if not strip.axes:
        return [x.as_strided((2, 2, batch, channels, v, u), ((H - v) * h, (W - u) * w, n, c, h, w))]
    found = []
    if 2 in strip.axes:
        found.append(x.as_strided((2, batch, channels, v, W), ((H - v) * h, n, c, h, w)))
    if 3 in strip.axes:
        found.append(x.as_strided((2, batch, channels, u, H), ((W - u) * w, n, c, w, h)))
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
