"""`moefy kernels`: what can run here, and the compiled file."""

import importlib.util
import json
from pathlib import Path

import pytest
from moefy_ffn import build

from moefy_hf.cli.main import main
from moefy_hf.runtime.backends import BACKENDS


def info(capsys) -> dict:
    main(["kernels", "info", "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_implementation_is_reported(capsys):
    assert set(info(capsys)["implementations"]) == {"masked", *BACKENDS}


def test_info_compiles_nothing_and_build_does(kernel_cache, capsys, monkeypatch):
    found = info(capsys)
    assert found["implementations"]["cpu"] == {"runs": True, "reason": None} and found["bytes"] is None
    assert (
        found["cache"] == str(kernel_cache)
        and Path(found["file"]).parent == kernel_cache
        and not list(kernel_cache.iterdir())
    )
    assert found["compiler"] == build.compiler() and found["flags"] == list(build.FLAGS) and found["version"]
    main(["kernels", "info"])
    assert "| cpu | yes |" in capsys.readouterr().out
    made = []
    calls = (([], 1, "compiled in"), ([], 1, "compiled already"), (["--force"], 2, "compiled in"))
    with monkeypatch.context() as patched:
        patched.setattr(build, "compile_", lambda path: (path.write_bytes(b"ELF"), made.append(path)))
        patched.setattr(build, "library", lambda: None)
        for arguments, times, said in calls:
            main(["kernels", "build", *arguments])
            assert len(made) == times and said in capsys.readouterr().out
    assert info(capsys)["bytes"] == 3 and made == [Path(found["file"])] * 2


def test_build_leaves_a_kernel_that_loads(kernel_cache, capsys):
    main(["kernels", "build", "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["compiled_now"] and found["bytes"] == Path(found["file"]).stat().st_size > 0
    assert "compiling ffn.cpp" in captured.err
    assert info(capsys)["bytes"] == found["bytes"]


def test_triton_wants_itself_and_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("moefy_hf.runtime.triton_kernel.torch.cuda.is_available", lambda: False)
    for installed, reason in (
        (None, "there is no Triton: pip install 'moefy-hf[triton]'"),
        ("here", "there is no GPU"),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, installed=installed: installed)
        assert info(capsys)["implementations"]["triton"] == {"runs": False, "reason": reason}


def test_without_a_compiler(kernel_cache, capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    found = info(capsys)
    assert (
        not found["implementations"]["cpu"]["runs"] and "no C++ compiler" in found["implementations"]["cpu"]["reason"]
    )
    assert found["implementations"]["torch"]["runs"] and found["file"] is None
    main(["kernels", "info"])
    assert "| cpu | there is no C++ compiler" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "/bin/false")
    for message in ("/bin/false failed", "/no/such/compiler"):
        with pytest.raises(SystemExit) as stopped:
            main(["kernels", "build"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and "Traceback" not in error
        monkeypatch.setenv("CXX", "/no/such/compiler")
