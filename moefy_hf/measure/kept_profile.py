"""A profile that is kept in a folder while it is made: one that was interrupted goes on from there."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import CalibrationError
from ..io import written_file

if TYPE_CHECKING:
    from .profile import ModelProfile

ANEW = "delete its folder to start anew"
SUMS = ("active", "mass", "total", "square")


class Folder:
    """A folder that outlives the profile, in the place of a temporary one."""

    def __init__(self, name: Path):
        name.mkdir(parents=True, exist_ok=True)
        self.name = str(name)

    def cleanup(self) -> None:
        """Leave everything where it is."""


class Progress:
    """How far a profile has come.

    Args:
        profile: gets the sums of a profile that was interrupted, and its sample, cut to what those sums are of.
        of: what is profiled, and how much of it, as JSON can say it.
        sample: whether it has one.
        folder: where both are kept; None where they are not.

    Raises:
        CalibrationError: the folder has a profile of something else.
    """

    def __init__(self, profile: "ModelProfile", of: Mapping[str, Any], sample: bool, folder: str | Path | None):
        self.profile, self.of, sites = profile, dict(of), len(profile.sites)
        if sample:
            profile.directory = Folder(Path(folder)) if folder else TemporaryDirectory(prefix="moefy_profile_")
        self.files = [profile.file(f"{position}.bin") for position in range(sites)] if profile.directory else []
        self.path = Path(folder, "profile.safetensors") if folder else None
        self.digests: list[str] = []  # of the batches that were run
        self.kept = 0  # of these, how many a profile keeps
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as state:
            facts = json.loads(state.metadata()["facts"])
            if facts["of"] != self.of:
                raise CalibrationError(f"{path} is of another model or number of tokens: {ANEW}")
            for position, stats in enumerate(self.profile.sites):
                stats.tokens = facts["tokens"][position]
                for name in SUMS:
                    setattr(stats, name, state.get_tensor(f"{position}.{name}"))
        self.digests, self.kept = facts["digests"], facts["kept"]
        for file, (rows, width, dtype) in zip(self.files, facts["files"], strict=True):
            file.cut_to(rows, width, getattr(torch, dtype))

    def new(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield the batches that were not run yet; give the profile those of the others that it keeps.

        Raises:
            CalibrationError: other batches were run before.
        """
        known = list(self.digests)
        for number, batch in enumerate(batches):
            if number >= len(known):
                yield batch
                continue
            if digest(batch) != known[number]:
                raise CalibrationError(f"{self.path} is of other calibration data, or in another order: {ANEW}")
            if number < self.kept:
                self.profile.batches.append(batch)
            if self.profile.tokens >= self.of["max_tokens"] and number + 1 >= self.kept:
                return

    def save(self, batch: Mapping[str, Any]) -> None:
        """Keep what the profile is after one more batch."""
        if self.path is None:
            return
        self.digests.append(digest(batch))
        self.kept = len(self.profile.batches)
        sites = self.profile.sites
        sums = {f"{i}.{name}": getattr(stats, name) for i, stats in enumerate(sites) for name in SUMS}
        files = [(file.rows, file.width, str(file.dtype).removeprefix("torch.")) for file in self.files]
        facts: dict[str, Any] = {"of": self.of, "digests": self.digests, "kept": self.kept, "files": files}
        facts["tokens"] = [stats.tokens for stats in sites]
        with written_file(self.path) as temporary:
            save_file(sums, temporary, metadata={"facts": json.dumps(facts)})

    def map_sample(self) -> None:
        """Give the profile its sample."""
        for stats, file in zip(self.profile.sites, self.files, strict=False):  # no file where nothing is kept
            if file.rows:
                stats.inputs = file


def digest(batch: Mapping[str, Any]) -> str:
    """Return a number that tells one batch from another."""
    found = hashlib.sha256()
    for key, value in sorted(batch.items()):
        found.update(key.encode())
        if torch.is_tensor(value):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
