"""Models: running one on an example, selecting its convolutions, and finding its generators."""

import inspect
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import is_dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from . import runtime
from .checks import Size
from .parametrizations.blocks import Blocks
from .parametrizations.partition import Block
from .parametrizations.registered import Registered
from .torus.geometry import CONVOLUTIONS

Select: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


def generators(model: nn.Module) -> list[nn.Parameter]:
    """Return the generators, the free parameters, of orthogonal convolutions, as a parameter group.

    Args:
        model: any module.

    Returns:
        Each parameter once, in the order of ``model.modules()``. If only blocks of a weight are orthogonal,
        their generator: the rest of the weight is an ordinary parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from orthoconv_param import ConvExponential, generators
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> _ = register_parametrization(model[0], "weight", ConvExponential())
        >>> slow = generators(model)
        >>> rest = [p for p in model.parameters() if all(p is not g for g in slow)]
        >>> optimizer = torch.optim.Adam([{"params": slow, "lr": 1e-4}, {"params": rest}], lr=1e-3)
    """
    found: dict[int, nn.Parameter] = {}
    for parametrizations in model.modules():
        if not isinstance(parametrizations, ParametrizationList):
            continue
        free = list(parametrizations.parameters(recurse=False))
        if not any(isinstance(p, Registered) for p in parametrizations):
            # a parametrization that has one of these as a part takes the generator first
            inside = any(isinstance(p, Registered) for p in parametrizations.modules())
            free = free[:1] if inside else []
        found |= {id(parameter): parameter for parameter in free}
    return list(found.values())


def check_model(model: Any) -> None:
    """Raise if something is no model, or has no values.

    Raises:
        TypeError, ValueError: then.
    """
    if not isinstance(model, nn.Module):
        a_class = isinstance(model, type) and issubclass(model, nn.Module)
        way_out = ": make one first" if a_class else ""
        raise TypeError(f"model should be an nn.Module{way_out}. Found {model!r}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model's weights should have values. Found meta tensors")


# Running


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of keyword arguments.

    A tuple or list that its forward cannot take as arguments, but as one, is its only argument.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and (_takes(model, *inputs) or not _takes(model, inputs)):
        return model(*inputs)
    return model(inputs)


def _takes(model: nn.Module, *arguments: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # of what is not written in Python
        return True
    return True


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; then all of it, and random numbers, are as before.

    That includes buffers, and what a call sets or changes in other attributes, as states that are kept on
    ``self``.
    """
    modules = list(model.modules())
    kept = Kept({type(module).__module__.partition(".")[0] for module in modules} - {"torch"})
    for module in modules:
        if not isinstance(module, (Registered, Blocks, LazyModuleMixin)):
            kept.attributes(module)
    modes = {module: module.training for module in modules}
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=sorted(devices)), runtime.uncompiled():
            yield
    finally:
        kept.restore()
        for module, mode in modes.items():
            module.training = mode


class Kept:
    """What attributes hold, to be put back: values of tensors and arrays, and what is in containers.

    Args:
        packages: whose objects are containers too.
    """

    def __init__(self, packages: set[str]) -> None:
        self._packages = packages
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # which also keeps them alive, so that no number is used twice

    def attributes(self, owner: Any) -> None:
        """Keep the attributes of a module, or of an object like a dataclass."""
        before = dict(vars(owner))
        for value in before.values():
            self.value(value)

        def undo() -> None:
            vars(owner).clear()
            vars(owner).update(before)

        self._undo.append(undo)

    def value(self, value: Any) -> None:
        """Keep a value, and what is in it."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_meta:
                self._undo.append(partial(_copy_back, value, value.detach().clone()))
        elif isinstance(value, (list, set, dict, deque)):
            self._undo.append(partial(_refill, value, copy(value)))
            for item in value.values() if isinstance(value, dict) else value:
                self.value(item)
        elif isinstance(value, tuple):
            for item in value:
                self.value(item)
        elif isinstance(value, np.ndarray):
            self._undo.append(partial(np.copyto, value, value.copy()))
        elif self._holds(value):
            self.attributes(value)

    def _holds(self, value: Any) -> bool:
        """Return True for an object of the model's own code, or one that only holds attributes."""
        if isinstance(value, (type, nn.Module)) or callable(value) or not hasattr(value, "__dict__"):
            return False
        own = type(value).__module__.partition(".")[0] in self._packages
        return own or is_dataclass(value) or isinstance(value, SimpleNamespace)

    def restore(self) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()


def _copy_back(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        if tensor.shape == value.shape and not torch.equal(tensor, value):
            tensor.copy_(value)


def _refill(container: Any, before: Any) -> None:
    """Put back what a list, a deque, a set or a dict held."""
    now, then = ([*c.items()] if isinstance(c, dict) else [*c] for c in (container, before))
    if len(now) == len(then) and all(map(_is_same, now, then)):
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(before)
    else:
        container.update(before)


def _is_same(a: Any, b: Any) -> bool:
    pairs = isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2
    return all(map(operator.is_, a, b)) if pairs else a is b


def sizes(
    model: nn.Module, example_inputs: Any, kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS
) -> dict[nn.Module, list[Size]]:
    """Return the sizes of the images that each convolution is fed when a model is run on an example.

    For a transposed convolution, return its domain: the sizes of the images that it gives if it keeps the
    size.

    Args:
        model: any module.
        example_inputs: what it is called with.
        kinds: of convolutions.
    """
    seen: dict[nn.Module, list[Size]] = {}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        size = tuple(x.shape[-len(module.stride) :])
        if module.transposed:
            size = tuple(n * s for n, s in zip(size, module.stride, strict=True))
        known = seen.setdefault(module, [])
        if size not in known:
            known.append(size)

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    try:
        with undisturbed(model), torch.no_grad():
            call(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


_NORMALISATIONS = {
    "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "local_response_norm",
}  # fmt: skip


class Uses(TorchFunctionMode):
    """Records which functions use the weights of convolutions outside of the convolutions' own calls.

    And which normalisations directly follow a convolution.
    """

    def __init__(self, convolutions: Iterable[Any]) -> None:
        super().__init__()
        self.found: dict[nn.Module, str] = {}
        self.normalised: dict[nn.Module, str] = {}
        convolutions = [*convolutions]
        weights = [(module._parameters.get("weight"), module) for module in convolutions]
        self._convolutions = convolutions
        self._weights = {id(weight): module for weight, module in weights if weight is not None}
        self._running: list[nn.Module] = []
        self._outputs: dict[int, tuple[Any, nn.Module]] = {}  # by the memory that they have
        self._hooks: list[Any] = []

    def __enter__(self) -> "Uses":
        for module in self._convolutions:
            self._hooks.append(module.register_forward_pre_hook(self._starts))
            self._hooks.append(module.register_forward_hook(self._ends, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _starts(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.remove(module)
        if isinstance(output, Tensor):
            storage = output.untyped_storage()
            self._outputs[storage.data_ptr()] = weakref.ref(storage), module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record what is used, and call the function. Reading a weight's dtype or shape is no use."""
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            for x in runtime.leaves((args, kwargs)):
                module = self._weights.get(id(x)) if isinstance(x, nn.Parameter) else None
                if module is not None and module not in self._running:
                    self.found.setdefault(module, name)
        if name in _NORMALISATIONS and args and isinstance(args[0], Tensor):
            storage = args[0].untyped_storage()
            reference, giver = self._outputs.get(storage.data_ptr(), (None, None))
            if giver is not None and reference is not None and reference() is storage:
                self.normalised.setdefault(giver, name)
        return func(*args, **(kwargs or {}))


# Selecting


def convolutions_of(model: nn.Module, kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS) -> dict[str, Any]:
    """Return a model's convolutions by name; one that has several names is listed under each of them."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, kinds)}


def selected(model: nn.Module, select: Select | None) -> dict[str, Any]:
    """Return the selected convolutions by name, each once.

    Raises:
        TypeError, ValueError: if there are none, or ``select`` names something else.
    """
    convolutions = convolutions_of(model)
    if select is None:
        names = [*convolutions]
    elif callable(select) and not isinstance(select, type):
        names = [name for name, module in convolutions.items() if select(name, module)]
    elif not isinstance(select, Iterable):
        raise TypeError(f"select should be names or a function. Found {select!r}")
    else:
        names = []
        for pattern in [select] if isinstance(select, str) else select:
            if not isinstance(pattern, str):
                raise TypeError(f"select should be names or a function. Found {pattern!r}")
            names += _matching(model, pattern, convolutions, "select")
    if not names:
        raise ValueError(
            f"select should match at least one of the convolutions {[*convolutions]}. Found none"
        )
    once = {convolutions[name]: name for name in reversed(names)}
    return {name: module for name, module in convolutions.items() if once.get(module) == name}


def _matching(model: nn.Module, pattern: str, convolutions: Mapping[str, Any], argument: str) -> list[str]:
    """Return the names of convolutions that match a pattern.

    Raises:
        TypeError: if it names something else.
        ValueError: if it names nothing.
    """
    found = [name for name in convolutions if fnmatchcase(name, pattern)]
    if found:
        return found
    other = dict(model.named_modules(remove_duplicate=False)).get(pattern)
    if other is not None:
        inside = [name for name in convolutions if name.startswith(f"{pattern}.")]
        raise TypeError(
            f"{argument} should name convolutions. Found {pattern!r}, a {type(other).__name__}"
            + (f", in which there are {inside}" if inside else "")
        )
    raise ValueError(f"{argument} should name convolutions: {[*convolutions]}. Found {pattern!r}")


def by_name(
    model: nn.Module, blocks: Mapping[str, Iterable[Block]], convolutions: Mapping[str, Any]
) -> dict[str, list[Block]]:
    """Return the blocks of each convolution, by its name.

    Raises:
        TypeError, ValueError: if ``blocks`` is no dict, if a pattern matches no convolution, or if two
            patterns match the same one.
    """
    if not isinstance(blocks, Mapping):
        raise TypeError(f"blocks should be a dict from names to pairs of slices. Found {blocks!r}")
    if not blocks:
        raise ValueError("blocks should name a convolution at least, or be None for whole ones. Found none")
    found: dict[str, list[Block]] = {}
    for pattern, pairs in blocks.items():
        if not isinstance(pattern, str):
            raise TypeError(f"blocks should have names of convolutions as keys. Found {pattern!r}")
        alone = isinstance(pairs, tuple) and any(isinstance(part, slice) for part in pairs)
        if alone or isinstance(pairs, str) or not isinstance(pairs, Iterable):
            raise TypeError(f"blocks should be lists of pairs of slices, [(out, in), ...]. Found {pairs!r}")
        for name in _matching(model, pattern, convolutions, "blocks"):
            if name in found:
                raise ValueError(f"blocks should name each convolution once. Found {name!r} twice")
            found[name] = list(pairs)
    return found
