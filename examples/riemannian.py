"""Riemannian optimisation of an orthogonal convolution, where the answer is known.

Two problems, both solved in closed form by a singular value decomposition for each frequency:

  nearest     the orthogonal kernel nearest to a given kernel: its polar factor;
  Procrustes  the orthogonal convolution that takes one set of images to another as well as any can: the
              polar factor of the sum of y x^H over all pairs, which is the gradient of <W * x, y>.

Each is solved from the identity by Adam on the trivialization (`ConvExponential`), by Riemannian gradient
descent (SGD on it, and `geotorch.utils.update_base` after each step), and by geoopt's RiemannianAdam on
`OrthogonalKernels`, with each retraction. The program prints the distance to the closed form, that is the
norm of the difference of the kernels, and the time, and plots the distance against the step.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import geoopt
import geotorch
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from orthoconv_param import ConvExponential, functional
from orthoconv_param.manifold import OrthogonalKernels
from orthoconv_param.matrices.maps import RETRACTIONS

Loss = Callable[[Tensor], Tensor]


@dataclass
class Problem:
    """A function of a kernel, and the orthogonal kernel at which it is least."""

    name: str
    loss: Loss
    solution: Tensor


def problems(channels: int, side: int, images: int, spread: float) -> list[Problem]:
    """Return both problems, around the same kernel, from which the identity is not too far."""
    size = (channels, channels, side, side)
    kernels = OrthogonalKernels(size[2:])
    origin = kernels.origin(*size, dtype=torch.float64).as_subclass(Tensor)
    u = kernels.proju(origin, torch.randn(size, dtype=torch.float64))
    truth = kernels.expmap(origin, spread * u)
    given = truth + 0.1 * torch.randn_like(truth) / side

    x = torch.randn(images, channels, side, side, dtype=torch.float64)
    y = functional.spectral_conv(x, truth)
    y = y + 0.3 * torch.randn_like(y)
    W = origin.clone().requires_grad_()
    (cross,) = torch.autograd.grad((functional.spectral_conv(x, W) * y).sum(), W)
    scale = images * side**2  # so that both have the curvature of |W|^2 / 2

    return [
        Problem("nearest", lambda W: (W - given).square().sum() / 2, kernels.projx(given)),
        Problem(
            "Procrustes",
            lambda W: (functional.spectral_conv(x, W) - y).square().sum() / (2 * scale),
            kernels.projx(cross),
        ),
    ]


def trivialized(problem: Problem) -> Any:
    """Return a module whose weight is the identity, parametrized on its own grid."""
    holder: Any = nn.Module()
    holder.weight = nn.Parameter(torch.zeros_like(problem.solution))
    register_parametrization(holder, "weight", ConvExponential())
    holder.weight = functional.identity(tuple(problem.solution.shape), dtype=problem.solution.dtype)
    return holder


def adam(problem: Problem, steps: int) -> Iterator[Tensor]:
    """Run Adam on the generator; yield the kernel after each step."""
    holder = trivialized(problem)
    optimizer = torch.optim.Adam(holder.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(holder.weight).backward()
        optimizer.step()
        schedule.step()
        yield holder.weight.detach()


def gradient_descent(problem: Problem, steps: int) -> Iterator[Tensor]:
    """Run Riemannian gradient descent; yield the kernel after each step.

    The base follows, so that each step starts from a generator of zero.
    """
    holder = trivialized(problem)
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(holder.weight).backward()
        optimizer.step()
        geotorch.utils.update_base(holder, "weight")
        yield holder.weight.detach()


def riemannian_adam(problem: Problem, steps: int, retraction: str) -> Iterator[Tensor]:
    """Run geoopt's optimizer on the kernel itself; yield the kernel after each step."""
    size = tuple(problem.solution.shape)
    kernels = OrthogonalKernels(size[2:], retraction=retraction)
    weight = geoopt.ManifoldParameter(kernels.origin(*size, dtype=torch.float64), manifold=kernels)
    optimizer = geoopt.optim.RiemannianAdam([weight], lr=0.5)  # a length, in the operators' norm
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(weight).backward()
        optimizer.step()
        schedule.step()
        yield weight.detach().as_subclass(Tensor)


SOLVERS: dict[str, Callable[[Problem, int], Iterator[Tensor]]] = {
    "Adam, trivialization": adam,
    "RGD, update_base": gradient_descent,
    **{f"RiemannianAdam, {name}": partial(riemannian_adam, retraction=name) for name in RETRACTIONS},
}


def solve(problem: Problem, solver: str, steps: int) -> tuple[list[float], float]:
    """Return the distance to the closed form after each step, and the seconds that the steps took."""
    distances: list[float] = []
    start = time.perf_counter()
    for weight in SOLVERS[solver](problem, steps):
        distances.append((weight - problem.solution).norm().item())
    return distances, time.perf_counter() - start


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float | Path, text: str) -> None:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{text} (default: %(default)s)"
        )

    add("--steps", 300, "steps of each solver")
    add("--channels", 4, "channels of the kernel")
    add("--side", 8, "side of the images, in pixels")
    add("--images", 64, "pairs of images")
    add("--spread", 0.1, "how far the answer is from the identity")
    add("--seed", 0, "random seed")
    add("--out", Path("results"), "folder to write to")
    arguments = parser.parse_args()
    plt.switch_backend("agg")  # pictures go to files
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    both = problems(arguments.channels, arguments.side, arguments.images, arguments.spread)
    figure, axes = plt.subplots(1, len(both), figsize=(11, 4), sharey=True)
    print(f"{'':<14}{'':<26}{'distance':>10}{'time':>9}")
    for axis, problem in zip(axes, both, strict=True):
        for solver, style in zip(SOLVERS, ("-", "-", "-", "--", "-.", ":"), strict=True):
            distances, seconds = solve(problem, solver, arguments.steps)
            print(f"{problem.name:<14}{solver:<26}{distances[-1]:>10.1e}{seconds:>7.1f} s", flush=True)
            axis.semilogy(distances, style, label=solver)
        axis.set(title=problem.name, xlabel="step")
    axes[0].set_ylabel("distance to the closed form")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    picture = arguments.out / "riemannian.png"
    figure.savefig(picture, dpi=110)
    print(f"\nwrote {picture}")


if __name__ == "__main__":
    main()
