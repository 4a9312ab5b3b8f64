"""What it costs to retrofit twenty layers: seconds, and the process's peak memory above what it had.

In units of the layers' spectra, one complex matrix for each frequency of the torus: it keeps two.
"""

import resource
import time

import torch
from torch import nn

from orthoconv_param import report, retrofit

LAYERS, CHANNELS, SIDE = 20, 64, 32


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(LAYERS)))
    x = torch.randn(1, CHANNELS, SIDE, SIDE)
    torus = SIDE + 2
    spectra = LAYERS * torus * (torus // 2 + 1) * CHANNELS**2 * 8
    retrofit(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), x[:, :4])  # what torch allocates once
    with torch.no_grad():
        before = model(x)

    memory, start = peak(), time.perf_counter()
    retrofit(model, x)
    seconds, memory = time.perf_counter() - start, peak() - memory
    with torch.no_grad():
        error = ((model(x) - before).norm() / before.norm()).item()
    print(f"retrofit: {seconds:.1f} s, {memory / spectra:.2f} times the spectra ({spectra / 1e6:.0f} MB)")
    print(f"outputs changed by {error:.0e}")
    start = time.perf_counter()
    report(model, x)
    print(f"report: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
