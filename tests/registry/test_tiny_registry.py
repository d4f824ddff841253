"""The harness itself: tiny models of each modality run on batches that are made up for them."""

import pytest
import torch
from shrinking import VOCAB
from tiny_registry import first_output, model_types, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForMultipleChoice, PreTrainedModel

from moefy_hf.errors import UnsupportedModel
from moefy_hf.measure.made_up_inputs import made_up_batch

INPUTS = {
    "bert": {"input_ids", "attention_mask"},
    "llama": {"input_ids", "attention_mask"},
    "t5": {"input_ids", "attention_mask", "decoder_input_ids"},
    "vit": {"pixel_values"},
    "swin": {"pixel_values"},
    "clip": {"input_ids", "attention_mask", "pixel_values"},
    "llava": {"input_ids", "attention_mask"},
    "qwen2_5_vl": {"input_ids", "attention_mask"},
    "qwen2_5_vl_vision": {"hidden_states", "grid_thw"},
    "wav2vec2": {"input_values"},
    "whisper": {"input_features", "decoder_input_ids"},
    "vision-encoder-decoder": {"pixel_values", "decoder_input_ids"},
    "time_series_transformer": {"past_values", "past_time_features", "past_observed_mask"},
}


@pytest.mark.parametrize("model_type", INPUTS)
def test_a_batch_has_the_inputs_of_the_modality_and_the_model_runs_on_it(model_type):
    model = tiny_model(model_type)
    batch = made_up_batch(model, tokens=12, batch=3)
    assert set(batch) == INPUTS[model_type]
    for name in ("input_ids", "decoder_input_ids", "attention_mask"):
        assert name not in batch or batch[name].shape == (3, 12)
    first = first_output(model, batch)
    assert torch.isfinite(first).all() and first.std() > 0
    assert torch.equal(first, first_output(model, batch))


def test_a_seed_makes_the_same_batch_and_another_seed_another():
    model = tiny_model("clip")
    one, same, other = (made_up_batch(model, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_a_model_stays_as_it_is_and_so_do_random_numbers():
    model = tiny_model("wav2vec2").train()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    made_up_batch(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_floating_point_inputs_have_the_dtype_of_the_model():
    assert made_up_batch(tiny_model("vit").to(torch.bfloat16))["pixel_values"].dtype == torch.bfloat16


def test_text_has_no_special_tokens():
    model = tiny_model("llava")
    model.config.text_config.pad_token_id = 5
    ids = made_up_batch(model, tokens=4000)["input_ids"]
    assert not torch.isin(ids, torch.tensor([5, model.config.image_token_id])).any()
    assert len(ids.unique()) > VOCAB // 2


def test_multiple_choice_has_choices():
    model = AutoModelForMultipleChoice.from_config(tiny_config("bert"))
    batch = made_up_batch(model)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, 16)


class Strange(PreTrainedModel):
    """It needs an input that no rule makes, or fails on every input."""

    config_class = type(tiny_config("bert"))

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(1, 1)
        self.post_init()


class Telepathic(Strange):
    def forward(self, thoughts):
        return thoughts


class Picky(Strange):
    def forward(self, input_ids=None, attention_mask=None):
        raise RuntimeError("not today")


@pytest.mark.parametrize("model_class,reason", [(Telepathic, "thoughts"), (Picky, "not today")])
def test_what_cannot_be_run_is_refused_with_class_and_reason(model_class, reason):
    with pytest.raises(UnsupportedModel, match=f"{model_class.__name__}.*{reason}"):
        made_up_batch(model_class(tiny_config("bert")))


def test_tiny_models_are_tiny_reproducible_and_nowhere_zero():
    for model_type in ("dinov2", "qwen3_moe", "gpt_neox"):
        model, same, other = tiny_model(model_type), tiny_model(model_type), tiny_model(model_type, seed=1)
        parameters = dict(model.named_parameters())
        assert sum(value.numel() for value in parameters.values()) < 500_000
        assert all(value.abs().max() > 1e-3 for value in parameters.values())
        assert all(torch.equal(value, parameters[name]) for name, value in same.named_parameters())
        assert not all(torch.equal(value, parameters[name]) for name, value in other.named_parameters())


def test_kinds_of_layers_stay():
    config = tiny_config("deepseek_v3")
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers
    assert set(tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}


def test_the_registry_is_that_of_transformers():
    assert len(model_types()) > 500 and {"bert", "llama", "vit", "whisper"} <= set(model_types())
