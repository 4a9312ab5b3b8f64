"""One training step of recurrent nets of 20 steps, and an exponential against one iteration of the net."""

import sys
from pathlib import Path

import pytest
import torch
from competitors import ConvRNN, aoc, defect, ours, plain
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import functional, orthogonal, retrofit, set_orthogonality
from orthoconv_param.operators import evaluate

sys.path.append(str(Path(__file__).parent.parent))
from models import ConvLSTM

STEPS = 20
SHAPES = [(16, 32, 16), (64, 16, 16), (64, 32, 8)]  # channels, side, batch


def train(model, video):
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def run():
        optimizer.zero_grad()
        with parametrize.cached():
            model(video).square().mean().backward()
        optimizer.step()

    return run


@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize(("channels", "side", "batch"), SHAPES)
def test_conv_rnn(channels, side, batch, boundary, in_turn, device):
    torch.manual_seed(0)
    others = {"nn.Conv2d": plain(channels, boundary), "AOC": aoc(channels, boundary)}
    convolutions = {"ours": ours(channels, domain=side, boundary=boundary), **others}
    seen = convolutions if boundary == "circular" else {}
    defects = {f"defect of {name}": defect(c, side) for name, c in seen.items()}
    video = torch.randn(STEPS, batch, channels, side, side, device=device)
    in_turn(
        f"ConvRNN of {STEPS} steps: channels, side, batch",
        f"{channels}, {side}, {batch}, {boundary}",
        {name: train(ConvRNN(c).to(device), video) for name, c in convolutions.items()},
        **defects,
    )


@pytest.mark.parametrize(("hidden", "side", "batch"), [(16, 32, 8), (32, 32, 8), (64, 16, 8)])
def test_conv_lstm(hidden, side, batch, in_turn, device):
    torch.manual_seed(0)
    video = torch.randn(batch, STEPS, 2, side, side, device=device)
    free = ConvLSTM("zeros", 2, hidden).to(device)
    model = ConvLSTM("zeros", 2, hidden).to(device)
    blocks = {"gates": functional.gate_blocks(hidden, inputs=2)}
    retrofit(model, video[:1], blocks=blocks, method="exponential", boundary="zeros")
    set_orthogonality(model, 1, final=True)
    in_turn(
        f"ConvLSTM of {STEPS} steps, zeros: hidden, side, batch",
        f"{hidden}, {side}, {batch}",
        {"ours": train(model, video), "nn.Conv2d": train(free, video)},
    )


@pytest.mark.parametrize(("channels", "side"), [(16, 32), (32, 32), (64, 32), (64, 64)])
def test_iteration_ratio(channels, side, in_turn, device):
    """(Exponential, forward and backward) / (one iteration of the net), at batch = channels."""
    torch.manual_seed(0)
    convolution = orthogonal(nn.Conv2d(channels, channels, 3, padding=1, bias=False), domain=side)
    convolution = convolution.to(device)
    x = torch.randn(channels, channels, side, side, device=device).requires_grad_()
    G = torch.randn_like(x)
    parameter = convolution.parametrizations.weight.original
    _, M = convolution.operator.spectrum((side, side))
    H = torch.randn_like(M)

    def exponentiate():
        torch.autograd.grad(convolution.operator.spectrum((side, side))[1], parameter, H)

    with parametrize.cached():
        convolution(x)  # from here on the spectrum is known; its gradient is part of an iteration
        in_turn(
            "iteration ratio: channels = batch, side",
            f"{channels}, {side}",
            {"ours": exponentiate, "one iteration": iterate(convolution, x, G)},
        )


def iterate(convolution, x, G):
    way = evaluate.choose(convolution.operator, tuple(x.shape[2:]), len(x))
    state = evaluate.prepared(way, convolution.operator, tuple(x.shape[2:]))

    def run():
        # the graph of the exponential is not part of it
        y = (way.apply(state, x) + x).tanh()
        torch.autograd.grad(y, (x, state.matrices.spectrum), G, retain_graph=True)

    return run
