"""CATS, TEAL and WINA: masks and FLOPs against a computation without hooks, and their rows in a sweep."""

import copy

import pytest
import torch
import torch.nn.functional as F
from batches import text_batches
from tiny import tiny_model

from moefy_hf import MoEficationConfig, evaluate, moefy_
from moefy_hf.evaluation.baselines import left_out, places_at, places_of
from moefy_hf.evaluation.controls import BASELINES
from moefy_hf.measure.flops import ffn_flops
from moefy_hf.modeling.ffn_sites import find_sites

HEADS = {
    "llama": ("AutoModelForCausalLM", "causal"),
    "phi3": ("AutoModelForCausalLM", "causal"),  # gate and up are one matrix
    "gpt2": ("AutoModelForCausalLM", "causal"),  # ungated, Conv1D
    "t5": ("AutoModelForSeq2SeqLM", "seq2seq"),
}


def routed(name: str):
    """(converted model, its dense self)"""
    dense = tiny_model(name, HEADS[name][0])
    model = copy.deepcopy(dense)
    selection = {"type": "top_k", "k": 3}
    moefy_(model, MoEficationConfig(expert_size=8, splitter="random", router="random", selection=selection))
    return model, dense


def test_a_threshold_is_a_quantile_of_any_number_of_entries():
    site = find_sites(routed("llama")[0])[0]
    place = places_of(site, "cats")[0]
    place.drawn = list(torch.arange(2.0**24 + 5).flip(0).split(2**22))  # one more than float32 tells apart
    assert place.at(0.75).threshold == pytest.approx(2**22, rel=1e-6) and place.at(1.0).threshold == 0


def by_hand(site, baseline: str, x: torch.Tensor, thresholds: list[float]) -> tuple[torch.Tensor, float]:
    """x (T, d) -> the FFN's output without bias, and the FLOPs per token of what was kept."""
    w, (d, f) = site.weights(), site.sizes
    below = iter(thresholds)
    flops = 0.0

    def cut(tensor: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        nonlocal flops
        score = tensor.abs()
        if baseline == "wina":
            score = score * torch.cat(matrices).norm(dim=0)
        keep = score > next(below)
        flops += sum(2 * m.numel() for m in matrices) * float(keep.float().mean())
        return tensor * keep

    if baseline == "cats":
        first = w.act(F.linear(x, w.keys, w.up_bias if w.gate is None else w.gate_bias))
        keep = first.abs() > next(below)
        a = first * keep if w.gate is None else first * keep * F.linear(x, w.up, w.up_bias)
        matrices = 1 if w.gate is None else 2
        return a @ w.down.T, 2 * d * f * (1 + matrices * float(keep.float().mean()))
    down_threshold = next(below)  # places_of names `down` first
    if w.gate is None:
        a = w.act(F.linear(cut(x, w.up), w.up, w.up_bias))
    elif site.gate is None:
        both = cut(x, w.gate, w.up)
        a = w.act(F.linear(both, w.gate, w.gate_bias)) * F.linear(both, w.up, w.up_bias)
    else:
        a = w.act(F.linear(cut(x, w.gate), w.gate, w.gate_bias))
        a = a * F.linear(cut(x, w.up), w.up, w.up_bias)
    below = iter([down_threshold])
    return cut(a, w.down) @ w.down.T, flops


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_one_ffn_is_that_of_a_direct_computation(name, baseline):
    model, dense = routed(name)
    model.set_selection(k=1.0)
    site, batch = model.moe_sites()[0], text_batches(1, labels="causal")[0]
    places = places_of(site, baseline)
    for number, place in enumerate(places):
        place.threshold = 0.05 * (number + 1) if baseline != "cats" else 0.03
    seen = {}
    hooks = [
        site.owner.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        site.down.register_forward_hook(lambda _, args, y: seen.update(y=y)),
    ]
    with left_out(model, places, batch):
        model(**batch)
    for hook in hooks:
        hook.remove()
    bias = site.down.bias if site.down.bias is not None else 0
    real = batch["attention_mask"].bool()
    expected, flops = by_hand(site, baseline, seen["x"][real], [place.threshold for place in places])
    torch.testing.assert_close(seen["y"][real] - bias, expected, rtol=1e-4, atol=1e-5)
    saved = sum(place.flops * (1 - place.computed / place.seen) for place in places)
    assert ffn_flops(site) - saved == pytest.approx(flops, rel=1e-5)
    assert saved > 0.02 * flops  # the thresholds do something
    assert {place.seen // int(real.sum()) for place in places} <= {16, 48}  # padding is not counted


@pytest.mark.parametrize("name", HEADS)
def test_rows_compute_the_share_that_was_asked_for(name):  # a T5's may be zeros alone
    """On the calibration data itself; where a ReLU's zeros are more than what may be left out, less is computed."""
    model, dense = routed(name)
    batches = text_batches(6, labels=HEADS[name][1])
    controls = ["random", *BASELINES]
    sweep = evaluate(model, batches, [0.5, 5], controls=controls, calibration=batches, local_tokens=0, progress=False)
    rows = {(row["router"], row["k"]): row for row in sweep.rows[1:]}
    gated = find_sites(dense)[0].weights().gate is not None
    assert {key for key in rows if key[0] == "cats"} == ({("cats", 0.5), ("cats", 5)} if gated else {("cats", 5)})
    for (router, k), row in rows.items():
        if router in BASELINES:
            share = k / 6 if isinstance(k, int) else k
            assert row["ffn_flops"] == pytest.approx(share, abs=0.02) or name == "t5" and row["ffn_flops"] < share
            assert row["ffn_flops"] < row["model_flops"] < 1 and (row["kl"] > 0 or name == "t5")
            quality = sweep.facts["quality"]
            if sweep.rows[0][quality]:  # a random T5 answers nothing right
                assert row[quality] == pytest.approx(row["relative_quality"] * sweep.rows[0][quality])
    for kind in ("teal", "wina"):
        assert rows[kind, 5]["kl"] < rows[kind, 0.5]["kl"]
    assert "| wina | neurons | uniform |" in sweep.table()


def test_everything_kept_is_exactly_dense_and_nothing_stays_behind():
    model, _ = routed("llama")
    batches = text_batches(2, labels="causal")
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    sweep = evaluate(model, batches, [1.0], controls=BASELINES, calibration=batches, local_tokens=0, progress=False)
    for row in sweep.rows[2:]:
        assert (row["kl"], row["agreement"], row["ffn_flops"], row["model_flops"]) == (0, 1, 1, 1)
    assert model.moe_sites()[0].act.selection.k == 3
    assert hooks == {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


def test_what_is_missing_is_named(caplog):
    model, _ = routed("llama")
    batches = text_batches(2, labels="causal")
    with pytest.raises(ValueError, match="teal set thresholds on calibration data"):
        evaluate(model, batches, [0.5], controls=["teal"])
    with pytest.raises(ValueError, match="unknown control 'x'; choose from oracle, oracle_mass, random, cats"):
        evaluate(model, batches, [0.5], controls=["x"])
    with pytest.raises(ValueError, match="nothing to calibrate"):
        evaluate(model, batches, [0.5], controls=["teal"], calibration=[], local_tokens=0, progress=False)
    places = {"cats": [place for site in model.moe_sites() for place in places_of(site, "cats")]}
    assert places_at(places, "cats", 2) is None  # a third of a gated FFN is its gate


def test_beside_shared_experts_and_means():
    """The baselines are those of the dense model, whatever it has become."""
    batches = text_batches(40, labels="causal")
    rows = []
    for settings in ({}, {"shared_experts": 1, "compensation": True}):
        model = tiny_model("llama", "AutoModelForCausalLM")
        selection = {"type": "top_k", "k": 3, "allocation": "uniform"}
        config = MoEficationConfig(expert_size=8, splitter="random", router="random", selection=selection, **settings)
        moefy_(model, config, batches, progress=False)
        evaluated = {"controls": ["wina"], "calibration": batches, "local_tokens": 0, "progress": False}
        rows.append(evaluate(model, batches[:4], [0.5], **evaluated).rows[-1])
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=1e-2) and rows[0]["kl"] > 1e-3
    assert rows[0]["ffn_flops"] == pytest.approx(rows[1]["ffn_flops"], abs=1e-3)
