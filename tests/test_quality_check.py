"""Predicted quality against a sweep of the same batches, thresholds, and what the command makes of them."""

import dataclasses
import json

import pytest
import torch
from batches import text_batches
from test_cli import number_tokenizer
from tiny import tiny_model

from moefy_hf import MoEficationConfig, evaluate, moefy_
from moefy_hf.cli.main import main
from moefy_hf.data import Texts, split_off
from moefy_hf.evaluation.quality_check import QualityCheck, check_quality
from moefy_hf.hub.facts import read_facts

GOOD = QualityCheck(100, kl=0.01, random_kl=0.5, uniform_kl=2.0, agreement=0.95, loss=3.0, dense_loss=2.9)


def learned(model, seed: int = 0, labels: bool = True) -> list[dict]:
    """Batches whose labels are what the dense model would say, so that its loss is far from guessing."""
    batches = text_batches(3, labels="causal", seed=seed)
    for batch in batches:
        with torch.no_grad():
            best = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        batch["labels"][:, 1:] = best[:, :-1].masked_fill(batch["labels"][:, 1:] == -100, -100)
        if not labels:
            del batch["labels"]
    return batches


def sharp(hidden_act: str = "silu"):
    """A tiny Llama that is sure of what it says, and whose FFNs matter."""
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM", hidden_act=hidden_act)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(4)
    return model


def converted(model, k: float = 0.25, router: str = "random", **settings):
    selection = {"type": "top_k", "k": k, **settings}
    moefy_(model, MoEficationConfig(expert_size=16, splitter="random", router=router, selection=selection))
    return model


def test_figures_are_those_of_a_sweep():
    model = sharp()
    batches = learned(model)
    converted(model, k=2)
    found = check_quality(model, batches, progress=False)
    sweep = evaluate(model, batches, [2, 0.9], controls=["random"], local_tokens=0, progress=False)
    dense, own, _, chance, _ = sweep.rows
    assert found.positions == sweep.facts["positions"]
    expected = (own["kl"], chance["kl"], own["agreement"], own["loss"], dense["loss"])
    assert (found.kl, found.random_kl, found.agreement, found.loss, found.dense_loss) == pytest.approx(expected)
    assert found.growth == pytest.approx(own["perplexity"] / dense["perplexity"] - 1)
    logits = []
    with torch.no_grad():
        model.set_selection(k=1.0)
        for batch in batches:
            counts = batch["labels"][:, 1:] != -100
            logits.append(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][counts])
    p = torch.cat(logits).softmax(-1)
    assert found.uniform_kl == pytest.approx(float((p * (p * p.shape[-1]).log()).sum(-1).mean()), rel=1e-4)


def test_bad_models_are_told_what_would_be_better():
    model = sharp()
    batches = learned(model)
    found = check_quality(converted(model), batches, progress=False)
    assert found.bad and found.degenerate and "more than 100%" in found.degenerate
    assert model.moe_sites()[0].act.selection.k == 1 and not model.training
    options = "\n".join(found.options)
    for option in ("finer experts than 16", "sensitivity", "fitted to data", "SiLU", "fine-tuning"):
        assert option in options
    assert found.enough == 0.9 and "0.9 is enough" in options  # rounded: all three experts


def test_a_larger_budget_that_is_enough_is_named():
    model = sharp("relu")
    batches = learned(model)
    moefy_(
        model,
        MoEficationConfig(num_experts=48, splitter="random", router="random", selection={"type": "top_k", "k": 1}),
    )
    found = check_quality(model, batches, progress=False)
    sweep = evaluate(model, batches, [0.3, 0.5, 0.7, 0.9], controls=[], local_tokens=0, progress=False)
    good = [row["k"] for row in sweep.rows[1:] if row["loss"] <= 1.1 * sweep.rows[0]["loss"]]
    assert found.enough == (good[0] if good else None)
    assert not any("finer" in option or "ReLU" in option for option in found.options)


@pytest.mark.parametrize(
    ("changes", "bad", "degenerate"),
    [
        ({}, False, None),
        ({"loss": 3.3}, True, None),
        ({"loss": 5.9}, True, "more than 100%"),
        ({"loss": 3.3, "kl": 2.1, "random_kl": 9.0}, True, "uniform guessing"),
        ({"loss": 3.3, "kl": 0.6}, True, "drawn at random"),
        ({"kl": 0.6}, False, None),  # random experts are as good, but both are good
        ({"loss": None, "dense_loss": None}, False, None),
        ({"loss": None, "dense_loss": None, "agreement": 0.8}, True, None),
        ({"loss": None, "dense_loss": None, "agreement": 0.8, "kl": 0.6}, True, "drawn at random"),
    ],
)
def test_thresholds(changes, bad, degenerate):
    found = dataclasses.replace(GOOD, **changes)
    assert found.bad == bad and bool(found.message()) == bad
    assert (found.degenerate is None) == (degenerate is None) and (degenerate or "") in (found.degenerate or "")


def test_what_cannot_be_predicted():
    model = tiny_model("llama", "AutoModelForCausalLM")
    with pytest.raises(ValueError, match="is not MoEfied"):
        check_quality(model, [])
    with pytest.raises(ValueError, match="cannot be checked"):
        check_quality(converted(model), [], progress=False)
    with pytest.raises(ValueError, match="no logits"):
        check_quality(converted(tiny_model("llama")), text_batches(1), progress=False)


def test_texts_are_split():
    for count, kept in ((2, 1), (60, 3), (640, 32), (6400, 64)):
        texts = [str(i) for i in range(count)]
        fitted, held_out = split_off(Texts(texts, labels=[*range(count)]))
        assert len(held_out) == kept and sorted([*fitted.texts, *held_out.texts]) == sorted(texts)
        assert [*map(str, held_out.labels)] == held_out.texts
    assert split_off(Texts(["a"])) == (Texts(["a"]), Texts([]))


def test_the_command_refuses_what_is_of_no_use(tmp_path, capsys, caplog):
    model = sharp()
    model.save_pretrained(tmp_path / "dense")
    number_tokenizer().save_pretrained(tmp_path / "dense")
    rows = torch.randint(3, 99, (64, 1), generator=torch.Generator().manual_seed(0))
    for _ in range(11):  # what the model itself goes on with
        with torch.no_grad():
            rows = torch.cat([rows, model(rows).logits[:, -1].argmax(-1, keepdim=True)], 1)
    text = "\n".join(" ".join(map(str, row)) for row in rows.tolist()).replace(" 2 ", " 3 ")
    (tmp_path / "texts.txt").write_text(text)
    place = ["convert", str(tmp_path / "dense"), str(tmp_path / "moe"), "--data", str(tmp_path / "texts.txt")]
    settings = [
        "--splitter",
        "random",
        "--router",
        "random",
        "--k",
        "1",
        "--expert_size",
        "8",
        "--allocation",
        "uniform",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*place, *settings])
    assert stopped.value.code == 2 and not (tmp_path / "moe").exists()
    error = capsys.readouterr().err
    assert "of no use" in error and "--force" in error and "try " in error
    main([*place, *settings, "--force", "--json"])
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])["prediction"]
    assert found["degenerate"] and read_facts(tmp_path / "moe")["prediction"] == found
    main(["card", str(tmp_path / "moe")])
    assert "| right after conversion | perplexity " in (tmp_path / "moe" / "README.md").read_text()
    capsys.readouterr()
    main([*place[:2], str(tmp_path / "good"), *place[3:], *settings, "--k", "6"])
    assert "+0.0% on dense, agreement with dense 100.0%" in capsys.readouterr().out
