"""Shared by all tests: no network, no progress bars, one thread (tiny models only lose by more)."""

import gc
import os
import tempfile

MODULES = tempfile.TemporaryDirectory(prefix="moefy_modules_")  # for code that comes with checkpoints; per process
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_MODULES_CACHE"] = MODULES.name

import pytest  # noqa: E402
import torch  # noqa: E402
from hub_server import HubServer, use_in_process  # noqa: E402
from moefy_ffn import build  # noqa: E402
from transformers.utils import logging  # noqa: E402

from moefy_hf.conversion import checks as convertible  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()


def pytest_collection_finish():
    """Modules stay: every Trainer ends with a collection of garbage, which need not look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def conversions_are_quick(monkeypatch):
    """Looking for a whole around the model goes through all of Python's objects: that is done where it is tested."""
    monkeypatch.setattr(convertible, "whole_around", lambda model: None)


@pytest.fixture
def kernel_cache(monkeypatch, tmp_path):
    """An empty folder for the compiled kernel."""
    monkeypatch.setenv("MOEFY_KERNELS", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub on this machine, which the client of this process talks to."""
    with HubServer() as server:
        use_in_process(monkeypatch, server, tmp_path / "cache")
        yield server
