"""Models that consist of several: their towers are converted apart or together, and the whole is saved and loaded."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from composites import COMPOSITES, composite
from tiny import convert, distance, run
from torch import nn

from moefy_hf import evaluate, load, profile
from moefy_hf.conversion import checks
from moefy_hf.conversion.equality import DenseReference
from moefy_hf.errors import MoefyError, UnsupportedModel
from moefy_hf.measure.metrics import is_causal
from moefy_hf.measure.padding import real_tokens
from moefy_hf.modeling.ffn_sites import find_sites

WHOLE_AROUND = checks.whole_around
ALONE = [name for name, case in COMPOSITES.items() if "" in case.towers]
GENERATING = [name for name, case in COMPOSITES.items() if case.head != "AutoModel"]
ASKED = [(name, tower) for name, case in COMPOSITES.items() for tower in (None, *case.towers, "all") if tower != ""]
IDS = [f"{name}-{tower}" for name, tower in ASKED]
ELSEWHERE = """
import json
import sys

sys.modules["moefy_hf"] = None  # importing it fails
import torch
import transformers

for folder, head in json.load(open("asked.json")).items():
    model = getattr(transformers, head).from_pretrained(folder, trust_remote_code=True).eval()
    batch = torch.load(f"{folder}/batch.pt")
    with torch.no_grad():
        output = model(**batch)
    found = {"class": type(model).__name__, "output": output[0]}
    if model.can_generate() and folder.endswith("-all"):
        found["text"] = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    torch.save(found, f"{folder}/found.pt")
"""


def places(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", site.name) for site in model.moe_sites()))


def converted_of(name: str, tower: str | None) -> list[str]:
    towers = COMPOSITES[name].towers
    if tower == "all" or "" in towers:
        return [place for places in towers.values() for place in places]
    return towers[tower or "text"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict:
    """Every composite with every choice of towers: (model, batch, dense, full, sparse outputs, folder)."""
    found = {}
    for name, tower in ASKED:
        model, folder = composite(name), tmp_path_factory.mktemp("composite") / "saved"
        batch = COMPOSITES[name].batch(model)
        dense = run(model, batch)
        convert(model, towers=tower)
        full = run(model, batch)
        model.set_selection(k=0.5)
        sparse = run(model, batch)
        model.save_pretrained(folder)
        torch.save(batch, folder / "batch.pt")
        found[name, tower] = (model, batch, dense, full, sparse, folder)
    return found


@pytest.mark.parametrize(("name", "tower"), ASKED, ids=IDS)
def test_the_ffns_of_the_towers_that_were_asked_for_are_routed(cases, name, tower):
    model, batch, dense, full, sparse, folder = cases[name, tower]
    assert sorted(places(model)) == sorted(converted_of(name, tower))
    assert distance(full, dense) < 2e-5 < 1e-4 < distance(sparse, dense)
    section = json.loads((folder / "config.json").read_text())["moefication"]
    assert section.get("towers") == tower
    last = [re.sub(r"\.\d+(?=\.|$)", ".*", entry["modules"]) for entry in section["ffns"]]
    assert sorted(dict.fromkeys(last)) == sorted(place.removeprefix("model.") for place in converted_of(name, tower))


@pytest.mark.parametrize(("name", "tower"), ASKED, ids=IDS)
def test_the_whole_loads_as_package_and_as_dense_model(cases, name, tower):
    model, batch, dense, full, sparse, folder = cases[name, tower]
    assert distance(run(load(folder).eval(), batch), sparse) == 0
    stock = model.stock_class().from_pretrained(folder).eval()
    assert type(stock) is model.stock_class() and distance(run(stock, batch), dense) < 2e-5


def test_the_whole_loads_and_generates_without_the_package(cases, tmp_path):
    asked = {}
    for (name, tower), case in cases.items():
        os.symlink(case[-1], tmp_path / f"{name}-{tower}")
        asked[f"{name}-{tower}"] = COMPOSITES[name].head
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    settings = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, cwd=tmp_path, env=settings
    )
    assert done.returncode == 0, done.stderr
    for name, tower in cases:
        model, batch, dense, full, sparse, folder = cases[name, tower]
        found = torch.load(folder / "found.pt")
        assert found["class"] == type(model).__name__ and torch.equal(found["output"], sparse[0]), (name, tower)
        if name in GENERATING and tower == "all":
            text = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            assert torch.equal(found["text"], text), (name, tower)


@pytest.mark.parametrize("name", GENERATING)
def test_a_whole_takes_a_training_step(cases, name):
    model, batch = load(cases[name, "all"][-1]).train(), cases[name, "all"][1]
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    labels = {"labels": ids.masked_fill(ids > 90, -100)}
    model(**{key: value for key, value in batch.items() if key != "decoder_input_ids"}, **labels).loss.backward()
    unused = {"llava": {"model.vision_tower.encoder.layers.1.mlp"}}  # it reads what the layer before gives
    for site in model.moe_sites():
        assert (site.first.weight.grad is None) == (site.name in unused.get(name, ())), site.name


@pytest.mark.parametrize("name", [name for name in COMPOSITES if name not in ALONE])
def test_an_unknown_tower_is_answered_with_those_there_are(name):
    known = ", ".join(map(repr, sorted(COMPOSITES[name].towers)))
    with pytest.raises(MoefyError, match="no tower 'smell'") as raised:
        convert(composite(name), towers="smell")
    assert sorted(re.findall(r"'\w+'", str(raised.value).partition("choose from")[2])) == sorted(
        [*known.split(", "), "'all'"]
    )


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl"])
def test_texts_with_images_calibrate_all_towers_and_measure_the_whole(name):
    model = composite(name)
    batch = COMPOSITES[name].batch(model)
    ids = batch["input_ids"]
    batches = [{**batch, "labels": ids.masked_fill(ids > 90, -100)}] * 8
    found = profile(model, batches, towers="all", progress=False)
    assert len(found.sites) == len(find_sites(model, "all"))
    assert all(site.tokens > 0 for site in found.sites)
    report = convert(model, k=0.5, calibration=found, towers="all", router="linear", splitter="coactivation")
    assert report.table() and is_causal(model)
    with torch.no_grad():
        loss = model(**batches[0]).loss.item()
    sweep = evaluate(model, batches, [0.5], controls=[], progress=False)
    assert sweep.rows[-1]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_padding_of_texts_is_none_of_an_image_tower():
    model = composite("clip")
    batch = COMPOSITES["clip"].batch(model)
    for site in find_sites(model, "all"):
        real = real_tokens(model, site, batch, batch["attention_mask"].numel())
        assert (real is None) == site.name.startswith("vision")


def test_a_tower_of_a_whole_is_refused_and_one_that_was_taken_out_is_not(monkeypatch):
    monkeypatch.setattr(checks, "whole_around", WHOLE_AROUND)
    whole = composite("clip")
    with pytest.raises(UnsupportedModel, match="is part of a CLIPModel"):
        convert(whole.vision_model)
    part = whole.vision_model
    del whole
    convert(part)
    assert len(part.moe_sites()) == 2


def test_a_wrong_match_in_a_tower_that_texts_do_not_reach_is_found():
    """A text alone does not run the vision tower, which is then run by itself."""
    model = composite("llava")
    site = find_sites(model, "vision")[0]
    wrong = replace(site, spec=replace(site.spec, act="none", function="relu"))
    DenseReference(model, [site], None)
    with pytest.raises(UnsupportedModel, match=re.escape(site.name)):
        DenseReference(model, [wrong], None)
