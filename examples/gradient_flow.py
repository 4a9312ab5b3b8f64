"""How strongly the error at step T depends on the state at each step before: the picture behind it all.

The networks of `long_memory.py` see a digit, then T blank frames, and have to give it back. The figure
shows the norm of the gradient of their squared error with respect to the state after each frame, relative
to the last frame's, before and after training. In an orthogonal network only phi changes it; in others it
decays or explodes geometrically.

    python examples/gradient_flow.py --out DIR

writes gradient_flow.csv (a row for each network, seed and step) and gradient_flow.png, and prints the
ratios of the first norm to the last, for each seed. All have learning rate 1e-2, and the steps of
`long_memory.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from colours import colour_of
from convrnn import Recurrent
from experiment import (
    TRAINING_DIGITS,
    digits,
    parse,
    parser,
    population,
    positive,
    ratio,
    run,
    save,
    table,
)
from long_memory import STEPS, frames, train
from long_memory import networks as networks_of_recall
from torch import Tensor

RATE = 1e-2
FLOOR = 1e-300  # of norms, near where double precision ends
IMAGES = 16  # over which the error is taken


def networks(delay: int) -> dict[str, Callable[[int], Recurrent]]:
    """Return the makers of recall's networks, and of ours without a phi."""
    linear = networks_of_recall(delay, phi="identity")["orthogonal ConvRNN"]
    return {"orthogonal ConvRNN, no phi": linear, **networks_of_recall(delay)}


def gradient_norms(network: Recurrent, members: int, delay: int) -> Tensor:
    """Return the norms of the gradients, ``(members, delay + 1)``, relative to the last."""
    images, _ = digits()
    shown = (
        images[TRAINING_DIGITS:, None][:IMAGES].expand(-1, members, -1, -1).to(torch.get_default_dtype())
    )
    states: list[Tensor] = []
    recalled = network(frames(shown, delay), states)
    gradients = torch.autograd.grad((recalled - shown).square().sum(), states)
    # the channels are those of each memory, member by member
    channels = network.cell.channels // members
    parts = [g.unflatten(1, (-1, members, channels)).movedim(2, 0).flatten(1) for g in gradients]
    norms = torch.stack([part.norm(dim=1) for part in parts], 1)
    return norms / norms[:, -1:]


def in_double_precision(name: str, delay: int, network: Recurrent, members: int) -> Recurrent:
    """Return the same network in double precision, so that small gradients do not end as zeros."""
    torch.set_default_dtype(torch.float64)
    result = networks(delay)[name](members)
    result.load_state_dict(network.state_dict())
    return result


def experiment(name: str, delay: int, seeds: Sequence[int], steps: int) -> dict[bool, Tensor]:
    """Return the norms before training, and after."""
    torch.set_default_dtype(torch.float32)
    untrained = population(networks(delay)[name], seeds)
    trained, _ = train(networks(delay)[name], delay, list(seeds), [RATE], steps)
    return {
        is_trained: gradient_norms(in_double_precision(name, delay, network, len(seeds)), len(seeds), delay)
        for is_trained, network in ((False, untrained), (True, trained))
    }


def draw(results: dict[str, dict[bool, Tensor]], path: Path) -> None:
    """Draw norms over the step: geometric means over the seeds, between the least and the largest."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    for axes, is_trained in zip(panels, (False, True), strict=True):
        for name, norms in results.items():
            logarithms = norms[is_trained].clamp_min(FLOOR).log10()
            steps = range(logarithms.shape[1])
            axes.plot(steps, 10 ** logarithms.mean(0), label=name, color=colour_of(name))
            low, high = 10 ** logarithms.amin(0), 10 ** logarithms.amax(0)
            axes.fill_between(steps, low, high, color=colour_of(name), alpha=0.2, linewidth=0)
        axes.set(xlabel="step of the state", yscale="log", ylim=(1e-20, 1e3))
        axes.set_title("trained" if is_trained else "untrained")
    panels[0].set_ylabel("gradient's norm, relative to the last step's")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle("geometric mean of the seeds; bands: from the least to the largest", fontsize=9)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the program."""
    options = parser(__doc__)
    options.add_argument("--delay", type=positive, default=1000, help="T, blank frames")
    options.add_argument(
        "--steps", type=positive, help=f"training steps (default: {STEPS} by delay, otherwise 20)"
    )
    arguments = parse(options, delay=50, seeds=[0, 1], steps=10)

    delay, seeds = arguments.delay, arguments.seeds
    steps = arguments.steps or STEPS.get(delay, 20)
    names = list(networks(delay))
    jobs = [(name, delay, seeds, steps) for name in names]
    results = run(experiment, jobs, len(jobs) * delay * steps * len(seeds), "training", arguments.workers)
    norms = dict(zip(names, results, strict=True))
    rows: list[dict[str, Any]] = [
        {"network": name, "trained": is_trained, "seed": seed, "step": step, "norm": norm}
        for name in names
        for is_trained in (False, True)
        for seed, values in zip(seeds, norms[name][is_trained].tolist(), strict=True)
        for step, norm in enumerate(values)
    ]
    save(arguments.out / "gradient_flow.csv", rows)
    draw(norms, arguments.out / "gradient_flow.png")

    def ratios(values: Tensor) -> str:
        return ", ".join(ratio(value, FLOOR) for value in values[:, 0].tolist())

    cells = [[name, ratios(norms[name][False]), ratios(norms[name][True])] for name in names]
    print(table(["network", "untrained", "trained"], cells))
    print(f"gradient_flow.csv and gradient_flow.png are in {arguments.out}")


if __name__ == "__main__":
    main()
