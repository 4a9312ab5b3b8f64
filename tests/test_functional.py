import numpy as np
import pytest
import torch
from geotorch.exceptions import InManifoldError
from oracles import defect, dense, phases_first, random, skew
from scipy.linalg import expm

from orthoconv_param import functional
from orthoconv_param.torus.lattice import Lattice

SQUARE = [  # channels, taps, domain, groups
    (2, (3,), None, 1),
    (3, (4,), (9,), 1),
    (2, (3, 3), (5, 4), 1),
    (4, (2, 5), (4, 5), 2),
    (2, (1, 2, 3), (2, 3, 4), 1),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
EACH = pytest.mark.parametrize(("channels", "taps", "domain", "groups"), SQUARE)


@BOTH
@EACH
def test_conv_exp_is_the_exponential_of_the_operator(channels, taps, domain, groups, dtype):
    kernel = random(channels, channels // groups, *taps, dtype=dtype)
    grid = domain or taps
    result = functional.conv_exp(kernel, domain, groups=groups)
    assert result.shape == (*kernel.shape[:2], *grid)
    exact = expm(dense(kernel, grid, groups=groups).numpy())
    np.testing.assert_allclose(
        dense(result, grid, groups=groups).numpy(), exact, atol=1e-10 * abs(exact).max()
    )


def test_conv_exp_of_a_strided_convolution_is_square_in_phases():
    kernel = random(4, 1, 3, 3)
    result = functional.conv_exp(kernel, (4, 6), stride=2)
    order = phases_first(1, (4, 6), (2, 2))
    exact = expm(dense(kernel, (4, 6), (2, 2))[:, order].numpy())
    np.testing.assert_allclose(dense(result, (4, 6), (2, 2))[:, order].numpy(), exact, atol=1e-10)


@BOTH
@EACH
def test_operations_are_those_of_the_operators(channels, taps, domain, groups, dtype):
    a, b = (random(channels, channels // groups, *taps, dtype=dtype, seed=seed) for seed in (0, 1))
    grid = domain or taps
    A, B = (dense(x, grid, groups=groups) for x in (a, b))
    close = torch.testing.assert_close
    close(dense(functional.adjoint(a, domain, groups=groups), grid, groups=groups), A.mH.resolve_conj())
    close(dense(functional.skew(a, domain, groups=groups), grid, groups=groups), skew(A))
    close(dense(functional.compose(a, b, domain, groups=groups), grid, groups=groups), A @ B)
    eye = functional.identity(a.shape, domain, groups=groups, dtype=dtype)
    close(dense(eye, grid, groups=groups), torch.eye(len(A), dtype=dtype))
    polar = functional.nearest_orthogonal(a, domain, groups=groups)
    U, _, Vh = torch.linalg.svd(A)
    close(dense(polar, grid, groups=groups), U @ Vh)


@BOTH
@EACH
def test_conv_log_inverts_conv_exp(channels, taps, domain, groups, dtype):
    kernel = functional.skew(
        random(channels, channels // groups, *taps, dtype=dtype), domain, groups=groups
    )
    spectrum = Lattice.of_kernel(kernel.shape, dtype.is_complex, groups=groups).spectrum(kernel)
    kernel = kernel * 3 / torch.linalg.matrix_norm(spectrum, 2).max()
    orthogonal = functional.conv_exp(kernel, groups=groups)
    torch.testing.assert_close(functional.conv_log(orthogonal, groups=groups), kernel)


def test_conv_log_refuses_what_it_cannot_reach():
    with pytest.raises(InManifoldError, match="the convolutions orthogonal to 1e-4 on"):
        functional.conv_log(random(2, 2, 3))
    reflection = functional.identity((2, 2, 3), dtype=torch.float64)
    reflection[0] *= -1
    with pytest.raises(InManifoldError, match="determinant -1"):
        functional.conv_log(reflection)
    # with complex numbers there is no such component
    log = functional.conv_log(reflection.to(torch.complex128))
    torch.testing.assert_close(functional.conv_exp(log), reflection.to(torch.complex128))


@BOTH
def test_rectangular_kernels(dtype):
    a, b = random(5, 3, 3, dtype=dtype), random(3, 2, 4, dtype=dtype)
    grid = (7,)
    torch.testing.assert_close(dense(functional.compose(a, b, grid), grid), dense(a, grid) @ dense(b, grid))
    adjoint = functional.adjoint(a, grid)
    assert adjoint.shape == (3, 5, 7)
    torch.testing.assert_close(dense(adjoint, grid), dense(a, grid).mH.resolve_conj())
    for kernel, stride in (
        (a, 1),
        (b, 1),
        (random(4, 3, 2, dtype=dtype), 2),
        (random(8, 2, 3, dtype=dtype), 3),
    ):
        polar = functional.nearest_orthogonal(kernel, 12, stride=stride)
        assert defect(dense(polar, (12,), (stride,))) < 1e-13
        eye = functional.identity(kernel.shape, 12, stride=stride, dtype=dtype)
        assert defect(dense(eye, (12,), (stride,))) < 1e-13


@pytest.mark.parametrize("kernel", [torch.zeros(3, 3, 4, 4), torch.ones(3, 3, 4, 3), torch.zeros(2, 4, 3)])
def test_the_nearest_to_a_rank_deficient_kernel_is_real_orthogonal_and_always_the_same(kernel):
    kernel = kernel.double()
    domain = tuple(k + 2 for k in kernel.shape[2:])
    nearest = functional.nearest_orthogonal(kernel, domain)
    assert nearest.dtype == torch.float64
    assert defect(dense(nearest, domain)) < 1e-12
    assert all(torch.equal(functional.nearest_orthogonal(kernel, domain), nearest) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_dtype_is_kept(dtype):
    kernel = random(2, 2, 3, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    for function in (
        functional.conv_exp,
        functional.skew,
        functional.adjoint,
        functional.nearest_orthogonal,
    ):
        assert function(kernel, 5).dtype == dtype


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (TypeError, lambda: functional.skew(torch.ones(2, 2, 3, dtype=torch.int32)), "kernel should be"),
        (TypeError, lambda: functional.skew([1.0]), "kernel should be"),
        (TypeError, lambda: functional.skew(torch.ones(2, 2, 3), "any"), "domain should be an integer"),
        (ValueError, lambda: functional.skew(torch.ones(2, 3, 3)), "to be square"),
        (ValueError, lambda: functional.conv_exp(torch.ones(2, 2, 4), stride=2), "to be square"),
        (ValueError, lambda: functional.skew(torch.ones(2, 2, 3), 2), "domain should be at least"),
        (ValueError, lambda: functional.compose(torch.ones(2, 2, 3), torch.ones(2, 2, 5)), "domain"),
        (ValueError, lambda: functional.compose(torch.ones(2, 2, 3), torch.ones(3, 2, 3)), "channels"),
        (TypeError, lambda: functional.adjoint(torch.ones(2, 2, 3), groups=1.5), "groups"),
    ],
)
def test_bad_input_is_named(error, call, message):
    with pytest.raises(error, match=message):
        call()
