"""Named steps of a run, each finished once."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

MARKER = "moefy_run.json"


class Stages:
    """Named steps of a run, each leaving one file or folder in the output directory; finished ones are not run again.

    A marker file holds the settings that each result was made with, and says that the directory is ours.

    Args:
        settings: what decides the results, as JSON can hold it.
        redo: make every result anew, once.
        unused: pattern of stage names -> settings that such stages do not depend on.
        ignored: stages that this run neither makes nor reads; whatever they were made with, they are left alone.

    Raises:
        ValueError: the directory holds something else, or results of other settings.
    """

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        redo: bool = False,
        unused: Mapping[str, Collection[str]] | None = None,
        ignored: Collection[str] = (),
    ):
        self.directory, self.redo, self.settings, self.unused = Path(directory), redo, settings, unused or {}
        self.made: dict[str, dict[str, Any]] = {}
        self.renewed: set[str] = set()
        marker = self.directory / MARKER
        if self.directory.exists() and any(self.directory.iterdir()):
            if not marker.exists():
                raise ValueError(
                    f"{directory} exists and is not the output of a moefy recipe: choose another output_dir"
                )
            made = json.loads(marker.read_text())
            self.made = {name: old for name, old in made.items() if (self.directory / name).exists()}
            asked = {name: old for name, old in self.made.items() if name not in ignored}
            if redo:  # what others were made from is replaced
                self.made = asked
            changed = sorted({key for name, old in asked.items() for key in self.changed(name, old)})
            if changed and not redo:
                raise ValueError(
                    f"{directory} holds results of other settings ({', '.join(changed)} changed): "
                    "choose another output_dir, or pass --redo true to replace them"
                )

    def changed(self, name: str, old: Mapping[str, Any]) -> set[str]:
        """The settings that decide a stage's result and were others when it was made."""
        return differing(old, self.settings, unused_by(name, self.unused))

    def begin(self) -> None:
        """Make the directory and its marker: one process' work, once nothing can be found wrong any more."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / MARKER, self.made)

    def finished(self, name: str) -> bool:
        """Whether a stage can be skipped; says so."""
        done = name in self.made and (self.directory / name).exists() and (not self.redo or name in self.renewed)
        if done:
            print(f"{name}: done before, skipped (pass --redo true to run it again)", flush=True)
        return done

    def run(self, name: str, make: Callable[[Path], None]) -> Path:
        """Let `make` write to a temporary sibling of `name`, then rename it; nothing is done where `name` is there."""
        path = self.directory / name
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
        self.made[name] = dict(self.settings)
        self.renewed.add(name)
        self.begin()
        return path


def unused_by(name: str, unused: Mapping[str, Collection[str]]) -> Collection[str]:
    return next((settings for pattern, settings in unused.items() if fnmatch(name, pattern)), ())


def differing(old: Mapping[str, Any], new: Mapping[str, Any], unused: Collection[str]) -> set[str]:
    return {key for key in {*old, *new} - set(unused) if old.get(key) != new.get(key)}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, facts: Any) -> None:
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.rename(path)
