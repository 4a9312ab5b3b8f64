"""An ordinary CNN for scanned digits (scikit-learn's), beside the same one with orthogonal convolutions.

It prints the accuracy on unseen digits, clean and with noise, mean and standard deviation over the seeds;
and how far the operator of each convolution is from orthogonal at the size that it is fed: the largest
``|singular value - 1|``, for the first seed. A network whose layers keep norms cannot sharpen small
differences: it is less accurate on clean digits, and more on noisy ones.
"""

import argparse
import statistics
from typing import get_args

import torch
import torch.nn.functional as F
from convrnn import Method
from sklearn.datasets import load_digits
from torch import Tensor, nn

from orthoconv_param import orthogonal, orthogonality_defect

EPOCHS = 10
TRAINING = slice(0, 1500)
TEST = slice(1500, 1797)
NOISE = 0.4  # standard deviation; pixels are between 0 and 1
SIZES = {0: 8, 2: 8, 4: 4}  # of the images that each convolution is fed


def cnn() -> nn.Sequential:
    """Return the network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def train(model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
    """Train on the first digits, by Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING.stop).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Sequential, images: Tensor, labels: Tensor, noise: float) -> float:
    """Return the share of the other digits that are named right, in per cent."""
    x = images[TEST]
    x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return 100 * (model(x).argmax(1) == labels[TEST]).float().mean().item()


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds, one network each"
    )
    parser.add_argument(
        "--method", choices=get_args(Method), default="split", help="method of `orthogonal`"
    )
    boundaries = ["walls", "circular"]
    parser.add_argument("--boundary", choices=boundaries, default="walls", help="boundary of `orthogonal`")
    options = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    rows: dict[str, list[tuple[float, float]]] = {}
    defects: dict[str, list[float]] = {}

    def record(title: str, model: nn.Sequential) -> None:
        clean, noisy = (accuracy(model, images, labels, noise) for noise in (0, NOISE))
        rows.setdefault(title, []).append((clean, noisy))
        defects.setdefault(title, [orthogonality_defect(model[i], n) for i, n in SIZES.items()])

    for seed in options.seeds:
        torch.manual_seed(seed)
        plain = cnn()
        train(plain, images, labels)
        record("plain, trained", plain)

        torch.manual_seed(seed)
        model = cnn()
        for i in SIZES:
            orthogonal(model[i], method=options.method, boundary=options.boundary)  # the one line
        record("orthogonal, untrained", model)
        train(model, images, labels)
        record("orthogonal, trained", model)

    print(
        f"{'':<24}{'accuracy, %':>14}{'with noise':>14}" + "".join(f"{f'defect of {i}':>14}" for i in SIZES)
    )
    for title, found in rows.items():
        spreads = []
        for values in zip(*found, strict=True):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            spreads.append(f"{statistics.mean(values):.1f} ± {deviation:.1f}")
        shares = "".join(f"{text:>14}" for text in spreads)
        print(f"{title:<24}{shares}" + "".join(f"{defect:>14.0e}" for defect in defects[title]))


if __name__ == "__main__":
    main()
