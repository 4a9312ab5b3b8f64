"""Competitors run in turn in one process; the medians of their times and of the ratios make one table.

``pytest tests/benchmarks --out DIR`` writes ``DIR/benchmarks.md`` and ``DIR/benchmarks.json``.
"""

import ctypes
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

ROWS = []
_SLOW = 1000  # milliseconds, above which three turns are enough
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def pytest_addoption(parser):
    parser.addoption("--out", default=None, help="folder for benchmarks.md and benchmarks.json")
    parser.addoption("--rounds", type=int, default=9, help="how often each competitor has its turn")
    parser.addoption("--device", default="cpu", help="cpu or cuda")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def pinned_allocator():
    """Have glibc keep all memory on a heap that never shrinks, until the process ends.

    By default it maps a large tensor and unmaps it, or not, depending on what was freed before. The page
    faults then fall on one competitor or another: the same module against itself gives 1.11.
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's allocator can be pinned")
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(_M_MMAP_MAX, 0)
    assert mallopt(_M_TRIM_THRESHOLD, -1)
    assert mallopt(_M_TOP_PAD, 256 * 2**20)


@pytest.fixture
def in_turn(request, benchmark, device):
    """``in_turn(table, row, functions, pairs=..., notes=...)``: times of functions without arguments.

    Returns a dictionary of each one's median time, and the medians of the ratios of the named ``pairs``.
    Default: the first one over each of the others.
    """

    def clock(function):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def run(table, row, functions, pairs=None, **notes):
        first, *others = functions
        pairs = pairs or [(first, other) for other in others]
        seen = {name: [] for name in functions}
        for function in functions.values():
            function()

        def turn():
            for name, function in functions.items():
                if len(seen[name]) < 3 or seen[name][-1] < _SLOW:
                    seen[name].append(clock(function))

        gc.collect()
        benchmark.pedantic(turn, rounds=request.config.getoption("--rounds"), iterations=1)
        result = {
            "table": table,
            "row": row,
            "ms": {name: statistics.median(times) for name, times in seen.items()},
            "ratio": {
                f"{one} / {other}": statistics.median(
                    a / b for a, b in zip(seen[one], seen[other], strict=False)
                )
                for one, other in pairs
            },
            **notes,
        }
        benchmark.extra_info.update(result)
        ROWS.append(result)
        return result

    return run


def record(table, row, **notes):
    ROWS.append({"table": table, "row": row, **notes})


def _cell(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown():
    """One table for each group of rows."""
    lines = []
    for table in dict.fromkeys(row["table"] for row in ROWS):
        rows = [row for row in ROWS if row["table"] == table]
        cells = []
        for row in rows:
            cell = {table: row["row"]}
            cell |= {f"{name}, ms": value for name, value in row.get("ms", {}).items()}
            cell |= row.get("ratio", {})
            cell |= {k: v for k, v in row.items() if k not in ("table", "row", "ms", "ratio")}
            cells.append(cell)
        header = list(dict.fromkeys(key for cell in cells for key in cell))
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(_cell(cell.get(key, "")) for key in header) + " |" for cell in cells]
        lines.append("")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    name = platform.processor() or platform.machine()
    if config.getoption("--device") == "cuda":
        name = torch.cuda.get_device_name()
    machine = f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, float32"
    text = f"{machine}\n\n{markdown()}"
    terminalreporter.write_line(text)
    if config.getoption("--out"):
        folder = Path(config.getoption("--out"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmarks.md").write_text(text)
        rows = json.dumps({"machine": machine, "rows": ROWS}, indent=1)
        (folder / "benchmarks.json").write_text(rows + "\n")
