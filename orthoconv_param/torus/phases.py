"""The polyphase components of images and kernels. TorchScript compiles what is here."""

import torch.nn.functional as F
from torch import Tensor


def split_phases(x: Tensor, stride: list[int]) -> Tensor:
    """Split images ``(batch, channels, *domain)`` into phases ``(batch, channels * s^d, *grid)``.

    Phase ``r`` has the samples ``s q + r``.
    """
    axes = len(stride)
    if max(stride) == 1:
        return x
    order, sizes, channels = [0, 1], [x.size(0), x.size(1)], x.size(1)
    coarse: list[int] = []
    for axis in range(axes):  # each axis becomes (coarse, phase)
        coarse.append(x.size(axis + 2) // stride[axis])
        sizes.extend([coarse[axis], stride[axis]])
        channels *= stride[axis]
    result = [x.size(0), channels]
    result.extend(coarse)
    order.extend([3 + 2 * axis for axis in range(axes)])
    order.extend([2 + 2 * axis for axis in range(axes)])
    return x.reshape(sizes).permute(order).reshape(result)


def join_phases(x: Tensor, stride: list[int]) -> Tensor:
    """Return the images that have these phases: the inverse of `split_phases`."""
    axes = len(stride)
    if max(stride) == 1:
        return x
    phases = 1
    for s in stride:
        phases *= s
    sizes = [x.size(1) // phases]
    sizes.extend(stride)
    x = x.unflatten(1, sizes)
    order = [0, 1]
    for axis in range(axes):  # (coarse, phase) pairs
        order.extend([2 + axes + axis, 2 + axis])
    x = x.permute(order)
    for axis in range(axes):
        x = x.flatten(2 + axis, 3 + axis)
    return x


def spread(kernel: Tensor, axis: int, dilation: int) -> Tensor:
    """Return the kernel with ``dilation - 1`` zeros after each of its taps, along one axis."""
    if dilation == 1:
        return kernel
    sides = [0, 0] * (kernel.dim() - axis - 1)  # for `pad`, which begins with the last axis
    sides.extend([0, dilation - 1])
    return F.pad(kernel.unsqueeze(axis + 1), sides).flatten(axis, axis + 1)
