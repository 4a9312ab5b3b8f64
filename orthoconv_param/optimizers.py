"""Optimizers that were made before `retrofit`, and do not know what has replaced a weight.

An optimizer skips parameters that have no gradient. So one that holds a replaced weight would silently
train neither the generator nor the rest. To find it, a hook of torch's runs before each step of any
optimizer, and looks there for the replaced weights that still exist. (They exist because somebody holds
them.) Once none exists, the hook is removed.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Replaced:
    """A weight, and the parameters that replace it."""

    def __init__(self, name: str, weight: nn.Parameter, parameters: list[nn.Parameter]) -> None:
        self.name = name
        self.weight = weakref.ref(weight, _forget_dead)
        self.parameters = [weakref.ref(parameter, _forget_dead) for parameter in parameters]

    def is_alive(self) -> bool:
        """Return True if somebody holds the weight and the parameters."""
        return self.weight() is not None and all(p() is not None for p in self.parameters)


_replaced: list[Replaced] = []
_hooks: list[Any] = []  # at most one


def note(replaced: Replaced) -> None:
    """Have the optimizers that still train a weight raise an error."""
    if not _replaced:
        _hooks.append(register_optimizer_step_pre_hook(_check_optimizer))
    _replaced.append(replaced)


def _forget_dead(_: Any) -> None:
    _replaced[:] = [replaced for replaced in _replaced if replaced.is_alive()]
    while _hooks and not _replaced:
        _hooks.pop().remove()


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for replaced in _replaced:
        parameters = [p for reference in replaced.parameters if (p := reference()) is not None]
        missing = [p for p in parameters if p.requires_grad and id(p) not in held]
        if id(replaced.weight()) in held and missing:
            count = len(replaced.parameters)
            raise RuntimeError(
                f"the optimizer was made before retrofit, which replaced {replaced.name} by "
                f"{count} parameter{'s' * (count > 1)} that it does not train. Make a new one, or call "
                'optimizer.add_param_group({"params": [*module.parametrizations.weight.parameters()]})'
            )
