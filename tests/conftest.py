"""What has to be decided before any test is imported."""

import os

import torch

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

if not torch.cuda.is_available():
    # Kernels then run in triton's interpreter. Triton asks once, when something imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
