"""Ablation: estimates are derivatives, rises are differences, and the model comes back as it was."""

import pytest
import torch
from batches import text_batches
from planted import planted_model
from tiny import convert, distance, run, tiny_inputs, tiny_model

from moefy_hf.analysis import ablate, remove_together
from moefy_hf.analysis.ablation import by_layer, estimated_effects, measure_task, ranked, split_by_class
from moefy_hf.data import Texts


@pytest.fixture
def model():
    return planted_model(k=3)


def test_estimates_are_derivatives():
    model, batches = planted_model(k=6), text_batches(3, labels="class")
    estimated, step = estimated_effects(model, batches), 0.02
    for layer, expert in ((0, 0), (0, 5), (1, 3)):
        losses = []
        for factor in (1 - step, 1 + step):
            with model.boost_experts({layer: {expert: factor}}):
                losses.append(measure_task(model, batches).loss)
        moved = (losses[0] - losses[1]) / (2 * step)
        assert moved == pytest.approx(float(estimated[layer, expert]), rel=1e-2, abs=2e-5)
    assert estimated.abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rises_are_differences_of_losses(model):
    one, other = text_batches(3, labels="class"), text_batches(3, seed=1, labels="class")
    before = run(model, tiny_inputs("bert"))
    found = ablate(model, one, other, measured=12, progress=False)
    assert len(found["rows"]) == 12 and len(found["ranking"]) == 12 and found["unit"] == "text"
    for row in found["rows"]:
        with model.disable_experts({row["layer"]: [row["expert"]]}):
            for name, batches in (("task", one), ("other", other)):
                rise = measure_task(model, batches).loss - found["whole"][name]["loss"]
                assert row[f"{name}: rise of the loss"] == pytest.approx(rise, abs=1e-6)
                assert row[f"{name}: standard error"] > 0
    scores = [row["task: rise of the loss"] - row["other: rise of the loss"] for row in found["rows"]]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    assert distance(before, run(model, tiny_inputs("bert"))) == 0 and not model.training


def test_an_expert_that_decides_a_task_is_ranked_first(model):
    """The labels are what the model says only with one expert."""
    batches = text_batches(6, labels="class")
    with torch.no_grad():
        down = model.moe_sites()[1].down.weight
        down[:, 16:24] *= 30
        for batch in batches:
            batch["labels"] = model(**batch).logits.argmax(-1)
    found = ablate(model, batches, measured=12, progress=False)
    assert (found["rows"][0]["layer"], found["rows"][0]["expert"]) == (1, 2)


def test_experts_are_removed_together(model):
    one, other = text_batches(3, labels="class"), text_batches(3, seed=1, labels="class")
    ranking = [(0, 1), (1, 2), (0, 3)]
    rows = remove_together(model, ranking, {"a": one, "b": other}, [2, 3])
    assert [row["experts off"] for row in rows] == [0, 2, 3]
    assert rows[0]["a"] == rows[0]["random: a"] == measure_task(model, one).accuracy
    with model.disable_experts({0: [1, 3], 1: [2]}):
        assert rows[2]["b"] == measure_task(model, other).accuracy


def test_a_language_model_counts_positions():
    llama = tiny_model("llama", "AutoModelForCausalLM")
    convert(llama, k=3)
    found = ablate(llama, text_batches(2, labels="causal"), measured=2, progress=False)
    assert found["unit"] == "position" and len(found["rows"]) == 2


def test_rankings_leave_out_what_does_not_exist():
    assert ranked(torch.tensor([[1.0, 5], [3, 9]]), [2, 1]) == [(0, 1), (1, 0), (0, 0)]
    assert by_layer([(0, 3), (1, 0), (0, 1)]) == {0: [3, 1], 1: [0]}


def test_bad_input(model):
    with pytest.raises(ValueError, match="is not MoEfied"):
        ablate(tiny_model("bert"), [])
    with pytest.raises(ValueError, match="more than once"):
        ablate(model, iter(text_batches(1, labels="class")))
    with pytest.raises(ValueError, match="batches with labels"):
        ablate(model, text_batches(1), progress=False)
    with pytest.raises(ValueError, match="4 experts to remove together are more than the 3"):
        remove_together(model, [(0, 1), (1, 2), (0, 3)], {"a": text_batches(1, labels="class")}, [1, 4])


def test_a_class_and_the_others(model):
    names = list(model.config.id2label.values())
    parts = split_by_class(Texts(["a", "b", "c"], labels=[1, 0, 1]), model.config, names[1])
    assert parts == {"task": Texts(["a", "c"], labels=[1, 1]), "other": Texts(["b"], labels=[0])}
    with pytest.raises(ValueError, match=f"unknown class 'x'; choose from {names[0]}"):
        split_by_class(Texts(["a"], labels=[0]), model.config, "x")
    with pytest.raises(ValueError, match="and of others"):
        split_by_class(Texts(["a"], labels=[0]), model.config, names[0])
