"""Switching experts off, and making them louder, for a while."""

import pytest
import torch
from tiny import NAMES, convert, distance, run, tiny_inputs, tiny_model
from transformers import AutoModelForSequenceClassification


def by_hand(model, factors):
    """The same factors multiplied into `down`'s columns."""
    for layer, experts in factors.items():
        site = model.moe_sites()[layer]
        for name, param, dim, _ in site.neuron_dims():
            if name == f"{site.spec.down}.weight":
                for expert, factor in experts.items():
                    start = expert * site.act.expert_size
                    param.data.narrow(dim, start, site.act.expert_size).mul_(factor)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_scaled_in_every_architecture(name):
    model, inputs = tiny_model(name), tiny_inputs(name)
    convert(model, k=0.5)
    before = run(model, inputs)
    factors = {0: {1: 0.0, 2: 2.5}, 1: {0: 0.0}}
    with model.boost_experts(factors):
        scaled = run(model, inputs)
    assert distance(before, run(model, inputs)) == 0  # all is as it was
    assert distance(before, scaled) > 1e-4
    by_hand(model, factors)
    assert distance(scaled, run(model, inputs)) < 1e-5


def test_disabled_experts_add_nothing_not_even_inf():
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    convert(model)
    with model.disable_experts({0: [0]}):
        expected = run(model, inputs)
        site = model.moe_sites()[0]
        site.up.bias.data[: site.act.expert_size] = torch.inf
        assert distance(expected, run(model, inputs)) == 0


def test_means_of_neurons_that_do_not_run_are_removed_too():
    """Also in the very first call of a model, before anything was filled in."""
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    convert(model, k=1)
    for site in model.moe_sites():
        site.act.compensate_(torch.randn(48, generator=torch.Generator().manual_seed(0)))
    with model.disable_experts({0: range(6), 1: range(6)}):
        found = run(model, inputs)
    for site in model.moe_sites():
        site.down.weight.data.zero_()
    assert distance(found, run(model, inputs)) < 1e-6


def test_contexts_nest_and_end_with_an_error():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    convert(model, k=0.5)
    before = run(model, inputs)
    with model.disable_experts({0: [0, 1]}):
        one = run(model, inputs)
        with model.disable_experts({1: [3]}), pytest.raises(RuntimeError, match="stop"):
            assert distance(one, run(model, inputs)) > 1e-5
            raise RuntimeError("stop")
        assert distance(one, run(model, inputs)) == 0
    assert distance(before, run(model, inputs)) == 0


@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_sparse_implementations_honour_them(implementation):
    model, inputs = tiny_model("llama-without-biases"), tiny_inputs("llama-without-biases")
    inputs = {key: value[:1, :3] for key, value in inputs.items()}
    convert(model, k=0.5)
    with model.boost_experts({0: {0: 0.0, 1: 3.0}, 1: {2: 0.0}}):
        masked = run(model, inputs)
    model.set_moe_implementation(implementation)
    plain = run(model, inputs)
    with model.boost_experts({0: {0: 0.0, 1: 3.0}, 1: {2: 0.0}}):
        assert distance(masked, run(model, inputs)) < 1e-5
    assert distance(plain, masked) > 1e-3 and distance(plain, run(model, inputs)) < 1e-6


def test_they_come_with_a_checkpoint(tmp_path):
    """Of a class that was loaded from the folder's own files."""
    model, inputs = tiny_model("bert", "AutoModelForSequenceClassification"), tiny_inputs("bert")
    convert(model, k=0.5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "interventions.py").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(loaded).__module__.startswith("transformers_modules")
    with model.disable_experts({0: [1, 2]}), loaded.disable_experts({0: [1, 2]}):
        assert distance(run(model, inputs), run(loaded, inputs)) < 1e-6


@pytest.mark.parametrize(
    "factors, message",
    [
        ({2: {0: 0.0}}, "no routed layer 2: choose from 0 to 1"),
        ({-1: {0: 0.0}}, "no routed layer -1"),
        ({0: {6: 0.0}}, "layer 0 has no expert 6: choose from 0 to 5"),
        ({0: {True: 0.0}}, "no expert True"),
        ({1: {0: float("nan")}}, "layer 1, expert 0: the factor must be a number, got nan"),
        ({1: {0: "loud"}}, "got 'loud'"),
    ],
)
def test_bad_ones_are_named_and_change_nothing(factors, message):
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    convert(model, k=0.5)
    before = run(model, inputs)
    with pytest.raises(ValueError, match=message), model.boost_experts({0: {0: 0.0}, **factors}):
        pass
    assert distance(before, run(model, inputs)) == 0
