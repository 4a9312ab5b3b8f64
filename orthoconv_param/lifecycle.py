"""Checkpoints, and what the removal of a parametrization leaves."""

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import keeping, norms, runtime, walled, walled_exponential
from .checks import Size
from .operators.evaluate import convolve
from .operators.operator import Action, Operator
from .operators.weight import Fixed, Parametrized
from .parametrizations.annealed import Annealing
from .parametrizations.blocks import Blocks
from .parametrizations.split import SplitExponential
from .parametrizations.walled import WalledGenerator
from .split.mending import Mended, mended
from .torus.boundary import margins
from .torus.geometry import convolve as convolve_directly
from .torus.geometry import convolve_transposed, sized


class Installed:
    """What an orthogonal module holds: how its kernel acts, what makes it, and the smallest images seen."""

    def __init__(self, action: Action, made: nn.Module) -> None:
        self.action = action
        self.made = made  # the parametrization
        self.smallest: Size | None = None
        self.edges: weakref.ref[Edges] | None = None  # of the weight that was read last
        self.stack: weakref.ref[ParametrizationList] | None = None  # from which it was computed
        self._last: Size | None = None

    def see(self, size: Size) -> None:
        """Take note of images of a size."""
        if size == self._last:
            return
        self._last = size
        domain = self.action.geometry.domain(size)
        if self.smallest is None:
            self.smallest = domain
        elif any(n < m for n, m in zip(domain, self.smallest, strict=True)):
            self.smallest = tuple(map(min, domain, self.smallest))


# Checkpoints


def translate(module: Any, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Make a checkpoint that is loaded into an orthogonal module one of its parametrization.

    A checkpoint of the plain convolution means: start from these weights. One of something else is refused:
    an error is noted, and the module keeps the values that it has.

    Args:
        module: an orthogonal one.
        state_dict: is changed.
        prefix: of the module's keys.
        error_msgs: as of ``Module._load_from_state_dict``.
    """
    weight = Parametrized(module.parametrizations["weight"])
    made = weight.only
    if made is None:
        return
    norms.fold(state_dict, prefix, module.transposed)
    stack = prefix + "parametrizations.weight."
    # the very parameters, which stay with ``assign=True`` too
    present = {stack + key: value for key, value in weight.stack.state_dict(keep_vars=True).items()}
    different = made.difference(state_dict, stack + "0.")
    if different is not None:
        error_msgs.append(f"{prefix}weight: {different}")
        for key in [key for key in state_dict if key.startswith(stack)]:  # else it is refused once more
            del state_dict[key]
        state_dict |= {prefix + key: value for key, value in module.state_dict(keep_vars=True).items()}
    if prefix + "weight" not in state_dict:
        return
    W = state_dict.pop(prefix + "weight")
    state_dict |= present  # what is not replaced stays
    if not isinstance(W, Tensor):
        error_msgs.append(
            f'While copying the parameter named "{prefix}weight", expected torch.Tensor or Tensor-like '
            f"object from checkpoint but received {type(W)}"
        )
        return
    try:
        X, buffers = made.preimage(W.to(weight.tensors[0]))
    except (TypeError, ValueError, RuntimeError) as error:
        error_msgs.append(f"While starting from {prefix}weight: {error}")
        return
    originals = (X,) if isinstance(X, Tensor) else X
    state_dict |= {stack + key: value for key, value in zip(weight.names, originals, strict=True)}
    state_dict |= {f"{stack}0.{key}": value for key, value in buffers.items()}


def take_note(weight: Parametrized, state_dict: dict[str, Any], prefix: str) -> None:
    """Let the parametrization know of the generator that is loaded: it may set the kernel's size."""
    generator = state_dict.get(f"{prefix}parametrizations.weight.{weight.names[0]}")
    if weight.only is not None and isinstance(generator, Tensor):
        key = f"{prefix}parametrizations.weight.0.{runtime.EXTRA_STATE}"
        weight.only.loaded(generator, state_dict.get(key))


def remind(weight: Parametrized) -> None:
    """Let a split parametrization know its generator, which torch does not tell it before an assignment."""
    if isinstance(weight.inner, SplitExponential):
        weight.inner.given.note(weight.tensors[0])


# Removal


class Edges:
    """What a weight between walls takes at its edges; it lives as long as that weight."""

    def __init__(self, mended: Mended) -> None:
        self.mended = mended


def take_edges(installed: Installed, W: Any, weight: Parametrized) -> None:
    """Keep the edges of a weight between walls, if torch may be removing its parametrization.

    Torch reads the weight without gradients, and then overwrites the generator by it. So this is the last
    moment at which there are factors. What is kept hangs on the weight that was read, not on the module.
    (Where there are several free parameters, it reads the weight with gradients, and keeps them.)
    """
    installed.stack = weakref.ref(weight.stack)
    if not installed.action.boundary.has_walls or torch.is_grad_enabled() or not runtime.is_plain(W):
        return
    if not hasattr(W, "edges"):
        found = weight.factors()
        if found is None:
            return
        W.edges = Edges(mended(*found, installed.action.geometry.transposed))
    installed.edges = weakref.ref(W.edges)


def leave(module: Any, base: type[nn.Module], installed: Installed | None) -> None:
    """Make of a module, whose weight torch has just made an ordinary parameter, one that computes the same.

    It is of torch's own class if that computes the same at the sizes that the module has seen, else of a
    class that `removed_class` makes of it, or between walls `walled.WalledConvolution` or
    `walled_exponential.WalledExponential`. Its attributes say what it does.

    Args:
        module: which still is of its parametrized class.
        base: the class that it had before.
        installed: what it held; None if it was evaluated by torch's own forward.
    """
    weight = module.weight
    weight.grad = None  # it was the generator's
    keeping.KeptForCalls.remove_from(module)
    if "bias" in runtime.parameters_of(module):  # the order that it had
        runtime.parameters_of(module)["bias"] = runtime.parameters_of(module).pop("bias")
    if installed is None:
        runtime.leave_class(module, base)
        return
    action, smallest, made, partition = installed.action, installed.smallest, installed.made, None
    edges = None if installed.edges is None else installed.edges()
    if isinstance(made, Blocks):
        partition, made = made.partition, made.exponential
        stack = None if installed.stack is None else installed.stack()
        if stack is not None and isinstance(made, SplitExponential):
            with torch.no_grad():
                found = Parametrized(stack).factors()
            assert found is not None
            edges = Edges(mended(*found, action.geometry.transposed))
    if isinstance(made, WalledGenerator):
        if partition is not None or made.has_issued(weight):
            walled_exponential.become(module, made, partition, action)
            runtime.leave_class(module, walled_exponential.WalledExponential)
        else:  # its Fourier coefficients, without their meaning
            runtime.leave_class(module, base)
        return
    if action.boundary.has_walls:
        if edges is not None and weight.ndim == len(action.geometry.size):
            vars(module).update(
                action.boundary.attributes(tuple(weight.shape[2:]), action.geometry, action.dilation)
            )
            share = made.progress if isinstance(made, Annealing) else 1.0
            if share == 1 and partition is None and not edges.mended.axes:  # no tap crosses an edge
                runtime.leave_class(module, base)
                return
            walled.become(module, edges.mended, action.geometry, share, partition)
            runtime.leave_class(module, walled.WalledConvolution)
        else:  # the generator, without its meaning
            runtime.leave_class(module, base)
        return
    geometry = action.geometry
    taps, plain = tuple(weight.shape[2:]), plain_class(base)
    if weight.ndim != len(geometry.size) or (
        taps == geometry.taps and taps != action.domain and not isinstance(made, SplitExponential)
    ):
        # A single tap, whose operator is its kernel; or the generator, without its meaning.
        runtime.leave_class(module, base)
        return
    boundary, dilation, domain = action.boundary, action.dilation, action.domain
    vars(module).update(boundary.attributes(taps, geometry, dilation))
    if boundary.is_torchs(taps, geometry, dilation, domain, smallest):
        for name in ("action", "steps", "around"):
            vars(module).pop(name, None)
        runtime.leave_class(module, plain)
    else:
        module.action, module.steps = action, steps(taps, action)
        module.around = action.boundary.is_periodic
        runtime.leave_class(module, removed_class(plain))


def plain_class(cls: Any) -> Any:
    """Return the class of which `removed_class` made one; any other itself."""
    return cls.__bases__[1] if issubclass(cls, Removed) else cls


@cache
def removed_class(plain: Any) -> Any:
    """Return the class of convolutions that `Removed` evaluates. Nothing ever changes it."""
    return type(f"Orthogonal{plain.__name__}", (Removed, plain), {})


def rebuild(plain: Any) -> Any:
    """Return a module without attributes, for pickle."""
    return object.__new__(removed_class(plain))


def steps(taps: Size, action: Action) -> tuple[list[int], ...]:
    """Return the numbers by which `Removed.scripted` applies a kernel, as lists, one number for each axis.

    They are: samples to continue images by, before and after; start of the result; stride; dilation; rest;
    taps; and the domain, zeros if it is every one.
    """
    before, after, start = margins(taps, action.geometry, action.dilation)
    stride, none = action.geometry.stride, (0,) * len(taps)
    rest = tuple(s - 1 for s in stride)
    if not action.boundary.is_periodic:
        before = after = start = none
    numbers = (before, after, start, stride, action.dilation, rest, taps, action.domain or none)
    return tuple([*each] for each in numbers)


@torch.fx.wrap
def convolve_removed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    action: Action,
    taps: Size,
    output_size: list[int] | None,
) -> Tensor:
    """Do what a module that removal leaves does. `torch.fx` records it as one call.

    Raises:
        ValueError: if the weight is not of the module's taps.
    """
    if not runtime.is_jit_traced() and tuple(weight.shape[2:]) != taps:
        raise ValueError(f"the weight should be of kernel_size={taps}. Found {tuple(weight.shape)}")
    return convolve(Operator(action, Fixed(weight)), bias, input, output_size)


class Removed(nn.Module):
    """Evaluates a convolution with an ordinary weight that torch's own class cannot.

    Mixed into that class. Its ``action`` says how the kernel acts, its ``steps`` how a script applies it.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["operator"]

    if TYPE_CHECKING:  # TorchScript would read these
        action: Action
        kernel_size: Size
        steps: tuple[list[int], ...]
        around: bool
        weight: Tensor
        bias: Tensor | None
        groups: int
        transposed: bool

    @property
    def operator(self) -> Operator:
        """Return what the module does, its bias aside."""
        return Operator(self.action, Fixed(self.weight))

    def forward(self, input: Tensor, output_size: Optional[list[int]] = None) -> Tensor:  # noqa: UP045, TorchScript reads no other
        """Apply the operator, and add the bias; see `operators.evaluate.convolve`."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.scripted(input)
        return convolve_removed(input, self.weight, self.bias, self.action, self.kernel_size, output_size)

    def scripted(self, input: Tensor) -> Tensor:
        """Do the same directly, by operations that TorchScript knows."""
        before, after, start, stride, dilation, rest, taps_of_weight, domain = self.steps
        axes = len(stride)
        x = input.unsqueeze(0) if input.dim() == axes + 1 else input
        x = sized(x, domain, stride, self.transposed)
        kernel, padding, size = self.weight, [0] * axes, [0] * axes
        if list(kernel.shape[2:]) != taps_of_weight:
            raise ValueError("the weight should be of the module's kernel_size")
        for axis in range(axes):
            n = x.size(axis + 2)
            size[axis] = n * stride[axis] if self.transposed else n
            if self.around:
                index = torch.arange(-before[axis], n + after[axis], device=x.device) % n
                x = x.index_select(axis + 2, index)
            else:  # the kernel's taps are those of a torus: the ones that images meet
                taps, padding[axis] = kernel.size(axis + 2), size[axis] - 1
                first = (taps - 1) // 2 - padding[axis]
                index = torch.arange(first, first + 2 * padding[axis] + 1, device=x.device) % taps
                kernel = kernel.index_select(axis + 2, index)
        if self.transposed:
            y = convolve_transposed(x, kernel, stride, padding, rest, dilation, self.groups)
            for axis in range(axes):
                y = y.narrow(axis + 2, start[axis], size[axis])
        else:
            y = convolve_directly(x, kernel, stride, padding, dilation, self.groups)
        bias = self.bias
        if bias is not None:
            y = y + bias.reshape([-1] + [1] * axes)
        y = y.contiguous()
        return y if input.dim() == axes + 2 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Say what ``print`` says of the module."""
        return described(super().extra_repr(), self.action)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the class by that from which it was made; a parametrized module is refused by torch."""
        if nn.utils.parametrize.is_parametrized(self):
            return super().__reduce_ex__(protocol)
        return rebuild, (plain_class(type(self)),), self.__dict__


def described(plain: str, action: Action, made: Any = None) -> str:
    """Add to the description of a convolution what of it is orthogonal, and on what.

    Args:
        plain: the description.
        action: of the convolution.
        made: its parametrization, if it has one.
    """
    inner, what = (
        (made.exponential, "blocks orthogonal") if isinstance(made, Blocks) else (made, "orthogonal")
    )
    if isinstance(inner, Annealing) and inner.t is not None and inner.progress < 1:
        what = f"at t={inner.progress:.3g} on its way to {what}"
    where = "every domain" if action.domain is None else f"domain={action.domain}"
    return f"{plain}, {what} on {where}, boundary={action.boundary.name!r}"
