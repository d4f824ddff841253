"""DeepSpeed's ZeRO-2 and ZeRO-3 on CPUs. Not a dependency: `pip install deepspeed ninja`, and a C++ compiler."""

from pathlib import Path

import pytest
import torch
from launching import torchrun
from sharded_run import tokens
from tiny import convert, tiny_model

from moefy_hf import load

pytest.importorskip("deepspeed")


def launch(folder: Path, output: Path, stage: int, processes: int) -> dict[str, torch.Tensor]:
    """Train; return the weights that were saved."""
    words = (str(folder), str(output), str(stage))
    done = torchrun("deepspeed_run.py", *words, processes=processes, timeout=400, DS_ACCELERATOR="cpu")
    assert (output / "losses.pt").exists(), done.stderr[-4000:]
    return load(output).state_dict()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_as_one_does(stage, tmp_path):
    model = tiny_model("llama", "AutoModelForCausalLM")
    convert(model, k=3, router="linear", calibration=[{"input_ids": ids} for ids in tokens()])
    model.save_pretrained(tmp_path / "moefied")
    one, two = (launch(tmp_path / "moefied", tmp_path / f"{n}", stage, n) for n in (1, 2))
    before = model.state_dict()
    assert one.keys() == two.keys() == before.keys()
    for name, each in before.items():
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
        if ".router." in name:
            assert torch.equal(two[name], each)
    assert any(not torch.equal(two[name], each) for name, each in before.items())
    losses = [torch.load(tmp_path / f"{n}" / "losses.pt") for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
