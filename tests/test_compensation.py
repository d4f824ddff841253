"""What does not run stands at its mean, in every form of FFN, and nothing else changes."""

import peft
import pytest
import torch
from batches import text_batches
from tiny import convert, distance, run, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig, calibrate_thresholds_, compensate_, moefy_, profile
from moefy_hf.conversion.compensation import means_of_dropped

NAMES = ["bert", "gpt2", "llama", "phi3", "t5", "t5-gated"]
HEAD = {"t5": "AutoModelForSeq2SeqLM", "t5-gated": "AutoModelForSeq2SeqLM"}


def batches_of(name: str) -> list:
    return text_batches(6, labels="seq2seq" if name in HEAD else None)


def compensated(name: str, **settings):
    model = tiny_model(name, HEAD.get(name, "AutoModel"))
    selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
    config = MoEficationConfig(expert_size=8, selection=selection, compensation=True, **settings)
    moefy_(model, config, batches_of(name), progress=False)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [0, 1])
def test_each_ffn_adds_the_means_of_what_did_not_run(name, shared):
    model = compensated(name, shared_experts=shared)
    seen = {}
    for site in model.moe_sites():
        site.first.register_forward_hook(lambda _, args, y, site=site: seen.__setitem__(site.name, [args[0]]))
        site.down.register_forward_hook(lambda _, args, y, site=site: seen[site.name].append(y))
    run(model, tiny_inputs(name, HEAD.get(name, "AutoModel")))
    for site in model.moe_sites():
        x, y = seen[site.name]
        keep = site.act.chosen(site.act.router(x)).repeat_interleave(8, -1)
        assert (~keep).any() and site.act.compensation.abs().max() > 0 and keep[..., : 8 * shared].all()
        weights = site.weights()
        neurons = torch.where(keep, weights.neurons(x), site.act.compensation)
        bias = 0 if site.down.bias is None else site.down.bias
        torch.testing.assert_close(y, neurons @ weights.down.T + bias, rtol=1e-4, atol=1e-5)


def test_means_are_over_the_tokens_that_drop_the_neuron():
    model = tiny_model("bert")
    batches = batches_of("bert")
    convert(model, k=2, expert_size=8, router="random", splitter="random")
    with profile(model, batches, progress=False) as found:
        for site, stats in zip(model.moe_sites(), found.sites, strict=True):
            neurons = site.weights().neurons(stats.inputs)
            dropped = ~site.act.chosen(site.act.router(stats.inputs)).repeat_interleave(8, -1)
            expected = (neurons * dropped).sum(0) / dropped.sum(0).clamp_min(1)
            torch.testing.assert_close(means_of_dropped(site, stats.sample).float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_with_everything_selected_and_as_the_dense_model_nothing_is_added(name, tmp_path):
    head = HEAD.get(name, "AutoModel")
    dense, model, inputs = tiny_model(name, head), compensated(name), tiny_inputs(name, head)
    routed = run(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert distance(run(again, inputs), routed) < 1e-6
    for each in (model, again):
        each.set_selection(k=1.0)
        assert distance(run(each, inputs), run(dense, inputs)) < 1e-5
    assert distance(run(type(dense).from_pretrained(tmp_path).eval(), inputs), run(dense, inputs)) < 1e-5
    assert distance(routed, run(dense, inputs)) > 1e-4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_adapter_around_down_sees_the_means_and_can_be_merged(name):
    model, inputs = compensated(name), tiny_inputs(name)
    target = {"bert": "output.dense", "llama": "down_proj"}[name]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], init_lora_weights=False))
    adapted.eval()
    before = run(adapted, inputs)
    assert distance(run(adapted.merge_and_unload(), inputs), before) < 1e-5


def test_it_reduces_the_error_of_a_biased_ffn():
    """Neurons that are never near zero: without their means the output is far off."""
    errors = []
    for compensation in (False, True):
        dense = tiny_model("bert")
        for layer in dense.encoder.layer:
            layer.intermediate.dense.bias.data.fill_(3)
        inputs = tiny_inputs("bert")
        expected = run(dense, inputs)
        selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
        config = MoEficationConfig(expert_size=8, selection=selection, compensation=compensation)
        moefy_(dense, config, batches_of("bert"), progress=False)
        errors.append(distance(run(dense, inputs), expected))
    assert errors[1] < errors[0] / 2


def test_it_can_be_measured_again_for_another_budget():
    model = compensated("bert")
    before = model.moe_sites()[0].act.compensation.clone()
    model.set_selection(k=4)
    with profile(model, batches_of("bert"), progress=False) as found:
        compensate_(model, found, progress=False)
    assert not torch.equal(model.moe_sites()[0].act.compensation, before)


def test_mistakes():
    model = tiny_model("bert")
    with profile(model, batches_of("bert"), progress=False) as found:
        with pytest.raises(ValueError, match="is not MoEfied"):
            compensate_(model, found)
    convert(model, splitter="random", router="random", k=2)
    with pytest.raises(ValueError, match="no sample of FFN inputs, or was closed"):
        compensate_(model, found)
    with profile(model, batches_of("bert"), layers=[0], progress=False) as found:
        with pytest.raises(ValueError, match="the profile has 1 layers, the model 2 routed FFNs"):
            compensate_(model, found)
        with pytest.raises(ValueError, match="the profile has 1 layers, the model 2 routed FFNs"):
            calibrate_thresholds_(model, found)
    assert not model.config.moefication["compensation"] and "reach" not in model.config.moefication


def test_an_interrupted_call_leaves_nothing_to_the_next():
    model, inputs = compensated("bert"), tiny_inputs("bert", seed=3)
    site = model.moe_sites()[0]
    model.set_selection(k=1.0)
    expected = run(model, inputs)[0]
    model.set_selection(k=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = site.act.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, inputs)
    handle.remove()
    model.set_selection(k=1.0)
    assert torch.equal(run(model, inputs)[0], expected)
