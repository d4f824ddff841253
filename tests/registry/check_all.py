"""Convert a tiny model of every model type of transformers, check it, and write the table of architectures.

    python tests/registry/check_all.py                    # all types: half an hour on one core
    python tests/registry/check_all.py --types bert vit   # these alone; the others stay as they are in the JSON

The outcome is architectures.json beside this file; `python tests/registry/table.py` makes
docs/architectures.md of it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import transformers  # noqa: E402
from build_all import TooSlow, time_limit  # noqa: E402
from checking import check_type  # noqa: E402
from table import CHECKS, OUTCOMES, passes  # noqa: E402
from tiny_registry import HEADS_OF, model_types  # noqa: E402
from tqdm import tqdm  # noqa: E402

TOGETHER = 20  # models that one clean process loads


def outcome(model_type: str, folder: Path, seconds: int) -> dict[str, Any]:
    """Return what `check_type` finds, or the reason why it cannot."""
    start = time.monotonic()
    try:
        with time_limit(seconds):
            result = check_type(model_type, folder)
    except (Exception, TooSlow) as error:
        result = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def own_code(folders: dict[str, Path]) -> dict[str, bool | str]:
    """Return for each type whether a clean process loads its folder, equal to the model that was saved."""
    command = [sys.executable, str(HERE / "clean_process.py"), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        return dict.fromkeys(folders, f"the process ended: {done.stderr.strip().splitlines()[-1:]}")
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return {model_type: outcomes[str(folder)] for model_type, folder in folders.items()}


def check(types: list[str], seconds: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Check some types, and yield what is known of them now and then."""
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="moefy_registry_") as directory:
        waiting: dict[str, Path] = {}
        for number, model_type in enumerate(tqdm(types, unit="type"), 1):
            folder = Path(directory) / model_type
            outcomes[model_type] = outcome(model_type, folder, seconds)
            if (folder / "expected.pt").exists():
                waiting[model_type] = folder
            if len(waiting) == TOGETHER or number == len(types) and waiting:
                for done, passed in own_code(waiting).items():
                    outcomes[done]["own_code"] = passed
                    shutil.rmtree(waiting[done])
                waiting = {}
                yield outcomes
        yield outcomes


def as_json(known: dict[str, dict[str, Any]]) -> str:
    """Return outcomes as JSON, a line for each type."""
    lines = [f"  {json.dumps(name)}: {json.dumps(known[name], sort_keys=True)}" for name in sorted(known)]
    versions = f'"torch": "{torch.__version__}", "transformers": "{transformers.__version__}"'
    return f'{{{versions}, "types": {{\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[*model_types(), *HEADS_OF], help="model types, by default all")
    parser.add_argument("--missing", action="store_true", help="only types that the JSON does not have yet")
    parser.add_argument("--seconds", type=int, default=60, help="limit for one type")
    parser.add_argument("--output", type=Path, default=OUTCOMES, help="JSON file; other types in it stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    known = json.loads(arguments.output.read_text())["types"] if arguments.output.exists() else {}
    types = [name for name in arguments.types if not (arguments.missing and name in known)]
    for outcomes in check(types, arguments.seconds):
        known |= outcomes
        arguments.output.write_text(as_json(known))
    print(f"{sum(map(passes, known.values()))} of {len(known)} types pass all checks: {arguments.output}")
    for model_type in types:
        if not passes(known[model_type]):
            wrong = {key: known[model_type][key] for key in CHECKS if known[model_type].get(key) not in (True, None)}
            print(f"{model_type}: {wrong or known[model_type].get('reason')}")


if __name__ == "__main__":
    main()
