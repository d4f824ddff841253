"""GGUF files for tests: dense ones of tiny models, and what llama.cpp computes of an MoE one, written by hand."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from batches import text_batches
from test_exporting import CAUSAL, TINY
from tiny import tiny_model

from moefy_hf import MoEficationConfig, export, moefy_

Type = gguf.GGMLQuantizationType
IDS = torch.randint(3, 99, (12,), generator=torch.Generator().manual_seed(2))
# sizes that Q8_0 takes, with a head_dim of 8
DOUBLE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(key: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    path, _, kind = key.removeprefix("model.").rpartition(".")
    if path.startswith("layers."):
        _, layer, path = path.split(".", 2)
        return f"blk.{layer}.{NAMES[path]}.{kind}"
    return f"{NAMES[path]}.{kind}"


def write_dense(
    model,
    path: Path,
    kind: Any = Type.F32,
    kinds: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    **settings,
) -> Path:
    """Write the GGUF file of a dense model as llama.cpp's converter does.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3.
        path: of the file.
        kind: type of its matrices.
        kinds: of those whose names contain a key.
        extra: further tensors.
        settings: further metadata, or other values.
    """
    config = model.config
    architecture = config.model_type.removeprefix("moefied-")
    architecture = {"mistral": "llama"}.get(architecture, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    rope = config.rope_parameters
    width = config.head_dim if config.to_dict().get("head_dim") else config.hidden_size // config.num_attention_heads
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (said | settings).items():
        add[type(value)](f"{architecture}.{name}", value)
    add_tokenizer(writer, config.vocab_size)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(width, rope))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    for key, tensor in model.state_dict().items():
        if ".router." in key or key.endswith("neuron_order") or key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers = tensor.float().numpy()
        if architecture == "llama" and key.split(".")[-2] in ("q_proj", "k_proj"):
            # pairs (i, i + half) of a head become (2i, 2i + 1)
            heads = len(numbers) // width
            numbers = numbers.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(numbers.shape)
        name = gguf_name(key)
        its = next((each for part, each in (kinds or {}).items() if part in name), kind)
        if numbers.ndim == 1:
            writer.add_tensor(name, numbers)
        else:
            writer.add_tensor(name, gguf.quantize(numbers, its), raw_dtype=its)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def add_tokenizer(writer, vocabulary: int) -> None:
    """Add a tokenizer of bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(vocabulary - 3))][:vocabulary]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[6] * (vocabulary - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def llama3_factors(width: int, rope: dict[str, Any]) -> np.ndarray:
    """(head_dim / 2,): what divides each frequency, for `rope_type: llama3`."""
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    whole = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((whole / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


class Moe:
    """What llama.cpp computes of a GGUF file of `glm4moe` or `step35`, in float64.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.reader = gguf.GGUFReader(path)
        self.architecture = self.reader.fields["general.architecture"].contents()
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def said(self, name: str) -> Any:
        return self.reader.fields[f"{self.architecture}.{name}"].contents()

    def get(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64))

    def logits(self, ids: torch.Tensor, k: int | None = None) -> torch.Tensor:
        """(tokens,) -> (tokens, vocabulary).

        Args:
            ids: of the tokens.
            k: overrides `expert_used_count` and `expert_weights_scale`.
        """
        x = self.get("token_embd.weight")[ids]
        for layer in range(self.said("block_count")):
            x = x + self.attention(layer, self.normed(x, f"blk.{layer}.attn_norm"))
            norm = "post_attention_norm" if self.architecture == "glm4moe" else "ffn_norm"
            x = x + self.ffn(layer, self.normed(x, f"blk.{layer}.{norm}"), k)
        last = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.normed(x, "output_norm") @ self.get(last).T

    def normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.said("attention.layer_norm_rms_epsilon")
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.get(f"{name}.weight")

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(tokens, d) -> (tokens, d): causal, with pairs (i, i + half) of a head turned."""
        width, block = self.said("attention.key_length"), f"blk.{layer}"

        def heads(part: str) -> torch.Tensor:
            given = x @ self.get(f"{block}.attn_{part}.weight").T
            if f"{block}.attn_{part}.bias" in self.tensors:
                given = given + self.get(f"{block}.attn_{part}.bias")
            given = given.unflatten(-1, (-1, width))
            if f"{block}.attn_{part}_norm.weight" in self.tensors:
                given = self.normed(given, f"{block}.attn_{part}_norm")
            return given

        q, k, v = self.turned(heads("q"), layer), self.turned(heads("k"), layer), heads("v")
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ self.get(f"{block}.attn_output.weight").T

    def turned(self, heads: torch.Tensor, layer: int) -> torch.Tensor:
        width = self.said("rope.dimension_count")
        sliding = False
        if self.architecture == "step35":
            sliding = self.said("attention.sliding_window_pattern")[layer]
            width = self.said("rope.dimension_count_swa") if sliding else width // 2
        assert width == heads.shape[-1]
        angles = self.said("rope.freq_base") ** (-torch.arange(0, width, 2).double() / width)
        if f"{self.architecture}.rope.scaling.type" in self.reader.fields:
            assert self.said("rope.scaling.type") == "linear"
            angles = angles / self.said("rope.scaling.factor")
        if self.architecture == "step35" and not sliding:  # glm4moe never looks at them
            angles = angles / self.get("rope_freqs.weight")
        angles = torch.arange(len(heads))[:, None, None] * angles
        first, second = heads.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    def ffn(self, layer: int, x: torch.Tensor, k: int | None) -> torch.Tensor:
        block = f"blk.{layer}"
        dense = layer < self.said("leading_dense_block_count") and self.architecture == "glm4moe"
        if dense or f"{block}.ffn_gate_inp.weight" not in self.tensors:
            return self.swiglu(x, *(self.get(f"{block}.ffn_{part}.weight") for part in ("gate", "up", "down")))
        gate, up, down = (self.get(f"{block}.ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
        assert self.said("expert_gating_func") == 3 and not self.said("expert_weights_norm")
        sizes = self.said("expert_count"), self.said("expert_feed_forward_length"), x.shape[1]
        assert gate.shape == up.shape == sizes
        scores = x @ self.get(f"{block}.ffn_gate_inp.weight").T
        chosen = (scores + self.get(f"{block}.exp_probs_b.bias")).topk(k or self.said("expert_used_count")).indices
        weights = scores.gather(-1, chosen).softmax(-1) * (k or self.said("expert_weights_scale"))
        out = torch.zeros_like(x)
        for token, (experts, shares) in enumerate(zip(chosen, weights, strict=True)):
            for expert, share in zip(experts, shares, strict=True):
                out[token] += share * self.swiglu(x[token], gate[expert], up[expert], down[expert])
        return out + self.swiglu(x, *(self.get(f"{block}.ffn_{part}_shexp.weight") for part in ("gate", "up", "down")))

    def swiglu(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def both(tmp_path, source: str = "llama", k=2, *, size: int = 8, kind=Type.F32, kinds=None, layers=None, **changes):
    """A MoEfied model, and the file of what it was before."""
    shared = changes.pop("shared", 0)
    changes = {"sliding_window": None} | changes if source == "mistral" else changes
    model = tiny_model(TINY.get(source, source), CAUSAL, **changes).eval()
    if kind in (Type.F16, Type.BF16):  # numbers that these types hold
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float16 if kind == Type.F16 else torch.bfloat16).float()
    dense = write_dense(model, tmp_path / "dense.gguf", kind, kinds)
    selection = {"type": "top_k", "k": k, "allocation": "uniform"}
    settings = {"expert_size": size, "splitter": "random", "calibration_tokens": 300}
    config = MoEficationConfig(router="linear", selection=selection, layers=layers, shared_experts=shared, **settings)
    moefy_(model, config, text_batches(8), progress=False)
    return model, dense


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0]


def difference(model, path, k: int | None = None) -> float:
    ours, theirs = logits(model), Moe(path).logits(IDS, k)
    return float((ours - theirs).abs().max() / ours.abs().max())


def refusal(model, dense, tmp_path) -> str:
    """Return what an export that is refused says; nothing may have been written."""
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    assert sorted(tmp_path.rglob("*")) == there
    return str(error.value)
