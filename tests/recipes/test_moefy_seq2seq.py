"""The encoder-decoder recipe end to end: a tiny T5 learns to name the mood of a text."""

import sys
from pathlib import Path

import pytest
import recovery_facts
from transformers import AutoModelForSeq2SeqLM

from moefy_hf import Sweep

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "t5_r8" / "moefication.yaml"


@pytest.fixture
def recipe(inputs, tmp_path, run_config):
    texts = tmp_path / "texts"  # with targets that are words of the vocabulary
    texts.mkdir()
    for path in Path(inputs["texts"]).glob("*.csv"):
        (texts / path.name).write_text(path.read_text().replace(",good", ",superb").replace(",bad", ",awful"))

    def run(output_dir: Path, **settings) -> None:
        small = {
            "tokenizer_name": inputs["model"],
            "config_overrides": "d_model=16,d_kv=8,d_ff=48,num_layers=2,num_heads=2",
            "dataset_name": str(texts),
            "output_dir": str(output_dir),
            "expert_size": 8,
            "calibration_tokens": 500,
            "per_device_train_batch_size": 16,
            "num_train_epochs": 6,
            "learning_rate": 0.01,
            "generated_rows": 20,
        }
        run_config("seq2seq", CONFIG, **(small | settings))

    return run


@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_a_model_from_nothing(recipe, tmp_path, parameters, monkeypatch, capsys):
    run = tmp_path / "run"
    recipe(run, recovery_parameters=parameters)
    sweep = Sweep.load(run / "sweep.json")
    assert sweep.facts["quality"] == "accuracy" and sweep.rows[0]["accuracy"] > 0.8
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "recovered", trust_remote_code=True)
    assert type(model).__name__ == "MoefiedT5ForConditionalGeneration" and len(model.moe_sites()) == 4
    scores = recovery_facts.generated_by(run)
    at = [f"{name} at {k}" for name in ("moefied", "recovered") for k in (0.1, 0.2, 0.3)]
    assert set(scores) == {"dense", "control", *at}
    monkeypatch.setattr(sys, "argv", ["recovery_facts.py", str(tmp_path / "facts.json"), str(run)])
    recovery_facts.main()
    assert "Exactly generated targets" in capsys.readouterr().out
    assert scores["dense"] > 0.6 and all(0 <= score <= 1 for score in scores.values())
    if parameters == "lora":
        again = {"recover": str(run / "moefied"), "max_steps": 1, "metrics": ["none"], "budgets": [0.2]}
        recipe(tmp_path / "again", recovery_epochs=None, **again)
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again" / "recovered", trust_remote_code=True)
        assert len(model.moe_sites()) == 4 and not (tmp_path / "again" / "dense").exists()


def test_targets_are_generated_at_what_was_learned(recipe, tmp_path):
    run = tmp_path / "run"
    recipe(run, learned_eta=0.1, router="sigmoid", num_train_epochs=2)
    scores = recovery_facts.generated_by(run)
    at = [*(f"moefied at {k}" for k in (0.1, 0.2, 0.3)), *(f"recovered at {k}" for k in (0.1, 0.2, 0.3))]
    assert set(scores) == {"dense", "control", "recovered as learned", *at}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_column": "sentence"}, "no column 'sentence'.*text, label"),
        ({"validation_split": "dev"}, "no split 'dev'"),
        ({"tokenizer_name": None}, "needs --tokenizer_name"),
        ({"config_overrides": "layers=3"}, "no setting 'layers'"),
    ],
)
def test_mistakes_are_named_before_training(recipe, refused, tmp_path, settings, message):
    with refused(message):
        recipe(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "dense").exists()
