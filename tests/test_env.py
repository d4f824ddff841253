"""`moefy env`: what a bug report needs, whatever is missing or broken."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from moefy_ffn import build

import moefy_hf
from moefy_hf.cli import env
from moefy_hf.cli.main import main
from moefy_hf.runtime.backends import BACKENDS

ROOT = Path(__file__).parent.parent


def found(capsys) -> dict:
    main(["env", "--json"])
    return json.loads(capsys.readouterr().out)


def printed(capsys) -> dict[str, str]:
    main(["env"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    return {row[0]: row[1] for row in rows}


def test_it_says_what_is_here(capsys):
    facts, rows = found(capsys), printed(capsys)
    assert facts["versions"]["torch"] == rows["torch"] == metadata.version("torch")
    assert facts["versions"]["python"] == rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows["moefy-hf"] == f"{moefy_hf.__version__} in {Path(moefy_hf.__file__).parent}"
    assert facts["processor"]["threads"] == torch.get_num_threads() and rows["threads"] == str(torch.get_num_threads())
    assert {f"implementation {name}" for name in ("masked", *BACKENDS)} <= rows.keys()
    assert facts["accelerator"]["count"] == torch.accelerator.device_count()
    assert not any("fails" in value for value in rows.values())


def test_packages_of_every_extra_that_runs_models_are_named():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"^dependencies = .*?^docs = ", text, re.DOTALL | re.MULTILINE)[0]
    names = {name.lower().replace("_", "-") for name in re.findall(r'"([\w-]+)[><=]', extras)}
    named = {name.replace("_", "-") for name in (*env.REQUIRED, *env.OPTIONAL)}
    small = {"filelock", "jinja2", "numpy", "psutil", "pyyaml", "scipy", "scikit-learn", "tqdm", "pillow"}
    assert len(names) > 15 and names - small <= named


def test_instruction_sets_are_those_that_matter(capsys, monkeypatch):
    for flags, kept in (
        ("flags : fpu sse2 avx2 avx512_vnni amx_int8", ["avx2", "avx512_vnni", "amx_int8"]),
        ("Features : fp asimd aes bf16 sve", ["asimd", "bf16", "sve"]),
        ("arm64 arm", []),
    ):
        monkeypatch.setattr(build, "processor", lambda flags=flags: flags)
        assert found(capsys)["processor"]["instruction_sets"] == kept


def test_the_kernel_that_is_compiled_is_loaded_and_none_is_compiled(kernel_cache, capsys):
    assert found(capsys)["kernels"]["load_error"] is None and "not compiled yet" in printed(capsys)["compiled kernel"]
    path = build.compiled()
    path.write_bytes(b"no library")
    assert str(path) in found(capsys)["kernels"]["load_error"]
    assert printed(capsys)["compiled kernel"].startswith(f"{path}, does not load: ")
    assert [*kernel_cache.iterdir()] == [path]


def test_without_a_compiler(kernel_cache, capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    rows = printed(capsys)
    assert rows["compiler"] == "none" and "no C++ compiler" in rows["implementation cpu"]


def test_damaged_metadata_are_no_error(capsys, monkeypatch):
    def damaged(name):
        raise {"peft": KeyError("version"), "onnx": metadata.PackageNotFoundError(name)}.get(name, OSError("damaged"))

    monkeypatch.setattr(env.metadata, "version", damaged)
    versions = found(capsys)["versions"]
    assert versions.pop("moefy-hf") and versions.pop("python") and not any(versions.values())


def test_torch_that_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken | here')")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "moefy_hf.cli", "env"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("processor", "kernels", "accelerator"):
        assert f"| {part} | fails: ImportError: libtorch is broken \\| here |" in done.stdout
