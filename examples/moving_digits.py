"""Moving digits: a pretrained ConvLSTM is made orthogonal by degrees, without losing what it has learned.

Scanned digits (scikit-learn's `load_digits`) move and bounce on a periodic canvas. A ConvLSTM, the
usual one with a single convolution from [input, state] to four stacked gates, sees the first frames and
predicts the rest. It is trained, or its checkpoint is loaded. Then three copies are fine-tuned, for as
many steps on the same videos:

  original  as it is;
  cliff     the four hidden-to-hidden blocks of its recurrent convolution are replaced at once by the
            nearest orthogonal ones, `retrofit(..., method="exponential", anneal=False)`;
  annealed  they are moved there while it is trained, `retrofit` and `set_orthogonality(model, t)`;

and a fourth, again the original, for as many seconds as the annealed one took. The program prints
`report` of the model before and after, and a table: the loss on unseen digits, over as many predicted
frames as in training and over five times as many. It saves the loss against the step, and frames of a
long video.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from orthoconv_param import generators, report, retrofit, set_orthogonality
from orthoconv_param.functional import gate_blocks

TRAINING_DIGITS = 1500  # of 1797; the others are for testing
LONGER = 5  # times as many predicted frames as in training
AS_LONG = "original, as long"  # in seconds as the annealed one


class MovingDigits:
    """Videos of one digit each, a pixel a frame on both axes, reflected where its box meets the edge."""

    def __init__(self, canvas: int, frames: int, *, train: bool, seed: int) -> None:
        images = torch.tensor(load_digits().images / 16, dtype=torch.float32)
        self.digits = images[:TRAINING_DIGITS] if train else images[TRAINING_DIGITS:]
        self.canvas, self.frames = canvas, frames
        self.random = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """Return videos ``(size, frames, 1, canvas, canvas)``, with values in [0, 1]."""
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
        """Return logits of frames 1, 2, ...; after ``context`` frames it sees its own predictions only."""
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
        """Return the cross-entropy in nats per pixel of frames that can be foretold: from the third on."""
        return F.binary_cross_entropy_with_logits(self(video, context)[:, 1:], video[:, 2:])


def train(
    title: str,
    model: ConvLSTM,
    data: MovingDigits,
    steps: int,
    lr: float,
    arguments: argparse.Namespace,
    annealed: int = 0,
) -> list[float]:
    """Train by Adam on fresh videos, its learning rate rising and falling once; return the losses.

    In the first ``annealed`` steps the model goes from its pretrained operators to orthogonal ones.
    """
    slow = generators(model)
    rest = [p for p in model.parameters() if all(p is not g for g in slow)]
    rates = [lr, lr * arguments.generator_lr] if slow else [lr]
    optimizer = torch.optim.Adam([{"params": p} for p in (rest, slow) if p])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(steps, 1))
    losses: list[float] = []
    with tqdm(range(1, steps + 1), desc=title, unit="step", mininterval=0.5) as progress:
        for step in progress:
            if step < annealed:
                set_orthogonality(model, step / annealed)
            elif step == annealed:
                set_orthogonality(model, 1, final=True)
            optimizer.zero_grad()
            loss = model.loss(data.batch(arguments.batch), arguments.context)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def draw_losses(path: Path, curves: dict[str, list[float]]) -> None:
    """Save a plot of the training losses against the step, averaged over 15 steps around each."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for title, losses in curves.items():
        window = min(15, len(losses))
        means = torch.tensor(losses).unfold(0, window, 1).mean(-1)
        axis.plot([i + (window + 1) / 2 for i in range(len(means))], means, label=title)
    axis.set(xlabel="step of fine-tuning", ylabel="training loss (nats per pixel)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_frames(path: Path, rows: dict[str, Tensor], context: int) -> None:
    """Save a picture of about 14 frames of one video, true and predicted, one above the other."""
    count = len(next(iter(rows.values())))
    shown = range(count - 1, -1, -max(1, round(count / 14)))[::-1]
    figure, axes = plt.subplots(
        len(rows), len(shown), figsize=(0.75 * len(shown) + 1.2, 0.9 * len(rows) + 0.5), squeeze=False
    )
    for row, (title, frames) in zip(axes, rows.items(), strict=True):
        for axis, t in zip(row, shown, strict=True):
            axis.imshow(frames[t, 0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if row is axes[0]:
                axis.set_title(f"{t + 1}" if t + 1 < context else f"{t + 1}*", fontsize=8)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"* predicted from the model's own predictions ({context} frames seen)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments_of_the_command_line() -> argparse.Namespace:
    """Return the options that the user asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: float | Path, text: str) -> None:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{text} (default: %(default)s)"
        )

    add("--steps", 600, "training steps of the original")
    add("--finetune", 300, "steps after that, of each of the three")
    add("--annealed", 0.3, "share of these in which it becomes orthogonal")
    add("--lr", 3e-2, "Adam's learning rate")
    add("--finetune-lr", 1e-2, "after that")
    add("--generator-lr", 1.0, "of the generators of orthogonal kernels, in units of that")
    add("--hidden", 16, "channels of the state")
    add("--canvas", 16, "side, in pixels")
    add("--frames", 14, "length of a video")
    add("--context", 8, "frames that are seen")
    add("--batch", 8, "videos in a step")
    add("--seed", 0, "of the videos and of the initial weights")
    add("--out", Path("results"), "folder to write to")
    parser.add_argument(
        "--load", type=Path, help="checkpoint of a ConvLSTM to start from, instead of training"
    )
    arguments = parser.parse_args()
    if arguments.canvas < 10:
        parser.error("--canvas should be at least 10: a digit has 8 pixels, and moves")
    if not 2 <= arguments.context < arguments.frames:
        parser.error("--context should be at least 2 and less than --frames")
    if not 0 < arguments.annealed <= 1:
        parser.error("--annealed should be a share: above 0, at most 1")
    return arguments


def main() -> None:
    """Run the program."""
    arguments = arguments_of_the_command_line()
    plt.switch_backend("agg")  # pictures go to files
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.load or arguments.out / "convlstm.pt"

    def videos(frames: int, *, training: bool, seed: int) -> MovingDigits:
        return MovingDigits(arguments.canvas, frames, train=training, seed=seed)

    longer = arguments.context + LONGER * (arguments.frames - arguments.context)
    test = videos(arguments.frames, training=False, seed=arguments.seed).batch(128)
    long = videos(longer, training=False, seed=arguments.seed).batch(64)
    if arguments.load is None:
        model = ConvLSTM(arguments.hidden)
        data = videos(arguments.frames, training=True, seed=arguments.seed)
        train("training", model, data, arguments.steps, arguments.lr, arguments)
        torch.save(model.state_dict(), checkpoint)

    blocks = {"gates": gate_blocks(arguments.hidden, gates=4, inputs=1)}
    example = (test[:1], arguments.context)
    annealed = max(1, round(arguments.annealed * arguments.finetune))
    rows = {"true": long[0, 1:]}
    curves: dict[str, list[float]] = {}
    table: list[str] = []

    def pretrained() -> ConvLSTM:
        model = ConvLSTM(arguments.hidden)
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model

    def measure(title: str, model: ConvLSTM, budget: str = "") -> None:
        with torch.no_grad():
            losses = [model.loss(video, arguments.context).item() for video in (test, long)]
            rows[title] = model(long[:1], arguments.context)[0].sigmoid()
        defect = max(row.defect for row in report(model, example, blocks=blocks).rows if "[" in row.name)
        table.append(f"{title:<20}{losses[0]:>10.4f}{losses[1]:>11.4f}{defect:>10.1e}  {budget}".rstrip())

    model = pretrained()
    print(f"\n{report(model, example, blocks=blocks)}\n")
    measure("pretrained", model)
    took: dict[str, float] = {}
    for title in ("original", "cliff", "annealed", AS_LONG):
        ours, steps = pretrained(), arguments.finetune
        if title == AS_LONG:
            steps = round(steps * took["annealed"] / took["original"])
        elif title != "original":
            model = retrofit(ours, example, blocks=blocks, method="exponential", anneal=title == "annealed")
        data = videos(arguments.frames, training=True, seed=arguments.seed + 1)
        start = time.perf_counter()
        curves[title] = train(
            title, ours, data, steps, arguments.finetune_lr, arguments,
            annealed if title == "annealed" else 0,
        )  # fmt: skip
        took[title] = time.perf_counter() - start
        measure(title, ours, f"{steps} steps, {took[title]:.0f} s")

    print(f"\n{report(model, example)}\n")
    predicted = arguments.frames - arguments.context
    titles = f"{predicted} frames", f"{LONGER * predicted} frames"
    print(f"{'':<20}{titles[0]:>10}{titles[1]:>11}{'defect':>10}  fine-tuned")
    print(*table, sep="\n")
    print("(loss on unseen digits, in nats per pixel; the largest defect of the hidden-to-hidden blocks)")
    pictures = arguments.out / "losses.png", arguments.out / "frames.png"
    del curves[AS_LONG]
    draw_losses(pictures[0], curves)
    draw_frames(pictures[1], rows, arguments.context)
    print(f"\nwrote {', '.join(map(str, (*([] if arguments.load else [checkpoint]), *pictures)))}")


if __name__ == "__main__":
    main()
