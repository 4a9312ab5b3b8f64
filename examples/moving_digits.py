"""Moving digits: a pretrained ConvLSTM is made orthogonal in one line, and fine-tuned.

Scanned digits (scikit-learn's `load_digits`) move and bounce on a periodic canvas. A ConvLSTM, the
usual one with a single convolution from [input, hidden state] to four stacked gates, sees the first
frames and predicts the rest. It is trained and saved; then its checkpoint is loaded as anybody's
pretrained model, its recurrent convolution is made `orthogonal` on the canvas, starting from the
operator nearest to the pretrained one, and it is fine-tuned. The program prints, at each point, the loss
on unseen digits, and how far the operator of the recurrent convolution is from orthogonal on the
canvas; for comparison also with the plain parametrization `ConvExponential()` of the weight, which makes
it orthogonal on the kernel's own 3x3 grid, and so not on the canvas.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from orthoconv_param import ConvExponential, orthogonal, orthogonality_defect

TRAINING_DIGITS = 1500  # of 1797; the others are for testing


class MovingDigits:
    """Videos of one digit each, a pixel a frame on both axes, reflected where its box meets the edge."""

    def __init__(self, canvas: int, frames: int, *, train: bool, seed: int) -> None:
        images = torch.tensor(load_digits().images / 16, dtype=torch.float32)
        self.digits = images[:TRAINING_DIGITS] if train else images[TRAINING_DIGITS:]
        self.canvas, self.frames = canvas, frames
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """``(size, frames, 1, canvas, canvas)``, with values in [0, 1]."""
        digits = self.digits[torch.randint(len(self.digits), (size,), generator=self.random)]
        room = self.canvas - 8
        start = torch.randint(room + 1, (size, 2, 1), generator=self.random)
        speed = 2 * torch.randint(2, (size, 2, 1), generator=self.random) - 1
        path = (start + speed * torch.arange(self.frames)) % (2 * room)
        corner = room - (path - room).abs()  # a triangle wave: there and back
        video = torch.zeros(size, self.frames, 1, self.canvas, self.canvas)
        for n, (digit, (rows, columns)) in enumerate(zip(digits, corner.tolist(), strict=True)):
            for t, (y, x) in enumerate(zip(rows, columns, strict=True)):
                video[n, t, 0, y : y + 8, x : x + 8] = digit
        return video


class ConvLSTM(nn.Module):
    """One ConvLSTM cell with periodic boundary, and a 1x1 convolution that draws the next frame."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(1 + hidden, 4 * hidden, 3, padding=1, padding_mode="circular")
        self.draw = nn.Conv2d(hidden, 1, 1)
        nn.init.ones_(self.gates.get_parameter("bias")[hidden : 2 * hidden])  # remember at first

    def forward(self, video: Tensor, context: int) -> Tensor:
        """Logits of frames 1, 2, ...; after ``context`` frames it sees its own predictions only."""
        h = c = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        logits: list[Tensor] = []
        with parametrize.cached():  # a parametrized weight is computed once, not once a frame
            for t in range(video.shape[1] - 1):
                x = video[:, t] if t < context else logits[-1].sigmoid()
                write, keep, read, value = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
                c = keep.sigmoid() * c + write.sigmoid() * value.tanh()
                h = read.sigmoid() * c.tanh()
                logits.append(self.draw(h))
        return torch.stack(logits, 1)

    def loss(self, video: Tensor, context: int) -> Tensor:
        """Cross-entropy, in nats per pixel, of all frames that can be foretold: from the third on."""
        return F.binary_cross_entropy_with_logits(self(video, context)[:, 1:], video[:, 2:])


def train(
    model: ConvLSTM, data: MovingDigits, steps: int, lr: float, arguments: argparse.Namespace
) -> None:
    """Adam on fresh videos, its learning rate rising and falling once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1))
    with tqdm(range(steps), unit="step", mininterval=0.5) as progress:
        for _ in progress:
            optimizer.zero_grad()
            loss = model.loss(data.batch(arguments.batch), arguments.context)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.4f}")


def describe(title: str, model: ConvLSTM, test: Tensor, context: int) -> Tensor:
    """Prints a row of the table, and returns the predicted frames of the first video."""
    with torch.no_grad():
        loss = model.loss(test, context).item()
        defect = orthogonality_defect(model.gates, test.shape[-1])
        frames = model(test[:1], context)[0].sigmoid()
    print(f"{title:<28}{loss:>10.4f}{defect:>10.1e}", flush=True)
    return frames


def draw(path: Path, rows: dict[str, Tensor], context: int) -> None:
    """Saves the frames of one video, true and predicted, one above the other."""
    count = len(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows), count, figsize=(0.75 * count + 1.2, 0.9 * len(rows) + 0.5), squeeze=False
    )
    for row, (title, frames) in zip(axes, rows.items(), strict=True):
        for t, (axis, frame) in enumerate(zip(row, frames, strict=True), start=1):
            axis.imshow(frame[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if row is axes[0]:
                axis.set_title(f"{t}" if t < context else f"{t}*", fontsize=8)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"* predicted from the model's own predictions ({context} frames seen)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--finetune", type=int, default=300, help="steps after that (default: %(default)s)")
    parser.add_argument(
        "--lr", type=float, default=3e-2, help="Adam's learning rate (default: %(default)s)"
    )
    parser.add_argument("--finetune-lr", type=float, default=1e-2, help="after that (default: %(default)s)")
    parser.add_argument(
        "--hidden", type=int, default=16, help="channels of the state (default: %(default)s)"
    )
    parser.add_argument("--canvas", type=int, default=16, help="side, in pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=14, help="length of a video (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=8, help="frames that are seen (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="videos in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)"
    )
    arguments = parser.parse_args()
    plt.switch_backend("agg")  # pictures go to files
    if arguments.canvas < 10:
        parser.error("--canvas should be at least 10: a digit has 8 pixels, and moves")
    if not 2 <= arguments.context < arguments.frames:
        parser.error("--context should be at least 2 and less than --frames")

    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "convlstm.pt"
    options = {"canvas": arguments.canvas, "frames": arguments.frames}
    data = MovingDigits(**options, train=True, seed=arguments.seed)
    test = MovingDigits(**options, train=False, seed=arguments.seed).batch(128)

    print("training an ordinary ConvLSTM")
    model = ConvLSTM(arguments.hidden)
    train(model, data, arguments.steps, arguments.lr, arguments)
    torch.save(model.state_dict(), checkpoint)

    def pretrained() -> ConvLSTM:
        model = ConvLSTM(arguments.hidden)
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model

    model, plain = pretrained(), pretrained()
    print(f"\n{'':<28}{'test loss':>10}{'defect':>10}")
    rows = {"true": test[0, 1:]}
    rows["pretrained"] = describe("pretrained", model, test, arguments.context)
    parametrize.register_parametrization(plain.gates, "weight", ConvExponential())
    describe("ConvExponential(), on 3x3", plain, test, arguments.context)
    train(plain, data, arguments.finetune, arguments.finetune_lr, arguments)
    describe("... fine-tuned", plain, test, arguments.context)
    orthogonal(model.gates, domain=arguments.canvas)
    rows["orthogonal"] = describe("orthogonal", model, test, arguments.context)
    train(model, data, arguments.finetune, arguments.finetune_lr, arguments)
    rows["fine-tuned"] = describe("orthogonal and fine-tuned", model, test, arguments.context)
    picture = arguments.out / "moving_digits.png"
    draw(picture, rows, arguments.context)
    print(f"\nwrote {checkpoint} and {picture}")


if __name__ == "__main__":
    main()
