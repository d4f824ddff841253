"""Checkpoints of every format there has been keep loading, and computing what they did.

Each folder of tests/checkpoints holds a checkpoint as it was saved then, without modeling files, and what it answered
in expected.safetensors. They are never made again; after FORMAT_VERSION has changed, this adds those of the new one:

    PYTHONPATH=tests python tests/modeling/test_format.py tests/checkpoints
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from batches import text_batches
from safetensors.torch import load_file, save_file
from tiny import run, tiny_inputs, tiny_model
from transformers import AutoConfig, PreTrainedModel

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.loading import checkpoint_class
from moefy_hf.modeling.section import FORMAT_VERSION

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
BY_SENSITIVITY = {"type": "threshold", "k": 0.25, "allocation": "sensitivity"}
MADE: dict[str, tuple[str, dict, dict]] = {  # name -> head, changes to the tiny model, settings
    "bert": (
        "AutoModelForSequenceClassification",
        {},
        {"selection": BY_SENSITIVITY, "shared_experts": 1, "router": "low_rank", "router_settings": {"rank": 3}},
    ),
    "llama": ("AutoModelForCausalLM", {}, {"selection": {"type": "top_k", "k": [2, 4]}, "compensation": True}),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"num_decoder_layers": 1},
        {"selection": {"type": "top_p", "k": 0.4, "allocation": "global"}, "router": "mlp"},
    ),
}
BUDGETS = {"as_saved": None, "half": 0.5, "all": 1.0}


def answers(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """k of every layer and the first output, at each budget."""
    found = {}
    for name, k in BUDGETS.items():
        if k is not None:
            model.set_selection(k=k)
        found[f"{name}.k"] = torch.tensor([site.act.k for site in model.moe_sites()])
        found[f"{name}.output"] = run(model, inputs)[0]
    return found


def make(directory: Path) -> None:
    for name, (head, changes, settings) in MADE.items():
        folder = directory / f"format_{FORMAT_VERSION}_{name}"
        folder.mkdir(parents=True)  # fails where it exists: what was saved then stays
        model, inputs = tiny_model(name, head, **changes), tiny_inputs(name, head)
        config = MoEficationConfig(expert_size=8, **settings)
        labels = "seq2seq" if head == "AutoModelForSeq2SeqLM" else None
        moefy_(model, config, text_batches(8, labels=labels), progress=False)
        if settings.get("router") == "mlp":  # as fitted on noise, it would choose the same experts without its tanh
            for site in model.moe_sites():
                for weight in site.act.router.parameters():
                    weight.data.normal_(generator=torch.Generator().manual_seed(weight.shape[1]))
        model.save_pretrained(folder)
        for code in folder.glob("*.py"):
            code.unlink()
        expected = {f"inputs.{key}": value for key, value in inputs.items()} | answers(model, inputs)
        save_file(expected, folder / "expected.safetensors")


def load(folder: Path) -> PreTrainedModel:
    return checkpoint_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval()


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("format_*")), ids=lambda folder: folder.name)
def test_checkpoints_of_every_format_compute_what_they_did(folder):
    expected = load_file(folder / "expected.safetensors")
    inputs = {key.removeprefix("inputs."): expected.pop(key) for key in list(expected) if key.startswith("inputs.")}
    model = load(folder)
    found = answers(model, inputs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    dense = run(type(model).stock_class().from_pretrained(folder).eval(), inputs)[0]
    torch.testing.assert_close(dense, expected["all.output"], rtol=0, atol=1e-5)


def test_every_format_has_its_checkpoints():
    formats = range(1, FORMAT_VERSION + 1)
    assert {folder.name for folder in CHECKPOINTS.iterdir()} >= {
        f"format_{n}_{name}" for n in formats for name in MADE
    }


def test_a_newer_format_is_refused_before_weights_are_read(tmp_path):
    shutil.copytree(CHECKPOINTS / "format_1_bert", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moefication"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=f"moefication format {FORMAT_VERSION + 1}.*upgrade moefy-hf"):
        load(tmp_path)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
