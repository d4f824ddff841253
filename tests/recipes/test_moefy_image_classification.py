"""The image recipe end to end: a tiny ViT learns bright from dark, is MoEfied, swept and recovered."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from moefy_hf import Sweep

SMALL = "image_size=8,patch_size=4,num_channels=1,hidden_size=16,intermediate_size=48,num_hidden_layers=2"
CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "vit_fashion" / "moefication.yaml"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
    for split, count in (("train", 160), ("test", 24)):
        labels = noise.integers(0, 2, count)
        pixels = [noise.integers(0, 120, (8, 8)).astype(np.uint8) + np.uint8(120 * label) for label in labels]
        Dataset.from_dict({"image": pixels, "label": labels.tolist()}, features=features).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture
def recipe(images, run_config):
    def run(output_dir: Path, **settings) -> None:
        small = {
            "config_overrides": SMALL + ",num_attention_heads=2",
            "dataset_name": str(images),
            "output_dir": str(output_dir),
            "expert_size": 8,
            "calibration_tokens": 500,
            "per_device_train_batch_size": 16,
            "num_train_epochs": 4,
        }
        run_config("image_classification", CONFIG, **(small | settings))

    return run


def test_a_model_from_nothing(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    recipe(run)
    sweep = Sweep.load(run / "sweep.json")
    assert sweep.facts["positions"] == 16 + 24 and sweep.rows[0]["accuracy"] > 0.8
    model = AutoModelForImageClassification.from_pretrained(run / "recovered", trust_remote_code=True)
    assert type(model).__name__ == "MoefiedViTForImageClassification"
    assert model.config.id2label == {0: "dark", 1: "bright"} and model.config.hidden_act == "relu"
    assert AutoImageProcessor.from_pretrained(run / "moefied").size["height"] == 8
    assert json.loads((run / "control.json").read_text())["accuracy"] > 0.8
    scores = json.loads((run / "scores_recovered.json").read_text())["recovered at 0.2"]
    assert f"| MoEfied, then fine-tuned | 20 % | {100 * scores['accuracy']:.1f} % |" in capsys.readouterr().out
    recipe(tmp_path / "more", recover=str(run / "moefied"), max_steps=1, metrics=["none"], budgets=[0.2])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "more" / "recovered", trust_remote_code=True)
    assert model.config.moefication["selection"]["k"] == 0.2 and not (tmp_path / "more" / "control").exists()
    # and the other way: a checkpoint is fine-tuned
    recipe(tmp_path / "again", model_name_or_path=str(run / "dense"), config_overrides=None, recovery_epochs=0.0)
    assert Sweep.load(tmp_path / "again" / "sweep.json").rows[0]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "picture"}, "no column 'picture'.*image, label"),
        ({"test_split": "dev"}, "no split 'dev'.*train, test"),
        ({"model_type": "vitt"}, "unknown model_type 'vitt'"),
        ({"config_overrides": "hidden=3"}, "no setting 'hidden'"),
        ({"budgets": [2.0]}, "2.0"),
    ],
)
def test_mistakes_are_named_before_training(recipe, refused, tmp_path, settings, message):
    with refused(message):
        recipe(tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "dense").exists()
