"""The recipes as files that a person takes away: small, with their dependencies, running beside the wheel alone."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from moefy_hf.cli.main import main as moefy
from moefy_hf.recipes.scores import BUNDLED
from moefy_hf.recipes.tasks import TASKS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "recipes").glob("*.py"))
EVERY = [
    *SCRIPTS,
    *sorted((ROOT / "recipes" / "figures").glob("*.py")),
    *sorted((ROOT / "moefy_hf" / "recipes").rglob("*.py")),
]


def test_the_scripts():
    assert {path.stem for path in SCRIPTS} == {f"moefy_{name}" for name in TASKS}
    for path in SCRIPTS:
        assert f'main("{path.stem.removeprefix("moefy_")}")' in path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_needs_the_package_and_what_it_depends_on(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 200
    header = re.match(r"(?s)# /// script\n(.*?)# ///\n", text)
    assert header and "# requires-python" in header[1] and re.search(r'dependencies = \["moefy-hf\[plots', header[1])
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            roots.add(node.module.split(".")[0])
    assert roots - sys.stdlib_module_names <= {"moefy_hf", "torch", "transformers", "numpy", "datasets", "evaluate"}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that the wheel is installed in, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files where it is made
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("moefy_hf", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.so"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *flags, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return folder / "site"


def test_a_copy_of_one_script_and_the_command_run_beside_the_wheel(site, inputs, tmp_path, monkeypatch, capfd):
    script = tmp_path / "empty" / "moefy_classification.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "recipes" / "moefy_classification.py", script)
    flags = ["--model_name_or_path", inputs["model"], "--dataset_name", inputs["texts"], "--output_dir", "out"]
    flags += ["--max_steps", "2", "--save_strategy", "no", "--report_to", "none", "--activation", "relu"]
    flags += ["--expert_size", "8", "--k", "0.5", "--budgets", "0.5", "--controls", "none", "--timed_batches", "1"]
    flags += ["--calibration_tokens", "600", "--use_cpu", "true"]
    env = os.environ | {"PYTHONPATH": str(site), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    there = {"cwd": script.parent, "env": env, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, script.name, *flags], **there)
    assert done.returncode == 0, done.stderr[-3000:]
    table = "| model | experts per token | accuracy | ms per batch | speed | ms masked |"
    assert table in done.stdout
    config = ROOT / "recipes" / "accelerate_configs" / "ddp_cpu.yaml"
    launch = ["--config_file", str(config), "--main_process_port", "0"]
    launch += ["-m", "moefy_hf.cli", "train", "classification"]
    capfd.readouterr()
    with monkeypatch.context() as patch:  # the same run goes on, in two processes, as `accelerate launch` starts them
        for name in ("PYTHONPATH", "HF_DATASETS_CACHE"):
            patch.setenv(name, env[name])
        patch.chdir(script.parent)
        launch_command(launch_command_parser().parse_args([*launch, *flags, "--recovery_epochs", "0.05"]))
    out = capfd.readouterr().out
    assert out.count(table) == 1 and "| MoEfied, then fine-tuned |" in out
    assert out.count("dense: done before") == 2 and out.count("moefied: done before") == 1
    assert {path.name for path in script.parent.iterdir()} == {script.name, "out"}
    scores = json.loads((script.parent / "out" / "scores_moefied.json").read_text())
    assert 0 <= scores["moefied at 0.5"]["accuracy"] <= 1
    program = "from importlib.util import find_spec; print(find_spec('moefy_hf').origin)"
    found = subprocess.run([sys.executable, "-c", program], cwd=script.parent, env=env, capture_output=True, text=True)
    assert found.stdout.strip() == str(site / "moefy_hf" / "__init__.py")
    metrics = sorted(path.parent.name for path in (site / "moefy_hf" / "recipes" / "metrics").glob("*/*.py"))
    assert metrics == sorted(BUNDLED) == ["accuracy", "exact_match", "seqeval", "squad"]


def test_the_command_says_what_it_takes_and_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moefy"])
    for words in ([], ["classification"]):
        with pytest.raises(SystemExit) as ended:
            moefy(["train", *words, "--help"])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        shown = TASKS if not words else ("--learning_rate", "--k K", "--distillation_weight", "--config FILE.yaml")
        assert all(name in out for name in shown) and "--adam_epsilon" not in out
    for words, named in (
        (["classify"], "classify"),
        (["classification", "--k", "1.5"], "moefy train: error: .*1.5"),
        (["causal_lm", "--schedule", "anneal"], "moefy train: error: .*--schedule"),
        (["classification", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ):
        with pytest.raises(SystemExit) as ended:
            moefy(["train", *words, *("--model_name_or_path", "m", "--dataset_name", "d")])
        assert ended.value.code == 2 and re.search(named, capsys.readouterr().err.splitlines()[-1])


def test_a_bad_setting_is_one_line(tmp_path, monkeypatch, capsys):
    script = str(ROOT / "recipes" / "moefy_classification.py")
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--splitter", "kmeans"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{script}: error: unknown splitter 'kmeans'; choose from")
    assert not list(tmp_path.iterdir())
