"""`report`: a table of how each convolution of a model changes the norm of its input."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import nan, prod
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..checks import Size
from ..convert import convolves, geometry_of
from ..models import Uses, by_name, convolutions_of, generators, sizes
from ..module import operator_of
from ..parametrizations.annealed import Annealing
from ..parametrizations.blocks import Blocks
from ..parametrizations.partition import Block, resolve_blocks
from ..parametrizations.registered import Registered
from ..parametrizations.split import SplitExponential
from ..torus.boundary import boundary_of
from ..torus.geometry import torch_class
from .forward import MEASURED, WALLED, Forward
from .measured import kept, measure

_STEPS = (1, 10, 100)  # after which what is left of a state is measured
_LOSES = 0.99  # mean gain below which it is

_Parametrized: TypeAlias = Literal["yes", "no", "blocks"]


@dataclass(frozen=True)
class Row:
    """One convolution of a `Report`, or one block of its weight, on images of one size.

    The numbers are those of the module's own operator on these images: of what its forward computes. For a
    block, of the part of it that joins the block's channels.

    Args:
        name: as in ``model.named_modules()``; for a block, with its slices.
        geometry: in words.
        domain: size of the images that the convolution is fed (transposed: of its outputs); None if the
            example does not reach it.
        smallest: the smallest of its ``min(rows, columns)`` singular values; nan if the domain is None.
        largest: the largest one; nan likewise.
        defect: ``max |singular value - 1|``; nan likewise.
        gain: the square root of their mean square, 1 for every semi-orthogonal operator; nan likewise.
        estimated: True if these are estimates. Then ``smallest`` is at least the true one, ``largest`` and
            ``defect`` at most.
        parametrized: ``"yes"``, ``"no"``, or ``"blocks"`` if only blocks of the weight are orthogonal.
        t: how far annealing is, 1 for orthogonal; None if it is not parametrized.
        parameters: how many numbers the convolution trains, its bias included; for a block, how many its
            generator has, or if it has none how many taps.
        share: ``parameters`` as a share of the model's.
        left: what 1, 10 and 100 steps of the operator leave of the norm of a random state, as a share of
            what an orthogonal operator leaves. Only if it was made orthogonal with ``boundary="zeros"`` and
            ``gain`` is below 0.99; else empty. One number if images are not mapped to images of the same
            size and channels.
        method: ``"exponential"`` or ``"split"``; None if it is not parametrized.
        normalised: the normalisation that directly follows the convolution, as ``"group_norm"``, if it is
            parametrized: that rescales what the operator keeps. Else None.
    """

    name: str
    geometry: str
    domain: Size | None
    smallest: float
    largest: float
    defect: float
    gain: float
    estimated: bool
    parametrized: _Parametrized
    t: float | None
    parameters: int
    share: float
    left: tuple[float, ...] = ()
    method: str | None = None
    normalised: str | None = None


@dataclass(frozen=True)
class Report:
    """The result of `report`: ``rows``, which ``str`` formats as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        titles = (
            *("name", "convolution", "domain", "smallest", "largest", "defect", "mean gain"),
            *("parametrized", "method", "t", "parameters"),
        )
        table = [titles, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        if any(row.estimated for row in self.rows):
            lines.append(
                "~: estimated from the module's own forward. The true smallest value is at most this one,\n"
                "the true largest value and the true defect are at least these."
            )
        lines += [_loss(row) for row in self.rows if row.left]
        lines += [
            f"{row.name or '(model)'} is directly followed by {row.normalised}, "
            "which rescales what it keeps."
            for row in self.rows
            if row.normalised
        ]
        return "\n".join(lines)


def report(
    model: nn.Module, example_inputs: Any, *, blocks: Mapping[str, Iterable[Block]] | None = None
) -> Report:
    """Measure the singular values of each convolution of a model, on the images that it is fed.

    The model is run once, as `retrofit` runs it.

    Each row measures what the module's forward computes on the images that it is fed, the bias aside,
    whatever its boundary. `orthogonality_defect` gives the same defect, and the exact one where a row is an
    estimate.

    Args:
        model: any module.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        blocks: a dict, as of `retrofit`: blocks that get rows of their own, besides those that are
            parametrized.

    Returns:
        A `Report`. Its ``rows`` are numbers, and its ``str`` is a table: for each convolution its geometry,
        domain, smallest and largest singular value, defect, mean gain (the root of the mean square of the
        singular values), ``yes``, ``no`` or ``blocks`` for parametrized, method, ``t``, and number of
        parameters. A convolution that sees several sizes has a row for each. Values are nan ("?") where the example does
        not reach it.

        Operators whose dense matrix has up to ``2^20`` entries are decomposed, larger periodic ones at each
        frequency. For other large ones the numbers are estimates, marked ``~``, from the forward and its
        adjoint by a Lanczos iteration of up to 600 steps. The true defect is at least as large. Where the
        iteration has converged, they are accurate to a few per cent.

        Below the table is a line for each convolution or block that this package made orthogonal with
        ``boundary="zeros"``, and whose mean gain is below 0.99: how much of the norm of a random state it
        leaves. And one for each that a normalisation directly follows.

    Raises:
        TypeError, ValueError: if ``blocks`` are not as above, or a weight is not finite.

    Cost: one call of the model. For each row one singular value decomposition of the dense matrix (about a
    second at ``2^20`` entries), or one for each frequency, or up to 600 calls of the convolution on one
    image, and of its adjoint.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import report, retrofit
        >>> model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, bias=False), nn.Conv1d(2, 1, 1))
        >>> _ = nn.init.dirac_(model[0].weight), nn.init.constant_(model[1].weight, 0.5)
        >>> x = torch.randn(1, 2, 8)
        >>> print(report(retrofit(model, x, select="1"), x))
        name  convolution                   domain  smallest  largest   defect  mean gain  parametrized  method  t  parameters
        ----------------------------------------------------------------------------------------------------------------------
        0     Conv1d 2 -> 2, 3 taps, zeros  8              1        1  0.0e+00          1            no       -  -  12 (80.0%)
        1     Conv1d 2 -> 1, 1 tap          8         0.7071   0.7071  2.9e-01     0.7071           yes   split  0   3 (20.0%)
    """  # noqa: E501
    names = convolutions_of(model, MEASURED)
    asked = {}
    if blocks is not None:
        asked = {names[name]: pairs for name, pairs in by_name(model, blocks, names).items()}
    with Uses(names.values()) as uses:
        seen = sizes(model, example_inputs, MEASURED)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows: list[Row] = []
    for name, module in model.named_modules():  # each once, by its first name
        if name not in names:
            continue
        if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
            raise ValueError(f"the parameters of {name or 'the model'} should be finite. Found nan or inf")
        with torch.no_grad(), parametrize.cached():  # a parametrized weight is computed once
            for size in seen.get(module, [None]):
                found = _rows(name, module, size, asked.get(module, []), total)
                if found[0].method is not None:
                    found[0] = replace(found[0], normalised=uses.normalised.get(module))
                rows += found
    return Report(tuple(rows))


def _rows(name: str, module: Any, size: Size | None, asked: list[Block], total: int) -> list[Row]:
    parts = list(module.modules())
    made = next((part for part in parts if isinstance(part, Registered)), None)
    stack = next((part for part in parts if isinstance(part, Blocks)), None)
    t = made.progress if isinstance(made, Annealing) else 1.0
    constrained = stack.partition.blocks if stack is not None else []

    def row(title: str, geometry: str, block: Block | None, how: _Parametrized, parameters: int) -> Row:
        share = parameters / max(total, 1)
        now, method = (None, None) if how == "no" else (t, _method(made))
        if size is None:
            numbers = (nan,) * 4
            return Row(title, geometry, size, *numbers, False, how, now, parameters, share, (), method)
        found = measure(module, size, block)
        left: tuple[float, ...] = ()
        if how == "yes" and now == 1 and found.gain < _LOSES and _is_between_zeros(module):
            left = kept(Forward(module, size, block), _STEPS)
        measured = found.smallest, found.largest, found.defect, found.gain, found.estimated
        return Row(title, geometry, size, *measured, how, now, parameters, share, left, method)

    whole: _Parametrized = "no" if made is None else "yes" if stack is None else "blocks"
    count = sum(parameter.numel() for parameter in module.parameters())
    rows = [row(name, _geometry(module), None, whole, count)]
    for block in constrained + [b for b in _resolved(asked, module) if b not in constrained]:
        r, c = block
        sides = r.stop - r.start, c.stop - c.start
        numbers = prod(sides) * prod(_free_taps(module))
        if stack is not None and block in constrained:
            numbers = generators(module)[0].numel() // len(constrained)
        title = f"{name}[{r.start}:{r.stop}, {c.start}:{c.stop}]"
        how: _Parametrized = "yes" if block in constrained else "no"
        rows.append(row(title, f"block {sides[0]} x {sides[1]}", block, how, numbers))
    return rows


def _method(made: Registered | None) -> str:
    return "split" if isinstance(made, SplitExponential) else "exponential"


def _resolved(blocks: list[Block], module: Any) -> list[Block]:
    return resolve_blocks(blocks, module.weight.shape, module.groups) if blocks else []


def _geometry(module: Any) -> str:
    convolution = torch_class(module) or type(module)
    sides = _free_taps(module)
    single = max(sides) == 1
    taps = "x".join(map(str, sides))
    if len(sides) == 1:
        taps += " tap" if single else " taps"
    details = [
        taps,
        *(
            f"{key} {max(value) if len(set(value)) == 1 else value}"
            for key, value in (("stride", module.stride), ("dilation", _dilation(module)))
            if max(value) > 1
        ),
        *([f"groups {module.groups}"] if module.groups > 1 else []),
        *([] if single else [_boundary(module)]),
    ]
    return f"{convolution.__name__} {module.in_channels} -> {module.out_channels}, {', '.join(details)}"


def _boundary(module: Any) -> str:
    if isinstance(module, WALLED):
        return "walls"
    operator = operator_of(module)
    return str(module.padding_mode) if operator is None else operator.boundary.name


def _is_between_zeros(module: Any) -> bool:
    """Return True if a parametrized module continues images by zeros, and keeps their size."""
    operator = operator_of(module)
    if operator is not None:
        boundary = operator.boundary
        return not boundary.is_periodic and not boundary.has_walls
    try:
        geometry_of(module)
    except ValueError:
        return False
    edges = boundary_of(module)
    return convolves(module) and edges is not None and not edges.is_periodic


def _free_taps(module: Any) -> Size:
    """Return the size of the taps that are trained."""
    operator = operator_of(module)
    return tuple(module.kernel_size) if operator is None else operator.geometry.taps


def _dilation(module: Any) -> Size:
    operator = operator_of(module)
    return tuple(module.dilation) if operator is None else operator.geometry.dilation


def _by(size: Size) -> str:
    return "x".join(map(str, size))


def _cells(row: Row) -> tuple[str, ...]:
    def number(x: float, form: str) -> str:
        if x != x:
            return "?"
        return f"~{x:{form if 'e' in form else '.3g'}}" if row.estimated else f"{x:{form}}"

    return (
        row.name or "(model)",
        row.geometry,
        "not reached" if row.domain is None else _by(row.domain),
        number(row.smallest, ".4g"),
        number(row.largest, ".4g"),
        number(row.defect, ".1e"),
        number(row.gain, ".4g"),
        row.parametrized,
        row.method or "-",
        "-" if row.t is None else f"{row.t:.3g}",
        f"{row.parameters} ({row.share:.1%})",
    )


def _loss(row: Row) -> str:
    """Say what a convolution with ``boundary="zeros"`` leaves of a random state."""
    assert row.domain is not None
    first, *later = (f"{x:.2g}" for x in row.left)
    if later:
        much = f"{first}, {later[0]} and {later[1]} of the norm of a random state after 1, 10 and 100 steps"
    else:
        much = f"{first} of what an orthogonal operator leaves of the norm of a random state"
    name = row.name or "(model)"
    return f'{name} leaves {much} at {_by(row.domain)}; boundary="walls" loses nothing.'
