"""Moving digits: partly orthogonal ConvLSTMs against the usual one, trained for the same time.

Scanned digits (scikit-learn's `load_digits`) move and bounce off the walls of a canvas. A zero-padded
ConvLSTM, with a single convolution from [input, state] to four stacked gates, sees the first frames and
predicts the rest. Each variant (see `convlstm.py`) is compared with the original, trained for the same
time:

  fresh          trained from scratch;
  trained, long  made from the trained original, and fine-tuned on five times as many predicted frames (the
                 moving memory, which no trained original has, goes on from its own training);
  trained        the same, fine-tuned on videos as before (with ``--all``);
  fresh, long    trained from scratch on long videos (with ``--all``).

Training minimises the loss of all frames from the third on; tables show that of the predicted ones, which
follow the frames that are seen. How many steps fit into the same time is measured first. With ``--all``
there are more variants (the candidate's block alone, paths of the memory, exponential and split, circular
and walls, with and without annealing, an orthogonal start alone), all ways of training, and tables for
equal numbers of steps too.

    python examples/moving_digits.py --out DIR

prints tables, means and standard deviations over the seeds: the loss on unseen digits, over as many
predicted frames as in training and over five times as many; the same with noise in the frames that are
seen; and what becomes of the state in 1000 frames. It writes moving_digits.csv, a plot of the losses, and
frames of a long video. Choose settings with ``--validate``, which tests on other digits.
"""

import time
from collections.abc import Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from colours import colour_of
from convlstm import MEMORY, ConvLSTM, Variant, cost_of_a_step, train
from experiment import digits, mean_and_deviation, parse, parser, positive, run, save, spread, table
from torch import Tensor

from orthoconv_param import generators, report

SETS = {"training": slice(0, 1200), "validation": slice(1200, 1500), "test": slice(1500, 1797)}
LONGER = 5  # times as many predicted frames as in training
ROLLOUT = 1000  # predicted frames
NOISE = 0.2  # standard deviation

VARIANTS = {
    "original": Variant(),
    "all blocks": Variant("all"),
    "moving memory": Variant(memory="diagonal", slower=0.3),
}
MORE = {
    "candidate's block": Variant("candidate"),
    "memory path": MEMORY,
    "memory path and candidate's block": Variant("candidate", "identity", slower=MEMORY.slower),
    "memory path, free": Variant(memory="identity", free=True, slower=MEMORY.slower),
    "moving memory, free": Variant(memory="diagonal", free=True, slower=0.3),
    "all blocks, only at first": Variant("all", start=True),
    "all blocks, at once": Variant("all", anneal=False),
    "all blocks, exponential": Variant("all", method="exponential"),
    "circular: original": Variant(boundary="circular"),
    "circular: all blocks": Variant("all", boundary="circular"),
    "circular: all blocks, exponential": Variant("all", method="exponential", boundary="circular"),
}
Start = Literal["fresh", "trained", "trained, long", "fresh, long"]


class MovingDigits:
    """Videos of one digit each, a pixel a frame on both axes, reflected where its box meets a wall.

    Args:
        canvas: side, in pixels.
        frames: of a video.
        context: how many of them are seen.
        of: which digits, a key of `SETS`.
        seed: of the videos.
    """

    def __init__(self, canvas: int, frames: int, context: int, of: str = "training", seed: int = 0) -> None:
        self.digits = shuffled_digits()[SETS[of]]
        self.canvas, self.frames, self.context = canvas, frames, context
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

    def loss(self, model: ConvLSTM, size: int) -> Tensor:
        """Return the loss on a fresh batch."""
        video = self.batch(size)
        return cross_entropy(model(video, self.context), video)

    def example(self) -> tuple[Any, ...]:
        """Return what a network is called with."""
        shape = 1, self.frames, 1, self.canvas, self.canvas
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)), self.context


def shuffled_digits() -> Tensor:
    """Return all scanned digits in an order of their own: in scikit-learn's, writers follow each other."""
    images, _ = digits()
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def cross_entropy(logits: Tensor, video: Tensor, first: int = 2) -> Tensor:
    """Return nats per pixel, of all frames that can be foretold: from the third on, or a later one."""
    return F.binary_cross_entropy_with_logits(logits[:, first - 1 :], video[:, first:])


class Settings(NamedTuple):
    """What all networks of a run have in common."""

    hidden: int
    canvas: int
    frames: int
    context: int
    batch: int
    annealed: float
    on: str

    def videos(self, of: str, seed: int, frames: int = 0) -> MovingDigits:
        """Return the source of videos of a set."""
        return MovingDigits(self.canvas, frames or self.frames, self.context, of, seed)

    @property
    def long(self) -> int:
        """Frames of a video with `LONGER` times as many predicted frames."""
        return self.context + LONGER * (self.frames - self.context)


def experiment(
    settings: Settings, name: str, start: Start, budget: str, seed: int, steps: int, lr: float, out: Path
) -> dict[str, Any]:
    """Train a variant; return a row of the CSV file. Save what `trained` ones start from, and are."""
    torch.set_flush_denormal(True)  # gradients that have decayed to less than 1e-38 cost a CPU tenfold
    variant = {**VARIANTS, **MORE}[name]
    fresh, is_long = start.startswith("fresh"), start.endswith("long")
    before = name if variant.moves else _before(variant)
    checkpoint = _path(out, "fresh", f"{before}-seconds", seed)
    torch.manual_seed(seed)
    frames = settings.long if is_long else settings.frames
    data = settings.videos("training", seed if fresh else 1000 + seed, frames)
    trained = None if fresh else torch.load(checkpoint, weights_only=True)
    model = variant.made(settings.hidden, data, trained)
    has_way = not fresh and variant.blocks != "none" and variant.anneal
    annealed = max(1, round(settings.annealed * steps)) if has_way else 0
    begun = time.perf_counter()
    train(model, data, steps, lr, batch=settings.batch, slower=variant.slower, annealed=annealed)
    seconds = time.perf_counter() - begun
    torch.save(model.state_dict(), _path(out, start, f"{name}-{budget}", seed))
    row = {"network": name, "start": start, "budget": budget, "seed": seed, "steps": steps}
    return {**row, "seconds": round(seconds, 1), **measured(settings, model, data)}


def _before(variant: Variant) -> str:
    """Return the name of the original with a variant's boundary."""
    return "original" if variant.boundary == "walls" else "circular: original"


def _path(out: Path, start: Start, name: str, seed: int) -> Path:
    words = f"{start}-{name}-{seed}".replace(":", "").replace(",", "").replace(" ", "_")
    return out / "checkpoints" / f"{words}.pt"


@torch.no_grad()
def measured(settings: Settings, model: ConvLSTM, data: MovingDigits) -> dict[str, float]:
    """Return how good a network is, and how far what is to be orthogonal in it is from that."""
    context = settings.context
    short = settings.videos(settings.on, 99).batch(128)
    long = settings.videos(settings.on, 99, settings.long).batch(64)
    noise = NOISE * torch.randn(short.shape, generator=torch.Generator().manual_seed(0))
    endless = settings.videos(settings.on, 99, context + ROLLOUT).batch(8)
    states = model.states(endless, context)
    seen = model.states(data.batch(64), context)
    drawn, last = torch.stack([model.draw(h) for h, _ in states[-100:]], 1), endless[:, -100:]
    moves = [x.diff(dim=1).abs().mean() for x in (drawn.sigmoid(), last)]
    return {
        "short": cross_entropy(model(short, context), short, context).item(),
        "long": cross_entropy(model(long, context), long, context).item(),
        "noisy": cross_entropy(model(short + noise, context), short, context).item(),
        "rollout": F.binary_cross_entropy_with_logits(drawn, last).item(),
        "norm in training": largest_memory(seen),
        "norm later": largest_memory(states[data.frames :]),
        "motion": (moves[0] / moves[1]).item(),
        "defect": defect(model, settings.canvas),
    }


def defect(model: ConvLSTM, side: int) -> float:
    """Return the largest defect of the blocks, or of the memory's path; nan if none is made orthogonal."""
    parts: list[Any] = [m for m in (model.gates, model.move) if [*generators(m)]]
    rows = [r for m in parts for r in report(m, torch.zeros(1, m.in_channels, side, side)).rows]
    return max((r.defect for r in rows if r.parametrized == "yes"), default=nan)


def largest_memory(states: list[tuple[Tensor, Tensor]]) -> float:
    """Return the root mean square of a memory's elements, the largest of all videos and frames."""
    return max(c.square().mean((1, 2, 3)).sqrt().max().item() for _, c in states)


# Tables and figures


def losses_of(rows: list[dict[str, Any]], name: str, start: Start, budget: str, column: str) -> list[float]:
    """Return the numbers of a network, one for each seed."""
    same = {"network": name, "start": start, "budget": budget}
    return [row[column] for row in rows if all(row[key] == value for key, value in same.items())]


def tables(rows: list[dict[str, Any]], costs: Mapping[str, float], settings: Settings) -> str:
    """Return the tables, in Markdown."""
    predicted = settings.frames - settings.context
    parts = []
    kinds = dict.fromkeys((row["start"], row["budget"]) for row in rows)
    for start, budget in kinds:
        names = list(
            dict.fromkeys(r["network"] for r in rows if (r["start"], r["budget"]) == (start, budget))
        )
        cells = []
        for name in names:
            variant = {**VARIANTS, **MORE}[name]
            cell = [name, f"{losses_of(rows, name, start, budget, 'steps')[0]}", f"{costs[name]:.2f}"]
            for column in ("short", "long", "noisy"):
                ours = losses_of(rows, name, start, budget, column)
                usual = losses_of(rows, _before(variant), start, "seconds", column)
                ratio, _ = mean_and_deviation([a / b for a, b in zip(ours, usual, strict=True)])
                cell.append(f"{spread(ours, 4)} ({ratio:.2f})")
            worst = max(losses_of(rows, name, start, budget, "defect"))
            cell.append("-" if isnan(worst) else f"{worst:.0e}")
            cells.append(cell)
        header = ["network", "steps", "cost", f"{predicted} frames", f"{LONGER * predicted} frames"]
        header += [f"{predicted} frames, noise", "defect"]
        title = f"{start}, for as many {budget}" + (" as the original" if budget == "steps" else "")
        parts.append(f"{title}:\n\n{table(header, cells)}")
    cells = [
        [
            name,
            start,
            *(
                spread(losses_of(rows, name, start, "seconds", column), digits)
                for column, digits in (
                    ("norm in training", 2), ("norm later", 2), ("rollout", 2), ("motion", 2)
                )
            ),
        ]
        for start in dict.fromkeys(row["start"] for row in rows)
        for name in dict.fromkeys(row["network"] for row in rows if row["start"] == start)
    ]  # fmt: skip
    header = ["network", "start", "norm in training", f"norm in {ROLLOUT} frames", "loss", "motion"]
    parts.append(f"{ROLLOUT} predicted frames:\n\n{table(header, cells)}")
    return "\n\n".join(parts)


def draw_losses(path: Path, rows: list[dict[str, Any]], settings: Settings) -> None:
    """Draw the losses of all networks that have the same seconds: a dot for each seed."""
    predicted = settings.frames - settings.context
    starts = list(dict.fromkeys(row["start"] for row in rows))
    names = list(dict.fromkeys(row["network"] for row in rows))
    size = 10, len(starts) * (0.9 + 0.25 * len(names))
    figure, panels = plt.subplots(len(starts), 2, figsize=size, layout="constrained", squeeze=False)
    for start, some in zip(starts, panels, strict=True):
        for column, axes, count in zip(
            ("short", "long"), some, (predicted, LONGER * predicted), strict=True
        ):
            for n, name in enumerate(names):
                values = losses_of(rows, name, start, "seconds", column)
                axes.plot(values, [n] * len(values), "o", color=colour_of(name), alpha=0.5)
                axes.plot(
                    mean_and_deviation(values)[0] if values else [],
                    n if values else [],
                    "|",
                    color=colour_of(name),
                    markersize=16,
                )
            axes.set_yticks(range(len(names)), names)
            axes.set(title=f"{start}: {count} frames", ylim=(len(names) - 0.5, -0.5))
            axes.grid(axis="x", alpha=0.3)
            if start == starts[-1]:
                axes.set_xlabel("nats per pixel (dot: a seed; line: their mean)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_frames(path: Path, frames: Mapping[str, Tensor], context: int) -> None:
    """Draw about 14 frames of one video, true and predicted, one above the other."""
    count = len(next(iter(frames.values())))
    shown = range(count - 1, -1, -max(1, round(count / 14)))[::-1]
    size = 0.75 * len(shown) + 1.6, 0.9 * len(frames) + 0.5
    figure, axes = plt.subplots(len(frames), len(shown), figsize=size, squeeze=False)
    for axis, t in zip(axes[0], shown, strict=True):
        axis.set_title(f"{t + 1}" if t + 1 <= context else f"{t + 1}*", fontsize=8)
    for row, (title, images) in zip(axes, frames.items(), strict=True):
        for axis, t in zip(row, shown, strict=True):
            axis.imshow(images[t, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"* predicted from the network's own predictions ({context} frames seen)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


@torch.no_grad()
def frames_of(settings: Settings, seed: int, out: Path) -> dict[str, Tensor]:
    """Return a long video, and what the networks that are fine-tuned on such videos make of it."""
    video = settings.videos(settings.on, 99, settings.long).batch(1)
    found = {"true": video[0, 1:]}
    for name, variant in VARIANTS.items():
        model = variant.made(settings.hidden, settings.videos("training", 0))
        model.load_state_dict(
            torch.load(_path(out, "trained, long", f"{name}-seconds", seed), weights_only=True)
        )
        found[name] = model(video, settings.context)[0].sigmoid()
    return found


def main() -> None:
    """Run the program."""
    options = parser(__doc__)

    def add(name: str, default: float, text: str) -> None:
        options.add_argument(name, type=positive if name != "--context" and isinstance(default, int)
                             else type(default), default=default, help=text)  # fmt: skip

    add("--steps", 120, "training steps of the original from scratch")
    add("--finetune", 36, "fine-tuning steps of the trained original")
    add("--lr", 3e-2, "highest learning rate from scratch")
    add("--finetune-lr", 1e-2, "highest learning rate of fine-tuning")
    add("--annealed", 0.3, "share of fine-tuning in which blocks become orthogonal")
    add("--hidden", 16, "channels of the state")
    add("--canvas", 16, "side of the canvas, in pixels")
    add("--frames", 14, "frames of a video")
    add("--context", 8, "frames that are seen first")
    add("--batch", 8, "videos in a step")
    options.add_argument("--all", action="store_true", help="all variants; tables for equal steps too")
    options.add_argument("--validate", action="store_true", help="test on validation digits, to tune")
    arguments = parse(options, seeds=[0, 1], steps=8, finetune=8, hidden=4)
    if arguments.canvas < 10:
        options.error("--canvas should be at least 10: a digit has 8 pixels, and moves")
    if not 2 <= arguments.context < arguments.frames:
        options.error("--context should be at least 2 and less than --frames")
    if not 0 < arguments.annealed <= 1:
        options.error("--annealed should be a share: above 0, at most 1")
    on = "validation" if arguments.validate else "test"
    common = {name: getattr(arguments, name) for name in Settings._fields if name != "on"}
    settings = Settings(**common, on=on)
    out, seeds = arguments.out, arguments.seeds
    (out / "checkpoints").mkdir(exist_ok=True)
    torch.set_flush_denormal(True)
    variants = {**VARIANTS, **MORE} if arguments.all else VARIANTS
    data = settings.videos("training", 0)
    found = cost_of_a_step(list(variants.values()), settings.hidden, data, settings.batch)
    costs = {name: 1.0 if "original" in name else cost for name, cost in zip(variants, found, strict=True)}

    jobs = []
    for start, budget in [(s, b) for s in get_args(Start) for b in ("seconds", "steps")]:
        for name, variant in variants.items():
            fresh, is_long = start.startswith("fresh"), start.endswith("long")
            if (fresh and not variant.anneal) or (not fresh and variant.start):
                continue  # these make no difference there
            if budget == "steps" and (not arguments.all or is_long or costs[name] == 1):
                continue
            if start in ("trained", "fresh, long") and not arguments.all:
                continue
            steps, lr = (
                (arguments.steps, arguments.lr) if fresh else (arguments.finetune, arguments.finetune_lr)
            )
            steps = max(1, round(steps / costs[name])) if budget == "seconds" else steps
            jobs += [(settings, name, start, budget, seed, steps, lr, out) for seed in seeds]
    begun = [name for name, v in variants.items() if v.moves or name.endswith("original")]
    first = [job for job in jobs if job[1] in begun and job[2:4] == ("fresh", "seconds")]
    others = [job for job in jobs if job not in first]
    rows = []
    for title, some in (("what others start from", first), ("all others", others)):
        rows += run(experiment, some, sum(job[5] for job in some), title, arguments.workers)
    order = [(job[2], job[3], job[1], job[4]) for job in jobs]
    rows.sort(key=lambda row: order.index((row["start"], row["budget"], row["network"], row["seed"])))
    save(out / "moving_digits.csv", rows)
    draw_losses(out / "moving_digits.png", rows, settings)
    frames = frames_of(settings, seeds[0], out)
    draw_frames(out / "moving_digits_frames.png", frames, settings.context)
    print(tables(rows, costs, settings))
    print(
        "\n(loss in nats per pixel on digits that were not trained on, and its ratio to the original's;"
        "\ncost of a step over the original's; the largest defect of what is to be orthogonal)"
    )
    print(f"moving_digits.csv, moving_digits.png and moving_digits_frames.png are in {out}")


if __name__ == "__main__":
    main()
