"""A MoEfied checkpoint that is loaded trains in two processes, however they share it, as it does in one."""

import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from sharded_run import DTYPES, WAYS, loaded, optimizer_of, run_trainer, tokens, train
from tiny import convert, tiny_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name has changed lately


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny_model("llama", "AutoModelForCausalLM")
    convert(model, k=3, router="linear", calibration=[{"input_ids": ids} for ids in tokens()])
    model.save_pretrained(folder / "moefied")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What two processes came to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    command = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(HERE / "sharded_run.py")]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert (folder / "found.pt").exists(), done.stderr[-4000:]
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process comes to, per type."""
    results = {}
    for dtype in DTYPES:
        model = loaded(folder / "moefied", dtype)
        losses = train(model, optimizer_of(model), tokens())
        results[dtype] = losses, {name: each.detach() for name, each in model.named_parameters()}
    return results


@pytest.mark.parametrize(("way", "dtype"), product(WAYS, DTYPES))
def test_processes_train_as_one_does(way, dtype, found, alone, folder):
    """bfloat16 rounds what each process sums: weights then differ by a few of its last bits."""
    losses, state = alone[dtype]
    result, exact = found[way, dtype], dtype == "float32"
    assert result["losses"] == pytest.approx(losses, rel=1e-4 if exact else 1e-2)
    before = dict(loaded(folder / "moefied", dtype).named_parameters())
    routers = [name for name in state if ".router." in name]
    assert routers and all(torch.equal(result["state"][name], before[name]) for name in routers)
    for name, each in state.items():
        close = {"rtol": 1e-3, "atol": 1e-4} if exact else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(result["state"][name].to(each.dtype), each, **close, msg=name)
    assert any(not torch.equal(result["state"][name], before[name]) for name in before)


@pytest.mark.parametrize(("way", "dtype"), product(WAYS, DTYPES))
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(way, dtype, found):
    result = found[way, dtype]
    assert result["resumed"] == result["losses"]
    for name, each in result["state"].items():
        assert torch.equal(result["resumed_state"][name], each), name


def test_the_trainer_does_and_resumes(found, folder, tmp_path):
    one = run_trainer(folder, tmp_path, 8, resume=False)
    for resume in (False, True):
        assert found[resume]["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for name, each in one["state"].items():
            torch.testing.assert_close(found[resume]["state"][name], each, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_of_a_model_converted_in_place_is_resumed_with_the_model_loaded(tmp_path):
    """Loading makes new parameters: routers must stay frozen, or the optimizer's groups are others."""
    rows = [{"input_ids": ids, "labels": int(ids[0]) % 2} for ids in tokens().flatten(0, 1)]

    def trainer(model) -> Trainer:
        args = TrainingArguments(
            str(tmp_path / "run"), max_steps=4, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
        )
        return Trainer(model, args, train_dataset=rows)

    model = tiny_model("bert", "AutoModelForSequenceClassification")
    convert(model, k=3)
    model.save_pretrained(tmp_path / "moefied")
    first = trainer(model)
    first.train()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moefied", trust_remote_code=True)
    second = trainer(again)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, each in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], each), name
