"""What the experiments share: options, workers with a progress bar, and many networks trained as one."""

import argparse
import csv
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from convrnn import Boundary, Method, Recurrent
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

TRAINING_DIGITS = 1500  # of 1797; the others are for testing
METHODS: dict[Boundary, tuple[Method, ...]] = {
    "circular": ("exponential",),
    "walls": ("exponential", "split"),
}  # of our networks, if none is asked for


class _Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that keeps the description's lines, and shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all experiments have."""
    result = argparse.ArgumentParser(description=description, formatter_class=_Format)
    result.add_argument("--out", type=Path, default=Path("."), help="folder of the CSV and PNG files")
    result.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds, one network each"
    )
    workers = "processes, each of one thread and up to 3 GB"
    result.add_argument("--workers", type=positive, default=min(os.cpu_count() or 1, 4), help=workers)
    return result


def add_method_and_boundary(options: argparse.ArgumentParser) -> None:
    """Add the options ``--method`` and ``--boundary`` of the paper's networks. See `methods_of`."""
    text = "method of the orthogonal and unitary convolutions (default: exponential; between walls both)"
    options.add_argument("--method", choices=get_args(Method), help=text)
    options.add_argument(
        "--boundary", choices=get_args(Boundary), default="circular", help="boundary of the images"
    )


def methods_of(arguments: argparse.Namespace) -> tuple[Method, ...]:
    """Return the methods that were asked for; split networks have fewer parameters."""
    return (arguments.method,) if arguments.method else METHODS[arguments.boundary]


def ours(
    methods: Sequence[Method], **networks: Callable[..., Any]
) -> dict[str, Callable[[int], Recurrent]]:
    """Return our networks, once for each method, which their names tell if there are several.

    Args:
        methods: of the convolutions.
        networks: by their first word, functions that make one, given the number of groups and ``method``.
    """
    return {
        f"{word} ConvRNN{f', {method}' if len(methods) > 1 else ''}": partial(make, method=method)
        for word, make in networks.items()
        for method in methods
    }


def positive(text: str) -> int:
    """Return an option's value, a positive integer."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be positive. Found {text}")
    return int(text)


def parse(options: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Parse the command line; with ``--quick``, options that are not given have the quick setting."""
    words = " ".join(
        f"--{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in quick.items()
    )
    options.add_argument(
        "--quick", action="store_true", help=f"small defaults, to see that it runs: {words}"
    )
    if options.parse_known_args()[0].quick:
        options.set_defaults(**quick)
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation, which is 0 for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean and the standard deviation, as text."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def ratio(value: float, floor: float) -> str:
    """Return a ratio as text. Below the floor, where the computation ends, it says that alone."""
    if value < floor:
        return f"< {floor:.0e}"
    return f"{value:.4f}" if 0.01 < value < 100 else f"{value:.0e}"


def digits() -> tuple[Tensor, Tensor]:
    """Return all scanned digits, ``(1797, 8, 8)`` with values in [0, 1], and their labels."""
    bunch = load_digits()
    return torch.tensor(bunch.images / 16, dtype=torch.float32), torch.tensor(bunch.target)


# Workers

_ticks: Any = None


def _begin(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


def tick(n: int = 1) -> None:
    """Move the progress bar, from within a worker."""
    if _ticks is not None:
        with _ticks.get_lock():
            _ticks.value += n


def run(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], total: int, title: str, workers: int
) -> list[Any]:
    """Call the function with each job's arguments, in several processes; all make ``total`` ticks."""
    context = multiprocessing.get_context("spawn")
    pause = 0.5 if sys.stderr.isatty() else 60  # seconds: a file does not want many lines
    ticks = context.Value("q", 0)
    with (
        ProcessPoolExecutor(workers, context, _begin, (ticks,)) as pool,
        tqdm(total=total, desc=title, unit="step", unit_scale=True, mininterval=pause) as progress,
    ):
        futures = [pool.submit(function, *job) for job in jobs]
        while wait(futures, timeout=0.5, return_when="FIRST_EXCEPTION").not_done:
            progress.update(ticks.value - progress.n)
            for future in futures:
                if future.done() and future.exception():
                    pool.shutdown(cancel_futures=True)
                    future.result()
        progress.update(ticks.value - progress.n)
        return [future.result() for future in futures]


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a CSV file, with their keys as its header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# Many networks as one: each member is a group of its channels. The first axis of every parameter runs over
# the members.


def population(make: Callable[[int], Recurrent], seeds: Sequence[int]) -> Recurrent:
    """Return a network with a group for each seed, whose parameters are drawn with that seed.

    Args:
        make: makes such a network, given the number of groups.
        seeds: of the members.
    """
    networks = []
    for seed in seeds:
        torch.manual_seed(seed)
        networks.append(numbers(make(1)))
    result = make(len(seeds))
    result.load_state_dict({name: torch.cat([n[name] for n in networks]) for name in networks[0]})
    return result


def numbers(network: Recurrent) -> dict[str, Tensor]:
    """Return the tensors of numbers in a network's state; the rest of it describes them in words."""
    state = network.state_dict()
    return {name: x for name, x in state.items() if x.is_floating_point() or x.is_complex()}


def members(make: Callable[[int], Recurrent], network: Recurrent, which: Tensor, of: int) -> Recurrent:
    """Return the network that consists of some of the groups of another; that one has ``of`` groups."""
    result = make(len(which))
    state = numbers(network)
    result.load_state_dict({k: v.unflatten(0, (of, -1))[which].flatten(0, 1) for k, v in state.items()})
    return result


def fit(
    network: Recurrent,
    loss: Callable[[Recurrent], Tensor],
    steps: int,
    rates: Tensor,
    recurrent: float = 1.0,
    cost: int = 1,
) -> Tensor:
    """Train all members by Adam, and return their losses, ``(steps, members)``.

    Args:
        network: of ``len(rates)`` groups.
        loss: of each member, on another batch at each call.
        steps: of Adam; learning rates fall to zero along a cosine.
        rates: of the members.
        recurrent: factor of the rate of `recurrent_parameters`.
        cost: ticks of a step.
    """
    slow = {id(p) for p in network.cell.recurrent_parameters()}
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in slow], "lr": 1.0},
        {"params": [p for p in parameters if id(p) in slow], "lr": recurrent},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = torch.empty(steps, len(rates))
    for step in range(steps):
        optimizer.zero_grad()
        losses_now = loss(network)
        losses_now.sum().backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            # Adam's step is proportional to the rate, which differs from member to member
            for p, old in zip(parameters, before, strict=True):
                change = (p - old).unflatten(0, (len(rates), -1))
                change = torch.where(change.isfinite(), change, 0)  # one that diverges stops no other
                p.copy_(old + (rates.view(-1, *(1,) * p.ndim) * change).flatten(0, 1))
        losses[step] = losses_now.detach()
        tick(cost)
    return losses


def best_members(
    make: Callable[[int], Recurrent], network: Recurrent, rates: Sequence[float], costs: Tensor
) -> tuple[Recurrent, int]:
    """Return the members with the rate of least mean cost, and the index of that rate.

    The network has all seeds, rate by rate.
    """
    best = int(costs.view(len(rates), -1).mean(1).nan_to_num(torch.inf).argmin())
    which = torch.arange(len(costs)).view(len(rates), -1)[best]
    return members(make, network, which, len(costs)), best


def rows_of(
    seeds: Sequence[int],
    rates: Sequence[float],
    best: int,
    every: tuple[str, Tensor],
    chosen: tuple[str, Tensor],
    **same: Any,
) -> list[dict[str, Any]]:
    """Return a row for each rate and seed.

    ``every`` is a name and the numbers of all members, ``chosen`` a name and the numbers of those with the
    best rate; other members have an empty cell there. ``same`` are cells that all rows have.
    """
    numbers, results = every[1].view(len(rates), -1).tolist(), chosen[1].tolist()
    return [
        {**same, "rate": rate, "seed": seed, every[0]: numbers[r][s], "chosen": r == best}
        | {chosen[0]: results[s] if r == best else ""}
        for r, rate in enumerate(rates)
        for s, seed in enumerate(seeds)
    ]


def results_of(rows: Sequence[dict[str, Any]], name: str, **same: Any) -> list[float]:
    """Return the numbers of the chosen rows that have the values ``same``: one for each seed."""
    return [r[name] for r in rows if r["chosen"] and all(r[k] == v for k, v in same.items())]


def size_of(network: Recurrent) -> int:
    """Return how many real numbers a network's parameters hold."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())
