"""Budgets of dynamic selections are spent on average, counted as they are, and kept with the model."""

import pytest
import torch
from batches import text_batches
from tiny import convert, run, tiny_inputs, tiny_model

from moefy_hf import allocate_budgets_, calibrate_thresholds_, evaluate
from moefy_hf.conversion.thresholds import counted_experts
from moefy_hf.modeling.selection import SELECTIONS

DYNAMIC = [name for name, cls in SELECTIONS.items() if cls.dynamic]
BATCHES = text_batches(20, rows=8, seed=5)


def moefied(**settings):
    model = tiny_model("bert", "AutoModelForSequenceClassification")
    convert(model, expert_size=4, router="random", splitter="random", **settings)
    for site in model.moe_sites():
        for weight in site.act.router.parameters():
            weight.data.mul_(4)  # so that tokens differ in how many experts they need
    return model


def used(model, batches) -> list[float]:
    counts: dict = {}
    with torch.no_grad():
        for batch in batches:
            with counted_experts(model, batch, counts):
                model(**batch)
    return [experts / tokens for experts, tokens in counts.values()]


@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_budget_is_spent_on_average(kind):
    model = moefied()
    calibrate_thresholds_(model, BATCHES, progress=False)
    for share in (0.25, 0.5):
        model.set_selection(type=kind, k=share)
        calibrate_thresholds_(model, BATCHES, [kind], progress=False)  # the second layer, behind this first
        model.set_selection()
        for site, computed in zip(model.moe_sites(), used(model, BATCHES), strict=True):
            assert site.act.k == round(share * site.act.num_experts)
            assert computed == pytest.approx(site.act.k, rel=0.02)


def test_layers_get_what_sensitivity_gives_them():
    model = moefied()
    allocate_budgets_(model, BATCHES, 0.5, progress=False)
    counts = [site.act.k for site in model.moe_sites()]
    calibrate_thresholds_(model, BATCHES, ["level"], progress=False)
    model.set_selection(type="level", allocation="sensitivity")
    assert [site.act.k for site in model.moe_sites()] == counts
    assert used(model, BATCHES)[0] == pytest.approx(counts[0], rel=0.02)


def test_padding_is_not_counted():
    model = moefied(k=3)
    batch = dict(BATCHES[0])
    garbage = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    counts: dict = {}
    with counted_experts(model, batch, counts), torch.no_grad():
        model(**{**batch, "input_ids": garbage})
    real = int(batch["attention_mask"].sum())
    assert all(each == [3 * real, real] for each in counts.values()) and len(counts) == 2


def test_a_sweep_counts_what_is_computed():
    model = moefied()
    calibrate_thresholds_(model, BATCHES, progress=False)
    found = evaluate(model, BATCHES[:4], [0.25], controls=["random"], selections=["top_k", *DYNAMIC], progress=False)
    assert [row.get("type") for row in found.rows] == [None, "top_k", *DYNAMIC, "top_k"]
    for row in found.rows[2:-1]:
        model.set_selection(type=row["type"], k=0.25)
        assert row["k_per_layer"] == pytest.approx(used(model, BATCHES[:4]))
        assert row["experts"] == pytest.approx(sum(row["k_per_layer"]) / 24)


@pytest.mark.parametrize("allocations", [None, ["uniform", "global"]])
def test_controls_stand_beside_one_setting_for_all_layers(allocations):
    model = moefied()
    calibrate_thresholds_(model, BATCHES, ["threshold"], progress=False)
    model.set_selection(type="threshold", k=0.25, allocation="global")
    settings = {"controls": ["oracle", "random"], "allocations": allocations, "local_tokens": 0, "progress": False}
    found = [(row["router"], row["allocation"]) for row in evaluate(model, BATCHES[:1], [0.25], **settings).rows[1:]]
    own = [("own", "global")] if allocations is None else [("own", "uniform"), ("own", "global")]
    assert sorted(found) == sorted([*own, ("oracle", "uniform"), ("random", "uniform")])


def test_the_tables_travel_with_the_checkpoint(tmp_path):
    model = moefied()
    calibrate_thresholds_(model, BATCHES, ["threshold"], progress=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = tiny_inputs("bert")
    for each in (model, again):
        each.set_selection(type="threshold", k=0.25)
    assert torch.equal(run(model, inputs)[0], run(again, inputs)[0])


def test_mistakes():
    model = moefied()
    with pytest.raises(ValueError, match="unknown dynamic selection 'top_k'; choose from threshold, top_p, level"):
        calibrate_thresholds_(model, BATCHES, ["top_k"])
    with pytest.raises(ValueError, match="is not MoEfied"):
        calibrate_thresholds_(tiny_model("bert"), BATCHES)
    with pytest.raises(ValueError, match="calibrate_thresholds_"):
        model.set_selection(type="threshold", k=0.5)
    assert model.config.moefication["selection"]["type"] == "top_k"
