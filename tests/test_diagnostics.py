import copy

import pytest
import torch
from models import ConvLSTM, Residual
from oracles import defect, dense, operator, random
from torch import nn
from torch.nn.utils import parametrize

from orthoconv_param import (
    orthogonal,
    orthogonality_defect,
    report,
    retrofit,
    set_orthogonality,
    singular_values,
)
from orthoconv_param.functional import gate_blocks
from orthoconv_param.walled import WalledConvolution

CASES = [
    ((3, 2, 3), (8,), (1,), 1),
    ((4, 2, 3, 4), (5, 6), (1, 2), 2),
    ((2, 2, 9, 3), (4, 4), (2, 2), 1),
    ((2, 1, 2, 2, 2), (2, 3, 4), (1, 1, 1), 2),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("size", "domain", "stride", "groups"), CASES)
def test_singular_values_are_those_of_the_dense_matrix(size, domain, stride, groups, dtype):
    kernel = random(*size, dtype=dtype)
    matrix = dense(kernel, domain, stride, groups)
    values = singular_values(kernel, domain, stride=stride, groups=groups).flatten()
    exact = torch.linalg.svdvals(matrix)
    assert all((exact - v).abs().min() < 1e-12 for v in values)
    assert all((values - v).abs().min() < 1e-12 for v in exact)
    measured = orthogonality_defect(kernel, domain, stride=stride, groups=groups)
    assert measured == pytest.approx(defect(matrix), abs=1e-12)


def test_the_measure_adds_no_rounding_of_its_own():
    kernel = random(2, 2, 3).float()
    assert singular_values(kernel, 8).dtype == torch.float64
    assert orthogonality_defect(kernel, 8) == orthogonality_defect(kernel.double(), 8)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


MODULES = [  # module, domain, whether its operator is periodic and keeps the size
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (6, 5), True),
    (nn.Conv2d(4, 4, 4, padding="same", padding_mode="circular", dilation=(1, 2), groups=2), (8, 9), True),
    (nn.Conv1d(2, 6, 3, padding=1, padding_mode="circular", stride=2), (10,), True),
    (nn.Conv1d(2, 6, 3, padding=1, padding_mode="circular", stride=2), (9,), False),
    (nn.Conv2d(3, 4, 1, stride=2), (6, 4), True),
    (nn.Conv2d(3, 4, 3, padding=1), (6, 5), False),
    (nn.Conv2d(3, 4, 3), (6, 5), False),
    (nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"), (6,), False),
    (nn.ConvTranspose2d(4, 3, 3, padding=1, stride=2, output_padding=1), (6, 4), False),
    (nn.ConvTranspose1d(4, 3, 1), (5,), True),
    (Doubled(2, 2, 3, padding=1, padding_mode="circular"), (5, 5), False),
    (orthogonal(nn.Conv2d(3, 4, 3, padding=1)), (6, 5), True),
    (orthogonal(nn.Conv2d(3, 4, 3, padding=2, dilation=2)), (12, 7), True),
    (orthogonal(nn.Conv2d(3, 4, 3, padding=1), domain=(6, 5)), (6, 5), True),
    (orthogonal(nn.ConvTranspose1d(4, 3, 3, padding=1, stride=2, output_padding=1)), (12,), True),
    (orthogonal(nn.Conv2d(3, 4, 3, padding=1), boundary="zeros"), (6, 5), False),
]


@pytest.mark.parametrize(("module", "domain", "is_periodic"), MODULES)
def test_of_a_module_they_are_those_of_what_it_does(module, domain, is_periodic):
    module = copy.deepcopy(module).double()
    values = singular_values(module, domain)
    assert (values.ndim == 3) == is_periodic
    exact = torch.linalg.svdvals(operator(module, domain))
    # each exact one is among the values: of a real kernel, these leave out what conjugates repeat
    distances = (exact[:, None] - values.flatten()).abs()
    assert distances.amin(1).max() < 1e-12
    assert distances.amin(0).max() < 1e-12
    assert orthogonality_defect(module, domain) == pytest.approx(
        defect(operator(module, domain)), abs=1e-12
    )


def test_dilation_of_a_kernel():
    kernel = random(2, 2, 3)
    exact = torch.linalg.svdvals(dense(kernel, (8,), None, 1, (3,)))
    values = singular_values(kernel, 8, dilation=3).flatten()
    assert (exact[:, None] - values).abs().amin(1).max() < 1e-12


@pytest.mark.parametrize(
    ("error", "convolution", "domain", "options", "message"),
    [
        (TypeError, torch.ones(2, 2, 3, dtype=torch.int64), 8, {}, "convolution should be a tensor"),
        (TypeError, torch.ones(2, 2, 3), None, {}, "domain should be an integer"),
        (ValueError, torch.ones(2, 2, 3), 9, {"stride": 2}, "divisible by the stride"),
        (TypeError, torch.ones(2, 2, 3), 9, {"groups": (2,)}, "groups should be an integer"),
        (ValueError, torch.ones(2, 2, 3), 9, {"groups": 0}, "groups should be a positive integer"),
        (ValueError, torch.ones(2, 2, 3), 9, {"dilation": 0}, "dilation should be a positive integer"),
        (ValueError, torch.ones(2, 2), 9, {}, "a convolution's kernel"),
        (ValueError, torch.full((2, 2, 3), torch.nan), 9, {}, "should be finite"),
        (TypeError, nn.Linear(2, 2), 9, {}, "convolution should be a kernel, an nn.Conv"),
        (TypeError, nn.Conv1d(2, 2, 3), None, {}, "domain should be an integer"),
        (ValueError, nn.Conv1d(2, 2, 3), (9, 9), {}, "one for each"),
        (ValueError, nn.Conv1d(2, 2, 3), 9, {"stride": 2}, "has its own"),
        (ValueError, nn.ConvTranspose1d(2, 2, 3, stride=2), 9, {}, "divisible by the stride"),
        (ValueError, nn.Conv2d(64, 64, 3, padding=1), 64, {}, "domain should be smaller"),
        (ValueError, orthogonal(nn.Conv1d(2, 2, 3, padding=1), domain=8), 9, {}, "of the domain's size"),
    ],
)
def test_bad_input_is_named(error, convolution, domain, options, message):
    for function in (singular_values, orthogonality_defect):
        with pytest.raises(error, match=message):
            function(convolution, domain, **options)


# Tables


def extremes(values):
    return values.min().item(), values.max().item()


def test_a_row_says_what_the_operator_does():
    model, x = Residual("circular").double(), random(2, 3, 8, 8)
    rows = {row.name: row for row in report(model, x).rows}
    assert list(rows) == ["stem", "first", "down", "shortcut", "last"]
    for name, row in rows.items():
        module = getattr(model, name)
        size = (4, 4) if name == "last" else (8, 8)
        values = torch.linalg.svdvals(operator(module, size))
        assert row.domain == size
        assert (row.smallest, row.largest) == pytest.approx(extremes(values), abs=1e-12)
        assert row.defect == pytest.approx(defect(operator(module, size)))
        assert row.gain == pytest.approx(values.square().mean().sqrt().item())
        assert not row.estimated
        assert (row.parametrized, row.t) == ("no", None)
        assert row.parameters == sum(p.numel() for p in module.parameters())
    assert sum(row.share for row in rows.values()) == pytest.approx(
        1 - 8 / sum(p.numel() for p in model.parameters())
    )


@pytest.mark.parametrize("domain", ["any", 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [nn.Conv1d, orthogonal])
def test_between_zeros_a_row_is_of_the_modules_own_operator(make, stride, domain):
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 3, 5, stride, padding=2, dtype=torch.float64)
    if make is orthogonal:
        orthogonal(conv, domain=domain, boundary="zeros")
    (row,) = report(conv, random(1, 2, 8)).rows
    values = torch.linalg.svdvals(operator(conv, (8,)))
    assert (row.smallest, row.largest) == pytest.approx(extremes(values), abs=1e-12)
    assert row.defect == orthogonality_defect(conv, 8)
    if make is orthogonal:
        assert row.largest < 1 + 1e-11
        assert (row.parametrized, row.t) == ("yes", 1)


def powers(M, steps, images):
    """What some steps leave of the norm of random images."""
    x = random(images, M.shape[1])
    return [(torch.linalg.matrix_power(M, n) @ x.mT).norm().item() / x.norm().item() for n in steps]


def test_a_line_says_what_a_convolution_between_zeros_loses():
    torch.manual_seed(0)
    conv = orthogonal(nn.Conv2d(4, 4, 3, padding=1).double(), domain=6, boundary="zeros")
    result = report(nn.Sequential(conv), random(1, 4, 6, 6))
    (row,) = result.rows
    assert row.gain < 0.99
    assert row.left == pytest.approx(powers(operator(conv, (6, 6)), (1, 10, 100), 500), rel=0.1)
    shares = "{:.2g}, {:.2g} and {:.2g}".format(*row.left)
    assert str(result).splitlines()[-1] == (
        f"0 leaves {shares} of the norm of a random state after 1, 10 and 100 steps at 6x6; "
        'boundary="walls" loses nothing.'
    )


@pytest.mark.parametrize(("channels", "stride"), [((4, 2), 1), ((2, 4), 1), ((2, 4), 2)])
def test_of_what_gives_other_images_the_line_says_what_one_step_leaves(channels, stride):
    torch.manual_seed(0)
    conv = orthogonal(nn.Conv1d(*channels, 3, stride, padding=1), domain=6, boundary="zeros")
    result = report(conv, torch.ones(1, channels[0], 6))
    (row,) = result.rows
    assert row.left == pytest.approx([row.gain], abs=0.1)
    line = f"(model) leaves {row.left[0]:.2g} of what an orthogonal operator leaves of the norm of "
    assert line in str(result).splitlines()[-1]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 3, 3, padding=1),
        orthogonal(nn.Conv2d(3, 3, 3, padding=1)),
        orthogonal(nn.Conv2d(3, 3, 3, padding=1), method="split", boundary="walls"),
        orthogonal(nn.Conv2d(3, 3, 1), boundary="zeros"),
    ],
)
def test_where_nothing_is_lost_or_promised_there_is_no_such_line(module):
    text = str(report(module, torch.ones(1, 3, 5, 5)))
    assert len(text.splitlines()) == 3


def test_lines_of_blocks_between_zeros():
    model, x = ConvLSTM("zeros"), random(2, 3, 2, 6, 5).float()
    retrofit(model, x, select="gates", blocks={"gates": gate_blocks(4, 4, 2)}, boundary="zeros")
    assert not any(row.left for row in report(model, x).rows)  # not orthogonal yet
    set_orthogonality(model, 1)
    rows = report(model, x).rows
    assert [len(row.left) for row in rows] == [0, 3, 3, 3, 3, 0]
    M = operator(model.gates, (6, 5)).reshape(16, 30, 6, 30)
    for i, row in enumerate(rows[1:5]):
        values = torch.linalg.svdvals(M[4 * i : 4 * i + 4, :, 2:].reshape(120, 120))
        assert (row.smallest, row.largest) == pytest.approx(extremes(values), abs=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_removal_leaves_between_walls_is_measured(transposed):
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = orthogonal(cls(4, 4, 3, padding=1), method="split", boundary="walls")
    parametrize.remove_parametrizations(conv, "weight")
    assert isinstance(conv, WalledConvolution)
    assert orthogonality_defect(conv, (5, 6)) < 1e-5
    assert singular_values(conv, 4).shape == (64,)
    (row,) = report(nn.Sequential(conv, nn.ReLU()), torch.ones(1, 4, 5, 6)).rows
    assert row.geometry == "WalledConvolution 4 -> 4, 3x3, walls"
    assert row.defect == orthogonality_defect(conv, (5, 6))
    assert row.parametrized == "no"


def test_estimates_are_marked():
    conv = orthogonal(nn.Conv1d(4, 4, 3, padding=1), boundary="zeros")
    text = str(report(conv, torch.ones(1, 4, 300)))
    assert text.count("~") == 5
    assert "~: estimated from the module's own forward. The true smallest value is at most" in text


def test_rows_of_blocks_before_and_after():
    blocks = {"gates": gate_blocks(4, 4, 2)}
    model, x = ConvLSTM("circular").double(), random(2, 3, 2, 6, 5)
    before = report(model, x, blocks=blocks)
    weight = model.gates.weight.detach()
    names = ["gates", *(f"gates[{4 * i}:{4 * i + 4}, 2:6]" for i in range(4)), "draw"]
    assert [row.name for row in before.rows] == names
    for row, block in zip(before.rows[1:5], blocks["gates"], strict=True):
        assert row.defect == pytest.approx(defect(dense(weight[block], (6, 5))))
        assert row.parametrized == "no"
    retrofit(model, x, select="gates", blocks=blocks, method="exponential")
    set_orthogonality(model, 0.25)
    rows = report(model, x).rows
    assert [row.name for row in rows] == names
    assert [(row.parametrized, row.t) for row in rows] == [
        ("blocks", 0.25),
        *[("yes", 0.25)] * 4,
        ("no", None),
    ]
    for old, new in zip(before.rows[1:5], rows[1:5], strict=True):
        assert new.smallest == pytest.approx(old.smallest**0.75)
        assert new.largest == pytest.approx(old.largest**0.75)
    assert [row.parameters for row in rows] == [old.parameters for old in before.rows]
    table = str(report(model, x)).splitlines()
    assert table[0].split() == [
        *(
            "name",
            "convolution",
            "domain",
            "smallest",
            "largest",
            "defect",
            "mean",
            "gain",
            "parametrized",
            "method",
            "t",
            "parameters",
        )
    ]
    assert len(table) == 8
    assert len({len(line) for line in table}) == 1


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.mirrored = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        self.valid = nn.Conv2d(1, 2, 3)
        self.unused = nn.Conv2d(1, 1, 3)
        self.several = nn.Conv2d(2, 1, 1)
        self.large = nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate")

    def forward(self, x):
        x = self.valid(self.mirrored(x))
        return self.several(x), self.several(self.large(x.repeat(1, 1, 5, 5)))


def test_rows_of_what_is_not_periodic():
    model = Odd().double()
    result = report(model, random(1, 1, 8, 7))
    rows, text = result.rows, str(result)
    by_name = {row.name: row for row in rows}
    values = torch.linalg.svdvals(operator(model.mirrored, (8, 7)))
    assert (by_name["mirrored"].smallest, by_name["mirrored"].largest) == pytest.approx(extremes(values))
    valid = torch.linalg.svdvals(operator(model.valid, (8, 7)))
    assert valid.max().item() == pytest.approx(by_name["valid"].largest, abs=1e-12)
    assert by_name["unused"].domain is None
    assert by_name["unused"].defect != by_name["unused"].defect  # nan
    assert [row.domain for row in rows if row.name == "several"] == [(6, 5), (30, 25)]
    assert by_name["large"].estimated
    large = torch.linalg.svdvals(operator(model.large, (30, 25)))
    assert by_name["large"].largest == pytest.approx(large.max().item(), rel=3e-2)
    assert "not reached" in text
    assert "?" in text


def test_bad_blocks_of_a_report():
    model, x = ConvLSTM("zeros"), random(1, 2, 2, 4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="blocks should name convolutions"):
        report(model, x, blocks={"gate": gate_blocks(4, 4, 2)})
    with pytest.raises(ValueError, match="blocks should be within"):
        report(model, x, blocks={"gates": gate_blocks(4, 4, 3)})


def test_a_report_names_what_is_not_finite():
    model = ConvLSTM("zeros")
    with torch.no_grad():
        model.draw.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="parameters of draw should be finite"):
        report(model, random(1, 2, 2, 4, 4, dtype=torch.float32))
