"""An ordinary CNN whose convolutions are made orthogonal, trained on scanned digits (scikit-learn's).

It prints how far the operator of each convolution is from orthogonal at the size that it is fed: as it was
made, after `orthogonal`, and after training.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from orthoconv_param import orthogonal, orthogonality_defect

EPOCHS = 10


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    methods = ["exponential", "split"]
    parser.add_argument("--method", choices=methods, default=methods[0], help="of `orthogonal`")
    method = parser.parse_args().method

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip
    sizes = {0: 8, 2: 8, 4: 4}  # of the images that each convolution is fed

    def report(title: str) -> None:
        with torch.no_grad():
            accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
        defects = "".join(f"{orthogonality_defect(model[i], n):>10.0e}" for i, n in sizes.items())
        print(f"{title:<24}{accuracy:>10.1%}{defects}")

    print(f"{'':<24}{'accuracy':>10}" + "".join(f"{f'layer {i}':>10}" for i in sizes))
    report("ordinary")
    for i in sizes:
        orthogonal(model[i], method=method)  # the one line
    report("orthogonal")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    report("orthogonal and trained")


if __name__ == "__main__":
    main()
