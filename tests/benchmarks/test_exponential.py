"""``expm_skew`` against ``torch.linalg.matrix_exp``: forward and backward."""

import pytest
import torch

from orthoconv_param import expm_skew

BATCHES = [
    ((2112, 16), torch.complex64),
    ((544, 32), torch.complex64),
    ((544, 64), torch.complex64),
    ((144, 128), torch.complex64),
    ((64, 64), torch.float32),
    ((1, 512), torch.float32),
]


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("size", "dtype"), BATCHES)
def test_exponential(size, dtype, norm, in_turn, device):
    torch.manual_seed(0)
    batch, n = size
    A = torch.randn(batch, n, n, dtype=dtype)
    A = A - A.mH
    A = (A * (norm / torch.linalg.matrix_norm(A, 2))[:, None, None]).to(device).requires_grad_()
    G = torch.randn(batch, n, n, dtype=dtype).to(device)
    product = A.detach() @ A.detach()

    def both(function):
        return lambda: torch.autograd.grad(function(A), A, G)

    with torch.no_grad():
        Q = expm_skew(A)
        unitarity = (torch.linalg.svdvals(Q.to(torch.promote_types(dtype, torch.float64))) - 1).abs().max()
    result = in_turn(
        "exponential",
        f"{batch} of {n} x {n}, {str(dtype).removeprefix('torch.')}, norm {norm:g}",
        {
            "ours": both(expm_skew),
            "matrix_exp": both(torch.linalg.matrix_exp),
            "one product": lambda: torch.matmul(A.detach(), G, out=product),
        },
        defect=float(unitarity),
    )
    result["times faster"] = 1 / result["ratio"]["ours / matrix_exp"]
    result["in products"] = result["ratio"].pop("ours / one product")
