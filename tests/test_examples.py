import csv
import importlib
import subprocess
import sys
from functools import partial
from pathlib import Path

import convrnn
import critical_response
import experiment
import gradient_flow
import leak
import long_memory
import plots
import pytest
import quickstart
import riemannian
import row_digits
import torch
from baselines import ConvGRUCell, ConvLSTMCell, ExpRNNCell, PlainConvRNNCell
from convrnn import ConvRNNCell, ModReLU, Recurrent, Sigmoid, convolution
from oracles import defect, dense, operator
from torch import nn

from orthoconv_param import functional, orthogonal

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_riemannian_solvers_reach_the_closed_form():
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


def test_riemannian_runs_with_a_small_budget(tmp_path, monkeypatch, capsys):
    options = ["--steps", "3", "--side", "4", "--images", "8", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["riemannian", *options])
    riemannian.main()
    assert "Procrustes" in capsys.readouterr().out
    assert (tmp_path / "riemannian.png").stat().st_size > 1000


def test_figures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plots", "--steps", "5", "--out", str(tmp_path)])
    plots.main()
    for name in ("spectrum", "gradient_norms"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


REAL_AND_COMPLEX = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex128], ids=["real", "complex"]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("axes", "channels"), [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_the_recurrence_is_orthogonal_on_lattices_of_every_size(axes, channels, dtype):
    torch.manual_seed(0)
    cell = ConvRNNCell(2, channels, axes=axes, dtype=dtype)
    optimizer = torch.optim.Adam(cell.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        h = cell(torch.randn(2, 2, *[5] * axes), cell.start(2, [5] * axes))
        cell(None, h).abs().sum().backward()
        optimizer.step()
    tolerance = 1e-5 if torch.finfo(dtype).bits == 32 else 1e-11
    for size in ((3, 4, 3), (6, 5, 4)):
        assert defect(operator(cell.recurrence, size[:axes])) < tolerance


@REAL_AND_COMPLEX
def test_phi_keeps_the_phase(dtype):
    torch.manual_seed(0)
    z = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    modrelu = ModReLU(3, 1, dtype.to_real())
    assert torch.equal(modrelu(z), z)
    with torch.no_grad():
        modrelu.b.copy_(torch.tensor([-0.5, 0.0, 0.5])[:, None])
    expected = torch.polar(
        (z.abs() + modrelu.b).relu(),
        torch.view_as_complex(torch.view_as_real(z.to(torch.complex128))).angle(),
    )
    torch.testing.assert_close(modrelu(z).to(expected.dtype), expected)
    torch.testing.assert_close(Sigmoid()(z), z.sgn() * z.abs().asinh().tanh())
    assert modrelu(torch.zeros_like(z)).abs().max() == 0
    for phi in (modrelu, Sigmoid()):
        assert torch.autograd.gradcheck(phi, (z,))


def test_unknown_phi_is_refused():
    with pytest.raises(ValueError, match=r"phi should be one of .* Found 'relu'"):
        ConvRNNCell(1, 1, phi="relu")


def test_the_first_frame_is_not_blank():
    network = Recurrent(ConvRNNCell(1, 1), nn.Identity())
    with pytest.raises(ValueError, match="the first frame"):
        network([None])


CELLS = {
    "orthogonal": partial(ConvRNNCell, bias=True),
    "unitary": partial(ConvRNNCell, dtype=torch.complex64),
    "split": partial(ConvRNNCell, spread=1e-3, method="split"),
    "plain": PlainConvRNNCell,
    "LSTM": ConvLSTMCell,
    "chrono": partial(ConvLSTMCell, delay=50),
    "GRU": ConvGRUCell,
    "identity": partial(PlainConvRNNCell, identity=True),
    "walls": partial(ConvRNNCell, boundary="walls"),
    "walls, split": partial(ConvRNNCell, boundary="walls", method="split"),
    "walls, unitary": partial(ConvRNNCell, boundary="walls", dtype=torch.complex64),
    "walls, GRU": partial(ConvGRUCell, boundary="walls"),
}


def made_of(cell, groups):
    dtype = torch.complex64 if "unitary" in cell else None
    read = convolution(2, 3 * groups, groups, groups=groups, dtype=dtype)
    return Recurrent(CELLS[cell](groups, 3 * groups, groups=groups), read)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cell", CELLS)
def test_a_population_is_its_members_side_by_side(cell):
    make = partial(made_of, cell)
    together = experiment.population(make, [3, 4])
    x = torch.randn(2, 2, 4, 4)
    frames = [x, None, 0.1 * x, None]
    both = together(frames)
    for n, seed in enumerate((3, 4)):
        torch.manual_seed(seed)
        alone = make(1)
        blank = torch.zeros_like(x[:, :1])
        own = [blank if f is None else f[:, n : n + 1] for f in frames]
        torch.testing.assert_close(both[:, n : n + 1], alone(own))
        one = experiment.members(make, together, torch.tensor([n]), 2)
        torch.testing.assert_close(both[:, n : n + 1], one(own))


@pytest.mark.parametrize("cell", ["orthogonal", "unitary", "split", "LSTM", "walls"])
def test_members_are_trained_as_they_would_be_alone(cell):
    make = partial(made_of, cell)
    x = torch.randn(4, 1, 4, 4)

    def loss(network):
        groups = network.read.groups
        shown = x.expand(-1, groups, -1, -1)
        return (network([shown, None]) - shown).square().mean((0, 2, 3))

    rates = torch.tensor([0.003, 0.03])
    together = experiment.population(make, [3, 3])
    losses = experiment.fit(together, loss, 5, rates, recurrent=0.3)
    assert losses.shape == (5, 2)
    assert losses[-1].max() < losses[0].min()
    for n in range(2):
        alone = experiment.population(make, [3])
        recurrent = [p.clone() for p in alone.cell.recurrent_parameters()]
        torch.testing.assert_close(
            experiment.fit(alone, loss, 5, rates[[n]], recurrent=0.3)[:, 0], losses[:, n]
        )
        for before, after in zip(recurrent, alone.cell.recurrent_parameters(), strict=True):
            # an entry of Adam's step is at most about its rate (of a complex number, sqrt(2) times)
            assert 0 < (after - before).abs().max() < 5 * 1.5 * 0.3 * rates[n]


def test_conv_lstm_on_one_site_is_torchs():
    torch.manual_seed(0)
    cell = ConvLSTMCell(2, 3, axes=1)
    reference = nn.LSTMCell(2, 3)
    order = torch.tensor([0, 1, 3, 2])  # torch's gates are in, forget, value, out
    with torch.no_grad():
        for name, source in (("weight_ih", cell.input.weight), ("weight_hh", cell.recurrence.weight)):
            getattr(reference, name).copy_(source.sum(-1).unflatten(0, (4, 3))[order].flatten(0, 1))
        reference.bias_ih.zero_()
        reference.bias_hh.copy_(cell.recurrence.bias.view(4, 3)[order].flatten())
    assert torch.equal(cell.recurrence.bias[3:6], torch.ones(3))
    x, h, c = torch.randn(2, 2), torch.randn(2, 3), torch.randn(2, 3)
    state = cell(x[..., None], torch.cat([h, c], 1)[..., None])
    torch.testing.assert_close(state[..., 0], torch.cat(reference(x, (h, c)), 1))


def test_chrono_initialisation_remembers_for_as_long_as_the_delay():
    torch.manual_seed(0)
    bias = ConvLSTMCell(1, 500, delay=100).recurrence.bias.view(4, -1)
    assert torch.equal(bias[0], -bias[1])
    times = 1 + bias[1].exp()  # 1 / (1 - sigmoid)
    assert 2 <= times.min() < 5
    assert 95 < times.max() <= 100


def test_a_plain_net_may_start_from_the_identity():
    cell = PlainConvRNNCell(2, 6, groups=2, identity=True)
    h = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(cell(None, h), h.tanh())


def test_a_member_that_diverges_leaves_the_others_alone():
    make = partial(made_of, "plain")
    x = torch.randn(4, 2, 4, 4)
    rates = torch.tensor([0.01, 0.01])

    def train(scale):
        network = experiment.population(make, [3, 4])
        losses = experiment.fit(network, lambda n: (scale * n([x]) - x).square().mean((0, 2, 3)), 3, rates)
        return network, losses

    (network, losses), (_, expected) = train(torch.tensor([1.0, torch.inf])[:, None, None]), train(1)
    torch.testing.assert_close(losses[:, 0], expected[:, 0])
    assert not losses[:, 1].isfinite().any()
    assert all(p.isfinite().all() for p in network.parameters())


def test_the_quick_setting_is_a_default(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["name", "--quick", "--seeds", "5", "--out", str(tmp_path / "new")])
    options = experiment.parser("")
    options.add_argument("--steps", type=experiment.positive, default=100)
    arguments = experiment.parse(options, seeds=[0, 1], steps=3)
    assert (arguments.seeds, arguments.steps) == ([5], 3)
    assert arguments.out.is_dir()
    monkeypatch.setattr("sys.argv", ["name", "--steps", "0"])
    with pytest.raises(SystemExit):
        experiment.parse(experiment.parser(""))


def test_exp_rnn_populations():
    make = row_digits.networks("rows")["expRNN, dense"]
    together = experiment.population(make, [3, 4])
    torch.manual_seed(4)
    x = torch.randn(2, 2, 8)
    torch.manual_seed(4)
    torch.testing.assert_close(together([x, x])[:, 10:], make(1)([x[:, 1:], x[:, 1:]]))


def test_exp_rnn_is_orthogonal():
    torch.manual_seed(0)
    cell = ExpRNNCell(2 * 3, 2 * 4, groups=2)
    Q = cell.recurrence
    torch.testing.assert_close(Q @ Q.mT, torch.eye(4).expand(2, 4, 4), atol=1e-5, rtol=0)
    x, h = torch.randn(5, 2, 3), torch.randn(5, 8, 1)
    expected = (
        torch.cat([h[:, :4, 0] @ Q[0].T, h[:, 4:, 0] @ Q[1].T], 1) + cell.input(x.view(5, 6, 1))[..., 0]
    )
    torch.testing.assert_close(cell(x, h)[..., 0], expected)


def test_all_networks_have_about_as_many_parameters():
    for networks in (
        long_memory.networks(100),
        long_memory.networks(100, boundary="walls"),
        row_digits.networks("rows"),
        row_digits.networks("permuted pixels"),
    ):
        sizes = [experiment.size_of(make(1)) for make in networks.values()]
        assert max(sizes) < 1.11 * min(sizes)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_frames_of_recall(noise):
    images = torch.rand(2, 3, 8, 8)
    first, *rest = long_memory.frames(images, 4, noise, torch.Generator().manual_seed(0))
    assert first is images
    assert len(rest) == 4
    assert all(f is None for f in rest) if not noise else 0.3 < torch.stack(rest).std() < 0.7


def test_frames_of_rows_and_pixels():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(torch.stack(row_digits.frames(images, "rows", False), 2), images)
    pixels = row_digits.frames(images, "permuted pixels", False)
    dense = torch.cat(row_digits.frames(images, "permuted pixels", True), 2)
    assert torch.equal(torch.stack(pixels, 2)[..., 0], dense)
    assert torch.stack(pixels)[..., 1:].abs().max() == 0
    assert torch.equal(dense.sort().values, images.flatten(2).sort().values)
    assert not torch.equal(dense, images.flatten(2))


def test_gradients_neither_vanish_nor_explode_over_1000_steps(monkeypatch):
    monkeypatch.setattr(gradient_flow, "IMAGES", 1)
    for name, bounds in (("orthogonal ConvRNN, no phi", (0.999, 1.001)), ("orthogonal ConvRNN", (0.5, 2))):
        network = experiment.population(gradient_flow.networks(1000)[name], [0, 1])
        norms = gradient_flow.gradient_norms(network, 2, 1000)
        assert norms.shape == (2, 1001)
        assert bounds[0] < norms[:, 0].min() <= norms[:, 0].max() < bounds[1]


def test_gradient_norms_are_those_of_each_member():
    network = experiment.population(long_memory.networks(3)["ConvLSTM"], [0, 1])
    norms = gradient_flow.gradient_norms(network, 2, 3)
    images, _ = experiment.digits()
    shown = images[experiment.TRAINING_DIGITS :][: gradient_flow.IMAGES, None]
    for n in range(2):
        alone = experiment.members(long_memory.networks(3)["ConvLSTM"], network, torch.tensor([n]), 2)
        states = []
        error = (alone([shown, None, None, None], states) - shown).square().sum()
        expected = torch.stack([g.norm() for g in torch.autograd.grad(error, states)])
        torch.testing.assert_close(norms[n], expected / expected[-1])


def test_critical_exponents():
    network = critical_response.Network([6, 4], seed=0)
    assert abs(network.turn.abs().item() - 1) < 1e-12
    x = {"response": [1e-4, 1e-3], "decay": [100.0, 1000.0], "relaxation": [0.01, 0.1]}
    x["another wave"] = x["relaxation"]
    measured = critical_response.experiment([6, 4], 0, x, steps=4000)
    for name, law in critical_response.LAWS.items():
        assert abs(critical_response.exponent(x[name], measured[name]) - law.exponent) < 0.01
        for a, b in zip(x[name], measured[name], strict=True):
            assert abs(b / (law.factor * a**law.exponent) - 1) < 0.02


def test_split_networks_start_near_the_identity_and_are_trained_slowly():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8, 8)
    cell = ConvRNNCell(2, 12, spread=1e-3, groups=2, method="split")
    assert 0 < (cell.recurrence(x) - x).norm() < 0.02 * x.norm()
    assert defect(operator(cell.recurrence, (5, 4))) < 1e-5
    assert cell.recurrent_parameters()[0] is cell.recurrence.parametrizations.weight.original


@pytest.mark.parametrize("method", ["exponential", "split"])
def test_between_walls_networks_start_near_the_identity_and_lose_nothing(method):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8, 8)
    cell = ConvRNNCell(2, 12, spread=1e-3, groups=2, method=method, boundary="walls")
    assert 0 < (cell.recurrence(x) - x).norm() < 0.02 * x.norm()
    assert defect(operator(cell.recurrence, (5, 4))) < 1e-5


def test_between_walls_no_network_is_periodic():
    networks = long_memory.networks(3, methods=["exponential", "split"], boundary="walls")
    assert len(networks) == 9
    for make in networks.values():
        torch.manual_seed(0)
        network = make(1)
        x = torch.zeros(1, 1, 7, 8)
        x[..., 0] = 1  # one wall is reached from the other only around a torus
        states = []
        network([x, None], states)
        reached, blank = states[0], network.cell.start(1, (7, 8))
        assert not torch.equal(reached[..., :2], network.cell(torch.zeros_like(x), blank)[..., :2])
        torch.testing.assert_close(reached[..., -2:], network.cell(torch.zeros_like(x), blank)[..., -2:])
        assert all(m.padding_mode != "circular" for m in network.modules() if isinstance(m, nn.Conv2d))


def between_walls(script, output, folder, monkeypatch, capsys):
    """What a script prints with a small budget."""
    monkeypatch.setattr(script, "run", lambda function, jobs, *_: [function(*job) for job in jobs])
    monkeypatch.setattr("sys.argv", ["name", "--boundary", "walls", *SMALLEST[script]])
    monkeypatch.chdir(folder)
    script.main()
    with (folder / f"{output}.csv").open() as file:
        assert {row["boundary"] for row in csv.DictReader(file)} == {"walls"}
    assert (folder / f"{output}.png").stat().st_size > 5000
    return capsys.readouterr().out


@pytest.mark.slow
def test_recall_between_walls_runs_with_a_small_budget(tmp_path, monkeypatch, capsys):
    printed = between_walls(long_memory, "recall", tmp_path, monkeypatch, capsys)
    for network in ("orthogonal", "unitary"):
        for method in ("exponential", "split"):
            assert f"{network} ConvRNN, {method} |" in printed
    assert '| zeros, exponential, domain="any" |' in printed
    with (tmp_path / "leak.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1000 * len(leak.OPERATORS)
    assert (tmp_path / "leak.png").stat().st_size > 5000


@pytest.mark.slow
def test_rows_between_walls_run_with_a_small_budget(tmp_path, monkeypatch, capsys):
    printed = between_walls(row_digits, "row_digits", tmp_path, monkeypatch, capsys)
    for network in ("orthogonal ConvRNN, exponential", "unitary ConvRNN, split", "expRNN, dense"):
        assert f"| {network} |" in printed


def test_rows_between_walls_are_not_periodic():
    networks = row_digits.networks("rows", ["exponential", "split"], "walls")
    assert len(networks) == 8
    for name, make in networks.items():
        if name == "expRNN, dense":
            continue
        network = make(1)
        convolutions = [m for m in network.cell.modules() if isinstance(m, nn.Conv1d)]
        assert all(m.padding_mode != "circular" for m in convolutions)
        if "orthogonal" in name:
            assert defect(operator(network.cell.recurrence, (8,))) < 1e-5
            assert defect(operator(network.cell.recurrence, (5,))) < 1e-5


@pytest.mark.sampled(2)
@pytest.mark.parametrize("operator", leak.OPERATORS)
def test_zeros_lose_a_state_and_walls_do_not(operator):
    left = leak.norms(operator, seed=0)
    assert left.shape == (1000,)
    if operator.startswith(("walls", "circular")):
        assert (left - 1).abs().max() < 1e-3
        return
    assert (left[1:] <= left[:-1]).all()
    steps, most = {
        "zeros, exponential, domain=16": (100, 0.2),
        "plain zero-padded convolution": (10, 0.1),
    }.get(operator, (1000, 0.2))
    assert left[steps - 1] < most


def test_ratios_as_text():
    assert [experiment.ratio(x, 1e-38) for x in (0.25, 1.0, 2e-4, 0.0)] == [
        "0.2500",
        "1.0000",
        "2e-04",
        "< 1e-38",
    ]


SMALLEST = {
    long_memory: ["--delays", "2", "--steps", "1", "--seeds", "0", "--rates", "1e-2"],
    row_digits: ["--steps", "1", "1", "--seeds", "0", "--rates", "1e-2"],
    quickstart: ["--seeds", "0"],
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "script",
    [
        long_memory,
        quickstart,
        pytest.param(row_digits, marks=pytest.mark.slow),
    ],
    ids=lambda script: script.__name__,
)
def test_the_orthogonal_networks_may_be_split(script, tmp_path, monkeypatch, capsys):
    made = []

    def recorded(module, **options):
        made.append(options["method"])
        return orthogonal(module, **options)

    monkeypatch.setattr(convrnn, "orthogonal", recorded)
    monkeypatch.setattr(quickstart, "orthogonal", recorded)
    monkeypatch.setattr(quickstart, "EPOCHS", 1)
    monkeypatch.setattr(leak, "write", lambda *_: "")  # which has operators of both methods
    if script is not quickstart:  # in this process, where it is recorded
        monkeypatch.setattr(script, "run", lambda function, jobs, *_: [function(*job) for job in jobs])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["name", "--method", "split", *SMALLEST[script]])
    script.main()
    assert "orthogonal" in capsys.readouterr().out
    assert set(made) == {"split"}
    monkeypatch.setattr("sys.argv", ["name", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--method {exponential,split}" in capsys.readouterr().out


OUTPUTS = {
    "long_memory": ("recall", {"network", "delay", "rate", "seed", "test_error"}),
    "row_digits": ("row_digits", {"task", "network", "rate", "seed", "test_accuracy"}),
    "gradient_flow": ("gradient_flow", {"network", "trained", "seed", "step", "norm"}),
    "critical_response": ("critical_response", {"law", "seed", "x", "y", "predicted"}),
}
FEWER = {  # than the quick settings
    "long_memory": ["--delays", "20"],
    "row_digits": ["--steps", "10", "2"],
    "gradient_flow": ["--delay", "20"],
    "critical_response": ["--points", "4"],
}


@REAL_AND_COMPLEX
def test_rates_are_chosen_by_what_is_seen_in_training(dtype):
    make = partial(made_of, "unitary" if dtype.is_complex else "LSTM")
    network = experiment.population(make, [3, 4, 3, 4])
    costs = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    chosen, best = experiment.best_members(make, network, [0.1, 0.2], costs)
    assert best == 1
    for part, whole in zip(chosen.parameters(), network.parameters(), strict=True):
        assert torch.equal(part, whole[len(whole) // 2 :])
    rows = experiment.rows_of(
        [3, 4], [0.1, 0.2], best, ("loss", costs), ("error", torch.tensor([5.0, 6.0])), network="x"
    )
    assert [(r["rate"], r["seed"], r["chosen"]) for r in rows[1:3]] == [(0.1, 4, False), (0.2, 3, True)]
    assert rows[2]["loss"] == 2
    assert experiment.results_of(rows, "error", network="x") == [5, 6]
    assert experiment.results_of(rows, "error", network="y") == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_help_has_the_command(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["name", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    shown = capsys.readouterr().out
    assert f"python examples/{name}.py --out DIR" in shown
    assert "--seeds" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_experiments_run_in_their_quick_setting(name, tmp_path):
    output, columns = OUTPUTS[name]
    script = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--workers", "1"]
    script += FEWER[name]
    if name == "long_memory":  # the other kind of frames
        few = ["--delays", "5", "--steps", "2", "--seeds", "0", "--rates", "0.01"]
        noisy = [*script, *few, "--noise", "0.1", "--out", str(tmp_path / "noisy")]
        subprocess.run(noisy, capture_output=True, text=True, check=True)
        assert ",0.1," in (tmp_path / "noisy" / "recall.csv").read_text()
    done = subprocess.run(
        [*script, "--out", str(tmp_path / "new")], capture_output=True, text=True, check=True
    )
    assert "100%" in done.stderr  # the progress bar
    assert "| --- |" in done.stdout
    with (tmp_path / "new" / f"{output}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert columns <= set(rows[0])
    assert len({row["seed"] for row in rows}) == 2
    pictures = list((tmp_path / "new").glob(f"{output}*.png"))
    assert pictures
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    if name == "long_memory":
        errors = {}
        for row in rows:
            if row["test_error"] and row["delay"] == "20":
                errors.setdefault(row["network"], []).append(float(row["test_error"]))
        ours = sum(errors["orthogonal ConvRNN"])
        assert 5 * ours < min(sum(errors["ConvLSTM"]), sum(errors["ConvGRU"]))
