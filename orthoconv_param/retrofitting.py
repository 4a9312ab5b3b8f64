"""`retrofit`: the convolutions of a trained model become orthogonal, at once or by degrees."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import runtime
from .checks import Size, check_finite
from .convert import Conversion
from .models import Select, Uses, by_name, selected, sizes
from .parametrizations.annealed import Annealed
from .parametrizations.blocks import Block, Blocks, resolve_blocks
from .parametrizations.exponential import ConvExponential
from .torus.boundary import boundary_named, boundary_of

_Model = TypeVar("_Model", bound=nn.Module)


def retrofit(
    model: _Model,
    example_inputs: Any,
    *,
    select: Select | None = None,
    blocks: Mapping[str, Iterable[Block]] | None = None,
    boundary: Literal["circular", "zeros"] | None = None,
    anneal: bool = True,
) -> _Model:
    """Make the convolutions of a trained model orthogonal, starting from their pretrained weights.

    The model is run once, to find the size of the images that each convolution is fed. At that size its
    operator is made `orthogonal`. With ``anneal=True`` the model computes the same as before at first.
    While it is trained, ``set_orthogonality(model, t)`` takes it from the pretrained operators, ``t = 0``,
    to orthogonal ones, ``t = 1``. Images then have to be of that size. At each frequency the operator is

        U exp(A) S^(1-t) V^H,

    where ``U S V^H`` is the pretrained operator, and ``A`` the generator's skew part, in the basis ``V``.

    With ``anneal=False`` the model starts at the nearest orthogonal operators. That destroys much of what
    it has learned. The end of annealing does too where the pretrained operator has no full rank: singular
    values of 0 count as ``eps`` times the largest, and come up to 1 near ``t = 1`` only. A 1x1 convolution
    with a stride has no full rank, because it skips samples: better leave it out.

    Args:
        model: any module. Its convolutions' paddings should keep the size.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments. The model is called in evaluation mode, without gradients. Afterwards its
            buffers and the random numbers are as before; state in other attributes may not be.
        select: which convolutions: names as in ``model.named_modules()``, with ``*`` and ``?``, or a
            function of ``(name, module)``. Default: all of them.
        blocks: the blocks of weights that are to be orthogonal: a dict from names of convolutions, with
            ``*`` and ``?``, to pairs of slices ``(out, in)`` of the weight's first two axes, all square and
            alike. The rest of the weight stays free. `functional.gate_blocks` gives those of recurrent
            cells.
        boundary: ``"circular"`` or ``"zeros"``. Default: each convolution's own. Another one changes the
            outputs.
        anneal: True to start from the pretrained operators themselves, False from the nearest orthogonal
            ones.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: if something is selected that is no convolution, or that `orthogonal`
            refuses; if the example does not reach a convolution, or reaches it with images of several sizes
            (unless it has one tap); if a padding mirrors or repeats the image's edge, because no operator
            with such a padding is orthogonal; if a weight is shared with another module of ``model``, or
            used outside of its convolution's call, because the weight becomes another one; if ``blocks``
            are not as above. The message names each of these convolutions, and the model is as before.
            (Sharing is seen only within ``model``: pass the whole model, and ``select``.)

    **Optimizers.** A weight that becomes orthogonal as a whole stays the same parameter. An optimizer that
    was made before goes on training it. (Its momenta are of the weights, though, so a new one starts
    cleaner.) With ``blocks`` a weight becomes two parameters, generator and rest. An optimizer that was
    made before, and was not given them, raises ``RuntimeError`` at its next step. Make a new one, or call
    ``optimizer.add_param_group({"params": ...})`` with the new parameters. `generators` gives those that
    may want a learning rate of their own.

    **Checkpoints.** A checkpoint of the retrofitted model holds ``t``, and loads into a model that was
    retrofitted in the same way. One of the plain model loads too. The model then starts from these weights,
    at ``t = 0``; or, once annealing has ended, from the nearest orthogonal ones. Before ``t`` is 1,
    assigning to a weight starts from it at ``t = 0`` too. So does `geotorch.utils.update_base`, which
    assigns.

    Cost: one call of the model, and for each convolution one singular value decomposition for each
    frequency. Its spectrum on the domain, matrices of ``max(out, in * s^d)`` rows at each frequency, is
    kept twice, or once if it is not annealed. A step costs as much as that of `orthogonal`, and until
    annealing has ended, two more products of matrices. A loop under `parametrize.cached` pays for this
    once. A network without a loop pays at every call, which is much more than its convolutions cost.

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
    if boundary is not None:
        boundary_named(boundary)
    if not isinstance(anneal, bool):
        raise TypeError(f"anneal should be True or False. Found {anneal!r}")
    chosen = selected(model, select)
    stacked = by_name(blocks or {}, chosen)
    with Uses(chosen.values()) as uses:
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
            _Replaced(f"{name}.weight".lstrip("."), weight, parameters)
    return model


def set_orthogonality(model: nn.Module, t: float, *, final: bool = False) -> None:
    """Move all convolutions that `retrofit` anneals between pretrained (0) and orthogonal (1).

    Their singular values become ``S^(1-t)``. Generators, and an optimizer's parameters, stay the same.

    Args:
        model: a retrofitted model.
        t: from 0 to 1.
        final: True to end annealing, with ``t = 1``. The buffers that only served it are dropped, and the
            convolutions stay orthogonal from then on.

    Raises:
        TypeError, ValueError: if ``t`` is not from 0 to 1, or is not 1 with ``final``; if no
            convolution of the model is being annealed (where all are orthogonal, ``t = 1`` does nothing).

    For an averaged copy (`torch.optim.swa_utils.AveragedModel`), annealing has to be ended by a call of its
    own. Otherwise the copy's next update finds buffers that are not there.
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
    for module in model.modules():
        if isinstance(module, ParametrizationList):  # if this is within `parametrize.cached`
            runtime.forget(module)


def _check_shared(model: nn.Module, module: Any) -> None:
    """Raise if another module of the model has the same weight.

    Raises:
        ValueError: if there is one.
    """
    weight = runtime.parameters_of(module).get("weight")
    others = [
        f"{name}.{key}".lstrip(".")
        for name, other in model.named_modules()
        if other is not module
        for key, parameter in runtime.parameters_of(other).items()
        if parameter is not None and parameter is weight
    ]
    if others:
        raise ValueError(f"its weight should be its own. It is {', '.join(others)} too")


def _plan(
    name: str, module: Any, seen: list[Size], blocks: list[Block] | None, boundary: str | None, anneal: bool
) -> tuple[Conversion, nn.Module]:
    """Decide how one convolution is made orthogonal; change nothing.

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
    size = tuple(module.weight.shape)
    if len(seen) > 1 and max(size[2:]) > 1:
        raise ValueError(f"its images should be of one size, the domain. Found {', '.join(map(str, seen))}")
    if boundary is None:  # each convolution keeps its own
        own = boundary_of(module)
        boundary = None if own is None else own.name
    part = None
    if blocks is not None:
        blocks = resolve_blocks(blocks, size, module.groups)
        side = blocks[0][0].stop - blocks[0][0].start
        part = side * len(blocks), side, len(blocks)
    for domain in seen:
        conversion = Conversion.of(module, "weight", domain, boundary, part, small=True)
    check_finite("the weight", module.weight)
    exponential = conversion.exponential(name or None, Annealed if anneal else ConvExponential)
    exponential.to(module.weight.device)
    if blocks is None:
        return conversion, exponential
    return conversion, Blocks(exponential, blocks, size, module.groups)


def _install(plans: list[tuple[Conversion, nn.Module]]) -> None:
    """Install all parametrizations; if anything goes wrong, take back those that were installed."""
    undo: list[Callable[[], None]] = []
    try:
        for conversion, parametrization in plans:
            undo.append(conversion.install(parametrization))
    except BaseException:
        for step in undo:
            step()
        raise


# Note [replaced parameters]
# An optimizer skips parameters that have no gradient. So one that holds a replaced weight would silently
# train neither the generator nor the rest. To find it, a hook of torch's runs before each step of any
# optimizer, and looks there for the replaced weights that still exist. (They exist because somebody holds
# them.) Once none exists, the hook is removed.


class _Replaced:
    """A weight, and the parameters that replace it."""

    def __init__(self, name: str, weight: nn.Parameter, parameters: list[nn.Parameter]) -> None:
        self.name = name
        self.weight = weakref.ref(weight, _forget_dead)
        self.parameters = [weakref.ref(parameter, _forget_dead) for parameter in parameters]
        if not _replaced:
            _hooks.append(register_optimizer_step_pre_hook(_check_optimizer))
        _replaced.append(self)

    def is_alive(self) -> bool:
        """Return True if somebody holds the weight and the parameters."""
        return self.weight() is not None and all(p() is not None for p in self.parameters)


_replaced: list[_Replaced] = []
_hooks: list[Any] = []  # at most one


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
            raise RuntimeError(
                f"the optimizer was made before retrofit, which replaced {replaced.name} by "
                f"{len(replaced.parameters)} parameters that it does not train. Make a new one, or call "
                'optimizer.add_param_group({"params": [*module.parametrizations.weight.parameters()]})'
            )
