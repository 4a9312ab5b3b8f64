import pytest
import torch
from oracles import defect, dense, random

from orthoconv_param import orthogonality_defect, singular_values

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


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="kernel should be a tensor"):
        singular_values(torch.ones(2, 2, 3, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match="divisible by the stride"):
        orthogonality_defect(torch.ones(2, 2, 3), 9, stride=2)
