"""Exported checkpoints load as stock architectures, without our code, and compute what the MoEfied model does."""

import json

import pytest
import torch
import transformers
from batches import text_batches
from tiny import convert, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from moefy_hf import MoEficationConfig, export, moefy_
from moefy_hf.exporters.formats import EXPORT_FORMATS

PAIRS = [(source, name) for name, each in EXPORT_FORMATS.items() for source in each.sources]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]  # of experts, in transformers
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
CHANGES = {
    ("mistral", "granitemoe"): {"sliding_window": None},
    ("granite", "granitemoe"): {**MULTIPLIERS, "attention_multiplier": 0.2, "mlp_bias": False},
}
TINY = {"llama": "llama-without-biases"}
CAUSAL = "AutoModelForCausalLM"
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}


def moefied(source: str, k=2, router: str = "linear", **changes):
    return route(tiny_model(TINY.get(source, source), CAUSAL, **changes).eval(), k, router)


def route(model, k=2, router: str = "linear", layers: list[int] | None = None):
    selection = {"type": "top_k", "k": k, "allocation": "uniform"}
    settings = {"expert_size": 8, "splitter": "random", "calibration_tokens": 300, "layers": layers}
    batches = None if router == "random" else text_batches(8)
    moefy_(model, MoEficationConfig(router=router, selection=selection, **settings), batches, progress=False)
    return model


def assert_same(model, served, source: str) -> None:
    ours, theirs = logits(model, source), logits(served, source)
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def logits(model, source: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_inputs(TINY.get(source, source), CAUSAL)["input_ids"]).logits


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_served_architectures_compute_the_same(source, to, k, tmp_path):
    model = moefied(source, k, **CHANGES.get((source, to), {}))
    assert export(model, tmp_path / "out", to) == tmp_path / "out"
    served, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(served).__name__ == EXPORT_FORMATS[to].architecture and type(served).__module__.startswith(
        "transformers."
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same(model, served, source)
    if k < 6:  # the selection matters
        ours = logits(model, source)
        model.set_selection(k=6)
        assert (ours - logits(model, source)).abs().max() > 1e-3 * ours.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_granitemoe_runs_on_every_implementation_of_experts(implementation, k, tmp_path):
    model = moefied("llama", k)
    export(model, tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation=implementation)
    assert served.config._experts_implementation == implementation
    assert_same(model, served, "llama")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_are_granitemoes(shared, implementation, tmp_path):
    settings = {"expert_size": 8, "router": "linear", "shared_experts": shared}
    convert(model := tiny_model("llama-without-biases", CAUSAL).eval(), shared + 2, text_batches(8), **settings)
    export(model, tmp_path / "out")
    served, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, experts_implementation=implementation
    )
    assert type(served).__name__ == "GraniteMoeSharedForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (served.config.num_local_experts, served.config.num_experts_per_tok) == (6 - shared, 2)
    assert_same(model, served, "llama")
    for site in model.moe_sites():
        site.down.weight.data[:, : 8 * shared] = 0
    with pytest.raises(AssertionError):  # the shared experts matter
        assert_same(model, served, "llama")


@pytest.mark.parametrize(("source", "changes"), [("llama", {"attention_bias": True}), ("qwen2", {})])
def test_biases_of_the_attention_come_along(source, changes, tmp_path):
    """Llama's output projection then has one, too; Qwen 2's has none."""
    model = moefied(source, **changes)
    export(model, tmp_path / "out", "granitemoe")
    served, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert served.config.attention_bias and not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(model, served, source)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data += 1
    with pytest.raises(AssertionError):  # they matter
        assert_same(model, served, source)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("source", ["llama", "qwen3"])
def test_embeddings_stay_tied_or_not(source, tied, tmp_path):
    model = moefied(source, tie_word_embeddings=tied)
    export(model, tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (served.lm_head.weight is served.model.embed_tokens.weight) is tied
    assert_same(model, served, source)


def test_some_layers_may_stay_dense_where_the_target_has_such(tmp_path):
    model = tiny_model("qwen3", CAUSAL).eval()
    route(model, layers=[1])
    export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_only_layers"] == [0]
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(model, served, "qwen3")


def test_granitemoe_is_exact_where_a_softmax_is_not(tmp_path):
    """Many experts, layers and tokens: some scores are so close that a softmax calls them equal."""
    torch.manual_seed(0)
    changes = {"num_hidden_layers": 6, "intermediate_size": 512, "hidden_size": 32, "rope_parameters": LLAMA3}
    model = tiny_model("llama-without-biases", CAUSAL, **changes)
    settings = {
        "expert_size": 4,
        "splitter": "random",
        "selection": {"type": "top_k", "k": 32, "allocation": "uniform"},
    }
    moefy_(
        model, MoEficationConfig(router="linear", calibration_tokens=300, **settings), text_batches(8), progress=False
    )
    ids = torch.randint(3, 99, (16, 32), generator=torch.Generator().manual_seed(1))
    found = {}
    for to in ("granitemoe", "mixtral"):
        export(model, tmp_path / to, to)
        served = AutoModelForCausalLM.from_pretrained(tmp_path / to)
        with torch.no_grad():
            ours, theirs = (each.eval()(input_ids=ids).logits for each in (model, served))
        found[to] = float((ours - theirs).abs().max() / ours.abs().max())
    assert found["granitemoe"] < 1e-5 < found["mixtral"], found


def test_bfloat16_routes_alike(tmp_path):
    """Scaled scores select as the scores do in bfloat16, too; also in engines that take a softmax of all of them."""
    model = moefied("llama").bfloat16()
    export(model, tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert served.dtype == torch.bfloat16
    ours, theirs = logits(model, "llama").float(), logits(served, "llama").float()
    assert (ours - theirs).norm() < 0.05 * ours.norm()
    for site, layer in zip(model.moe_sites(), served.model.layers, strict=True):
        x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
        scores, weights, chosen = layer.block_sparse_moe.router(x)
        assert torch.equal(weights, torch.full_like(weights, 0.5))  # k is 2
        assert torch.equal(chosen.sort().values, site.act.router(x).topk(2).indices.sort().values)
        assert torch.equal(chosen, scores.softmax(-1).topk(2).indices)


def test_a_window_of_attention_has_another_target(tmp_path):
    model = moefied("mistral")
    export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    with pytest.raises(ValueError, match="no sliding attention: export to 'mixtral'"):
        export(model, tmp_path / "other", "granitemoe")


@pytest.mark.parametrize(("name", "head"), [("bert", "AutoModelForSequenceClassification"), ("gpt2", CAUSAL)])
def test_the_dense_checkpoint_comes_back(name, head, tmp_path):
    model = tiny_model(name, head).eval()
    convert(model, 2)
    export(model, tmp_path / "out", to="dense")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"moefication", "auto_map"} & set(config)
    dense, info = getattr(transformers, head).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.set_selection(k=1.0)
    inputs = tiny_inputs(name, head)
    with torch.no_grad():
        torch.testing.assert_close(dense(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_shards_hold_everything_once(tmp_path):
    model = moefied("llama")
    export(model, tmp_path / "whole")
    export(model, tmp_path / "parts", max_shard_bytes=10_000)
    files = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 3 * 10_000 and len(set(index["weight_map"].values())) == len(files)
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole.state_dict()) == len(parts.state_dict())
    for name, tensor in whole.state_dict().items():  # logits may differ in a last bit, by where tensors lie in memory
        assert torch.equal(tensor, parts.state_dict()[name])
    assert_same(whole, parts, "llama")


def test_what_belongs_to_it_comes_along(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    model = moefied("llama", rope_parameters=rope)
    model.generation_config.max_new_tokens = 7
    export(model, tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert served.config.rope_parameters == rope and served.generation_config.max_new_tokens == 7
    assert_same(model, served, "llama")
    prompt = tiny_inputs("llama", CAUSAL)["input_ids"][:, :4]
    ours, theirs = (each.generate(prompt, do_sample=False) for each in (model, served))
    assert torch.equal(ours, theirs)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "to", "message"),
    [
        (lambda: tiny_model("llama", CAUSAL), None, "is not MoEfied"),
        (
            lambda: moefied("llama"),
            "mixtrall",
            "unknown target 'mixtrall'.*granitemoe, mixtral, .*, dense",
        ),
        (lambda: moefied("llama"), "qwen3_moe", "qwen3_moe: llama, mistral, qwen2, granite to granitemoe;"),
        (lambda: moefied("gpt2"), None, "gpt2 model cannot become a served MoE"),
        (lambda: moefied("llama", router="random"), None, "'random' one: convert with router='linear'"),
        (lambda: moefied("llama", router="partial_input"), None, "'partial_input' one: convert with router='linear'"),
        (lambda: moefied("llama", k=[1, 2]), None, "1 to 2 experts.*allocation='uniform'"),
        (lambda: moefied("llama").half(), None, "float16.*bfloat16"),
    ],
)
def test_what_cannot_be_expressed_is_refused(make, to, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit_are_refused(tmp_path):
    biased = route(tiny_model("llama", CAUSAL))
    with pytest.raises(ValueError, match=r"no biases.*FFNs \(gate, up, down\)"):
        export(biased, tmp_path / "out")
    part = route(tiny_model("llama-without-biases", CAUSAL), layers=[0])
    for to in ("granitemoe", "mixtral"):
        with pytest.raises(ValueError, match="1 of 2 layers.*layers=None"):
            export(part, tmp_path / "out", to)
    for source, remedy in (("llama", "export to 'granitemoe', which has"), ("qwen3", "convert with shared_experts=0")):
        shared = tiny_model(TINY.get(source, source), CAUSAL)
        convert(shared, 3, text_batches(8), expert_size=8, router="linear", shared_experts=1)
        with pytest.raises(ValueError, match=f"no place for 1 shared experts: {remedy}"):
            export(shared, tmp_path / "out", {"llama": "mixtral"}.get(source))
    attention = moefied("llama", attention_bias=True)
    with pytest.raises(ValueError, match="no biases.*attention"):
        export(attention, tmp_path / "out", "mixtral")
    base = route(tiny_model("llama-without-biases"))
    with pytest.raises(ValueError, match="no causal language model"):
        export(base, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        export(moefied("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "empty").mkdir()
    export(moefied("llama"), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moefy_hf.exporters.export.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        export(moefied("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
