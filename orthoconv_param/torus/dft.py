"""Discrete Fourier transforms along one axis, and which frequencies pair up."""

from functools import lru_cache
from math import pi, prod

import torch
from torch import Tensor

from .. import runtime
from ..checks import Size

_MATRIX_TAPS = 64  # up to which a transform is made by a matrix rather than fast


def half(grid: Size) -> Size:
    """Size of the half-spectrum that ``rfftn`` keeps on a ``grid``."""
    return (*grid[:-1], grid[-1] // 2 + 1)


@lru_cache(maxsize=64)
def mirror(grid: Size) -> tuple[list[int], list[int], list[int]]:
    """Within the half-spectrum: frequencies equal to their own negative, and pairs ``+w, -w``."""
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


def analyse(x: Tensor, axis: int, n: int, positions: range, folded: bool) -> Tensor:
    """``sum_t exp(2 pi i u e_t / n) x[t]`` at all ``u``, or if ``x`` is real at half of them."""
    if len(positions) <= _MATRIX_TAPS:
        E = _exponentials(n, positions, folded, torch.promote_types(x.dtype, torch.complex64), x.device)
        return _product_along(E, x.to(E.dtype), axis)
    # The fast transform of a real signal has the other sign: it is given the signal in reverse.
    index = torch.tensor([(-e if folded else e) % n for e in positions], device=x.device)
    torus = x.new_zeros(*x.shape[:axis], n, *x.shape[axis + 1 :]).index_add(axis, index, x)
    return torch.fft.rfft(torus, dim=axis) if folded else torch.fft.ifft(torus, dim=axis, norm="forward")


def synthesise(x: Tensor, axis: int, n: int, positions: range, folded: bool) -> Tensor:
    """The inverse: the taps at ``positions``, real ones if half of the frequencies are given."""
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


def _product_along(E: Tensor, x: Tensor, axis: int) -> Tensor:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    # along the first axis one product; elsewhere one for each index of the axes before
    flat = x.reshape(prod(before), x.shape[axis], prod(after)) if axis else x.flatten(1)
    return (E @ flat).reshape(*before, len(E), *after)


def _exponentials(
    n: int, positions: range, folded: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``exp(2 pi i u e_t / n)``, one row for each ``u``; kept where tensors are nothing but that."""
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
