"""Discrete Fourier transforms along one axis, and the pairs of frequencies ``+w, -w``."""

from functools import lru_cache
from math import pi, prod

import torch
from torch import Tensor

from .. import runtime
from ..checks import Size

_MATRIX_TAPS = 64  # the most that are transformed by a matrix; more by the fast transform
_REAL_MATRIX_TAPS = 32  # the same for the transform of half a spectrum, which MKL copies first


def half(grid: Size) -> Size:
    """Return the size of the half-spectrum that ``rfftn`` keeps on a ``grid``."""
    return (*grid[:-1], grid[-1] // 2 + 1)


@lru_cache(maxsize=64)
def mirror(grid: Size) -> tuple[list[int], list[int], list[int]]:
    """Return which frequencies of the half-spectrum are negatives of themselves or of each other.

    Returns:
        The indices of the frequencies that are their own negatives; those of one of each pair ``+w, -w``;
        and those of the other.
    """
    stored = half(grid)
    index = torch.cartesian_prod(*(torch.arange(n) for n in stored)).reshape(-1, len(grid))
    negative = (-index) % torch.tensor(grid)
    kept = negative[:, -1] < stored[-1]
    position = torch.zeros(len(index), dtype=torch.long)
    for axis, n in enumerate(stored):
        position = position * n + negative[:, axis]
    here = torch.arange(len(index))
    own = here[kept & (position == here)]
    first = here[kept & (here < position)]
    return own.tolist(), first.tolist(), position[first].tolist()


# Transforms along one axis of ``(*axes, channels)``. With few taps they are products with a matrix, which
# writes the frequencies where they belong. A fast transform would need zeros between the taps.


def analyse(x: Tensor, axis: int, n: int, positions: range, folded: bool) -> Tensor:
    """Return ``sum_t exp(2 pi i u e_t / n) x[t]`` for taps ``x[t]`` at ``positions`` ``e_t``.

    Returns:
        The sums at all ``u``, or if ``folded``, for real ``x``, at half of them.
    """
    if len(positions) <= _MATRIX_TAPS:
        E = _exponentials(n, positions, folded, torch.promote_types(x.dtype, torch.complex64), x.device)
        return _product_along(E, x.to(E.dtype), axis)
    # The fast transform of a real signal has the other sign. So it is given the signal in reverse.
    index = torch.tensor([(-e if folded else e) % n for e in positions], device=x.device)
    torus = x.new_zeros(*x.shape[:axis], n, *x.shape[axis + 1 :]).index_add(axis, index, x)
    return torch.fft.rfft(torus, dim=axis) if folded else torch.fft.ifft(torus, dim=axis, norm="forward")


def synthesise(x: Tensor, axis: int, n: int, positions: range, folded: bool) -> Tensor:
    """Return the taps at ``positions``, the inverse of `analyse`.

    If ``folded``, half of the frequencies are given, and the taps are real.
    """
    if len(positions) <= _MATRIX_TAPS:
        E = _exponentials(n, range(-positions.start, -positions.stop, -1), folded, x.dtype, x.device)
        weights = torch.full((len(E),), 1 / n, dtype=x.real.dtype, device=x.device)
        if folded:  # a frequency and its negative
            weights[1 : (n + 1) // 2] *= 2
        taps = _product_along(E.mT * weights, x, axis)
        return taps.real.contiguous() if folded else taps
    index = torch.tensor([(-e if folded else e) % n for e in positions], device=x.device)
    torus = torch.fft.irfft(x, n, dim=axis) if folded else torch.fft.fft(x, dim=axis, norm="forward")
    return torus.index_select(axis, index)


def whole_of(x: Tensor, n: int, size: int) -> Tensor:
    """Return the first ``size`` of the ``n`` real samples whose orthonormal `torch.fft.rfft` is ``x``.

    The transform is along the last axis.
    """
    if n > _REAL_MATRIX_TAPS or not runtime.may_wait(x.device) or runtime.is_compiling():
        return torch.fft.irfft(x, n=n, norm="ortho").narrow(-1, 0, size)
    make = _kept_parts if runtime.may_keep(x.device) else _new_parts
    return torch.view_as_real(x).flatten(-2) @ make(n, size, x.dtype, x.device)


def _new_parts(n: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix of `whole_of`: two rows for each frequency, of its real and imaginary part."""
    E = _exponentials(n, range(0, -size, -1), True, dtype, device)
    weights = torch.full((len(E), 1, 1), n**-0.5, dtype=dtype.to_real(), device=device)
    weights[1 : (n + 1) // 2] *= 2  # a frequency and its negative
    return (torch.view_as_real(E).movedim(-1, 1) * weights).flatten(0, 1)


_kept_parts = lru_cache(maxsize=64)(_new_parts)


def _product_along(E: Tensor, x: Tensor, axis: int) -> Tensor:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    # one product along the first axis; along another, one for each index of the axes before it
    flat = x.reshape(prod(before), x.shape[axis], prod(after)) if axis else x.flatten(1)
    return (E @ flat).reshape(*before, len(E), *after)


def _exponentials(
    n: int, positions: range, folded: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``exp(2 pi i u e_t / n)``, one row for each ``u``; kept for later calls where that is safe."""
    make = _kept_exponentials if runtime.may_keep(device) else _new_exponentials
    return make(n, positions, folded, dtype, device)


def _new_exponentials(
    n: int, positions: range, folded: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    u = torch.arange(n // 2 + 1 if folded else n, device=device)
    e = torch.arange(positions.start, positions.stop, positions.step, device=device)
    angles = torch.outer(u, e).remainder(n).double() * (2 * pi / n)
    parts = torch.stack([angles.cos(), angles.sin()], -1)
    exact = torch.where(parts.abs() > 1e-12, parts, 0)  # zeros at quarters of a turn
    return torch.view_as_complex(exact).to(dtype)


_kept_exponentials = lru_cache(maxsize=64)(_new_exponentials)
