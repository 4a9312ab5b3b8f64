"""An orthogonal module behaves as torch's own class does, wherever it is put."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections import OrderedDict
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from geotorch.utils import update_base
from models import ConvLSTM, evaluated
from oracles import fed
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close as close

import orthoconv_param
from orthoconv_param import (
    ConvExponential,
    functional,
    orthogonal,
    orthogonality_defect,
    retrofit,
    set_orthogonality,
    singular_values,
)
from orthoconv_param.lifecycle import Removed, removed_class

CIRCULAR, ZEROS = {"boundary": "circular"}, {"boundary": "zeros"}
# convolution, arguments, options, of `orthogonal`, size of the images
GEOMETRIES = {
    "domain between zeros": (nn.Conv2d, (4, 4, 3), {"padding": 1}, {"domain": (8, 8), **ZEROS}, (8, 8)),
    "domain between zeros, strided": (
        nn.Conv2d, (4, 6, 3), {"padding": 1, "stride": 2}, {"domain": 8, **ZEROS}, (8, 8),
    ),
    "domain between zeros, transposed": (
        nn.ConvTranspose2d, (4, 4, 3), {"padding": 1, "stride": 2, "output_padding": 1},
        {"domain": (8, 6), **ZEROS}, (4, 3),
    ),
    "domain between zeros, transposed, even": (
        nn.ConvTranspose2d, (3, 3, 2), {"stride": 2}, {"domain": 6, **ZEROS}, (3, 3),
    ),
    "domain between zeros, transposed, stride 1": (
        nn.ConvTranspose2d, (3, 3, 3), {"padding": 1}, {"domain": (5, 6), **ZEROS}, (5, 6),
    ),
    "domain between zeros, even": (
        nn.Conv2d, (3, 3, (2, 4)), {"padding": "same"}, {"domain": 5, **ZEROS}, (5, 5),
    ),
    "even": (nn.Conv2d, (3, 3, (2, 4)), {"padding": "same"}, {}, (6, 5)),
    "transposed even": (nn.ConvTranspose2d, (4, 4, (2, 4)), {"stride": 2, "padding": (0, 1)}, {}, (3, 4)),
    "transposed circular": (nn.ConvTranspose2d, (4, 4, 3), {"padding": 1}, {}, (10, 9)),
    "transposed strided": (
        nn.ConvTranspose2d, (8, 2, 3), {"padding": 1, "stride": 2, "output_padding": 1}, {}, (9, 10),
    ),
    "strided circular": (nn.Conv2d, (2, 8, 3), {"padding": 1, "stride": 2}, {"domain": (8, 8)}, (8, 8)),
    "strided, grouped, no bias": (
        nn.Conv2d, (4, 8, 2), {"stride": 2, "groups": 2, "bias": False}, {"domain": (6, 8)}, (6, 8),
    ),
    "smaller than the kernel": (nn.Conv2d, (3, 3, 3), {"padding": 1}, {}, (4, 5)),
    "single pixel": (nn.Conv2d, (3, 3, 3), {"padding": 1}, {}, (1, 1)),
    "torch's own": (nn.Conv2d, (3, 3, 3), {"padding": 1}, {}, (24, 24)),
    "between zeros, every domain": (nn.Conv2d, (3, 3, 3), {"padding": 1}, ZEROS, (12, 12)),
    "dilated": (nn.Conv2d, (3, 3, 3), {"padding": 2, "dilation": 2}, {"domain": 9, **ZEROS}, (9, 9)),
    "1d": (nn.Conv1d, (3, 3, 3), {"padding": 1}, {"domain": (9,), **ZEROS}, (9,)),
    "1d transposed": (nn.ConvTranspose1d, (3, 3, 3), {"padding": 1}, {}, (9,)),
    "3d": (nn.Conv3d, (2, 2, 3), {"padding": 1}, {"domain": (3, 4, 5), **ZEROS}, (3, 4, 5)),
    "3d transposed": (nn.ConvTranspose3d, (2, 2, 3), {"padding": 1}, {"domain": 4}, (4, 4, 4)),
}  # fmt: skip


def convolution(geometry, seed=0):
    """An orthogonal convolution that is trained a little, and images for it."""
    cls, arguments, options, how, size = GEOMETRIES[geometry]
    torch.manual_seed(seed)
    conv = orthogonal(cls(*arguments, **options), **how)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return conv, torch.randn(2, arguments[0], *size)


def removed(geometry, called=True, seed=0):
    """What removal leaves of it, images, and what it gave."""
    conv, x = convolution(geometry, seed)
    y = copy.deepcopy(conv)(x).detach()
    if called:
        conv(x)
    parametrize.remove_parametrizations(conv, "weight")
    return conv, x, y


def near(a, b):
    close(a, b, atol=2e-5, rtol=1e-5)


# What removal leaves


class Halve(nn.Module):
    def forward(self, X):
        return X / 2


def assign(module):
    module.weight = nn.Parameter(module.weight.detach().flip(0) / 3)


def assign_frozen(module):
    module.weight = nn.Parameter(module.weight.detach() / 3, requires_grad=False)


def load_assigned(module):
    state = {"weight": module.weight.detach() * 2}
    if module.bias is not None:
        state["bias"] = module.bias.detach() + 1
    module.load_state_dict(state, assign=True)


def load(module):
    state = {"weight": module.weight.detach() * 2}
    if module.bias is not None:
        state["bias"] = module.bias.detach() + 1
    module.load_state_dict(state)


def set_data(module):
    module.weight.data = module.weight.data / 3
    module._parameters["weight"].data.mul_(2)


def delete(module):
    W = module.weight.detach().clone()
    del module.weight
    module.register_parameter("weight", nn.Parameter(W / 2))


def as_buffer(module):
    W = module.weight.detach().clone()
    del module.weight
    module.register_buffer("weight", W / 2)


def prune_it(module):
    prune.l1_unstructured(module, "weight", amount=0.5)


def prune_channels(module):
    prune.ln_structured(module, "weight", amount=0.5, n=2, dim=0)


def prune_and_remove(module):
    prune.l1_unstructured(module, "weight", amount=0.3)
    prune.l1_unstructured(module, "weight", amount=0.3)
    prune.remove(module, "weight")


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Halve())


def parametrized_and_removed(module):
    parametrized(module)
    parametrize.remove_parametrizations(module, "weight")


def parametrized_and_taken_back(module):
    parametrized(module)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def weight_norm(module):
    nn.utils.parametrizations.weight_norm(module)


def weight_norm_of_before(module):
    nn.utils.weight_norm(module)


def weight_norm_of_before_and_removed(module):
    nn.utils.weight_norm(module)
    module.weight_g.data.mul_(2)
    nn.utils.remove_weight_norm(module)


def spectral_norm(module):
    torch.manual_seed(7)
    nn.utils.parametrizations.spectral_norm(module).eval()


def spectral_norm_of_before(module):
    torch.manual_seed(7)
    nn.utils.spectral_norm(module).eval()


def spectral_norm_of_before_and_removed(module):
    torch.manual_seed(7)
    nn.utils.spectral_norm(module)
    nn.utils.remove_spectral_norm(module)


def without_bias(module):
    module.bias = None


def train(module):
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        module.weight.square().sum().backward()
        optimizer.step()


TOUCHES = [
    assign, assign_frozen, load_assigned, load, set_data, delete, as_buffer, prune_it, prune_channels,
    prune_and_remove, parametrized, parametrized_and_removed, parametrized_and_taken_back, weight_norm,
    weight_norm_of_before, weight_norm_of_before_and_removed, spectral_norm, spectral_norm_of_before,
    spectral_norm_of_before_and_removed, without_bias, train,
]  # fmt: skip


def some_of(names):
    """Every sixth by default, the others where the exhaustive tests run."""
    return [pytest.param(n, marks=() if i % 6 == 0 else pytest.mark.slow) for i, n in enumerate(names)]


@pytest.fixture(params=some_of(GEOMETRIES))
def geometry(request):
    return request.param


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated")
def test_what_touches_a_weight_after_removal_means_what_it_means_for_torch(geometry):
    """The kernel becomes that of torch's class, to which the same is done; and it is applied."""
    cls, arguments, options, _, _size = GEOMETRIES[geometry]
    for touch in TOUCHES:
        module, x, _ = removed(geometry)
        other, x2, y2 = removed(geometry, seed=1)
        reference, plain = copy.deepcopy(module), cls(*arguments, **options)
        for name, parameter in module.named_parameters():
            setattr(plain, name, nn.Parameter(parameter.detach().clone()))
        classes = {c: dict(vars(c)) for c in (type(module), removed_class(cls), Removed, cls)}
        touch(module)
        touch(plain)
        assert {c: dict(vars(c)) for c in classes} == classes, touch
        assert list(module.state_dict()) == list(plain.state_dict()), touch
        assert [n for n, _ in module.named_parameters()] == [n for n, _ in plain.named_parameters()], touch
        if "norm_of_before" in touch.__name__:  # computed by hooks before a call
            for hook in plain._forward_pre_hooks.values():
                hook(plain, (x,))
            y = module(x)
        assert torch.equal(module.weight, plain.weight), touch
        y = module(x)
        with torch.no_grad():
            reference.weight.copy_(plain.weight)
            if plain.bias is None:
                reference.bias = None
            elif reference.bias is not None:
                reference.bias.copy_(plain.bias)
        near(y, reference(x))
        near(
            copy.deepcopy(module)(x), y
        ) if "norm_of_before" not in touch.__name__ and "prune" not in touch.__name__ else None
        if not parametrize.is_parametrized(module):
            near(pickle.loads(pickle.dumps(module))(x), y)
        if any(p.requires_grad for p in module.parameters()):
            y.square().sum().backward()
            assert all(p.grad is not None for p in module.parameters() if p.requires_grad), touch
        near(other(x2), y2)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated")
def test_a_batch_norm_is_fused(geometry):
    _cls, *_, size = GEOMETRIES[geometry]
    module, x, y = removed(geometry)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(size) - 1](y.shape[1])
    norm(10 * y + 3)  # its statistics
    if module.groups > 1 and module.transposed:
        return
    fused = fuse_conv_bn_eval(module.eval(), norm.eval(), transpose=module.transposed)
    near(fused(x), norm(y))
    near(module(x), y)
    assert type(fused) is type(module)


@pytest.mark.parametrize("called", [False, True])
def test_it_is_made_orthogonal_and_removed_again(geometry, called):
    boundary = GEOMETRIES[geometry][3].get("boundary", "circular")
    module, x, y = removed(geometry, called)
    near(module(x), y)
    strides = module.stride if module.transposed else (1,) * len(module.stride)
    seen = [s * n for s, n in zip(strides, x.shape[2:], strict=True)]
    # its kernel may be that of a larger torus than the images
    domain = tuple(
        s * -(-max(n, k) // s) for n, k, s in zip(seen, module.weight.shape[2:], module.stride, strict=True)
    )
    orthogonal(module, domain=domain, boundary=boundary)
    x = torch.randn(1, x.shape[1], *fed(module.operator.geometry, domain))
    y = module(x)
    if boundary == "circular":
        singular = singular_values(module, domain)
        close(singular, torch.ones_like(singular), atol=1e-5, rtol=0)
    parametrize.remove_parametrizations(module, "weight")
    near(module(x), y)
    near(copy.deepcopy(module)(x), y)
    near(pickle.loads(pickle.dumps(module))(x), y)
    assert type(module).__mro__.count(Removed) <= 1


def test_no_class_is_ever_changed():
    """What is done to one of two of each class that removal leaves, or torch's, no other notices."""
    modules = {}
    for name in GEOMETRIES:
        module, x, y = removed(name)
        modules[name] = module, x, y
    classes = {type(m) for m, _, _ in modules.values()} | {Removed, nn.Conv2d, nn.ConvTranspose2d}
    before = {c: dict(vars(c)) for c in classes}
    living = [convolution(name) for name in GEOMETRIES]
    expected = [copy.deepcopy(m)(x) for m, x in living]
    for name in GEOMETRIES:
        for touch in (parametrized_and_removed, prune_and_remove, assign, weight_norm):
            module, _, _ = removed(name, seed=1)
            touch(module)
        convolution(name, seed=2)
    assert {c: dict(vars(c)) for c in classes} == before
    assert not any(isinstance(v, property) and k == "weight" for c in classes for k, v in vars(c).items())
    for module, x, y in modules.values():
        near(module(x), y)
    for (module, x), y in zip(living, expected, strict=True):
        near(module(x), y)


@pytest.mark.parametrize("first", ["copy", "original"])
def test_removal_on_a_copy_leaves_the_original_and_vice_versa(geometry, first):
    module, x = convolution(geometry)
    twin = copy.deepcopy(module)
    y = copy.deepcopy(module)(x)
    one, other = (twin, module) if first == "copy" else (module, twin)
    parametrize.remove_parametrizations(one, "weight")
    with torch.no_grad():
        one.weight.zero_()
    assert parametrize.is_parametrized(other, "weight")
    near(other(x), y)
    near(copy.deepcopy(other)(x), y)
    parametrize.remove_parametrizations(other, "weight")
    near(other(x), y)
    assert not one(x).sub(0 if one.bias is None else one.bias.reshape(-1, *(1,) * (x.ndim - 2))).any()


def test_a_copy_never_reads_what_was_cached_of_another(geometry):
    module, x = convolution(geometry)
    y = module(x)
    with parametrize.cached():
        module(x)
        W = module.weight
        twin = copy.deepcopy(module)
        with torch.no_grad():
            twin.parametrizations.weight.original.add_(
                0.3 * torch.randn_like(W.sum())
                + 0.3 * torch.randn_like(twin.parametrizations.weight.original)
            )
        found, kernel = twin(x), twin.weight
        near(module(x), y)
        assert module.weight is W
        again = copy.deepcopy(twin)
        near(again(x), found)
        del again
        for _ in range(3):  # one may lie where another lay
            third = copy.deepcopy(twin)
            with torch.no_grad():
                third.parametrizations.weight.original.mul_(0.5).add_(
                    torch.randn_like(third.parametrizations.weight.original)
                )
            inside = third(x)
            outside = copy.deepcopy(third)
            del third
            assert not torch.allclose(inside, found, atol=1e-3) or x.shape[2:] == (1, 1)
            del outside
    near(twin(x), found)
    assert not torch.allclose(found, y, atol=1e-3) or x.shape[2:] == (1, 1)
    close(kernel, twin.weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("order", [("weight", "bias"), ("bias", "weight")])
@pytest.mark.parametrize("copied", [0, 1, 2])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_parametrized_bias_beside_it_copied_and_removed(order, copied, earlier):
    for geometry in ("domain between zeros", "transposed circular", "torch's own", "1d"):
        cls, arguments, options, how, size = GEOMETRIES[geometry]
        conv = cls(*arguments, **options)
        orthogonal(conv, **how)
        if earlier:
            x = torch.randn(2, arguments[0], *size)
            conv(x)
        parametrize.register_parametrization(conv, "bias", Halve())
        x = torch.randn(2, arguments[0], *size)
        y = conv(x)
        twins = []
        for i, name in enumerate(order):
            if i == copied:
                twins.append(copy.deepcopy(conv))
            parametrize.remove_parametrizations(conv, name)
            near(conv(x), y)
            assert not parametrize.is_parametrized(conv, name)
        twins.append(copy.deepcopy(conv))
        for twin in twins:
            near(twin(x), y)
            for name in order:
                if parametrize.is_parametrized(twin, name):
                    parametrize.remove_parametrizations(twin, name)
                    near(twin(x), y)
            assert not parametrize.is_parametrized(twin)
            assert type(twin) is type(conv)
            assert "Parametrized" not in type(twin).__name__
            assert sorted(twin.state_dict()) == ["bias", "weight"]
            with torch.no_grad():
                twin.weight.zero_()
                twin.bias.fill_(1)
            assert bool((twin(x) == 1).all())
        near(conv(x), y)


# What removal leaves, seen by compilers


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants then
@pytest.mark.parametrize("called", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scripts_and_traces_compute_the_same(geometry, called):
    module, x, y = removed(geometry, called)
    model = nn.Sequential(OrderedDict(conv=module, act=nn.Tanh()))
    for subject, expected in ((module, y), (model, y.tanh())):
        scripted = torch.jit.script(subject)
        near(scripted(x), expected)
        near(scripted(x[0]), expected[0])
        near(scripted(x), expected)  # a second call may be optimised
        near(torch.jit.trace(subject, (x,))(x), expected)
        if subject is model:
            continue
        near(copy.deepcopy(scripted)(x), expected)
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        near(torch.jit.load(file)(x), expected)
        near(torch.jit.freeze(torch.jit.script(copy.deepcopy(subject).eval()))(x), expected)
        near(torch.jit.trace(subject, (x[0],))(x[0]), expected[0])
        traced = torch.jit.trace(subject, (x,))
        more = torch.cat([x, -x, 2 * x])
        near(traced(more), subject(more))
    scripted = torch.jit.script(module)
    loss = scripted(x).square().sum()
    loss.backward()
    found, module.weight.grad = module.weight.grad.clone(), None
    module(x).square().sum().backward()
    close(found, module.weight.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_removal_leaves_refuses_other_sizes_compiled_or_not(geometry):
    module, x, _ = removed(geometry, called=False)
    if not isinstance(module, Removed):
        return  # of torch's own class, which computes at every size
    scripted, traced = torch.jit.script(module), torch.jit.trace(module, (x,))
    taken = module.action.geometry
    if module.action.domain is not None or (max(taken.stride) > 1 and not taken.transposed):
        other = torch.randn(1, x.shape[1], *(n + 1 for n in x.shape[2:]))
        for subject in (module, scripted, traced):
            with pytest.raises((ValueError, torch.jit.Error), match=r"size|domain"):
                subject(other)
    weight = module.weight.detach()
    module.weight = nn.Parameter(weight[..., : max(1, weight.shape[-1] - 2)].clone())
    if module.weight.shape == weight.shape:
        return
    for subject in (module, torch.jit.script(module)):
        with pytest.raises((ValueError, torch.jit.Error), match="kernel_size"):
            subject(x)


@pytest.mark.parametrize("called", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_symbolic_traces_compute_the_same_and_are_copied_and_saved(geometry, called):
    module, x, y = removed(geometry, called)
    model = nn.Sequential(OrderedDict(conv=module, act=nn.Tanh()))
    for subject, expected in ((module, y), (model, y.tanh())):
        graph = torch.fx.symbolic_trace(subject)
        for one in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
            near(one(x), expected)
            near(one(x[0]), expected[0])
            assert list(one.state_dict()) == list(subject.state_dict())
        file = io.BytesIO()
        torch.save(graph, file)
        file.seek(0)
        near(torch.load(file, weights_only=False)(x), expected)
        other = copy.deepcopy(graph)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(subject.state_dict())
        near(other(x), expected)
        graph(x).square().sum().backward()
        assert all(p.grad is not None for p in graph.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [*GEOMETRIES][::3], indirect=True)
def test_exported_programs_compute_the_same(geometry):
    module, x, y = removed(geometry)
    model = nn.Sequential(OrderedDict(conv=module, act=nn.Tanh()))
    for subject, expected in ((module, y), (model, y.tanh())):
        for example, wanted in ((x, expected), (x[0], expected[0])):
            torch.compiler.reset()
            near(torch.export.export(subject, (example,)).module()(example), wanted)
        for strict in (False, True):
            torch.compiler.reset()
            batch = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(subject, (x,), dynamic_shapes=batch, strict=strict)
            more = torch.cat([x, -x, 2 * x])
            near(program.module()(more), subject(more))
            assert list(program.state_dict) == list(subject.state_dict())


# Results: changed in place, and in memory

WAYS = ["direct", "spectral"]
# more convolutions that are evaluated: with one output channel, of one pixel, complex, retrofitted
FEWER = {
    "one output channel": (nn.Conv2d, (4, 1, 3), {"padding": 1}, {}, (6, 6)),
    "one output channel, domain": (nn.Conv2d, (4, 1, 3), {"padding": 1}, {"domain": 6}, (6, 6)),
    "one channel": (nn.Conv2d, (1, 1, 3), {"padding": 1}, {}, (6, 6)),
    "one channel, single pixel": (nn.Conv2d, (1, 1, 3), {"padding": 1}, {}, (1, 1)),
    "single pixel between zeros": (nn.Conv2d, (3, 3, 3), {"padding": 1}, ZEROS, (1, 1)),
    "single tap": (nn.Conv2d, (4, 4, 1), {}, {}, (6, 6)),
    "single tap, domain": (nn.Conv2d, (4, 4, 1), {}, {"domain": 6}, (6, 6)),
    "depthwise": (nn.Conv2d, (4, 4, 3), {"padding": 1, "groups": 4}, {}, (6, 6)),
    "domain": (nn.Conv2d, (4, 4, 3), {"padding": 1}, {"domain": (6, 7)}, (6, 7)),
    "complex": (nn.Conv2d, (2, 2, 3), {"padding": 1, "dtype": torch.complex64}, {}, (6, 6)),
    "1d circular": (nn.Conv1d, (3, 3, 3), {"padding": 1}, {}, (9,)),
    "1d strided": (nn.Conv1d, (2, 4, 3), {"padding": 1, "stride": 2}, {}, (8,)),
    "3d circular": (nn.Conv3d, (2, 2, 3), {"padding": 1}, {}, (4, 4, 4)),
}
WALLS, PERIODIC = {"method": "split", "boundary": "walls"}, {"method": "split"}
SPLIT = {  # evaluated in one way
    "walls": (nn.Conv2d, (4, 4, 3), {"padding": 1}, WALLS, (6, 7)),
    "walls, strided": (nn.Conv2d, (4, 8, 4), {"padding": 1, "stride": 2}, WALLS, (6, 8)),
    "walls, transposed": (nn.ConvTranspose2d, (4, 4, 3), {"padding": 1}, WALLS, (6, 7)),
    "walls, complex": (nn.Conv1d, (2, 2, 3), {"padding": 1, "dtype": torch.complex64}, WALLS, (6,)),
    "walls, single pixel": (nn.Conv3d, (2, 2, 3), {"padding": 1}, WALLS, (1, 1, 1)),
    "split, transposed": (nn.ConvTranspose2d, (4, 4, 3), {"padding": 1}, PERIODIC, (6, 7)),
}
EVALUATED = GEOMETRIES | FEWER | SPLIT
ALWAYS_DIRECT = ["single tap, domain", *SPLIT]


def evaluated_one(name, bias):
    """A convolution of that name, as it was registered, and images."""
    cls, arguments, options, how, size = EVALUATED[name]
    torch.manual_seed(0)
    conv = orthogonal(cls(*arguments, **{**options, "bias": bias}), **how)
    return conv, torch.randn(3, arguments[0], *size, dtype=conv.weight.dtype)


class Then(nn.Module):
    """Reads a result in place or not."""

    def __init__(self, conv, inplace):
        super().__init__()
        self.conv, self.inplace = conv, inplace

    def forward(self, x):
        y = self.conv(x)
        if y.is_complex():
            return y.mul_(2).add_(1) if self.inplace else 2 * y + 1
        return F.leaky_relu(y, 0.3, inplace=self.inplace)


def gradients_of(model, x, needs_input):
    x = x.clone().requires_grad_(needs_input)
    for p in model.parameters():
        p.grad = None
    y = model(x)
    loss = (y.abs() ** 3).sum()
    loss.backward()
    return [y.detach(), *([x.grad] if needs_input else []), *(p.grad for p in model.parameters())]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", some_of(EVALUATED))
def test_results_are_changed_in_place(name, way, monkeypatch):
    for bias in (False, True):
        conv, images = evaluated_one(name, bias)
        if name not in ALWAYS_DIRECT:
            evaluated(monkeypatch, way)
        for x in (images[:1],) if bias else (images[:1], images, images[0]):
            for needs_input in (False, True):
                expected = gradients_of(Then(conv, False), x, needs_input)
                found = gradients_of(Then(conv, True), x, needs_input)
                close(found, expected)
                with parametrize.cached():
                    xs = [x.clone().requires_grad_(needs_input) for _ in range(2)]
                    ys = [Then(conv, True)(x) for x in xs]
                for p in conv.parameters():
                    p.grad = None
                sum((y.abs() ** 3).sum() for y in ys).backward()
                near(ys[0].detach(), expected[0])
                near(ys[1].detach(), expected[0])
                if needs_input:
                    close(xs[1].grad, expected[1], atol=1e-3, rtol=1e-4)
                for p, g in zip(conv.parameters(), expected[-len(list(conv.parameters())) :], strict=True):
                    close(p.grad / 2, g, atol=1e-3, rtol=1e-4)
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    near(Then(conv, True)(x), expected[0])
                    with parametrize.cached():
                        near(Then(conv, True)(x), expected[0])
                        near(Then(conv, True)(x), expected[0])
            near(Then(conv, True)(x).detach(), expected[0])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("anneal", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_results_of_retrofitted_models_are_changed_in_place(way, anneal, frozen, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 1, 1), nn.ReLU(),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    retrofit(model, x, anneal=anneal)
    if frozen:
        model[0].requires_grad_(False)
    evaluated(monkeypatch, way)
    for batch in (x[:1], x, x[0]):
        for act in (model[1], model[3], model[5]):
            act.inplace = False
        expected = gradients_of(model, batch, True)
        for act in (model[1], model[3], model[5]):
            act.inplace = True
        close(gradients_of(model, batch, True)[:2], expected[:2])
        with parametrize.cached():
            found = gradients_of(model, batch, True)
        for a, b in zip(found, expected, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("called", [False, True])
def test_results_of_what_removal_leaves_are_changed_in_place(geometry, called):
    module, x, _y = removed(geometry, called)
    for batch in (x[:1], x, x[0]):
        close(gradients_of(Then(module, True), batch, True), gradients_of(Then(module, False), batch, True))


@pytest.mark.parametrize("domain", ["any", 6])
def test_a_kernel_that_is_read_is_changed_in_place(domain):
    """As that of any parametrization of torch's."""
    for name in ("domain", "one channel", "1d circular", "transposed circular"):
        conv, _x = evaluated_one(name, True)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                conv.weight.mul_(2)
                conv.weight[0].zero_()
                conv.weight.view(-1).add_(1)
            if context is torch.enable_grad:
                W = conv.weight
                before = W.detach().clone()
                W.mul_(2)
                W.sum().backward()
                close(W, 2 * before)
                close(conv.weight, before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", some_of(EVALUATED))
def test_results_own_their_memory_and_keep_the_format_of_their_input(name, way, monkeypatch):
    if name not in ALWAYS_DIRECT:
        evaluated(monkeypatch, way)
    for bias in (False, True):
        conv, x = evaluated_one(name, bias)
        formats = [torch.contiguous_format]
        formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])
        plain = copy.deepcopy(conv)
        parametrize.remove_parametrizations(plain, "weight")
        for memory_format in formats:
            for module in (conv, plain) if isinstance(plain, Removed) else (conv,):  # else it is torch's
                for batch in (x, x[:1]):
                    images = batch.contiguous(memory_format=memory_format)
                    leaf = images.clone().requires_grad_()
                    assert leaf.is_contiguous(memory_format=memory_format)
                    results = [module(images), module(leaf)]
                    with torch.no_grad():
                        results.append(module(images))
                    with torch.inference_mode():
                        results.append(module(images))
                    with parametrize.cached():
                        results += [module(images), module(leaf)]
                    for y in results:
                        assert y.is_contiguous(memory_format=memory_format), (memory_format, module)
                        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
                        if memory_format == torch.contiguous_format:
                            y.view(len(y), -1)
        for memory_format in formats:
            one = conv(x.contiguous(memory_format=memory_format)[0])
            assert one.is_contiguous()
            assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


@pytest.mark.parametrize("boundary", ["circular", "zeros"])
@pytest.mark.parametrize("anneal", [False, True])
def test_weights_are_contiguous_with_blocks_and_without(anneal, boundary):
    for blocks in (None, {"0": [(slice(0, 2), slice(0, 2))]}):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
        retrofit(model, torch.randn(1, 4, 8, 8), blocks=blocks, boundary=boundary, anneal=anneal)
        model[0].weight.view(4, -1)
        parametrize.remove_parametrizations(model[0], "weight")
        assert model[0].weight.is_contiguous()
        nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("domain", ["any", (16, 16)])
def test_large_batches_are_contiguous(domain):
    conv = orthogonal(nn.Conv2d(8, 8, 3, padding=1), domain=domain)
    for size in (1, 17, 300):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size, 8, 16, 16).contiguous(memory_format=memory_format)
            y = conv(x)
            assert y.is_contiguous(memory_format=memory_format)
            assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
            y.mul_(2).sum().backward()


# Within `parametrize.cached()`

# (Where torch evaluates the module, torch caches its weight, whatever made it.)
CACHED = [
    "any", "domain", "zeros", "transposed", "blocks", "annealed", "ended", "split", "walls", "exponential",
]  # fmt: skip
ONE_WAY = ["split", "walls", "exponential"]


def cached_one(kind):
    """A model with a generator, and images."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    if kind == "transposed":
        conv = nn.ConvTranspose2d(4, 4, 3, padding=1)
    if kind in ("blocks", "annealed", "ended"):
        blocks = {"0": [(slice(2), slice(2)), (slice(2, 4), slice(1, 3))]} if kind == "blocks" else None
        model = retrofit(nn.Sequential(conv), x, blocks=blocks)
        set_orthogonality(model, 1.0 if kind == "ended" else 0.5, final=kind == "ended")
    elif kind == "exponential":
        orthogonal(conv, boundary="walls")
    elif kind in ("split", "walls"):
        orthogonal(conv, method="split", boundary="walls" if kind == "walls" else "circular")
    else:
        boundary = "zeros" if kind == "zeros" else "circular"
        orthogonal(conv, domain="any" if kind in ("any", "transposed") else 6, boundary=boundary)
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return conv, x


def loss_of(conv, x, reads):
    y = conv(x) if reads == "call" else conv.weight
    return (y - 0.3).pow(4).sum()


def grads(conv):
    found = [p.grad for p in conv.parametrizations.parameters()]
    for p in conv.parameters():
        p.grad = None
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reads", ["call", "weight"])
@pytest.mark.parametrize("kind", CACHED)
def test_a_first_call_without_gradients_is_not_what_later_ones_train(kind, reads, way, monkeypatch):
    if kind not in ONE_WAY:
        evaluated(monkeypatch, way)
    conv, x = cached_one(kind)
    loss_of(conv, x, reads).backward()
    expected = grads(conv)
    assert all(g is not None and g.abs().sum() > 0 for g in expected)
    for context in (torch.no_grad, torch.inference_mode):
        for first in ("call", "weight"):
            for frozen in (False, True):
                with parametrize.cached():
                    if frozen:
                        conv.requires_grad_(False)
                    with context():
                        loss_of(conv, x, first)
                    if frozen:
                        assert not loss_of(conv, x, first).requires_grad
                        conv.requires_grad_(True)
                    loss_of(conv, x, reads).backward()
                    close(grads(conv), expected, atol=1e-3, rtol=1e-4)
    # several steps, some without gradients between
    with parametrize.cached():
        with torch.no_grad():
            loss_of(conv, x, reads)
        loss = loss_of(conv, x, reads)
        with torch.no_grad():
            loss_of(conv, x, reads)
        (loss + loss_of(conv, x, reads)).backward()
    close([g / 2 for g in grads(conv)], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CACHED)
def test_frozen_for_a_while_and_other_parameters_within_one_block(kind, way, monkeypatch):
    if kind not in ONE_WAY:
        evaluated(monkeypatch, way)
    conv, x = cached_one(kind)
    y, W = conv(x).detach(), conv.weight.detach()
    mine = {name: p.detach().clone() for name, p in conv.named_parameters()}
    others = {name: (p + 0.2 * torch.randn_like(p)).requires_grad_() for name, p in mine.items()}
    wanted = torch.func.functional_call(conv, others, (x,))
    gradients = torch.autograd.grad(wanted.pow(3).sum(), [*others.values()])
    assert not torch.allclose(wanted, y, atol=1e-3)

    def loss(parameters):
        return torch.func.functional_call(conv, parameters, (x,)).pow(3).sum()

    ensemble = {name: torch.stack([p, others[name].detach()]) for name, p in mine.items()}
    for called in (False, True):
        with parametrize.cached():
            if called:
                near(conv(x), y)
            found = torch.func.functional_call(conv, others, (x,))
            near(found, wanted)
            near(conv(x), y)
            near(conv.weight, W)
            close(
                torch.autograd.grad(found.pow(3).sum(), [*others.values()]), gradients, atol=1e-3, rtol=1e-4
            )
            found = torch.func.grad(loss)({k: p.detach() for k, p in others.items()})
            close([*found.values()], [*gradients], atol=1e-3, rtol=1e-4)
            near(conv(x), y)
            both = torch.func.vmap(lambda p: torch.func.functional_call(conv, p, (x,)))(ensemble)
            near(both, torch.stack([y, wanted]))
            near(conv(x), y)
            near(conv.weight, W)
            per_image = torch.func.vmap(conv)(x.unsqueeze(1))
            near(per_image.squeeze(1), y)
            near(conv(x), y)
            _, tangent = torch.func.jvp(conv, (x,), (x,))
            near(tangent, conv(x) - conv(0 * x))
            conv(x).sum().backward()
    for p in conv.parameters():
        p.grad = None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", CACHED)
def test_a_first_call_within_a_transform_is_not_what_later_ones_use(kind):
    conv, x = cached_one(kind)
    loss_of(conv, x, "call").backward()
    expected, y = grads(conv), conv(x).detach()
    mine = {name: p.detach() for name, p in conv.named_parameters()}
    ensemble = {name: torch.stack([p, p + 0.1]) for name, p in mine.items()}

    def loss(parameters):
        return torch.func.functional_call(conv, parameters, (x,)).pow(3).sum()

    firsts = [
        lambda: torch.func.grad(loss)(mine),
        lambda: torch.func.vmap(loss)(ensemble),
        lambda: torch.func.vmap(torch.func.grad(loss))(ensemble),
        lambda: torch.func.vmap(conv)(x.unsqueeze(1)),
        lambda: torch.func.grad(lambda x: conv(x).pow(3).sum())(x),
        lambda: torch.func.jvp(conv, (x,), (x,)),
        lambda: torch.func.vmap(lambda x: conv.weight * x, randomness="error")(x[:, 0, 0, 0]),
        lambda: torch.func.grad(lambda s: (conv.weight * s).sum())(x[0, 0, 0, 0]),
    ]
    for first in firsts:
        with parametrize.cached():
            first()
            near(conv(x), y)
            near(conv.weight.detach(), conv.weight.detach())
            loss_of(conv, x, "call").backward()
            close(grads(conv), expected, atol=1e-3, rtol=1e-4)
            near(conv(x), y)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_of_a_frozen_one_the_images_are_trained_after_a_first_call_without_gradients(
    kind, way, context, monkeypatch
):
    if kind not in ONE_WAY:
        evaluated(monkeypatch, way)
    conv, x = cached_one(kind)
    conv.requires_grad_(False)
    x.requires_grad_()
    conv(x).pow(3).sum().backward()
    expected, x.grad = x.grad, None
    with parametrize.cached():
        with context():
            conv(x)
            _ = conv.weight
        conv(x).pow(3).sum().backward()
        scale = torch.ones((), requires_grad=True)
        (conv.weight * scale).sum().backward()
    close(x.grad, expected, atol=1e-3, rtol=1e-4)


# Scripts that initialise by the name of a class


def dcgan(m):
    name = m.__class__.__name__
    if name.find("Conv") != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.02)
    elif name.find("BatchNorm") != -1:
        nn.init.normal_(m.weight.data, 1.0, 0.02)
        nn.init.constant_(m.bias.data, 0)


def by_type_name(m):
    if "Conv" in type(m).__name__:
        nn.init.normal_(m.weight.data, 0, 0.02)
        if getattr(m, "bias", None) is not None:
            nn.init.zeros_(m.bias.data)


def by_class(m):
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.kaiming_normal_(m.weight)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("init", [dcgan, by_type_name, by_class])
@pytest.mark.parametrize("kind", [*CACHED, "registered", "registered any"])
def test_scripts_that_initialise_by_the_name_do_no_harm(kind, init):
    torch.manual_seed(0)
    if kind.startswith("registered"):
        conv, x = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 30, 30)
        domain = "any" if "any" in kind else None
        parametrize.register_parametrization(conv, "weight", ConvExponential(domain), unsafe=True)
    else:
        conv, x = cached_one(kind)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, bias=False))
    kernel = conv.weight.detach().clone()
    for cached in (False, True):
        if cached:
            with parametrize.cached():
                model.apply(init)
        else:
            model.apply(init)
        close(conv.weight, kernel, atol=1e-6, rtol=0)
    model(x).sum().backward()
    assert all(p.grad is not None for p in conv.parametrizations.parameters())


# What the module says of itself


def followed(module, x):
    """What a tool computes that knows torch's attributes only."""
    pads = module._reversed_padding_repeated_twice
    x = F.pad(x, pads) if module.padding_mode == "zeros" else F.pad(x, pads, mode=module.padding_mode)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(module.stride) - 1]
    assert tuple(module.weight.shape[2:]) == module.kernel_size
    return convolve(x, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)


TOLD = [
    (nn.Conv2d, (3, 3, 3), {"padding": 1}, {}, (30, 31)),
    (nn.Conv2d, (3, 3, (2, 4)), {"padding": "same"}, {}, (30, 31)),
    (nn.Conv2d, (3, 3, 3), {"padding": 2, "dilation": 2}, {}, (40, 50)),
    (
        nn.Conv2d,
        (3, 3, 3),
        {"padding": (1, 2), "dilation": (1, 2), "padding_mode": "circular"},
        {},
        (40, 50),
    ),
    (nn.Conv2d, (2, 8, 3), {"padding": 1, "stride": 2}, {}, (50, 50)),
    (nn.Conv2d, (2, 8, 2), {"stride": 2}, {}, (40, 40)),
    (nn.Conv2d, (2, 9, 3), {"stride": 3, "padding": 2, "dilation": 2, "groups": 1}, {}, (60, 60)),
    (nn.Conv2d, (3, 3, 3), {"padding": 1}, {"domain": (7, 8)}, (7, 8)),
    (nn.Conv2d, (2, 8, 3), {"padding": 1, "stride": 2}, {"domain": (6, 8)}, (6, 8)),
    (nn.Conv2d, (3, 3, 3), {"padding": 2, "dilation": 2}, {"domain": (9, 8)}, (9, 8)),
    (nn.Conv2d, (3, 3, 2), {"padding": "same"}, {"domain": (5, 4)}, (5, 4)),
    (nn.Conv2d, (3, 3, 3), {"padding": 1}, ZEROS, (8, 8)),
    (nn.Conv2d, (3, 3, 2), {"padding": "same"}, ZEROS, (8, 8)),
    (nn.Conv2d, (3, 3, 3), {"padding": 2, "dilation": 2}, ZEROS, (9, 8)),
    (nn.Conv2d, (3, 6, 3), {"padding": 1, "stride": 2}, ZEROS, (8, 8)),
    (nn.Conv2d, (3, 3, 3), {"padding": 1, "padding_mode": "reflect"}, CIRCULAR, (30, 30)),
    (nn.Conv2d, (4, 4, 1), {}, {}, (6, 6)),
    (nn.Conv1d, (3, 3, 3), {"padding": 1}, {}, (40,)),
    (nn.Conv1d, (3, 3, 4), {"padding": "same"}, {"domain": 12}, (12,)),
    (nn.Conv3d, (1, 2, 3), {"padding": 1, "stride": (1, 2, 1)}, {"domain": (3, 4, 5)}, (3, 4, 5)),
]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(("cls", "arguments", "options", "how", "size"), TOLD)
def test_a_tool_that_follows_the_attributes_gets_what_the_module_gives(
    cls, arguments, options, how, size, called
):
    torch.manual_seed(0)
    conv = cls(*arguments, **options)
    own = {name: getattr(conv, name) for name in NUMBERS}
    said = conv.extra_repr()
    orthogonal(conv, **how)
    x = torch.randn(2, arguments[0], *size)
    if called:
        conv(x)
    assert parametrize.type_before_parametrizations(conv) is cls
    for module in (conv, copy.deepcopy(conv)):
        near(followed(module, x), module(x))
        assert f"kernel_size={module.kernel_size}" in repr(module)
        assert f"stride={module.stride}" in repr(module)
        if module.dilation != (1,) * len(size):
            assert f"dilation={module.dilation}" in repr(module)
        else:
            assert "dilation" not in repr(module)
        if module.padding_mode == "circular":
            assert "padding_mode=circular" in repr(module)
        if isinstance(module.padding, tuple) and any(module.padding):
            assert f"padding={module.padding}" in repr(module)
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    assert {name: getattr(conv, name) for name in NUMBERS} == own
    assert conv.extra_repr() == said
    assert type(conv) is cls


NUMBERS = [
    "padding_mode", "padding", "kernel_size", "dilation", "output_padding", "stride", "groups",
    "_reversed_padding_repeated_twice",
]  # fmt: skip


def test_a_transposed_module_says_the_same(geometry):
    cls, _, _, how, _ = GEOMETRIES[geometry]
    module, x = convolution(geometry)
    module(x)
    assert parametrize.type_before_parametrizations(module) is cls
    assert module.kernel_size == tuple(module.weight.shape[2:])
    assert module.padding_mode == how.get("boundary", "circular")
    if module.transposed and module.padding_mode == "zeros" and "domain" not in how:
        functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        function = functions[len(module.stride) - 1]
        y = function(
            x, module.weight, module.bias, module.stride, module.padding, module.output_padding,
            module.groups, module.dilation,
        )  # fmt: skip
        near(y, module(x))
    for name in ("kernel_size", "padding", "padding_mode", "dilation"):
        assert getattr(copy.deepcopy(module), name) == getattr(module, name)


# Arguments that are refused when they are given


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("domain", ["any", 8])
def test_padding_that_mirrors_asks_for_a_boundary(mode, domain):
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    before = type(conv), dict(vars(conv))
    with pytest.raises(ValueError, match=f"(?s){mode}.*boundary should be given"):
        orthogonal(conv, domain=domain)
    assert (type(conv), dict(vars(conv))) == before
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), conv)
    for anneal in (False, True):
        with pytest.raises(ValueError, match="boundary should be given"):
            retrofit(model, torch.zeros(1, 4, 8, 8), anneal=anneal)
    assert (type(conv), dict(vars(conv))) == before
    assert type(model[0]) is nn.Conv2d
    for boundary in ("circular", "zeros"):
        orthogonal(copy.deepcopy(conv), domain=domain, boundary=boundary)(torch.zeros(1, 4, 8, 8))
    one = nn.Conv2d(4, 4, 1, padding_mode=mode)  # sees no boundary
    orthogonal(one, domain=domain)


def twice(A):
    return 2 * torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A)


@pytest.mark.parametrize(
    "triv", [torch.exp, torch.matrix_exp, torch.tanh, twice, lambda A: A, lambda A: A[0], lambda A: 1]
)
@pytest.mark.parametrize("domain", ["any", 8])
def test_a_map_that_is_not_unitary_is_refused_at_construction(triv, domain):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    before = type(conv), dict(vars(conv)), conv.weight.detach().clone()
    if triv is torch.matrix_exp:
        orthogonal(conv, domain=domain, triv=triv)
        return
    with pytest.raises((TypeError, ValueError), match="triv should"):
        orthogonal(conv, domain=domain, triv=triv)
    assert (type(conv), dict(vars(conv))) == before[:2]
    assert torch.equal(conv.weight, before[2])
    for where in (None, domain):
        with pytest.raises((TypeError, ValueError), match="triv should"):
            ConvExponential(where, triv=triv)


# Checkpoints of something else


def small(kind="zeros 12", seed=0):
    """Modules whose generators are all of one shape, and those whose tori are too."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 4, 5 if "5" in kind.split()[-1:] else 3, padding=1)
    how = {
        "zeros 12": {"domain": 12, **ZEROS},
        "zeros 13": {"domain": 13, **ZEROS},  # of the same torus, 15 x 15
        "circular 15": {"domain": 15},
        "circular 12": {"domain": 12},
        "any": {},
        "any zeros": ZEROS,
        "cayley": {"domain": 12, "triv": "cayley", **ZEROS},
        "taps": {"domain": 12, **ZEROS},
    }[kind]
    if kind == "taps":
        conv = nn.Conv2d(4, 4, (1, 9), padding=(0, 4))
    return orthogonal(conv, **how)


def through_torch(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def through_safetensors(state, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(state), tmp_path / "state.safetensors")
    return safetensors.load_file(tmp_path / "state.safetensors")


def through_a_dict(state, tmp_path):
    return {key: value.clone() for key, value in state.items()}


def as_it_is(state, tmp_path):
    return state


FORMATS = [through_torch, through_safetensors, through_a_dict, as_it_is]


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    assert list(a) == list(b)
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("through", FORMATS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("other", ["zeros 13", "circular 15", "circular 12", "any", "any zeros", "cayley"])
@pytest.mark.parametrize("within", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_checkpoint_of_something_else_is_refused_in_words(other, strict, through, within, tmp_path):
    def model(kind, seed):
        conv = small(kind, seed)
        return nn.Sequential(OrderedDict(first=nn.Linear(3, 3), conv=conv)) if within else conv

    for here, there in (("zeros 12", other), (other, "zeros 12")):
        source, target = model(here, 0), model(there, 1)
        before = values(target)
        state = through(source.state_dict(), tmp_path)
        kept = dict(state)
        with pytest.raises(RuntimeError, match=r"should be of a convolution with .* Found one with"):
            target.load_state_dict(state, strict=strict)
        conv = target.conv if within else target
        # torch loads other modules all the same
        ours = [{k: v for k, v in found.items() if "first" not in k} for found in (before, values(target))]
        assert same(*ours)
        assert list(state) == list(kept)
        assert all(state[k] is kept[k] for k in kept)
        conv(torch.zeros(1, 4, *(conv.operator.action.domain or (9, 9))))
        again = model(here, 1)
        assert not same(values(again), dict(source.state_dict()))
        again.load_state_dict(through(source.state_dict(), tmp_path), strict=strict)
        assert same(values(again), dict(source.state_dict()))


def test_older_checkpoints_still_load(tmp_path):
    for kind in ("zeros 12", "circular 15", "any"):
        source, target = small(kind, 0), small(kind, 1)
        state = {k: v for k, v in source.state_dict().items() if "_extra_state" not in k}
        assert len(state) < len(source.state_dict())
        assert not target.load_state_dict(state, strict=True).missing_keys
        assert same(values(target), dict(source.state_dict()))
        outer = nn.Sequential(small(kind, 1), nn.ReLU())
        outer.load_state_dict({f"0.{k}": v for k, v in state.items()})
        assert same(values(outer[0]), dict(source.state_dict()))
    conv = nn.Conv2d(4, 4, 3)
    parametrize.register_parametrization(conv, "weight", ConvExponential())
    state = {k: v for k, v in conv.state_dict().items() if "_extra_state" not in k}
    conv.load_state_dict(state, strict=True)


def test_a_checkpoint_of_other_taps_is_refused():
    with pytest.raises(RuntimeError, match="taps"):
        small("zeros 12").load_state_dict(small("taps").state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("blocks", [None, {"0": [(slice(0, 2), slice(0, 2))]}])
@pytest.mark.parametrize(
    ("way", "names"),
    [
        ({}, "pretrained, t"),
        ({"method": "exponential"}, "pretrained, t"),
        ({"method": "exponential", "boundary": "circular"}, "directions, t, values"),
    ],
)
def test_a_checkpoint_from_the_middle_of_annealing_is_refused_without_annealing(way, names, blocks, strict):
    def model(**options):
        plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
        return retrofit(plain, torch.randn(1, 4, 6, 6), blocks=blocks, **way, **options)

    annealed, other = model(), model(anneal=False)
    orthoconv_param.set_orthogonality(annealed, 0.5)
    x = torch.randn(2, 4, 6, 6)
    before = other(x)
    with pytest.raises(RuntimeError, match=f"0.weight: .*{names}.*final=True") as refused:
        other.load_state_dict(annealed.state_dict(), strict=strict)
    assert str(refused.value).count("still being annealed") == 1
    close(other(x), before)
    orthoconv_param.set_orthogonality(annealed, 1, final=True)
    other.load_state_dict(annealed.state_dict(), strict=strict)
    close(other(x), annealed(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("anneal", [True, False])
def test_a_checkpoint_of_other_blocks_is_refused(strict, anneal):
    def model(rows, seed=0):
        torch.manual_seed(seed)
        blocks = {"0": [(slice(*r), slice(0, 2)) for r in rows]}
        plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        return retrofit(plain, torch.randn(1, 4, 6, 6), blocks=blocks, anneal=anneal)

    source, target = model([(0, 2), (2, 4)]), model([(0, 2), (4, 6)], 1)
    before = values(target)
    assert [v.shape for v in before.values()][:-1] == [v.shape for v in source.state_dict().values()][:-1]
    with pytest.raises(RuntimeError, match="blocks"):
        target.load_state_dict(source.state_dict(), strict=strict)
    assert same(values(target), before)
    again = model([(0, 2), (2, 4)], 1)
    again.load_state_dict(source.state_dict(), strict=strict)
    assert same(values(again), dict(source.state_dict()))


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_registered_parametrization_is_refused(strict):
    def registered(domain, seed, **options):
        torch.manual_seed(seed)
        conv = nn.Conv2d(4, 4, 3, padding=1)
        parametrize.register_parametrization(
            conv, "weight", ConvExponential(domain, **options), unsafe=True
        )
        return conv

    pairs = [
        (8, 9, {}),
        ("any", 8, {}),
        (None, "any", {}),
        ((8, 8), (6, 12), {}),
        (8, 8, {"triv": "cayley"}),
    ]
    for here, there, options in pairs:
        source, target = registered(here, 0), registered(there, 1, **options)
        before = [b.clone() for b in target.buffers()]
        with pytest.raises(RuntimeError, match="should be of a convolution with"):
            target.load_state_dict(source.state_dict(), strict=strict)
        # torch loads what belongs to the module and to the list of parametrizations before it asks them
        assert all(torch.equal(*pair) for pair in zip(before, target.buffers(), strict=True))


# Checkpoints of arrays


def arrays(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [*CACHED, "registered"])
def test_a_checkpoint_of_arrays_gives_torchs_own_error_and_changes_nothing(kind, strict):
    plain = nn.Conv2d(4, 4, 3, padding=1)
    if kind == "registered":
        conv = nn.Conv2d(4, 4, 3, padding=1)
        parametrize.register_parametrization(conv, "weight", ConvExponential())
    else:
        conv, _ = cached_one(kind)
    model = nn.Sequential(OrderedDict(conv=conv[0] if isinstance(conv, nn.Sequential) else conv))
    before = values(model)
    own = arrays(model)
    of_plain = {f"conv.{key}": value for key, value in arrays(plain).items()}
    cases = {"parametrized": own}
    if kind != "registered":
        cases["plain"] = of_plain
        cases["weight only"] = {**model.state_dict(), "conv.weight": of_plain["conv.weight"]}
    for which, state in cases.items():
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state, strict=strict)
        said = str(caught.value)
        assert "expected torch.Tensor or Tensor-like object from checkpoint but received" in said, which
        assert "numpy.ndarray" in said
        key = "conv.parametrizations.weight." if which == "parametrized" else "conv.weight"
        assert f'"{key}' in said
        assert same(values(model), before)
    single = model.conv
    with pytest.raises(RuntimeError, match=r"numpy\.ndarray"):
        single.load_state_dict(arrays(single), strict=strict)
    assert same(values(model), before)


@pytest.mark.parametrize("anneal", [False, True])
@pytest.mark.parametrize("kind", ["circular 15", "any", "retrofitted"])
def test_a_refused_checkpoint_keeps_the_parameters_with_assign_too(kind, anneal):
    def model(seed, kernel=3):
        if kind != "retrofitted":
            return nn.Sequential(small(kind, seed))
        torch.manual_seed(seed)
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return retrofit(nn.Sequential(conv), torch.zeros(1, 4, 6, 6), anneal=anneal)

    target = model(1)
    before, parameters = values(target), [*target.parameters()]
    with pytest.raises(RuntimeError, match="should be of a convolution with"):
        target.load_state_dict(nn.Sequential(small("zeros 12")).state_dict(), assign=True, strict=False)
    assert same(values(target), before)
    assert [*map(id, target.parameters())] == [*map(id, parameters)]
    target[0].weight.sum().backward()


# The base that there is not


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("registered", [False, True])
def test_update_base_of_any_says_that_there_is_no_base(kernel, registered):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, kernel, padding=kernel // 2)
    if registered:
        parametrize.register_parametrization(conv, "weight", ConvExponential("any"), unsafe=True)
    else:
        orthogonal(conv)
    pickled = pickle.loads(pickle.dumps(conv.parametrizations.weight[0]))
    for module in (conv, copy.deepcopy(conv)):
        kernel_before = module.weight.detach().clone()
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad, parametrize.cached):
            with context(), pytest.raises(ValueError, match="no base for `update_base`"):
                update_base(module, "weight")
            with context(), pytest.raises(ValueError, match="no base for `update_base`"):
                module.weight = module.weight
        assert torch.equal(module.weight, kernel_before)
        if kernel == 1:  # what is made of it is a generator, if that is what is said
            module.weight = module.weight.detach().clone()
            assert not torch.allclose(module.weight, kernel_before)
        generator = torch.randn(3, 3, kernel, kernel)
        module.weight = generator
        found = module.weight.detach().clone()
        module.weight = generator
        assert torch.equal(module.weight, found)
    if kernel == 1:
        pickled.right_inverse(kernel_before)
    other = copy.deepcopy(conv)
    if kernel == 1:  # the kernel of another module is a generator as any
        other.weight = conv.weight.detach()


def test_of_a_given_domain_update_base_works():
    for how in ({"domain": 6}, {"domain": 6, **ZEROS}):
        for taps in (1, 3):
            conv = orthogonal(nn.Conv2d(3, 3, taps, padding=taps // 2), **how)
            with torch.no_grad():
                conv.parametrizations.weight.original.add_(torch.randn(3, 3, taps, taps))
            kernel = conv.weight.detach().clone()
            update_base(conv, "weight")
            close(conv.weight, kernel, atol=1e-5, rtol=0)
            assert not conv.parametrizations.weight.original.any()


# A parametrization moves to another module


def test_transferred_after_a_copy_the_source_stays():
    assert "transfer_parametrizations_and_params" in ConvExponential.__doc__
    for domain in (None, 6, "any"):
        torch.manual_seed(0)
        source, target = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        parametrize.register_parametrization(source, "weight", ConvExponential(domain), unsafe=True)
        with torch.no_grad():
            source.parametrizations.weight.original.add_(0.3 * torch.randn(3, 3, 3, 3))
        kernel, state = source.weight.detach().clone(), values(source)
        if domain is None:  # torch registers elsewhere only what keeps the shape
            parametrize.transfer_parametrizations_and_params(copy.deepcopy(source), target)
            assert parametrize.is_parametrized(target, "weight")
            with torch.no_grad():
                target.parametrizations.weight.original.add_(1)
                target.weight = torch.randn(3, 3, 3, 3)
        else:
            with pytest.raises(ValueError, match="unsafe"):
                parametrize.transfer_parametrizations_and_params(copy.deepcopy(source), target)
        assert torch.equal(source.weight, kernel)
        assert same(values(source), state)


# Messages


@pytest.mark.parametrize("stride", [-1, 0, (1, 0), (2, -1)])
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("domain", ["any", 8])
def test_a_stride_that_is_not_positive_is_named(cls, stride, domain):
    conv = cls(4, 4, 3, padding=1, stride=stride)
    before = type(conv), dict(vars(conv))
    with pytest.raises(ValueError, match="stride should be a positive integer"):
        orthogonal(conv, domain=domain)
    with pytest.raises(ValueError, match="stride should be a positive integer"):
        ConvExponential(domain, stride=stride)
    with pytest.raises(ValueError, match="stride should be a positive integer"):
        singular_values(torch.randn(4, 4, 3, 3), 8, stride=stride)
    assert (type(conv), dict(vars(conv))) == before


def test_inputs_that_are_no_images_are_named(geometry):
    for module in (convolution(geometry)[0], removed(geometry)[0]):
        if not isinstance(module, Removed) and not parametrize.is_parametrized(module):
            continue  # torch's own
        x = convolution(geometry)[1]
        empty = x[..., :0]
        with pytest.raises(ValueError, match=r"should (have at least one sample|be of the domain's size)"):
            module(empty)
        for other in (x.numpy(), x.tolist(), None):
            with pytest.raises(TypeError, match="input should be a tensor"):
                module(other)
        assert module(x[:0]).shape == (0, *module(x).shape[1:])


INTEGERS = [np.int64(8), np.int32(8), (np.int64(8), 8), [np.int64(8), np.int16(8)]]


@pytest.mark.parametrize("domain", INTEGERS)
def test_integers_of_numpy_are_integers(domain):
    torch.manual_seed(0)
    W, two = torch.randn(4, 4, 3, 3), np.int64(2)
    plain = (8, 8)
    functions = [
        functional.conv_exp, functional.skew, functional.adjoint, functional.nearest_orthogonal,
        singular_values, orthogonality_defect,
    ]  # fmt: skip
    for function in functions:
        close(function(W, domain), function(W, plain))
        close(function(W[:, :2], domain, groups=two), function(W[:, :2], plain, groups=2))
    for stride in (two, (two, 1)):
        close(singular_values(W, domain, stride=stride), singular_values(W, plain, stride=stride))
        conv = orthogonal(nn.Conv2d(2, 8, 3, padding=1, stride=stride), domain=domain)
        assert conv(torch.zeros(1, 2, 8, 8)).shape[2] == 4
        assert {*map(type, conv.operator.action.domain)} == {int}
        registered = nn.Conv2d(2, 8, 3, padding=1, stride=stride)
        parametrization = ConvExponential(domain, stride=stride, groups=np.int64(1))
        parametrize.register_parametrization(registered, "weight", parametrization, unsafe=True)
        assert "int64" not in repr(registered.parametrizations)
        assert registered.weight.shape[2:] == plain
    orthogonal(nn.Conv2d(4, 4, 3, padding=1, groups=two))(torch.zeros(1, 4, 8, 8))
    assert functional.gate_blocks(np.int64(3), two, np.int64(0)) == functional.gate_blocks(3, 2)
    assert "int64" not in repr(functional.gate_blocks(np.int64(3), two, np.int64(1)))


@pytest.mark.parametrize("bad", ["any", 8.0, True, torch.tensor(8), np.float64(8), (8, None)])
def test_domains_that_are_no_integers_are_named(bad):
    for function in (functional.conv_exp, functional.skew, singular_values, orthogonality_defect):
        with pytest.raises(TypeError, match="domain should be an integer"):
            function(torch.randn(4, 4, 3, 3), bad)


def buffered():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    W = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", W)
    return conv


def plain():
    return nn.Conv2d(4, 4, 3, padding=1)


MISTAKEN = {
    "a container": (lambda: nn.Sequential(plain(), nn.ReLU()), r"loop.*retrofit\(.*anneal=False\)"),
    "a list": (lambda: nn.ModuleList([plain()]), r"loop.*retrofit\(.*anneal=False\)"),
    "a model": (lambda: ConvLSTM("zeros"), r"loop.*retrofit\(.*anneal=False\)"),
    "linear": (lambda: nn.Linear(3, 3), r"torch\.nn\.utils\.parametrizations\.orthogonal"),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(plain()), "remove_parametrizations.*WeightNorm",
    ),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(plain()), "remove_parametrizations.*SpectralNorm",
    ),
    "torch's orthogonal": (
        lambda: nn.utils.parametrizations.orthogonal(plain()), "remove_parametrizations.*Orthogonal",
    ),
    "of itself": (lambda: orthogonal(plain()), "remove_parametrizations.*ConvExponential"),
    "weight_norm of before": (lambda: nn.utils.weight_norm(plain()), "weight_norm"),
    "spectral_norm of before": (lambda: nn.utils.spectral_norm(plain()), "spectral_norm"),
    "pruned": (lambda: prune.l1_unstructured(plain(), "weight", 0.5), "prune"),
    "a buffer": (buffered, r"a buffer.*nn\.Parameter"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated")
@pytest.mark.parametrize("case", MISTAKEN)
def test_what_is_mistaken_for_a_convolution_is_told_the_way_out(case):
    make, message = MISTAKEN[case]
    module = make()
    before, kind = values(module), type(module)
    for options in ({}, {"domain": 8}):
        with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
            orthogonal(module, **options)
    assert type(module) is kind
    assert same(values(module), before)


# What is done to it afterwards


@pytest.mark.parametrize(
    "options", [{}, {"domain": 8}, {"boundary": "walls"}, {"method": "split", "boundary": "walls"}]
)
@pytest.mark.parametrize(
    ("name", "value"), [("stride", (1, 1)), ("padding", 0), ("dilation", (2, 2)), ("groups", 2)]
)
def test_its_geometry_is_not_changed_without_a_word(options, name, value):
    conv = orthogonal(nn.Conv2d(4, 8, 4, padding=1, stride=2), **options)
    x = torch.randn(1, 4, 8, 8)
    y, before = conv(x), getattr(conv, name)
    with pytest.raises(AttributeError, match=f"{name} should not be changed.*remove_parametrizations"):
        setattr(conv, name, value)
    assert getattr(conv, name) == before
    assert torch.equal(copy.deepcopy(conv)(x), y)
    parametrize.remove_parametrizations(conv, "weight")
    close(conv(x), y, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Casting complex values to real", "ignore:Complex modules are a new")
@pytest.mark.parametrize("made_complex", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"domain": 8},
        {"boundary": "walls"},
        {"method": "split"},
        {"method": "split", "boundary": "walls"},
    ],
)
def test_a_real_operator_does_not_become_complex_nor_a_complex_one_real(options, made_complex):
    dtypes = torch.float32, torch.complex64
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=dtypes[made_complex])
    conv = orthogonal(conv, **options).to(dtypes[not made_complex])
    kind = "complex" if made_complex else "real"
    with pytest.raises(TypeError, match=f"should stay {kind}.*Found torch.*{kind} dtypes only"):
        conv(torch.randn(1, 4, 8, 8, dtype=dtypes[not made_complex]))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"domain": 8}, {"boundary": "walls", "base": True}, {"method": "split"},
        {"method": "split", "boundary": "walls"},
    ],
)  # fmt: skip
def test_it_is_made_orthogonal_and_assigned_within_autocast(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    twin = copy.deepcopy(conv)
    W = 0.1 * torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        orthogonal(conv, **options)
        if "domain" not in options:
            conv.weight = W
    orthogonal(twin, **options)
    if "domain" not in options:
        twin.weight = W
    close(conv.weight, twin.weight, atol=1e-6, rtol=0)


def test_a_checkpoint_of_blocks_and_one_of_the_whole_weight_refuse_each_other_in_words():
    model, video = ConvLSTM("zeros", hidden=3), torch.randn(1, 3, 2, 6, 6)
    blocks = {"gates": functional.gate_blocks(hidden=3, gates=4, inputs=2)}
    made = [
        retrofit(copy.deepcopy(model), video, select="gates", blocks=b, anneal=False)
        for b in (blocks, None)
    ]
    for one, other in (made, made[::-1]):
        before = values(other)
        with pytest.raises(RuntimeError, match="made orthogonal in the same way") as refused:
            other.load_state_dict(one.state_dict())
        assert "annealed" not in str(refused.value)
        assert "Missing" not in str(refused.value)
        assert same(values(other), before)


# The package


def test_the_version_is_that_of_the_project():
    assert orthoconv_param.__version__ == metadata.version("orthoconv_param")
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project  # the one of the package
    with pytest.raises(AttributeError, match="plot_spectrumm"):
        orthoconv_param.plot_spectrumm  # noqa: B018


@pytest.mark.slow
def test_a_type_checker_knows_the_names(tmp_path):
    pytest.importorskip("mypy")
    names = [name for name in orthoconv_param.__all__ if name != "functional"]
    lines = {
        "right.py": f"from orthoconv_param import {', '.join(names)}, functional, manifold",
        "from_it.py": "from orthoconv_param import plot_spectrumm",
        "of_it.py": "import orthoconv_param\nprint(orthoconv_param.plot_spectrumm)",
    }
    for file, line in lines.items():
        (tmp_path / file).write_text(line + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    for file in lines:
        errors = [line for line in done.stdout.splitlines() if line.startswith(f"{file}:")]
        assert bool(errors) == (file != "right.py"), done.stdout
        assert all("plot_spectrumm" in line for line in errors)


WAYS = {
    "split": {"method": "split"},
    "split, walls": {"method": "split", "boundary": "walls"},
    "split, cayley": {"method": "split", "triv": "cayley"},
    "exponential": {},
    "exponential, base, walls": {"boundary": "walls", "base": True},
    "exponential on a domain": {"domain": 6},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *itertools.product(["convolution", "complex"], WAYS),
        # what has blocks takes a method and a boundary alone
        *itertools.product(["blocks", "annealed"], ["split", "split, walls", "exponential"]),
        ("removed", "exponential, base, walls"),  # of all others the weight is what it is
    ],
)
def test_a_checkpoint_of_less_precision_gives_matrices_that_are_orthogonal_in_that_of_the_module(kind, way):
    x = torch.randn(1, 4, 6, 6)

    def made(dtype):
        torch.manual_seed(0)
        if kind in ("blocks", "annealed"):
            model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)).to(dtype)
            options = {key: value for key, value in WAYS[way].items() if key in ("method", "boundary")}
            blocks = {"0": [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(0, 4))]}
            options = {"method": "exponential", "boundary": "circular"} | options
            return retrofit(model, x.to(dtype), blocks=blocks, anneal=kind == "annealed", **options)
        dtype = dtype.to_complex() if kind == "complex" else dtype
        module = nn.Sequential(orthogonal(nn.Conv2d(4, 4, 3, padding=1, dtype=dtype), **WAYS[way]))
        if kind == "removed":
            parametrize.remove_parametrizations(module[0], "weight")
        return module

    single, double = made(torch.float32), made(torch.float64)
    if kind == "annealed":
        set_orthogonality(single, 1)
    double.load_state_dict(single.state_dict())
    dtype = torch.complex128 if kind == "complex" else torch.float64
    zero = torch.zeros(1, 4, 6, 6, dtype=dtype)
    M = (double(torch.eye(144, dtype=dtype).view(144, 4, 6, 6)) - double(zero)).flatten(1).mT
    for block in M.detach().split(144):
        assert (torch.linalg.svdvals(block) - 1).abs().max() < 1e-11


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("taps", "dilation"), [(5, 1), (3, 3)])
def test_images_that_circular_padding_cannot_continue_are_refused_in_words(dims, taps, dilation):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    side = dilation * (taps // 2)
    module = orthogonal(make(2, 2, taps, padding=side, dilation=dilation), method="split")
    for batch in ((), (2,)):
        x = torch.randn(*batch, 2, side - 1, *(side,) * (dims - 1))
        with pytest.raises(ValueError, match=r'at least as large as the padding.*boundary="walls"'):
            module(x)
        assert module(torch.randn(*batch, 2, *(side,) * dims)).isfinite().all()
    with pytest.raises(ValueError, match="at least as large as the padding"):
        orthogonality_defect(module, side - 1)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_or_assigned_in_inference_mode_can_be_trained(way):
    plain, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        module = orthogonal(plain, **WAYS[way])
        module(x)
        module.weight = torch.randn(4, 4, 3, 3)
        module.load_state_dict(nn.Conv2d(4, 4, 3, padding=1).state_dict())
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert orthogonality_defect(module, 6) < 1e-5
    with torch.inference_mode():
        inside = nn.Conv2d(4, 4, 3, padding=1)
        with pytest.raises(ValueError, match=r"made outside of torch\.inference_mode"):
            orthogonal(inside, **WAYS[way])
        assert type(inside) is nn.Conv2d
        with pytest.raises(ValueError, match=r"made outside of torch\.inference_mode"):
            retrofit(nn.Sequential(inside), x)


def test_retrofit_in_inference_mode_can_be_trained():
    model, video = ConvLSTM("zeros"), torch.randn(1, 3, 2, 8, 8)
    with torch.inference_mode():
        retrofit(model, video, blocks="recurrent")
    model(video).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
