"""FFNs are found whatever their parts are called, and what is found is what the module computes."""

from dataclasses import replace

import pytest
import torch
from handmade import (
    BartLike,
    BertLike,
    D,
    FunctionAttribute,
    Fused,
    Gated,
    Inline,
    Layer,
    NormInside,
    Plain,
    Stack,
    Transposed,
    WithDropout,
    sequential,
)
from torch import nn

from moefy_hf.discovery.search import search
from moefy_hf.modeling.ffn_layouts import FfnSpec

MLPS = {  # an FFN in a module of its own -> what is to be found
    "plain": (Plain, FfnSpec("widen", "narrow", "squash")),
    "gated": (Gated, FfnSpec("gate_proj", "b", "twist", gate="c")),
    "fused, gate first": (lambda: Fused(False), FfnSpec("both", "out", "act", parts=2)),
    "fused, up first": (lambda: Fused(True), FfnSpec("both", "out", "act", parts=2, up_first=True)),
    "Conv1D": (Transposed, FfnSpec("c_fc", "c_proj", "act")),
    "Sequential": (sequential, FfnSpec("0", "3", "1", dropout="2")),
    "function attribute": (FunctionAttribute, FfnSpec("lin1", "lin2", "act", function="gelu")),
    "inline function": (Inline, FfnSpec("w3", "w2", "moefied_activation", gate="w1", function="silu")),
    "norm inside": (NormInside, FfnSpec("fc1", "fc2", "act", norm="norm")),
    "dropout": (WithDropout, FfnSpec("first", "last", "act", dropout="drop_b")),
}
LAYERS = {  # a layer that holds the FFN itself
    "BERT-like": (BertLike, FfnSpec("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")),
    "BART-like": (BartLike, FfnSpec("fc1", "fc2", "activation_fn", dropout="activation_dropout")),
}


def found(model: nn.Module) -> dict[str, FfnSpec]:
    result = search(model)
    assert not result.left
    return {site.name: site.spec for site in result.sites}


@pytest.mark.parametrize("name", MLPS)
def test_an_ffn_in_a_module_of_its_own(name):
    make, spec = MLPS[name]
    assert found(Stack(Layer(odd=make()), Layer(odd=make()))) == {"layers.0.odd": spec, "layers.1.odd": spec}


@pytest.mark.parametrize("name", LAYERS)
def test_an_ffn_that_a_layer_holds(name):
    make, spec = LAYERS[name]
    assert found(Stack(make(), make())) == {"layers.0": spec, "layers.1": spec}


@pytest.mark.parametrize("name", [*MLPS, *LAYERS])
def test_the_formula_is_what_runs(name):
    torch.manual_seed(0)
    make, _ = {**MLPS, **LAYERS}[name]
    model = Stack(Layer(odd=make()) if name in MLPS else make()).eval()
    (site,) = search(model).sites
    seen = []
    site.first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    site.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 5, D))
    x, neurons = seen
    torch.testing.assert_close(site.weights().neurons(x), neurons)
    if site.gate is not None or site.spec.parts == 2:  # gate and up the other way round is another function
        spec = replace(site.spec, up_first=not site.spec.up_first)
        if site.gate is not None:
            spec = replace(site.spec, up=site.spec.gate, gate=site.spec.up)
        assert not torch.allclose(replace(site, spec=spec).weights().neurons(x), neurons, atol=1e-3)


def test_layers_that_share_one_module_have_one_ffn():
    shared = Layer(ffn=Plain())
    assert [*found(Stack(shared, shared, shared))] == ["layers.0.ffn"]


def test_a_layer_may_have_two_ffns():
    layer = Layer(ffn=Plain(), second_ffn=Gated())
    assert found(Stack(layer)) == {"layers.0.ffn": MLPS["plain"][1], "layers.0.second_ffn": MLPS["gated"][1]}


def test_each_layer_is_told_by_its_own_activation():
    """Two modules of one class that keep other functions."""
    layers = [Layer(ffn=FunctionAttribute()) for _ in range(2)]
    layers[1].ffn.act = torch.relu
    assert [spec.function for spec in found(Stack(*layers)).values()] == ["gelu", "relu"]


def test_sites_come_in_the_order_of_modules():
    model = Stack(BertLike(), Layer(a=Plain(), b=Gated()), BartLike())
    assert [*found(model)] == ["layers.0", "layers.1.a", "layers.1.b", "layers.2"]


def test_an_ffn_outside_of_any_layer_is_none():
    """What is around the layers is a projection or a head."""
    model = Stack(Layer(ffn=Plain()))
    model.after = Plain()
    assert [*found(model)] == ["layers.0.ffn"]
