"""Optimizers that were made before `orthogonal` or `retrofit`, and do not know what a weight has become.

An optimizer skips parameters that have no gradient. So one that holds a replaced weight would silently
train neither the generator nor the rest. One that has kept averages of a weight which has another shape now
would add tensors of different shapes. To find them, a hook of torch's runs before each step of any
optimizer, and looks there for such weights, as long as they exist. (Replaced ones exist because somebody
holds them.) Once none exists, the hook is removed.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import runtime


class Replaced:
    """A weight, and the parameters that replace it."""

    def __init__(self, name: str, weight: nn.Parameter, parameters: list[nn.Parameter]) -> None:
        self.name = name
        self.weight = weakref.ref(weight, _forget_dead)
        self.parameters = [weakref.ref(parameter, _forget_dead) for parameter in parameters]

    def is_alive(self) -> bool:
        """Return True if somebody holds the weight and the parameters."""
        return self.weight() is not None and all(p() is not None for p in self.parameters)


class Reshaped:
    """A weight that has become a generator of another shape."""

    def __init__(self, name: str, weight: nn.Parameter, before: torch.Size) -> None:
        self.name, self.before = name, before
        self.weight = weakref.ref(weight, _forget_dead)

    def is_alive(self) -> bool:
        """Return True if somebody holds it."""
        return self.weight() is not None


_changed: list[Replaced | Reshaped] = []
_hooks: list[Any] = []  # at most one


def note(changed: Replaced | Reshaped) -> None:
    """Have the optimizers that still train a weight as it was raise an error."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check_optimizer))
    _changed.append(changed)


def _forget_dead(_: Any) -> None:
    _changed[:] = [changed for changed in _changed if changed.is_alive()]
    while _hooks and not _changed:
        _hooks.pop().remove()


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if runtime.is_compiling():
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for changed in [*_changed]:
        weight = changed.weight()
        if weight is None or id(weight) not in held:
            continue
        if isinstance(changed, Replaced):
            _check_replaced(changed, held)
        else:
            _check_reshaped(changed, weight, optimizer)


def _check_replaced(replaced: Replaced, held: set[int]) -> None:
    parameters = [p for reference in replaced.parameters if (p := reference()) is not None]
    if any(p.requires_grad and id(p) not in held for p in parameters):
        count = len(replaced.parameters)
        raise RuntimeError(
            f"the optimizer was made before retrofit, which replaced {replaced.name} by "
            f"{count} parameter{'s' * (count > 1)} that it does not train. Make a new one, or call "
            'optimizer.add_param_group({"params": [*module.parametrizations.weight.parameters()]})'
        )


def _check_reshaped(reshaped: Reshaped, weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    kept = [x for x in optimizer.state.get(weight, {}).values() if isinstance(x, torch.Tensor)]
    if any(x.shape == reshaped.before for x in kept):
        raise RuntimeError(
            "the optimizer was made before orthogonal or retrofit, which gave another shape to the weight "
            f"of {reshaped.name}: it keeps averages of the old one. Make a new one"
        )
    _changed.remove(reshaped)  # the optimizer was made afterwards, or keeps nothing
