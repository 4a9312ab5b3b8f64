"""What follows from a unitary kernel and a saturating phi: a cube root, and decay that activity sets.

One complex channel on a periodic lattice, `h(t+1) = phi(U * h(t) + x(t))` with `phi(z) = z / sqrt(1 +
|z|^2)`. All eigenvalues of `U` are on the unit circle, so that nothing decays but by `phi`: the network
is at its critical point (Chandra and Magnasco, arXiv:2405.13854). `x` is a plane wave of amplitude `F`
that turns at each step by the angle by which `U` turns it: it is resonant. These laws follow, and are
measured over three decades each:

    response     the wave settles at the amplitude (2 F)^(1/3)
    decay        without a drive it decays, as t^(-1/2)
    relaxation   beside a steady wave of amplitude r, a small change of it decays at the rate 3/2 r^2, and
                 a small second wave at the rate r^2

    python examples/critical_response.py --out DIR

draws a kernel for each seed, writes critical_response.csv and critical_response.png, and prints the
exponents. (Every unitary kernel just turns a wave, so that seeds differ only in the relaxation of the
second wave.)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from convrnn import ConvRNNCell
from experiment import parse, parser, positive, run, save, spread, table, tick
from torch import Tensor, nn
from torch.nn.utils import parametrize

PERTURBATION = 1e-4  # of the amplitude


class Law(NamedTuple):
    """The power law ``y = factor * x^exponent``, in the limit of small amplitudes."""

    x_name: str
    y_name: str
    exponent: float
    factor: float


LAWS = {
    "response": Law("amplitude of the drive", "amplitude", 1 / 3, 2 ** (1 / 3)),
    "decay": Law("step", "amplitude", -1 / 2, 1),
    "relaxation": Law("amplitude", "rate of relaxation", 2, 3 / 2),
    "another wave": Law("amplitude", "rate of relaxation", 2, 1),
}


class Network:
    """One complex channel, each of whose sites is driven by a number of its own, and two of its waves."""

    def __init__(self, size: Sequence[int], seed: int) -> None:
        torch.manual_seed(seed)
        self.cell = ConvRNNCell(1, 1, axes=len(size), phi="sigmoid", dtype=torch.complex128)
        self.cell.requires_grad_(False)
        nn.init.zeros_(self.cell.input.get_parameter("weight"))[(0, 0, *[1] * len(size))] = 1
        self.carrier, self.other = (self._wave(size, k) for k in (1, 2))
        turned = self.cell.recurrence(self.carrier) / self.carrier
        self.turn = turned.mean() / turned.mean().abs()

    def _wave(self, size: Sequence[int], k: int) -> Tensor:
        """Return ``exp(2 pi i k . x / n)``, ``(1, 1, *size)``, with the same ``k`` on each axis."""
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) / n for n in size), indexing="ij")
        phase = 2 * torch.pi * k * torch.stack(axes).sum(0)
        return torch.polar(torch.ones_like(phase), phase)[None, None]

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(-1, *[1] * (self.carrier.ndim - 1))

    def _states(self, h: Tensor, drive: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each step, from 1, and the state after it. Each state of the batch has its drive."""
        x = drive * self.carrier
        with torch.no_grad(), parametrize.cached():
            for step in range(1, steps + 1):
                x = x * self.turn
                h = self.cell(x, h)
                tick()
                yield step, h

    def response(self, drives: Sequence[float], steps: int) -> list[float]:
        """Return the amplitudes to which drives have raised the wave after some steps."""
        drive = self._column(drives)
        states = self._states(0 * drive * self.carrier, drive, steps)
        return next(amplitude(h).tolist() for step, h in states if step == steps)

    def decay(self, times: Sequence[int]) -> list[float]:
        """Return the amplitudes at some times, from 1 at the beginning."""
        states = self._states(self.carrier, torch.zeros(1), max(times))
        return [amplitude(h).item() for step, h in states if step in times]

    def relaxation(self, amplitudes: Sequence[float], change: Tensor, steps: int) -> list[float]:
        """Return the rates at which a small change of steady waves decays.

        Each is measured over ``r^-2`` steps, in which a wave forgets the change, over at most ``steps``.
        """
        r = self._column(amplitudes)
        drive = r * torch.expm1(-torch.log1p(-r.square()) / 2)  # then phi(r + drive) = r
        start = torch.cat([r * self.carrier, r * (self.carrier + PERTURBATION * change)])
        ends = [min(steps, round(a**-2)) for a in amplitudes]
        rates = [0.0] * len(ends)
        for step, h in self._states(start, torch.cat([drive, drive]), max(ends)):
            if step in ends:
                steady, changed = h.chunk(2)
                left = amplitude(changed - steady) / (PERTURBATION * r.flatten())
                for n, end in enumerate(ends):
                    if step == end:
                        rates[n] = -left[n].log().item() / step
        return rates


def amplitude(h: Tensor) -> Tensor:
    """Return the root mean square of each state of the batch."""
    return h.abs().square().flatten(1).mean(1).sqrt()


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent of the power law that fits best: least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def experiment(size: list[int], seed: int, x: dict[str, list[float]], steps: int) -> dict[str, list[float]]:
    """Measure each law at the given values."""
    network = Network(size, seed)
    changes = network.carrier, network.other
    small = [
        network.relaxation(x[law], c, steps // 5) for law, c in zip(list(LAWS)[2:], changes, strict=True)
    ]
    times = [round(t) for t in x["decay"]]
    return dict(
        zip(LAWS, [network.response(x["response"], steps), network.decay(times), *small], strict=True)
    )


def draw(x: dict[str, list[float]], y: dict[str, list[float]], path: Path) -> None:
    """Draw measured values as dots, and predicted ones as lines."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for n, (name, law) in enumerate(LAWS.items()):
        axes = panels[min(n, 2)]
        predicted = [law.factor * value**law.exponent for value in x[name]]
        line = axes.loglog(x[name], predicted, linewidth=1)[0]
        label = f"{name}: {exponent(x[name], y[name]):.4f}, predicted {law.exponent:.4f}"
        axes.loglog(x[name], y[name], "o", markersize=4, color=line.get_color(), label=label)
        axes.set(xlabel=law.x_name, ylabel=law.y_name)
        axes.legend(fontsize=7, loc="upper right" if law.exponent < 0 else "lower right")
    figure.suptitle("dots: measured; lines: predicted", fontsize=9)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the program."""
    options = parser(__doc__)
    options.add_argument(
        "--size", type=positive, nargs="+", default=[16, 16], help="size of the lattice, on 1 to 3 axes"
    )
    options.add_argument("--points", type=positive, default=13, help="values measured for each law")
    options.add_argument("--decades", type=positive, default=3, choices=(1, 2, 3), help="range of each law")
    arguments = parse(options, seeds=[0, 1], decades=1)
    if len(arguments.size) > 3 or min(arguments.size) < 3 or arguments.points < 2:
        options.error("--size should have 1 to 3 axes of at least 3 sites, and --points be at least 2")
    decades = arguments.decades
    ranges = {"response": (-3 - decades, -3), "decay": (2, 2 + decades), "relaxation": (-1 - decades, -1)}
    steps = {1: 4_000, 2: 20_000, 3: 100_000}[decades]
    x = {name: np.logspace(*ends, arguments.points).tolist() for name, ends in ranges.items()}
    x["decay"] = sorted({float(round(t)) for t in x["decay"]})
    x["another wave"] = x["relaxation"]

    jobs = [(arguments.size, seed, x, steps) for seed in arguments.seeds]
    slowest = min(steps // 5, round(min(x["relaxation"]) ** -2))
    total = len(jobs) * (steps + round(max(x["decay"])) + 2 * slowest)
    measured = run(experiment, jobs, total, "all seeds", arguments.workers)
    rows: list[dict[str, Any]] = [
        {"law": name, "seed": seed, "x": a, "y": b, "predicted": law.factor * a**law.exponent}
        for name, law in LAWS.items()
        for seed, y in zip(arguments.seeds, measured, strict=True)
        for a, b in zip(x[name], y[name], strict=True)
    ]
    save(arguments.out / "critical_response.csv", rows)
    draw(x, measured[0], arguments.out / "critical_response.png")
    cells = [
        [name, f"{law.exponent:.4f}", spread([exponent(x[name], y[name]) for y in measured], 4)]
        for name, law in LAWS.items()
    ]
    print(table(["law", "predicted exponent", "fitted"], cells))
    print(f"critical_response.csv and critical_response.png are in {arguments.out}")


if __name__ == "__main__":
    main()
