"""What it costs to retrofit: the call itself, and steps of training, over the model before.

A ConvLSTM whose author wrote no cache, 10 steps of time, forward, backward and an optimizer's step: plain,
on its way (``t = 0.5``), and at the end (``final=True``), in turn; medians of the ratios. Peak memory is
what a step takes besides what the process has: of processes of their own, over the plain model's.

    python tests/benchmarks/retrofit.py [--quick]
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from orthoconv_param import retrofit, set_orthogonality

LAYERS, CHANNELS, SIDE = 20, 64, 32
STEPS = [  # hidden channels, taps, side, batch
    (hidden, taps, side, 8 if hidden < 64 else 128 // side)
    for hidden in (16, 64, 96)
    for taps in (3, 5)
    for side in (16, 32, 64)
]
MEMORY = [(16, 3, 32, 8), (64, 3, 32, 4), (64, 5, 32, 4)]
WAYS = {"plain": None, "annealing": 0.5, "annealed": 1.0}


class Network(nn.Module):
    """A ConvLSTM."""

    def __init__(self, mode: str, hidden: int, taps: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(1 + hidden, 4 * hidden, taps, padding=taps // 2, padding_mode=mode)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        h = c = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        for x in video.unbind(1):
            i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


class Trained:
    """A network, and what trains it."""

    def __init__(self, mode: str, way: str, hidden: int, taps: int, side: int, batch: int) -> None:
        torch.manual_seed(0)
        self.video = torch.randn(batch, 10, 1, side, side)
        self.model = Network(mode, hidden, taps)
        if WAYS[way] is not None:
            retrofit(self.model, self.video, blocks="recurrent")
            set_orthogonality(self.model, WAYS[way], final=way == "annealed")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)

    def step(self) -> float:
        """Train by one step; return its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.video).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size of each table, few rounds")
    parser.add_argument("--memory-of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory(*options.memory_of))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    call(2 if options.quick else LAYERS)
    steps(STEPS[:1] if options.quick else STEPS, 3 if options.quick else 9)
    print("\n| peak memory: hidden, taps, side, batch | plain, MiB | annealing | annealed |")
    print("| --- | --- | --- | --- |")
    for size in MEMORY[:1] if options.quick else MEMORY:
        plain, *others = (measured(way, size) for way in WAYS)
        row = [f"{plain:.0f}", *(f"{other / plain:.2f}" for other in others)]
        print(f"| {', '.join(map(str, size))} | {' | '.join(row)} |", flush=True)


def call(layers: int) -> None:
    """Print how long the call takes."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(layers)))
    x = torch.randn(1, CHANNELS, SIDE, SIDE)
    for options in (
        {}, {"boundary": "circular"}, {"method": "exponential"},
        {"method": "exponential", "boundary": "circular"},
    ):  # fmt: skip
        model, start = copy.deepcopy(plain), time.perf_counter()
        retrofit(model, x, **options)
        print(f"retrofit({options}) of {layers} layers: {time.perf_counter() - start:.1f} s", flush=True)


def steps(sizes: list[tuple[int, int, int, int]], rounds: int) -> None:
    """Print how long a step of training takes."""
    columns = [f"{boundary}, {when}" for boundary in ("walls", "circular") for when in [*WAYS][1:]]
    print(f"\n| hidden, taps, side, batch | plain, ms | {' | '.join(columns)} |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = []
    for size in sizes:
        ratios, plain = [], 0.0
        for mode in ("zeros", "circular"):
            trained = {way: Trained(mode, way, *size) for way in WAYS}
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds + 1):
                for way, network in trained.items():
                    times[way].append(network.step())
            plain = plain or 1e3 * statistics.median(times["plain"][1:])
            for way in ("annealing", "annealed"):
                pairs = zip(times["plain"][1:], times[way][1:], strict=True)
                ratios.append(statistics.median(b / a for a, b in pairs))
        medians.append(ratios)
        print(f"| {', '.join(map(str, size))} | {plain:.0f} | {_row(ratios)} |", flush=True)
    print(f"| median | | {_row([statistics.median(column) for column in zip(*medians, strict=True)])} |")


def _row(ratios: list[float]) -> str:
    return " | ".join(f"{ratio:.2f}" for ratio in ratios)


def measured(way: str, size: tuple[int, int, int, int]) -> float:
    """Return the peak memory of a process of its own, in MiB."""
    command = [sys.executable, __file__, "--memory-of", way, *map(str, size)]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}  # what is freed is given back
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(run.stdout)


def memory(way: str, *size: str) -> float:
    """Return what a step takes besides what there is, in MiB."""
    network = Trained("zeros", way, *map(int, size))
    network.step()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak begins with what there is
    before = _status("VmRSS")
    network.step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> float:
    with open("/proc/self/status") as status:
        return float(next(line for line in status if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
