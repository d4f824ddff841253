"""Shared by all tests: no network, no progress bars, one thread (tiny models only lose by more)."""

import gc
import os
import tempfile

MODULES = tempfile.TemporaryDirectory(prefix="moefy_modules_")  # for code that comes with checkpoints; per process
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_MODULES_CACHE"] = MODULES.name

import pytest  # noqa: E402


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests of a file run in one process, which makes what they share once.

    Also with `--dist loadgroup`: pytest-xdist 3.8 groups nothing under pytest 9.2, where ids of tests are fixed.
    """
    if config.getvalue("dist") not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_collection_finish():
    """In the processes that run tests, and not in the one that only hands them out, which then starts sooner.

    Modules stay: every Trainer ends with a collection of garbage, which need not look through them.
    """
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def conversions_are_quick(monkeypatch):
    """Looking for a whole around the model goes through all of Python's objects: that is done where it is tested."""
    monkeypatch.setattr("moefy_hf.conversion.checks.whole_around", lambda model: None)


@pytest.fixture
def kernel_cache(monkeypatch, tmp_path):
    """An empty folder for the compiled kernel."""
    from moefy_ffn import build

    monkeypatch.setenv("MOEFY_KERNELS", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub on this machine, which the client of this process talks to."""
    from hub_server import HubServer, use_in_process

    with HubServer() as server:
        use_in_process(monkeypatch, server, tmp_path / "cache")
        yield server
