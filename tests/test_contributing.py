"""The examples of CONTRIBUTING.md run: each adds a method or an architecture, which then works."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from batches import text_batches
from documents import fenced
from tiny import convert, distance, run, tiny_inputs, tiny_model

from moefy_hf import evaluate, export
from moefy_hf.exporters.formats import EXPORT_FORMATS
from moefy_hf.modeling.ffn_layouts import FfnSpec
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.modeling.selection import SELECTIONS
from moefy_hf.splitters import SPLITTERS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (Add [^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


@pytest.fixture
def add(tmp_path, monkeypatch):
    """A function that runs the Python blocks of a section: each in the file that its first line names."""

    def add_(section: str) -> dict:
        made: dict = {}
        for code in fenced(SECTIONS[section], "python"):
            path = Path(code.partition("\n")[0].removeprefix("# "))
            if (ROOT / path).exists():  # goes into a file that is there
                parts = path.with_suffix("").parts
                module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
                names = {**vars(module), **made}
                exec(compile(code, str(path), "exec"), names)  # noqa: S102
                made |= {name: value for name, value in names.items() if name not in vars(module)}
            else:
                made |= vars(load(path, code))
        return made

    def load(path: Path, code: str):
        (tmp_path / path.name).write_text(code)
        name = ".".join(path.with_suffix("").parts)
        spec = importlib.util.spec_from_file_location(name, tmp_path / path.name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    before = [(registry, {*registry}) for registry in (SPLITTERS, ROUTERS, SELECTIONS, EXPORT_FORMATS)]
    yield add_
    for registry, names in before:
        for name in {*registry} - names:
            del registry[name]


def exact(model: torch.nn.Module, name: str, **settings) -> None:
    """All experts of a converted model together are the dense model; fewer are not."""
    inputs = tiny_inputs(name)
    dense = run(model, inputs)
    convert(model, **settings)
    assert distance(run(model, inputs), dense) < 1e-5
    model.set_selection(k=1)
    assert distance(run(model, inputs), dense) > 1e-3


def test_every_section_has_an_example():
    assert len(SECTIONS) == 5 and all(fenced(text, "python") for text in SECTIONS.values())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_splitter(add, name):
    add("Add a splitter")
    model = tiny_model(name)
    norms = find_sites(model)[0].weights().down.norm(dim=0)
    exact(model, name, splitter="by_norm")
    after = model.moe_sites()[0].weights().down.norm(dim=0)
    assert torch.equal(after, norms.sort(descending=True).values)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_router(add, name):
    add("Add a router")
    model = tiny_model(name)
    exact(model, name, router="largest_key")
    site = model.moe_sites()[0]
    x = torch.randn(3, site.sizes[0])
    keys = site.weights().keys
    expected = (x @ keys.T).unflatten(-1, (site.act.num_experts, -1)).amax(-1)
    assert torch.allclose(site.act.router(x), expected, atol=1e-6)


def test_a_selection(add):
    add("Add a selection")
    model = tiny_model("llama", "AutoModelForCausalLM")
    batches = text_batches(labels="causal")
    convert(model, calibration=batches, router="linear")
    computed = []
    for margin in (0.0, 0.3, 1.0):
        model.set_selection(type="mean_level", margin=margin)
        sweep = evaluate(model, batches, selections=[{"type": "mean_level", "margin": margin}], controls=[])
        computed.append(sweep.rows[-1]["experts"])
    assert 0 < computed[0] < computed[1] < computed[2] == 1


def test_an_export_format(add, tmp_path):
    add("Add an export format")
    model = tiny_model("mistral", "AutoModelForCausalLM")
    convert(model, 0.5, splitter="random", router="mean_gate")
    export(model, tmp_path / "moe", to="mistral_moe")
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert type(served).__name__ == "MixtralForCausalLM"
    inputs = tiny_inputs("mistral", "AutoModelForCausalLM")
    assert distance([served(**inputs).logits], [model(**inputs).logits]) < 1e-2


def test_an_architecture(add, capsys):
    """Nothing is added: what the block defines converts as it is."""
    made = add("Add an architecture")
    model = made["OddModel"](made["OddConfig"]()).eval()
    layout = FfnSpec("alpha", "gamma", "moefied_activation", gate="beta", function="silu")
    assert [(site.name, site.spec) for site in made["found"].sites] == [(f"layers.{i}", layout) for i in range(2)]
    assert capsys.readouterr().out == "".join(f"layers.{i} {layout}\n" for i in range(2))
    exact(model, "llama")
