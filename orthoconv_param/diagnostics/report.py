"""`report`: a table of how each convolution of a model changes the norm of its input."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan, prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import Size
from ..models import by_name, convolutions_of, sizes
from ..module import operator_of
from ..parametrizations.annealed import Annealed
from ..parametrizations.blocks import Block, Blocks, resolve_blocks
from ..parametrizations.registered import Registered
from ..torus.geometry import torch_class
from ..torus.lattice import Lattice
from .values import of_dense, on_torus_if_any

_LARGEST_REPORTED = 2**20  # entries of a dense matrix, which take about a second

_Parametrized: TypeAlias = Literal["yes", "no", "blocks"]


@dataclass(frozen=True)
class Row:
    """One convolution of a `Report`, or one block of its weight, on images of one size.

    With zero padding ``smallest``, ``largest`` and ``defect`` are those of the operator on ``torus``. The
    module's own operator is a part of it and has others: `singular_values` and `orthogonality_defect` give
    these.

    Args:
        name: as in ``model.named_modules()``; for a block, with its slices.
        geometry: in words.
        domain: size of the images that the convolution is fed (transposed: that it gives); None if the
            example does not reach it.
        torus: the torus of the measured operator: the domain; or with zero padding a larger one, on which
            the image lies between zeros. None if the domain is None.
        smallest: the smallest singular value of that operator; nan if it is not known.
        largest: the largest one; nan if it is not known.
        defect: ``max |singular value - 1|`` of that operator; nan if it is not known.
        parametrized: ``"yes"``, ``"no"``, or ``"blocks"`` if only blocks of the weight are orthogonal.
        t: how far annealing is, 1 for orthogonal; None if it is not parametrized.
        parameters: how many numbers the convolution trains, its bias included; for a block, how many taps
            it has.
        share: ``parameters`` as a share of the model's.
    """

    name: str
    geometry: str
    domain: Size | None
    torus: Size | None
    smallest: float
    largest: float
    defect: float
    parametrized: _Parametrized
    t: float | None
    parameters: int
    share: float


@dataclass(frozen=True)
class Report:
    """The result of `report`: ``rows``, which ``str`` formats as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        titles = (
            *("name", "convolution", "domain", "smallest", "largest", "defect", "parametrized", "t"),
            "parameters",
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
        if any(row.torus != row.domain for row in self.rows):
            lines.append(
                "(a in b: images of size a, continued by zeros to the torus b, on which the values are.\n"
                "What the module does is a part of that operator: no singular value of it is larger.)"
            )
        return "\n".join(lines)


def report(
    model: nn.Module, example_inputs: Any, *, blocks: Mapping[str, Iterable[Block]] | None = None
) -> Report:
    """Measure the singular values of each convolution of a model, on the images that it is fed.

    The model is run once, as `retrofit` runs it.

    **With zero padding** a row shows the operator on a larger torus, on which the image lies between zeros.
    This is not the module's own operator, which is only a part of it. No singular value of the module's own
    operator is larger than the largest one of the row. `singular_values` and `orthogonality_defect` measure
    the module's own operator exactly; they take a dense matrix.

    Args:
        model: any module.
        example_inputs: what it is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        blocks: as of `retrofit`: blocks of a weight that get rows of their own, besides those that are
            parametrized.

    Returns:
        A `Report`. Its ``rows`` are numbers, and its ``str`` is a table: for each convolution its geometry,
        domain, smallest and largest singular value, defect, ``yes``, ``no`` or ``blocks`` for parametrized,
        ``t``, and number of parameters. A convolution that sees several sizes has a row for each.

        An operator that is not periodic for another reason than zeros (mirrored images, a forward of its
        own) is measured by its dense matrix. Values are nan ("?") if that has more than ``2^20`` entries,
        for blocks of such an operator, and where the example does not reach the convolution.

    Raises:
        TypeError, ValueError: if ``blocks`` are not as above, or a weight is not finite.

    Cost: one call of the model, and one singular value decomposition for each frequency.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from orthoconv_param import report, retrofit
        >>> model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 1, 1))
        >>> _ = nn.init.dirac_(model[0].weight), nn.init.constant_(model[1].weight, 0.5)
        >>> x = torch.randn(1, 2, 8)
        >>> print(report(retrofit(model, x, select="1"), x))
        name  convolution                   domain   smallest  largest   defect  parametrized  t  parameters
        ----------------------------------------------------------------------------------------------------
        0     Conv1d 2 -> 2, 3 taps, zeros  8 in 10         1        1  0.0e+00            no  -  14 (82.4%)
        1     Conv1d 2 -> 1, 1 tap          8          0.7071   0.7071  2.9e-01           yes  0   3 (17.6%)
        (a in b: images of size a, continued by zeros to the torus b, on which the values are.
        What the module does is a part of that operator: no singular value of it is larger.)
    """
    names = convolutions_of(model)
    asked = {names[name]: pairs for name, pairs in by_name(blocks or {}, names).items()}
    seen = sizes(model, example_inputs)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows: list[Row] = []
    for name, module in model.named_modules():  # each once, by its first name
        if name not in names:
            continue
        if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
            raise ValueError(f"the parameters of {name or 'the model'} should be finite. Found nan or inf")
        with torch.no_grad(), parametrize.cached():  # a parametrized weight is computed once
            for size in seen.get(module, [None]):
                rows += _rows(name, module, size, asked.get(module, []), total)
    return Report(tuple(rows))


def _rows(name: str, module: Any, size: Size | None, asked: list[Block], total: int) -> list[Row]:
    parts = list(module.modules())
    made = next((part for part in parts if isinstance(part, Registered)), None)
    stack = next((part for part in parts if isinstance(part, Blocks)), None)
    t = made.progress if isinstance(made, Annealed) else 1.0
    constrained = stack.blocks if stack is not None else []

    def row(title: str, geometry: str, block: Block | None, how: _Parametrized, parameters: int) -> Row:
        values, torus = _on_torus(module, size, block)
        extremes = (nan, nan, nan)
        if values is not None:
            extremes = values.min().item(), values.max().item(), (values - 1).abs().max().item()
        share = parameters / max(total, 1)
        now = None if how == "no" else t
        return Row(title, geometry, size, torus, *extremes, how, now, parameters, share)

    whole: _Parametrized = "no" if made is None else "yes" if stack is None else "blocks"
    count = sum(parameter.numel() for parameter in module.parameters())
    rows = [row(name, _geometry(module), None, whole, count)]
    for block in constrained + [b for b in _resolved(asked, module) if b not in constrained]:
        r, c = block
        side = r.stop - r.start
        title = f"{name}[{r.start}:{r.stop}, {c.start}:{c.stop}]"
        how: _Parametrized = "yes" if block in constrained else "no"
        rows.append(row(title, f"block {side} x {side}", block, how, side**2 * prod(_free_taps(module))))
    return rows


def _resolved(blocks: list[Block], module: Any) -> list[Block]:
    return resolve_blocks(blocks, module.weight.shape, module.groups) if blocks else []


def _geometry(module: Any) -> str:
    convolution = torch_class(module)
    assert convolution is not None
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
    operator = operator_of(module)
    return str(module.padding_mode) if operator is None else operator.boundary.name


def _free_taps(module: Any) -> Size:
    """Return the size of the taps that are trained."""
    operator = operator_of(module)
    return tuple(module.kernel_size) if operator is None else operator.geometry.taps


def _dilation(module: Any) -> Size:
    operator = operator_of(module)
    return tuple(module.dilation) if operator is None else operator.geometry.dilation


def _cells(row: Row) -> tuple[str, ...]:
    def size(numbers: Size) -> str:
        return "x".join(map(str, numbers))

    domain = "not reached"
    if row.domain is not None:
        domain = size(row.domain)
        if row.torus is not None and row.torus != row.domain:
            domain += f" in {size(row.torus)}"
    smallest, largest = ("?" if x != x else f"{x:.4g}" for x in (row.smallest, row.largest))
    return (
        row.name or "(model)",
        row.geometry,
        domain,
        smallest,
        largest,
        "?" if row.defect != row.defect else f"{row.defect:.1e}",
        row.parametrized,
        "-" if row.t is None else f"{row.t:.3g}",
        f"{row.parameters} ({row.share:.1%})",
    )


def _on_torus(module: Any, size: Size | None, block: Block | None) -> tuple[Tensor | None, Size | None]:
    """Compute the singular values of a module, or of a block of its weight, and the torus of the operator.

    With zero padding these are not of the module's own operator, but of that on the larger torus.

    Returns:
        The values, None if they are not known; and the torus, None if the size is not known.
    """
    if size is None:
        return None, None
    acting = on_torus_if_any(module, size)
    if acting is not None:
        if block is not None:
            kernel = acting.kernel[block]
            lattice = Lattice(acting.lattice.domain, module.stride, 1, kernel.is_complex())
            acting = acting._replace(kernel=kernel, lattice=lattice)
        return acting.singular_values(), acting.lattice.domain
    entries = module.in_channels * module.out_channels * prod(size) ** 2 // prod(module.stride)
    if block is None and entries <= _LARGEST_REPORTED:
        return of_dense(module, size), size
    return None, size
