"""Build a tiny model of every model type of transformers, run it on made-up inputs, and write what happened as JSON.

It fails where a type does not run and `CANNOT_RUN` has no reason, or the other way round.

python tests/registry/build_all.py --output registry.json [--types bert vit ...]
"""

import argparse
import json
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from registry_exceptions import CANNOT_RUN  # noqa: E402
from tiny_registry import HEADS_OF, first_output, model_types, tiny_model  # noqa: E402
from tqdm import tqdm  # noqa: E402

from moefy_hf.measure.made_up_inputs import made_up_batch  # noqa: E402


class TooSlow(BaseException):
    """A model type took longer than its limit; no `except Exception` in a model's code may swallow that."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"took longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(model_type: str, seconds: int) -> dict[str, Any]:
    """Return whether the type builds and runs, why not, its time in seconds, its parameters and inputs."""
    result: dict[str, Any] = {"builds": False, "runs": False, "reason": ""}
    start = time.monotonic()
    try:
        with time_limit(seconds):
            model = tiny_model(model_type)
            result |= {"builds": True, "parameters": sum(one.numel() for one in model.parameters())}
            batch = made_up_batch(model)
            output = first_output(model, batch)
            if not torch.isfinite(output).all():
                raise ValueError("the output is not finite")
            result |= {"runs": True, "inputs": {name: list(value.shape) for name, value in batch.items()}}
    except (Exception, TooSlow) as error:
        result["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"
        result["known"] = CANNOT_RUN.get(model_type) or (str(error) if isinstance(error, ImportError) else "")
    return {**result, "seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file: model type to outcome")
    parser.add_argument("--types", nargs="+", default=[*model_types(), *HEADS_OF], help="model types, by default all")
    parser.add_argument("--seconds", type=int, default=30, help="limit for one type")
    parser.add_argument("--gigabytes", type=int, default=12, help="limit for the memory of the process")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (arguments.gigabytes << 30,) * 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes = {name: outcome(name, arguments.seconds) for name in tqdm(arguments.types, unit="type")}
    arguments.output.write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n")
    built, run = (sum(one[key] for one in outcomes.values()) for key in ("builds", "runs"))
    print(f"{built} of {len(outcomes)} build, {run} run: {arguments.output}")
    new = [name for name, one in outcomes.items() if one["runs"] == bool(one.get("known") or name in CANNOT_RUN)]
    if new:
        sys.exit(f"not as CANNOT_RUN says: {', '.join(new)}")


if __name__ == "__main__":
    main()
