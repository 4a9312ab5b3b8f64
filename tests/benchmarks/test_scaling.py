"""How the exponential grows with the image's side and with the channels, and what memory it takes."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import record
from torch import nn

from orthoconv_param import ConvExponential


def milliseconds(function, runs=7):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def exponential(channels, domain, dtype=torch.float32):
    """Forward and backward of the exponential of a 3x3 kernel on a domain."""
    torch.manual_seed(0)
    parametrization = ConvExponential(domain)
    X = nn.Conv2d(channels, channels, 3).weight.detach().to(dtype)
    generator = parametrization.right_inverse(X).requires_grad_()

    def run():
        _, Q = parametrization.spectrum(generator)
        torch.autograd.grad(Q, generator, Q.detach())

    return run


def slope(sizes, times):
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


SIDES, CHANNELS = [16, 32, 64, 128, 256], [8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("domain", ["any", "given"])
def test_sides(domain):
    channels = 16
    times = [milliseconds(exponential(channels, domain if domain == "any" else side)) for side in SIDES]
    pixels = [side**2 for side in SIDES]
    grown = {"slope in pixels": slope(pixels, times)} if domain == "given" else {}
    columns = {f"side {side}, ms": ms for side, ms in zip(SIDES, times, strict=True)}
    record(f"exponential, {channels} channels", domain, **columns, **grown, spread=max(times) / min(times))


def test_channels():
    times = [milliseconds(exponential(channels, 16)) for channels in CHANNELS]
    columns = {f"{c} channels, ms": ms for c, ms in zip(CHANNELS, times, strict=True)}
    slopes = {"slope in channels": slope(CHANNELS, times), "from 64": slope(CHANNELS[3:], times[3:])}
    record("exponential, domain 16", "given", **columns, **slopes)


PEAK = """
import torch
from orthoconv_param import expm_skew
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
torch.manual_seed(0)
A = {scale} * torch.randn({batch}, {n}, {n}, dtype=torch.complex64)
A.requires_grad_()
G = torch.ones({batch}, {n}, {n}, dtype=torch.complex64)
torch.autograd.grad(expm_skew(A[:64]), A, torch.ones_like(A[:64]))  # what torch allocates once
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak, from here on
torch.autograd.grad(expm_skew(A), A, G)
print((status("VmHWM") - before) / (8 * A.numel()))
"""


@pytest.mark.parametrize(("batch", "n"), [(20000, 16), (4000, 64), (1000, 128)])
def test_memory(batch, n):
    """Peak over the inputs, in units of one spectrum, of a process of its own."""
    code = PEAK.format(batch=batch, n=n, scale=n**-0.5)
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    record("peak memory, forward and backward", f"{batch} of {n} x {n}, complex64", spectra=float(peak))
