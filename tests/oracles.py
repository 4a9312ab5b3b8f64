"""What a convolution is, without the package: dense matrices, by pushing the identity through."""

from itertools import product

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor


def periodic(
    x: Tensor,
    kernel: Tensor,
    stride: tuple[int, ...],
    groups: int = 1,
    dilation: tuple[int, ...] | None = None,
    before: tuple[int, ...] | None = None,
) -> Tensor:
    """torch's own convolution of an image that repeats.

    The first tap stands ``before`` samples before the output's position: by default, the kernel is
    centred at ``(k - 1) // 2``.
    """
    taps, domain = kernel.shape[2:], x.shape[2:]
    dilation = dilation or (1,) * len(taps)
    before = before or tuple(r * ((k - 1) // 2) for k, r in zip(taps, dilation, strict=True))
    axes = zip(taps, domain, dilation, before, strict=True)
    for axis, (k, n, r, b) in enumerate(axes, start=2):
        x = x.index_select(axis, torch.arange(-b, n - b + r * (k - 1)) % n)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
    return convolve(x, kernel, stride=stride, groups=groups, dilation=dilation)


def dense(
    kernel: Tensor,
    domain: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    groups: int = 1,
    dilation: tuple[int, ...] | None = None,
    before: tuple[int, ...] | None = None,
) -> Tensor:
    """The operator's matrix, from ``in * prod(domain)`` numbers to ``out * prod(domain / stride)``."""
    stride = stride or (1,) * len(domain)
    columns = kernel.shape[1] * groups * int(np.prod(domain))
    eye = torch.eye(columns, dtype=kernel.dtype).reshape(columns, -1, *domain)
    return periodic(eye, kernel, stride, groups, dilation, before).reshape(columns, -1).mT


def operator(module: torch.nn.Module, domain: tuple[int, ...]) -> Tensor:
    """The matrix of what a module does, its bias aside: the identity pushed through its own forward."""
    size = domain
    if module.transposed:
        size = tuple(n // s for n, s in zip(domain, module.stride, strict=True))
    dtype = module.bias.dtype if module.bias is not None else next(module.parameters()).dtype
    eye = torch.eye(module.in_channels * int(np.prod(size)), dtype=dtype)
    with torch.no_grad():
        images = module(eye.reshape(len(eye), -1, *size))
        return (images - module(torch.zeros(1, module.in_channels, *size, dtype=dtype))).flatten(1).mT


def fed(geometry, domain: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the images that a convolution takes for a fine grid."""
    return geometry.coarse(domain) if geometry.transposed else domain


def phases_first(channels: int, domain: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The permutation of a strided convolution's input into (channel, phase, coarse position)."""
    index = torch.arange(channels * int(np.prod(domain))).reshape(channels, *domain)
    components = [
        index[(slice(None), *(slice(r, None, s) for r, s in zip(phase, stride, strict=True)))]
        for phase in product(*map(range, stride))
    ]
    return torch.stack(components, 1).flatten()


def hartley(generator: Tensor) -> Tensor:
    """The kernel that a packed real generator stands for, by the definition: a sum of cosines and sines."""
    taps = generator.shape[2:]
    kernel = torch.zeros_like(generator)
    for d in product(*map(range, taps)):
        offset = [x - (k - 1) // 2 for x, k in zip(d, taps, strict=True)]
        for w in product(*map(range, taps)):
            angle = 2 * np.pi * sum(a * b / k for a, b, k in zip(offset, w, taps, strict=True))
            wave = (np.cos(angle) + np.sin(angle)) / np.sqrt(np.prod(taps))
            kernel[(..., *d)] += generator[(..., *w)] * wave
    return kernel


def skew(M: Tensor) -> Tensor:
    return (M - M.mH) / 2


def defect(M: Tensor) -> float:
    """``max |singular value - 1|`` of a dense matrix."""
    return (torch.linalg.svdvals(M) - 1).abs().max().item()


def random(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def between_walls(operator, domain: tuple[int, ...], dtype=torch.float64) -> Tensor:
    """The matrix of a split kernel between walls: the product of its factors, pixel by pixel."""
    chain, factors = operator.weight.factors()
    if factors.coins[0].is_complex():
        dtype = torch.promote_types(dtype, torch.complex64)
    dilation = operator.geometry.dilation
    stride = operator.geometry.stride
    shape = (chain.groups * chain.columns, *domain)
    columns = int(np.prod(shape))
    images = torch.eye(columns, dtype=dtype).reshape(columns, *shape)
    results = []
    for g, x in enumerate(images.split(chain.columns, 1)):
        coins = [coin[g].detach().to(dtype) for coin in factors.coins]
        pairs = [pair.detach().to(dtype) for pair in factors.pairs[g]]
        last = coins.pop()
        if coins:  # else the kernel is patches alone
            x = torch.einsum("ij,bj...->bi...", coins[0], x)
        for step, coin in zip(chain.steps, [*coins[1:], None][: len(chain.steps)], strict=True):
            x = pair_between_walls(x, pairs.pop(0), 2 + step.axis, dilation[step.axis])
            if coin is not None:
                x = torch.einsum("ij,bj...->bi...", coin, x)
        # the last coin reads the patch at each coarse pixel
        patch = last.unflatten(1, (-1, *chain.patch))
        taken = torch.zeros(
            len(x), len(last), *(n // s for n, s in zip(domain, stride, strict=True)), dtype=dtype
        )
        for place in np.ndindex(*chain.patch):
            samples = x[(..., *(slice(p, None, s) for p, s in zip(place, stride, strict=True)))]
            taken += torch.einsum("ij,bj...->bi...", patch[(..., *place)], samples)
        results.append(taken)
    return torch.cat(results, 1).flatten(1).mT


def exponential_between_walls(plain: torch.nn.Module, domain: tuple[int, ...], coin=None) -> Tensor:
    """The matrix of the exponential of a zero-padded convolution's skew part, made square by zeros.

    Args:
        plain: torch's own module, with the generator as its weight; not transposed.
        domain: of its images.
        coin: ``(groups, m, m)``: acts before the exponential if there are more columns than rows, else
            after.
    """
    M, groups, stride = operator(plain, domain), plain.groups, tuple(plain.stride)
    points = int(np.prod([n // s for n, s in zip(domain, stride, strict=True)]))
    phases = phases_first(plain.in_channels, domain, stride)
    M = M[:, phases].reshape(groups, -1, points, groups, M.shape[1] // groups // points, points)
    rows, columns = M.shape[1], M.shape[4]
    m = max(rows, columns)
    square = torch.zeros(groups, m, points, groups, m, points, dtype=M.dtype)
    square[:, :rows, :, :, :columns] = M
    A = skew(square.reshape(groups * m * points, -1))
    Q = torch.from_numpy(scipy.linalg.expm(A.numpy()))
    if coin is not None:
        C = torch.block_diag(*coin)
        C = torch.kron(C, torch.eye(points, dtype=C.dtype))
        Q = C @ Q if rows >= columns else Q @ C
    Q = Q.reshape(groups, m, points, groups, m, points)[:, :rows, :, :, :columns]
    Q = Q.reshape(groups * rows * points, -1)
    return Q[:, torch.argsort(phases)]


def pair_between_walls(x: Tensor, pair: Tensor, axis: int, spacing: int) -> Tensor:
    """Each ``A`` with the ``B`` at the next pixel of its line; what has no partner is left alone."""
    half, y = x.shape[1] // 2, x.clone()
    for p in range(x.shape[axis] - spacing):
        A, B = x.select(axis, p)[:, :half], x.select(axis, p + spacing)[:, half:]
        joint = torch.einsum("ij,bj...->bi...", pair, torch.cat([A, B], 1))
        y.select(axis, p)[:, :half] = joint[:, :half]
        y.select(axis, p + spacing)[:, half:] = joint[:, half:]
    return y
