"""What people use today, as cells for `convrnn.Recurrent`: ConvLSTM, ConvGRU, plain ConvRNN, expRNN.

Convolutions have three taps an axis, made by `convrnn.convolution`: periodic or zero-padded; ``groups`` are
independent networks, side by side.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import geotorch
import torch
from convrnn import Boundary, Cell, ModReLU, convolution
from torch import Tensor, nn

from orthoconv_param import expm_skew


class _Gated(Cell):
    """A cell with a convolution of input and one of state, of ``gates`` outputs for each channel."""

    def __init__(
        self, inputs: int, channels: int, gates: int, axes: int, groups: int, boundary: Boundary
    ) -> None:
        super().__init__(channels)
        self.gates, self.groups = gates, groups
        make = partial(convolution, axes, groups=groups, boundary=boundary)
        self.input = make(inputs, gates * channels, bias=False)
        self.recurrence = make(channels, gates * channels)

    def arguments(self, x: Tensor | None, h: Tensor) -> list[Tensor]:
        """Return the arguments of the gates' functions, gate by gate.

        Among the convolutions' outputs, all gates of a group come before those of the next.
        """
        z = self.recurrence(h)
        z = z if x is None else z + self.input(x)
        return [gate.flatten(1, 2) for gate in z.unflatten(1, (self.groups, self.gates, -1)).unbind(2)]


class PlainConvRNNCell(_Gated):
    """The cell ``h(t+1) = tanh(W * h(t) + V * x(t) + b)``.

    With ``identity``, `W` starts as the identity and `b` as zero, and both are trained slowly, as
    orthogonal kernels are. Any difference from an orthogonal network is then due to orthogonality.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        axes: int = 2,
        groups: int = 1,
        boundary: Boundary = "circular",
        identity: bool = False,
    ) -> None:
        super().__init__(inputs, channels, 1, axes, groups, boundary)
        self.identity = identity
        if identity:
            nn.init.dirac_(self.recurrence.weight, groups)
            nn.init.zeros_(self.recurrence.get_parameter("bias"))

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        """Return the next state."""
        return self.arguments(x, h)[0].tanh()

    def recurrent_parameters(self) -> list[nn.Parameter]:
        """Return `W` and `b`, if they are to be trained slowly."""
        return list(self.recurrence.parameters()) if self.identity else []


class ConvLSTMCell(_Gated):
    """ConvLSTM without peepholes (Shi et al., arXiv:1506.04214).

    The forget gate's bias is 1 at first. With a ``delay``, the biases of the forget and input gates are
    such that memories last up to so many steps (chrono initialisation: Tallec and Ollivier,
    arXiv:1804.11188).
    """

    memories = 2

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        axes: int = 2,
        groups: int = 1,
        boundary: Boundary = "circular",
        delay: int | None = None,
    ) -> None:
        super().__init__(inputs, channels, 4, axes, groups, boundary)
        write, keep, _, _ = self.recurrence.get_parameter("bias").data.view(groups, 4, -1).unbind(1)
        keep.fill_(1)
        if delay is not None:
            keep.uniform_(1, max(delay - 1, 1)).log_()
            write.copy_(-keep)

    def forward(self, x: Tensor | None, state: Tensor) -> Tensor:
        """Return the next state: its first half is the output, the second the memory."""
        h, c = state.chunk(2, 1)
        write, keep, show, value = self.arguments(x, h)
        c = keep.sigmoid() * c + write.sigmoid() * value.tanh()
        return torch.cat([show.sigmoid() * c.tanh(), c], 1)


class ConvGRUCell(_Gated):
    """ConvGRU (Ballas et al., arXiv:1511.06432)."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        axes: int = 2,
        groups: int = 1,
        boundary: Boundary = "circular",
    ) -> None:
        super().__init__(inputs, channels, 2, axes, groups, boundary)
        self.candidate = PlainConvRNNCell(inputs, channels, axes=axes, groups=groups, boundary=boundary)

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        """Return the next state."""
        update, reset = (gate.sigmoid() for gate in self.arguments(x, h))
        return torch.lerp(h, self.candidate(x, reset * h), update)


class ExpRNNCell(Cell):
    """The cell ``h(t+1) = modrelu(Q h(t) + V x(t))``, with a dense orthogonal `Q` of geotorch.

    (arXiv:1901.08428) It sees a frame as a vector. The state is ``(batch, channels, 1)``.
    """

    def __init__(self, inputs: int, channels: int, *, groups: int = 1) -> None:
        super().__init__(channels)
        self.groups = groups
        n = channels // groups
        self.recurrence = nn.Parameter(torch.empty(groups, n, n))
        geotorch.orthogonal(self, "recurrence", triv=expm_skew)
        self.recurrence = self._stack()[0].sample("torus")
        self.input = nn.Conv1d(inputs, channels, 1, bias=False, groups=groups)
        self.phi = ModReLU(channels, 1)

    def _stack(self) -> Any:
        """Return the list of parametrizations of the recurrence."""
        return self.get_submodule("parametrizations.recurrence")

    def start(self, batch: int, size: Sequence[int]) -> Tensor:
        """Return the state before the first frame: zeros."""
        return super().start(batch, (1,))

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        """Return the next state."""
        z = torch.einsum("gij,bgj->bgi", self.recurrence, h.view(len(h), self.groups, -1)).reshape(h.shape)
        return self.phi(z if x is None else z + self.input(x.reshape(len(x), -1, 1)))

    def recurrent_parameters(self) -> list[nn.Parameter]:
        """Return the generator of `Q`, and modReLU's bias."""
        return [self._stack().original, self.phi.b]
