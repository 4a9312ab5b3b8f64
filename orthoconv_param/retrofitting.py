"""`retrofit`: the convolutions of a trained model become orthogonal, immediately or by degrees."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from . import keeping, runtime
from .models import Select, Uses, by_name, check_model, selected, sizes
from .norms import norm_of, replace_by_value
from .optimizers import Replaced, note
from .parametrizations.annealed import Annealing
from .parametrizations.partition import Block, Partition
from .parametrizations.registered import Registered
from .recurrent import check_states, recurrent_blocks
from .torus.boundary import boundary_named
from .ways import Way

_Model = TypeVar("_Model", bound=nn.Module)


@runtime.out_of_inference_mode
def retrofit(
    model: _Model,
    example_inputs: Any,
    *,
    select: Select | None = None,
    blocks: Mapping[str, Iterable[Block]] | Literal["recurrent"] | None = None,
    method: Literal["split", "exponential"] = "split",
    boundary: Literal["circular", "zeros", "walls"] | None = None,
    anneal: bool = True,
    replace: bool = False,
) -> _Model:
    """Make the convolutions of a trained model orthogonal, starting from their pretrained weights.

        model = retrofit(model, example_inputs, blocks="recurrent")

    is all that a recurrent network needs: the blocks of its weights that map the state to the state are
    found, and become orthogonal on images of every size, circular or between walls.

    The model computes the same as before at first. While it is trained, ``set_orthogonality(model, t)``
    moves it from the pretrained operators ``W``, ``t = 0``, to orthogonal ones, ``t = 1``. At each ``t``
    the operator is

        (1 - t) W + t Q,

    where ``Q`` is orthogonal and starts near ``W``. ``Q`` is trained, and ``W`` is not: near ``t = 0``
    mostly the rest of the model learns. With ``anneal=False`` the model starts at ``Q``. That destroys much
    of what it has learned.

    Args:
        model: any module. Its convolutions' paddings should keep the size.
        example_inputs: what the model is called with: a tensor, a tuple or list of arguments, or a dict of
            keyword arguments. (If its forward cannot take them separately, a tuple or list is one
            argument.) The model is called in evaluation mode, without gradients. Its mode, the states that
            it stores and the random generators are then restored.
        select: which convolutions: names as in ``model.named_modules()``, with ``*`` and ``?``, or a
            function of ``(name, module)``. Default: those that ``blocks`` name, or all.
        blocks: the blocks of weights that are to be orthogonal; the rest of a weight stays free.
            ``"recurrent"``: those that `recurrent_blocks` finds, except in convolutions that are orthogonal
            already, unless ``select`` names them. Or a dict from names, with ``*`` and ``?``, to lists of
            pairs of slices ``(out, in)`` of the weight's first two axes, all of one size.
            `functional.gate_blocks` gives those of a cell. Blocks of channels without state are allowed,
            with a warning if that is seen. Default: whole weights.
        method: ``"split"``: one ``k x k`` convolution at every ``t``, its edges corrected between walls.
            Or ``"exponential"``: more freedom; between walls 7 or more convolutions, otherwise only images
            of the example's size. See `orthogonal`. With one channel per group it is always used.
        boundary: ``"circular"``, ``"zeros"`` or ``"walls"``. Default: circular convolutions stay circular,
            zero-padded ones get walls. That changes nothing at ``t = 0``, whereas turning zero padding
            circular, or circular padding into walls or zeros, does. With ``"zeros"`` they never become
            orthogonal: see `orthogonal`.
        anneal: True to start from the pretrained operators themselves, False from ``Q``.
        replace: True to remove ``spectral_norm`` and ``weight_norm``, old or new, from selected weights,
            fixed at their values in evaluation mode.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: if something is selected that is no convolution, or that `orthogonal` does
            not accept; if the example does not reach a convolution; if a padding mode is ``"reflect"`` or
            ``"replicate"`` and no boundary is given; if a weight is shared with another module of
            ``model``, used outside of its convolution's call, or computed by a norm without ``replace``; if
            ``blocks`` are not as above, or none are found. The message names each of these convolutions,
            and the model is as before. (Sharing is seen only within ``model``: pass the whole model, and
            ``select``.)

    Warns:
        UserWarning: if a normalisation directly follows a convolution with blocks: it rescales the state
            that they should keep. And for blocks that `recurrent_blocks` leaves alone.

    **When it pays.** Where something is to be kept over many steps, and most in new models: call it before
    training, with ``anneal=False``. A trained model that is fine-tuned on its old task gains little or
    nothing. See ``examples/README.md`` for what was measured.

    **Polar annealing.** ``method="exponential"`` with a circular boundary or zeros accepts images of one
    size only, and follows another path. If the pretrained operator is ``U S V^H`` at each frequency, the
    operator at ``t`` is

        U exp(A) S^(1-t) V^H,

    with ``A`` the generator's skew part, in the basis ``V``. Singular values of 0 are replaced by ``eps``
    times the largest, and rise only near ``t = 1``. Strided 1x1 convolutions have such values, since they
    skip samples, and follow this path with either method: better leave them out.

    **Kernels are computed once** for each call of ``model``, by hooks on it. A loop that calls a part of it
    itself, as a cell for each step, pays for them at each step, unless the loop is within
    ``torch.nn.utils.parametrize.cached()``; or call ``retrofit`` on a module whose forward is that loop.
    Kernels are computed again under ``torch.utils.checkpoint``, and after a backward pass or a change of
    the parameters within the call.

    **Optimizers.** Make a new one. An old one raises ``RuntimeError`` at its next step where new parameters
    replace a weight. (Whole weights stay the same parameter; split kernels reshape it.) `generators`
    returns those that may want a learning rate of their own.

    **Checkpoints.** A checkpoint of the retrofitted model holds ``t``, method, boundary and blocks, and
    loads into a model that was retrofitted in the same way. Checkpoints of the plain model, with or without
    norms, load too: the model restarts from these weights at ``t = 0``, or near them once annealing has
    ended. Assigning a weight while ``t < 1`` sets ``t = 0``. (With the exponential between walls, assigning
    sets the blocks' generator and leaves ``t``.) `geotorch.utils.update_base` keeps what the model
    computes. A whole model is saved by ``torch.save`` only after ``remove_parametrizations`` of all its
    convolutions.

    Cost: `recurrent_blocks`, if asked for; one call of the model; and for each split kernel a descent to
    one near the weight, a quarter of a second for 64 channels and 3x3 taps. A split model trains as fast as
    the plain one, but for its edges between walls: 1.1 to 1.5 times the time, with 5x5 taps or 16
    channels on 16x16 images up to 2.1 times. Until annealing ends the pretrained blocks are stored. After
    it a split 3x3 kernel stores 0.72 times as many numbers as the plain one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import orthogonality_defect, retrofit, set_orthogonality
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        >>> x = torch.randn(1, 4, 16, 16)
        >>> before = model(x)
        >>> model = retrofit(model, x)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> for t in (0.25, 0.5, 0.75, 1):
        ...     set_orthogonality(model, t)  # and train on
        >>> all(orthogonality_defect(model[0], n) < 1e-5 for n in (1, 9, (4, 12)))
        True
    """
    check_model(model)
    _check_options(method, boundary, anneal, replace)
    chosen, stacked = _chosen(model, example_inputs, select, blocks)
    with Uses(chosen.values()) as uses:
        seen = sizes(model, example_inputs)
    undo: list[Callable[[], None]] = []
    try:
        with torch.inference_mode(False):  # what is made here is to be trained
            plans, problems = [], []
            way = Way(method, boundary, anneal)
            for name, module in chosen.items():
                try:
                    _check_norm(module, replace, undo)
                    _check_shared(model, module)
                    if module in uses.found:
                        use = uses.found[module]
                        raise ValueError(
                            f"its weight should only be used by its own call. Found another use, in {use}"
                        )
                    plans.append(way.plan(name, module, seen.get(module, []), stacked.get(name)))
                except (TypeError, ValueError) as error:
                    problems.append((name, error))
            if problems:
                kind = TypeError if all(isinstance(e, TypeError) for _, e in problems) else ValueError
                said = "\n".join(f"  {name or 'the model itself'}: {error}" for name, error in problems)
                raise kind(
                    f"not all convolutions that are selected can be made orthogonal as asked:\n{said}"
                )
            weights = [plan.module.weight for plan in plans]
            for plan in plans:
                undo.append(plan.install())
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for name, module, weight in zip(chosen, chosen.values(), weights, strict=True):
        parameters = list(module.parametrizations.weight.parameters(recurse=False))
        if all(weight is not parameter for parameter in parameters):
            note(Replaced(f"{name}.weight".lstrip("."), weight, parameters))
    keeping.KeptForCalls.install(model)
    normalised = {name: uses.normalised[m] for name, m in chosen.items() if m in uses.normalised}
    normalised = {name: norm for name, norm in normalised.items() if name in stacked}
    if normalised:
        listed = ", ".join(f"{name or 'the model'} ({norm})" for name, norm in normalised.items())
        warnings.warn(
            f"a normalisation directly follows these convolutions, and rescales their state: {listed}",
            stacklevel=2,
        )
    return model


def set_orthogonality(model: nn.Module, t: float, *, final: bool = False) -> None:
    """Move all convolutions that `retrofit` anneals between pretrained (0) and orthogonal (1).

    Their operators become ``(1 - t) W + t Q``, or ``U exp(A) S^(1-t) V^H``: see `retrofit`. Generators, and
    an optimizer's parameters, stay the same.

    Args:
        model: a retrofitted model.
        t: from 0 to 1.
        final: True to end annealing, with ``t = 1``. The buffers that only served it are dropped, and the
            convolutions stay orthogonal from then on.

    Raises:
        TypeError, ValueError: if ``t`` is not from 0 to 1, or is not 1 with ``final``; if no
            convolution of the model is being annealed (where one is orthogonal, ``t = 1`` does nothing).

    For an averaged copy (`torch.optim.swa_utils.AveragedModel`), annealing has to be ended by a call of its
    own. Otherwise the copy's next update finds buffers that are not there.
    """
    several = isinstance(t, torch.Tensor) and t.numel() != 1
    if several or isinstance(t, (bool, str)) or not hasattr(t, "__float__"):
        raise TypeError(f"t should be a number. Found {t!r}")
    t = float(t)
    if not 0 <= t <= 1:
        raise ValueError(f"t should be from 0 to 1. Found {t!r}")
    if final and t != 1:
        raise ValueError(f"t should be 1 with final=True. Found {t!r}")
    orthogonal = [m for m in model.modules() if isinstance(m, Registered)]
    annealed = [m for m in orthogonal if isinstance(m, Annealing) and m.t is not None]
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
            keeping.forget(module)


def _check_options(method: Any, boundary: Any, anneal: Any, replace: Any) -> None:
    if method not in ("exponential", "split"):
        raise ValueError(f'method should be "exponential" or "split". Found {method!r}')
    if boundary is not None:
        boundary_named(boundary)
    if not isinstance(anneal, bool):
        raise TypeError(f"anneal should be True or False. Found {anneal!r}")
    if not isinstance(replace, bool):
        raise TypeError(f"replace should be True or False. Found {replace!r}")


def _chosen(
    model: nn.Module, example_inputs: Any, select: Select | None, blocks: Any
) -> tuple[dict[str, Any], dict[str, list[Block]]]:
    """Return the convolutions that are to be orthogonal, and the blocks of some of them.

    Raises:
        TypeError, ValueError: if there are none, or the arguments are not as `retrofit` says.
    """
    everything = selected(model, None)
    chosen = everything if select is None else selected(model, select)
    if blocks is None:
        return chosen, {}
    if isinstance(blocks, str):
        if blocks != "recurrent":
            raise ValueError(f'blocks should be "recurrent" or a dict. Found {blocks!r}')
        found = recurrent_blocks(model, example_inputs)
        stacked = {
            name: pairs
            for name, pairs in found.items()
            if name in chosen and not (select is None and _is_orthogonal(chosen[name]))
        }
        already = [name for name in found if name in chosen and name not in stacked]
        if not stacked and already:
            raise ValueError(
                'blocks="recurrent" should find convolutions that are not orthogonal yet. Found only '
                f"{already}, which are: go on with the model, or call "
                'torch.nn.utils.parametrize.remove_parametrizations(module, "weight") for each before'
            )
        if not stacked:
            raise ValueError(
                'blocks="recurrent" should find convolutions that read their own earlier output, through '
                f"gates and sums. Found none among {[*chosen]}: name the blocks instead, if the channels "
                "of each gate follow one another"
            )
        named = [select] if isinstance(select, str) else select
        vain = [] if callable(named) else [name for name in named or () if name in {*chosen} - {*stacked}]
        if vain:
            raise ValueError(
                'with blocks="recurrent" select should name convolutions with recurrent blocks. Found none '
                f"in {vain}: call retrofit once more for these, without blocks"
            )
    else:
        stacked = by_name(model, blocks, everything)
        left_out = [name for name in stacked if name not in chosen]
        if left_out:
            raise ValueError(
                f"select should name the convolutions of blocks too, or be None, which means these. It "
                f"leaves out {left_out}"
            )
        problems = {name: _flaw(everything[name], pairs) for name, pairs in stacked.items()}
        if not any(problems.values()):  # what is wrong with them is said with all else that is
            check_states(model, example_inputs, stacked)
        if select is not None:
            return chosen, stacked
    return {name: module for name, module in chosen.items() if name in stacked}, stacked


def _is_orthogonal(module: nn.Module) -> bool:
    return any(isinstance(part, Registered) for part in module.modules())


def _flaw(module: Any, blocks: list[Block]) -> Exception | None:
    """Return what is wrong with blocks."""
    try:
        Partition(blocks, tuple(module.weight.shape), module.groups)
    except (TypeError, ValueError) as error:
        return error
    return None


def _check_norm(module: Any, replace: bool, undo: list[Callable[[], None]]) -> None:
    """Replace a normalised weight by its value, or raise.

    Raises:
        ValueError: if it is not to be replaced.
    """
    norm = norm_of(module)
    if norm is None:
        return
    if not replace:
        raise ValueError(
            f"its weight should not be computed by {norm}: replace=True takes the value that it has, and "
            f"removes {norm}. Found it"
        )
    undo.append(replace_by_value(module))


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
        raise ValueError(f"its weight should not be shared. Found it as {', '.join(others)} too")
