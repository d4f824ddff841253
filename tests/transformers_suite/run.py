"""Run transformers' own model tests on MoEfied classes, beside the stock ones.

    python tests/transformers_suite/run.py --models llama bert

Whatever the stock class passes the MoEfied one has to pass, but for the exceptions that are listed here with reasons.
The tests come out of the source distribution of the installed transformers, which pip fetches once into --cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import transformers

HERE = Path(__file__).parent
MODELS = ("llama", "bert", "t5", "gpt2", "opt", "vit", "qwen3", "modernbert", "whisper")
STUBS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
REASONS = {  # test -> why a MoEfied class does not pass it
    "test_correct_missing_keys": "saves a head's base model, a part that would load as a dense model: that is refused",
}


def fetched(cache: Path) -> Path:
    """The folder that holds transformers' tests as a package `transformers_tests`, of the installed version."""
    version = transformers.__version__
    folder = cache / f"transformers-{version}"
    package = folder / "transformers_tests"
    if package.exists():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        print(f"fetching the sources of transformers {version} (11 MB)", flush=True)
        source = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", f"transformers=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *source, "-d", temporary], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        unfinished = folder / "unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        for path in Path(temporary, f"transformers-{version}", "tests").glob("*.py"):
            (unfinished / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        (unfinished / "__init__.py").touch()
        for name, mixin in STUBS.items():  # which the source distribution leaves out
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).with_name("__init__.py").touch()
            (unfinished / name).write_text(f"class {mixin}:\n    pass\n")
        unfinished.rename(package)
    return folder


def outcomes(model: str, kind: str, folder: Path, processes: int) -> dict[str, tuple[str, str]]:
    """Test -> (passed, failed or skipped; its message)."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (folder, HERE, HERE.parent, HERE.parents[1]))),
            "SUITE_MODEL": model,
            "SUITE_KIND": kind,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"-n{processes}", "-c", os.devnull]
        command += ["--rootdir", str(HERE), f"--junitxml={report}", str(HERE / "model_tests.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=temporary)
        if not report.exists():
            raise SystemExit(f"pytest did not run for {model}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
            state = "passed" if wrong is None else "skipped" if wrong.tag == "skipped" else "failed"
            found[case.get("name", "")] = state, "" if wrong is None else wrong.get("message", "")
        return found


def compare(model: str, folder: Path, processes: int) -> dict:
    stock, own = (outcomes(model, kind, folder, processes) for kind in ("stock", "moefied"))
    passes = [name for name, (state, _) in stock.items() if state == "passed"]
    fails = {name: own.get(name, ("missing", ""))[1] for name in passes if own.get(name, ("missing",))[0] != "passed"}
    known = {name: REASONS[name] for name in fails if name in REASONS}
    return {
        "model": model,
        "stock_passes": len(passes),
        "moefied_passes": sum(state == "passed" for state, _ in own.values()),
        "known": known,
        "fails": {name: " ".join(message.split())[:300] for name, message in fails.items() if name not in known},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "moefy_hf")
    parser.add_argument("--cache", type=Path, default=cache, help="folder for the sources (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file that gets the figures")
    args = parser.parse_args()
    folder = fetched(args.cache)
    rows = []
    print(
        "| model | stock passes | MoEfied passes | differ, with a reason | differ |\n|---|---|---|---|---|", flush=True
    )
    for model in args.models:
        rows.append(row := compare(model, folder, args.processes))
        counts = row["stock_passes"], row["moefied_passes"], len(row["known"]), len(row["fails"])
        print(f"| {model} | {' | '.join(map(str, counts))} |", flush=True)
        for name, message in row["fails"].items():
            print(f"  {name}: {message}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"transformers": transformers.__version__, "rows": rows}, indent=1))
    sys.exit(any(row["fails"] for row in rows))


if __name__ == "__main__":
    main()
