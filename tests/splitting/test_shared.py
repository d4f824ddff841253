"""Shared experts are made of the neurons that most tokens mark, run for every token, and leave the rest to the
splitter."""

import pytest
import torch
from batches import text_batches
from tiny import convert, distance, run, tiny_inputs, tiny_model

from moefy_hf import profile
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.splitters import SPLITTERS
from moefy_hf.splitters import shared_experts as module
from moefy_hf.splitters.shared_experts import activation_rates, apart

BATCHES = text_batches(20, rows=8)


def loud(name: str = "llama", neurons=(3, 17, 30, 41)):
    """A tiny model in whose FFNs some neurons are far more active than the others."""
    model = tiny_model(name)
    for site in find_sites(model):
        weights = site.weights()
        weights.up.data[list(neurons)] *= 30
        if weights.up_bias is not None:
            weights.up_bias.data[list(neurons)] += 100
    return model


def test_rates_by_hand(monkeypatch):
    monkeypatch.setattr(module, "MARKED", 2)
    with profile(model := tiny_model("bert"), BATCHES, progress=False) as found:
        site, stats = find_sites(model)[0], found.sites[0]
        neurons = site.weights().neurons(stats.inputs).abs()
        best = torch.zeros_like(neurons).scatter(-1, neurons.topk(2, -1).indices, 1).mean(0)
        torch.testing.assert_close(activation_rates(site.weights(), stats), best)
        assert float(best.sum()) == pytest.approx(2)


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("name", ["llama", "bert", "phi3"])
def test_the_busiest_neurons_become_the_shared_expert(name, splitter, monkeypatch):
    monkeypatch.setattr(module, "MARKED", 4)
    dense, model = loud(name), loud(name)
    settings = {"expert_size": 4, "router": "similarity", "splitter": splitter, "shared_experts": 1}
    convert(model, k=1.0, calibration=BATCHES, **settings)
    rows = [site.weights().up[[3, 17, 30, 41]] for site in find_sites(dense)]
    for site, expected in zip(model.moe_sites(), rows, strict=True):
        assert torch.equal(site.weights().up[:4], expected)
        assert (site.act.num_experts, site.act.router.num_experts, site.act.shared) == (12, 11, 1)
    inputs = tiny_inputs(name)
    assert distance(run(model, inputs), run(dense, inputs)) < 1e-5
    model.set_selection(k=1)
    keep = model.moe_sites()[0].act.keep(torch.randn(5, 16))
    assert keep[:, 0].all() and not keep[:, 1:].any()
    model.set_selection(k=3)
    assert (model.moe_sites()[0].act.keep(torch.randn(5, 16)).sum(-1) == 3).all()


@pytest.mark.parametrize("name", ["llama", "bert", "phi3", "gpt2"])
def test_a_part_of_an_ffn_computes_its_neurons(name):
    with profile(model := tiny_model(name), BATCHES, progress=False) as found:
        site, stats = find_sites(model)[0], found.sites[0]
        neurons = torch.tensor([5, 0, 33])
        part, known = apart(site.weights(), stats, neurons)
        x = stats.inputs[:7]
        torch.testing.assert_close(part.neurons(x), site.weights().neurons(x)[:, neurons])
        assert part.down.shape == (16, 3) and torch.equal(known.mass, stats.mass[neurons])


@pytest.mark.parametrize("shared", [-1, 12, 0.5, True])
def test_mistakes(shared):
    with pytest.raises(ValueError, match="shared_experts"):
        convert(tiny_model("llama"), expert_size=4, calibration=BATCHES, shared_experts=shared)


def test_data_is_needed():
    with pytest.raises(ValueError, match="calibration data is missing: shared_experts"):
        convert(tiny_model("llama"), expert_size=4, router="similarity", splitter="random", shared_experts=1)
