"""What is computed from parameters is kept: for a call, a `cached` block, or a `frozen` one."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from . import runtime

_Value = TypeVar("_Value")

_KEPT = "orthoconv_param"  # our only key in torch's cache, which it empties at the end of a block

_INFERENCE, _VALUE, _GRAPH = range(3)  # what a result can be used for: also for all before


class _Calls(threading.local):
    """The calls under way, in this thread, of modules that keep results for a call."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.results: dict[Any, Any] = {}
        self.within_block = False  # of `parametrize.cached()`, which keeps results for longer
        self.freezes = False  # while something is computed that `frozen` keeps


_calls = _Calls()
_traced: dict[Any, Any] | None = None  # the results in what is compiled, which knows no threads
_traced_by: nn.Module | None = None


class KeptForCalls:
    """Hooks by which each call of a module keeps what `once` computes. A copy of the module has its own.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        _kept_for_calls.add(self)

    @classmethod
    def install(cls, module: nn.Module) -> None:
        """Install the hooks, once."""
        if not any(hook.module() is module for hook in _kept_for_calls):
            hooks = cls(module)
            module.register_forward_pre_hook(hooks.enter, prepend=True)
            module.register_forward_hook(hooks.leave, always_call=True)

    @classmethod
    def remove_from(cls, module: nn.Module) -> None:
        """Remove the hooks of models in which nothing else than this module is parametrized."""
        for hooks in [*_kept_for_calls]:
            model = hooks.module()
            if model is None:
                continue
            parts = [*model.modules()]
            others = [m for m in parts if m is not module and _is_ours(m)]
            if any(part is module for part in parts) and not others:
                for table in (model._forward_pre_hooks, model._forward_hooks):
                    for key in [k for k, h in table.items() if getattr(h, "__self__", None) is hooks]:
                        del table[key]
                        model._forward_hooks_always_called.pop(key, None)
                _kept_for_calls.discard(hooks)

    def module(self) -> nn.Module | None:
        """Return the module, while it exists."""
        return self._module()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Begin to keep results."""
        global _traced, _traced_by
        if runtime.is_compiling():
            if _traced is None and not parametrize._cache_enabled:
                _traced, _traced_by = {}, module
            return
        if not _calls.modules:
            _calls.within_block = bool(parametrize._cache_enabled)
        _calls.modules.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget them, at the end of the outermost call."""
        global _traced, _traced_by
        if _traced_by is module:  # also where what is compiled has been left in between
            _traced = _traced_by = None
        if runtime.is_compiling():
            return
        if module in _calls.modules:  # not where an earlier hook has raised
            while _calls.modules.pop() is not module:
                pass  # a call within it that has raised
            if not _calls.modules:
                _calls.results = {}

    def __reduce__(self) -> Any:
        raise RuntimeError(
            "a retrofitted model should be saved by its state_dict(), or after "
            "torch.nn.utils.parametrize.remove_parametrizations of all that is parametrized"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptForCalls":
        twin: Any = memo.get(id(self.module()), self.module())
        return type(self)(twin)


def _is_ours(module: nn.Module) -> TypeGuard[ParametrizationList]:
    """Return True for a list of parametrizations that this package has made."""
    package = __name__.partition(".")[0]
    return isinstance(module, ParametrizationList) and any(
        type(part).__module__.partition(".")[0] == package for part in module
    )


_kept_for_calls: "weakref.WeakSet[KeptForCalls]" = weakref.WeakSet()


def is_cached() -> bool:
    """Return True within `torch.nn.utils.parametrize.cached`, or a call that keeps results.

    Not in what is computed twice, once for the backward pass: both times have to do the same.
    """
    if runtime.is_compiling():
        return bool(parametrize._cache_enabled) or _traced is not None
    if _calls.freezes:
        return True
    return bool(parametrize._cache_enabled or _calls.modules) and not _is_checkpointed()


_CHECKPOINT = "torch.utils.checkpoint"
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.7


def _is_checkpointed() -> bool:
    """Return True in what `torch.utils.checkpoint` will compute again, or does."""
    if _top_hooks is not None:
        hooks = _top_hooks(False)
        return hooks is not None and hooks[0].__module__ == _CHECKPOINT
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


class _Frozen:
    """What is kept of a list of parametrizations, for as long as all that it is computed from stays.

    Args:
        stack: the list.
    """

    def __init__(self, stack: ParametrizationList) -> None:
        self._stack = weakref.ref(stack)
        self.blocks = 0  # which are under way
        self._parts: list[tuple[nn.Module, bool]] = []
        self._of: list[tuple[Tensor, int, Tensor | None]] = []
        self._results: dict[Any, tuple[Any, tuple[int, ...]]] = {}

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return a result, which is computed if there is none, or something has changed."""
        stack = self._stack()
        assert stack is not None
        parts = [(part, part.training) for part in stack.modules()]
        tensors = [*stack.parameters(), *stack.buffers()]
        if any(map(runtime.is_part, tensors)):  # which has no kernel, and says so
            return compute()
        if parts != self._parts or not self._is_of(tensors):
            # a copy tells of every change, but off the CPU comparing would wait for the device
            copies = [x.detach().clone() if runtime.may_wait(x.device) else None for x in tensors]
            self._of = [*zip(tensors, _versions(tuple(tensors)), copies, strict=True)]
            self._parts, self._results = parts, {}
        kept = self._results.get(key)
        if kept is not None and kept[1] == _versions_within(kept[0]):
            return kept[0]
        before, _calls.freezes = _calls.freezes, True
        try:
            with torch.inference_mode(False), torch.no_grad():
                value = compute()
        finally:
            _calls.freezes = before
        self._results[key] = value, _versions_within(value)
        return value

    def _is_of(self, tensors: list[Tensor]) -> bool:
        if len(tensors) != len(self._of):
            return False
        for x, now, (old, version, copy) in zip(tensors, _versions(tuple(tensors)), self._of, strict=True):
            if copy is None:
                same = x is old and now == version
            else:
                like = (x.dtype, x.shape, x.device) == (copy.dtype, copy.shape, copy.device)
                same = like and torch.equal(x.detach(), copy)
            if not same:
                return False
        return True


def _versions_within(value: Any) -> tuple[int, ...]:
    """Return how often the tensors of a result have been changed in place."""
    return _versions(tuple(leaf for leaf in runtime.leaves(value) if isinstance(leaf, Tensor)))


class _Forward:
    """The forward of a list of parametrizations that is frozen: torch asks it for the weight at each call.

    A copy of the list has another, and is not frozen.
    """

    def __init__(self, stack: nn.Module) -> None:
        self._stack = weakref.ref(stack)

    def __call__(self) -> Tensor:
        stack: Any = self._stack()
        return once(stack, "forward", tuple(stack.parameters()), lambda: type(stack).forward(stack))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return _Forward(memo[id(self._stack())])


class _FrozenHere(threading.local):
    """What is frozen in this thread."""

    def __init__(self) -> None:
        self.stacks: weakref.WeakKeyDictionary[Any, _Frozen] = weakref.WeakKeyDictionary()


_frozen = _FrozenHere()
_frozen_anywhere: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()  # blocks
_freezing = threading.Lock()


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Compute the kernels of a model once, for all calls within a ``with`` block.

        with frozen(model):
            outputs = [model(x) for x in batches]

    Within the block, in this thread, the parameters of this package's parametrizations are constants:
    neither they, nor what `torch.func.functional_call` puts in their place, get gradients. Inputs and all
    other parameters do. Outputs are the same as outside of the block, to rounding.

    The kernel is computed again after a change within the block: of a parameter (by an optimizer,
    ``load_state_dict``, assignment, `set_orthogonality` or in place), of the registered parametrizations,
    or of their training mode. On the CPU values are compared, so that no change of a parameter goes
    unnoticed. On other devices that would wait, and two kinds are not noticed: writes through ``.data``,
    and parameters that FSDP gathers again after a step. Changes within your own ``triv`` are never noticed.
    Leave the block for these.

    Code under `torch.compile`, `torch.func` transforms or `torch.utils.checkpoint` computes its kernels as
    outside of the block. For recurrent loops in training, use `torch.nn.utils.parametrize.cached`: it keeps
    the graph.

    Args:
        model: a model, or a single convolution. Blocks may be nested.

    Yields:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if nothing in it is parametrized by this package.

    Cost: memory, for the time of the block: of each convolution its kernel, and its spectrum for each size
    of images.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import frozen, orthogonal
        >>> conv = orthogonal(nn.Conv2d(8, 8, 3, padding=1))
        >>> x = torch.randn(2, 8, 20, 31)
        >>> with torch.no_grad():
        ...     y = conv(x)
        >>> with frozen(conv):
        ...     outputs = [conv(x) for _ in range(3)]  # one exponential
        >>> all(torch.allclose(output, y, atol=1e-5) for output in outputs)
        True
        >>> outputs[0].requires_grad  # by the bias; the weight is a constant
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a module. Found {type(model).__name__}")
    stacks = [module for module in model.modules() if _is_ours(module)]
    if not stacks:
        raise ValueError(
            "model should have convolutions that this package parametrizes, by `orthogonal` or `retrofit`. "
            f"Found none in {type(model).__name__}"
        )
    for stack in stacks:
        _frozen.stacks.setdefault(stack, _Frozen(stack)).blocks += 1
        with _freezing:
            _frozen_anywhere[stack] = _frozen_anywhere.get(stack, 0) + 1
            vars(stack)["forward"] = _Forward(stack)
    try:
        yield model
    finally:
        for stack in stacks:
            _frozen.stacks[stack].blocks -= 1
            if not _frozen.stacks[stack].blocks:
                del _frozen.stacks[stack]
            with _freezing:
                _frozen_anywhere[stack] -= 1
                if not _frozen_anywhere[stack]:
                    del _frozen_anywhere[stack]
                    vars(stack).pop("forward", None)


def once(owner: object, key: Any, of: tuple[Tensor, ...], compute: Callable[[], _Value]) -> _Value:
    """Compute once per `parametrize.cached()` block, call of a module of `KeptForCalls`, or `frozen` block.

    A result is used again only for the same tensors, unchanged, and where a graph is needed only if it has
    one, through which no backward pass has gone. So a later call does not train on a result that was
    computed under `torch.no_grad`, and autograd is not given one that was computed under
    `torch.inference_mode`.

    Args:
        owner: whose result it is; it outlives the block, or ``of`` tells its successors apart. Nothing is
            kept for None.
        key: which of its results.
        of: the tensors that it is computed from.
        compute: makes it.
    """
    plain = not (runtime.is_compiling() or runtime.is_transformed())
    if plain and owner in _frozen.stacks and not _is_checkpointed():
        return cast("_Value", _frozen.stacks[owner].get((key, of[0].dtype), compute))
    if owner is None or not is_cached():
        return compute()
    if torch.is_grad_enabled() and any(x.requires_grad for x in of):
        use = _GRAPH
    elif not runtime.is_compiling() and torch.is_inference_mode_enabled():  # which is not to be compiled
        use = _INFERENCE
    else:
        use = _VALUE
    key = (key, of[0].dtype) if of else key  # which a module's move changes, but not its parameters
    now = _versions(of)
    for results in _results():
        for made_for in range(_GRAPH, use - 1, -1):
            entry = results.get((id(owner), key, made_for))
            if entry is not None and entry.is_of(of, now):
                return cast("_Value", entry.value)
    value = compute()
    _results()[0][id(owner), key, use] = _Entry(of, now, value)
    return value


class _Entry:
    """A result that is kept.

    Args:
        of: the tensors that it is computed from.
        versions: which tell whether these have been changed in place.
        value: the result.
    """

    def __init__(self, of: tuple[Tensor, ...], versions: tuple[int, ...], value: Any) -> None:
        self.of = of
        self.versions = versions
        self.value = value
        self.is_spent = False  # once a backward pass has gone through it, which frees its graph
        if runtime.is_transformed():
            return
        for leaf in runtime.leaves(value):
            x = getattr(leaf, "spectrum", leaf)
            if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
                x.register_hook(self._spend)

    def is_of(self, of: tuple[Tensor, ...], versions: tuple[int, ...]) -> bool:
        """Return True if it may be used for these tensors."""
        if runtime.is_compiling():
            return True
        return not self.is_spent and self.versions == versions and all(map(is_, self.of, of))

    def _spend(self, gradient: Tensor) -> None:
        self.is_spent = True


def _versions(of: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return how often tensors have been changed in place, where torch counts that."""
    if runtime.is_compiling():
        return ()
    return tuple(-1 if x.is_inference() else x._version for x in of)


def _results() -> list[dict[Any, Any]]:
    """Return where results are kept, first the place for new ones: what was entered first lasts longest."""
    found: list[dict[Any, Any]] = []
    if parametrize._cache_enabled:
        cache: Any = parametrize._cache
        found.append(cache.setdefault(_KEPT, {}))
    if runtime.is_compiling():
        if _traced is not None:
            found.insert(0, _traced)
    elif _calls.modules and not (found and _calls.within_block):
        found.insert(0, _calls.results)
    return found


def forget(owner: object) -> None:
    """Drop what `once` has kept of an owner: something else than its tensors has changed."""
    for results in _results():
        for key in [key for key in results if key[0] == id(owner)]:
            del results[key]
