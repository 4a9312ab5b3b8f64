"""How long an orthogonal convolution takes in each way to evaluate it, and what is chosen.

For each geometry the ways, and the plain periodic convolution that it was, run in turn; printed are the
medians in milliseconds of one forward, the exponential and the kernel's own transform included, the cost
model's estimates, and its choice. With ``--cached`` the exponential is excluded, as in the steps of a loop.
With ``--backward`` it is one forward and backward. A second table is of one step of a loop, whose
exponential and transform of the kernel are shared by its steps: forward and backward, against a plain 3x3
convolution. Run it as ``python tests/benchmarks/evaluation.py``.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal
from orthoconv_param.operators.evaluate import EVALUATORS, choose
from orthoconv_param.torus.circular import spectral_conv

WAYS = [way for way in EVALUATORS if way.name in ("direct", "spectral", "series")]  # around a torus

GEOMETRIES = [  # axes, channels, kernel, groups, stride, side, batch
    (1, 16, 3, 1, 1, 64, 16),
    (1, 64, 3, 1, 1, 256, 16),
    (1, 64, 9, 1, 1, 1024, 8),
    (1, 256, 3, 1, 1, 64, 8),
    (1, 64, 3, 64, 1, 256, 16),
    (1, 64, 1, 1, 1, 256, 16),
    (2, 4, 3, 1, 1, 16, 1),
    (2, 16, 3, 1, 1, 8, 8),
    (2, 16, 3, 1, 1, 64, 8),
    (2, 16, 3, 16, 1, 64, 8),
    (2, 64, 3, 1, 1, 32, 32),
    (2, 64, 3, 64, 1, 32, 32),
    (2, 64, 1, 1, 1, 32, 32),
    (2, 32, 2, 1, 2, 32, 16),
    (2, 16, 3, 1, 2, 32, 16),
    (2, 64, 3, 1, 2, 32, 8),
    (2, 64, 3, 1, 1, 32, 1),
    (2, 64, 3, 1, 1, 32, 8),
    (2, 128, 3, 1, 1, 16, 4),
    (2, 128, 3, 1, 1, 16, 32),
    (2, 32, 3, 1, 1, 64, 16),
    (2, 8, 3, 1, 1, 128, 1),
    (3, 8, 3, 1, 1, 16, 2),
    (3, 16, 1, 1, 1, 16, 4),
]


STEPS = [(64, 32, 32), (128, 16, 32), (24, 48, 24), (32, 64, 16)]  # channels, side, batch


def medians(functions, runs=11):
    """Of each function's time, in milliseconds; they take turns, so that all see the same machine."""
    times = [[] for _ in functions]
    for run in range(runs + 2):
        for function, seen in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if run >= 2:
                seen.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(seen) for seen in times]


def steps():
    print("\n{:<24}{:>9}{:>10}{:>8}".format("channels side batch", "plain", "spectral", "ratio"))
    for channels, side, batch in STEPS:
        plain = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular", bias=False)
        module = orthogonal(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        x = torch.randn(batch, channels, side, side).requires_grad_()
        G = torch.randn(batch, channels, side, side)
        lattice, M = module.operator.spectrum((side, side))
        M = M.detach().requires_grad_()
        times = medians(
            [
                lambda p=plain, x=x, G=G: torch.autograd.grad(p(x), (x, p.weight), G),
                lambda x=x, M=M, L=lattice, G=G: torch.autograd.grad(spectral_conv(x, M, L), (x, M), G),
            ]
        )
        row = f"{channels:<9}{side:<5}{batch:<5}"
        print(f"{row:<24}{times[0]:>9.2f}{times[1]:>10.2f}{times[1] / times[0]:>8.2f}", flush=True)


def evaluations(cached, backward):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    names = [way.name for way in WAYS]
    titles = "".join(f"{name:>10}" for name in ["plain", *names, *(f"~{name}" for name in names)])
    print("{:<36}{:>4}{}  {}".format("axes ch k groups stride side batch", "K", titles, "choice"))
    torch.manual_seed(0)
    for axes, channels, kernel, groups, stride, side, batch in GEOMETRIES:
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        pad = {"padding": kernel // 2 if kernel % 2 else 0, "padding_mode": "circular", "bias": False}
        plain = cls(channels, channels, kernel, stride=stride, groups=groups, **pad)
        module = orthogonal(cls(channels, channels, kernel, stride=stride, groups=groups, **pad))
        domain = (side,) * axes
        x = torch.randn(batch, channels, *domain).requires_grad_(backward)
        taps = tuple(module.weight.shape[2:])
        operator = module.operator

        def timed(function, parameters):
            def run():
                y = function()
                if backward:
                    torch.autograd.grad(y.sum(), parameters)

            return run

        functions = [timed(lambda p=plain, x=x: p(x), [x, *plain.parameters()])]
        for way in WAYS:
            functions.append(
                timed(
                    lambda way=way, operator=operator, x=x, domain=domain: way.apply(
                        way.prepare(operator, domain), x
                    ),
                    [x, *module.parameters()],
                )
            )
        with torch.set_grad_enabled(backward), parametrize.cached() if cached else nullcontext():
            estimates = [way.cost(operator, domain, batch) / 1e6 for way in WAYS]
            chosen = choose(operator, domain, batch)
            times = medians(functions)
        right = chosen is WAYS[times[1:].index(min(times[1:]))]
        choice = chosen.name + ("" if right else " (slower)")
        row = f"{axes:<5}{channels:<4}{kernel:<2}{groups:<7}{stride:<7}{side:<5}{batch:<6}"
        numbers = "".join(f"{value:>10.2f}" for value in [*times, *estimates])
        print(f"{row:<36}{taps[0]:>4}{numbers}  {choice}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--backward", action="store_true")
    evaluations(**vars(parser.parse_args()))
    steps()
