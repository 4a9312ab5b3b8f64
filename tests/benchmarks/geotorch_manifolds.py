"""geotorch's manifolds with `expm_skew` in the place of torch's matrix exponential: forward and backward.

In turn in one process; the medians in milliseconds, and the median of the ratios.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import geotorch
import torch
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import expm_skew

MANIFOLDS: dict[str, Callable[[Any], nn.Module]] = {
    "SO(64 x 64 x 64)": lambda triv: geotorch.SO((64, 64, 64), triv=triv),
    "SO(512 x 512)": lambda triv: geotorch.SO((512, 512), triv=triv),
    "Stiefel(512 x 128)": lambda triv: geotorch.Stiefel((512, 128), triv=triv),
    "Grassmannian(512 x 128)": lambda triv: geotorch.Grassmannian((512, 128), triv=triv),
    "LowRank(512 x 256), rank 64": lambda triv: geotorch.LowRank((512, 256), rank=64, triv=triv),
}


def registered(make: Callable[[Any], nn.Module], triv: Any) -> nn.Module:
    """A module whose weight is on the manifold, a little away from its base."""
    torch.manual_seed(0)
    manifold: Any = make(triv)
    holder = nn.Module()
    holder.weight = nn.Parameter(manifold.sample())
    parametrize.register_parametrization(holder, "weight", manifold)
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(torch.randn_like(parameter) / parameter.shape[-1])
    return holder


def main() -> None:
    print(f"{'':<30}{'torch':>10}{'expm_skew':>12}{'ratio':>8}")
    for name, make in MANIFOLDS.items():
        holders = [registered(make, triv) for triv in ("expm", expm_skew)]
        times: list[list[float]] = [[], []]
        for _ in range(8):
            for holder, measured in zip(holders, times, strict=True):
                start = time.perf_counter()
                weight: Any = holder.weight
                weight.square().mul(weight.detach().roll(1)).sum().backward()
                measured.append(1e3 * (time.perf_counter() - start))
        ratios = [a / b for a, b in zip(*times, strict=True)][1:]
        medians = [statistics.median(measured[1:]) for measured in times]
        print(f"{name:<30}{medians[0]:>10.1f}{medians[1]:>12.1f}{statistics.median(ratios):>8.1f}")


if __name__ == "__main__":
    main()
