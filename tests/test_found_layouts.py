"""What measures, prunes and trains models, for unusual FFNs: two in a layer, one for all layers, with functions."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import convert, distance, run

from moefy_hf import profile
from moefy_hf.analysis.pruning import prune
from moefy_hf.bench.layers import copy_of, through_modules
from moefy_hf.conversion.budgets import measure_angles, measure_sensitivity
from moefy_hf.conversion.thresholds import counted_experts
from moefy_hf.evaluation.baselines import places_of
from moefy_hf.evaluation.sweep import evaluate
from moefy_hf.measure.flops import ffn_flops, model_flops, routed_flops
from moefy_hf.measure.made_up_inputs import made_up_batch
from moefy_hf.measure.metrics import Quality, predictions
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.training.monitor import RoutingMonitor

sys.path.append(str(Path(__file__).parent / "registry"))
from tiny_registry import tiny_model  # noqa: E402

MASKED, CAUSAL = "AutoModelForMaskedLM", "AutoModelForCausalLM"


def moefied(model_type: str, head: str = "AutoModel", k: int = 2, **settings):
    """A MoEfied model and a batch."""
    model = tiny_model(model_type, head=head)
    convert(model, k, **settings)
    return model, made_up_batch(model)


def test_keys_are_of_one_ffn_each():
    for model_type in ("lilt", "lxmert", "albert", "lfm2"):
        model = tiny_model(model_type)
        sites = find_sites(model, "all")
        assert len({site.key for site in sites}) == len(sites)
        assert all(model.get_submodule(site.key) is site.down for site in sites)
    assert len({site.name for site in find_sites(tiny_model("lilt"))}) == 2


def test_an_ffn_that_all_layers_use_counts_as_often():
    model, batch = moefied("albert", MASKED)
    layers, tokens = model.config.num_hidden_layers, batch["input_ids"].numel()
    (site,) = model.moe_sites()
    flops = model_flops(model, batch)
    assert flops.tokens == (layers,) and flops.ffn == layers * ffn_flops(site) < flops.total
    with profile(model, [batch], progress=False) as found:
        assert found.sites[0].tokens == found.sites[0].sampled == layers * tokens
        assert found.sites[0].active.max() <= layers * tokens
    counts: dict = {}
    with counted_experts(model, batch, counts), torch.no_grad():
        model(**batch)
    assert counts == {site.key: [2 * layers * tokens, layers * tokens]}


def test_an_ffn_that_all_layers_use_gets_a_budget():
    model, batch = moefied("albert", MASKED)
    found = measure_sensitivity(model, [batch], progress=False)
    (losses,) = found["loss"]
    assert len(losses) == len(found["k"][0]) and losses[0] > 0 and losses[-1] == 0
    (distance_,) = measure_angles(model, [batch], progress=False)["distance"]
    assert 0 < distance_ < 1


@pytest.mark.parametrize(
    ("model_type", "head", "ffns"), [("lilt", "AutoModelForTokenClassification", 4), ("albert", MASKED, 1)]
)
def test_a_sweep_has_every_ffn(model_type, head, ffns):
    model, batch = moefied(model_type, head)
    batch["labels"] = batch["input_ids"] % 2
    dynamic = {"type": "threshold", "tau": 0.3}
    rows = evaluate(
        model, [batch], [2], selections=["top_k", dynamic], controls=["oracle", "wina"], calibration=[batch],
        progress=False,
    ).rows  # fmt: skip
    top_k = next(row for row in rows if row["router"] == "own" and row.get("type") == "top_k")
    assert top_k["k_per_layer"] == [2] * ffns
    assert next(row for row in rows if row.get("type") == "threshold")["k_per_layer"] != [2] * ffns
    sites = model.moe_sites()
    share = sum(routed_flops(site, 2) for site in sites) / sum(map(ffn_flops, sites))
    assert top_k["ffn_flops"] == pytest.approx(share)
    wina = next(row for row in rows if row["router"] == "wina")
    assert wina["ffn_flops"] == pytest.approx(share, abs=0.15)


def test_states_of_two_kinds_have_no_one_angle():
    for model_type in ("lilt", "lxmert"):
        model, batch = moefied(model_type)
        with pytest.raises(ValueError, match='an FFN each: use allocation "uniform" or "sensitivity"'):
            measure_angles(model, [batch], progress=False)


@pytest.mark.parametrize("model_type", ["lfm2", "moonshine", "nemotron", "arcee"])
def test_an_ffn_alone_is_what_its_model_computes(model_type):
    model, _ = moefied(model_type, k=2)
    site = model.moe_sites()[-1]
    x = torch.randn(5, site.sizes[0])
    with torch.no_grad():
        torch.testing.assert_close(through_modules(copy_of(site), x), site.owner(x))


def test_cats_needs_an_activation_module():
    for model_type, calls in (("lfm2", True), ("arcee", False)):
        site = moefied(model_type)[0].moe_sites()[0]
        assert len(places_of(site, "teal")) == (3 if calls else 2)
        if calls:
            with pytest.raises(ValueError, match=r"the code of layers\.0\.feed_forward calls a function"):
                places_of(site, "cats")
        else:
            assert len(places_of(site, "cats")) == 1


def test_a_width_that_a_model_rounds_is_not_pruned():
    model, _ = moefied("lfm2")
    with pytest.raises(ValueError, match="MoefiedLfm2Model does not decide the width of its FFNs by"):
        prune(model, {layer: [0] for layer in range(len(model.moe_sites()))})


@pytest.mark.parametrize("model_type", ["moonshine", "albert", "clip"])
def test_pruned_models_compute_what_their_experts_did(model_type, tmp_path):
    """All other experts of the large model are those of the small one."""
    model, batch = moefied(model_type, k=1.0)
    count = model.moe_sites()[0].act.num_experts
    assert all(site.act.num_experts == count for site in model.moe_sites())
    small = prune(model, {layer: [0, 2] for layer in range(len(model.moe_sites()))})
    for site in model.moe_sites():
        site.down.weight.data.unflatten(1, (count, -1))[:, [0, 2]] = 0
    assert distance(run(small.eval(), batch), run(model, batch)) < 1e-5
    small.save_pretrained(tmp_path)
    assert distance(run(type(small).from_pretrained(tmp_path).eval(), batch), run(model, batch)) < 1e-5


@pytest.mark.parametrize("model_type", ["bitnet", "gemma3n_text"])
def test_neurons_that_depend_on_each_other_are_not_pruned(model_type):
    model, _ = moefied(model_type)
    with pytest.raises(ValueError, match="takes all neurons of a token together, so that none can go"):
        prune(model, {layer: [0] for layer in range(len(model.moe_sites()))})


@pytest.mark.parametrize("model_type", ["lfm2", "moonshine", "albert", "lilt"])
def test_training_is_watched(model_type):
    model, batch = moefied(model_type)
    monitor = RoutingMonitor()
    monitor.attach(model.train())
    monitor.watching = True
    with torch.no_grad():
        model(**batch)
    assert len(monitor.load) == len(model.moe_sites())
    figures = monitor.figures()
    assert 0 < figures["moe_captured"] < 1
    monitor.detach()
    if model_type == "lfm2":  # by hand, of the first FFN
        site = model.eval().moe_sites()[0]
        seen = {}
        site.first.register_forward_hook(lambda _, args, y: seen.update(x=args[0], gate=y))
        run(model, batch)
        mass = torch.nn.functional.silu(seen["gate"]).clamp_min(0).unflatten(-1, (site.act.num_experts, -1)).sum(-1)
        kept = site.act.chosen(site.act.router(seen["x"]))
        monitor.attach(model.train())
        with torch.no_grad():
            model(**batch)
        captured = monitor.selected_mass[0] / monitor.total_mass[0]
        torch.testing.assert_close(captured, (mass * kept).sum() / mass.sum())


@pytest.mark.parametrize(
    ("model_type", "shifts"), [("bart", False), ("plbart", False), ("trocr", False), ("lfm2", True), ("xglm", True)]
)
def test_a_models_loss_says_whether_it_shifts_labels(model_type, shifts):
    model = tiny_model(model_type, head=CAUSAL)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    batch, quality = {"input_ids": ids, "labels": ids.clone()}, Quality()
    with torch.no_grad():
        logits, labels = predictions(model, batch)
        loss = model(**batch).loss
    quality.update_(logits, logits, labels)
    assert len(labels) == (16 if shifts else 18)
    assert quality.figures()["loss"] == pytest.approx(float(loss), rel=1e-4)
