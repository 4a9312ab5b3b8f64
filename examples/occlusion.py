"""Occlusion: a digit passes behind a screen, is hidden for T frames, and is to be drawn when it comes out.

A scanned digit (scikit-learn's) moves along a corridor, a pixel a frame, to the right or to the left. In
the middle is a screen. A zero-padded ConvLSTM sees the video until the last frame in which the digit is
hidden, and has to predict what comes out. While the digit is hidden nothing shows its shape or place: both
have to be remembered for T steps. The corridor's length grows with T.

    python examples/occlusion.py --out DIR

trains the original and its variants (see `convlstm.py`): `fresh` from scratch, with each T; and `trained`,
made from an original trained with the least T, fine-tuned with the next and then the longest. (The moving
memory itself was trained with the least T first.) All are trained for the same time.

It prints a table: the squared error of the digit drawn where it comes out, on unseen digits, over that of
the mean of all digits; means and standard deviations over the seeds. It writes occlusion.csv, a plot of
gradients over time for the longest T, before and after training, and what was drawn. Choose settings with
``--validate``, which tests on other digits.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from colours import colour_of
from convlstm import MEMORY, ConvLSTM, Variant, cost_of_a_step, train
from experiment import mean_and_deviation, parse, parser, positive, run, save, spread, table
from moving_digits import SETS, shuffled_digits
from torch import Tensor

SIDE = 8  # of a digit, and height of the corridor
MARGIN = 10  # columns on each side of the screen
SCREEN = 0.5  # gray
FLOOR = 1e-20  # of the figure of gradients

VARIANTS = {
    "original": Variant(),
    "all blocks": Variant("all"),
    "memory path": MEMORY,
    "moving memory": Variant(memory="sideways", slower=0.03),
}
MORE = {
    "candidate's block": Variant("candidate"),
    "memory path, free": Variant(memory="identity", free=True, slower=MEMORY.slower),
    "moving memory, free": Variant(memory="sideways", free=True, slower=0.03),
    "all blocks, only at first": Variant("all", start=True),
}
Start = Literal["fresh", "trained"]


class Occlusion:
    """Videos of a digit that passes behind a screen.

    Args:
        hidden: frames in which nothing of the digit is seen.
        of: which digits, a key of `SETS`.
        seed: of the videos.
    """

    def __init__(self, hidden: int, of: str = "training", seed: int = 0) -> None:
        self.digits = shuffled_digits()[SETS[of]]
        self.mean = shuffled_digits()[SETS["training"]].mean(0)
        self.random = torch.Generator().manual_seed(seed)
        width = hidden + SIDE - 1
        self.screen = torch.zeros(SIDE, 2 * MARGIN + width, dtype=torch.bool)
        self.screen[:, MARGIN : MARGIN + width] = True
        first, last = 2, MARGIN + width  # the digit's columns in the first frame and in the last
        self.columns = range(first, last + 1)
        self.context = last - SIDE - first + 1  # until the last frame in which the digit is hidden

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return videos ``(size, frames, 1, *size)``, with values in [0, 1], and which digits go left."""
        digits = self.digits[torch.randint(len(self.digits), (size,), generator=self.random)]
        left = torch.randint(2, (size,), generator=self.random).bool()
        return self.video(digits, left), left

    def video(self, digits: Tensor, left: Tensor) -> Tensor:
        """Return videos of digits ``(size, SIDE, SIDE)`` that go left, or right."""
        # a digit that goes left is the mirror image of a mirrored one that goes right
        digits = torch.where(left[:, None, None], digits.flip(-1), digits)
        width = self.screen.shape[1]
        frames = torch.stack([F.pad(digits, (x, width - SIDE - x)) for x in self.columns], 1)
        frames = torch.where(left[:, None, None, None], frames.flip(-1), frames)
        return torch.where(self.screen, SCREEN, frames).unsqueeze(2)

    def loss(self, model: ConvLSTM, size: int) -> Tensor:
        """Return the mean cross-entropy of what is seen, on a fresh batch.

        Frames from the third on count, and ten times where the digit comes out.
        """
        video, _ = self.batch(size)
        logits = model(video, self.context, self.screen)
        seen = ~self.screen
        losses = F.binary_cross_entropy_with_logits(
            logits[:, 1:, 0, seen], video[:, 2:, 0, seen], reduction="none"
        )
        weights = torch.ones(losses.shape[1])
        weights[self.context - 2 :] = 10
        return (losses.mean((0, 2)) * weights).sum() / weights.sum()

    def example(self) -> tuple[Any, ...]:
        """Return what a network is called with."""
        shape = 1, len(self.columns), 1, *self.screen.shape
        video = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return video, self.context, self.screen

    def outside(self, frames: Tensor, left: Tensor) -> Tensor:
        """Return the side where the digit comes out, in the frames in which it does."""
        frames = torch.where(left[:, None, None, None, None], frames.flip(-1), frames)
        return frames[:, -SIDE:, 0, :, -MARGIN:]

    def error(self, model: ConvLSTM, size: int) -> float:
        """Return the squared error in drawing the digit as it comes out, over that of the mean digit."""
        video, left = self.batch(size)
        drawn = model(video, self.context, self.screen).sigmoid()
        guess = self.video(self.mean.expand(size, SIDE, SIDE), left)
        true, ours, mean = (self.outside(x, left) for x in (video, drawn, guess))
        return ((ours - true).square().sum() / (mean - true).square().sum()).item()


class Settings(NamedTuple):
    """What all networks of a run have in common."""

    hidden: int
    batch: int
    annealed: float
    on: str


class Stage(NamedTuple):
    """A network at the end of some training."""

    name: str
    start: Start
    delay: int

    def path(self, out: Path, seed: int) -> Path:
        """Return where it is saved."""
        words = f"occlusion-{self.start}-{self.name}-{self.delay}-{seed}"
        return out / "checkpoints" / f"{words.replace(',', '').replace(' ', '_')}.pt"

    def load(self, out: Path, seed: int) -> Any:
        """Return its checkpoint."""
        return torch.load(self.path(out, seed), weights_only=True)


def experiment(
    settings: Settings, stage: Stage, before: Stage | None, seed: int, steps: int, lr: float, out: Path
) -> dict[str, Any]:
    """Train a variant, from an earlier stage of it or of the original; return a row of the CSV file."""
    torch.set_flush_denormal(True)  # gradients that have decayed to less than 1e-38 cost a CPU tenfold
    variant = {**VARIANTS, **MORE}[stage.name]
    torch.manual_seed(seed)
    task = Occlusion(stage.delay, seed=seed + (0 if before is None else 1000))
    converted = before is not None and before.start == "fresh"
    model = variant.made(settings.hidden, task, before.load(out, seed) if before and converted else None)
    if before and not converted:
        model.load_state_dict(before.load(out, seed))
    has_way = converted and variant.blocks != "none"
    annealed = max(1, round(settings.annealed * steps)) if has_way else 0
    begun = time.perf_counter()
    train(model, task, steps, lr, batch=settings.batch, slower=variant.slower, annealed=annealed)
    seconds = time.perf_counter() - begun
    torch.save(model.state_dict(), stage.path(out, seed))
    with torch.no_grad():
        error = Occlusion(stage.delay, settings.on, 99).error(model, 128)
    row = {"network": stage.name, "start": stage.start, "delay": stage.delay, "seed": seed, "steps": steps}
    return {**row, "seconds": round(seconds, 1), "error": error}


def errors_of(rows: list[dict[str, Any]], **same: Any) -> list[float]:
    """Return the errors of a network, one for each seed."""
    return [row["error"] for row in rows if all(row[key] == value for key, value in same.items())]


def draw_gradients(path: Path, settings: Settings, delay: int, seed: int, out: Path) -> None:
    """Draw the norms of the gradients of the loss by state and memory after each frame."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    for title, axes in zip(("before training", "after training"), panels, strict=True):
        for name, variant in VARIANTS.items():
            torch.manual_seed(seed)
            task = Occlusion(delay, settings.on, 99)
            model = variant.made(settings.hidden, task)
            if title == "after training":
                model.load_state_dict(Stage(name, "fresh", delay).load(out, seed))
            norms = gradients(model, task)
            axes.semilogy(range(1, len(norms) + 1), norms, label=name, color=colour_of(name))
        axes.axvspan(MARGIN - 1, MARGIN - 1 + delay, color="0.9", label="hidden", zorder=0)
        axes.set(title=title, xlabel="frame")
    panels[0].set_ylabel("gradient by state and memory")
    panels[0].set_ylim(bottom=max(FLOOR, panels[0].get_ylim()[0]))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def gradients(model: ConvLSTM, task: Occlusion) -> list[float]:
    """Return the norms of the gradients by state and memory after each frame.

    The loss is the error where the digit comes out, in the frames in which it does.
    """
    video, left = task.batch(16)
    states = model.states(video, task.context, task.screen)
    drawn = torch.stack([model.draw(h).sigmoid() for h, _ in states[-SIDE:]], 1)
    loss = (task.outside(drawn, left) - task.outside(video, left)).square().sum()
    each = [x for pair in states for x in pair]
    found = torch.autograd.grad(loss, each, allow_unused=True)
    squares = [0.0 if g is None else g.double().square().sum().item() for g in found]
    return [(a + b) ** 0.5 for a, b in zip(squares[::2], squares[1::2], strict=True)]


@torch.no_grad()
def draw_frames(path: Path, settings: Settings, delay: int, seed: int, out: Path) -> None:
    """Draw what comes out, as it is and as trained networks draw it: the last frame of six videos."""
    task = Occlusion(delay, settings.on, 99)
    video, left = task.batch(6)
    rows = {"true": task.outside(video, left)[:, -1]}
    for name, variant in VARIANTS.items():
        model = variant.made(settings.hidden, task)
        model.load_state_dict(Stage(name, "trained", delay).load(out, seed))
        drawn = model(video, task.context, task.screen).sigmoid()
        rows[name] = task.outside(drawn, left)[:, -1]
    figure, axes = plt.subplots(len(rows), 6, figsize=(8, 0.9 * len(rows) + 0.5), squeeze=False)
    for some, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image, mirrored in zip(some, images, left, strict=True):
            axis.imshow((image.flip(-1) if mirrored else image).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        some[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(
        f"six digits after {delay} hidden frames, as the networks that were fine-tuned draw them",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def results(rows: list[dict[str, Any]], costs: Mapping[str, float]) -> str:
    """Return the table, in Markdown: errors, and their ratios to the original's."""
    cells = []
    columns = list(dict.fromkeys((row["start"], row["delay"]) for row in rows))
    for name in costs:
        cell = [name, f"{costs[name]:.2f}"]
        for start, delay in columns:
            ours = errors_of(rows, network=name, start=start, delay=delay)
            usual = errors_of(rows, network="original", start=start, delay=delay)
            if not ours:
                cell.append("")
                continue
            ratio, _ = mean_and_deviation([a / b for a, b in zip(ours, usual, strict=True)])
            cell.append(f"{spread(ours, 3)} ({ratio:.2f})")
        cells.append(cell)
    return table(["network", "cost", *(f"{start}, T = {delay}" for start, delay in columns)], cells)


def main() -> None:
    """Run the program."""
    options = parser(__doc__)

    def add(name: str, default: float, text: str) -> None:
        kind = positive if isinstance(default, int) else float
        options.add_argument(name, type=kind, default=default, help=text)

    def add_several(name: str, default: list[int], text: str) -> None:
        options.add_argument(name, type=positive, nargs=3, default=default, metavar="N", help=text)

    add_several("--delays", [5, 20, 50], "T, the least first, with which the trained original is trained")
    add_several("--steps", [1200, 600, 300], "training steps of the original from scratch, for each T")
    options.add_argument("--finetune", type=positive, nargs=2, default=[200, 150], metavar="N",
                         help="fine-tuning steps of the trained original, for each longer T")  # fmt: skip
    add("--lr", 3e-2, "highest learning rate from scratch")
    add("--finetune-lr", 1e-2, "highest learning rate of fine-tuning")
    add("--annealed", 0.3, "share of fine-tuning in which blocks become orthogonal")
    add("--hidden", 16, "channels of the state")
    add("--batch", 8, "videos in a step")
    options.add_argument("--all", action="store_true", help="all variants")
    options.add_argument("--validate", action="store_true", help="test on validation digits, to tune")
    arguments = parse(options, seeds=[0, 1], delays=[1, 2, 3], steps=[8, 8, 8], finetune=[4, 4], hidden=4)
    shortest, *longer = arguments.delays
    if sorted(arguments.delays) != arguments.delays:
        options.error("--delays should rise")
    if not 0 < arguments.annealed <= 1:
        options.error("--annealed should be a share: above 0, at most 1")
    on = "validation" if arguments.validate else "test"
    settings = Settings(arguments.hidden, arguments.batch, arguments.annealed, on)
    out, seeds = arguments.out, arguments.seeds
    (out / "checkpoints").mkdir(exist_ok=True)
    torch.set_flush_denormal(True)
    variants = {**VARIANTS, **MORE} if arguments.all else VARIANTS
    task = Occlusion(longer[0])
    found = cost_of_a_step(list(variants.values()), settings.hidden, task, settings.batch)
    costs = {name: 1.0 if name == "original" else cost for name, cost in zip(variants, found, strict=True)}

    def jobs(stage: Stage, before: Stage | None, steps: int) -> list[tuple[Any, ...]]:
        steps = max(1, round(steps / costs[stage.name]))
        lr = arguments.lr if before is None else arguments.finetune_lr
        return [(settings, stage, before, seed, steps, lr, out) for seed in seeds]

    rounds: list[list[tuple[Any, ...]]] = [[], [], []]
    for name, variant in variants.items():
        first = Stage(name if variant.moves else "original", "fresh", shortest)
        if name == first.name:
            rounds[0] += jobs(first, None, arguments.steps[0])
        for delay, steps in zip(longer, arguments.steps[1:], strict=True):
            rounds[1] += jobs(Stage(name, "fresh", delay), None, steps)
        if not variant.start:
            stages = [Stage(name, "trained", delay) for delay in longer]
            rounds[1] += jobs(stages[0], first, arguments.finetune[0])
            rounds[2] += jobs(stages[1], stages[0], arguments.finetune[1])
    rows = []
    for n, some in enumerate(rounds, 1):
        total = sum(job[4] for job in some)
        rows += run(experiment, some, total, f"part {n} of {len(rounds)}", arguments.workers)
    rows.sort(key=lambda row: (row["start"], row["delay"]))
    save(out / "occlusion.csv", rows)
    draw_gradients(out / "occlusion_gradients.png", settings, longer[-1], seeds[0], out)
    draw_frames(out / "occlusion_frames.png", settings, longer[-1], seeds[0], out)
    print(results(rows, costs))
    print("\n(cost of a step over the original's; errors, and their ratios to the original's)")
    print(f"occlusion.csv, occlusion_gradients.png and occlusion_frames.png are in {out}")


if __name__ == "__main__":
    main()
