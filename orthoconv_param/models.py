"""Models: running one on an example, selecting its convolutions, and finding its generators."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from . import runtime
from .checks import Size
from .parametrizations.blocks import Block, Blocks
from .parametrizations.registered import Registered
from .torus.geometry import CONVOLUTIONS

Select: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


def generators(model: nn.Module) -> list[nn.Parameter]:
    """Return the free parameters of a model's orthogonal convolutions, for an optimizer's own group.

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


# Running


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; then restore modes, buffers and random numbers."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        if not isinstance(module, (Registered, Blocks))
        for name, buffer in runtime.buffers_of(module).items()
        if buffer is not None
    ]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, value in buffers:
            runtime.buffers_of(module)[name] = buffer
            with torch.no_grad():
                buffer.copy_(value)


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


class Uses(TorchFunctionMode):
    """Records which functions use the weights of convolutions outside of the convolutions' own calls."""

    def __init__(self, convolutions: Iterable[Any]) -> None:
        super().__init__()
        self.found: dict[nn.Module, str] = {}
        self._weights = {id(m._parameters.get("weight")): m for m in convolutions}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "Uses":
        for module in self._weights.values():
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a weight's use, and call the function. Reading a weight's dtype or shape is no use."""
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            for x in runtime.leaves((args, kwargs)):
                module = self._weights.get(id(x)) if isinstance(x, nn.Parameter) else None
                if module is not None and module not in self._running:
                    self.found.setdefault(module, name)
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
    named = dict(model.named_modules(remove_duplicate=False))
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
            if pattern in named and pattern not in convolutions:
                raise TypeError(
                    f"select should name convolutions. Found {pattern!r}, a {type(named[pattern]).__name__}"
                )
            names += _matching(pattern, convolutions, "select")
    if not names:
        raise ValueError(
            f"select should leave at least one of the convolutions {[*convolutions]}. Found none"
        )
    once = {convolutions[name]: name for name in reversed(names)}
    return {name: module for name, module in convolutions.items() if once.get(module) == name}


def _matching(pattern: str, names: Iterable[str], argument: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{argument} should name convolutions: {[*names]}. Found {pattern!r}")
    return found


def by_name(blocks: Mapping[str, Iterable[Block]], chosen: Mapping[str, Any]) -> dict[str, list[Block]]:
    """Return the blocks of each convolution, by its name.

    Raises:
        TypeError, ValueError: if ``blocks`` is no dict, if a pattern matches no convolution, or if two
            patterns match the same one.
    """
    if not isinstance(blocks, Mapping):
        raise TypeError(f"blocks should be a dict from names to pairs of slices. Found {blocks!r}")
    found: dict[str, list[Block]] = {}
    for pattern, pairs in blocks.items():
        for name in _matching(pattern, chosen, "blocks"):
            if name in found:
                raise ValueError(f"blocks should name each convolution once. Found {name!r} twice")
            found[name] = list(pairs)
    return found
