"""Named steps of a run, each finished once and remembered with the settings that it read."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import MoefyError
from .settings import Arguments

MARKER = "moefy_run.json"
# beginnings of the names of TrainingArguments that change no result
REPORTING = (
    *("output_dir", "run_name", "project", "logging_", "log_", "report_to", "disable_tqdm", "push_to_hub", "hub_"),
    *("local_rank", "dataloader_num_workers", "dataloader_p", "save_total_limit", "skip_memory_metrics"),
    "ddp_timeout",
)
MEASURING = ("seed", "per_device_eval_batch_size", "mixed_precision")  # what reads no more of TrainingArguments


@dataclass(frozen=True)
class Stage:
    """What a stage's result depends on.

    Args:
        reads: classes of the run's arguments; `TrainingArguments` count without those that only report.
        after: stages whose results it reads, and with them all that those read.
        measuring: seed, evaluation batch size and precision are all that it reads of `TrainingArguments`.
    """

    reads: tuple[type, ...] = ()
    after: tuple[str, ...] = ()
    measuring: bool = False


Plan = Mapping[str, Stage]


class Stages:
    """Named steps of a run, each leaving one file or folder in the output directory; finished ones are not run again.

    A marker file holds, for each result, the settings that it was made with and their hash; it says that the
    directory is ours.

    Args:
        directory: may hold results of earlier runs.
        plan: the stages that this run makes, by the names of what they leave. Others are left alone.
        arguments: of the run.
        redo: make every result anew, once.

    Raises:
        MoefyError: the directory holds something else, or results of other settings.
    """

    def __init__(self, directory: str | Path, plan: Plan, arguments: Arguments, redo: bool = False):
        self.directory, self.redo, self.plan = Path(directory), redo, dict(plan)
        self.settings = {name: settings_of(name, plan, arguments) for name in plan}
        self.made: dict[str, dict[str, Any]] = {}
        self.renewed: set[str] = set()
        marker = self.directory / MARKER
        if self.directory.exists() and any(self.directory.iterdir()):
            if not marker.exists():
                raise MoefyError(
                    f"{directory} exists and is not the output of a moefy recipe: choose another output_dir"
                )
            made = json.loads(marker.read_text())
            self.made = {name: entry for name, entry in made.items() if (self.directory / name).exists()}
            if redo:  # what others were made from is replaced
                self.made = {name: entry for name, entry in self.made.items() if name in plan}
            else:
                self.check()

    def add(self, name: str, stage: Stage, arguments: Arguments) -> None:
        """Plan one more stage, with arguments of its own.

        Raises:
            MoefyError: there is a result of other settings.
        """
        self.plan[name] = stage
        self.settings[name] = settings_of(name, self.plan, arguments)
        if not self.redo:
            self.check()

    def check(self) -> None:
        """Compare what the planned stages read now with what they read when they were made."""
        changed: set[str] = set()
        for name, settings in self.settings.items():
            if name in self.made and self.made[name]["hash"] != hash_of(settings):
                changed |= set(differing(self.made[name]["settings"], settings))
        if changed:
            raise MoefyError(
                f"{self.directory} holds results of other settings ({', '.join(sorted(changed))} changed): "
                "choose another output_dir, or pass --redo true to replace them"
            )

    def begin(self) -> None:
        """Make the directory and its marker: one process' work, once nothing can be found wrong any more."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / MARKER, self.made)

    def finished(self, name: str) -> bool:
        """Say whether a stage can be skipped, and print it."""
        done = name in self.made and (self.directory / name).exists() and (not self.redo or name in self.renewed)
        if done:
            print(f"{name}: done before, skipped (pass --redo true to run it again)", flush=True)
        return done

    def run(self, name: str, make: Callable[[Path], None]) -> Path:
        """Let `make` write to a temporary sibling of `name`, then rename it; nothing is done where `name` is there."""
        path, settings = self.directory / name, self.settings[name]
        if self.finished(name):
            return path
        self.begin()
        temporary = self.directory / f".{name}.unfinished"
        _remove(temporary)
        make(temporary)
        self.made.pop(name, None)
        self.begin()  # a result without its settings in the marker does not count
        _remove(path)
        temporary.rename(path)
        self.made[name] = {"hash": hash_of(settings), "settings": settings}
        self.renewed.add(name)
        self.begin()
        return path


def settings_of(name: str, plan: Plan, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Return what a stage and those before it read: the name of a dataclass -> its fields, as JSON can hold them."""
    found: dict[str, dict[str, Any]] = {}
    for earlier in plan[name].after:
        found |= settings_of(earlier, plan, arguments)
    for cls in plan[name].reads:
        found[cls.__name__] = as_json(arguments[cls])
    if plan[name].measuring and TrainingArguments.__name__ not in found:
        every = as_json(arguments[TrainingArguments])
        found["measuring"] = {key: every[key] for key in MEASURING}
    return found


def as_json(part: Any) -> dict[str, Any]:
    """Return a dataclass' fields, without those that change no result."""
    if not isinstance(part, TrainingArguments):
        return json.loads(json.dumps(asdict(part)))
    every = json.loads(part.to_json_string()) | {"mixed_precision": part.mixed_precision}
    return {name: value for name, value in every.items() if not name.startswith(REPORTING)}


def hash_of(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differing(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Name the fields in which two stages' settings differ."""
    for part in {*old, *new}:
        before, now = old.get(part, {}), new.get(part, {})
        yield from (key for key in {*before, *now} if before.get(key) != now.get(key))


def read_made(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the finished results of a run: name -> its settings, by the names of fields alone."""
    marker = directory / MARKER
    made = json.loads(marker.read_text()) if marker.exists() else {}
    return {
        name: {key: value for part in entry["settings"].values() for key, value in part.items()}
        for name, entry in made.items()
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, facts: Any) -> None:
    """Write facts under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.rename(path)
