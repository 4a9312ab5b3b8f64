"""Digits read a row, or a pixel at a time: convolutional recurrent nets on a ring, and a dense one.

Real scanned digits (scikit-learn's, 8x8) come as 8 frames, the rows, on a periodic 1-d lattice of 8 sites;
then as 64 frames of one pixel, in an order drawn once, which enters at the first site (the others are fed
zero). With ``--boundary walls`` the lattice ends: the orthogonal networks then lose nothing there, and all
other convolutions are zero-padded. At the end a linear map classifies the digit by the outputs at all sites
(of the orthogonal and unitary networks: by their moduli, on which phi acts). All networks have about as
many parameters (split ones fewer); the dense one, geotorch's orthogonal expRNN, sees a frame as a vector.
Each is trained by Adam for equally many steps, with each learning rate of the grid and each seed, on 1300
digits; the accuracy is that on 297 test digits, at the rate that is best on 200 validation digits.
(Orthogonal parts are trained at 8/T of the rate, with T frames.)

    python examples/row_digits.py --out DIR

writes row_digits.csv (a row for each task, network, rate and seed) and row_digits.png, and prints a
table: mean and standard deviation over the seeds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from baselines import ConvGRUCell, ConvLSTMCell, ExpRNNCell, PlainConvRNNCell
from colours import colour_of
from convrnn import Boundary, Cell, ConvRNNCell, Method, Recurrent
from experiment import (
    METHODS,
    TRAINING_DIGITS,
    add_method_and_boundary,
    best_members,
    digits,
    fit,
    methods_of,
    ours,
    parse,
    parser,
    population,
    positive,
    results_of,
    rows_of,
    run,
    save,
    size_of,
    spread,
    table,
)
from torch import Tensor, nn

RATES = (3e-3, 1e-2, 3e-2)
SPREAD = 0.3  # of the generators' initial values: U turns by about a radian
STEPS = {"rows": 600, "permuted pixels": 300}  # of Adam
VALIDATION_DIGITS = 200  # the last of those for training
SITES = 8
FRAMES = {"rows": 8, "permuted pixels": 64}


class Modulus(nn.Module):
    """The modulus ``|h|``, on which phi acts."""

    def forward(self, h: Tensor) -> Tensor:
        """Return the modulus of a state, real or complex."""
        return h.abs()


def _network(cell: Callable[..., Cell], channels: int, groups: int, **options: Any) -> Recurrent:
    """Return a network with ``channels`` for each group."""
    channels *= groups
    read: nn.Module = nn.Conv1d(channels, 10 * groups, SITES, groups=groups)
    if cell is ConvRNNCell:
        read = nn.Sequential(Modulus(), read)
    return Recurrent(cell(groups, channels, axes=1, groups=groups, **options), read)


def _dense(inputs: int, channels: int, groups: int) -> Recurrent:
    inputs, channels = inputs * groups, channels * groups
    read = nn.Conv1d(channels, 10 * groups, 1, groups=groups)
    return Recurrent(ExpRNNCell(inputs, channels, groups=groups), read)


def networks(
    task: str, methods: Sequence[Method] = METHODS["circular"], boundary: Boundary = "circular"
) -> dict[str, Callable[[int], Recurrent]]:
    """Return for each network a function that makes it, given the number of groups."""
    few = task == "rows"  # phi saturates at every step: over many steps the first frames would be lost
    phi = {"phi": "sigmoid", "bias": True} if few else {"phi": "modrelu"}
    network = partial(_network, boundary=boundary)
    make = partial(network, ConvRNNCell, spread=SPREAD, **phi)
    unitary = partial(make, 16, dtype=torch.get_default_dtype().to_complex())
    return {
        **ours(methods, orthogonal=partial(make, 20), unitary=unitary),
        "ConvLSTM": partial(network, ConvLSTMCell, 12),
        "ConvGRU": partial(network, ConvGRUCell, 14),
        "plain ConvRNN": partial(network, PlainConvRNNCell, 20),
        "expRNN, dense": partial(_dense, *((8, 45) if few else (1, 48))),
    }


def frames(images: Tensor, task: str, dense: bool) -> list[Tensor]:
    """Return images ``(batch, members, 8, 8)`` as frames ``(batch, members, sites)``."""
    if task == "rows":
        return list(images.unbind(2))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    pixels = images.flatten(2)[..., order].unsqueeze(-1)
    return list((pixels if dense else F.pad(pixels, (0, SITES - 1))).unbind(2))


def experiment(
    task: str,
    name: str,
    seeds: list[int],
    rates: list[float],
    steps: int,
    batch: int,
    methods: Sequence[Method],
    boundary: Boundary,
) -> list[dict[str, Any]]:
    """Train a network with all seeds and rates; return the rows of the CSV file."""
    images, labels = digits()
    make = networks(task, methods, boundary)[name]
    dense = "dense" in name
    every_seed = seeds * len(rates)
    training = TRAINING_DIGITS - VALIDATION_DIGITS
    randoms = [torch.Generator().manual_seed(seed) for seed in every_seed]

    def loss(network: Recurrent) -> Tensor:
        which = torch.stack([torch.randint(training, (batch,), generator=r) for r in randoms], 1)
        logits = network(frames(images[which], task, dense)).view(batch, len(every_seed), 10)
        return F.cross_entropy(logits.movedim(2, 1), labels[which], reduction="none").mean(0)

    def accuracy(network: Recurrent, which: slice, count: int) -> Tensor:
        seen = images[which, None].expand(-1, count, -1, -1)
        with torch.no_grad():
            answers = network(frames(seen, task, dense)).view(len(seen), count, 10).argmax(-1)
        return (answers == labels[which, None]).float().mean(0)

    network = population(make, every_seed)
    each = torch.tensor(rates).repeat_interleave(len(seeds))
    cost = FRAMES[task] * len(every_seed)
    fit(network, loss, steps, each, recurrent=8 / FRAMES[task], cost=cost)
    validation = accuracy(network, slice(training, TRAINING_DIGITS), len(every_seed))
    network, best = best_members(make, network, rates, -validation)
    test = accuracy(network, slice(TRAINING_DIGITS, None), len(seeds))
    same = {"task": task, "network": name, "parameters": size_of(network) // len(seeds), "steps": steps}
    same["boundary"] = boundary
    return rows_of(seeds, rates, best, ("validation_accuracy", validation), ("test_accuracy", test), **same)


def accuracies_of(rows: list[dict[str, Any]], task: str, name: str) -> list[float]:
    """Return the test accuracies of a network, in per cent."""
    return [100 * value for value in results_of(rows, "test_accuracy", task=task, network=name)]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a dot for each seed, and a line at their mean."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    measured = {row["task"] for row in rows}
    tasks = [task for task in FRAMES if task in measured]
    size = (1.5 + 4.75 * len(tasks), 3.5)
    figure, panels = plt.subplots(
        1, len(tasks), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        for n, name in enumerate(names):
            values = accuracies_of(rows, task, name)
            axes.plot(values, [n] * len(values), "o", color=colour_of(name), alpha=0.5)
            axes.plot(sum(values) / len(values), n, "|", color=colour_of(name), markersize=16)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=task, xlabel="test accuracy, % (dot: a seed; line: their mean)")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the program."""
    options = parser(__doc__)
    options.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the grid")
    help_of_steps = "training steps, with rows and with pixels"
    default = list(STEPS.values())
    options.add_argument(
        "--steps", type=positive, nargs=2, default=default, metavar="N", help=help_of_steps
    )
    help_of_tasks = "how digits are read"
    options.add_argument("--tasks", choices=FRAMES, nargs="+", default=[*FRAMES], help=help_of_tasks)
    options.add_argument("--batch", type=positive, default=32, help="digits in a step")
    add_method_and_boundary(options)
    arguments = parse(options, seeds=[0, 1], rates=[1e-2, 3e-2], steps=[60, 10])
    steps = dict(zip(FRAMES, arguments.steps, strict=True))
    tasks = [task for task in FRAMES if task in arguments.tasks]
    seeds, rates = arguments.seeds, list(arguments.rates)
    methods, boundary = methods_of(arguments), arguments.boundary
    kinds = [(task, name) for task in reversed(tasks) for name in networks(task, methods, boundary)]
    settings = (arguments.batch, methods, boundary)
    jobs = [(*kind, seeds, rates, steps[kind[0]], *settings) for kind in kinds]
    total = sum(FRAMES[task] * steps[task] for task, _ in kinds) * len(seeds) * len(rates)
    rows = [row for some in run(experiment, jobs, total, "all networks", arguments.workers) for row in some]
    save(arguments.out / "row_digits.csv", rows)
    draw(rows, arguments.out / "row_digits.png")

    parameters = {row["network"]: str(row["parameters"]) for row in rows}
    cells = [
        [name, count, *(spread(accuracies_of(rows, task, name), 1) for task in tasks)]
        for name, count in parameters.items()
    ]
    print(table(["network", "parameters", *tasks], cells))
    print(f"row_digits.csv and row_digits.png are in {arguments.out}")


if __name__ == "__main__":
    main()
