import importlib.util
from pathlib import Path

import pytest
import torch
from oracles import defect, dense

from orthoconv_param import functional

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_riemannian_solvers_reach_the_closed_form():
    riemannian = load("riemannian")
    torch.manual_seed(0)
    for problem in riemannian.problems(channels=3, side=4, images=48, spread=0.1):
        best = problem.loss(problem.solution)
        start = functional.identity(problem.solution.shape, dtype=torch.float64)
        assert (start - problem.solution).norm() > 0.3
        assert defect(dense(problem.solution, (4, 4))) < 1e-12
        for solver in riemannian.SOLVERS:
            distances, _ = riemannian.solve(problem, solver, 200)
            assert distances[-1] < 1e-4
            assert len(distances) == 200
        # it is the least value: of what is orthogonal nearby nothing is better
        for seed in range(5):
            torch.manual_seed(seed)
            other = functional.nearest_orthogonal(
                problem.solution + 0.01 * torch.randn_like(problem.solution)
            )
            assert problem.loss(other) >= best


@pytest.mark.parametrize("name", ["riemannian"])
def test_examples_run_with_a_small_budget(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", [name, "--steps", "3", "--side", "4", "--images", "8", "--out", str(tmp_path)]
    )
    load(name).main()
    assert "Procrustes" in capsys.readouterr().out
    assert (tmp_path / "riemannian.png").stat().st_size > 1000


def test_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plots", "--steps", "5", "--out", str(tmp_path)])
    load("plots").main()
    for name in ("spectrum", "gradient_norms"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
