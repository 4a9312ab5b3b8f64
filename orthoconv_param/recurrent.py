"""Recurrent blocks: which input channels of a convolution carry its own earlier output.

The graph of a model's run is cut at the output of each convolution and linear layer. What is between the
cuts, as gates and sums, carries a state; a state that goes through another layer is that layer's. So a
convolution's own earlier output is found by adding noise to it, while all other layers give what they gave
in a first run: the channels of its input that then change are its state.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from .models import call, check_model, undisturbed
from .parametrizations.partition import Block
from .torus.geometry import CONVOLUTIONS

_TOLERANCE = 1e-6  # of a change of a channel, relative to what it holds
_CUT = (*CONVOLUTIONS, nn.Linear)


def recurrent_blocks(
    model: nn.Module, example_inputs: Any, *, rectangular: bool = False
) -> dict[str, list[Block]]:
    """Find the blocks of a recurrent model's weights that map a state to a state.

    The model is run on the example. An input channel carries a convolution's state if that convolution's
    earlier output reaches the channel through gates, sums, normalisations and the like, but through no
    other convolution or linear layer. A convolution that reads another one's state and only gates that,
    such as a reset gate, shares it.

    Args:
        model: any module, whose call runs through two steps of time or more. Three are better: a forget
            gate of an initial state of zeros has no effect before the third. A warning says so.
        example_inputs: as of `retrofit`.
        rectangular: True to return blocks that read several states too, as ``2h -> h``. Their rows become
            orthonormal, ``Q Q^T = 1``. False: a warning names them, and others that are never returned:
            non-contiguous states, interleaved gates, most grouped convolutions.

    Returns:
        For each convolution with a state its blocks, pairs of slices ``(out, in)`` of its weight's first
        two axes, one for each gate: to look at, to edit, and for ``retrofit(..., blocks=...)``. A
        convolution that reads only a state, and has as many output channels, has one block, all of it.

    Raises:
        TypeError, ValueError: if no convolution is called twice, if a second run gives other values, or if
            values are not finite.

    Cost: one call of the model, and runs without convolutions: two; one for each convolution that is called
    repeatedly; and for each that has a state one per gate, and one or two more.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import recurrent_blocks
        >>> class Cell(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gates = nn.Conv2d(1 + 8, 2 * 8, 3, padding=1)
        ...
        ...     def forward(self, video):
        ...         h = video.new_zeros(len(video), 8, *video.shape[-2:])
        ...         for x in video.unbind(1):
        ...             keep, value = self.gates(torch.cat([x, h], 1)).chunk(2, 1)
        ...             h = keep.sigmoid() * h + value.tanh()
        ...         return h
        >>> recurrent_blocks(Cell(), torch.randn(2, 3, 1, 16, 16))
        {'gates': [(slice(0, 8, None), slice(1, 9, None)), (slice(8, 16, None), slice(1, 9, None))]}
    """
    check_model(model)
    if not isinstance(rectangular, bool):
        raise TypeError(f"rectangular should be True or False. Found {rectangular!r}")
    states = States.of(model, example_inputs)
    if states is None:
        raise ValueError(
            "example_inputs should run the model through two steps of time or more. Found no convolution "
            "that is called twice: put the loop over time into the module, or name the blocks: "
            "functional.gate_blocks gives those of a cell"
        )
    found: dict[str, list[Block]] = {}
    left: list[str] = []
    for name, module in states.names.items():
        channels = states.channels.get(module, [])
        if not channels:
            continue
        blocks, why = _blocks(module, channels, states)
        if blocks and (why is None or rectangular):
            found[name] = blocks
        elif why is not None:
            taken = f"{len(channels)} -> {module.out_channels} channels"
            way = ": rectangular=True returns them" if blocks else ""
            left.append(f"{name or 'the model'}, {taken}, {why}{way}")
    if left:
        warnings.warn(f"blocks that read a state are left alone: {'; '.join(left)}", stacklevel=2)
    return found


def _blocks(module: Any, channels: list[int], states: "States") -> tuple[list[Block], str | None]:
    """Return the blocks of a convolution, one for each gate, and why they are no ordinary ones, if so.

    Args:
        module: the convolution.
        channels: that are its state.
        states: of the model.
    """
    out, first, last = module.out_channels, channels[0], channels[-1] + 1
    groups, count = module.groups, len(channels)
    if count != last - first:
        return [], "whose channels do not follow one another"
    if groups > 1:  # all of it, or nothing
        rows, each = out // groups, module.in_channels // groups
        if module.transposed or count < module.in_channels or rows != each:
            return [], "in groups"
        return [(slice(i, i + rows), slice(0, each)) for i in range(0, out, rows)], None
    width = states.width(module)
    if width is None:
        return [], "whose gates are interleaved"
    gates = [slice(0, out)]
    if out % width == 0:
        gates = [slice(i, i + width) for i in range(0, out, width)]
        every, gates = gates, [gate for gate in gates if states.is_fed_by(module, gate)]
        if len(gates) < len(every) and len(states.runs.first.outputs[module]) == 2:
            unseen = {i for i in range(out) if not any(g.start <= i < g.stop for g in gates)}
            warnings.warn(
                f"output channels {_ranges(unseen)} of a convolution with a state reach none in two steps: "
                "a gate of an initial state of zeros is seen at the third. Let the example have three",
                stacklevel=3,
            )
    why = None if width == count and out % width == 0 else "not square"
    across = slice(first, last)
    return [(across, gate) if module.transposed else (gate, across) for gate in gates], why


def check_states(model: nn.Module, example_inputs: Any, blocks: Mapping[str, list[Block]]) -> None:
    """Warn of blocks that read channels that are no state, where the example tells."""
    try:
        states = States.of(model, example_inputs)
    except ValueError:  # it does not compute the same twice
        return
    if states is None:
        return
    for name, pairs in blocks.items():
        module = states.names.get(name)
        if module is None or module.groups > 1 or module.transposed:
            continue
        taken = {i for _, columns in pairs for i in range(*columns.indices(module.in_channels))}
        state = states.channels.get(module, [])
        if taken - set(state):
            warnings.warn(
                f"blocks of {name or 'the model'!r} read input channels {_ranges(taken - set(state))}, "
                "which do not carry its earlier output. Those that do: "
                f"{_ranges(state) or 'none'}. See recurrent_blocks, and the order of gate_blocks",
                stacklevel=3,
            )


def _ranges(channels: Iterable[int]) -> str:
    """Return ``2:6, 9:10`` for the channels 2 to 5 and 9."""
    found: list[list[int]] = []
    for i in sorted(channels):
        if found and found[-1][1] == i:
            found[-1][1] += 1
        else:
            found.append([i, i + 1])
    return ", ".join(f"{a}:{b}" for a, b in found)


@dataclass
class States:
    """Which channels of each convolution's input are a state.

    Args:
        names: of the convolutions that are called twice or more.
        channels: of their inputs that are a state, in order.
        runs: what runs the model again.
        base: a run without more noise on one of the layers.
    """

    names: dict[str, Any]
    channels: dict[Any, list[int]]
    runs: "_Runs"
    base: "_Run"

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> "States | None":
        """Run a model; return None if no convolution is called twice.

        Raises:
            ValueError: if a second run gives other values, or if values are not finite.
        """
        runs = _Runs(model, example_inputs)
        for module, outputs in runs.first.outputs.items():
            if any(not y.numel() for y in outputs) or not all(bool(y.isfinite().all()) for y in outputs):
                raise ValueError(
                    "example_inputs and weights should be finite, and the batch not empty. Found otherwise "
                    f"in the output of a {type(module).__name__}"
                )
        convolutions = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, CONVOLUTIONS) and len(runs.first.outputs.get(module, [])) > 1
        }
        if not convolutions:
            return None
        if runs.again().changed_from(runs.first):
            raise ValueError(
                "the model should give the same values when it is run again in evaluation mode, so that "
                "its states can be found. Found others: it is random, or has a state that cannot be reset. "
                "Name the blocks instead"
            )
        base = runs.shaken()
        changed = {module: runs.shaken(module).changed_from(base) for module in convolutions.values()}
        own = {module: _union(_of(changed[module], module)) for module in convolutions.values()}
        recurrent = {module: state for module, state in own.items() if state}
        states = {module: sorted(state) for module, state in recurrent.items()}
        for module in convolutions.values():
            if module in recurrent:
                continue
            # it acts on the state of another one, and reads what that had given before this step
            acts_on = [m for m, s in recurrent.items() if _union(_of(changed[module], m)) & s]
            read = _union(
                changed[other][module, n]
                for other in acts_on
                for n in range(len(runs.first.outputs[module]))
                if runs.first.calls_before(other, module, n) <= n
            )
            if read:
                states[module] = sorted(read)
        return cls(convolutions, states, runs, base)

    def width(self, module: Any) -> int | None:
        """Return how many channels one state has, of those that a convolution reads.

        Gates act on each channel by itself. So noise on some of the first ``width`` channels that it
        gives, and the like of the next, reaches only these of those that it reads. What mixes channels, as
        a normalisation, leaves one state. Return None if it is the gates of each channel that follow one
        another.
        """
        channels, out = self.channels[module], module.out_channels
        count = len(channels)
        for width in sorted(_divisors(gcd(count, out)), reverse=True):
            half = max(1, width // 2)  # of which each smaller width would reach all
            given = [i for i in range(out) if i % width < half]
            if self._reached(module, given) == {j for i, j in enumerate(channels) if i % width < half}:
                return width
        if count > 1 and out > count and out % count == 0:
            given = [*range(out // 2)]
            if self._reached(module, given) == set(channels[: count // 2]):
                return None
        return count

    def is_fed_by(self, module: Any, gate: slice) -> bool:
        """Return True if what a gate gives reaches a state, its own or that on which it acts."""
        changed = self.runs.shaken(module, [*range(gate.start, gate.stop)]).changed_from(self.base)
        states = self.channels.items()
        return any(_union(_of(changed, other)) & set(state) for other, state in states)

    def _reached(self, module: Any, given: list[int]) -> set[int]:
        """Return which channels that it reads change with some that it gives."""
        return _union(_of(self.runs.shaken(module, given).changed_from(self.base), module))


def _divisors(n: int) -> list[int]:
    return [d for d in range(2, n + 1) if n % d == 0] or [1]


def _union(sets: Any) -> set[int]:
    return set().union(*sets)


def _of(changed: Mapping[tuple[Any, int], set[int]], module: Any) -> Iterator[set[int]]:
    return (found for (m, _), found in changed.items() if m is module)


@dataclass
class _Run:
    """What the layers of a model took and gave.

    Args:
        outputs: of each layer, one for each call.
        taken: numbers that tell what each channel of an input holds, one for each call of a convolution.
        order: the layers in the order in which they were called.
    """

    outputs: dict[Any, list[Tensor]] = field(default_factory=dict)
    taken: dict[tuple[Any, int], Tensor] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)

    def changed_from(self, first: "_Run") -> "_Changed":
        """Return which channels of each call hold something else than they did."""
        found = _Changed()
        for key, (now, before) in ((k, (v, first.taken.get(k))) for k, v in self.taken.items()):
            if before is None or before.shape != now.shape:
                found[key] = set(range(len(now)))
                continue
            scale = torch.maximum(before[:, :1], now[:, :1])
            differs = ((now - before).abs() > _TOLERANCE * scale).any(1)
            if differs.any():
                found[key] = set(differs.nonzero().flatten().tolist())
        return found

    def calls_before(self, other: Any, module: Any, n: int) -> int:
        """Return how often another layer was called before the ``n``-th call of a layer, from 0."""
        calls = [i for i, layer in enumerate(self.order) if layer is module]
        return sum(layer is other for layer in self.order[: calls[n]])


class _Changed(dict[tuple[Any, int], set[int]]):
    """The channels of each call that have changed; none of those that are not there."""

    def __missing__(self, key: tuple[Any, int]) -> set[int]:
        return set()


class _Runs:
    """Runs a model several times, always from the same state.

    Args:
        model: the model.
        example_inputs: what it is called with.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.random_state = torch.random.get_rng_state()
        self.first = self._run(lambda run, layer, compute: compute())

    def again(self) -> _Run:
        """Run the model with all layers giving what they gave."""
        return self._run(lambda run, layer, compute: self._known(run, layer, compute)[0])

    def shaken(self, more: Any = None, channels: list[int] | None = None) -> _Run:
        """Run it with noise on what all layers gave, so that nothing is dead, and more of it on one.

        Args:
            more: the layer with more noise; None for none.
            channels: of it that have more; None for all.
        """
        generator = torch.Generator().manual_seed(0)

        def shake(run: _Run, layer: Any, compute: Callable[[], Tensor]) -> Tensor:
            y, is_known = self._known(run, layer, compute)
            if not (is_known and (y.is_floating_point() or y.is_complex())):
                return y
            y = y + _noise(y, generator)
            if layer is more:
                axis = y.ndim - 1 - len(layer.stride)
                mask = torch.zeros(y.shape[axis])
                mask[channels if channels is not None else slice(None)] = 1
                mask = mask.reshape([-1 if i == axis else 1 for i in range(y.ndim)])
                y += _noise(y, torch.Generator().manual_seed(len(run.order) + 1)) * mask.to(y)
            return y

        return self._run(shake)

    def _known(self, run: _Run, layer: Any, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Return what a layer gave in the first run, if it was called so often there."""
        n, known = len(run.outputs[layer]), self.first.outputs.get(layer, [])
        return (known[n].clone(), True) if n < len(known) else (compute(), False)

    def _run(self, give: Callable[[_Run, Any, Callable[[], Tensor]], Tensor]) -> _Run:
        run = _Run()
        with undisturbed(self.model), torch.no_grad(), _intercepted(self.model, run, give):
            torch.random.set_rng_state(self.random_state)
            call(self.model, self.example_inputs)
        return run


@contextmanager
def _intercepted(
    model: nn.Module, run: _Run, give: Callable[[_Run, Any, Callable[[], Tensor]], Tensor]
) -> Iterator[None]:
    """Have each layer of a model give something else than it computes, and record that."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, _CUT)]
    before = {layer: vars(layer).get("forward") for layer in layers}

    def intercept(layer: Any) -> Callable[..., Tensor]:
        forward = layer.forward

        axes = len(getattr(layer, "stride", ()))  # none of a linear layer

        def intercepted(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if args else kwargs["input"]
            outputs = run.outputs.setdefault(layer, [])
            if axes:
                run.taken[layer, len(outputs)] = _fingerprint(x, axes)
            y = give(run, layer, lambda: forward(*args, **kwargs))
            run.order.append(layer)
            outputs.append(y.clone())
            return y

        return intercepted

    try:
        for layer in layers:
            layer.forward = intercept(layer)
        yield
    finally:
        for layer, forward in before.items():
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _noise(y: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise, most of it small, so that places stay near, some large, so that no unit is dead."""
    real, sizes = (torch.randn(y.shape, generator=generator) for _ in range(2))
    scale = y.detach().abs().mean() + 0.1
    return (real * (1.5 * sizes).exp()).to(y.device, y.dtype) * scale


def _fingerprint(x: Tensor, axes: int) -> Tensor:
    """Return numbers that tell what each channel holds, the first of them how large it is."""
    x = torch.view_as_real(x).flatten(-2) if x.is_complex() else x
    x = (x if x.ndim == axes + 2 else x.unsqueeze(0)).double().transpose(0, 1).flatten(1).nan_to_num()
    weights = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)
    return torch.stack([x.abs().sum(1), x.sum(1), x @ weights, x.square().sum(1).sqrt()], 1).cpu()
