"""GGUF files for llama.cpp: recomputed by hand as its MoE graphs do, they are the MoEfied model."""

import pytest
import torch
from batches import text_batches
from gguf_files import Moe, Type, write_dense
from test_exporting import CAUSAL, LLAMA3, TINY
from tiny import tiny_model

from moefy_hf import MoEficationConfig, export, moefy_

IDS = torch.randint(3, 99, (12,), generator=torch.Generator().manual_seed(2))
SOURCES = ["llama", "mistral", "qwen2", "qwen3"]
DOUBLE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}  # head_dim 8


def both(tmp_path, source: str = "llama", k=2, size: int = 8, kind=Type.F32, kinds=None, layers=None, shared=0, **changes):
    """A MoEfied model, and the file of what it was before."""
    changes = {"sliding_window": None} | changes if source == "mistral" else changes
    model = tiny_model(TINY.get(source, source), CAUSAL, **changes).eval()
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


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("source", SOURCES)
def test_a_gguf_file_computes_the_same(source, k, tmp_path):
    model, dense = both(tmp_path, source, k)
    assert export(model, tmp_path / "moe.gguf", "gguf", dense=dense) == tmp_path / "moe.gguf"
    assert difference(model, tmp_path / "moe.gguf") < 1e-5
