"""The probe tells what structure does not, and leaves no trace."""

import copy

import pytest
import torch
from handmade import BertLike, D, FunctionAttribute, Fused, Gated, Inline, Layer, NormInside, Plain, Stack, WithDropout
from torch import nn
from transformers.activations import ACT2FN

from moefy_hf.discovery.probe import FUNCTIONS, CannotRun, confirmed, function_of
from moefy_hf.discovery.search import search
from moefy_hf.modeling.ffn_layouts import FfnSpec


def everything() -> nn.Module:
    layers = [Layer(ffn=make()) for make in (Plain, Gated, Inline, NormInside, WithDropout, FunctionAttribute)]
    return Stack(*layers, Layer(ffn=Fused(True)), BertLike())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_told_by_their_values(name):
    assert function_of(ACT2FN[name]) == name
    other = FunctionAttribute()
    other.act = ACT2FN[name].forward
    assert [site.spec.function for site in search(Stack(Layer(ffn=other))).sites] == [name]


def test_a_function_of_nobody_is_none():
    assert function_of(lambda x: x.clamp(-1, 1) ** 3) is None
    assert function_of(lambda x, y: x) is None


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_neurons_is_found_by_running(training):
    ffn = WithDropout().train(training)
    (found,) = confirmed(ffn, [FfnSpec("first", "last", "act")], (D, 36))
    assert found.dropout == "drop_b" and (ffn.drop_a.p, ffn.drop_b.p) == (0.1, 0.3)


def test_only_what_fits_is_confirmed():
    right = FfnSpec("gate_proj", "b", "twist", gate="c")
    wrong = FfnSpec("c", "b", "twist", gate="gate_proj")
    assert confirmed(Gated(), [wrong, right], (D, 36)) == [right]
    assert confirmed(Gated(), [wrong], (D, 36)) == []
    assert confirmed(Inline(), [FfnSpec("w3", "w2", "act", gate="w1", function="gelu")], (D, 36)) == []


def test_what_does_not_run_is_said():
    class TwoInputs(Plain):
        def forward(self, x, *, memory):
            return super().forward(x + memory)

    with pytest.raises(CannotRun, match="TwoInputs does not run on one tensor by itself"):
        confirmed(TwoInputs(), [FfnSpec("widen", "narrow", "squash")], (D, 36))


@pytest.mark.parametrize("training", [True, False])
def test_a_search_changes_nothing(training):
    model = everything().train(training)
    hook = model.layers[0].ffn.widen.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    pre_hook = model.layers[1].ffn.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    addresses = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    values = copy.deepcopy(model.state_dict())
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    attributes = {name: {*vars(module)} for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert len(search(model).sites) == 8
    assert torch.equal(torch.rand(4), expected)  # the global generator played no part
    assert {n: (t.data_ptr(), t._version) for n, t in model.state_dict().items()} == addresses
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert [(name, id(module), module.training) for name, module in model.named_modules()] == modules
    assert {name: {*vars(module)} for name, module in model.named_modules()} == attributes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    hook.remove()
    pre_hook.remove()


def test_models_on_the_meta_device_are_asked_too():
    with torch.device("meta"):
        model = everything()
    assert [(s.name, s.spec) for s in search(model).sites] == [(s.name, s.spec) for s in search(everything()).sites]
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_does_not_matter(kind):
    found = search(everything().to(kind)).sites
    assert [(s.name, s.spec) for s in found] == [(s.name, s.spec) for s in search(everything()).sites]


def test_weights_that_say_nothing_do_not_matter():
    """Zeros, or values that overflow: the copy that runs has weights of its own."""
    model = everything()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.inf)
    assert len(search(model).sites) == 8
