"""The exponential applied by its series: between walls, and as the third way to evaluate periodic ones."""

import pytest
import torch
from competitors import plain, step
from conftest import record
from orthogonium.layers.conv.adaptiveSOC.fast_skew_ortho_conv import ExpParams, FastSOC
from torch import nn

from orthoconv_param import orthogonal, orthogonality_defect
from orthoconv_param.operators import evaluate

pytestmark = pytest.mark.usefixtures("pinned_allocator")

WALLS = [(64, 32, 8), (64, 32, 24), (72, 24, 16), (96, 16, 48), (112, 16, 8), (128, 16, 16), (24, 48, 24)]
CIRCULAR = [(64, 1, 1), (64, 1, 4), (64, 1, 8), (64, 2, 8), (128, 2, 8)]  # channels, stride, batch
SIDE = 32  # of the periodic images
MEASURED = 8  # side of the images on which a dense matrix is made
SOC_TERMS = (3, 9)  # its default, and where 1/10! is below 1e-6


def steps(modules, shape, device, batch):
    x = torch.randn(batch, *shape, device=device).requires_grad_()
    shape = next(iter(modules.values())).to(device)(x).shape
    G = torch.randn(shape, device=device)
    return {name: step(module.to(device), x, G) for name, module in modules.items()}


def walled(channels):
    return orthogonal(nn.Conv2d(channels, channels, 3, padding=1, bias=False), boundary="walls")


def zero_padded_soc(channels, terms):
    options = {"padding": terms, "padding_mode": "zeros", "bias": False, "exp_params": ExpParams(terms)}
    return FastSOC(channels, channels, 3, **options)


@pytest.mark.parametrize(("channels", "side", "batch"), WALLS)
def test_between_walls(channels, side, batch, in_turn, device):
    torch.manual_seed(0)
    modules = {"walls": walled(channels), "nn.Conv2d": plain(channels, "zeros")}
    modules |= {f"SOC, {terms}": zero_padded_soc(channels, terms) for terms in SOC_TERMS}
    degree = modules["walls"].parametrizations.weight[0].norm.degree
    in_turn(
        "exponential between walls: channels, side, batch",
        f"{channels}, {side}, {batch}",
        steps(modules, (channels, side, side), device, batch),
        terms=degree.value,
    )


@pytest.mark.parametrize("channels", [16])
def test_defects_between_walls(channels):
    torch.manual_seed(0)
    modules = {"walls": walled(channels)}
    modules |= {f"SOC, {terms}": zero_padded_soc(channels, terms) for terms in SOC_TERMS}
    for name, module in modules.items():
        record(
            f"defect between zeros, {channels} channels, {MEASURED}x{MEASURED}",
            name,
            defect=orthogonality_defect(module, MEASURED),
        )


class By(nn.Module):
    """A periodic module that is evaluated in the cheapest of some ways."""

    def __init__(self, module, names):
        super().__init__()
        self.module = module
        self.ways = [way for way in evaluate.EVALUATORS if way.name in names]

    def forward(self, x):
        operator, domain = self.module.operator, tuple(x.shape[2:])
        costs = [way.cost(operator, domain, len(x)) for way in self.ways]
        way = self.ways[costs.index(min(costs))]
        return way.apply(way.prepare(operator, domain), x)


@pytest.mark.parametrize(("channels", "stride", "batch"), CIRCULAR)
def test_around_a_torus(channels, stride, batch, in_turn, device):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
    module = orthogonal(conv)
    chosen = evaluate.choose(module.operator, (SIDE, SIDE), batch).name
    modules = {
        "any way": By(module, {"direct", "spectral", "series"}),
        "by its kernel": By(module, {"direct", "spectral"}),
        "nn.Conv2d": nn.Conv2d(
            channels, channels, 3, stride=stride, padding=1, padding_mode="circular", bias=False
        ),
    }
    in_turn(
        f"periodic exponential, side {SIDE}: channels, stride, batch",
        f"{channels}, {stride}, {batch}",
        steps(modules, (channels, SIDE, SIDE), device, batch),
        chosen=chosen,
    )
