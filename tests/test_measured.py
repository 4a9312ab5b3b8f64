"""What is measured of a module is its own operator: its forward's dense matrix has the same values."""

import math
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracles import operator
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import orthogonal, orthogonality_defect, report, singular_values
from orthoconv_param.diagnostics import lanczos, measured
from orthoconv_param.diagnostics.forward import Forward
from orthoconv_param.diagnostics.measured import measure

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

KINDS = {  # options of `orthogonal`; "size" is that of the images
    "plain": None,
    "circular": {},
    "circular, a size": {"domain": "size"},
    "zeros": {"boundary": "zeros"},
    "zeros, a size": {"boundary": "zeros", "domain": "size"},
    "split circular": {"method": "split"},
    "split zeros": {"method": "split", "boundary": "zeros"},
    "split walls": {"method": "split", "boundary": "walls"},
    "walls": {"boundary": "walls"},
}
COMPACT = ("circular", "zeros")  # kernels that hold the exponential on every domain
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Case(NamedTuple):
    module: nn.Module
    domain: tuple[int, ...]
    fed: tuple[int, ...]

    def images(self):
        weight = self.module.weight
        return torch.zeros(1, self.module.in_channels, *self.fed, dtype=weight.dtype)


def made(kind, axes, channels, groups, taps, stride, dilation, transposed, dtype, coarse, seed, removed):
    """A convolution of a kind with random parameters, or None where there is none of that geometry."""
    torch.manual_seed(seed)
    domain = tuple(n * stride for n in coarse)
    span = dilation * (taps - 1)
    sides = {"kernel_size": taps, "stride": stride, "dilation": dilation, "padding": span // 2}
    sides["groups"] = groups
    cls = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
    if transposed:
        sides["output_padding"] = stride - 1 - span % 2
        if sides["output_padding"] < 0:
            return None
    elif span % 2 and stride == 1:
        sides["padding"] = "same"
    module = cls(groups * channels[0], groups * channels[1], dtype=dtype, **sides)
    options = KINDS[kind]
    if axes == 3 and kind in COMPACT and (stride * dilation > 1 or dtype.is_complex):
        return None  # 30^3 taps and more: they take minutes
    if options is not None:
        options = {key: domain if value == "size" else value for key, value in options.items()}
        try:
            orthogonal(module, **options)
        except ValueError:
            return None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += (0.1 if axes == 3 else 0.3) * torch.randn_like(parameter)
    case = Case(module, domain, coarse if transposed else domain)
    try:
        with torch.no_grad():
            module(case.images())
    except RuntimeError:  # torch pads no image by more than its size
        return None
    if removed and parametrize.is_parametrized(module):
        parametrize.remove_parametrizations(module, "weight")
    return case


@st.composite
def cases(draw):
    axes = draw(st.integers(1, 3))
    numbers = {
        "kind": draw(st.sampled_from(sorted(KINDS))),
        "axes": axes,
        "channels": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "groups": draw(st.integers(1, 2)),
        "taps": draw(st.integers(1, 5 if axes < 3 else 3)),
        "stride": draw(st.sampled_from((1, 1, 2))),
        "dilation": draw(st.sampled_from((1, 1, 2))),
        "transposed": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float64, torch.float32, torch.complex128))),
        "coarse": tuple(draw(st.integers(1, (12, 5, 3)[axes - 1])) for _ in range(axes)),
        "seed": draw(st.integers(0, 99)),
        "removed": draw(st.sampled_from((False, False, True))),
    }
    case = made(**numbers)
    hypothesis.assume(case is not None)
    return case


def exact(module, domain):
    M = operator(module, domain)
    return torch.linalg.svdvals(M.to(torch.promote_types(M.dtype, torch.float64)))


def close(found, expected, relative, absolute):
    return math.isclose(found, expected, rel_tol=relative, abs_tol=absolute)


def agree(found, values, relative, absolute):
    """The extremes and the defect are those of these singular values, or estimates from inside."""
    smallest, largest = values.min().item(), values.max().item()
    defect = (values - 1).abs().max().item()
    assert close(found.smallest, smallest, relative, absolute)
    assert close(found.largest, largest, relative, absolute)
    assert close(found.defect, defect, relative, absolute)


def check(case):
    module, domain = case.module, case.domain
    single = module.weight.dtype == torch.float32
    rounding = 5e-6 if single else 1e-11
    values = exact(module, domain)
    (row,) = report(module, case.images()).rows
    agree(row, values, 1e-3, 1e-6)
    assert not row.estimated
    assert row.gain == pytest.approx(values.square().mean().sqrt().item(), abs=1e-5)
    assert close(orthogonality_defect(module, domain), row.defect, 1e-3, 1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_DENSE", 0)  # as if it were large
        found = measure(module, domain)
        defect = orthogonality_defect(module, domain)
    assert close(defect, row.defect, 1e-3, rounding)
    if not found.estimated:  # it is periodic
        agree(found, values, 1e-3, rounding)
        assert found.gain == pytest.approx(row.gain, abs=1e-5)
        return
    agree(found, values, 3e-2, 5e-6)
    assert found.smallest >= row.smallest - rounding
    assert found.largest <= row.largest + rounding
    assert found.defect <= row.defect + rounding


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(cases())
def test_all_measures_are_of_the_modules_own_operator(case):
    with torch.no_grad(), parametrize.cached():  # in three dimensions a kernel takes half a second
        check(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(cases())
def test_all_measures_are_of_the_modules_own_operator_exhaustively(case):
    with torch.no_grad(), parametrize.cached():
        check(case)


LARGE = {
    "zeros, a size": {"domain": 16, "boundary": "zeros"},
    "split zeros": {"method": "split", "boundary": "zeros"},
    "zeros": {"boundary": "zeros"},
    "split walls": {"method": "split", "boundary": "walls"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_estimates_of_large_operators_are_near(kind):
    torch.manual_seed(1)
    module = orthogonal(nn.Conv2d(8, 8, 3, padding=1), **LARGE[kind])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    values = exact(module, (16, 16))
    (row,) = report(module, torch.zeros(1, 8, 16, 16)).rows
    assert row.estimated
    agree(row, values, 3e-2, 5e-6)
    assert row.defect <= (values - 1).abs().max().item() + 2e-6
    assert row.gain == pytest.approx(values.square().mean().sqrt().item(), rel=1e-2)


def test_an_estimate_is_the_same_at_each_call_and_draws_no_random_numbers():
    module = orthogonal(nn.Conv1d(4, 4, 3, padding=1), boundary="zeros")
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_DENSE", 0)
        assert measure(module, (20,)) == measure(module, (20,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.ones(5), torch.tensor([2.0, 2.0, 0.0, 0.0, 1.0])])
def test_few_distinct_singular_values_end_the_iteration_early(values):
    module = nn.Conv1d(5, 5, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.diag(values)[..., None])
    smallest, largest = lanczos.extremes(Forward(module, (9,)))
    assert (smallest, largest) == pytest.approx((values.min().item(), values.max().item()), abs=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_block_is_what_joins_its_channels(limit, boundary, transposed, monkeypatch):
    monkeypatch.setattr(measured, "_DENSE", limit)
    torch.manual_seed(0)
    cls = nn.ConvTranspose1d if transposed else nn.Conv1d
    module = orthogonal(cls(8, 8, 3, padding=1, groups=2, dtype=torch.float64), boundary=boundary)
    block = (slice(4, 6), slice(1, 3))  # of the second group: its channels 0 and 1, and 1 and 2
    M = operator(module, (9,)).reshape(8, 9, 8, 9)
    taken, given = (slice(4, 6), slice(5, 7)) if transposed else (slice(5, 7), slice(4, 6))
    values = torch.linalg.svdvals(M[given, :, taken].reshape(18, 18))
    found = measure(module, (9,), block)
    assert found.estimated == (limit == 0 and boundary == "zeros")
    agree(found, values, 1e-3, 1e-6)


def test_measuring_leaves_no_trace_on_what_removal_leaves():
    module = orthogonal(nn.Conv1d(2, 2, 3, padding=1))
    module(torch.zeros(1, 2, 40))
    seen = module.installed.smallest
    orthogonality_defect(module, 3)
    singular_values(module, 3)
    assert module.installed.smallest == seen
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Conv1d


def test_in_inference_mode_estimates_are_the_same():
    module = orthogonal(nn.Conv1d(4, 4, 3, padding=1), boundary="zeros")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_DENSE", 0)
        with torch.inference_mode():
            found = measure(module, (20,))
        assert found == measure(module, (20,))
