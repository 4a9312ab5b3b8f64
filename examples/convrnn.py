"""The network of the paper: a convolutional recurrent net whose state neither explodes nor decays.

On a lattice of 1 to 3 dimensions, which is periodic (M. O. Magnasco, arXiv:2302.07396) or ends at walls:

    h(t+1) = phi(U * h(t) + V * x(t))

`U` is an orthogonal convolution if the state is real, a unitary one if it is complex:
`orthogonal(nn.Conv2d(...), boundary=...)`, and nothing else. `phi` acts on each number of the state, and
keeps its phase (of a real one, its sign).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orthoconv_param import generators, orthogonal

Method = Literal["exponential", "split"]  # of `orthogonal`
Boundary = Literal["circular", "walls"]  # of `orthogonal`
PADDING: dict[Boundary, Literal["circular", "zeros"]] = {"circular": "circular", "walls": "zeros"}


def convolution(
    axes: int,
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    boundary: Boundary = "circular",
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Return an ordinary convolution, three taps wide: periodic, or between walls zero-padded."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    mode = PADDING[boundary]
    return kind(inputs, outputs, 3, padding=1, padding_mode=mode, bias=bias, groups=groups, dtype=dtype)


class ModReLU(nn.Module):
    """The map ``phi(z) = z/|z| relu(|z| + b)``, with a ``b`` for each channel, at first 0.

    Where ``|z| < 1e-5`` it is linear, so that it is continuous at zero. (Arjovsky et al., arXiv:1511.06464)
    """

    def __init__(self, channels: int, axes: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(channels, *[1] * axes, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Apply `phi` to ``(batch, channels, *size)``."""
        return z * torch.relu(1 + self.b / z.abs().clamp_min(1e-5))


class Sigmoid(nn.Module):
    """The map ``phi(z) = z / sqrt(1 + |z|^2)``: the modulus saturates at 1.

    (Chandra and Magnasco, arXiv:2405.13854)
    """

    def forward(self, z: Tensor) -> Tensor:
        """Apply `phi` to numbers, real or complex."""
        return z * torch.rsqrt(1 + z.abs().square())


class Cell(nn.Module):
    """One step of a recurrent net: ``cell(x, state)`` is the state after the frame ``x``.

    `None` is a blank frame. Others are ``(batch, inputs, *size)``, states
    ``(batch, memories * channels, *size)``.
    """

    memories = 1  # tensors of the state, one after the other; the first is what others see
    input: nn.Module  # the convolution of frames

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def start(self, batch: int, size: Sequence[int]) -> Tensor:
        """Return the state before the first frame: zeros."""
        weight = self.input.get_parameter("weight")
        return weight.new_zeros(batch, self.memories * self.channels, *size)

    def output(self, state: Tensor) -> Tensor:
        """Return the part of a state that others see, ``(batch, channels, *size)``."""
        return state[:, : self.channels]

    def recurrent_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that want a smaller learning rate, the more steps there are."""
        return []


class ConvRNNCell(Cell):
    """The cell ``h(t+1) = phi(U * h(t) + V * x(t))``, on images of every size.

    Args:
        inputs: channels of `x`.
        channels: of the state.
        axes: of the lattice, 1 to 3.
        phi: ``"modrelu"``, ``"sigmoid"`` or ``"identity"``.
        dtype: of the state, by default torch's default dtype; a complex one makes `U` unitary.
        bias: True to add a constant for each channel before `phi`.
        spread: standard deviation of the generator's initial values. `U` is the generator's exponential,
            or a product of several: near 0, it is near the identity. By default `U` is what `orthogonal`
            makes of torch's own values for a convolution.
        groups: of the channels: that many independent networks, side by side.
        method: of `orthogonal`.
        boundary: of the images. Between walls `U` is orthogonal on the image itself, `V` is zero-padded.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        axes: int = 2,
        phi: str = "modrelu",
        dtype: torch.dtype | None = None,
        bias: bool = False,
        spread: float | None = None,
        groups: int = 1,
        method: Method = "exponential",
        boundary: Boundary = "circular",
    ) -> None:
        super().__init__(channels)
        dtype = dtype or torch.get_default_dtype()
        kinds: dict[str, Callable[[], nn.Module]] = {
            "modrelu": lambda: ModReLU(channels, axes, dtype.to_real()),
            "sigmoid": Sigmoid,
            "identity": nn.Identity,
        }
        if phi not in kinds:
            raise ValueError(f"phi should be one of {list(kinds)}. Found {phi!r}")
        make = partial(convolution, axes, groups=groups, dtype=dtype, boundary=boundary)
        recurrence = make(channels, channels, bias=bias)
        self.input = make(inputs, channels, bias=False)
        if spread is not None:
            nn.init.normal_(recurrence.weight, std=spread)
        self.recurrence = orthogonal(recurrence, method=method, boundary=boundary)
        if spread is not None and method == "split":  # whose generator is not the weight
            split: Any = self.get_submodule("recurrence.parametrizations.weight.0")
            recurrence.weight = split.sample("identity", partial(nn.init.normal_, std=spread))
        self.phi = kinds[phi]()

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        """Return the next state."""
        z = self.recurrence(h)
        return self.phi(z if x is None else z + self.input(x.to(z.dtype)))

    def recurrent_parameters(self) -> list[nn.Parameter]:
        """Return the generator of `U`, and the parameters of `phi`."""
        return [*generators(self), *self.phi.parameters()]


class Recurrent(nn.Module):
    """A cell, and a module that reads its last state. Of a complex result the real part is taken."""

    def __init__(self, cell: Cell, read: nn.Module) -> None:
        super().__init__()
        self.cell, self.read = cell, read

    def forward(self, frames: Sequence[Tensor | None], states: list[Tensor] | None = None) -> Tensor:
        """Return what is read after the last frame.

        Args:
            frames: one for each step; the first is not a blank one.
            states: a list to which the state after each frame is appended.
        """
        first = frames[0]
        if first is None:
            raise ValueError("the first frame should be a tensor, since it tells the size")
        state = self.cell.start(len(first), first.shape[2:])
        with parametrize.cached():  # the exponential is computed once, not once a frame
            for x in frames:
                state = self.cell(x, state)
                if states is not None:
                    states.append(state)
        y = self.read(self.cell.output(state))
        return y.real if y.is_complex() else y
