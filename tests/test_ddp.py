"""Two processes (gloo, CPU) against one: ranks stay identical, and do what a single process does on the same data."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from ddp_run import learned
from test_callback import losses_of

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "recipes" / "accelerate_configs"


@pytest.mark.parametrize("path", CONFIGS.glob("*.yaml"), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    expected = {"single": "NO", "ddp": "MULTI_GPU", "ddp_cpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == expected.get(path.stem, "DEEPSPEED")


def launch(folder: Path, processes: int, batch_size: int, what: str = "schedule") -> list[dict]:
    """With `accelerate launch`, as the recipes are."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    config = CONFIGS / ("ddp_cpu.yaml" if processes > 1 else "single.yaml")
    accelerate = ["accelerate.commands.launch", "--config_file", str(config), f"--main_process_port={port}"]
    done = subprocess.run(
        [sys.executable, "-m", *accelerate, str(HERE / "ddp_run.py"), str(folder), str(batch_size), what],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (one,) = launch(folder / "one", 1, 8)
    return one, launch(folder / "two", 2, 4)


def test_ranks_are_identical_after_every_step(runs):
    _, (first, second) = runs
    assert first["world"] == second["world"] == 2
    assert len(first["digests"]) == 12 and first["digests"] == second["digests"]
    assert first["section"] == second["section"]
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


def test_two_processes_do_what_one_does(runs):
    """Half as many examples per process make the same batches, and the profile is that of the same tokens."""
    one, (first, _) = runs
    assert one["losses"] == pytest.approx(first["losses"], rel=1e-3)
    assert one["section"] == first["section"]
    for key, value in one["state"].items():
        torch.testing.assert_close(value, first["state"][key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_learned_selection_goes_through_both_stages(tmp_path):
    one = learned(tmp_path / "one", 8)
    one.train()
    first, second = launch(tmp_path / "two", 2, 4, "learned")
    assert len(first["digests"]) == 12 and first["digests"] == second["digests"]
    assert losses_of(one) == pytest.approx(first["losses"], rel=1e-3)
    for key, value in one.model.state_dict().items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        torch.testing.assert_close(value, first["state"][key], rtol=1e-3, atol=1e-4, msg=key)
    routers = [position for position, key in enumerate(first["state"]) if ".router." in key]
    seen = [[digest[position] for position in routers] for digest in first["digests"]]
    assert [a != b for a, b in zip(seen, seen[1:], strict=False)] == [True] * 7 + [False] * 4
