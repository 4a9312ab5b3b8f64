"""Split kernels, periodic and between walls, against the plain convolutions they take the place of."""

import pytest
import torch
from competitors import aoc, ours, plain, step
from conftest import record
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal

pytestmark = pytest.mark.usefixtures("pinned_allocator")

LAYERS = [(20, 40, 20), (48, 48, 8), (64, 32, 32), (72, 24, 24), (112, 16, 12), (128, 16, 8)]
RECURRENT = [(16, 32, 16), (40, 24, 12), (72, 20, 8)]  # channels, side, batch
STRIDED = [(64, 64), (64, 128), (128, 128), (128, 256)]  # channels in and out
STEPS = 20
NOISE = 0.05  # by which a module may differ from itself
PAIRS = [("split", "nn.Conv2d"), ("split, walls", "nn.Conv2d, zeros")]


class ConvRNN(nn.Module):
    """``h = tanh(convolution(h))``, from an image as the state."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, h):
        with parametrize.cached():
            for _ in range(STEPS):
                h = self.convolution(h).tanh()
        return h


def convolutions(*arguments, **options):
    """Return split convolutions and plain ones of the same shape, by their names in `PAIRS`."""

    def conv(padding_mode):
        return nn.Conv2d(*arguments, padding_mode=padding_mode, **options)

    return {
        "split": orthogonal(conv("circular"), method="split"),
        "nn.Conv2d": conv("circular"),
        "split, walls": orthogonal(conv("zeros"), method="split", boundary="walls"),
        "nn.Conv2d, zeros": conv("zeros"),
    }


def steps(modules, channels, side, batch, device):
    """Return forward and backward of each module, on the same images."""
    x = torch.randn(batch, channels, side, side, device=device).requires_grad_()
    shape = next(iter(modules.values())).to(device)(x).shape
    G = torch.randn(shape, device=device)
    return {name: step(module.to(device), x, G) for name, module in modules.items()}


@pytest.mark.parametrize(("channels", "side", "batch"), [LAYERS[0], LAYERS[2], LAYERS[5]])
def test_self(channels, side, batch, in_turn, device):
    torch.manual_seed(0)
    modules = {"nn.Conv2d": plain(channels), "itself": plain(channels)}
    result = in_turn(
        "self-check, layer: channels, side, batch",
        f"{channels}, {side}, {batch}",
        steps(modules, channels, side, batch, device),
    )
    assert result["ratio"]["nn.Conv2d / itself"] == pytest.approx(1, abs=NOISE)


@pytest.mark.parametrize(("channels", "side", "batch"), LAYERS)
def test_layer(channels, side, batch, in_turn, device):
    torch.manual_seed(0)
    modules = convolutions(channels, channels, 3, padding=1, bias=False)
    modules |= {"AOC": aoc(channels), "exponential": ours(channels)}
    in_turn(
        "split layer: channels, side, batch",
        f"{channels}, {side}, {batch}",
        steps(modules, channels, side, batch, device),
        [PAIRS[0], ("split", "AOC"), PAIRS[1], ("exponential", "nn.Conv2d")],
        **{"batch side² / channels": batch * side**2 / channels},
    )


@pytest.mark.parametrize(("channels", "side", "batch"), RECURRENT)
def test_conv_rnn(channels, side, batch, in_turn, device):
    torch.manual_seed(0)
    modules = convolutions(channels, channels, 3, padding=1)
    nets = {name: ConvRNN(module) for name, module in modules.items()}
    in_turn(
        f"split ConvRNN of {STEPS} steps: channels, side, batch",
        f"{channels}, {side}, {batch}",
        steps(nets, channels, side, batch, device),
        PAIRS,
    )


@pytest.mark.parametrize(("channels", "out"), STRIDED)
def test_stride(channels, out, in_turn, device):
    torch.manual_seed(0)
    side, batch = 32, 8
    in_turn(
        f"split layer of stride 2, side {side}, batch {batch}: channels in, out",
        f"{channels}, {out}",
        steps(convolutions(channels, out, 3, padding=1, stride=2), channels, side, batch, device),
        PAIRS,
    )


def stored(module):
    """Return the bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("taps", [3, 5, 7])
def test_storage(taps):
    channels = 64
    modules = convolutions(channels, channels, taps, padding=taps // 2, bias=False)
    size = {name: stored(module) for name, module in modules.items()}
    record(
        f"split, parameters and buffers, {channels} channels",
        f"{taps}x{taps}",
        **{f"{name}, bytes": size[name] for pair in PAIRS for name in pair},
        **{f"{one} / {other}": size[one] / size[other] for one, other in PAIRS},
    )
