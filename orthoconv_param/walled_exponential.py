"""What removal leaves of an exponential between walls: its generator, and operations of aten."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from . import runtime
from .action import recurrence
from .action.skew import Layout, entering, leaving, skew_kernel
from .checks import at_least_single
from .parametrizations.walled import WalledGenerator
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
    module.register_buffer("coin", None)
    coin = made.coin(module.weight.dtype)
    if coin is not None:
        module.coin = torch.view_as_real(coin).flatten(2) if coin.is_complex() else coin
    module.level, module.coefficients = 0.0, [0.0]
    follow(module)


def follow(module: Any) -> None:
    """Let the number of terms follow the weight's norm, where that can be read.

    Raises:
        ValueError: if the weight is not finite, or its norm takes more than 200 terms.
    """
    weight = module.weight
    flaw = runtime.flaw(weight)
    if flaw is not None:
        kind, words = flaw
        raise kind(f"the weight {words}")
    generator = module.norm.generator(at_least_single(weight.detach()), weight.dtype, None)
    if generator.norm != module.level or not module.coefficients[-1]:
        module.level, module.coefficients = generator.norm, [*generator.coefficients]


@torch.fx.wrap
def convolve_exponential(
    input: Tensor,
    weight: Tensor,
    coin: Optional[Tensor],  # noqa: UP045, TorchScript reads no other
    bias: Optional[Tensor],  # noqa: UP045
    level: float,
    coefficients: list[float],
    numbers: list[list[int]],
    transposed: bool,
) -> Tensor:
    """Apply the exponential between walls. `torch.fx` records it as one call, and TorchScript compiles it.

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
        ValueError: if the images are not divisible by the stride.
    """
    stride, axes = numbers[0], len(numbers[0])
    single = input.dim() == axes + 1
    x = input.unsqueeze(0) if single else input
    x = sized(x, [0] * axes, stride, transposed)
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    w = weight.float() if half else weight
    x = x.float() if half else x
    if coin is not None:
        coin = torch.view_as_complex(coin.unflatten(-1, [-1, 2])) if w.is_complex() else coin.to(w.dtype)
    norm = -level if transposed else level
    B = [b / norm for b in skew_kernel(w, numbers)]
    x = entering(x, coin, numbers, transposed)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        surround: list[int] = []
        y = recurrence.series(x, B, coefficients, numbers[4], numbers[5], numbers[1][0], surround)
    else:
        y = _by_hand(x, B, coefficients, numbers)
    y = leaving(y, coin, numbers, transposed, w.is_complex())
    if bias is not None:
        y = y + bias.reshape([-1] + [1] * axes)
    if half:
        y = y.to(input.dtype)
    return y.squeeze(0) if single else y


@torch.jit.unused
def _by_hand(x: Tensor, B: list[Tensor], coefficients: list[float], numbers: list[list[int]]) -> Tensor:
    rule = recurrence.Series(
        tuple(coefficients), tuple(numbers[4]), tuple(numbers[5]), numbers[1][0], (), None
    )
    with runtime.no_autocast(x.device.type):
        return recurrence.applied(rule, x, *B)


class WalledExponential(nn.Module):
    """A convolution whose exponential acts between walls, with an ordinary weight.

        module(x) = exp(T) x + bias,    T the zero-padded convolution with the weight's skew part

    It is no ``nn.Conv2d``: nothing may be folded into its weight. Made by
    ``torch.nn.utils.parametrize.remove_parametrizations`` of what ``orthogonal(..., boundary="walls")`` has
    made. **Whatever its weight is, the operator is orthogonal**: after training and assignment too. The
    number of terms follows the weight's norm. In what is exported, scripted or traced it stays.
    """

    weight: Tensor
    coin: Optional[Tensor]  # noqa: UP045, TorchScript reads no other
    bias: Optional[Tensor]  # noqa: UP045
    level: float
    coefficients: list[float]
    numbers: list[list[int]]
    transposed: bool

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to images ``(batch, in, *size)`` of every size that the stride divides."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._follow(input)
        return convolve_exponential(
            input, self.weight, self.coin, self.bias, self.level, self.coefficients, self.numbers,
            self.transposed,
        )  # fmt: skip

    @torch.jit.unused
    def _follow(self, input: Any) -> None:
        if not isinstance(input, torch.fx.Proxy):
            follow(self)

    def extra_repr(self) -> str:
        """Say what ``print`` says of the module."""
        stride, (groups, *_) = self.numbers[:2]
        return (
            f"generator={tuple(self.weight.shape)}, stride={stride}, groups={groups}, "
            f"transposed={self.transposed}, bias={self.bias is not None}, orthogonal between walls"
        )
