"""How much of a state is left after many steps of an operator, with each boundary.

    h(t+1) = U * h(t),    norm(h(t)) / norm(h(0))

for a random `h(0)`, without input and `phi`, untrained. Between walls and on periodic images `U` is
orthogonal and the ratio stays 1. With ``boundary="zeros"`` it is not, and loses what leaves the image in
each step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from colours import colour_of
from convrnn import convolution
from experiment import ratio, save, table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal

CHANNELS = 16
SIDE = 16  # of the images
SHOWN = (1, 10, 100, 1000)  # steps in the table
FLOOR = 3e-5  # of the figure
SMALLEST = torch.finfo(torch.float32).tiny

OPERATORS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "circular, exponential": partial(orthogonal, boundary="circular"),
    "walls, exponential": partial(orthogonal, boundary="walls"),
    "walls, split": partial(orthogonal, boundary="walls", method="split"),
    'zeros, exponential, domain="any"': partial(orthogonal, boundary="zeros"),
    f"zeros, exponential, domain={SIDE}": partial(orthogonal, boundary="zeros", domain=SIDE),
    "plain zero-padded convolution": lambda plain: plain,
}


@torch.no_grad()
def norms(name: str, seed: int) -> Tensor:
    """Return how much of a random state's norm is left after each step, ``(steps,)``."""
    torch.manual_seed(seed)
    plain = convolution(2, CHANNELS, CHANNELS, bias=False, boundary="walls")
    step = OPERATORS[name](plain)
    h = torch.randn(1, CHANNELS, SIDE, SIDE)
    first, left = h.norm(), []
    with parametrize.cached():
        for _ in range(SHOWN[-1]):
            h = step(h)
            left.append(h.norm() / first)
    return torch.stack(left)


def draw(left: dict[str, Tensor], path: Path) -> None:
    """Draw the mean over the seeds, between the least and the largest. Names stand at the curves' ends."""
    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    lasting = [name for name, values in left.items() if values[:, -1].mean() > 0.9]
    for name, values in left.items():
        low, middle, high = values.amin(0), values.mean(0), values.amax(0)
        steps = range(1, len(middle) + 1)
        colour, width, above = colour_of(name), 1.5, 0.0
        if name in lasting:  # they coincide: a wide line lies below narrower ones, and names are stacked
            rank = lasting.index(name)
            width, above = 9.0 - 3 * rank, 13.0 * (1 - rank)
        last = int((high > 4 * FLOOR).sum()) - 1
        axes.plot(steps, middle, color=colour, linewidth=width, solid_capstyle="butt")
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        end = (steps[last], (middle if last + 1 == len(steps) else high)[last])
        text = axes.annotate(name, end, (10, above), textcoords="offset points", color=colour, va="center")
        text.set_annotation_clip(False)
    axes.set(xlabel="steps", ylabel="norm that is left of a state", xscale="log", yscale="log")
    axes.set(xlim=(1, SHOWN[-1]), ylim=(FLOOR, 2))
    axes.set_title(f"random states of {CHANNELS} channels, {SIDE}x{SIDE} images; bands: least to largest")
    figure.savefig(path, dpi=80)


def write(seeds: Sequence[int], folder: Path) -> str:
    """Write leak.csv, a row for each operator, seed and step, and leak.png; return the table."""
    left = {name: torch.stack([norms(name, seed) for seed in seeds]) for name in OPERATORS}
    rows = [
        {"operator": name, "seed": seed, "step": step, "norm": norm}
        for name, values in left.items()
        for seed, some in zip(seeds, values.tolist(), strict=True)
        for step, norm in enumerate(some, 1)
    ]
    save(folder / "leak.csv", rows)
    draw(left, folder / "leak.png")
    cells = [
        [name, *(ratio(values[:, step - 1].mean().item(), SMALLEST) for step in SHOWN)]
        for name, values in left.items()
    ]
    return table(["norm that is left of a state", *(f"after {step}" for step in SHOWN)], cells)
