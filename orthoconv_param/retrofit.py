r"""`retrofit`: the convolutions of a trained model become orthogonal, at once or by degrees.

With the polar decomposition ``W = Q P`` of a pretrained operator at each frequency (``Q`` has singular
values 1, ``P = V diag(S) V^H``),

    W_t = Q exp(skew(X)) P^(1 - t)

is the pretrained operator at ``t = 0`` and ``X = 0``, and orthogonal at ``t = 1`` whatever the generator
``X``. (With ``W = U S V^H`` it is ``U exp(A) S^(1 - t) V^H``, where ``A = V^H skew(X) V``. In its own basis
the generator has few taps, and does not depend on how a singular value decomposition was chosen.)
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .blocks import Block, Blocks, resolve_blocks
from .conversion import CONVOLUTIONS, Conversion
from .exponential import polar_decomposition, product
from .lattice import Lattice, Size
from .parametrization import ConvExponential, no_autocast, packed, unpacked

_Model = TypeVar("_Model", bound=nn.Module)
Select: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


class Annealed(ConvExponential):
    """`ConvExponential` on a given domain, on its way from a pretrained kernel to an orthogonal one.

    ``t`` is a buffer, so that checkpoints hold it. At ``t < 1`` assigning a kernel starts from it, at
    ``t = 0``; at ``t = 1`` the nearest orthogonal one is taken, as ever.
    """

    t: Tensor | None  # None once annealing has ended
    directions: Tensor | None
    values: Tensor | None
    _unitary: ClassVar[tuple[str, ...]] = ("base", "directions")

    def __init__(self, domain: Size, *, stride: Size, groups: int) -> None:
        super().__init__(domain, stride=stride, groups=groups)
        self.register_buffer("t", torch.zeros(()))
        self.register_buffer("directions", None)
        self.register_buffer("values", None)

    @property
    def progress(self) -> float:
        """``t``, and 1 once annealing has ended."""
        return 1.0 if self.t is None else float(self.t)

    def end(self) -> None:
        """Drops what is not needed once ``t`` is 1."""
        self.t = self.directions = self.values = None

    def spectrum(
        self, X: Tensor, domain: Size | None = None, dilation: Size = ()
    ) -> tuple[Lattice, Tensor]:
        """As of `ConvExponential`, times ``P^(1 - t)``, which is on the left of wide matrices."""
        lattice, Q = super().spectrum(X, domain, dilation)
        if self.t is None:
            return lattice, Q
        assert self.directions is not None
        assert self.values is not None
        with no_autocast(X.device.type):
            V = unpacked(self.directions).to(Q.dtype)
            powers = self.values.unsqueeze(-2) ** (1 - self.t)
            if Q.shape[-2] >= Q.shape[-1]:
                return lattice, product(product(Q, V) * powers, V.mH.resolve_conj())
            return lattice, product(V * powers, product(V.mH.resolve_conj(), Q))

    @torch.no_grad()
    def right_inverse(self, W: Tensor, check_in_manifold: bool = False) -> Tensor:
        """As of `ConvExponential` at ``t = 1``. Before, the kernel is ``W`` itself, and ``t`` 0 again."""
        arrived = self.progress == 1
        generator = super().right_inverse(W, check_in_manifold)
        if arrived and self.t is not None:
            self.t.fill_(1)
        return generator

    def _buffers_of(self, lattice: Lattice, spectrum: Tensor) -> dict[str, Tensor]:
        frame, V, S = lattice.choose(polar_decomposition, spectrum)
        buffers = {"base": packed(frame)}
        if self.t is None:
            return buffers
        info = torch.finfo(S.dtype)
        floor = (info.eps * S.amax()).clamp(min=info.tiny)
        return buffers | {
            "directions": packed(V),
            "values": S.clamp(min=floor),
            "t": torch.zeros_like(self.t),
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values = {name: state_dict.get(prefix + name) for name in ("t", "directions", "values")}
        if prefix + "base" in state_dict and all(value is None for value in values.values()):
            self.end()  # as it had where the checkpoint was made
        elif self.t is None and self.base is not None:
            for name, value in values.items():
                if value is not None:
                    like = torch.empty_like(value, dtype=self.base.dtype, device=self.base.device)
                    setattr(self, name, like)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What ``print`` says of it."""
        return super().extra_repr() + ("" if self.t is None else f", t={self.progress:.3g}")


def retrofit(
    model: _Model,
    example_inputs: Any,
    *,
    select: Select | None = None,
    blocks: Mapping[str, Iterable[Block]] | None = None,
    boundary: Literal["circular", "zeros"] | None = None,
    anneal: bool = True,
) -> _Model:
    r"""Makes the convolutions of a trained model orthogonal, starting from their pretrained weights.

    The model is run once, to see the size of the images that each convolution is fed; there its operator
    is made `orthogonal`. With ``anneal=True`` the model still computes what it did, and
    ``set_orthogonality(model, t)`` takes it from the pretrained operators, ``t = 0``, to orthogonal ones,
    ``t = 1``, while it is trained (images then have to be of that size):

    .. math:: U \exp(A)\, S^{1-t}\, V^H \quad\text{at each frequency,}

    where ``U S V^H`` is the pretrained operator, and ``A`` the generator's skew part, in the basis ``V``.

    With ``anneal=False`` it starts at the nearest orthogonal operators: that destroys much of what was
    learned. So does the end of annealing where the pretrained operator has no full rank: singular values
    of 0 count as ``eps`` times the largest, and come up to 1 near ``t = 1`` only. A 1x1 convolution with a
    stride is such: it skips samples. Rather leave it out.

    Args:
        model: any module. Its convolutions' paddings should keep the size.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments. It is called in evaluation mode, without gradients, and its buffers and the
            random numbers are as before afterwards; state in other attributes is not.
        select: which convolutions: names as in ``model.named_modules()``, with ``*`` and ``?``, or a
            function of ``(name, module)``. Default: all of them.
        blocks: for convolutions by name, with ``*`` and ``?``: the blocks of the weight that are to be
            orthogonal, pairs of slices ``(out, in)`` of its first two axes, all square and alike. The rest
            of the weight stays free. `functional.gate_blocks` gives those of recurrent cells.
        boundary: ``"circular"`` or ``"zeros"``. Default: each convolution's own. Another one changes the
            outputs.
        anneal: whether to start from the pretrained operators themselves.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: if something is selected that is no convolution, that `orthogonal` refuses,
            that the example does not reach, or reaches with images of several sizes; if padding mirrors or
            repeats the image (no orthogonal operator does); if a weight is shared with another module of
            ``model`` (so pass the whole of it, and ``select``), or used outside of its convolution's call,
            because it becomes another one; if ``blocks`` are not as above. Each convolution is named, and
            the model is as before.

    **Optimizers.** A weight that becomes orthogonal as a whole stays the same parameter: an optimizer that
    was made before trains it on (its momenta are of the weights, though, so a new one starts cleaner). With
    ``blocks`` a weight becomes two parameters, generator and rest: an optimizer that was made before, and
    was not told, raises ``RuntimeError`` at its next step. Make a new one, or
    ``optimizer.add_param_group({"params": ...})`` with the new parameters; `generators` gives those that
    may want a learning rate of their own.

    **Checkpoints** of the retrofitted model hold ``t``, and load into a model retrofitted alike. One
    of the plain model loads too, and means: start from these weights, at ``t = 0`` (once annealing has
    ended, from the nearest orthogonal ones). So does assigning to a weight, and with it
    `geotorch.utils.update_base`, before ``t`` is 1.

    Cost: one call of the model, and for each convolution one singular value decomposition for each
    frequency. Its spectrum on the domain is kept twice, once if it is not annealed: matrices of
    ``max(out, in * s^d)`` rows, at each frequency. A step costs that of `orthogonal` and, until annealing
    has ended, two more products of matrices. In a loop under `parametrize.cached` that is paid once; a
    network without a loop pays for it at every call, which is much more than its convolutions cost.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import orthogonality_defect, retrofit, set_orthogonality
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.ReLU())
        >>> x = torch.randn(1, 4, 16, 16)
        >>> before = model(x)
        >>> model = retrofit(model, x)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> for t in (0.25, 0.5, 0.75, 1):
        ...     set_orthogonality(model, t)  # and train on
        >>> orthogonality_defect(model[0], 16) < 1e-5
        True
    """
    if boundary not in (None, "circular", "zeros"):
        raise ValueError(f'boundary should be None, "circular" or "zeros". Found {boundary!r}')
    if not isinstance(anneal, bool):
        raise TypeError(f"anneal should be True or False. Found {anneal!r}")
    chosen = _selected(model, select)
    stacked = by_name(blocks or {}, chosen)
    with _Uses(chosen.values()) as uses:
        seen = sizes(model, example_inputs)
    with torch.inference_mode(False):  # what is made here is to be trained
        plans, problems = [], []
        for name, module in chosen.items():
            try:
                _check_shared(model, module)
                if module in uses.found:
                    use = uses.found[module]
                    raise ValueError(f"its weight should only be used by its own call. Found it in {use}")
                plans.append(_plan(name, module, seen.get(module, []), stacked.get(name), boundary, anneal))
            except (TypeError, ValueError) as error:
                problems.append((name, error))
        if problems:
            kind = TypeError if all(isinstance(e, TypeError) for _, e in problems) else ValueError
            said = "\n".join(f"  {name or 'the model itself'}: {error}" for name, error in problems)
            raise kind(f"not all convolutions that are selected can be made orthogonal as asked:\n{said}")
        weights = [conversion.module.weight for conversion, _ in plans]
        _install(plans)
    for name, module, weight in zip(chosen, chosen.values(), weights, strict=True):
        parameters = list(module.parametrizations.weight.parameters(recurse=False))
        if all(weight is not parameter for parameter in parameters):
            _replaced.append(_Replaced(f"{name}.weight".lstrip("."), weight, parameters))
    return model


def set_orthogonality(model: nn.Module, t: float, *, final: bool = False) -> None:
    r"""Moves all convolutions that `retrofit` anneals between pretrained, 0, and orthogonal, 1.

    Their singular values become :math:`S^{1-t}`; generators and the parameters of an optimizer stay.

    Args:
        model: a retrofitted model.
        t: from 0 to 1.
        final: whether annealing ends here, with ``t = 1``: what only served it is dropped. The convolutions
            stay orthogonal from then on.

    Raises:
        TypeError, ValueError: if ``t`` is not from 0 to 1, or is not 1 with ``final``; if no
            convolution of the model is being annealed (where all are orthogonal, ``t = 1`` does nothing).

    An averaged copy (`torch.optim.swa_utils.AveragedModel`) has to end too, by a call of its own, or its
    next update finds buffers that are not there.
    """
    if isinstance(t, (bool, str)) or not hasattr(t, "__float__"):
        raise TypeError(f"t should be a number. Found {t!r}")
    t = float(t)
    if not 0 <= t <= 1:
        raise ValueError(f"t should be from 0 to 1. Found {t!r}")
    if final and t != 1:
        raise ValueError(f"t should be 1 with final=True. Found {t!r}")
    orthogonal = [m for m in model.modules() if isinstance(m, ConvExponential)]
    annealed = [m for m in orthogonal if isinstance(m, Annealed) and m.t is not None]
    if not annealed and not (orthogonal and t == 1):
        raise ValueError(
            "model should have convolutions that are being annealed: those of retrofit(..., anneal=True), "
            "until final=True. Found none"
        )
    for exponential in annealed:
        assert exponential.t is not None
        exponential.t.fill_(t)
        if final:
            exponential.end()
    parametrize._cache.clear()  # of weights, if this is within `parametrize.cached`


def sizes(model: nn.Module, example_inputs: Any) -> dict[nn.Module, list[Size]]:
    """The sizes of the images that each convolution of a model takes of an example.

    Of a transposed convolution, of those that it gives if it keeps the size: its domain.
    """
    seen: dict[nn.Module, list[Size]] = {}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        size = tuple(x.shape[-len(module.kernel_size) :])
        if module.transposed:
            size = tuple(n * s for n, s in zip(size, module.stride, strict=True))
        known = seen.setdefault(module, [])
        if size not in known:
            known.append(size)

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, CONVOLUTIONS)
    ]
    try:
        with undisturbed(model), torch.no_grad():
            call(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class _Uses(TorchFunctionMode):
    """What is done with the weights of convolutions outside of their own calls."""

    def __init__(self, convolutions: Iterable[Any]) -> None:
        super().__init__()
        self.found: dict[nn.Module, str] = {}
        self._weights = {id(m._parameters.get("weight")): m for m in convolutions}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Uses":
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
        """Takes notes, and does what is done. To ask for a weight's dtype or shape is not to use it."""
        name = getattr(func, "__name__", str(func))
        if name != "__get__":
            for x in tree_leaves((args, kwargs)):
                module = self._weights.get(id(x)) if isinstance(x, nn.Parameter) else None
                if module is not None and module not in self._running:
                    self.found.setdefault(module, name)
        return func(*args, **(kwargs or {}))


def call(model: nn.Module, inputs: Any) -> Any:
    """What a model makes of a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; modes, buffers and random numbers are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        if not isinstance(module, (ConvExponential, Blocks))
        for name, buffer in module._buffers.items()
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
            module._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(value)


def convolutions_of(model: nn.Module) -> dict[str, Any]:
    """A model's convolutions by name; one that has several names is there with each of them."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, CONVOLUTIONS)}


def _selected(model: nn.Module, select: Select | None) -> dict[str, Any]:
    """The convolutions that are selected, each once, by name.

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
    """The blocks of each convolution.

    Raises:
        TypeError, ValueError: if a pattern matches none of them, or one is matched twice.
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


def _check_shared(model: nn.Module, module: Any) -> None:
    weight = module._parameters.get("weight")
    others = [
        f"{name}.{key}".lstrip(".")
        for name, other in model.named_modules()
        if other is not module
        for key, parameter in other._parameters.items()
        if parameter is not None and parameter is weight
    ]
    if others:
        raise ValueError(f"its weight should be its own. It is {', '.join(others)} too")


def _plan(
    name: str, module: Any, seen: list[Size], blocks: list[Block] | None, boundary: str | None, anneal: bool
) -> tuple[Conversion, nn.Module]:
    """How one convolution is made orthogonal; nothing is changed.

    Raises:
        TypeError, ValueError: if it cannot be.
    """
    if not seen:
        raise ValueError(
            "the example should reach it, by a call of the module, in evaluation mode too: images of what "
            "size it takes is not known"
        )
    if module.weight.is_meta:
        raise ValueError("the weight should have values. Found a meta tensor")
    if len(seen) > 1 and max(module.kernel_size) > 1:
        raise ValueError(f"its images should be of one size, the domain. Found {', '.join(map(str, seen))}")
    if boundary is None:
        boundary = module.padding_mode
        if boundary not in ("circular", "zeros") and max(module.kernel_size) > 1:
            raise ValueError(
                f"padding_mode={boundary!r} counts pixels near the edge several times, so that no kernel "
                'makes it orthogonal: boundary should be given, "circular" or "zeros"'
            )
        boundary = "circular" if max(module.kernel_size) == 1 else boundary
    part = None
    size = module.weight.shape
    if blocks is not None:
        blocks = resolve_blocks(blocks, size, module.groups)
        side = blocks[0][0].stop - blocks[0][0].start
        part = side * len(blocks), side, len(blocks)
    for domain in seen:
        conversion = Conversion.of(module, "weight", domain, boundary, part, small=True)
    if not bool(torch.isfinite(module.weight).all()):
        raise ValueError("the weight should be finite. Found nan or inf")
    kind = Annealed if anneal else ConvExponential
    assert conversion.torus != "any"
    exponential = kind(conversion.torus, stride=conversion.stride, groups=conversion.groups)
    exponential.placement = conversion.placement
    exponential.owner = name or None
    exponential.to(module.weight.device)
    return conversion, exponential if blocks is None else Blocks(exponential, blocks, size, module.groups)


def _install(plans: list[tuple[Conversion, nn.Module]]) -> None:
    """All of them, or, whatever goes wrong, none."""
    undo: list[Callable[[], None]] = []
    try:
        for conversion, parametrization in plans:
            undo.append(conversion.install(parametrization))
    except BaseException:
        for step in undo:
            step()
        raise


# Note [replaced parameters]
# An optimizer skips parameters that have no gradient, so one that holds the weight of before would train
# neither the generator nor the rest, without a word. Before each step of any optimizer, the weights that
# have been replaced and still exist, which is because somebody holds them, are looked for in it.


class _Replaced:
    def __init__(self, name: str, weight: nn.Parameter, parameters: list[nn.Parameter]) -> None:
        global _watching
        self.name = name
        self.weight = weakref.ref(weight)
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        if not _watching:
            register_optimizer_step_pre_hook(_check_optimizer)
            _watching = True


_replaced: list[_Replaced] = []
_watching = False


def _check_optimizer(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _replaced[:] = [
        r for r in _replaced if r.weight() is not None and all(p() is not None for p in r.parameters)
    ]
    if not _replaced:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for replaced in _replaced:
        parameters = [p for reference in replaced.parameters if (p := reference()) is not None]
        missing = [p for p in parameters if p.requires_grad and id(p) not in held]
        if id(replaced.weight()) in held and missing:
            raise RuntimeError(
                f"the optimizer was made before retrofit, which replaced {replaced.name} by "
                f"{len(replaced.parameters)} parameters that it does not train. Make a new one, or call "
                'optimizer.add_param_group({"params": [*module.parametrizations.weight.parameters()]})'
            )
