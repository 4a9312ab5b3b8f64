"""One table of what orthogonality costs: a row for each task, a column for each way.

    python tests/benchmarks/summary.py [--device cuda] [--rounds 15] [--quick]

Each cell is the time of a training step (forward and backward, to the input and to the parameters) over
that of the plain network. In brackets is the defect, the largest ``|singular value - 1|`` of what the
module does to images: from its answers to an impulse in each channel where it commutes with translations,
else from the dense matrix on 6x6 images. Smaller is better in both. Networks take their turns in one
process; ratios are medians of ratios. What has walls is compared with zero-padded plain networks, all else
with periodic ones.
"""

import argparse
import statistics
import time

import torch
from competitors import CayleyConv2d, ConvRNN, aoc, soc
from retrofit import Network
from torch import nn

from orthoconv_param import expm_skew, orthogonal, retrofit, set_orthogonality
from orthoconv_param.functional import gate_blocks

SIDE = 6  # of the images on which dense matrices are made
TERMS = 9  # of SOC's series: 1/10! is below 1e-6
WAYS = {
    "split, circular": {"method": "split"},
    "split, walls": {"method": "split", "boundary": "walls"},
    "exponential, circular": {},
    "exponential, walls": {"boundary": "walls"},
}
OTHERS = ("AOC", "SOC", "Cayley")
ZERO_PADDED = {"zeros", "split, walls", "exponential, walls"}


def convolution(way, channels, out, stride=1):
    """Return a 3x3 convolution by its name; None where there is none."""
    mode = "zeros" if way in ZERO_PADDED else "circular"
    conv = nn.Conv2d(channels, out, 3, padding=1, stride=stride, padding_mode=mode, bias=False)
    if way in ("circular", "zeros"):
        return conv
    if way in WAYS:
        return orthogonal(conv, **WAYS[way])
    if way == "AOC":
        return aoc(channels, out=out, stride=stride)
    if stride > 1:
        return None
    return soc(channels, TERMS) if way == "SOC" else CayleyConv2d(channels, 3)


def layer(channels, out, side, batch, stride=1):
    def make(way, device):
        module = convolution(way, channels, out, stride)
        if module is None:
            return None
        defect = distance_from_one(matrices(module, channels, way in ZERO_PADDED, stride=stride))
        x = torch.randn(batch, channels, side, side, device=device).requires_grad_()
        return step(module.to(device), x), defect

    return make


def recurrent(channels, side, batch, steps):
    def make(way, device):
        if way in ("SOC", "Cayley"):  # which no loop computes once
            return None
        module = convolution(way, channels, channels)
        defect = distance_from_one(matrices(module, channels, way in ZERO_PADDED))
        video = torch.randn(steps, batch, channels, side, side, device=device)
        return step(ConvRNN(module).to(device), video), defect

    return make


def retrofitted(hidden, side, batch, frames):
    def make(way, device):
        if way in OTHERS:
            return None
        model = Network("zeros" if way in ZERO_PADDED else "circular", hidden, taps=3)
        video = torch.randn(batch, frames, 1, side, side)
        if way in WAYS:
            retrofit(model, video[:1], blocks="recurrent", method=WAYS[way].get("method", "exponential"))
            set_orthogonality(model, 1, final=True)
        M = matrices(model.gates, 1 + hidden, way in ZERO_PADDED, side)
        blocks = [M[:, out, :, inner] for out, inner in gate_blocks(hidden, inputs=1)]
        return step(model.to(device), video.to(device)), max(map(distance_from_one, blocks))

    return make


def exponential(count, n, norm):
    def make(way, device):
        if way not in ("circular", "exponential, circular"):
            return None
        A = torch.randn(count, n, n, dtype=torch.complex64)
        A = A - A.mH
        A = (A * (norm / torch.linalg.matrix_norm(A, 2))[:, None, None]).to(device).requires_grad_()
        G = torch.randn_like(A)
        function = torch.linalg.matrix_exp if way == "circular" else expm_skew
        return lambda: torch.autograd.grad(function(A), A, G), distance_from_one(function(A).detach())

    return make


def step(model, x):
    """Return forward and backward, to the input and to the parameters."""
    G = torch.randn_like(model(x)).detach()

    def run():
        model.zero_grad()
        x.grad = None
        model(x).backward(G)

    return run


@torch.no_grad()
def matrices(module, channels, is_dense, side=16, stride=1):
    """Return matrices that have an operator's singular values, ``(count, out, pixels, in, pixels)``.

    They are one dense matrix; or one for each frequency, of an operator that commutes with translations.
    """
    side = SIDE if is_dense else stride * side
    eye = torch.eye(channels * side**2)
    if not is_dense:  # an impulse in each phase of each channel
        eye = eye.unflatten(0, (channels, side, side))[:, :stride, :stride].flatten(0, 2)
    zero = module(torch.zeros(1, channels, side, side))
    answers = torch.cat([module(x.unflatten(1, (channels, side, side))) - zero for x in eye.split(256)])
    if is_dense:
        return (
            answers.flatten(2).reshape(1, channels, side**2, *answers.shape[1:2], -1).permute(0, 3, 4, 1, 2)
        )
    spectrum = torch.fft.rfft2(answers.double()).flatten(2)  # in, out, frequency
    return spectrum.permute(2, 1, 0)[:, :, None, :, None]


def distance_from_one(M):
    """Return the largest ``|singular value - 1|`` of `matrices`, or of a batch of matrices."""
    if M.ndim == 5:
        M = M.flatten(3).flatten(1, 2)
    precise = M.to(torch.promote_types(M.dtype, torch.float64))
    return float((torch.linalg.svdvals(precise) - 1).abs().max())


TASKS = {
    "layer: 64 channels, 32x32, batch 24": layer(64, 64, 32, 24),
    "stride 2: 32 to 64 channels, 32x32, batch 24": layer(32, 64, 32, 24, 2),
    "small batch: 64 channels, 16x16, batch 4": layer(64, 64, 16, 4),
    "ConvRNN of 20 steps: 32 channels, 32x32, batch 12": recurrent(32, 32, 12, 20),
    "ConvLSTM of 10 steps, blocks retrofitted: 16 channels, 32x32, batch 8": retrofitted(16, 32, 8, 10),
    "exponential: 544 of 64x64, norm 1, over `matrix_exp`": exponential(544, 64, 1.0),
}
QUICK = {
    "layer: 4 channels, 16x16, batch 2": layer(4, 4, 16, 2),
    "stride 2: 4 to 8 channels, 8x8, batch 2": layer(4, 8, 8, 2, 2),
    "ConvRNN of 3 steps: 4 channels, 16x16, batch 2": recurrent(4, 16, 2, 3),
    "ConvLSTM of 3 steps, blocks retrofitted: 4 channels, 8x8, batch 2": retrofitted(4, 8, 2, 3),
    "exponential: 5 of 4x4, norm 1, over `matrix_exp`": exponential(5, 4, 1.0),
}


def row(make, device, rounds):
    """Return the cells of one task: the plain network's milliseconds, and ratio and defect of each way."""
    networks = {}
    for way in ("circular", "zeros", *WAYS, *OTHERS):
        torch.manual_seed(0)
        made = make(way, device)
        if made is not None:
            networks[way] = made
    times = {way: [] for way in networks}
    for n in range(rounds + 1):
        for way, (run, _) in networks.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if n:
                times[way].append(1e3 * (time.perf_counter() - start))
    cells = [f"{statistics.median(times['circular']):.0f} ms"]
    for way in (*WAYS, *OTHERS):
        if way not in networks:
            cells.append("")
            continue
        plain = times["zeros" if way in ZERO_PADDED else "circular"]
        ratio = statistics.median(a / b for a, b in zip(times[way], plain, strict=True))
        cells.append(f"{ratio:.2f} ({networks[way][1]:.0e})")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--quick", action="store_true", help="small networks, to see that it runs")
    options = parser.parse_args()
    name = f"{torch.get_num_threads()} threads"
    if options.device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}, float32\n")
    header = ["task", "plain, circular", *WAYS, *OTHERS]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for task, make in (QUICK if options.quick else TASKS).items():
        print("| " + " | ".join([task, *row(make, options.device, options.rounds)]) + " |", flush=True)


if __name__ == "__main__":
    main()
