"""Two processes (gloo, CPU) against one: they do what a single process does on the same data.

Models are converted by callbacks while they train, and a MoEfied checkpoint that is loaded is trained, however
processes share it.
"""

import json
import os
import socket
from itertools import product
from pathlib import Path

import ddp_run
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from sharded_run import DTYPES, WAYS, loaded, optimizer_of, run_trainer, tokens, train
from tiny import convert, tiny_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "recipes" / "accelerate_configs"
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the name has changed lately


@pytest.mark.parametrize("path", CONFIGS.glob("*.yaml"), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    expected = {"single": "NO", "ddp": "MULTI_GPU", "ddp_cpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == expected.get(path.stem, "DEEPSPEED")


def launch(config: str, *command: str) -> None:
    """What `accelerate launch` does, in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--config_file", str(CONFIGS / f"{config}.yaml"), f"--main_process_port={port}"]
    launch_command(launch_command_parser().parse_args([*flags, *command]))


def test_one_process_is_launched(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\njson.dump([sys.argv, dict(os.environ)], open('out.json', 'w'))")
    before, here = dict(os.environ), Path.cwd()
    os.chdir(tmp_path)
    try:
        launch("single", str(script), "--word")
    finally:
        os.chdir(here)
    words, environment = json.loads((tmp_path / "out.json").read_text())
    assert words == [str(script), "--word"] and "RANK" not in environment and dict(os.environ) == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny_model("llama", "AutoModelForCausalLM")
    convert(model, k=3, router="linear", calibration=[{"input_ids": ids} for ids in tokens()])
    model.save_pretrained(folder / "moefied")
    return folder


@pytest.fixture(scope="module")
def both(folder) -> list[dict]:
    """What each of two processes came to, launched as the recipes are; once, as starting them takes longest."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PYTHONPATH", paths), ("OMP_NUM_THREADS", "1")):
            patch.setenv(name, value)
        launch("ddp_cpu", str(HERE / "two_processes.py"), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def found(both) -> dict:
    return both[0]["sharded"]


# ---- converted while they train


def test_ranks_are_identical_after_every_step(both):
    first, second = (each["schedule"] for each in both)
    assert first["world"] == second["world"] == 2
    assert len(first["digests"]) == 12 and first["digests"] == second["digests"]
    assert first["section"] == second["section"]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


def test_two_processes_do_what_one_does(both, tmp_path):
    """Half as many examples per process make the same batches, and the profile is that of the same tokens."""
    one, first = ddp_run.results("schedule", tmp_path, 8), both[0]["schedule"]
    assert one["world"] == 1
    assert one["losses"] == pytest.approx(first["losses"], rel=1e-3)
    assert one["section"] == first["section"]
    for key, value in one["state"].items():
        torch.testing.assert_close(value, first["state"][key], rtol=1e-3, atol=1e-4, msg=key)


def test_learned_selection_goes_through_both_stages(both, tmp_path):
    one, (first, second) = ddp_run.results("learned", tmp_path, 8), (each["learned"] for each in both)
    assert len(first["digests"]) == 12 and first["digests"] == second["digests"]
    assert one["losses"] == pytest.approx(first["losses"], rel=1e-3)
    for key, value in one["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        torch.testing.assert_close(value, first["state"][key], rtol=1e-3, atol=1e-4, msg=key)
    routers = [position for position, key in enumerate(first["state"]) if ".router." in key]
    seen = [[digest[position] for position in routers] for digest in first["digests"]]
    assert [a != b for a, b in zip(seen, seen[1:], strict=False)] == [True] * 7 + [False] * 4


# ---- loaded, and then trained


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
