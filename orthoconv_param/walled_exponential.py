"""What removal leaves of an exponential between walls: its generator, and operations of aten."""

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from . import runtime
from .action import recurrence
from .action.generator import few_of
from .action.skew import Layout, entering, leaving, skew_kernel
from .checks import at_least_single
from .operators.operator import Action
from .parametrizations import signature
from .parametrizations.annealed import Interpolating
from .parametrizations.partition import Partition
from .parametrizations.registered import is_sharper
from .parametrizations.walled import Norm, WalledGenerator, projected
from .torus.geometry import added, convolve, convolve_as_torch, convolve_transposed, folded, sized, wrapped
from .walled import Guarded


def become(module: Any, made: WalledGenerator, partition: Partition | None, action: Action) -> None:
    """Give a convolution the attributes of a `WalledExponential`.

    Args:
        module: whose weight is an ordinary parameter, the generator.
        made: the parametrization that made it, or blocks of it.
        partition: these blocks; None if all of it is the generator.
        action: of the convolution.
    """
    assert made.geometry is not None
    geometry = action.geometry
    module.norm = made.norm
    module.transposed, module.around = geometry.transposed, action.boundary.is_periodic
    module.numbers = Layout.of(made.geometry, made.geometry.placement).numbers
    module.register_buffer("coin", None if made.base is None else made.base.clone())
    module.share, pretrained = 1.0, None
    if isinstance(made, Interpolating) and made.t is not None:
        module.share, pretrained = made.progress, made.pretrained_share(module.weight.dtype)
    module.blocks, module.channels, free = [], [[], []], None
    if partition is not None:
        if pretrained is not None:
            pretrained = partition.assembled(pretrained, None)
        free = partition.assembled(torch.zeros_like(partition.stacked(module.weight.real)), None)
        free.flatten(0, 1)[partition.free(free.device)] = 1
        module.blocks = [[r.start, r.stop, c.start, c.stop] for r, c in partition.blocks]
        module.channels = [[i for block in side for i in block] for side in partition.channels()]
    module.register_buffer("pretrained", None if pretrained is None else real_view(pretrained))
    module.register_buffer("free", free, persistent=False)
    module.steps = [[*geometry.stride], [*geometry.placement.origin], [*geometry.dilation]]
    module.level, module.coefficients = 0.0, [0.0]
    follow(module)


def real_view(W: Tensor) -> Tensor:
    """Return a weight as real numbers, of which moves drop no imaginary part."""
    return torch.view_as_real(W).contiguous() if W.is_complex() else W


def stacked(weight: Tensor, blocks: list[list[int]]) -> Tensor:
    """Return the blocks of a weight, one after the other; of none all of it. TorchScript compiles this."""
    if len(blocks) == 0:
        return weight
    return torch.cat([weight[b[0] : b[1], b[2] : b[3]] for b in blocks])


def follow(module: Any) -> None:
    """Let the number of terms follow the weight's norm, where that can be read.

    Raises:
        ValueError: if the weight is not finite, or its norm takes more than 200 terms.
    """
    weight = runtime.parameters_of(module)["weight"]  # itself, where `torch.fx` gives a proxy
    assert weight is not None
    if weight.is_meta:
        return
    flaw = runtime.flaw(weight)
    if flaw is not None:
        kind, words = flaw
        raise kind(f"the weight {words}")
    kernel = stacked(at_least_single(weight.detach()), module.blocks)
    generator = module.norm.generator(kernel, weight.dtype, None)
    module.level, module.coefficients = generator.norm, [*generator.coefficients]


@torch.fx.wrap
def convolve_exponential(
    input: Tensor,
    weight: Tensor,
    coin: Tensor | None,
    pretrained: Tensor | None,
    free: Tensor | None,
    bias: Tensor | None,
    series: tuple[float, list[float]],
    numbers: list[list[int]],
    parts: tuple[float, list[list[int]], list[list[int]]],
    steps: tuple[list[list[int]], int, bool, bool],
) -> Tensor:
    """Apply the exponential, and what there is besides. `torch.fx` records it as one call.

    Args:
        input: ``(batch, in, *size)``, or ``(in, *size)``.
        weight: the generator, ``(out, in/groups, *taps)``; outside of the blocks an ordinary kernel.
        coin: matrices that act on each pixel besides, as real numbers; or None.
        pretrained: a kernel that is applied besides, as real numbers; or None.
        free: 1 where the weight is an ordinary kernel, else 0; or None if it is nowhere.
        bias: ``(channels,)``, or None.
        series: a norm that the generator's skew part does not exceed, and the coefficients.
        numbers: `Layout.numbers`.
        parts: the share of the exponential; rows and columns of the blocks, none if all of the weight is
            the generator; and the channels that they give and take.
        steps: stride, padding and dilation of the convolution; its groups, whether it is transposed, and
            whether images are continued around the torus.

    Raises:
        ValueError: if the images are not divisible by the stride, or not of the module's channels or dtype.
    """
    device_type = input.device.type
    reduced = None
    if runtime.is_autocast(device_type) and input.is_floating_point():
        input = input.to(weight.dtype)
        reduced = runtime.reduced_dtype(input)
    fields: Any = weight, coin, pretrained, free, bias, series, numbers, parts, steps, reduced
    with runtime.no_autocast(device_type):
        return convolved(input, *fields)


def convolved(
    input: Tensor,
    weight: Tensor,
    coin: Optional[Tensor],  # noqa: UP045, TorchScript reads no other
    pretrained: Optional[Tensor],  # noqa: UP045
    free: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    series: tuple[float, list[float]],
    numbers: list[list[int]],
    parts: tuple[float, list[list[int]], list[list[int]]],
    steps: tuple[list[list[int]], int, bool, bool],
    reduced: Optional[int],  # noqa: UP045
) -> Tensor:
    """Do what `convolve_exponential` says. TorchScript compiles this.

    The argument more is the dtype to which autocast reduces convolutions; None in TorchScript.
    """
    share, blocks, channels = parts
    groups, transposed, around = steps[1], steps[2], steps[3]
    stride, axes = numbers[0], len(numbers[0])
    single = input.dim() == axes + 1
    x = input.unsqueeze(0) if single else input
    given, taken = weight.size(0), weight.size(1) * groups
    if transposed:
        given, taken = taken, given
    if x.dim() != axes + 2 or x.size(1) != taken or x.dtype != weight.dtype:
        raise ValueError(
            "input should have the module's channels and axes of space, and the weight's dtype"
        )
    x = sized(x, [0] * axes, stride, transposed)
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    w = weight.float() if half else weight
    x = x.float() if half else x
    images = x
    if len(blocks) > 0:
        images = x.index_select(1, torch.tensor(channels[0 if transposed else 1], device=x.device))
    y = exponentiated(images, stacked(w, blocks), coin, series, numbers, transposed, around, reduced)
    if share != 1:
        y = share * y
    ordinary: Optional[Tensor] = None  # noqa: UP045
    if pretrained is not None:
        ordinary = (torch.view_as_complex(pretrained) if w.is_complex() else pretrained).to(w.dtype)
    if free is not None:
        rest = w * free.to(w.dtype)
        ordinary = rest if ordinary is None else rest + ordinary
    if ordinary is not None:
        z = applied(x, ordinary, steps)
        y = added(z, y, channels[1 if transposed else 0]) if len(blocks) > 0 else z + y
    if half:
        y = y.to(input.dtype)
    if bias is not None:
        y = y + bias.reshape([-1] + [1] * axes)
    return y.squeeze(0) if single else y


def applied(x: Tensor, kernel: Tensor, steps: tuple[list[list[int]], int, bool, bool]) -> Tensor:
    """Apply an ordinary kernel to images as torch's module does. TorchScript compiles this."""
    stride, before, dilation = steps[0][0], steps[0][1], steps[0][2]
    groups, transposed, around = steps[1], steps[2], steps[3]
    if not around:
        return convolve_as_torch(x, kernel, stride, before, dilation, groups, transposed)
    axes, sides = len(stride), [0, 0] * len(stride)
    none = [0] * axes
    if transposed:
        y = convolve_transposed(x, kernel, stride, none, none, dilation, groups)
        return folded(y, [x.size(axis + 2) * stride[axis] for axis in range(axes)], before)
    for axis in range(axes):
        at = 2 * (axes - 1 - axis)
        sides[at] = before[axis]
        sides[at + 1] = dilation[axis] * (kernel.size(axis + 2) - 1) - before[axis]
    return convolve(wrapped(x, sides), kernel, stride, none, dilation, groups)


def exponentiated(
    x: Tensor,
    w: Tensor,
    coin: Optional[Tensor],  # noqa: UP045, TorchScript reads no other
    series: tuple[float, list[float]],
    numbers: list[list[int]],
    transposed: bool,
    around: bool,
    reduced: Optional[int],  # noqa: UP045
) -> Tensor:
    """Apply the exponential of a generator, and its coin, to images. TorchScript compiles this."""
    if coin is not None:
        if w.is_complex():
            coin = torch.view_as_complex(coin.unflatten(-1, [-1, 2]))
        coin = coin.to(w.dtype)
    level, coefficients = series
    norm = -level if transposed else level
    B = [b / norm for b in skew_kernel(w, numbers)]
    x = entering(x, coin, numbers, transposed)
    padding, surround = numbers[4], numbers[4][:0]
    if around:
        surround = [0, 0] * len(padding)
        for axis in range(len(padding)):
            surround[2 * axis] = surround[2 * axis + 1] = padding[len(padding) - 1 - axis]
        padding = [0] * len(padding)
    step = recurrence.Step(padding, numbers[5], numbers[1][0], surround)
    if torch.jit.is_scripting() or around:  # type: ignore[attr-defined]
        y = recurrence.series(x, B, coefficients, step)
    else:
        y = _by_hand(x, B, coefficients, step, reduced)
    return leaving(y, coin, numbers, transposed, w.is_complex())


@torch.jit.unused
def _by_hand(
    x: Tensor, B: list[Tensor], coefficients: list[float], step: recurrence.Step, reduced: Any
) -> Tensor:
    rule = recurrence.Series(few_of(tuple(coefficients), reduced), step, reduced)
    return recurrence.applied(rule, x, *B)


_SIGNATURE = {"weight": "generator"}


class WalledExponential(Guarded):
    """A convolution whose exponential acts on images of every size, with an ordinary weight.

        module(x) = exp(T) x + bias,    T the zero-padded convolution with the weight's skew part

    (around a torus, if it was circular). If blocks of the weight were made orthogonal, they are the
    generator, and the rest is an ordinary kernel. If it was on its way from a pretrained weight, that is
    applied too, with the share that it had.

    It is no ``nn.Conv2d``: nothing may be folded into its weight, nor can that be pruned. Made by
    ``torch.nn.utils.parametrize.remove_parametrizations`` of what ``orthogonal(..., boundary="walls")`` or
    `retrofit` has made. **Whatever its weight is, the operator is orthogonal**: after training and loading
    too. Assigning another parameter raises ``TypeError``, as what folds a batch norm into it does; values
    are changed in place. Its checkpoint does not load into a plain convolution, nor the reverse. The number
    of terms follows the weight's norm at each ordinary call. In what is compiled, exported, scripted or
    traced it is that of the last call, load or move before: the result is wrong where the weight's norm has
    grown since by other means, as by an optimizer. Call the module once before.
    """

    way_to_assign = (
        "weight should not be replaced: it is the generator of an exponential, no kernel. Change its "
        "values by load_state_dict or in place, or the module before remove_parametrizations"
    )
    if TYPE_CHECKING:  # TorchScript would read it
        norm: Norm

    weight: Tensor
    coin: Optional[Tensor]  # noqa: UP045, TorchScript reads no other
    pretrained: Optional[Tensor]  # noqa: UP045
    free: Optional[Tensor]  # noqa: UP045
    bias: Optional[Tensor]  # noqa: UP045
    level: float
    coefficients: list[float]
    numbers: list[list[int]]
    share: float
    blocks: list[list[int]]
    channels: list[list[int]]
    steps: list[list[int]]
    groups: int
    transposed: bool
    around: bool

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to images ``(batch, in, *size)`` of every size that the stride divides."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._follow()
        series, parts = (self.level, self.coefficients), (self.share, self.blocks, self.channels)
        steps = (self.steps, self.groups, self.transposed, self.around)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return convolved(
                input, self.weight, self.coin, self.pretrained, self.free, self.bias, series, self.numbers,
                parts, steps, None,
            )  # fmt: skip
        return convolve_exponential(
            input, self.weight, self.coin, self.pretrained, self.free, self.bias, series, self.numbers,
            parts, steps,
        )  # fmt: skip

    @torch.jit.unused
    def _follow(self) -> None:
        if runtime.is_jit_traced():  # which would record how the norm is computed
            with runtime.untransformed():
                follow(self)
        elif not runtime.is_compiling():
            follow(self)

    def __prepare_scriptable__(self) -> "WalledExponential":
        """Let what is scripted have the terms that the present weight needs."""
        follow(self)
        return self

    def get_extra_state(self) -> Tensor:
        """Return what a plain convolution's checkpoint does not have."""
        return signature.encode(_SIGNATURE)

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: it has been looked at before."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + runtime.EXTRA_STATE
        if prefix + "weight" in state_dict and signature.decode(state_dict.get(key)) != _SIGNATURE:
            *_, error_msgs = args
            error_msgs.append(
                f"{prefix}weight: the checkpoint should hold a generator. Found a plain weight: load it "
                "before remove_parametrizations"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.coin is not None and is_sharper(self.coin, state_dict.get(prefix + "coin")):
            self.coin.copy_(projected(self.coin, self.weight.is_complex()))
        follow(self)

    def _apply(self, fn: Any, recurse: bool = True) -> "WalledExponential":
        before, pretrained = self.coin, self.pretrained
        super()._apply(fn, recurse)
        if pretrained is not None and self.pretrained is not None:
            dtype = torch.promote_types(self.weight.dtype.to_real(), torch.float32)
            self.pretrained = pretrained.to(self.weight.device, dtype)
        if before is not None and self.coin is not None:  # never below single precision, nor complex
            dtype = torch.promote_types(self.weight.dtype.to_real(), torch.float32)
            coin = before.to(self.weight.device, dtype)
            self.coin = projected(coin, self.weight.is_complex()) if is_sharper(coin, before) else coin
        self.norm.reader.restart(wait=False)
        follow(self)
        return self

    def extra_repr(self) -> str:
        """Say what ``print`` says of the module."""
        stride, (groups, *_) = self.numbers[:2]
        return (
            f"generator={tuple(self.weight.shape)}, stride={stride}, groups={groups}, "
            f"transposed={self.transposed}, bias={self.bias is not None}, {self._state()}"
        )

    def _state(self) -> str:
        where = "around a torus" if self.around else "between walls"
        part = ", in blocks" if self.blocks else ""
        return f"orthogonal {where}{part}" if self.share == 1 else f"t={self.share:.3g} {where}{part}"
