"""One tiny model per architecture, made from nothing: no network, a few thousand parameters each.

`TINY` has one row per model type that is tested in depth; `VARIANTS` are further layouts of the same architectures.
Biases and norms are random, because a permutation that forgets a bias of zeros, or a norm of ones, would go unnoticed.
"""

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from moefy_hf import ConversionReport, MoEficationConfig, moefy_

VOCAB, LENGTH, EXPERT_SIZE = 99, 7, 8


@dataclass(frozen=True)
class Tiny:
    """A tiny configuration: `ffns` FFNs in the full model, and which inputs it takes."""

    model_type: str
    ffns: int = 2
    inputs: str = "text"  # text | seq2seq | speech | image | clip
    config: dict[str, Any] = field(default_factory=dict)


TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8, "use_cache": False}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 16}
GPT = {"n_embd": 16, "n_inner": 48, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False}
T5 = {
    **TOKENS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
GATED_T5 = {**T5, "feed_forward_proj": "gated-gelu"}
BART = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "use_cache": False,
}
WHISPER = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 6,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
IMAGE = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE |= {"image_size": 8, "patch_size": 4}
CLIP = {
    "text_config": {**ENCODER, "hidden_size": 24, "num_attention_heads": 3, "projection_dim": 12},
    "vision_config": {**IMAGE, "intermediate_size": 32, "projection_dim": 12},
    "projection_dim": 12,
}

TINY = {
    tiny.model_type: tiny
    for tiny in (
        Tiny("t5", 4, "seq2seq", {**T5, "feed_forward_proj": "relu"}),
        Tiny("mt5", 4, "seq2seq", GATED_T5),
        Tiny("umt5", 4, "seq2seq", GATED_T5),
        Tiny("opt", config={**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 16}),
        Tiny("bart", 4, "seq2seq", BART),
        Tiny("mbart", 4, "seq2seq", BART),
        Tiny("pegasus", 4, "seq2seq", BART),
        Tiny("marian", 4, "seq2seq", BART),
        Tiny("whisper", 4, "speech", WHISPER),
        Tiny("vit", inputs="image", config=IMAGE),
        Tiny("clip", 4, "clip", CLIP),
        Tiny("phi", config={**DECODER, "num_key_value_heads": 2}),
        Tiny("bert", config=ENCODER),
        Tiny("roberta", config=ENCODER),
        Tiny("xlm-roberta", config=ENCODER),
        Tiny("electra", config={**ENCODER, "embedding_size": 12}),
        Tiny("deberta", config=DEBERTA),
        Tiny("deberta-v2", config={**DEBERTA, "share_att_key": True, "position_buckets": 4}),
        Tiny("distilbert", config={**TOKENS, "dim": 16, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}),
        Tiny("gpt2", config={**TOKENS, **GPT}),
        Tiny(
            "gpt_neo",
            config={**DECODER, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        ),
        Tiny("starcoder2", config=DECODER),
        Tiny("gpt_neox", config=DECODER),
        Tiny("falcon", config={**ENCODER, "use_cache": False, "ffn_hidden_size": 48, "bias": True}),
        Tiny("gptj", config={**TOKENS, **GPT, "rotary_dim": 4}),
        Tiny("llama", config={**DECODER, "mlp_bias": True}),
        Tiny("mistral", config=DECODER),
        Tiny("qwen2", config=DECODER),
        Tiny("qwen3", config=DECODER),
        Tiny("gemma", config=DECODER),
        Tiny("gemma2", config=DECODER),
        Tiny("gemma3_text", config=DECODER),
        Tiny("olmo2", config=DECODER),
        Tiny("granite", config={**DECODER, "mlp_bias": True}),
        Tiny("phi3", config=DECODER),
        Tiny("modernbert", config={**ENCODER, "mlp_bias": True, "cls_token_id": 1, "sep_token_id": 2}),
    )
}
VARIANTS = {
    "t5-gated": Tiny("t5", 4, "seq2seq", GATED_T5),
    "bart-uneven": Tiny("bart", 4, "seq2seq", {**BART, "encoder_ffn_dim": 32, "decoder_ffn_dim": 64}),
    "bert-sigmoid": Tiny("bert", config={**ENCODER, "hidden_act": "sigmoid"}),  # act(0) is not 0
    "llama-without-biases": Tiny("llama", config=DECODER),
}
NAMES = [*TINY, *VARIANTS]


def tiny(name: str) -> Tiny:
    return TINY[name] if name in TINY else VARIANTS[name]


def tiny_config(name: str, **changes) -> transformers.PreTrainedConfig:
    """Without dropout, so that training is reproducible too; `changes` override the tiny configuration."""
    case = tiny(name)
    config = transformers.CONFIG_MAPPING[case.model_type](**{**case.config, **changes})
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for key in part.to_dict():
            if "dropout" in key or key.endswith("pdrop") or key == "encoder_layerdrop" or key == "decoder_layerdrop":
                setattr(part, key, 0.0)
    return config


def tiny_model(name: str, head: str = "AutoModel", seed: int = 0, **changes) -> nn.Module:
    """A stock transformers model: `head` is the AutoModel class that builds it. Evaluation mode, float32."""
    model = getattr(transformers, head).from_config(tiny_config(name, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                else:  # biases and norms keep their centre, 0 or 1
                    parameter.add_(noise, alpha=0.1)
    return model.eval()


def convert(model: nn.Module, k: int | float | list = 1.0, calibration=None, **settings) -> ConversionReport:
    """MoEfy in place, all towers, by default without data: random experts of eight neurons, random routers."""
    settings = {"expert_size": EXPERT_SIZE, "splitter": "random", "router": "random", "towers": "all", **settings}
    selection = {"type": "top_k", "k": k, "allocation": "uniform"}
    return moefy_(model, MoEficationConfig(selection=selection, **settings), calibration, progress=False)


@cache
def _converted(name: str, head: str) -> nn.Module:
    convert(model := tiny_model(name, head))
    return model


def tiny_moefied(name: str, k: int | float = 2, head: str = "AutoModel") -> nn.Module:
    """A model that was converted without data, as a copy: each is converted once in a process."""
    model = copy.deepcopy(_converted(name, head))
    model.set_selection(type="top_k", k=k, allocation="uniform")
    return model


def tiny_inputs(name: str, head: str = "AutoModel", seed: int = 1) -> dict[str, torch.Tensor]:
    """Two examples for the model that `head` builds; the second text is padded."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def text(prefix: str = "") -> dict[str, torch.Tensor]:
        shape = (2, 3, LENGTH) if head == "AutoModelForMultipleChoice" else (2, LENGTH)
        ids = torch.randint(3, VOCAB, shape, generator=generator)
        mask = torch.ones_like(ids)
        ids[-1, ..., -2:], mask[-1, ..., -2:] = 0, 0
        ids[..., -1, None][mask[..., -1, None] == 1] = 2  # BART classifies at the last end-of-sentence token
        ids[-1, ..., -3] = 2
        return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}

    config, kind = tiny(name).config, tiny(name).inputs
    if kind == "image" or (kind == "clip" and head == "AutoModelForImageClassification"):
        return {"pixel_values": noise(2, 3, 8, 8)}
    if kind == "clip":
        return {"pixel_values": noise(2, 3, 8, 8), **text()}
    if kind == "speech" and head != "AutoModelForCausalLM":
        features = {"input_features": noise(2, config["num_mel_bins"], 2 * config["max_source_positions"])}
        decoder = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
        return features if head == "AutoModelForAudioClassification" else {**features, "decoder_input_ids": decoder}
    if kind == "seq2seq" and head in ("AutoModel", "AutoModelForSeq2SeqLM"):
        return {**text(), **text("decoder_")}
    return text()


def tensors(output: Any) -> list[torch.Tensor]:
    """Every floating-point tensor of a model's output, nested ones too."""
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = tensors(model(**inputs))
    assert found, "the model returned no tensors"
    return found


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference between two outputs; nan counts as infinitely far."""
    assert [x.shape for x in a] == [x.shape for x in b]
    worst = max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))
    return worst if worst == worst else float("inf")
