"""Spectral and weight normalisation, old and new: what they make of a weight, and how they are removed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import runtime


def norm_of(module: Any) -> str | None:
    """Return the name of the normalisation that computes a module's weight; None if none does."""
    return runtime.weight_hook(module) or runtime.weight_parametrization(module)


def replace_by_value(module: Any) -> Callable[[], None]:
    """Remove a weight's normalisation, and leave the value that it has in evaluation mode.

    Returns:
        A function that makes the module what it was again.
    """
    cls, attributes = type(module), dict(vars(module))
    tables = [
        (table, table.copy())
        for part in module.modules()
        for table in vars(part).values()
        if isinstance(table, dict)
    ]
    parts = [part for part in module.modules() if part is not module]
    modes = [(part, part.training) for part in parts]
    values = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]

    def undo() -> None:
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(attributes)
        for table, before in tables:
            table.clear()
            table.update(before)
        for part, mode in modes:
            part.training = mode
        for parameter, value in values:
            parameter.data = value

    try:
        if runtime.weight_hook(module) == "spectral_norm":
            nn.utils.remove_spectral_norm(module)
            runtime.remove_spectral_norms_loader(module)
        elif runtime.weight_hook(module) == "weight_norm":
            nn.utils.remove_weight_norm(module)
        else:
            # removal takes a property from the class, which torch's copies of the module share
            module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
            for part in parts:  # or reading the weight would change it
                part.training = False
            parametrize.remove_parametrizations(module, "weight")
        needs = any(parameter.requires_grad for parameter, _ in values)
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=needs)
        if "bias" in runtime.parameters_of(module):  # the order that it had
            runtime.parameters_of(module)["bias"] = runtime.parameters_of(module).pop("bias")
    except BaseException:
        undo()
        raise
    return undo


def fold(state_dict: dict[str, Any], prefix: str, transposed: bool) -> None:
    """Make a checkpoint of a module with a normalised weight one of the plain module, in place."""
    stack = prefix + "parametrizations.weight."
    found: dict[str, Tensor]
    if prefix + "weight_orig" in state_dict:
        found = _taken(state_dict, prefix, {"W": "weight_orig", "u": "weight_u", "v": "weight_v"})
        state_dict[prefix + "weight"] = _spectral(found, transposed)
    elif prefix + "weight_g" in state_dict:
        found = _taken(state_dict, prefix, {"g": "weight_g", "v": "weight_v"})
        state_dict[prefix + "weight"] = _weight(found)
    elif stack + "0._u" in state_dict:
        found = _taken(state_dict, stack, {"W": "original", "u": "0._u", "v": "0._v"})
        state_dict[prefix + "weight"] = _spectral(found, transposed)
    elif _is_weight_norm(state_dict, stack):
        found = _taken(state_dict, stack, {"g": "original0", "v": "original1"})
        state_dict[prefix + "weight"] = _weight(found)


def _is_weight_norm(state_dict: dict[str, Any], stack: str) -> bool:
    g, v = state_dict.get(stack + "original0"), state_dict.get(stack + "original1")
    alone = not any(key.startswith(stack + "0.") for key in state_dict)  # what this package writes
    return alone and isinstance(g, Tensor) and isinstance(v, Tensor) and g.ndim == v.ndim


def _taken(state_dict: dict[str, Any], prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    return {
        key: state_dict.pop(prefix + name) for key, name in names.items() if prefix + name in state_dict
    }


def _spectral(found: dict[str, Tensor], transposed: bool) -> Tensor:
    """Return a weight over its spectral norm, as the vectors of the power iteration give it."""
    W = found["W"]
    M = W.movedim(1 if transposed else 0, 0).flatten(1)
    v = found.get("v")
    if v is None:  # of torch before 1.0
        v = nn.functional.normalize(M.mH @ found["u"], dim=0)
    return W / torch.vdot(found["u"], M @ v)


def _weight(found: dict[str, Tensor]) -> Tensor:
    """Return ``g v / |v|``, the norm on the axes on which ``g`` has one entry."""
    g, v = found["g"], found["v"]
    axes = [axis for axis in range(v.ndim) if g.ndim <= axis or g.shape[axis] == 1]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True))
