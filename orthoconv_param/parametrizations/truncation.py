r"""How many taps a compact kernel needs, measured on the kernel itself.

`smallest_degree` holds for every generator of a norm, the worst included. Most need less: at norm 1 a
defect of 1e-6 asks for 17 taps, and of typical kernels 13 are within 1e-7. So the kernel is made once with
as many taps as are proved to be enough, and compared with shorter ones. The difference of two kernels is a
trigonometric polynomial, whose values on a grid bound it at all frequencies, and so on tori of every size.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Size
from ..matrices.norms import frobenius
from ..torus.dft import half
from ..torus.lattice import Lattice, centre, sampling

_FEWEST = 2  # the degree below which second derivatives have not all their taps
_LARGEST_GROWTH = 4.0  # of the outermost taps, for which what is outside of them is taken to grow alike
_IDENTITY = 1e-6  # taps that square to less, but for the centre's, are none
_CHUNK_BYTES = 2**22  # of a spectrum that is made for its norms, in a core's cache
_MOST_ENTRIES = 2**26  # of all matrices at the points of the grid
_MOST_BYTES = 2**28  # of one that is kept as a whole, for a closer bound


def is_affordable(degree: int, reach: Size, blocks: Size, groups: int) -> bool:
    """Return True if `shortest` takes seconds at most: not in three dimensions for large degrees."""
    points, _ = sampling(tuple(degree * r for r in reach), density=4)
    return prod(half(points)) * prod(blocks) * groups <= _MOST_ENTRIES


def shortest(kernel: Tensor, groups: int, degree: int, reach: Size, tol: float) -> tuple[int, float]:
    """Return the smallest degree at which a compact kernel is as good, and up to which edges it stays so.

    Args:
        kernel: of a degree that is enough, on the coarse grid: ``(groups * rows, columns, *taps)``, in
            double precision.
        groups: of the convolution.
        degree: of the kernel.
        reach: of its generator.
        tol: how far singular values may be from those of the kernel, on every torus.

    Returns:
        The degree; and how large `outermost` may become before what is left out, which grows as these taps
        do, exceeds 1.2 times ``tol``.
    """
    squares = kernel.abs().square().sum((0, 1))
    if _outside(squares, 0, reach) < _IDENTITY:  # which tells nothing of the derivatives there
        return degree, 0.0
    channels = groups * min(kernel.shape[0] // groups, kernel.shape[1])

    def may_do(fewer: int) -> bool:
        # the mean square of the difference over all frequencies, each tap and where it is folded to
        return 2 * _outside(squares, fewer, reach) <= channels * tol**2

    low = next((fewer for fewer in range(_FEWEST, degree) if may_do(fewer)), degree)
    best, left_out = degree, 0.1
    while low < best:
        middle = (low + best) // 2
        distance = _distance(kernel, groups, middle, degree, reach, tol)
        if distance <= 1:
            best, left_out = middle, distance
        else:
            low = middle + 1
    edge = float(outermost(_folded(kernel, best, reach), groups, reach))
    return best, edge * min(_LARGEST_GROWTH, 1.2 / max(left_out, 0.1))


def outermost(kernel: Tensor, groups: int, reach: Size, stride: Size | None = None) -> Tensor:
    """Return the size of the taps of a compact kernel that only the last power of its generator reaches.

    It is the sum of the largest norms of a row and of a column, so that a single channel is seen.

    Args:
        kernel: ``(out, in/groups, *taps)``.
        groups: of the convolution.
        reach: of the generator, on the coarse grid.
        stride: of the convolution, whose phases the taps are. Default: they are those of the coarse grid.
    """
    stride = stride or (1,) * len(reach)
    squares = kernel.new_zeros(kernel.shape[:2], dtype=kernel.dtype.to_real())
    for axis, (r, s) in enumerate(zip(reach, stride, strict=True), start=2):
        for start in (s - 1, kernel.shape[axis] - r * s):  # of the first phase s - 1 taps are empty
            edge = kernel.detach().narrow(axis, start, r * s)
            squares = squares + edge.abs().square().flatten(2).sum(-1)
    columns = squares.unflatten(0, (groups, -1)).sum(1)
    return squares.sum(1).amax().sqrt() + columns.amax().sqrt()


def _outside(squares: Tensor, degree: int, reach: Size) -> float:
    """Return the sum over the taps that a kernel of that degree does not have."""
    inside = torch.zeros_like(squares, dtype=torch.bool)
    part = (
        slice(centre(n) - degree * r, centre(n) + degree * r + 1)
        for n, r in zip(squares.shape, reach, strict=True)
    )
    inside[tuple(part)] = True
    return float(squares[~inside].sum())


def _folded(kernel: Tensor, degree: int, reach: Size) -> Tensor:
    """Return the kernel of fewer taps that has the same matrices at the frequencies of their torus."""
    for axis, r in enumerate(reach, start=2):
        n, taps = 2 * degree * r + 1, kernel.shape[axis]
        index = (torch.arange(taps, device=kernel.device) - centre(taps) + centre(n)) % n
        folded = kernel.new_zeros(*kernel.shape[:axis], n, *kernel.shape[axis + 1 :])
        kernel = folded.index_add_(axis, index, kernel)
    return kernel


def _distance(kernel: Tensor, groups: int, fewer: int, degree: int, reach: Size, tol: float) -> float:
    """Return a bound, in units of ``tol``, on how far a kernel is from the shorter one at any frequency."""
    points, factor = sampling(tuple(degree * r for r in reach), density=4)
    lattice = Lattice(points, (1,) * len(points), 1, kernel.is_complex())
    margin = [p for r in reversed(reach) for p in [(degree - fewer) * r] * 2]
    bytes_of_row = lattice.frequencies * kernel.shape[1] * 8
    parts, squares = [], []
    for rows in kernel.split(max(1, _CHUNK_BYTES // bytes_of_row)):
        rest = (rows - F.pad(_folded(rows, fewer, reach), margin)) * (factor / tol)
        E = lattice.spectrum(rest.to(torch.complex64 if rest.is_complex() else torch.float32))[0]
        squares.append(torch.view_as_real(E).square().sum((-2, -1)))
        if bytes_of_row * len(kernel) <= _MOST_BYTES:
            parts.append(E)
    bound = torch.cat(squares, -1).unflatten(-1, (groups, -1)).sum(-1).amax().sqrt()
    if parts and bound > 1:  # traces of the fourth powers are closer, and take a product
        E = torch.cat(parts, -2).unflatten(-2, (groups, -1))
        gram = E @ E.mH if E.shape[-2] <= E.shape[-1] else E.mH @ E
        bound = frobenius(gram).amax().sqrt()
    return float(bound)
