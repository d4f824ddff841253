"""What llama.cpp cannot compute, and dense GGUF files of other models, are refused before anything is written."""

import re

import numpy as np
import pytest
from batches import text_batches
from gguf_files import DOUBLE, Type, both, refusal, write_dense
from test_exporting import CAUSAL, TINY
from tiny import convert, tiny_model

from moefy_hf import export


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("llama", {"k": [1, 2]}, "1 to 2 experts.*allocation='uniform'"),
        ("llama", {"hidden_act": "gelu"}, "SwiGLU"),
        ("mistral", {"sliding_window": 8}, "no sliding attention"),
        ("llama", {"layers": [0]}, "dense layers before all others only: convert with layers=None"),
        ("llama", {"kind": Type.Q8_0, **DOUBLE}, "blocks of 32, and an expert has 8 .*expert_size=32"),
        ("llama", {"kinds": {"ffn_up": Type.Q4_0}, **DOUBLE}, "ffn_up.weight is Q4_0; F32, F16, BF16 and Q8_0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"attention_bias": True}, "attn_output.bias.*MoE architectures do not"),
    ],
)
def test_what_the_engine_cannot_compute_is_refused(source, changes, message, tmp_path):
    model, dense = both(tmp_path, source, **changes)
    assert re.search(message, refusal(model, dense, tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope.freq_base": 5000.0}, "positions turn.*otherwise"),
        ({"attention.head_count": 4, "attention.key_length": 8}, "head_count is 4, and 2 in the model"),
        ({"attention.layer_norm_rms_epsilon": 1e-3}, "rms_epsilon is"),
        ({"attention.scale": 0.5}, "llama.attention.scale, which.*do not"),
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"rope.dimension_count": 4}, "turned in part"),
    ],
)
def test_files_that_say_something_else_are_refused(settings, message, tmp_path):
    model, _ = both(tmp_path)
    other = write_dense(tiny_model(TINY["llama"], CAUSAL), tmp_path / "other.gguf", **settings)
    assert re.search(message, refusal(model, other, tmp_path))


def test_files_of_other_models_are_refused(tmp_path):
    model, _ = both(tmp_path)
    (tmp_path / "text").write_text("nothing of the kind")
    assert re.search("--to dense", refusal(model, None, tmp_path))
    assert re.search("is no file", refusal(model, tmp_path / "none.gguf", tmp_path))
    assert re.search("is no GGUF file", refusal(model, tmp_path / "text", tmp_path))
    own = tiny_model(TINY["llama"], CAUSAL)
    for name, message in [
        ("model.embed_tokens.weight", "token_embd.weight has other numbers"),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight has other numbers"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight has other numbers"),
    ]:
        kept = own.get_parameter(name).data.clone()
        own.get_parameter(name).data.neg_()
        assert re.search(message, refusal(model, write_dense(own, tmp_path / "changed.gguf"), tmp_path))
        own.get_parameter(name).data.copy_(kept)
    wide = tiny_model(TINY["llama"], CAUSAL, vocab_size=100)
    assert re.search(
        r"token_embd.weight is \(100, 16\), and \(99, 16\)",
        refusal(model, write_dense(wide, tmp_path / "changed.gguf"), tmp_path),
    )
    deep = tiny_model(TINY["llama"], CAUSAL, num_hidden_layers=3)
    assert re.search("block_count is 3, and 2", refusal(model, write_dense(deep, tmp_path / "changed.gguf"), tmp_path))
    extra = {"blk.1.attn_q.bias": np.zeros(16, np.float32)}
    changed = write_dense(own, tmp_path / "changed.gguf", extra=extra)
    assert re.search("the model has no blk.1.attn_q.bias", refusal(model, changed, tmp_path))
    changed = write_dense(
        own, tmp_path / "changed.gguf", extra={"blk.1.attn_gate.weight": np.zeros((2, 16), np.float32)}
    )
    assert re.search("blk.1.attn_gate.weight, which.*do not", refusal(model, changed, tmp_path))


def test_budgets_beyond_the_engines_graph_are_refused(tmp_path):
    """llama.cpp ends with an assertion there: seen at 36 of 48 experts in 30 layers of Llama."""
    model, dense = both(tmp_path, k=36, size=1, num_hidden_layers=30)
    assert re.search("room for 30 experts.*a larger expert_size", refusal(model, dense, tmp_path))


def test_selections_routers_and_layouts_that_are_no_top_k_are_refused(tmp_path):
    model, dense = both(tmp_path)
    model.set_selection(type="top_p", p=0.5)
    assert re.search("'top_p': model.set_selection", refusal(model, dense, tmp_path))
    for name, message in (("gpt2", "SwiGLU"), ("llama", "has biases")):
        other = tiny_model(name, CAUSAL)
        convert(other, 2, router="similarity")
        assert re.search("'similarity' one: convert with router='linear'", refusal(other, dense, tmp_path))
        other = tiny_model(name, CAUSAL)
        convert(other, 2, text_batches(8), router="linear")
        assert re.search(message, refusal(other, dense, tmp_path))
    with pytest.raises(ValueError, match="to='gguf' alone"):
        export(model, tmp_path / "out", "granitemoe", dense=dense)


def test_nothing_is_overwritten_and_nothing_is_left(tmp_path, monkeypatch):
    model, dense = both(tmp_path)
    with pytest.raises(FileExistsError, match="choose another"):
        export(model, dense, "gguf", dense=dense)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", fail)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    assert list(tmp_path.iterdir()) == [dense]
