"""What the experiments with ConvLSTMs share: the cell, its variants, training, and the cost of a step.

A variant is a network that is made orthogonal in some place, before it is trained or afterwards:

  blocks      the hidden-to-hidden blocks of the gates' convolution, all four or that of the candidate,
              by `retrofit`;
  memory      an orthogonal path of the memory, ``c = f * U(c) + i * g``. `U` starts as the identity, so
              that a trained network computes what it did; or, before any training, as shifts by a pixel
              a step, so that what is remembered moves: half of the channels to each side, or a quarter
              of them along each diagonal.

All variants are trained for the same time: a step of each is timed once, beside the original's in one
process, and slower variants get fewer steps.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from convrnn import PADDING, Boundary, Method
from experiment import tick
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orthoconv_param import generators, orthogonal, retrofit, set_orthogonality
from orthoconv_param.functional import gate_blocks

GATES = 4
CANDIDATE = 3  # the gate that is what may be written, not whether


class ConvLSTM(nn.Module):
    """One ConvLSTM cell, and a 1x1 convolution that draws the next frame.

    Args:
        hidden: channels of the state.
        boundary: of the images.
    """

    def __init__(self, hidden: int, boundary: Boundary = "walls") -> None:
        super().__init__()
        self.hidden, mode = hidden, PADDING[boundary]
        self.gates = nn.Conv2d(1 + hidden, GATES * hidden, 3, padding=1, padding_mode=mode)
        self.move: nn.Module = nn.Identity()
        self.draw = nn.Conv2d(hidden, 1, 1)
        nn.init.ones_(self.gates.get_parameter("bias")[hidden : 2 * hidden])  # remember at first

    def forward(self, video: Tensor, context: int, screen: Tensor | None = None) -> Tensor:
        """Return logits of frames 1, 2, ... of videos ``(batch, frames, 1, *size)``.

        After ``context`` frames the network sees its own predictions only. Pixels behind a ``screen``, a
        mask ``size``, then are as they are in the first frame.
        """
        return torch.stack([self.draw(h) for h, _ in self.states(video, context, screen)], 1)

    def states(
        self, video: Tensor, context: int, screen: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the state and the memory after each frame but the last."""
        h = c = video.new_zeros(len(video), self.hidden, *video.shape[-2:])
        found: list[tuple[Tensor, Tensor]] = []
        with parametrize.cached():  # a parametrized weight is computed once, not once a frame
            for t in range(video.shape[1] - 1):
                x = video[:, t] if t < context else self.draw(h).sigmoid()
                if t >= context and screen is not None:
                    x = torch.where(screen, video[:, 0], x)
                write, keep, read, value = self.gates(torch.cat([x, h], 1)).chunk(GATES, 1)
                c = keep.sigmoid() * self.move(c) + write.sigmoid() * value.tanh()
                h = read.sigmoid() * c.tanh()
                found.append((h, c))
        return found


class Task(Protocol):
    """What is learned."""

    def loss(self, model: ConvLSTM, size: int) -> Tensor:
        """Return the loss on a fresh batch of so many videos."""
        ...

    def example(self) -> tuple[Any, ...]:
        """Return what a network is called with."""
        ...


@dataclass(frozen=True)
class Variant:
    """What is orthogonal in a network, and how it gets there.

    Args:
        blocks: of the gates' convolution.
        memory: whether the memory has an orthogonal path that starts as the identity, or as shifts
            sideways or along the diagonals.
        free: whether that path is an ordinary convolution, which starts as the orthogonal one.
        method: of the blocks.
        boundary: of the images.
        anneal: whether a trained network is moved there by degrees.
        start: whether the blocks only start orthogonal, and are ordinary weights from then on.
        slower: factor of the learning rate of what is orthogonal, and of the memory's path.
    """

    blocks: Literal["none", "candidate", "all"] = "none"
    memory: Literal["none", "identity", "sideways", "diagonal"] = "none"
    free: bool = False
    method: Method = "split"
    boundary: Boundary = "walls"
    anneal: bool = True
    start: bool = False
    slower: float = 1.0

    @property
    def moves(self) -> bool:
        """Return True if the memory starts as shifts, so that no trained original computes the same."""
        return self.memory in ("sideways", "diagonal")

    def made(self, hidden: int, task: Task, checkpoint: Mapping[str, Tensor] | None = None) -> ConvLSTM:
        """Return a network: as it is drawn, or from a checkpoint of a trained original.

        One whose memory starts as shifts takes a checkpoint of its own kind.
        """
        model = ConvLSTM(hidden, self.boundary)
        if self.moves:
            start = shifts(hidden, diagonal=self.memory == "diagonal")
            model.move = memory_path(start, self.boundary, free=self.free)
        if checkpoint is not None:
            model.load_state_dict(checkpoint)
        if self.blocks != "none":
            blocks = gate_blocks(hidden, gates=GATES, inputs=1)
            chosen = {"gates": blocks if self.blocks == "all" else [blocks[CANDIDATE]]}
            anneal = self.anneal and checkpoint is not None
            if self.start:
                retrofit(model, task.example(), blocks=chosen, boundary="zeros", anneal=False)
                parametrize.remove_parametrizations(model.gates, "weight")
            else:
                retrofit(model, task.example(), blocks=chosen, method=self.method, anneal=anneal)
        if self.memory == "identity":
            start = nn.init.dirac_(torch.empty(hidden, hidden, 3, 3))
            model.move = memory_path(start, self.boundary, free=self.free)
        return model


MEMORY = Variant(memory="identity", slower=0.3)  # of 0.3, 1 and 3 the best on validation digits


def shifts(hidden: int, *, diagonal: bool) -> Tensor:
    """Return the kernel that moves channels by a pixel: left and right, or along the four diagonals."""
    kernel = torch.zeros(hidden, hidden, 3, 3)
    for c in range(hidden):
        kernel[c, c, 2 * (c // 2 % 2) if diagonal else 1, 2 - 2 * (c % 2)] = 1
    return kernel


def memory_path(start: Tensor, boundary: Boundary = "walls", *, free: bool = False) -> nn.Module:
    """Return an orthogonal convolution that starts as a kernel; or a free one."""
    hidden, mode = len(start), PADDING[boundary]
    move: Any = nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode=mode, bias=False)
    if not free:
        orthogonal(move, method="split", boundary=boundary)
    with torch.no_grad():
        move.weight = nn.Parameter(start) if free else start
    return move


def train(
    model: ConvLSTM,
    task: Task,
    steps: int,
    lr: float,
    *,
    batch: int,
    slower: float = 1.0,
    annealed: int = 0,
) -> list[float]:
    """Train by Adam, its learning rate rising and falling once; return the losses.

    Args:
        model: the network.
        task: what is learned.
        steps: of Adam.
        lr: the highest learning rate.
        batch: videos in a step.
        slower: factor of the rate of what is orthogonal, and of the memory's path.
        annealed: steps in which what is orthogonal becomes so, if that is still to come.
    """
    slow = list({id(p): p for p in (*generators(model), *model.move.parameters())}.values())
    rest = [p for p in model.parameters() if all(p is not g for g in slow)]
    groups = [(p, rate) for p, rate in ((rest, lr), (slow, lr * slower)) if p]
    optimizer = torch.optim.Adam([{"params": p} for p, _ in groups])
    rates = [rate for _, rate in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(steps, 1))
    losses: list[float] = []
    for step in range(1, steps + 1):
        if annealed and step <= annealed:
            set_orthogonality(model, step / annealed, final=step == annealed)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tick()
    return losses


def cost_of_a_step(
    variants: Sequence[Variant], hidden: int, task: Task, batch: int, rounds: int = 21
) -> list[float]:
    """Return how long a step of each variant takes, over that of the original.

    All take their steps in turn in this process, on one thread, as they are trained later. The ratios are
    medians over the rounds; the first round is not counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    original = Variant().made(hidden, task)
    models = [original, *(variant.made(hidden, task) for variant in variants)]
    ratios: list[list[float]] = [[] for _ in variants]
    for n in range(rounds + 1):
        seconds = []
        for model in models:
            start = time.perf_counter()
            train(model, task, 1, 0.0, batch=batch)
            seconds.append(time.perf_counter() - start)
        for some, s in zip(ratios, seconds[1:], strict=True):
            if n:
                some.append(s / seconds[0])
    torch.set_num_threads(threads)
    return [statistics.median(some) for some in ratios]
