"""What has to be decided before any test is imported, and which cases of a grid are slow."""

import os
from collections import Counter

import pytest
import torch

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

if not torch.cuda.is_available():
    # Kernels then run in triton's interpreter. Triton asks once, when something imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each grid that is ``sampled(n)``, mark all but one case in ``n`` as slow.

    Multiples of the golden ratio are spread evenly, whatever the lengths of the grid's axes.
    """
    seen = Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled and not item.get_closest_marker("slow"):
            name = item.nodeid.partition("[")[0]
            if (seen[name] * (5**0.5 - 1) / 2) % 1 >= 1 / sampled.args[0]:
                item.add_marker("slow")
            seen[name] += 1
