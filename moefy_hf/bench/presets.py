"""Architectures to time without their weights: the configs of well-known models, filled with random numbers."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..loading import checkpoint_class
from ..modeling.section import Section

MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
T5 = {"decoder_start_token_id": 0}
T5_BASE = T5 | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
T5_LARGE = T5 | {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16}
OPT = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}

# name -> (architecture, model type, settings of its config)
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "minilm": ("BertModel", "bert", MINILM),
    "bert-base": ("BertModel", "bert", {}),
    "t5-base": ("T5ForConditionalGeneration", "t5", T5_BASE),
    "t5-large": ("T5ForConditionalGeneration", "t5", T5_LARGE),
    "opt-1.3b": ("OPTForCausalLM", "opt", OPT | {"word_embed_proj_dim": 2048}),
    "smollm2-135m": (
        "LlamaForCausalLM",
        "llama",
        SMOLLM2 | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "llama-1b": ("LlamaForCausalLM", "llama", LLAMA | {"num_key_value_heads": 4}),
}


def preset_config(name: str, moefication: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Return the config of a preset's dense model, or, with a `moefication` section, of its MoEfied one."""
    architecture, model_type, settings = PRESETS[name]
    config = AutoConfig.for_model(model_type, architectures=[architecture], **settings)
    if moefication is not None:
        Section.put(config, moefication)
    return config


def shape_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config, without memory for its weights."""
    with torch.device("meta"):
        return checkpoint_class(config)(config)
