"""A converted model is used: other selections, precisions, generation, adapters; and mistakes are refused."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import EXPERT_SIZE, convert, distance, run, tiny, tiny_inputs, tiny_model
from torch import nn

from moefy_hf.loading import moefied_class
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.routed_activation import RoutedActivation
from moefy_hf.modeling.routers import ROUTERS


def test_twice_is_refused():
    model = tiny_model("bert")
    convert(model)
    with pytest.raises(ValueError, match="MoefiedBertModel is MoEfied already"):
        convert(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"expert_size": 7},
            "layer.0: 48 neurons do not split into experts of size 7; nearby divisors: .*6, 8$",
        ),
        ({"expert_size": 96}, "48 neurons do not split into experts of size 96"),
        ({"num_experts": 0}, "48 neurons do not split into experts 0"),
        ({"num_experts": 5}, "48 neurons do not split into experts 5; nearby divisors: .*4, 6$"),
        ({"num_experts": 6.0}, "48 neurons do not split into experts 6.0"),
        ({"layers": []}, r"layers=\[\] must be a non-empty list of FFN positions from 0 to 1"),
        ({"layers": [2]}, r"layers=\[2\] must be"),
        ({"layers": [-1]}, r"layers=\[-1\] must be"),
        ({"k": 7}, "k=7 is out of range: choose 1 to 6 experts"),
        ({"k": [1, 2, 3]}, "k has 3 entries, one per layer is needed: 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(settings, message):
    model = tiny_model("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(model, **settings)
    assert type(model) is transformers.BertModel and not hasattr(model.config, "moefication")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_some_layers_only(tmp_path):
    model, inputs = tiny_model("bart-uneven"), tiny_inputs("bart-uneven")
    dense = run(model, inputs)
    report = convert(model, k=2, layers=[3, 1])
    assert report.experts == [32 // EXPERT_SIZE, 64 // EXPERT_SIZE]
    assert [site.name for site in model.moe_sites()] == ["encoder.layers.1", "decoder.layers.1"]
    assert [isinstance(site.act, RoutedActivation) for site in find_sites(model)] == [False, True, False, True]
    sparse = run(model, inputs)
    assert distance(sparse, dense) > 1e-3
    model.save_pretrained(tmp_path)
    assert distance(run(type(model).from_pretrained(tmp_path), inputs), sparse) == 0


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_number_of_experts(name):
    model = tiny_model(name)
    assert convert(model, num_experts=3).expert_sizes == [16] * tiny(name).ffns


def test_the_selection_is_a_knob(tmp_path):
    """set_selection acts at once, lasts on disk, and leaves everything as it was when it is refused."""
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    dense = run(model, inputs)
    convert(model, k=0.5)
    assert [site.act.selection.k for site in model.moe_sites()] == [3, 3]
    half = run(model, inputs)
    model.set_selection(k=[1, 0.5])
    assert [site.act.selection.k for site in model.moe_sites()] == [1, 3]
    uneven = run(model, inputs)
    assert distance(uneven, half) > 1e-3
    for wrong in ({"k": 7}, {"k": [1]}, {"type": "best"}, {"allocation": "sensitivity", "k": 2}, {"tau": 0.5}):
        with pytest.raises(ValueError):
            model.set_selection(**wrong)
        assert distance(run(model, inputs), uneven) == 0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert distance(run(loaded, inputs), uneven) == 0
    loaded.set_selection(k=1.0)
    assert distance(run(loaded, inputs), dense) < 1e-5


def test_sensitivity_lasts_on_disk(tmp_path):
    model = tiny_model("bert")
    convert(model)
    model.config.moefication["sensitivity"] = {"k": [[1, 6], [1, 6]], "loss": [[1.0, 0.0], [0.1, 0.0]]}
    model.set_selection(k=0.5, allocation="sensitivity")
    assert [site.act.selection.k for site in model.moe_sites()] == [5, 1]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [site.act.selection.k for site in loaded.moe_sites()] == [5, 1]
    loaded.set_selection(k=[2, 2])  # a list fixes every layer
    assert loaded.config.moefication["selection"] == {"type": "top_k", "k": [2, 2], "allocation": "uniform"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "MoefiedBertModel needs a `moefication` section in its config; convert a dense model"),
        ({"format_version": 99}, "format 99, newer than .*upgrade moefy-hf"),
        ({"router": "oracle"}, f"unknown router 'oracle'; choose from {', '.join(ROUTERS)}"),
    ],
)
def test_a_config_that_is_not_ours_is_an_error(change, message):
    model = tiny_model("bert")
    cls, config = moefied_class(type(model)), model.config
    if change:
        convert(model)
        config = model.config
        config.moefication = {**config.moefication, **change}
    with pytest.raises(ValueError, match=message):
        cls(config)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_routers_stay_float32(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "dense")
    model = transformers.AutoModel.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    inputs = tiny_inputs(name)
    convert(model, k=2)
    expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for each in (model, loaded):
        for key, parameter in each.named_parameters():
            assert parameter.dtype == (torch.float32 if ".router." in key else torch.bfloat16), key
    assert distance(run(loaded, inputs), expected) == 0
    wide = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32 and distance(run(wide, inputs), expected) < 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
def test_generation_with_and_without_cache(name):
    """Each token is routed by itself, so that a cache changes nothing, also with few experts."""
    head = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    model = tiny_model(name, head)
    convert(model, k=2)
    inputs = {"input_ids": torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(0))}
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **how, use_cache=True)
    plain = model.generate(**inputs, **how, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences) and len(cached.logits) == 6
    assert distance(list(cached.logits), list(plain.logits)) < 1e-4
    model.set_selection(k=1.0)
    assert distance(list(model.generate(**inputs, **how, use_cache=True).logits[:1]), list(cached.logits[:1])) > 1e-3


TARGETS = {
    "bert": ["intermediate.dense", "output.dense"],
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "t5": ["wi", "wo"],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_lora(name):
    """Adapters on the FFN train, merge and unload, and only the selected neurons reach `down` all the while."""
    model, inputs = tiny_model(name), tiny_inputs(name)
    convert(model, k=2)
    original = run(model, inputs)
    active = []
    for site in model.moe_sites():
        site.down.register_forward_pre_hook(lambda module, args: active.append((args[0] != 0).sum(-1).max().item()))

    adapted = get_peft_model(model, LoraConfig(target_modules=TARGETS[name], r=4, init_lora_weights=False))
    assert not any(".router." in key for key, _ in adapted.named_parameters() if "lora" in key)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = adapted(**inputs)[0].square().mean()
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = run(adapted, inputs)
    assert distance(trained, original) > 1e-3
    assert active and max(active) <= 2 * EXPERT_SIZE

    with adapted.disable_adapter():
        assert distance(run(adapted, inputs), original) < 1e-6
    active.clear()
    model.connect_()  # as from_pretrained does: to what adapters wrap, or the hook would leave with them
    merged = adapted.merge_and_unload()
    assert merged is model and all(isinstance(site.up, nn.Linear) for site in model.moe_sites())
    assert distance(run(merged, inputs), trained) < 1e-4
    assert len(active) == tiny(name).ffns and max(active) <= 2 * EXPERT_SIZE


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_unloads():
    model, inputs = tiny_model("bert"), tiny_inputs("bert")
    convert(model, k=2)
    original = run(model, inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert distance(run(adapted, inputs), original) > 1e-3
    assert distance(run(adapted.unload(), inputs), original) == 0
