"""Recurrent networks as people write them, and `retrofit(model, example, blocks="recurrent")`."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import geotorch
import numpy as np
import pytest
import torch
from models import (
    LATENT,
    RECURRENT,
    VIDEO,
    ConvLSTM,
    Keeps,
    Peepholes,
    Pyramid,
    Sampler,
    Warped,
    graphs_and_backend,
    states,
)
from oracles import defect, operator, random
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from orthoconv_param import (
    generators,
    keeping,
    orthogonal,
    recurrent_blocks,
    report,
    retrofit,
    set_orthogonality,
)
from orthoconv_param.functional import gate_blocks
from orthoconv_param.keeping import KeptForCalls
from orthoconv_param.models import call
from orthoconv_param.parametrizations.split import SplitExponential
from orthoconv_param.torus.geometry import CONVOLUTIONS

close = torch.testing.assert_close

# of normalisations that follow; and torch's own, of circular padding with an even kernel
pytestmark = pytest.mark.filterwarnings("ignore:a normalisation directly follows these convolutions")
OFTEN = ("stacked [x, h]", "GRU, separate gates")
WAYS = {
    "split": {},
    "exponential": {"method": "exponential"},
    "split, circular": {"boundary": "circular"},
    "split, zeros": {"boundary": "zeros"},
}


def slow_if(condition, *values):
    return pytest.param(*values, marks=pytest.mark.slow if condition else ())


def make(name, mode="zeros", dtype=torch.float32):
    torch.manual_seed(0)
    constructor, example, blocks = RECURRENT[name]
    model = constructor(mode).to(dtype)
    return (
        model,
        torch.utils._pytree.tree_map(lambda x: x.to(dtype) if torch.is_tensor(x) else x, example),
        blocks,
    )


def run(model, example):
    """What the model gives, as one tensor; from the same random numbers."""
    if isinstance(model, Keeps):
        model.state = None
    torch.manual_seed(3)
    leaves = torch.utils._pytree.tree_leaves(call(model, example))
    return torch.cat([leaf.flatten() for leaf in leaves])


def train(model, example, steps=3, lr=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = run(model, example)
        loss = (y - torch.linspace(-1, 1, len(y)).to(y)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def operators(model, blocks, size):
    """The dense matrices of blocks, from the forward of the model's own convolutions on the image."""
    for name, pairs in blocks.items():
        conv = model.get_submodule(name)
        M = operator(conv, size).double()
        out, cin = M.shape[0] // conv.out_channels, M.shape[1] // conv.in_channels
        for rows, columns in pairs:
            yield M[rows.start * out : rows.stop * out, columns.start * cin : columns.stop * cin]


# What is found


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_blocks_are_those_that_one_would_write(name, mode):
    model, example, blocks = make(name, mode)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recurrent_blocks(model, example) == blocks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_rectangular_blocks_are_named_and_left_alone_or_returned():
    torch.manual_seed(0)
    model = Warped("zeros")
    words = r"flows, 4 -> 10 channels, not square: rect.*=True returns them; ret, 20 -> 12 channels"
    with pytest.warns(UserWarning, match=words):
        assert recurrent_blocks(model, VIDEO) == {}
    with pytest.warns(UserWarning, match="left alone"), pytest.raises(ValueError, match="Found none"):
        retrofit(model, VIDEO, blocks="recurrent")
    found = recurrent_blocks(model, VIDEO, rectangular=True)
    assert found == {
        "flows": [(slice(0, 10), slice(0, 4))],
        "ret": [(slice(i, i + 4), slice(0, 20)) for i in (0, 4, 8)],
    }
    before = run(model, VIDEO)
    retrofit(model, VIDEO, blocks=found)
    close(run(model, VIDEO), before)
    set_orthogonality(model, 1)
    train(model, VIDEO)
    assert all(defect(M) < 1e-5 for size in ((6, 5), (3, 8)) for M in operators(model, found, size))


class _Between(nn.Module):
    """Input and states in any order; gates whose states are of two kinds."""

    def __init__(self, order):
        super().__init__()
        self.order, self.gates = order, nn.Conv2d(2 + (8 if "c" in order else 4), 16, 3, padding=1)

    def forward(self, video):
        h = c = video.new_zeros(len(video), 4, *video.shape[-2:])
        for x in video.unbind(1):
            parts = {"x": x, "h": h, "c": c}
            i, f, o, g = self.gates(torch.cat([parts[p] for p in self.order], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


@pytest.mark.parametrize(("order", "first"), [("xh", 2), ("hx", 0)])
def test_the_state_stands_anywhere(order, first):
    assert recurrent_blocks(_Between(order), VIDEO) == {"gates": gate_blocks(4, 4, first)}
    assert gate_blocks(4, 4, 2, order=order) == gate_blocks(4, 4, first)


def test_two_states_at_once_are_rectangular():
    with pytest.warns(UserWarning, match="gates, 8 -> 16 channels"):
        assert recurrent_blocks(_Between("xhc"), VIDEO) == {}
    found = recurrent_blocks(_Between("xhc"), VIDEO, rectangular=True)
    assert found == {"gates": [(slice(i, i + 4), slice(2, 10)) for i in range(0, 16, 4)]}
    with pytest.warns(UserWarning, match="do not follow one another"):
        assert recurrent_blocks(_Between("hxc"), VIDEO, rectangular=True) == {}


class _Gated(nn.Module):
    """A state that gates change, in a way of one's own."""

    def __init__(self, conv, use):
        super().__init__()
        self.conv, self.use = conv, use

    def forward(self, video):
        h = video.new_zeros(len(video), 4, *video.shape[-2:])
        for x in video.unbind(1):
            h = self.use(self.conv(torch.cat([x, h], 1)), h)
        return h


def _keep(f, g, h):
    return f.sigmoid() * h + (1 - f.sigmoid()) * g.tanh()


def test_gates_that_are_interleaved_are_left_alone():
    model = _Gated(nn.Conv2d(6, 8, 3, padding=1), lambda y, h: _keep(*y.unflatten(1, (4, 2)).unbind(2), h))
    with pytest.warns(UserWarning, match="conv, 4 -> 8 channels, whose gates are interleaved"):
        assert recurrent_blocks(model, VIDEO) == {}


def test_what_is_only_given_out_is_no_gate():
    model = _Gated(nn.Conv2d(6, 8, 3, padding=1), lambda y, h: _keep(y[:, :4], y[:, :4], h))
    assert recurrent_blocks(model, VIDEO) == {"conv": gate_blocks(4, 1, 2)}


def test_states_of_transposed_convolutions():
    torch.manual_seed(0)
    model = _Gated(nn.ConvTranspose2d(6, 8, 3, padding=1), lambda y, h: _keep(*y.chunk(2, 1), h))
    blocks = {"conv": [(slice(2, 6), slice(0, 4)), (slice(2, 6), slice(4, 8))]}
    assert recurrent_blocks(model, VIDEO) == blocks
    before = model(VIDEO)
    retrofit(model, VIDEO, blocks="recurrent")
    close(model(VIDEO), before)
    set_orthogonality(model, 1)
    train(model, VIDEO)
    for height, width in ((6, 5), (2, 3)):
        n = height * width
        M = operator(model.conv, (height, width)).double().reshape(2, 4 * n, 6, n)
        assert all(defect(gate[:, 2:].reshape(4 * n, 4 * n)) < 1e-5 for gate in M)


def test_compiled_networks_are_run_as_they_were_written():
    model, example, blocks = make("stacked [x, h]")
    graphs, backend = graphs_and_backend()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    assert recurrent_blocks(compiled, example) == {f"_orig_mod.{name}": b for name, b in blocks.items()}
    model.compile(backend=backend)
    assert recurrent_blocks(model, example) == blocks
    assert not graphs
    model(example)
    assert graphs
    torch.compiler.reset()


def test_one_step_of_time_shows_no_state():
    with pytest.raises(ValueError, match=r"two steps of time or more.*gate_blocks"):
        recurrent_blocks(ConvLSTM("zeros"), VIDEO[:, :1])
    feedforward = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    with pytest.raises(ValueError, match="two steps of time"):
        retrofit(feedforward, VIDEO[:, 0], blocks="recurrent")


def test_what_computes_something_else_each_time_is_refused():
    calls = []

    class Drifts(ConvLSTM):
        def forward(self, video):
            calls.append(0)
            return super().forward(video * len(calls))

    model = Drifts("zeros")
    with pytest.raises(ValueError, match="give the same values"):
        recurrent_blocks(model, VIDEO)
    retrofit(model, VIDEO, blocks={"gates": gate_blocks(4, 4, 2)})  # which are not checked then


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (gate_blocks(4, 4), r"read input channels 0:2.*Those that do: 2:6"),
        (gate_blocks(2, 4), r"read input channels 0:2"),
    ],
)
def test_blocks_that_read_no_state_are_named(blocks, words):
    with pytest.warns(UserWarning, match=words):
        retrofit(ConvLSTM("zeros"), VIDEO, blocks={"gates": blocks})


@pytest.mark.parametrize("name", [slow_if(name not in OFTEN, name) for name in RECURRENT])
def test_blocks_that_read_the_state_raise_no_warning(name):
    model, example, blocks = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="a normalisation directly follows")
        retrofit(model, example, blocks=blocks)


# What becomes of it


@pytest.mark.parametrize(
    ("name", "way"),
    [slow_if(w != "split" and n not in OFTEN, n, w) for n in RECURRENT for w in WAYS],
)
def test_one_line_makes_the_blocks_orthogonal_where_images_end(name, way):
    mode = "circular" if "circular" in way else "zeros"
    model, example, blocks = make(name, mode)
    before, outside = run(model, example), dict(model.named_parameters())
    assert retrofit(model, example, blocks="recurrent", **WAYS[way]) is model
    after = run(model, example)
    assert (after - before).norm() <= 1e-5 * before.norm()
    touched = {f"{name}.weight" for name in blocks}
    for key, parameter in model.named_parameters():
        if "parametrizations" not in key:
            assert parameter is outside[key]
    assert outside.keys() - touched == {
        k for k, _ in model.named_parameters() if "parametrizations" not in k
    }

    train(model, example, steps=1)
    for t in (0.5, 1):
        set_orthogonality(model, t)
        train(model, example, steps=2)
    sizes = ((6, 5), (3, 8)) if name != "pyramid" else ((4, 4), (2, 3))
    for size in sizes:
        for M in operators(model, blocks, size):
            if way == "split, zeros":
                assert torch.linalg.svdvals(M).max() < 1 + 1e-5
            else:
                assert defect(M) < 1e-5
    after = run(model, example)
    set_orthogonality(model, 1, final=True)
    close(run(model, example), after)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["split", "exponential"])
@pytest.mark.parametrize("name", ["stacked [x, h]", "GRU, separable"])
def test_in_double_precision(name, method):
    model, example, blocks = make(name, dtype=torch.float64)
    before = run(model, example)
    retrofit(model, example, blocks="recurrent", method=method)
    close(run(model, example), before, atol=1e-13, rtol=1e-13)
    set_orthogonality(model, 1)
    train(model, example)
    assert all(defect(M) < 1e-11 for size in ((6, 5), (1, 4)) for M in operators(model, blocks, size))


def test_by_polar_factors_it_is_what_it_was():
    model, example, blocks = make("stacked [x, h]", "circular")
    before = run(model, example)
    retrofit(model, example, blocks="recurrent", method="exponential")
    assert (run(model, example) - before).norm() <= 1e-5 * before.norm()
    set_orthogonality(model, 1)
    train(model, example)
    assert all(defect(M) < 1e-5 for M in operators(model, blocks, (6, 5)))
    with pytest.raises(ValueError, match="of the domain's size"):
        run(model, VIDEO[..., :4])


def test_select_restricts_what_is_found_and_blocks_touch_only_what_they_name():
    model, example, blocks = make("stacked [h, x], two layers, a list of states")
    retrofit(model, example, blocks="recurrent", select="cells.1.*")
    assert not parametrize.is_parametrized(model.cells[0].conv)
    assert parametrize.is_parametrized(model.cells[1].conv)
    model, example, blocks = make("GRU, separable")
    retrofit(model, example, blocks={"convq1": blocks["convq1"]})
    made = [
        n
        for n, m in model.named_modules()
        if isinstance(m, CONVOLUTIONS) and parametrize.is_parametrized(m)
    ]
    assert made == ["convq1"]
    with pytest.raises(ValueError, match=r"Found none among \['encode'\]"):
        retrofit(make("GRU, separable")[0], example, blocks="recurrent", select="encode")
    model = make("GRU, separable")[0]
    with pytest.raises(ValueError, match=r"Found none in \['encode'\]: call retrofit once more"):
        retrofit(model, example, blocks="recurrent", select=["convq1", "encode"])
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


class _Moving(nn.Module):
    """A ConvLSTM whose memory may move."""

    def __init__(self):
        super().__init__()
        self.gates = nn.Conv2d(1 + 4, 4 * 4, 3, padding=1)
        self.move = orthogonal(nn.Conv2d(4, 4, 3, padding=1), method="split", boundary="walls")

    def forward(self, video):
        h = c = video.new_zeros(len(video), 4, *video.shape[-2:])
        for x in video.unbind(1):
            i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = f.sigmoid() * self.move(c) + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


def test_a_second_call_says_that_the_blocks_are_orthogonal_already():
    model, video = ConvLSTM("zeros", hidden=3), torch.randn(1, 3, 2, 6, 6)
    retrofit(model, video, blocks="recurrent")
    before = model(video)
    with pytest.raises(ValueError, match=r"not orthogonal yet. Found only \['gates'\]"):
        retrofit(model, video, blocks="recurrent")
    assert torch.equal(model(video), before)


def test_what_is_orthogonal_already_is_left_alone():
    torch.manual_seed(0)
    model, video = _Moving(), torch.randn(2, 3, 1, 6, 5)
    before, moves = model(video), [*model.move.parameters()]
    assert set(recurrent_blocks(model, video)) == {"gates", "move"}
    retrofit(model, video, blocks="recurrent")
    torch.testing.assert_close(model(video), before)
    assert all(a is b for a, b in zip(moves, model.move.parameters(), strict=True))
    set_orthogonality(model, 1, final=True)
    assert [row.name for row in report(model, video).rows if row.parametrized == "yes"][-1] == "move"
    with pytest.raises(ValueError, match=r"not orthogonal yet\. Found only"):
        retrofit(model, video, blocks="recurrent")
    for options in ({"select": "move", "blocks": "recurrent"}, {"blocks": {"move": [(slice(0, 4),) * 2]}}):
        with pytest.raises(ValueError, match="move: module should not be parametrized yet"):
            retrofit(model, video, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"select": "draw", "blocks": {"gates": gate_blocks(4, 4, 2)}},
            ValueError,
            r"leaves out \['gates'\]",
        ),
        ({"blocks": "recurent"}, ValueError, 'blocks should be "recurrent" or a dict'),
        ({"blocks": {"gates": gate_blocks(4, 5, 2)}}, ValueError, "blocks should be within"),
        ({"method": "polar"}, ValueError, 'method should be "exponential" or "split"'),
        ({"replace": 1}, TypeError, "replace should be True or False"),
        ({"blocks": {}}, ValueError, "blocks should name a convolution at least"),
        ({"blocks": {"gates": 4}}, TypeError, "blocks should be lists of pairs of slices"),
        ({"blocks": {"gates": (slice(0, 4), slice(2, 6))}}, TypeError, "blocks should be lists of pairs"),
        ({"blocks": {"gates": [(0, 4)]}}, TypeError, "blocks should be pairs of slices"),
        ({"blocks": {0: gate_blocks(4, 4, 2)}}, TypeError, "names of convolutions as keys"),
    ],
)
def test_messages_name_the_way_out(options, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        retrofit(ConvLSTM("zeros"), VIDEO, **options)


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (ConvLSTM, VIDEO, TypeError, "model should be an nn.Module: make one first"),
        (len, VIDEO, TypeError, r"model should be an nn.Module\. Found"),
        (ConvLSTM("zeros").to("meta"), VIDEO, ValueError, "weights should have values"),
        (ConvLSTM("zeros"), VIDEO * torch.nan, ValueError, "should be finite"),
        (ConvLSTM("zeros"), VIDEO[:0], ValueError, "the batch not empty"),
    ],
)
def test_models_and_examples_that_cannot_be_run(model, example, error, message):
    for act in (recurrent_blocks, lambda m, x: retrofit(m, x, blocks="recurrent")):
        with pytest.raises(error, match=message):
            act(model, example)
    with pytest.raises(TypeError, match="rectangular should be True or False"):
        recurrent_blocks(ConvLSTM("zeros"), VIDEO, rectangular="yes")


def test_a_container_is_told_what_is_in_it():
    model, example, _ = make("stacked [h, x], two layers, a list of states")
    for options in ({"blocks": {"cells.0": gate_blocks(4, 4)}}, {"select": "cells.0"}):
        with pytest.raises(TypeError, match=r"'cells\.0', a Cell, in which there are \['cells\.0\.conv'\]"):
            retrofit(model, example, **options)


def test_a_convolution_of_one_gate_is_told_its_block():
    model, example, _ = make("separate convolutions, peepholes")
    with pytest.raises(
        ValueError, match=r"a convolution of its own, each has one block: gate_blocks\(4, 1\)"
    ):
        retrofit(model, example, blocks={"Whi": gate_blocks(4, 4)})


def test_a_map_smaller_than_the_kernel_is_told_of_walls():
    model = nn.Sequential(nn.Conv2d(2, 2, 7, padding=3, padding_mode="zeros"))
    x = torch.ones(1, 2, 2, 9)
    with pytest.raises(ValueError, match='use boundary="walls"'):
        retrofit(model, x, boundary="circular")
    retrofit(model, x)
    set_orthogonality(model, 1)
    assert defect(operator(model[0], (2, 9))) < 1e-5


def test_orders_of_gate_blocks():
    assert gate_blocks(3, 2, 4, order="hx") == gate_blocks(3, 2)
    assert gate_blocks(3, 2, 4) == [(slice(0, 3), slice(4, 7)), (slice(3, 6), slice(4, 7))]
    with pytest.raises(ValueError, match='order should be "xh" or "hx"'):
        gate_blocks(3, 2, 4, order="xx")


# Examples


@pytest.mark.parametrize(
    "example", [(VIDEO, states()), [VIDEO, states()], {"video": VIDEO, "states": states()}]
)
def test_examples_of_every_form(example):
    model = make("stacked [h, x], two layers, a list of states")[0]
    assert len(recurrent_blocks(model, example)) == 2


def test_a_list_may_be_the_only_argument():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ConvLSTM("zeros")

        def forward(self, frames):
            return self.inner(torch.stack(frames, 1))

    assert "inner.gates" in recurrent_blocks(Frames(), list(VIDEO.unbind(1)))


def test_states_on_self_are_put_back():
    model = Keeps("zeros")
    state, entry = torch.ones(2, 4, 6, 5), torch.zeros(1)
    model.state, model.log, model.note = state, [entry], {"a": [1]}
    log = model.log
    retrofit(model, VIDEO, blocks="recurrent")
    report(model, VIDEO)
    assert model.state is state
    assert torch.equal(state, torch.ones_like(state))
    assert model.log is log
    assert len(log) == 1
    assert log[0] is entry
    assert model.seen == 0
    peepholes = Peepholes("zeros")
    retrofit(peepholes, VIDEO, blocks="recurrent")
    assert peepholes.Wci is None  # made at the first call, of this example's size

    class InPlace(Keeps):
        def forward(self, video):
            self.extra = 1
            self.state.add_(1)
            return super().forward(video)

    model = InPlace("zeros")
    model.state = torch.zeros(2, 4, 6, 5)
    retrofit(model, VIDEO, blocks="recurrent")
    assert not model.state.any()
    assert not hasattr(model, "extra")


def test_states_on_objects_are_put_back():
    class State:
        def __init__(self):
            self.h, self.count = None, np.zeros(1)

    class Holds(Keeps):
        def forward(self, video):
            kept = self.kept
            for x in video.unbind(1):
                h = torch.zeros_like(self.inner(x)) if kept.h is None else kept.h
                kept.h = torch.tanh(self.inner(x) + self.recur(h))
                kept.count += 1
            return kept.h

    for kept in (State(), SimpleNamespace(h=None, count=np.zeros(1))):
        model = Holds("zeros")
        model.kept = kept
        retrofit(model, VIDEO, blocks="recurrent")
        assert kept.h is None
        assert not kept.count.any()


# Kernels once per call


def counted(monkeypatch):
    """How often a kernel's factors have been computed."""
    calls = []
    original = SplitExponential.factors

    def factors(self, X):
        calls.append(self)
        return original(self, X)

    monkeypatch.setattr(SplitExponential, "factors", factors)
    return calls


@pytest.mark.parametrize("anneal", [True, False])
def test_a_step_of_training_composes_each_kernel_once(monkeypatch, anneal):
    model, example, _ = make("stacked [h, x], two layers, a list of states")
    retrofit(model, example, blocks="recurrent", anneal=anneal)
    calls = counted(monkeypatch)
    train(model, example, steps=1)
    assert len(calls) == len(set(map(id, calls))) == 2
    train(model, example, steps=2)
    assert len(calls) == 6  # nothing is kept from one call to the next


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without(way):
    model, example, _ = make("GRU", dtype=torch.float64)
    retrofit(model, example, blocks="recurrent", **WAYS[way])
    set_orthogonality(model, 0.6)
    twin = copy.deepcopy(model)
    for module in (twin,):
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    for m in (model, twin):
        run(m, example).square().sum().backward()
    close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert model._forward_pre_hooks
    assert all(p.grad is not None for p in generators(model))


def test_nothing_is_kept_after_a_call_that_raises():
    model, example, _ = make("stacked [x, h]")
    retrofit(model, example, blocks="recurrent")
    set_orthogonality(model, 1)
    with pytest.raises(ValueError, match="should have 6 channels"):
        model(VIDEO[:, :, :1])
    before = run(model, example)
    with torch.no_grad():
        generators(model)[0].add_(0.3)
    assert (run(model, example) - before).norm() > 1e-3


def test_a_backward_pass_at_each_step():
    """Within one call of the model, each of them frees the graph of the kernels."""

    class Truncated(Keeps):
        def forward(self, video):
            for x in video.unbind(1):
                state = torch.zeros_like(self.inner(x)) if self.state is None else self.state
                self.state = torch.tanh(self.inner(x) + self.recur(state))
                if self.training and torch.is_grad_enabled():
                    self.state.square().mean().backward()
                    self.state = self.state.detach()
            return self.state

    ways = {**WAYS, "polar": {"method": "exponential", "boundary": "circular"}}
    for way in ways.values():
        torch.manual_seed(0)
        model = Truncated("zeros")
        retrofit(model, VIDEO, blocks="recurrent", **way)
        set_orthogonality(model, 0.5)
        twin = copy.deepcopy(model)
        twin._forward_pre_hooks.clear()
        for m in (model, twin):
            m.state = None
            m(VIDEO)
        close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("change", ["in place", "loading"])
@pytest.mark.parametrize("within", ["a call", "a block"])
def test_nothing_is_stale_when_parameters_change(change, within):
    model, example, _ = make("stacked [x, h]")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    retrofit(model, example, blocks="recurrent")
    set_orthogonality(model, 0.5)

    class Altered(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            before = self.model.gates(x)
            with torch.no_grad():
                if change == "loading":
                    self.model.load_state_dict(state)
                else:
                    generators(self.model)[0].mul_(0.5).add_(0.1)
            return before, self.model.gates(x)

    x, outer = random(1, 6, 6, 5).float(), Altered()
    if within == "a call":
        KeptForCalls.install(outer)
        before, after = outer(x)
    else:
        with parametrize.cached():
            before, after = outer(x)
    assert (after - before).norm() > 1e-3
    close(after, model.gates(x))


def test_calls_within_calls_and_two_models_at_once(monkeypatch):
    a, example, _ = make("stacked [x, h]")
    b = copy.deepcopy(a)
    for model in (a, b):
        retrofit(model, example, blocks="recurrent")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, video):
            return self.a(video) + self.b(video) + self.a(video)

    both = Both()
    expected = 2 * a(VIDEO) + b(VIDEO)
    close(both(VIDEO), expected)
    calls = counted(monkeypatch)
    both(VIDEO)
    assert len(calls) == 3  # each call of each model
    with torch.no_grad(), parametrize.cached():
        both(VIDEO)
        both(VIDEO)
    assert len(calls) == 5  # each model, since the block lasts longer


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_steps_that_are_computed_again_for_the_backward_pass(way, reentrant):
    class Checkpointed(ConvLSTM):
        def forward(self, video):
            h = c = video.new_zeros(len(video), self.hidden, *video.shape[-2:])

            def step(x, h, c):
                write, keep, read, value = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
                c = keep.sigmoid() * c + write.sigmoid() * value.tanh()
                return read.sigmoid() * c.tanh(), c

            for x in video.unbind(1):
                if self.training:
                    h, c = checkpoint(step, x, h, c, use_reentrant=reentrant)
                else:
                    h, c = step(x, h, c)
            return self.draw(h)

    torch.manual_seed(0)
    model = Checkpointed("zeros")
    retrofit(model, VIDEO, blocks="recurrent", **WAYS[way])
    set_orthogonality(model, 0.5)
    gradients = []
    for mode in (True, False):
        model.train(mode).zero_grad()
        model(VIDEO.requires_grad_(reentrant)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    VIDEO.requires_grad_(False)
    close(*gradients)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [slow_if(way != "split", way) for way in WAYS])
def test_compiled_whole(way):
    torch.compiler.reset()
    model, example, _ = make("stacked [x, h]")
    retrofit(model, example, blocks="recurrent", **WAYS[way])
    graphs, backend = graphs_and_backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for t in (0, 0.3, 1):
        set_orthogonality(model, t)
        close(compiled(VIDEO), model(VIDEO), atol=1e-6, rtol=1e-5)
    compiled(VIDEO).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("raises", [False, True])
def test_compiled_in_parts_nothing_is_kept(raises):
    class Broken(ConvLSTM):
        def forward(self, video):
            y = super().forward(video[:, :2])
            torch._dynamo.graph_break()
            if raises and video.shape[1] > 3:
                raise ValueError("in between")
            return y + super().forward(video)

    torch.compiler.reset()
    torch.manual_seed(0)
    model = Broken("zeros")
    retrofit(model, VIDEO[:, :3], blocks="recurrent")
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        if raises:
            with pytest.raises(ValueError, match="in between"):
                compiled(VIDEO)
        close(compiled(VIDEO[:, :3]), model(VIDEO[:, :3]))
        assert keeping._traced is None
        with torch.no_grad():
            generators(model)[0].add_(0.1)
        set_orthogonality(model, 1)
    torch.compiler.reset()


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("way", ["split", "exponential", "exponential, circular"])
def test_saved_halfway_and_continued_in_a_new_process(way, tmp_path):
    """Model and optimizer saved at t = 0.5; the losses are those without the break."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_recurrent import make, run, retrofit, set_orthogonality
torch.set_num_threads(1)
model, example, _ = make("GRU", {"circular" if "circular" in way else "zeros"!r})
retrofit(model, example, blocks="recurrent", method={way.partition(",")[0]!r})
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

def step():
    optimizer.zero_grad()
    loss = (run(model, example) - 0.3).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()

if sys.argv[1] == "first":
    for t in (0.2, 0.5):
        set_orthogonality(model, t)
        step()
    torch.save((model.state_dict(), optimizer.state_dict()), {str(tmp_path / "half.pt")!r})
else:
    states = torch.load({str(tmp_path / "half.pt")!r}, weights_only=True)
    model.load_state_dict(states[0], strict=True)
    optimizer.load_state_dict(states[1])
losses = [step(), step()]
set_orthogonality(model, 0.8)
print(losses + [step(), step()])
"""
    runs = [
        subprocess.run([sys.executable, "-c", program, part], capture_output=True, text=True, check=True)
        for part in ("first", "second")
    ]
    first, second = (torch.tensor(eval(run.stdout)) for run in runs)
    assert first[0] > first[-1]
    close(first, second)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("way", "t"), [slow_if(t != 0.5 and w != "split", w, t) for w in WAYS for t in (0, 0.5, 1)]
)
def test_a_plain_checkpoint_means_start_from_these_weights(way, t):
    model, example, _ = make("GRU")
    torch.manual_seed(1)
    other = RECURRENT["GRU"][0]("circular" if "circular" in way else "zeros")
    retrofit(model, example, blocks="recurrent", **WAYS[way])
    set_orthogonality(model, t)
    train(model, example, steps=1)
    model.load_state_dict(other.state_dict(), strict=True)
    close(run(model, example), run(other, example))
    set_orthogonality(model, 1)
    cliff = retrofit(other, example, blocks="recurrent", anneal=False, **WAYS[way])
    close(run(model, example), run(cliff, example), atol=2e-5, rtol=1e-4)


def test_a_checkpoint_of_another_method_or_boundary_is_refused_in_words():
    made = {}
    for way, options in WAYS.items():
        model, example, _ = make("GRU")
        made[way] = retrofit(model, example, blocks="recurrent", **options)
    for source in made.values():
        for target in made.values():
            if target is source:
                continue
            before = {key: value.clone() for key, value in target.state_dict().items()}
            with pytest.raises(
                RuntimeError, match=r"the checkpoint should be of a convolution with (method|bound)"
            ):
                target.load_state_dict(source.state_dict())
            after = target.state_dict()
            assert all(torch.equal(after[k], v) for k, v in before.items() if "parametrizations" in k)


def size_of(model):
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell()


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("method", ["split", "exponential"])
def test_a_finished_models_checkpoint_is_small(method, kernel):
    model = _Between("xh")
    model.gates = nn.Conv2d(2 + 32, 4 * 32, kernel, padding=kernel // 2)

    class Wide(_Between):
        def forward(self, video):
            h = c = video.new_zeros(len(video), 32, *video.shape[-2:])
            for x in video.unbind(1):
                i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            return h

    model.__class__ = Wide
    plain = size_of(model)
    retrofit(model, VIDEO, blocks="recurrent", method=method)
    assert size_of(model) < 2.5 * plain
    set_orthogonality(model, 1, final=True)
    assert size_of(model) < 1.5 * plain
    numbers = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert numbers < 1.5 * 4 * (plain // 4)


# Norms

NORMS = [
    nn.utils.spectral_norm,
    parametrizations.spectral_norm,
    pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    parametrizations.weight_norm,
]


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_replaced_by_the_value_that_they_give(norm):
    torch.manual_seed(0)
    model, example, blocks = Sampler("zeros", norm), {"latent": LATENT, "steps": 4}, RECURRENT["sampler"][2]
    run(model, example)
    model.eval()
    before, text = run(model, example), repr(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"(?s)read_gate: its weight .*_norm: replace=True"):
        retrofit(model, example, blocks="recurrent")
    wrong = {**blocks, "up.0": [(slice(0, 9), slice(0, 4))]}  # seen once some norms have been removed
    with pytest.raises(ValueError, match="blocks should be within"):
        retrofit(model, example, blocks=wrong, replace=True)
    assert repr(model) == text
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameters[key] is p for key, p in model.named_parameters())
    close(dict(model.state_dict()), state, rtol=0, atol=0)
    close(run(model, example), before, rtol=0, atol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
def test_checkpoints_of_normed_models_load(norm):
    torch.manual_seed(0)
    example, blocks = {"latent": LATENT, "steps": 4}, RECURRENT["sampler"][2]
    model = Sampler("zeros", norm)
    run(model, example)  # a step of the power iteration
    model.eval()
    before = run(model, example)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    retrofit(model, example, blocks="recurrent", replace=True)
    close(run(model, example), before)
    assert parametrize.is_parametrized(model.read_gate)
    set_orthogonality(model, 1)
    train(model, example)
    model.eval()
    assert all(defect(M) < 1e-5 for M in operators(model, blocks, (6, 5)))
    model.load_state_dict(state, strict=True)
    close(run(model, example), before)


# What is said of it


def test_a_normalisation_that_follows_at_once_is_told():
    torch.manual_seed(0)
    model = Pyramid("zeros")
    with pytest.warns(UserWarning, match=r"directly follows.*stages\.0\.conv\.0 \(group_norm\)"):
        retrofit(model, VIDEO[..., :4, :4], blocks="recurrent")
    text = str(report(model, VIDEO[..., :4, :4]))
    assert "stages.0.conv.0 is directly followed by group_norm, which" in text
    assert "down.0 is directly followed" not in text
    model, example, _ = make("GRU")
    retrofit(model, example, blocks="recurrent")
    assert "normalised" not in str(report(model, example))


def test_one_channel_in_a_group_takes_the_exponential():
    for mode in ("zeros", "circular"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode=mode),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode),
        )
        x = random(2, 4, 6, 5).float()
        before = model(x)
        retrofit(model, x)
        close(model(x), before)
        set_orthogonality(model, 1)
        assert all(
            defect(operator(conv, size)) < 1e-5 for conv in model for size in ((6, 5), (3, 1), (9, 8))
        )
        rows = report(model, x).rows
        assert [row.method for row in rows] == ["exponential", "split"]
        assert [row.defect < 1e-5 for row in rows] == [True, True]


@pytest.mark.parametrize("boundary", [None, "circular"])
def test_weights_that_are_read_outside_keep_their_shape(boundary):
    torch.manual_seed(0)
    model, example, _ = make("stacked [x, h]")
    retrofit(model, example, blocks="recurrent", boundary=boundary)
    set_orthogonality(model, 0.5)
    assert model.gates.weight.shape == (16, 6, 3, 3)
    loss = run(model, example).square().mean() + model.gates.weight.square().mean()
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        close(model.gates.weight.square().sum(), model.gates.weight.norm() ** 2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["split", "exponential"])
@pytest.mark.parametrize("t", [0.4, 1, None])
def test_what_removal_leaves_computes_the_same(method, t):
    model, example, _ = make("GRU")
    retrofit(model, example, blocks="recurrent", method=method)
    set_orthogonality(model, 1 if t is None else t, final=t is None)
    train(model, example)
    before = run(model, example)
    for conv in (model.gates, model.candidate):
        parametrize.remove_parametrizations(conv, "weight")
    close(run(model, example), before)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    close(copy.deepcopy(model)(example), before.reshape(model(example).shape))
    close(torch.jit.script(model.gates)(torch.ones(1, 6, 4, 3)), model.gates(torch.ones(1, 6, 4, 3)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("t", [0, 0.5, 1])
@pytest.mark.parametrize("way", WAYS)
def test_updating_the_base_changes_nothing(way, t):
    model, example, _ = make("stacked [x, h]", dtype=torch.float64)
    retrofit(model, example, blocks="recurrent", **WAYS[way])
    set_orthogonality(model, t)
    train(model, example)
    before = run(model, example)
    geotorch.utils.update_base(model.gates, "weight")
    close(run(model, example), before)


def test_a_retrofitted_model_says_how_it_is_saved():
    model, example, _ = make("stacked [x, h]")
    retrofit(model, example, blocks="recurrent")
    with pytest.raises(RuntimeError, match=r"saved by its state_dict\(\), or after"):
        torch.save(model, io.BytesIO())
    parametrizations.spectral_norm(model.draw)  # of torch, which keeps none of these hooks
    parametrize.remove_parametrizations(model.gates, "weight")
    assert not model._forward_hooks
    parametrize.remove_parametrizations(model.draw, "weight")
    torch.save(model, io.BytesIO())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "t", "dynamo"),
    [
        ("split", 0.5, True),
        ("split", None, False),
        ("exponential", 0.5, False),
        ("exponential", None, True),
    ],
)
def test_another_runtime_gives_the_same(method, t, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, example, _ = make("stacked [x, h]")
    retrofit(model, example, blocks="recurrent", method=method)
    set_orthogonality(model, t or 1, final=t is None)
    train(model, example)
    parametrize.remove_parametrizations(model.gates, "weight")
    model.eval()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (example,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    close(torch.from_numpy(found), model(example), atol=1e-5, rtol=1e-4)


def test_a_gate_that_two_steps_do_not_show_is_warned_of():
    torch.manual_seed(0)
    model = ConvLSTM("zeros")
    with pytest.warns(UserWarning, match="seen at the third"):
        two = recurrent_blocks(model, VIDEO[:, :2])
    three = recurrent_blocks(model, VIDEO[:, :3])
    assert len(two["gates"]) == 3
    assert len(three["gates"]) == 4
