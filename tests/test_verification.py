"""A checkpoint is verified by a process that cannot import the package."""

import shutil
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, convert, run, tiny_inputs, tiny_model

from moefy_hf.errors import UnsupportedModel, VerificationError
from moefy_hf.hub.verification import verify
from moefy_hf.measure.made_up_inputs import made_up_batch

HEAD = "AutoModelForSequenceClassification"


def heads(name: str) -> list[str]:
    """The AutoModel names of every head that an architecture has MoEfied."""
    module = import_module(f"moefy_hf.modeling.modeling_moefied_{name.replace('-', '_')}")
    return [c._auto_class for c in vars(module).values() if isinstance(c, type) and "_auto_class" in vars(c)]


ALL = [(name, head) for name in TINY for head in heads(name)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny_model("bert", HEAD)
    convert(model, k=2)
    folder = tmp_path_factory.mktemp("verification") / "moe"
    model.save_pretrained(folder)
    return model, folder


def test_a_good_checkpoint_passes(saved):
    model, folder = saved
    model.train()
    assert verify(folder, model) < 1e-5
    assert model.training and not list(folder.glob("outputs*"))


def test_own_inputs_and_the_checkpoint_alone(saved):
    assert verify(saved[1], inputs=tiny_inputs("bert", HEAD)) < 1e-5


def test_another_model_is_found_out(saved):
    other = tiny_model("bert", HEAD)
    convert(other, k=4)
    with pytest.raises(VerificationError, match="outputs that differ by"):
        verify(saved[1], other)


def damaged(folder, how):
    if how == "routers":
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: -value for name, value in tensors.items() if ".router." in name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif how == "code":
        (folder / "routers.py").unlink()
    else:
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace(f'"{HEAD}":', '"AutoModelForNothing":'))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("routers", "outputs that differ by"),
        ("code", "does not load in a new process: .*routers"),
        ("map", "it loads as BertForSequenceClassification, not as Moefied|does not load"),
    ],
)
def test_damage_is_found(saved, tmp_path, how, message):
    folder = shutil.copytree(saved[1], tmp_path / "damaged")
    damaged(folder, how)
    with pytest.raises(VerificationError, match=message):
        verify(folder, saved[0])


@pytest.mark.parametrize(("name", "head"), ALL)
def test_inputs_are_made_up_for_every_head(name, head):
    model = tiny_model(name, head)
    inputs = made_up_batch(model)
    assert len(run(model, inputs)) > 0
    again = made_up_batch(model)
    assert all(torch.equal(value, again[key]) for key, value in inputs.items())


def test_a_model_that_no_inputs_can_be_made_up_for(saved, monkeypatch):
    def refuse(model):
        raise UnsupportedModel("it reads smells")

    monkeypatch.setattr("moefy_hf.hub.verification.made_up_batch", refuse)
    with pytest.raises(VerificationError, match="pass inputs=.*smells"):
        verify(saved[1], saved[0])
