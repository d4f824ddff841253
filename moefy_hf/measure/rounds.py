"""Batches that processes run in rounds, one in each, so that the same tokens count as where one process runs all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from .kept_profile import SUMS
from .processes import Processes
from .sample import TensorFile

if TYPE_CHECKING:
    from .profile import ModelProfile

KEPT_TOKENS = 4096  # of the batches that a profile keeps as they are
Batch = Mapping[str, Any]


class Rounds:
    """Adds what FFNs do on batches to a profile.

    While batches run, a process has the sums and the sample of its own batches only; how many tokens count, all know.

    Args:
        profile: what is added to.
        files: get the sample of each FFN; empty where none is kept.
        max_tokens: of an FFN that count.
        processes: that take turns with the batches, of which all have all.
    """

    def __init__(self, profile: "ModelProfile", files: list[TensorFile], max_tokens: int, processes: Processes):
        self.profile, self.files, self.max_tokens, self.processes = profile, files, max_tokens, processes
        self.parts = [stats.empty() for stats in profile.sites]  # of the batch that runs now
        self.limits = [0 for _ in profile.sites]
        self.counts: list[Sequence[int]] = []  # of each batch, the tokens of each FFN that count

    def see(self, position: int, x: torch.Tensor, neurons: torch.Tensor) -> int:
        """Add what an FFN reads (T, d) and computes (T, f) in this batch; return how many of the tokens count."""
        part = self.parts[position]
        x, neurons = (each[: self.limits[position] - part.tokens] for each in (x, neurons))
        if self.files and len(x):
            self.files[position].append(x)
        part.update_(neurons)
        return len(x)

    def run(self, batches: Iterator[Batch], run: Callable[[Batch], None]) -> Iterator[Batch]:
        """Run batches until enough tokens were seen; yield each that counts, when what it adds was added.

        Args:
            run: runs one of them, and shows its FFNs to `see`.

        Raises:
            MoefyError: what a batch raises, in all processes.
        """
        size, rank, sites = self.processes.size, self.processes.rank, self.profile.sites
        while True:
            now: list[Batch] = []
            marks = [file.rows for file in self.files]

            def find(now: list[Batch] = now) -> Sequence[int] | None:
                now += islice(batches, size)
                limits = [self.max_tokens - stats.tokens for stats in sites]
                return self.seen_in(now[rank], limits, run) if rank < len(now) else None

            seen = self.processes.gathered(find)
            taken = self.counted([counts for counts in seen if counts is not None])
            mine = taken[rank] if rank < len(taken) else [0 for _ in sites]
            if seen[rank] not in (None, mine):  # fewer of them count: those of batches before this one do first
                self.drop(marks)
                if any(mine):
                    self.seen_in(now[rank], mine, run)
            for stats, part in zip(sites, self.parts, strict=True):
                stats.add_(part)
            self.parts = [stats.empty() for stats in sites]
            for batch, counts in zip(now, taken, strict=False):
                if self.profile.tokens < KEPT_TOKENS:
                    self.profile.batches.append(batch)
                for stats, tokens in zip(sites, counts, strict=True):
                    stats.tokens += tokens
                yield batch
            self.counts += taken
            if not taken or self.profile.tokens >= self.max_tokens:
                return

    def seen_in(self, batch: Batch, limits: Sequence[int], run: Callable[[Batch], None]) -> list[int]:
        """Run a batch, and return how many tokens of it each FFN saw, up to the limits."""
        self.parts, self.limits = [stats.empty() for stats in self.profile.sites], list(limits)
        run(batch)
        return [part.tokens for part in self.parts]

    def counted(self, seen: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return how many tokens count of each batch of a round, per FFN; of batches behind the last that counts,
        nothing.

        Args:
            seen: of each batch, the tokens that each FFN saw.
        """
        tokens, taken = [stats.tokens for stats in self.profile.sites], list[Sequence[int]]()
        for counts in seen:
            taken.append([min(each, self.max_tokens - before) for each, before in zip(counts, tokens, strict=True)])
            tokens = [before + each for before, each in zip(tokens, taken[-1], strict=True)]
            if max(tokens) >= self.max_tokens:
                break
        return taken

    def drop(self, marks: Sequence[int]) -> None:
        """Forget what was seen of the batch that was run; the sample is as long as it was before."""
        self.parts = [stats.empty() for stats in self.profile.sites]
        for file, rows in zip(self.files, marks, strict=True):
            if file.rows > rows:
                file.cut_to(rows, file.width, file.dtype)

    def join_(self) -> None:
        """Give every process the sums and the sample of all batches; the rows of a sample in their order."""
        if self.processes.size == 1:
            return
        sites = self.profile.sites
        sums = self.processes.added(lambda: [torch.stack([getattr(each, name) for name in SUMS]) for each in sites])
        for stats, rows in zip(sites, sums, strict=True):
            for name, row in zip(SUMS, rows, strict=True):
                setattr(stats, name, row.clone())
        kinds = self.processes.gathered(
            lambda: [(each.width, each.dtype) if each.rows else None for each in self.files]
        )
        for position, of_processes in enumerate(zip(*kinds, strict=True)):
            if (kind := next(filter(None, of_processes), None)) is not None:
                self.join_sample_(position, *kind)

    def join_sample_(self, position: int, width: int, dtype: torch.dtype) -> None:
        """Give every process all rows of one FFN's sample, batch by batch, in a file that replaces its own."""
        own, whole = self.files[position], self.profile.file(f"{position}.all.bin")
        held = own.mapped() if own.rows else torch.empty(0, width, dtype=dtype)
        for number, counts in enumerate(self.counts):
            count, owner = counts[position], number % self.processes.size
            rows = held[:count] if owner == self.processes.rank else torch.empty(count, width, dtype=dtype)
            held = held[len(rows) :] if owner == self.processes.rank else held
            self.processes.give_(rows, owner)
            if count:
                whole.append(rows)
        self.files[position] = whole
        own.path.unlink(missing_ok=True)
