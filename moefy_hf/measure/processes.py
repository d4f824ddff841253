"""Several processes that share the work: each does a part, and what they find is exchanged."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import MoefyError

T = TypeVar("T")
LONGEST = timedelta(days=1)  # that a process waits for another, which may be fitting a layer


@dataclass(frozen=True)
class Processes:
    """This process among those that share its work. All of them call the same methods, in the same order.

    Attributes:
        rank: which of them it is, from 0.
        size: how many there are. A process alone exchanges nothing.
        group: of `torch.distributed`, for tensors in the CPU's memory.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Return whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Yield this process' part of things that all of them have: every `size`-th."""
        return islice(items, self.rank, None, self.size)

    def gathered(self, find: Callable[[], T]) -> list[T]:
        """Return what each process finds, in the order of their ranks.

        Raises:
            MoefyError: what `find` raised in any of the processes; another kind of error only where it was raised.
        """
        if self.size == 1:
            return [find()]
        mine: T | None = None
        error: Exception | None = None
        try:
            mine = find()
        except Exception as raised:  # the others wait: they must hear of it
            error = raised
        told = error if error is None or isinstance(error, MoefyError) else f"{type(error).__name__}: {error}"
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (mine, told), group=self.group)
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise problem if isinstance(problem, MoefyError) else MoefyError(f"process {rank} failed: {problem}")
        return [found for found, _ in outcomes]

    def added(self, find: Callable[[], Sequence[Any]]) -> list[Any]:
        """Return the sums, over processes, of each of the things that they find.

        Args:
            find: returns as many in each process; they have a `+`.

        Raises:
            MoefyError: as `gathered`.
        """
        columns = zip(*self.gathered(find), strict=True)
        return [functools.reduce(operator.add, column) for column in columns]

    def by_first(self, do: Callable[[], T]) -> T:
        """Let the first process do something while the others wait; return in all of them what it returns.

        Raises:
            MoefyError: as `gathered`.
        """
        return self.gathered(lambda: do() if self.first else None)[0]  # type: ignore[return-value]

    def give_(self, rows: torch.Tensor, owner: int) -> None:
        """Give every process the rows (t, d) of one of them, in place.

        Args:
            rows: contiguous, in the CPU's memory, and of the same shape and type in all processes.
            owner: the rank of the process that has them.
        """
        if self.size > 1 and rows.numel():
            dist.broadcast(rows.view(torch.uint8), src=owner, group=self.group)


ALONE = Processes()


def together() -> Processes:
    """Return the processes that `torch.distributed` connects: this one alone, where it is not initialised.

    All of them must call this.

    Example:
        >>> torch.distributed.init_process_group("gloo")
        >>> moefy_(model, config, batches, processes=together())
    """
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=LONGEST))
