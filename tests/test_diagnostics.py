import copy

import pytest
import torch
from oracles import defect, dense, operator, random
from torch import nn

from orthoconv_param import orthogonal, orthogonality_defect, singular_values

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
        (ValueError, torch.ones(2, 2, 3), 9, {"groups": 0}, "groups should be positive"),
        (ValueError, torch.ones(2, 2, 3), 9, {"dilation": 0}, "dilation should be positive"),
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
