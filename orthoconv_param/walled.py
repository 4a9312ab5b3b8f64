"""What removal leaves of a split kernel between walls: its weight, its edges, and operations of aten."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parametrizations.partition import Partition
from .split.mending import Mended, convolved_to, mend, pads
from .torus.geometry import Geometry, added, convolve, sized


def become(module: Any, m: Mended, geometry: Geometry, share: float, partition: Partition | None) -> None:
    """Give a convolution the attributes of a `WalledConvolution`.

    Args:
        module: whose weight is an ordinary parameter, the kernel.
        m: what mends the edges.
        geometry: of the convolution.
        share: with which they are mended.
        partition: the blocks whose edges these are; None if they are all of it.
    """
    parts = [x for line in zip(m.kernels, m.ends, strict=True) for x in line]
    parts += [x for short in m.shorts for x in short]
    parts.append(m.frame)
    weight = module.weight
    missing = [k % 2 == 0 and s == 1 for k, s in zip(weight.shape[2:], geometry.stride, strict=True)]
    if any(missing):  # an even kernel: a tap of zeros before makes it stand as far before as behind
        weight.data = F.pad(weight.data, [int(n) for m in missing[::-1] for n in (m, 0)])
    flat = torch.cat([x.detach().flatten() for x in parts]).to(weight.dtype)
    module.edges = nn.Parameter(flat, requires_grad=weight.requires_grad)
    module.shapes = [[*x.shape] for x in parts]
    module.lines = [[axis, len(short)] for axis, short in zip(m.axes, m.shorts, strict=True)]
    module.steps = [
        [*geometry.stride], pads(tuple(weight.shape[2:]), geometry), [*geometry.dilation],
    ]  # fmt: skip
    module.share, module.channels = share, [[], []]
    if partition is not None:
        given, taken = ([i for block in side for i in block] for side in partition.channels())
        module.channels = [taken, given] if geometry.transposed else [given, taken]


@torch.fx.wrap
def convolve_walled(
    input: Tensor,
    weight: Tensor,
    edges: Tensor,
    bias: Optional[Tensor],  # noqa: UP045, TorchScript reads no other
    shapes: list[list[int]],
    lines: list[list[int]],
    steps: list[list[int]],
    groups: int,
    transposed: bool,
    share: float,
    channels: list[list[int]],
) -> Tensor:
    """Apply a split kernel between walls. `torch.fx` records it as one call, and TorchScript compiles it.

    Args:
        input: ``(batch, in, *size)``, or ``(in, *size)``.
        weight: ``(out, in/groups, *taps)``.
        edges: what they take, in one axis.
        bias: ``(channels,)``, or None.
        shapes: of the parts of the edges: kernel and ends of each line, short lines, frame of patches.
        lines: axis of space, and number of pairs.
        steps: stride, padding and dilation.
        groups: of the convolution.
        transposed: whether it is transposed.
        share: with which edges are mended.
        channels: that edges give, and take; none for all.

    Raises:
        ValueError: if the images are not divisible by the stride.
    """
    parts: list[Tensor] = []
    at = 0
    for shape in shapes:
        count = 1
        for n in shape:
            count *= n
        parts.append(edges.narrow(0, at, count).reshape(shape))
        at += count
    kernels: list[Tensor] = []
    ends: list[Tensor] = []
    shorts: list[list[Tensor]] = []
    axes: list[int] = []
    first = 2 * len(lines)
    for i, line in enumerate(lines):
        axes.append(line[0])
        kernels.append(parts[2 * i])
        ends.append(parts[2 * i + 1])
        shorts.append(parts[first : first + line[1]])
        first += line[1]
    stride, padding, dilation = steps[0], steps[1], steps[2]
    single = input.dim() == len(stride) + 1
    x = input.unsqueeze(0) if single else input
    x = sized(x, [0] * len(stride), stride, transposed)
    if transposed:
        size = [x.size(axis + 2) * stride[axis] for axis in range(len(stride))]
        y = convolved_to(x, weight, stride, padding, dilation, groups, size)
    else:
        y = convolve(x, weight, stride, padding, dilation, groups)
    some = len(channels[0]) > 0
    if some or share != 1:
        given, taken = y, x
        if some:
            given = y.index_select(1, torch.tensor(channels[0], device=x.device))
            taken = x.index_select(1, torch.tensor(channels[1], device=x.device))
        none = torch.zeros_like(given)
        mended = mend(taken, none, kernels, ends, shorts, parts[-1], axes, stride, dilation, transposed)
        y = added(y, share * mended, channels[0]) if some else y + share * mended
    else:
        y = mend(x, y, kernels, ends, shorts, parts[-1], axes, stride, dilation, transposed)
    if bias is not None:
        y = y + bias.reshape([-1] + [1] * len(stride))
    return y.squeeze(0) if single else y


class Guarded(nn.Module):
    """A module whose weight is not all that it convolves with: nothing may be folded into it, or pruned."""

    way_to_assign = ""  # what an error says is to be done instead

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and not self.__dict__.get("loading", False):
            raise TypeError(self.way_to_assign)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, but not the one that pruning begins with."""
        if name == "weight_orig":
            raise TypeError(self.way_to_assign)
        super().register_parameter(name, param)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["loading"] = True  # with assign=True torch sets attributes
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self.__dict__["loading"]


class WalledConvolution(Guarded):
    """A convolution that is orthogonal between walls, with an ordinary weight.

    It is no ``nn.Conv2d``: nothing may be folded into its weight alone, since that does not reach its
    edges. Made by ``torch.nn.utils.parametrize.remove_parametrizations`` of what
    ``orthogonal(..., method="split", boundary="walls")`` or `retrofit` has made. Its parameters are
    ``weight``, ``edges`` and ``bias``. They are free: training them does not keep the operator orthogonal.
    Assigning the weight alone raises ``TypeError``, as what folds a batch norm into it does.
    """

    way_to_assign = (
        "weight should not be assigned without edges, which belong to it: load both by load_state_dict, or "
        "change the module before remove_parametrizations. Found it alone"
    )

    weight: Tensor
    edges: Tensor
    bias: Optional[Tensor]  # noqa: UP045, TorchScript reads no other
    shapes: list[list[int]]
    lines: list[list[int]]
    steps: list[list[int]]
    groups: int
    transposed: bool
    share: float
    channels: list[list[int]]

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to images ``(batch, in, *size)`` of every size that the stride divides."""
        return convolve_walled(
            input, self.weight, self.edges, self.bias, self.shapes, self.lines, self.steps, self.groups,
            self.transposed, self.share, self.channels,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Say what ``print`` says of the module."""
        size = tuple(self.weight.shape)
        stride, padding, dilation = self.steps
        return (
            f"weight={size}, stride={stride}, padding={padding}, dilation={dilation}, "
            f"groups={self.groups}, transposed={self.transposed}, bias={self.bias is not None}, "
            f"{self._state()}"
        )

    def _state(self) -> str:
        part = ", in blocks" if self.channels[0] else ""
        return f"orthogonal between walls{part}" if self.share == 1 else f"t={self.share:.3g}{part}"
