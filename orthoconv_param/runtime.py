"""The process and the device: what may be read, waited for, kept or compiled; private names of torch.

The mathematics elsewhere has no branch about these: it asks here.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import cache, wraps
from itertools import count
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

_Method = TypeVar("_Method", bound=Callable[..., Any])

# Asked once: below torch 2.12 the question cannot be compiled.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "ipu")
_AUTOCAST_DEVICES = frozenset(
    device
    for device in (*_DEVICES, torch._C._get_privateuse1_backend_name())
    if torch.amp.is_autocast_available(device)
)


# Compiling and transforming


def is_compiling() -> bool:
    """Return True in what `torch.compile` or `torch.export` traces."""
    return torch.compiler.is_compiling()


def uncompiled() -> AbstractContextManager[Any]:
    """Run what has been compiled as it was before."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def is_compiled_whole() -> bool:
    """Return True in what is compiled, not exported, where only a backward pass asks for derivatives.

    Torch 2.7 does not tell its compiler which of both it is. There this is always False.
    """
    exported = getattr(torch.compiler, "is_exporting", is_compiling)
    return is_compiling() and not (exported() or torch._C._are_functorch_transforms_active())


_numbers = count()
_numbered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Numbered:
    """Is found by its number from compiled code, which takes tensors and numbers. A copy has its own."""

    number: int

    def __init__(self) -> None:
        self.number = next(_numbers)
        _numbered[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        Numbered.__init__(self)


def numbered(number: int) -> Any:
    """Return what has a number."""
    return _numbered[number]


def is_exported_directly() -> bool:
    """Return True in what is traced for runtimes without Fourier transforms, or without complex numbers."""
    return (is_compiling() and torch.onnx.is_in_onnx_export()) or is_jit_traced()


def is_jit_traced() -> bool:
    """Return True in what `torch.jit.trace` records, where sizes are tensors."""
    return torch._C._get_tracing_state() is not None


@cache
def scripted_in_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose branches `torch.jit.trace` keeps: it is compiled then."""
    return torch.jit.script_if_tracing(function)


def is_transformed() -> bool:
    """Return True where something else than a backward pass may ask for derivatives."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active() or is_compiling()


@contextmanager
def untransformed() -> Iterator[None]:
    """Compute with tensors that no transform, trace or gradient is to know of."""
    private: Any = torch._C
    state = private._get_tracing_state()
    private._set_tracing_state(None)
    try:
        with torch.no_grad(), private._DisableFuncTorch():
            yield
    finally:
        private._set_tracing_state(state)


def is_batched(x: Tensor) -> bool:
    """Return True for the tensors that ``vmap`` passes, or that a batched backward pass does."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def is_plain(x: Tensor) -> bool:
    """Return True where nobody asks for derivatives, and no map is made over a batch."""
    return not (torch.is_grad_enabled() or is_transformed() or is_batched(x))


# Backward passes


def backward_pass() -> int:
    """Return a number that tells one running backward pass from another."""
    return torch._C._current_graph_task_id()


def will_run(node: Any) -> bool:
    """Return True if the running backward pass is to reach a node of the graph."""
    return torch._C._will_engine_execute_node(node)


# Devices


def may_wait(device: torch.device) -> bool:
    """Return True where reading a value, as the steps that a norm needs, does not stall the device."""
    return device.type == "cpu"


def is_capturing(device: torch.device) -> bool:
    """Return True while a CUDA graph is recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def may_keep(device: torch.device) -> bool:
    """Return True where a tensor that is made may be kept for later calls."""
    return not (
        is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_capturing(device)
    )


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keep what is computed in the precision that it is given in."""
    if is_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_full_precision(method: _Method) -> _Method:
    """Decorate a method of a module: what it computes of a tensor is kept in the precision of that."""

    @wraps(method)
    def kept(self: Any, X: Any, *arguments: Any, **options: Any) -> Any:
        with no_autocast((X if isinstance(X, Tensor) else X[0]).device.type):
            return method(self, X, *arguments, **options)

    return cast("_Method", kept)


def out_of_inference_mode(function: _Method) -> _Method:
    """Decorate a function that makes parameters: those of inference mode could not be trained."""

    @wraps(function)
    def outside(*arguments: Any, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **options)
        with torch.inference_mode(False):
            return function(*arguments, **options)

    return cast("_Method", outside)


def is_autocast(device_type: str) -> bool:
    """Return True within `torch.autocast` for a device."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def reduced_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast has images convolved; None where it leaves them as they are."""
    device_type = x.device.type
    if not (x.dtype == torch.float32 and is_autocast(device_type)):
        return None
    return torch.get_autocast_dtype(device_type)


def rounding(dtype: torch.dtype) -> float:
    """Return how far a number may be from that of a dtype, relative to it."""
    return torch.finfo(dtype).eps / 2


# Memory


def owned(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return a tensor in a memory format that is no view and shares no memory: itself, or a copy.

    Torch refuses to change a view in place that a custom Function returns.
    """
    y = x.contiguous(memory_format=memory_format)
    if y is not x or type(x) is not Tensor or is_compiling() or is_batched(x):
        return y
    alone = not x._is_view() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=memory_format)


def reshaped(x: Tensor, size: torch.Size) -> Tensor:
    """Return a contiguous tensor in another shape that counts as no view: see `owned`."""
    return torch.ops.aten._unsafe_view(x, size)


def convolution_gradients(
    G: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: int,
    *,
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    needed: Sequence[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution by its images and its weight, those that are needed."""
    # From a single pixel's strides, which mean nothing, torch reads a format that its slow_conv2d refuses.
    G, x = (t.clone(memory_format=torch.contiguous_format) if prod(t.shape[2:]) == 1 else t for t in (G, x))
    none, ones = [0] * (x.ndim - 2), [1] * (x.ndim - 2)
    return torch.ops.aten.convolution_backward(
        G, x, weight, None, stride or ones, padding or none, dilation or ones, False, none, groups,
        [*needed, False],
    )[:2]  # fmt: skip


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of images, which a convolution keeps. Under ``vmap`` torch does not tell."""
    if not is_compiling() and is_batched(x):
        return torch.contiguous_format
    for axes, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == axes and not x.is_contiguous() and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


# Reading values


def may_read(x: Tensor) -> bool:
    """Return True if a tensor has a value that the host can read. Under ``vmap``, see `read`."""
    return not (is_compiling() or is_jit_traced() or x.is_meta or is_capturing(x.device))


def read(x: Tensor) -> float | None:
    """Return the value of a scalar, waiting for it; None under ``vmap``, where it has several."""
    try:
        return float(x)
    except RuntimeError:
        return None


def largest(x: Tensor) -> Tensor:
    """Return the largest value that a scalar has under ``vmap``, outside of all transforms."""
    functorch, given = torch._C._functorch, x
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    if x is given:
        return x
    with untransformed():
        return x.amax()


def flaw(x: Tensor) -> tuple[type[Exception], str] | None:
    """Return what is wrong with a trained parameter, if it is sharded or known not to be finite."""
    if not is_compiling() and is_part(x):
        return RuntimeError, (
            "should be whole. Found a part of it (a DTensor): a model that `fully_shard` has taken has its "
            "weights in forward only, or between `model.unshard()` and `model.reshard()`"
        )
    if not is_finite(x):
        return ValueError, (
            "should be finite. Found nan or inf: a step of the optimizer was too large, or the gradient "
            "that it took was not finite"
        )
    return None


def is_finite(x: Tensor) -> bool:
    """Return False if a tensor is known not to be finite.

    On CUDA it is asked under `torch.autograd.set_detect_anomaly` only, since reading that waits.
    """
    if not may_read(x) or not (may_wait(x.device) or torch.is_anomaly_enabled()):
        return True
    return read(torch.isfinite(x.detach()).all()) != 0


class LateReader:
    """Reads a scalar at each of many calls: on a GPU the last value that has arrived, without waiting.

    An event belongs to this process and this copy: it is neither pickled nor copied.
    """

    def __init__(self, waits: bool = True) -> None:
        self.restart(waits)

    def restart(self, wait: bool = True) -> None:
        """Drop what is under way; at the next call wait for the value if ``wait``."""
        self._in_flight: tuple[Tensor, torch.cuda.Event] | None = None
        self._waits = wait

    def __call__(self, x: Tensor) -> float | None:
        """Return a value, or None if none has arrived."""
        if may_wait(x.device) or self._waits:
            self._waits = False
            return read(x)
        arrived = None
        if self._in_flight is not None and self._in_flight[1].query():
            arrived, self._in_flight = float(self._in_flight[0]), None
        if self._in_flight is None:
            host = torch.empty((), dtype=x.dtype, pin_memory=True)
            host.copy_(x, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._in_flight = host, event
        return arrived

    def __getstate__(self) -> dict[str, Any]:
        return {"_in_flight": None, "_waits": self._waits}


class LastIssued:
    """Recognises the tensor that was issued last, as long as it exists; a copy has issued none."""

    def __init__(self) -> None:
        self._storage: weakref.ref[torch.UntypedStorage] | None = None

    def note(self, x: Tensor) -> None:
        """Take note of the tensor that is issued now."""
        if not is_compiling() and not is_batched(x):
            self._storage = weakref.ref(x.untyped_storage())

    def is_seen_in(self, x: Tensor) -> bool:
        """Return True if a tensor is that one, or a view of it."""
        return self._storage is not None and self._storage() is x.untyped_storage()

    def __getstate__(self) -> dict[str, Any]:
        return {"_storage": None}


class LastGiven:
    """Remembers the tensor that was given last, as long as it exists; a copy has been given none."""

    def __init__(self) -> None:
        self._given: weakref.ref[Tensor] | None = None

    def note(self, x: Tensor) -> None:
        """Take note of the tensor that is given now."""
        if not is_compiling() and not is_batched(x):
            self._given = weakref.ref(x)

    def forget(self) -> None:
        """Forget it."""
        self._given = None

    def __call__(self) -> Tensor | None:
        """Return the tensor, or None if there is none."""
        return None if self._given is None else self._given()

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": None}


# Sharded parameters


def is_part(x: Tensor) -> bool:
    """Return True for a DTensor: the part of a parameter that `fully_shard` leaves on a rank."""
    return hasattr(x, "full_tensor")


def refuse_assigning_to_parts() -> None:
    """Raise if the parametrized tensor that is being assigned to is sharded.

    Raises:
        RuntimeError: then, before anything is changed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    # Torch hands a parametrization the value alone, and notices only when it has changed. Nothing but the
    # calling frames knows of which list `right_inverse` is called.
    frame = inspect.currentframe()
    while frame is not None:
        stack = frame.f_locals.get("self")
        if isinstance(stack, ParametrizationList):
            if any(is_part(parameter) for parameter in stack.parameters(recurse=False)):
                raise RuntimeError(
                    "weight should be assigned before `fully_shard`, while the generator is whole. Found a "
                    "part of it (a DTensor)"
                )
            return
        frame = frame.f_back


# Torch's modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters, to be read and changed; None for those that it lacks, as a bias."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers, to be read and changed."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own children, to be read and changed."""
    return module._modules


def is_hooked(module: nn.Module) -> bool:
    """Return True if something else than its forward acts on what a module takes or gives."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


_WEIGHT_HOOKS = {SpectralNorm: "spectral_norm", WeightNorm: "weight_norm"}
_WEIGHT_PARAMETRIZATIONS = {
    parametrizations._SpectralNorm: "spectral_norm", parametrizations._WeightNorm: "weight_norm",
}  # fmt: skip


def weight_hook(module: nn.Module) -> str | None:
    """Return the name of torch's hook that computes a module's weight; None if none does."""
    hooks = [h for h in module._forward_pre_hooks.values() if getattr(h, "name", None) == "weight"]
    return next((_WEIGHT_HOOKS[type(hook)] for hook in hooks if type(hook) in _WEIGHT_HOOKS), None)


def remove_spectral_norms_loader(module: nn.Module) -> None:
    """Remove what torch's `remove_spectral_norm` leaves: it looks for it without its wrapper."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in [*hooks.items()]:
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def weight_parametrization(module: Any) -> str | None:
    """Return the name of torch's norm that alone parametrizes a module's weight; None if none does."""
    if not parametrize.is_parametrized(module, "weight") or len(module.parametrizations) > 1:
        return None
    stack = module.parametrizations.weight
    return _WEIGHT_PARAMETRIZATIONS.get(type(stack[0])) if len(stack) == 1 else None


def leaves(tree: Any) -> list[Any]:
    """Return what nested tuples, lists and dicts hold."""
    return tree_leaves(tree)


def leave_class(module: Any, cls: type[nn.Module]) -> None:
    """Let a module be of a class once torch has taken away its parametrized one.

    Called while torch does so, after it has removed one of the parametrized tensors. Others may remain:
    they are properties of a class that is this module's alone, and a copy has another.
    """

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        twin = self.__new__(cls)
        memo[id(self)] = twin
        twin.__dict__ = deepcopy(self.__dict__, memo)
        leave_class(twin, cls)
        return twin

    module.__class__ = cls
    parametrize._inject_new_class(module)
    own: Any = type(module)
    own.__deepcopy__ = copied
    inject_properties(module, module.parametrizations)


def inject_properties(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module's own class the properties of its parametrized tensors."""
    for name in names:
        parametrize._inject_property(module, name)


EXTRA_STATE = "_extra_state"  # the end of the key of what `get_extra_state` returns
REPEATED_PADDING = "_reversed_padding_repeated_twice"  # what they pad by where they do not pad by zeros
