"""GGUF files for llama.cpp: recomputed by hand as its MoE graphs do, they are the MoEfied model."""

import gguf
import numpy as np
import pytest
import torch
from gguf_files import DOUBLE, Moe, Type, both, difference, write_dense
from test_exporting import LLAMA3
from transformers import AutoModelForCausalLM

from moefy_hf import export
from moefy_hf.cli.main import main

SOURCES = ["llama", "mistral", "qwen2", "qwen3"]


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
    assert "--override-kv glm4moe.expert_used_count=int:3,glm4moe.expert_weights_scale=float:3" in said
    assert "Q8_0" in said and Moe(tmp_path / "moe.gguf").said("expert_used_count") == 3
    with pytest.raises(SystemExit) as stopped:
        main([*command[:2], str(tmp_path / "other.gguf"), "--to", "gguf"])
    assert stopped.value.code == 2 and "--dense" in capsys.readouterr().err
