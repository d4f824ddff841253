"""Image classifiers beside other engines: a tiny ViT on grey pictures, as the image recipe writes both."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from tiny import convert, tiny_model
from transformers import ViTImageProcessor

from moefy_hf.bench import side_by_side
from moefy_hf.bench.engines import PYTORCH, OnnxRuntime
from moefy_hf.cli.main import main
from moefy_hf.data import ImageTable, TextSource
from moefy_hf.errors import MoefyError

NAMES = ["dark", "bright"]
PIXELS = np.random.default_rng(0).integers(0, 255, (6, 8, 8)).astype(np.uint8)
LABELS = [0, 1, 1, 0, 1, 0]


def classifier():
    changes = {"num_channels": 1, "num_hidden_layers": 1, "id2label": dict(enumerate(NAMES))}
    return tiny_model("vit", "AutoModelForImageClassification", **changes)


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A checkpoint with its processor; beside it test.parquet, and the same as a folder of images."""
    folder = tmp_path_factory.mktemp("images")
    model = classifier()
    convert(model, 2, towers=None)
    model.save_pretrained(folder / "moe")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        folder / "moe"
    )
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    rows = {"image": list(PIXELS), "label": LABELS}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
    for number, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        file = folder / "pictures" / "test" / NAMES[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Pictures.fromarray(pixels).save(file)
    return folder / "moe"


@pytest.mark.parametrize("data", ["test.parquet", "pictures:test"])
def test_a_table_and_a_folder_hold_the_same_images(moe, data):
    read = ImageTable(TextSource(str(moe.parent / data))).read(classifier())
    found = {}
    for image, label in zip(read.images, read.labels, strict=True):
        found[np.asarray(Image().decode_example(image)).tobytes()] = label
    assert found == {pixels.tobytes(): label for pixels, label in zip(PIXELS, LABELS, strict=True)}


def test_rows(moe, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(OnnxRuntime, "dense", lambda engine, subject: PYTORCH.dense(subject))  # which is fast to make
    flags = [
        "--against",
        "onnxruntime",
        "--batch_sizes",
        "1",
        "4",
        "--rounds",
        "2",
        "--output",
        str(tmp_path / "o.json"),
    ]
    main(["bench", str(moe), "--data", str(moe.parent / "test.parquet"), *flags])
    found = json.loads((tmp_path / "o.json").read_text())
    values = torch.tensor(PIXELS)[:, None] / 127.5 - 1
    model = classifier()
    with torch.no_grad():
        dense = float((model(values).logits.argmax(-1) == torch.tensor(LABELS)).float().mean())
    assert found["settings"]["quality"] == "accuracy" and found["settings"]["batch_sizes"] == [1, 4]
    assert not {"max_length", "prompt", "new_tokens"} & {*found["settings"]}
    assert len(found["rows"]) == 2 * 2 * 2
    for row in found["rows"]:
        assert row["images"] == row["batch"] and row["images_per_second"] > 0
        if row["model"] == "dense":
            assert row["quality"] == pytest.approx(dense)
    printed = capsys.readouterr().out
    assert "images per second" in printed and "| forward, 4 images | onnxruntime | MoEfied |" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "8"], "no use for --max_length: leave it out; it takes --batch_sizes"),
        (["--generate", "8", "8"], "no use for --generate"),
        (["--text_column", "label"], "reads images: leave out --text_column"),
        (["--label_column", "class"], "no column class; it has image, label"),
        (["--batch_sizes", "7"], "6 images, too few"),
        (["--data", "pictures:dev"], "no split dev; there are test"),
        (["--data", "words.csv"], "no columns of images among text, label"),
    ],
)
def test_bad_input(moe, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(moe.parent)
    monkeypatch.setattr(side_by_side, "run_in", None)  # nothing is made before
    Path("words.csv").write_text("text,label\none,0\n")
    with pytest.raises(SystemExit):
        main(["bench", "moe", "--against", "onnxruntime", "--data", "test.parquet", *flags])
    assert message in capsys.readouterr().err


def test_no_texts_are_made_up_for_it(moe, capsys):
    with pytest.raises(SystemExit):
        main(["bench", str(moe), "--batches", "1", "8"])
    assert "reads pixel_values" in capsys.readouterr().err


def test_labels_that_the_model_does_not_have(moe, tmp_path):
    rows = {"image": list(PIXELS[:2]), "label": ["dark", "grey"]}
    features = Features({"image": Image(), "label": Dataset.from_dict({"label": ["a"]}).features["label"]})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(MoefyError, match="row 2 has label 'grey', which is none of dark, bright"):
        ImageTable(TextSource(str(tmp_path / "other.parquet"))).read(classifier())
