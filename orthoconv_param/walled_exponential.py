"""What removal leaves of an exponential between walls: its generator, and operations of aten."""

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from . import runtime
from .action import recurrence
from .action.generator import few_of
from .action.skew import Layout, entering, leaving, skew_kernel
from .checks import at_least_single
from .parametrizations.walled import Norm, WalledGenerator, projected
from .torus.geometry import Geometry, sized


def become(module: Any, made: WalledGenerator, geometry: Geometry) -> None:
    """Give a convolution the attributes of a `WalledExponential`.

    Args:
        module: whose weight is an ordinary parameter, the generator.
        made: the parametrization that it had.
        geometry: of the convolution.
    """
    assert made.geometry is not None
    module.norm = made.norm
    module.transposed = geometry.transposed
    module.numbers = Layout.of(made.geometry, made.geometry.placement).numbers
    module.register_buffer("coin", None if made.base is None else made.base.clone())
    module.level, module.coefficients = 0.0, [0.0]
    follow(module)


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
    generator = module.norm.generator(at_least_single(weight.detach()), weight.dtype, None)
    module.level, module.coefficients = generator.norm, [*generator.coefficients]


@torch.fx.wrap
def convolve_exponential(
    input: Tensor,
    weight: Tensor,
    coin: Tensor | None,
    bias: Tensor | None,
    level: float,
    coefficients: list[float],
    numbers: list[list[int]],
    transposed: bool,
) -> Tensor:
    """Apply the exponential between walls. `torch.fx` records it as one call.

    Args:
        input: ``(batch, in, *size)``, or ``(in, *size)``.
        weight: the generator, ``(out, in/groups, *taps)``.
        coin: matrices that act on each pixel besides, as real numbers; or None.
        bias: ``(channels,)``, or None.
        level: a norm that the generator's skew part does not exceed.
        coefficients: of the series.
        numbers: `Layout.numbers`.
        transposed: whether the convolution is transposed.

    Raises:
        ValueError: if the images are not divisible by the stride, or not of the module's channels or dtype.
    """
    device_type = input.device.type
    reduced = None
    if runtime.is_autocast(device_type) and input.is_floating_point():
        input = input.to(weight.dtype)
        reduced = runtime.reduced_dtype(input)
    fields: Any = weight, coin, bias, level, coefficients, numbers, transposed, reduced
    with runtime.no_autocast(device_type):
        return convolved(input, *fields)


def convolved(
    input: Tensor,
    weight: Tensor,
    coin: Optional[Tensor],  # noqa: UP045, TorchScript reads no other
    bias: Optional[Tensor],  # noqa: UP045
    level: float,
    coefficients: list[float],
    numbers: list[list[int]],
    transposed: bool,
    reduced: Optional[int],  # noqa: UP045
) -> Tensor:
    """Do what `convolve_exponential` says. TorchScript compiles this.

    The argument more is the dtype to which autocast reduces convolutions; None in TorchScript.
    """
    stride, axes = numbers[0], len(numbers[0])
    single = input.dim() == axes + 1
    x = input.unsqueeze(0) if single else input
    taken = numbers[1][0] * (numbers[1][1] if transposed else numbers[1][2])
    if not transposed:
        for s in stride:
            taken = taken // s
    if x.dim() != axes + 2 or x.size(1) != taken or x.dtype != weight.dtype:
        raise ValueError(
            "input should have the module's channels and axes of space, and the weight's dtype"
        )
    x = sized(x, [0] * axes, stride, transposed)
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    w = weight.float() if half else weight
    x = x.float() if half else x
    if coin is not None:
        if w.is_complex():
            coin = torch.view_as_complex(coin.unflatten(-1, [-1, 2]))
        coin = coin.to(w.dtype)
    norm = -level if transposed else level
    B = [b / norm for b in skew_kernel(w, numbers)]
    x = entering(x, coin, numbers, transposed)
    surround: list[int] = []
    step = recurrence.Step(numbers[4], numbers[5], numbers[1][0], surround)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        y = recurrence.series(x, B, coefficients, step)
    else:
        y = _by_hand(x, B, coefficients, step, reduced)
    y = leaving(y, coin, numbers, transposed, w.is_complex())
    if half:
        y = y.to(input.dtype)
    if bias is not None:
        y = y + bias.reshape([-1] + [1] * axes)
    return y.squeeze(0) if single else y


@torch.jit.unused
def _by_hand(
    x: Tensor, B: list[Tensor], coefficients: list[float], step: recurrence.Step, reduced: Any
) -> Tensor:
    rule = recurrence.Series(few_of(tuple(coefficients), reduced), step, reduced)
    return recurrence.applied(rule, x, *B)


class WalledExponential(nn.Module):
    """A convolution whose exponential acts between walls, with an ordinary weight.

        module(x) = exp(T) x + bias,    T the zero-padded convolution with the weight's skew part

    It is no ``nn.Conv2d``: nothing may be folded into its weight. Made by
    ``torch.nn.utils.parametrize.remove_parametrizations`` of what ``orthogonal(..., boundary="walls")`` has
    made. **Whatever its weight is, the operator is orthogonal**: after training, loading and assignment
    too. The number of terms follows the weight's norm at each ordinary call. In what is compiled, exported,
    scripted or traced it is that of the last call, load or move before: the result is wrong where the
    weight's norm has grown since by other means, as by an optimizer. Call the module once before.
    """

    if TYPE_CHECKING:  # TorchScript would read it
        norm: Norm

    weight: Tensor
    coin: Optional[Tensor]  # noqa: UP045, TorchScript reads no other
    bias: Optional[Tensor]  # noqa: UP045
    level: float
    coefficients: list[float]
    numbers: list[list[int]]
    transposed: bool

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to images ``(batch, in, *size)`` of every size that the stride divides."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return convolved(
                input, self.weight, self.coin, self.bias, self.level, self.coefficients, self.numbers,
                self.transposed, None,
            )  # fmt: skip
        self._follow()
        return convolve_exponential(
            input, self.weight, self.coin, self.bias, self.level, self.coefficients, self.numbers,
            self.transposed,
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

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        follow(self)

    def _apply(self, fn: Any, recurse: bool = True) -> "WalledExponential":
        before = self.coin
        super()._apply(fn, recurse)
        if before is not None and self.coin is not None:  # never below single precision, nor complex
            dtype = torch.promote_types(self.weight.dtype.to_real(), torch.float32)
            coin = before.to(self.weight.device, dtype)
            rises = torch.finfo(dtype).eps < torch.finfo(before.dtype).eps and not coin.is_meta
            self.coin = projected(coin, self.weight.is_complex()) if rises else coin
        self.norm.reader.restart(wait=False)
        follow(self)
        return self

    def extra_repr(self) -> str:
        """Say what ``print`` says of the module."""
        stride, (groups, *_) = self.numbers[:2]
        return (
            f"generator={tuple(self.weight.shape)}, stride={stride}, groups={groups}, "
            f"transposed={self.transposed}, bias={self.bias is not None}, orthogonal between walls"
        )
