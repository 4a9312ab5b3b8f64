"""The module's forward: a class of its own for each orthogonal convolution.

Torch gives each parametrized module a class that derives from the module's, and takes it away with the
parametrization. The class that is made here takes the place of that one. It also evaluates the operator,
and says of the module what is true of it. It belongs to one module: a copy has another.
"""

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import keeping, lifecycle, runtime
from .operators.evaluate import convolve
from .operators.operator import Action, Operator
from .operators.weight import Parametrized
from .optimizers import Reshaped, note


def install(
    module: Any, parametrization: nn.Module, action: Action | None, **attributes: Any
) -> Callable[[], None]:
    """Register a parametrization on a convolution's weight.

    Args:
        module: the convolution.
        parametrization: of its weight.
        action: how the module is to be evaluated. None: by torch's own forward.
        attributes: of the module, to be changed.

    Returns:
        A function that makes the module what it was again.
    """
    base, parameters = type(module), dict(runtime.parameters_of(module))
    description = repr(module).partition("\n")[0]
    value, gradient = module.weight.detach().clone(), module.weight.grad
    before = {name: vars(module)[name] for name in attributes}

    def undo() -> None:
        module.__class__ = base
        vars(module).pop("installed", None)
        vars(module).update(before)
        runtime.children_of(module).pop("parametrizations", None)
        runtime.parameters_of(module).clear()
        runtime.parameters_of(module).update(parameters)
        module.weight.data = value
        module.weight.grad = gradient

    module.weight.grad = None  # not the generator's
    try:
        parametrize.register_parametrization(module, "weight", parametrization, unsafe=True)
    except BaseException:
        undo()
        raise
    vars(module).update(attributes)
    if action is not None:
        module.installed = lifecycle.Installed(action, parametrization)
    module.__class__ = own_class(base, action is not None)
    weight = parameters["weight"]
    if weight is not None and weight.shape != value.shape:  # the same parameter, and a split generator now
        note(Reshaped(description, weight, value.shape))
    return undo


def own_class(base: Any, evaluated: bool) -> Any:
    """Return a new class for one parametrized convolution, derived from its class before.

    It is what torch makes, with a weight that is computed once in a cached loop, and with checkpoints of
    the plain convolution.

    Args:
        base: the class before.
        evaluated: whether `Installed` says how the module is evaluated. Else it is by torch's own forward.
    """

    class Own(base):
        @property
        def weight(self) -> Tensor:
            """The kernel."""
            stack = self.parametrizations["weight"]
            W = keeping.once(stack, "weight", Parametrized(stack).tensors, stack)
            if evaluated:
                lifecycle.take_edges(self.installed, W, Parametrized(stack))
            return W

        @weight.setter
        def weight(self, value: Tensor) -> None:
            stack = self.parametrizations["weight"]
            lifecycle.remind(Parametrized(stack))
            stack.right_inverse(value)
            keeping.forget(stack)

        def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
            """Do what torch does. When it removes the parametrization, it puts the kernel here."""
            super().register_parameter(name, param)
            if name == "weight":  # which raises while it is parametrized
                lifecycle.leave(self, base, self.__dict__.pop("installed", None))

        def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
            """Do what torch does. Of several frozen parameters it makes a buffer when it removes them."""
            if name == "weight" and tensor is not None:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                super().register_buffer(name, tensor, persistent)

        def _load_from_state_dict(
            self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
        ) -> None:  # fmt: skip
            weight = Parametrized(self.parametrizations["weight"])
            lifecycle.translate(self, state_dict, prefix, error_msgs)
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            lifecycle.take_note(weight, state_dict, prefix)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            twin = self.__new__(own_class(base, evaluated))
            memo[id(self)] = twin
            twin.__dict__ = deepcopy(self.__dict__, memo)
            others = [name for name in twin.parametrizations if name != "weight"]
            runtime.inject_properties(twin, others)
            return twin

        def __getstate__(self) -> Any:
            raise RuntimeError(
                "a parametrized module should be saved by its state_dict(), or after "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )

    Own.__module__ = base.__module__
    Own.__name__ = Own.__qualname__ = f"Parametrized{base.__name__}"
    if evaluated:
        _let_evaluate(Own, base)
    elif hasattr(base, "_conv_forward"):
        _let_refuse(Own, base)
    return Own


def _let_refuse(cls: Any, base: Any) -> None:
    """Let torch's convolution refuse in words the images that its circular padding cannot continue."""

    def _conv_forward(self: Any, input: Tensor, *args: Any) -> Any:
        if self.padding_mode == "circular" and not runtime.is_jit_traced():
            sides = self._reversed_padding_repeated_twice
            for n, *around in zip(
                input.shape[-(len(sides) // 2) :], sides[-2::-2], sides[::-2], strict=True
            ):
                if max(around) > n:
                    raise ValueError(
                        "images should be at least as large as the padding, since torch's circular "
                        'padding wraps only once: use boundary="walls", or method="exponential", which '
                        f"accept every size. Found images of {tuple(input.shape)}, padded by {max(around)}"
                    )
        return base._conv_forward(self, input, *args)

    _conv_forward.computes = base._conv_forward  # type: ignore[attr-defined]
    cls._conv_forward = _conv_forward


def _let_evaluate(cls: Any, base: Any) -> None:
    """Give a module's own class a forward, and attributes that are true of it."""

    def operator(self: Any) -> Operator:
        """Return what the module does, its bias aside."""
        return Operator(self.installed.action, Parametrized(self.parametrizations["weight"]))

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the operator, and add the bias; see `operators.evaluate.convolve`."""
        operator = self.operator
        y = convolve(operator, self.bias, input, output_size)
        if not runtime.is_compiling():
            self.installed.see(input.shape[-operator.action.geometry.axes :])
        return y

    def extra_repr(self: Any) -> str:
        """Say what ``print`` says of the module."""
        true = SimpleNamespace(**{**vars(self), "bias": self.bias, **attributes(self)})
        only = Parametrized(self.parametrizations["weight"]).only
        return lifecycle.described(base.extra_repr(true), self.installed.action, only)

    cls.operator, cls.forward, cls.extra_repr = property(operator), forward, extra_repr
    for name in _TOLD:
        setattr(cls, name, _told(name))
    cls.__name__ = cls.__qualname__ = f"ParametrizedOrthogonal{lifecycle.plain_class(base).__name__}"


def operator_of(module: nn.Module) -> Operator | None:
    """Return the operator of a module that this package evaluates; None for any other."""
    installed = isinstance(vars(module).get("installed"), lifecycle.Installed)
    if not installed and not isinstance(module, lifecycle.Removed):
        return None
    operator = module.operator
    assert isinstance(operator, Operator)
    return operator


_TOLD = (
    "kernel_size", "stride", "dilation", "padding", "padding_mode", "output_padding", "groups",
    runtime.REPEATED_PADDING,
)  # fmt: skip


def attributes(module: Any) -> dict[str, Any]:
    """Return the attributes of torch's classes that say what an orthogonal module does."""
    operator = module.operator
    taps = operator.weight.taps or tuple(module.weight.shape[2:])
    return operator.boundary.attributes(taps, operator.geometry, operator.action.dilation)


def _told(name: str) -> property:
    """Return an attribute that says what the module does, while it is orthogonal, and not what it was."""

    def value(self: Any) -> Any:
        return attributes(self).get(name, vars(self).get(name))

    def refuse(self: Any, new: Any) -> None:
        raise AttributeError(
            f"{name} should not be changed while the convolution is orthogonal: change it before, or after "
            'torch.nn.utils.parametrize.remove_parametrizations(module, "weight")'
        )

    return property(value, refuse)
