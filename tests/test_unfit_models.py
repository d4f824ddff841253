"""Models and data that cannot be converted as they are: one error each, and nothing is changed."""

import functools
import gc

import pytest
import torch
import transformers
from batches import text_batches
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import convert, distance, run, tiny_inputs, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from moefy_hf import MoEficationConfig, evaluate, moefy_, profile
from moefy_hf.conversion import checks as convertible
from moefy_hf.conversion.permute import permute_neurons_

CAUSAL = "AutoModelForCausalLM"
WHOLE_AROUND = convertible.whole_around  # which conftest.py replaces in each test
LEARNING = {"splitter": "coactivation", "router": "linear"}


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


FSDPModule = type("FSDPModule", (), {})  # as FSDP2 adds to a module's bases
WRAPPED = {
    "an adapter": (lora, "merge it first, model = model.merge_and_unload()"),
    "an adapter that was added": (
        lambda model: inject_adapter_in_model(LoraConfig(target_modules=["gate_proj"]), model),
        "gate_proj holds .*lora_A.* merge adapters",
    ),
    "torch.compile": (torch.compile, "convert the one inside, model._orig_mod"),
    "DataParallel": (nn.DataParallel, "convert the model inside, model.module"),
    "FSDP2": (
        lambda model: type("FSDPLlama", (FSDPModule, type(model)), {})(model.config),
        "FSDP has sharded this model",
    ),
    "another library's": (lambda model: nn.Linear(2, 2), "a transformers model, got a Linear"),
}


@pytest.mark.parametrize("what", WRAPPED)
def test_a_wrapped_model_is_refused(what):
    wrap, message = WRAPPED[what]
    model = wrap(tiny_model("llama", CAUSAL))
    with pytest.raises(ValueError, match=message):
        convert(model, k=2)


MASKS = {
    **{f"masks on {name}": functools.partial(prune.l1_unstructured, amount=0.5) for name in ("gate", "up", "down")},
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "the old weight norm": weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("what", MASKS)
def test_masks_and_parametrizations_are_refused(what):
    model, inputs = tiny_model("llama-without-biases", CAUSAL), tiny_inputs("llama")
    part = what.rpartition(" ")[2] if "masks" in what else "gate"
    for layer in model.model.layers:
        linear = getattr(layer.mlp, f"{part}_proj")
        MASKS[what](linear, name="weight")
    before = run(model.eval(), inputs)
    with pytest.raises(ValueError, match=f"{part}_proj holds .* beside its weight and bias.*make pruning"):
        convert(model, k=2)
    assert type(model) is transformers.LlamaForCausalLM and distance(run(model, inputs), before) == 0
    if "masks" in what:
        for layer in model.model.layers:
            prune.remove(getattr(layer.mlp, f"{part}_proj"), "weight")
        convert(model, k=1.0)
        assert distance(run(model, inputs), before) < 1e-5


def test_masks_that_come_later_are_not_permuted_either():
    model = tiny_model("bert")
    convert(model, k=2)
    site = model.moe_sites()[0]
    prune.l1_unstructured(site.up, "weight", 0.5)
    with pytest.raises(ValueError, match="weight_mask, weight_orig beside its weight and bias"):
        permute_neurons_(site, torch.arange(site.sizes[1]))


def test_ffns_that_share_weights_are_refused():
    model = tiny_model("llama-without-biases")
    model.layers[1].mlp.down_proj.weight = model.layers[0].mlp.down_proj.weight
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj and layers.0.mlp.down_proj share down_proj.weight"):
        convert(model, k=2)


def test_a_part_of_a_larger_model_is_refused(monkeypatch):
    monkeypatch.setattr(convertible, "whole_around", WHOLE_AROUND)
    whole = tiny_model("clip")
    with pytest.raises(ValueError, match="CLIPVisionTransformer is part of a CLIPModel|CLIPVisionModel is part of a"):
        convert(whole.vision_model, k=2)
    causal = tiny_model("llama", CAUSAL)
    with pytest.raises(ValueError, match="this LlamaModel is part of a LlamaForCausalLM.*convert the whole"):
        convert(causal.model, k=2)
    convert(causal, k=2)
    part = tiny_model("llama", CAUSAL).model  # whose whole is gone
    gc.collect()
    convert(part, k=2)
    held = {"model": tiny_model("bert")}  # a dictionary, and a list of modules, are no models
    nn.ModuleList([held["model"]])
    convert(held["model"], k=2)


DATA = {
    "rows of lists": ([{"input_ids": [5, 6, 7]}] * 9, "yields a dict: tokenize and collate rows first"),
    "rows of tensors": (
        [{"input_ids": torch.tensor([5, 6, 7])}] * 9,
        r"a single row: its input_ids have shape \(3,\)",
    ),
    "texts": (["5 6 7"] * 9, "yields a str: tokenize and collate"),
    "one batch": ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "yields a str"),
    "tensors": (torch.ones(9, 2, 3, dtype=torch.long), "yields a Tensor"),
    "another tokenizer's": (
        [{"input_ids": torch.full((2, 3), 99)}],
        "token id 99, and the model has embeddings of 99",
    ),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_are_no_batches_are_refused(what):
    data, message = DATA[what]
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        convert(model, calibration=data, **LEARNING)
    assert type(model) is transformers.BertModel
    with pytest.raises(ValueError, match=message):
        profile(model, data, progress=False)


def test_evaluation_asks_for_batches_too():
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    convert(model, k=2)
    for what in ("rows of lists", "rows of tensors", "another tokenizer's"):
        data, message = DATA[what]
        with pytest.raises(ValueError, match=message):
            evaluate(model, data, progress=False)


def test_an_iterator_that_has_been_read_is_an_error():
    data = iter(text_batches(4))
    assert list(data)
    with pytest.raises(ValueError, match="an iterator that has no batch left: give a list, or a DataLoader"):
        convert(tiny_model("bert"), calibration=data, **LEARNING)
    with pytest.raises(ValueError, match="no batch held a token"):
        convert(tiny_model("bert"), calibration=[], **LEARNING)


def overflowing():
    """float16 holds its weights, and not its neurons."""
    model = tiny_model("llama-without-biases", CAUSAL).half()
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, part).weight.data.mul_(2000)
    return model


@pytest.mark.parametrize("settings", [LEARNING, {"router": "sigmoid"}, {"splitter": "coactivation"}])
def test_what_overflows_is_not_learned_from(settings):
    model, data = overflowing(), text_batches(20)
    assert not model(**data[0]).logits.isfinite().all()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.1.mlp: .* not finite in torch.float16: load the model in float32"):
        convert(model, k=2, calibration=data, **settings)
    assert type(model) is transformers.LlamaForCausalLM
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_what_learns_nothing_converts_all_the_same(caplog):
    model, data = overflowing(), text_batches(4, labels="causal")
    report = moefy_(
        model,
        MoEficationConfig(
            expert_size=8,
            splitter="random",
            router="random",
            selection={"type": "top_k", "k": 2, "allocation": "uniform"},
        ),
        data,
        progress=False,
    )
    assert report.fits == [] and report.calibration_tokens == 0
    with pytest.raises(ValueError, match="the dense model's predictions are not finite"):
        evaluate(model, data, progress=False)


def test_predictions_that_overflow_are_an_error_before_anything_is_changed():
    model = tiny_model("llama-without-biases", CAUSAL).half()
    model.lm_head.weight.data.mul_(60000)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match="predictions on calibration data are not finite"):
        moefy_(model, MoEficationConfig(expert_size=8), text_batches(20), progress=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_weights_that_are_not_finite_are_an_error():
    model = tiny_model("bert")
    model.encoder.layer[1].intermediate.dense.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="layer.1.intermediate.dense.weight holds weights that are not finite"):
        convert(model, k=2)
