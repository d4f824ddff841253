"""GGUF files for llama.cpp: recomputed by hand as its MoE graphs do, they are the MoEfied model."""

import json
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from batches import text_batches
from gguf_files import Moe, Type, write_dense
from test_exporting import CAUSAL, LLAMA3, TINY
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from moefy_hf import MoEficationConfig, export, moefy_
from moefy_hf.cli.main import main
from moefy_hf.exporters.export import export_gguf

IDS = torch.randint(3, 99, (12,), generator=torch.Generator().manual_seed(2))
SOURCES = ["llama", "mistral", "qwen2", "qwen3"]
DOUBLE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}  # head_dim 8


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


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("source", SOURCES)
def test_a_gguf_file_computes_the_same(source, k, tmp_path):
    model, dense = both(tmp_path, source, k)
    assert export(model, tmp_path / "moe.gguf", "gguf", dense=dense) == tmp_path / "moe.gguf"
    assert difference(model, tmp_path / "moe.gguf") < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}])
def test_scaled_positions(rope, tied, tmp_path):
    """Llama 3's scaling takes another architecture, with one more layer."""
    model, dense = both(tmp_path, rope_parameters=rope, tie_word_embeddings=tied)
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    served = Moe(tmp_path / "moe.gguf")
    assert served.architecture == ("step35" if rope is LLAMA3 else "glm4moe")
    assert difference(model, tmp_path / "moe.gguf") < 1e-5
    if rope is LLAMA3:
        assert (
            served.get("blk.2.attn_v.weight").abs().max() == 0 and served.get("blk.2.ffn_up.weight").numel() == 32 * 16
        )


@pytest.mark.parametrize(("source", "k"), [("llama", 3), ("qwen2", 4)])
def test_shared_experts_are_the_engines(source, k, tmp_path):
    model, dense = both(tmp_path, source, k, shared=2)
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    served = Moe(tmp_path / "moe.gguf")
    assert (served.said("expert_count"), served.said("expert_used_count"), served.said("expert_shared_count")) == (
        4,
        k - 2,
        2,
    )
    assert difference(model, tmp_path / "moe.gguf") < 1e-5


@pytest.mark.parametrize(("rope", "layers"), [(None, [1]), (LLAMA3, [0]), (LLAMA3, [1])])
def test_layers_may_stay_dense_where_the_engine_has_such(rope, layers, tmp_path):
    model, dense = both(tmp_path, layers=layers, **({"rope_parameters": rope} if rope else {}))
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    assert difference(model, tmp_path / "moe.gguf") < 1e-5


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_numbers_of_two_bytes_are_moved(kind, tmp_path):
    model, dense = both(tmp_path, "qwen3", kind=kind)
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    types = {
        tensor.name.split(".")[-2]: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "moe.gguf").tensors
    }
    assert {types[f"ffn_{part}_{kin}"] for part in ("gate", "up", "down") for kin in ("exps", "shexp")} == {kind}
    assert types["ffn_gate_inp"] == Type.F32 and types["attn_q"] == kind
    assert difference(model, tmp_path / "moe.gguf") < 1e-5


def test_q8_0_keeps_rows_and_quantises_columns_anew(tmp_path):
    model, dense = both(tmp_path, size=32, kind=Type.Q8_0, **DOUBLE)
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(dense).tensors}
    after = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "moe.gguf").tensors}
    for layer, site in enumerate(model.moe_sites()):
        order = site.act.neuron_order.numpy()
        for part in ("gate", "up"):
            rows = after[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert rows.tensor_type == Type.Q8_0
            assert np.array_equal(rows.data.reshape(128, -1), before[f"blk.{layer}.ffn_{part}.weight"].data[order])
        down = after[f"blk.{layer}.ffn_down_exps.weight"]
        experts = site.down.weight.detach().unflatten(1, (4, 32)).transpose(0, 1).contiguous().numpy()
        assert np.array_equal(down.data, gguf.quantize(experts, Type.Q8_0))  # rounded once, not twice
        site.down.weight.data.copy_(torch.from_numpy(gguf.dequantize(down.data, Type.Q8_0)).transpose(0, 1).flatten(1))
    assert difference(model, tmp_path / "moe.gguf") < 0.05


@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_the_budget_turns_when_loading(rope, tmp_path):
    model, dense = both(tmp_path, **({"rope_parameters": rope} if rope else {}))
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    for k in (1, 4):
        model.set_selection(k=k)
        assert difference(model, tmp_path / "moe.gguf", k) < 1e-5 < difference(model, tmp_path / "moe.gguf")


def test_the_dense_file_may_have_the_order_of_experts(tmp_path):
    """As llama.cpp's converter makes it of `export(to="dense")`: also of a model that was trained as an MoE."""
    model, dense = both(tmp_path, "qwen3")
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    with pytest.raises(ValueError, match=r"has other numbers.*--to dense"):
        export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    export(model, tmp_path / "dense", to="dense")
    again = write_dense(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path / "again.gguf")
    export(model, tmp_path / "moe.gguf", "gguf", dense=again)
    assert difference(model, tmp_path / "moe.gguf") < 1e-5


def test_metadata_and_tokenizer_are_copied(tmp_path):
    model, dense = both(tmp_path)
    export(model, tmp_path / "new" / "moe.gguf", "gguf", dense=str(dense))
    before, after = (gguf.GGUFReader(path).fields for path in (dense, tmp_path / "new" / "moe.gguf"))
    tokenizer = [name for name in before if name.startswith("tokenizer.")]
    assert len(tokenizer) == 7
    for name in tokenizer:
        assert before[name].contents() == after[name].contents() and before[name].types == after[name].types
    assert after["glm4moe.context_length"].contents() == before["llama.context_length"].contents() == 32
    assert not any(name.startswith("llama.") for name in after)


def test_the_command_prints_how_the_budget_is_set(tmp_path, capsys):
    model, dense = both(tmp_path, size=32, kind=Type.Q8_0, **DOUBLE)
    model.save_pretrained(tmp_path / "moe")
    command = ["export", str(tmp_path / "moe"), str(tmp_path / "moe.gguf"), "--to", "gguf", "--dense", str(dense)]
    main([*command, "--k", "3"])
    said = capsys.readouterr().out
    for name, value in (("expert_used_count", "int:3"), ("expert_weights_scale", "float:3")):
        assert f"--override-kv glm4moe.{name}={value}" in said
    assert "Q8_0" in said and Moe(tmp_path / "moe.gguf").said("expert_used_count") == 3
    with pytest.raises(SystemExit) as stopped:
        main(command[:5])
    assert stopped.value.code == 2 and "--dense" in capsys.readouterr().err


# ---- llama.cpp itself, where recipes/serving/README.md has installed it

SERVING = Path(__file__).parents[1] / "recipes" / "serving"
ENGINE = pytest.mark.skipif(
    shutil.which("node") is None or not (SERVING / "node_modules" / "node-llama-cpp").exists(),
    reason="needs node-llama-cpp in recipes/serving",
)


def served(path, tmp_path, k: int | None = None) -> torch.Tensor:
    """(vocabulary,): what llama.cpp computes after `IDS`."""
    prompts, out = tmp_path / "prompts.json", tmp_path / "out.json"
    prompts.write_text(json.dumps({"prompts": [IDS.tolist()], "new_tokens": 1, "stop": []}))
    command = ["node", SERVING / "llama_cpp.mjs", path, prompts, out, "1", *([str(k)] if k else [])]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return torch.tensor(json.loads(out.read_text())["first_logits"][0])


def assert_served(model, path, tmp_path, k: int | None = None) -> None:
    ours = logits(model)[-1]
    assert (served(path, tmp_path, k) - ours).abs().max() < 1e-5 * ours.abs().max()


@ENGINE
@pytest.mark.parametrize(
    ("source", "changes"),
    [("llama", {"shared": 1}), ("llama", {"rope_parameters": LLAMA3}), ("qwen2", {}), ("qwen3", {})],
)
def test_llama_cpp_computes_the_same(source, changes, tmp_path):
    model, dense = both(tmp_path, source, 3, vocab_size=259, **changes)
    export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    assert_served(model, tmp_path / "moe.gguf", tmp_path)
    model.set_selection(k=5)
    assert_served(model, tmp_path / "moe.gguf", tmp_path, k=5 - changes.get("shared", 0))


@ENGINE
@pytest.mark.parametrize(
    ("source", "layers", "rope"), [("llama", 8, None), ("llama", 16, None), ("qwen3", 8, None), ("llama", 9, LLAMA3)]
)
def test_llama_cpp_has_room_for_the_largest_budget(source, layers, rope, tmp_path):
    changes = {"num_hidden_layers": layers, "intermediate_size": 256, "vocab_size": 259}
    model, dense = both(tmp_path, source, size=4, **changes, **({"rope_parameters": rope} if rope else {}))
    most = export_gguf(model, tmp_path / "moe.gguf", dense).most_experts
    assert 20 < most < 64
    model.set_selection(k=most)
    assert_served(model, tmp_path / "moe.gguf", tmp_path, k=most)
    model.set_selection(k=most + 1)
    refused(model, dense, f"room for {most} experts", tmp_path / "none")


# ---- refusals


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
    refused(model, dense, message, tmp_path)


def refused(model, dense, message: str, tmp_path) -> None:
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "moe.gguf", "gguf", dense=dense)
    assert sorted(tmp_path.rglob("*")) == there


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
    refused(model, other, message, tmp_path)


def test_files_of_other_models_are_refused(tmp_path):
    model, _ = both(tmp_path)
    (tmp_path / "text").write_text("nothing of the kind")
    refused(model, None, "--to dense", tmp_path)
    refused(model, tmp_path / "none.gguf", "is no file", tmp_path)
    refused(model, tmp_path / "text", "is no GGUF file", tmp_path)
    own = tiny_model(TINY["llama"], CAUSAL)
    for name, message in [
        ("model.embed_tokens.weight", "token_embd.weight has other numbers"),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight has other numbers"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight has other numbers"),
    ]:
        kept = own.get_parameter(name).data.clone()
        own.get_parameter(name).data.neg_()
        refused(model, write_dense(own, tmp_path / "changed.gguf"), message, tmp_path)
        own.get_parameter(name).data.copy_(kept)
    wide = tiny_model(TINY["llama"], CAUSAL, vocab_size=100)
    refused(
        model,
        write_dense(wide, tmp_path / "changed.gguf"),
        r"token_embd.weight is \(100, 16\), and \(99, 16\)",
        tmp_path,
    )
    deep = tiny_model(TINY["llama"], CAUSAL, num_hidden_layers=3)
    refused(model, write_dense(deep, tmp_path / "changed.gguf"), "block_count is 3, and 2", tmp_path)
    extra = {"blk.1.attn_q.bias": np.zeros(16, np.float32)}
    changed = write_dense(own, tmp_path / "changed.gguf", extra=extra)
    refused(model, changed, "the model has no blk.1.attn_q.bias", tmp_path)
    changed = write_dense(
        own, tmp_path / "changed.gguf", extra={"blk.1.attn_gate.weight": np.zeros((2, 16), np.float32)}
    )
    refused(model, changed, "blk.1.attn_gate.weight, which.*do not", tmp_path)


def test_budgets_beyond_the_engines_graph_are_refused(tmp_path):
    """llama.cpp ends with an assertion there: seen at 36 of 48 experts in 30 layers of Llama."""
    model, dense = both(tmp_path, k=36, size=1, num_hidden_layers=30)
    refused(model, dense, "room for 29 experts.*a larger expert_size", tmp_path)


def test_selections_routers_and_layouts_that_are_no_top_k_are_refused(tmp_path):
    model, dense = both(tmp_path)
    model.set_selection(type="top_p", p=0.5)
    refused(model, dense, "'top_p': model.set_selection", tmp_path)
    gpt2 = tiny_model("gpt2", CAUSAL)
    moefy_(gpt2, MoEficationConfig(expert_size=8, calibration_tokens=300, k=2, allocation="uniform"), text_batches(8))
    refused(gpt2, dense, "SwiGLU", tmp_path)
    biased = tiny_model("llama", CAUSAL)
    moefy_(
        biased, MoEficationConfig(expert_size=8, calibration_tokens=300, k=2, allocation="uniform"), text_batches(8)
    )
    refused(biased, dense, "has biases", tmp_path)
    with pytest.raises(ValueError, match="to='gguf' alone"):
        export(model, tmp_path / "out", "llama4", dense=dense)


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
