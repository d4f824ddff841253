"""Models with code of their own, from a checkpoint (`trust_remote_code`) or from a module of the user."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import FILES, HEAD, fresh, imported, inputs_of, write_checkpoint, write_code
from tiny import convert, distance, run
from transformers import AutoConfig, AutoModel

from moefy_hf import evaluate, load, profile
from moefy_hf.cli.main import main
from moefy_hf.errors import UnsupportedModel
from moefy_hf.hub.verification import verify

NAMES = list(FILES)
ELSEWHERE = """
import json
import sys

sys.modules["moefy_hf"] = None  # importing it fails
import torch
import transformers

for name, head in json.load(open("asked.json")).items():
    found = {}
    for auto in (head, "AutoModel"):
        model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
        model.save_pretrained(f"{name}/again {auto}")
        again = getattr(transformers, auto).from_pretrained(f"{name}/again {auto}", trust_remote_code=True).eval()
        config = transformers.AutoConfig.from_pretrained(f"{name}/again {auto}", trust_remote_code=True)
        inputs = torch.load(f"{name}/inputs.pt")
        with torch.no_grad():
            outputs = [each(**inputs)[0] for each in (model, again)]
        found[auto] = type(model).__name__, type(config).__name__, outputs
    torch.save(found, f"{name}/found.pt")
"""


def auto_of(name: str) -> str:
    return f"AutoModel{HEAD[name]}"


@dataclass
class Saved:
    name: str
    dense_folder: Path
    folder: Path
    model: Any
    full: list[torch.Tensor]
    dense: list[torch.Tensor]
    sparse: list[torch.Tensor]


@pytest.fixture(scope="module")
def monkeymodule():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def saved(tmp_path_factory, monkeymodule) -> dict[str, Saved]:
    found = {}
    for name in NAMES:
        home = tmp_path_factory.mktemp("remote")
        dense_folder = write_checkpoint(name, home / "dense", monkeymodule)
        model = getattr(transformers, auto_of(name)).from_pretrained(dense_folder, trust_remote_code=True).eval()
        inputs = inputs_of(name)
        dense = run(model, inputs)
        convert(model)
        full = run(model, inputs)
        model.set_selection(k=0.5)
        model.save_pretrained(home / name)
        found[name] = Saved(name, dense_folder, home / name, model, full, dense, run(model, inputs))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_all_experts_are_the_dense_model_and_fewer_are_not(saved, name):
    case = saved[name]
    assert distance(case.full, case.dense) < 1e-5 < distance(case.sparse, case.dense)
    assert len(case.model.moe_sites()) == 2
    assert type(case.model).__name__ == f"Moefied{name.title()}{HEAD[name]}"


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_their_files_and_ours(saved, name):
    files = {path.name for path in saved[name].folder.glob("*.py")}
    assert {*FILES[name], f"modeling_moefied_{name}.py", "moefied.py"} <= files
    config = json.loads((saved[name].folder / "config.json").read_text())
    stem, title = f"modeling_moefied_{name}.Moefied", name.title()
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_{name}.{title}Config",
        "AutoModel": f"{stem}{title}Model",
        auto_of(name): f"{stem}{title}{HEAD[name]}",
        "AutoTokenizer": [f"tokenization_{name}.{title}Tokenizer", None],
    }


def test_checkpoints_load_without_the_package_and_are_saved_again(saved, tmp_path):
    for name, case in saved.items():
        os.symlink(case.folder, tmp_path / name)
        torch.save(inputs_of(name), case.folder / "inputs.pt")
    (tmp_path / "asked.json").write_text(json.dumps({name: auto_of(name) for name in saved}))
    settings = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, cwd=tmp_path, env=settings
    )
    assert done.returncode == 0, done.stderr
    for name, case in saved.items():
        found = torch.load(case.folder / "found.pt")
        kind, config, outputs = found[auto_of(name)]
        assert kind == f"Moefied{name.title()}{HEAD[name]}" and config == f"{name.title()}Config"
        assert all(torch.equal(output, case.sparse[0]) for output in outputs)
        kind, config, outputs = found["AutoModel"]
        assert kind == f"Moefied{name.title()}Model" and config == f"{name.title()}Config"
        with torch.no_grad():
            base = case.model.base_model(**inputs_of(name))[0]
        assert all(torch.equal(output, base) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_their_class_loads_the_dense_model(saved, name):
    case = saved[name]
    stock = case.model.stock_class()
    loaded = stock.from_pretrained(case.folder).eval()
    assert type(loaded) is stock
    assert distance(run(loaded, inputs_of(name)), case.dense) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_load_has_the_packages_code_and_saves_again(saved, name, tmp_path):
    case = saved[name]
    loaded = load(case.folder, trust_remote_code=True).eval()
    assert type(loaded).__mro__[1].__module__ == "moefy_hf.modeling.moefied"
    assert torch.equal(run(loaded, inputs_of(name))[0], case.sparse[0])
    loaded.save_pretrained(tmp_path / "again")
    own = getattr(transformers, auto_of(name)).from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert type(own).__name__ == type(loaded).__name__ and type(own) is not type(loaded)
    assert torch.equal(run(own, inputs_of(name))[0], case.sparse[0])
    own.set_selection(k=1.0)  # the checkpoint's own class, and what is saved of it
    own.save_pretrained(tmp_path / "third")
    third = load(tmp_path / "third", head="AutoModel", trust_remote_code=True).eval()
    assert type(third).__name__ == f"Moefied{name.title()}Model"
    dense = load(case.dense_folder, trust_remote_code=True).eval()
    assert distance(run(third, inputs_of(name)), run(dense.base_model, inputs_of(name))) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_load_without_trust_says_what_it_needs(saved, name):
    with pytest.raises(UnsupportedModel, match="trust_remote_code=True"):
        load(saved[name].folder)


def test_a_checkpoint_can_be_verified(saved):
    assert verify(saved["zork"].folder, inputs=inputs_of("zork")) == 0


def test_it_is_measured_generates_and_trains_like_others(saved):
    case = saved["zork"]
    model = load(case.folder, trust_remote_code=True).eval()
    ids = inputs_of("zork")["input_ids"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    with torch.no_grad():
        loss = model(**batches[0]).loss.item()  # its labels are shifted as a causal model's are
    sweep = evaluate(model, batches, [0.5], controls=[], progress=False)
    assert sweep.rows[-1]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 10)
    model.train()
    model(**batches[0]).loss.backward()
    assert all(site.first.weight.grad.abs().sum() > 0 for site in model.moe_sites())
    dense = load(case.dense_folder, trust_remote_code=True)
    assert len(profile(dense, batches, progress=False).sites) == 2


@pytest.mark.parametrize("name", ["zork", "plain"])
def test_the_command_line_converts_what_it_may_trust(saved, name, tmp_path, capsys):
    arguments = ["convert", str(saved[name].dense_folder), str(tmp_path / "out"), "--splitter", "random"]
    arguments += ["--router", "random", "--expert_size", "8"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "trust_remote_code" in capsys.readouterr().err
    main([*arguments, "--trust_remote_code"])
    loaded = getattr(transformers, auto_of(name)).from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == f"Moefied{name.title()}{HEAD[name]}"


@pytest.mark.parametrize("name", NAMES)
def test_an_unregistered_class_is_converted_and_saved_once_it_is_registered(name, tmp_path, monkeypatch):
    module = imported(name, tmp_path, monkeypatch)
    model = fresh(module, name, HEAD[name])
    dense = run(model, inputs_of(name))
    convert(model)
    assert distance(run(model, inputs_of(name)), dense) < 1e-5
    with pytest.raises(
        UnsupportedModel, match=rf"{name.title()}Config\.register_for_auto_class\(\) and type\(model\)"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class(auto_of(name))
    model.save_pretrained(tmp_path / "out")
    auto = getattr(transformers, auto_of(name))
    loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(loaded).__name__ == f"Moefied{name.title()}{HEAD[name]}"
    assert distance(run(loaded, inputs_of(name)), dense) < 1e-5


def test_classes_registered_before_are_all_heads_of_a_checkpoint(tmp_path, monkeypatch):
    module = imported("plain", tmp_path, monkeypatch)
    module.PlainConfig.register_for_auto_class()
    module.PlainModel.register_for_auto_class("AutoModel")
    module.PlainForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    model = fresh(module, "plain", HEAD["plain"])
    convert(model, k=0.5)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "MoefiedPlainModel"
    assert type(AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__ == "PlainConfig"


def test_a_class_of_a_session_cannot_be_saved(tmp_path, monkeypatch):
    module = imported("zork", tmp_path, monkeypatch)
    monkeypatch.setattr(module.ZorkForCausalLM, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "ZorkForCausalLM", module.ZorkForCausalLM, raising=False)
    model = fresh(module, "zork", HEAD["zork"])
    convert(model)
    with pytest.raises(UnsupportedModel, match="defined in __main__.*a file of its own"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from .zork_parts import Layer", "from zork_package.zork_parts import Layer", "imports zork_package"),
        ("from .zork_parts import Layer", "from . import zork_parts\nLayer = zork_parts.Layer", "from . import"),
        ("from .zork_parts import Layer", "from ..zork_package.zork_parts import Layer", "another folder"),
        ("from .zork_parts import Layer", "from .needs import Layer", "give it another name"),
    ],
)
def test_code_that_cannot_travel_is_named(old, new, message, tmp_path, monkeypatch):
    monkeypatch.setitem(FILES, "zork", {**FILES["zork"], "needs.py": FILES["zork"]["zork_parts.py"]})
    monkeypatch.setitem(FILES["zork"], "modeling_zork.py", FILES["zork"]["modeling_zork.py"].replace(old, new))
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "__init__.py").write_text("")
    if ".." in new:  # a package within a package
        write_code("zork", tmp_path / "whole" / "zork_package")
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module("whole.zork_package.modeling_zork")
    else:
        module = imported("zork", tmp_path / "whole", monkeypatch)
    module.ZorkConfig.register_for_auto_class()
    module.ZorkForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = fresh(module, "zork", HEAD["zork"])
    convert(model)
    with pytest.raises(UnsupportedModel, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
