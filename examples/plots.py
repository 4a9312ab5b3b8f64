"""Draws what orthogonality does to a convolution's spectrum, and to the gradients of a recurrent network.

    python examples/plots.py --out DIR

saves spectrum.png and gradient_norms.png, two figures of the list of experiments, in a few seconds.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from colours import colour_of
from cycler import cycler
from matplotlib.colors import to_hex
from torch import Tensor, nn

from orthoconv_param import orthogonal, plot_gradient_norms, plot_spectrum


class Recurrent(nn.Module):
    """The network ``h(t+1) = tanh(U * h(t) + x(t))``."""

    def __init__(self, recurrence: nn.Module) -> None:
        super().__init__()
        self.recurrence = recurrence

    def forward(self, frames: Tensor) -> Tensor:
        """Return the last state."""
        h = torch.zeros_like(frames[:, 0])
        for x in frames.unbind(1):
            h = torch.tanh(self.recurrence(h) + x)
        return h


def convolution() -> nn.Conv2d:
    """Return an ordinary convolution, with torch's initial values."""
    torch.manual_seed(0)
    return nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)


def main() -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figures")
    parser.add_argument("--steps", type=int, default=200, help="time steps of the recurrent network")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    colours = [to_hex(colour_of(name)) for name in ("orthogonal", "nn.Conv2d")]
    plt.rcParams["axes.prop_cycle"] = cycler(color=colours)  # after, before
    before, after = convolution(), orthogonal(convolution())
    axes = plot_spectrum(after, domain=32, before=before)
    axes[0].figure.savefig(arguments.out / "spectrum.png", dpi=80)

    frames = 0.01 * torch.randn(2, arguments.steps, 16, 16, 16)
    networks = {"orthogonal": Recurrent(after), "nn.Conv2d": Recurrent(before)}
    panel = plot_gradient_norms(networks, frames)
    panel.figure.savefig(arguments.out / "gradient_norms.png", dpi=80)
    print(f"spectrum.png and gradient_norms.png are in {arguments.out}")


if __name__ == "__main__":
    main()
