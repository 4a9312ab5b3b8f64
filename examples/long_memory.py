"""Recall over a delay: a digit is shown once, T blank or noisy frames follow, and it must be given back.

Real scanned digits (scikit-learn's, 8x8, values in [0, 1]) are shown to recurrent networks of about as many
parameters each, which then see nothing, or noise, for T steps. All are trained by Adam on the squared
error, for equally many steps, with each learning rate of the grid and each seed. Tables show the error on
unseen digits, at the rate whose loss in the last tenth of training is the least. Images are periodic, or
with ``--boundary walls`` they end: the orthogonal networks then lose nothing at their edges, and all other
convolutions are zero-padded.

    python examples/long_memory.py --out DIR

writes recall.csv (a row for each network, delay, rate and seed) and recall.png, and prints a table: mean
and standard deviation over the seeds. It also writes leak.csv and leak.png, and prints a table: how much of
a state is left after up to 1000 steps of operators with each boundary (`leak.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import leak
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from baselines import ConvGRUCell, ConvLSTMCell, PlainConvRNNCell
from colours import colour_of
from convrnn import Boundary, Cell, ConvRNNCell, Method, Recurrent, convolution
from experiment import (
    METHODS,
    TRAINING_DIGITS,
    add_method_and_boundary,
    best_members,
    digits,
    fit,
    mean_and_deviation,
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
from torch import Tensor

RATES = (3e-3, 1e-2, 3e-2)
STEPS = {100: 60, 500: 30, 1000: 20}  # of Adam, for each delay
BATCH = 8
SPREAD = 1e-3  # of the generators' initial values: U is near the identity
IMAGES: dict[Boundary, str] = {"circular": "periodic images", "walls": "images between walls"}


def _network(
    cell: Callable[..., Cell], channels: int, groups: int, *, boundary: Boundary, **options: Any
) -> Recurrent:
    """Return a network with ``channels`` for each group."""
    channels *= groups
    read = convolution(2, channels, groups, groups=groups, dtype=options.get("dtype"), boundary=boundary)
    return Recurrent(cell(groups, channels, groups=groups, boundary=boundary, **options), read)


def networks(
    delay: int,
    phi: str = "modrelu",
    methods: Sequence[Method] = METHODS["circular"],
    boundary: Boundary = "circular",
) -> dict[str, Callable[[int], Recurrent]]:
    """Return for each network a function that makes it, given the number of groups.

    All have about as many parameters, but ours have fewer if their kernels are split. Ours come once for
    each method, which their names tell if there are several. The second ConvLSTM starts with biases that
    fit the delay. The second plain ConvRNN starts from the identity, as ours nearly do.
    """
    network = partial(_network, boundary=boundary)
    make = partial(network, ConvRNNCell, spread=SPREAD, phi=phi)
    unitary = partial(make, 8, dtype=torch.get_default_dtype().to_complex())
    return {
        **ours(methods, orthogonal=partial(make, 12), unitary=unitary),
        "ConvLSTM": partial(network, ConvLSTMCell, 6),
        "ConvLSTM (chrono)": partial(network, ConvLSTMCell, 6, delay=delay),
        "ConvGRU": partial(network, ConvGRUCell, 7),
        "plain ConvRNN": partial(network, PlainConvRNNCell, 12),
        "plain ConvRNN (identity)": partial(network, PlainConvRNNCell, 12, identity=True),
    }


def frames(
    images: Tensor, delay: int, noise: float = 0.0, random: torch.Generator | None = None
) -> list[Tensor | None]:
    """Return the images, and the blank or noisy frames that follow."""
    if not noise:
        return [images] + [None] * delay
    return [images, *(noise * torch.randn(images.shape, generator=random) for _ in range(delay))]


def train(
    make: Callable[[int], Recurrent],
    delay: int,
    seeds: list[int],
    rates: list[float],
    steps: int,
    batch: int = BATCH,
    noise: float = 0.0,
) -> tuple[Recurrent, Tensor]:
    """Train one network of all seeds with all rates, rate by rate; return it and the losses.

    The losses are ``(steps, members)``.
    """
    images, _ = digits()
    every_seed = seeds * len(rates)
    network = population(make, every_seed)
    randoms = [torch.Generator().manual_seed(seed) for seed in every_seed]
    noises = torch.Generator().manual_seed(seeds[0])

    def loss(network: Recurrent) -> Tensor:
        batches = [torch.randint(TRAINING_DIGITS, (batch,), generator=r) for r in randoms]
        shown = images[torch.stack(batches, 1)]
        return (network(frames(shown, delay, noise, noises)) - shown).square().mean((0, 2, 3))

    each = torch.tensor(rates).repeat_interleave(len(seeds))
    # the effect of a change of the recurrence's angles grows with the number of steps
    losses = fit(network, loss, steps, each, recurrent=1 / delay, cost=delay * len(every_seed))
    return network, losses


def experiment(
    name: str,
    delay: int,
    seeds: list[int],
    rates: list[float],
    steps: int,
    batch: int,
    noise: float,
    methods: Sequence[Method],
    boundary: Boundary,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the rows of the CSV file, and some digits as the first seed's network gives them back."""
    make = networks(delay, methods=methods, boundary=boundary)[name]
    network, losses = train(make, delay, seeds, rates, steps, batch, noise)
    last = losses[-max(1, steps // 10) :].mean(0)
    network, best = best_members(make, network, rates, last)
    images, _ = digits()
    shown = images[TRAINING_DIGITS:, None].expand(-1, len(seeds), -1, -1)
    with torch.no_grad():
        recalled = network(frames(shown, delay, noise, torch.Generator().manual_seed(0)))
    errors = (recalled - shown).square().mean((0, 2, 3))
    same = {"network": name, "parameters": size_of(network) // len(seeds), "delay": delay}
    same |= {"boundary": boundary, "noise": noise, "steps": steps}
    rows = rows_of(seeds, rates, best, ("training_loss", last), ("test_error", errors), **same)
    return rows, recalled[:8, 0]


def draw(
    rows: list[dict[str, Any]], recalled: dict[tuple[str, int], Tensor], boundary: Boundary, path: Path
) -> None:
    """Draw the errors over the delay, and the digits that are recalled after the longest."""
    names = list(dict.fromkeys(name for name, _ in recalled))
    delays = sorted({delay for _, delay in recalled})
    images, _ = digits()
    shown = images[TRAINING_DIGITS:]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    strips = [shown[:8], *(recalled[name, delays[-1]] for name in names)]
    stacked = torch.cat([torch.cat(list(strip), 1) for strip in strips])
    right.imshow(stacked.numpy(), cmap="gray", vmin=0, vmax=1)
    right.set_yticks([8 * n + 3.5 for n in range(len(strips))], ["shown", *names])
    right.set(xticks=[], title=f"recalled after {delays[-1]} frames")
    for name, label in zip(names, right.get_yticklabels()[1:], strict=True):  # the legend of both
        errors = [results_of(rows, "test_error", network=name, delay=delay) for delay in delays]
        middle, deviation = zip(*(mean_and_deviation(e) for e in errors), strict=True)
        left.errorbar(delays, middle, deviation, marker="o", capsize=3, color=colour_of(name))
        label.set_color(colour_of(name))
    mean = (shown - images[:TRAINING_DIGITS].mean()).square().mean().item()
    left.axhline(mean, color="gray", linestyle=":")
    left.annotate("the mean of all pixels", (delays[0], 1.3 * mean), color="gray", fontsize=8)
    left.set(xlabel="blank or noisy frames", ylabel="mean squared error", xscale="log", yscale="log")
    left.set_title(f"{IMAGES[boundary]}; bars: deviation of the seeds", fontsize=10)
    left.set_xticks(delays, [str(delay) for delay in delays])
    left.minorticks_off()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the program."""
    options = parser(__doc__)
    options.add_argument(
        "--delays", type=positive, nargs="+", default=[100, 500, 1000], help="T, frames after the digit"
    )
    options.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the grid")
    options.add_argument(
        "--steps", type=positive, help=f"training steps (default: {STEPS} by delay, otherwise 20)"
    )
    options.add_argument("--batch", type=positive, default=BATCH, help="digits in a step")
    options.add_argument(
        "--noise", type=float, default=0.0, help="standard deviation in the frames that follow"
    )
    add_method_and_boundary(options)
    arguments = parse(options, delays=[10, 20], seeds=[0, 1], rates=[1e-2, 3e-2], steps=20)

    boundary: Boundary = arguments.boundary
    methods = methods_of(arguments)
    names = list(networks(0, methods=methods, boundary=boundary))
    kinds = [(name, delay) for delay in sorted(arguments.delays, reverse=True) for name in names]
    seeds, rates = arguments.seeds, list(arguments.rates)
    steps = {delay: arguments.steps or STEPS.get(delay, 20) for delay in arguments.delays}
    settings = (arguments.batch, arguments.noise, methods, boundary)
    jobs = [(*kind, seeds, rates, steps[kind[1]], *settings) for kind in kinds]
    total = sum(delay * steps[delay] for _, delay in kinds) * len(seeds) * len(rates)
    results = run(experiment, jobs, total, "all networks", arguments.workers)
    rows = [row for some, _ in results for row in some]
    save(arguments.out / "recall.csv", rows)
    recalled = {kind: images for kind, (_, images) in zip(kinds, results, strict=True)}
    draw(rows, recalled, boundary, arguments.out / "recall.png")

    parameters = {row["network"]: str(row["parameters"]) for row in rows}
    delays = sorted(arguments.delays)
    cells = [
        [
            name,
            count,
            *(spread(results_of(rows, "test_error", network=name, delay=delay), 4) for delay in delays),
        ]
        for name, count in parameters.items()
    ]
    print(table(["network", "parameters", *(f"T = {delay}" for delay in delays)], cells))
    print(leak.write(seeds, arguments.out))
    print(f"recall.csv, recall.png, leak.csv and leak.png are in {arguments.out}")


if __name__ == "__main__":
    main()
