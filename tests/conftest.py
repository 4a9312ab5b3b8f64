"""What has to be decided before any test is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Kernels then run in triton's interpreter. Triton asks once, when something imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
