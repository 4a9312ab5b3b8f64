"""What it costs to retrofit twenty layers: seconds, and the process's peak memory above what it had.

Memory is in units of the layers' spectra, one complex matrix for each frequency of the torus: it keeps two.
A second table is of single layers of a network without a loop, which computes its exponential at each
call: forward and backward, plain, annealed, and after ``final=True``, in turn; medians.
"""

import copy
import resource
import statistics
import time

import torch
from torch import nn

from orthoconv_param import report, retrofit, set_orthogonality
from orthoconv_param.torus.boundary import smooth

LAYERS, CHANNELS, SIDE = 20, 64, 32
SINGLE = [(16, 16, 1, 32), (64, 64, 1, 8), (64, 64, 1, 32), (64, 128, 2, 32)]  # in, out, stride, side


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(LAYERS)))
    x = torch.randn(1, CHANNELS, SIDE, SIDE)
    torus = smooth(SIDE + 2)
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
    print(f"report: {time.perf_counter() - start:.1f} s\n")
    print(f"{'in, out, stride, side':<24}{'plain':>10}{'annealed':>10}{'final':>10}  (ms, batch 8)")
    for geometry in SINGLE:
        print(f"{geometry!s:<24}" + "".join(f"{ms:>10.1f}" for ms in single(*geometry)))


def single(cin: int, out: int, stride: int, side: int) -> list[float]:
    plain = nn.Conv2d(cin, out, 3, stride, padding=1)
    x = torch.randn(8, cin, side, side)
    annealed = retrofit(copy.deepcopy(plain), x)
    final = retrofit(copy.deepcopy(plain), x)
    set_orthogonality(annealed, 0.5)
    set_orthogonality(final, 1, final=True)
    times: dict[nn.Module, list[float]] = {plain: [], annealed: [], final: []}
    for _ in range(7):
        for module, measured in times.items():
            start = time.perf_counter()
            module(x).square().mean().backward()
            measured.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times.values()]


if __name__ == "__main__":
    main()
