"""One orthogonal layer, forward and backward, against what a user would pick instead."""

import pytest
import torch
from competitors import CayleyConv2d, aoc, defect, ours, plain, soc, step

SHAPES = [(16, 32, 32), (64, 32, 32), (64, 64, 16), (128, 16, 32), (32, 128, 8)]  # channels, side, batch
TERMS = 9  # of SOC's series: 1/10! is below 1e-6


@pytest.mark.parametrize(("channels", "side", "batch"), SHAPES)
def test_layer(channels, side, batch, in_turn, device):
    torch.manual_seed(0)
    modules = {
        "nn.Conv2d": plain(channels),
        "AOC": aoc(channels),
        "SOC": soc(channels, TERMS),
        "Cayley": CayleyConv2d(channels, 3),
    }
    ours_ = ours(channels)
    defects = {"ours": defect(ours_), **{name: defect(m) for name, m in modules.items()}}
    x = torch.randn(batch, channels, side, side, device=device).requires_grad_()
    G = torch.randn(batch, channels, side, side, device=device)
    in_turn(
        "layer: channels, side, batch",
        f"{channels}, {side}, {batch}",
        {name: step(module.to(device), x, G) for name, module in {"ours": ours_, **modules}.items()},
        **{f"defect of {name}": value for name, value in defects.items()},
    )
