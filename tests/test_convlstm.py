"""The experiments with ConvLSTMs: what is asked of the networks, and what they are made of."""

import copy
import csv
import itertools
import math
import sys

import convlstm
import moving_digits
import occlusion
import pytest
import torch
from convlstm import ConvLSTM, Variant, cost_of_a_step, train
from moving_digits import MovingDigits, Settings
from occlusion import MARGIN, SCREEN, SIDE, Occlusion
from oracles import defect, dense, operator
from torch import nn

HIDDEN = 4
VARIANTS = {
    **moving_digits.VARIANTS,
    **moving_digits.MORE,
    **occlusion.VARIANTS,
    **occlusion.MORE,
}
TASKS = {"digits": lambda: MovingDigits(11, 5, 3), "occlusion": lambda: Occlusion(2)}


def trained(name):
    torch.manual_seed(0)
    variant = VARIANTS[name]
    if variant.moves:  # these start from their own kind
        return variant.made(HIDDEN, TASKS["digits"]()).state_dict()
    return ConvLSTM(HIDDEN, variant.boundary).state_dict()


@pytest.mark.parametrize(
    "name", [n for n, v in VARIANTS.items() if v.anneal and not v.start and not v.moves]
)
def test_variants_of_a_trained_network_compute_what_it_did(name):
    variant, task = VARIANTS[name], MovingDigits(11, 6, 3)
    video, original = task.batch(2), ConvLSTM(HIDDEN, variant.boundary)
    original.load_state_dict(trained(name))
    model = variant.made(HIDDEN, task, trained(name))
    torch.testing.assert_close(model(video, 3), original(video, 3), rtol=1e-4, atol=1e-5)
    assert len(list(model.parameters())) >= len(list(original.parameters()))


class Block(nn.Module):
    """A gate's part of a network's convolution, from state to state."""

    def __init__(self, model, gate):
        super().__init__()
        self.gates, self.gate = model.gates, gate
        self.in_channels, self.transposed, self.bias = HIDDEN, False, None

    def forward(self, h):
        x = torch.cat([torch.zeros_like(h[:, :1]), h], 1)
        return (self.gates(x) - self.gates(torch.zeros_like(x))).chunk(4, 1)[self.gate]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("checkpoint", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_to_be_orthogonal_is_so_after_training(name, checkpoint):
    variant, task = VARIANTS[name], TASKS["digits"]()
    way = checkpoint and variant.blocks != "none" and variant.anneal and not variant.start
    model = variant.made(HIDDEN, task, trained(name) if checkpoint else None)
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, task, 3, 1e-2, batch=2, annealed=2 if way else 0)
    assert len(losses) == 3
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    orthogonal = (
        [] if variant.start else {"none": [], "candidate": [3], "all": [0, 1, 2, 3]}[variant.blocks]
    )
    sizes = [(11, 11), (7, 12)]
    if variant.boundary == "circular" and variant.method == "exponential":
        sizes = sizes[:1]  # it takes images of the example's size only
    for gate, size in itertools.product(range(4), sizes):
        found = defect(operator(Block(model, gate), size))
        assert found < 1e-5 if gate in orthogonal else found > 1e-2
    for size in sizes:
        found = defect(operator(model.move, size)) if variant.memory != "none" else 0.0
        assert found > 1e-4 if variant.free else found < 1e-5


def test_a_path_of_the_memory_is_made_as_the_boundary_is():
    for boundary, free in itertools.product(("walls", "circular"), (False, True)):
        move = convlstm.memory_path(nn.init.dirac_(torch.empty(HIDDEN, HIDDEN, 3, 3)), boundary, free=free)
        x = torch.randn(2, HIDDEN, 5, 6)
        torch.testing.assert_close(move(x), x)
        assert ("walls" in str(move)) == (boundary == "walls" and not free)


def test_what_is_remembered_may_move_and_is_reflected_at_walls():
    model = Variant(memory="sideways").made(HIDDEN, TASKS["occlusion"]())
    x = torch.zeros(1, HIDDEN, 3, 5)
    x[0, 0, 1, 1] = x[0, 1, 1, 3] = 1
    once = model.move(x)
    expected = torch.zeros_like(x)
    expected[0, 0, 1, 0] = expected[0, 1, 1, 4] = 1
    torch.testing.assert_close(once, expected)
    reflected = model.move(once).round()[0, :, 1].nonzero().tolist()
    assert reflected == [[0, 4], [1, 0]]  # each in the channel that moves the other way
    x, states = torch.randn(1, HIDDEN, 3, 5), []
    for _ in range(100):
        states.append(x)
        x = model.move(x)
    torch.testing.assert_close(x.norm(), states[0].norm())


def test_there_are_four_diagonals():
    model = Variant(memory="diagonal").made(HIDDEN, TASKS["digits"]())
    x = torch.zeros(1, HIDDEN, 5, 5)
    x[:, :, 2, 2] = 1
    places = {tuple(place) for place in model.move(x)[0].round().nonzero().tolist()}
    assert places == {(0, 3, 1), (1, 3, 3), (2, 1, 1), (3, 1, 3)}


def test_after_the_context_a_network_sees_what_it_predicted():
    torch.manual_seed(0)
    model, video = ConvLSTM(HIDDEN), MovingDigits(11, 6, 3).batch(2)
    seen, changed = model(video, 3), video.clone()
    changed[:, 3:] = 1
    assert torch.equal(model(changed, 3), seen)
    changed[:, 2:] = 1
    assert not torch.equal(model(changed, 3), seen)
    predicted = torch.cat([video[:, :3], seen[:, 2:4].sigmoid()], 1)
    torch.testing.assert_close(model(predicted, 99), seen[:, :4])


def test_an_orthogonal_beginning_is_one():
    model = Variant("all", start=True).made(HIDDEN, TASKS["digits"]())
    kernel = model.gates.weight[:, 1:].chunk(4)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    for block in kernel:
        assert defect(dense(block.detach(), (6, 6))) < 1e-5


def test_costs_are_of_all_variants():
    costs = cost_of_a_step([Variant(), Variant("all")], HIDDEN, TASKS["digits"](), 2, rounds=2)
    assert len(costs) == 2
    assert all(0.1 < cost < 100 for cost in costs)


# Moving digits


def test_digits_bounce_off_the_walls_and_stay_whole():
    data = MovingDigits(12, 30, 3, "test", seed=1)
    video = data.batch(4)
    assert video.shape == (4, 30, 1, 12, 12)
    totals = video.sum((2, 3, 4))
    assert torch.equal(totals, totals[:, :1].expand_as(totals))
    digits = {tuple(d.flatten().tolist()) for d in data.digits}
    for frame in (video[0, 0, 0], video[0, 17, 0]):
        windows = frame.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64).tolist()
        assert any(tuple(window) in digits for window in windows)
    corners = []  # of the digit's box, as its centre of mass tells
    where = torch.arange(12.0)
    for axis in (2, 1):
        weights = video[:, :, 0].sum(axis + 1)
        corners.append((weights * where).sum(2) / totals)
    steps = torch.stack(corners).diff(dim=2)
    torch.testing.assert_close(steps.abs(), torch.ones_like(steps))  # a pixel a frame on both axes
    assert (steps > 0).any(2).all()
    assert (steps < 0).any(2).all()  # it bounces


def test_no_digit_is_in_two_sets():
    sets = [set(range(*where.indices(1797))) for where in moving_digits.SETS.values()]
    assert sum(map(len, sets)) == 1797
    assert not any(a & b for a, b in itertools.combinations(sets, 2))


def test_what_is_measured():
    settings = Settings(HIDDEN, 11, 5, 3, 2, 0.3, "validation")
    data = settings.videos("training", 0)
    model = Variant("all").made(HIDDEN, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_digits, "ROLLOUT", 120)
        seen = copy.deepcopy(data).batch(64)  # of those that it is trained on
        row = moving_digits.measured(settings, model, data)
        plain = moving_digits.measured(settings, ConvLSTM(HIDDEN), data)
        moving = Variant(memory="diagonal").made(HIDDEN, data)
        with torch.no_grad():
            moving.move.parametrizations.weight.original += 0.1
        apart = moving_digits.measured(settings, moving, data)["defect"]
    dense_defects = [defect(operator(Block(model, gate), (11, 11))) for gate in range(4)]
    assert row["defect"] == pytest.approx(max(dense_defects), abs=2e-6)
    assert apart < 1e-5
    assert math.isnan(plain["defect"])  # nothing in it is to be orthogonal
    with torch.no_grad():
        video = settings.videos("validation", 99).batch(128)
        predicted = model(video, 3).sigmoid()[:, 2:]
    expected = torch.nn.functional.binary_cross_entropy(predicted, video[:, 3:])
    assert row["short"] == pytest.approx(expected.item(), rel=1e-4)
    states = torch.stack([c for _, c in model.states(settings.videos("validation", 99, 123).batch(8), 3)])
    norms = states.detach().square().mean((2, 3, 4)).sqrt()
    trained = torch.stack([c for _, c in model.states(seen, 3)]).detach().square().mean((2, 3, 4)).sqrt()
    assert row["norm in training"] == pytest.approx(trained.max().item(), rel=1e-4)
    assert row["norm later"] == pytest.approx(norms[5:].max().item(), rel=1e-4)
    assert all(x == x and x >= 0 for x in row.values())


# Occlusion


@pytest.mark.parametrize("hidden", [1, 5])
def test_a_digit_is_hidden_for_as_long_as_is_said(hidden):
    task = Occlusion(hidden, "test", seed=1)
    video, left = task.batch(6)
    assert left.any()
    assert not left.all()
    seen = torch.where(task.screen, 0, video).flatten(2)
    assert (video[..., task.screen] == SCREEN).all()
    blank = seen.abs().amax(2) == 0
    assert (blank[:, task.context - hidden : task.context]).all()
    full = task.video(torch.ones(2, SIDE, SIDE), torch.tensor([False, True]))
    blank = torch.where(task.screen, 0, full).flatten(2).abs().amax(2) == 0
    assert (blank.sum(1) == hidden).all()
    assert full.shape[1] == task.context + SIDE
    # what comes in is what comes out, and no mirror image of it
    whole = torch.stack([task.outside(video, left)[:, -1], task.outside(video, left)[:, -1].flip(-1)])
    out = torch.where(left[:, None, None], whole[1], whole[0])
    first = torch.where(left[:, None, None], video[:, 0, 0, :, -MARGIN:], video[:, 0, 0, :, :MARGIN])
    place = torch.where(left[:, None, None], first[..., :SIDE], first[..., 2:])
    came = torch.where(left[:, None, None], out[..., 2:], out[..., :SIDE])
    assert torch.equal(came, place)
    assert any((place[n] == d).all(-1).all(-1).any() for n in range(6) for d in [task.digits])


def test_errors_are_over_that_of_the_mean_digit():
    task = Occlusion(2, "test", seed=3)
    mean = Occlusion(2, "test", seed=3)

    class Mean(nn.Module):
        def __init__(self, digits):
            super().__init__()
            self.digits = digits

        def forward(self, video, context, screen):
            digits = self.digits if self.digits.ndim == 3 else self.digits.expand(len(video), SIDE, SIDE)
            return mean.video(digits, left)[:, 1:].clamp(1e-7, 1 - 1e-7).logit()

    state = task.random.get_state()
    _, left = task.batch(5)
    task.random.set_state(state)
    assert task.error(Mean(task.mean), 5) == pytest.approx(1, abs=1e-3)
    task.random.set_state(state)
    true = task.digits[torch.randint(len(task.digits), (5,), generator=task.random)]
    task.random.set_state(state)
    assert task.error(Mean(true), 5) < 1e-6


def test_gradients_over_time_are_those_by_state_and_memory():
    torch.manual_seed(0)
    task, model = Occlusion(2), ConvLSTM(HIDDEN)
    norms = occlusion.gradients(model, task)
    assert len(norms) == len(task.columns) - 1
    assert norms[-1] > 0
    assert norms[0] < norms[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "columns"),
    [
        (
            moving_digits,
            ["--canvas", "10", "--frames", "5", "--context", "3"],
            {"network", "start", "budget", "steps", "short", "long", "defect"},
        ),
        (occlusion, [], {"network", "start", "delay", "steps", "error"}),
    ],
    ids=["moving_digits", "occlusion"],
)
def test_all_variants_run(script, options, columns, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "run", lambda function, jobs, *_: [function(*job) for job in jobs])
    monkeypatch.setattr(moving_digits, "ROLLOUT", 120)
    options = ["--all", "--quick", "--seeds", "0", "--steps", *(["2"] if options else ["2"] * 3), *options]
    monkeypatch.setattr(sys, "argv", ["name", *options, "--out", str(tmp_path)])
    script.main()
    printed = capsys.readouterr().out
    for name in {**script.VARIANTS, **script.MORE}:
        assert f"| {name} |" in printed
    assert len(list(tmp_path.glob("*.png"))) == 2
    with (tmp_path / f"{script.__name__}.csv").open() as file:
        assert columns <= set(next(csv.DictReader(file)))
    torch.set_flush_denormal(False)


def test_stages_go_on_from_one_another(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    settings = occlusion.Settings(HIDDEN, 2, 0.3, "validation")
    stages = [
        occlusion.Stage("original", "fresh", 1),
        *(occlusion.Stage("all blocks", "trained", d) for d in (2, 3)),
    ]
    for before, stage in zip([None, *stages], stages, strict=False):
        row = occlusion.experiment(settings, stage, before, 0, 2, 0.0, tmp_path)  # nothing is learned
        assert (row["network"], row["start"], row["delay"]) == stage
    first, second, third = (stage.load(tmp_path, 0) for stage in stages)
    assert torch.equal(first["draw.weight"], third["draw.weight"])
    assert all(torch.equal(second[k], third[k]) for k in second)
    assert any("parametrizations" in name for name in second)


def test_bad_options_are_refused(monkeypatch):
    for options in (["--delays", "5", "2", "9"], ["--annealed", "2"]):
        monkeypatch.setattr(sys, "argv", ["name", *options])
        with pytest.raises(SystemExit):
            occlusion.main()
    for options in (["--canvas", "9"], ["--context", "14"], ["--annealed", "0"]):
        monkeypatch.setattr(sys, "argv", ["name", *options])
        with pytest.raises(SystemExit):
            moving_digits.main()
