"""What every benchmark is told; wrong values are refused before any work."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from moefy_ffn import BuildError
from moefy_ffn.build import library

from ..config import MoEficationConfig
from ..errors import MoefyError
from ..modeling.routers import ROUTERS
from .presets import PRESETS

NAMES = ("masked", "torch", "cpu")  # implementations that run on the CPU, which dense is compared with
WHOLE = (*NAMES, "auto")  # for whole models
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of an output's length, per token
CHECKED = 32  # tokens of a call, at most
SHARE, EXPERT_SIZE, ROUTER = 0.2, 32, "random"  # of a preset; a checkpoint has its own
BENCH_ROUTERS = [name for name, router in ROUTERS.items() if router.kernel_weights]


@dataclass(frozen=True)
class Settings:
    """What is timed, and how long.

    Args:
        preset: an architecture whose weights are random, or
        checkpoint: a MoEfied one, whose own weights, experts and budgets are timed.
        share: of the experts that are computed.
        expert_size: neurons of a preset's experts.
        router: a preset's, one that the C++ kernel runs; its weights are random, whichever it is.
        dtype: of weights and inputs, one of `DTYPES`.
        threads: of the CPU.
        rounds: at most so many timings of each method, and
        seconds: no further ones after so many seconds of timing, but five.
        implementations: that are timed beside dense, of `WHOLE`.

    Raises:
        MoefyError: an unknown name, a number out of range, or what needs the C++ kernel without a compiler.
    """

    preset: str | None = None
    checkpoint: str | None = None
    share: float | None = None
    expert_size: int | None = None
    router: str | None = None
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 40
    seconds: float = 20
    implementations: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.checkpoint is None):
            raise MoefyError(f"give a preset ({', '.join(PRESETS)}) or a MoEfied checkpoint")
        if self.checkpoint is not None and (self.expert_size is not None or self.router is not None):
            raise MoefyError(f"expert sizes and routers are for presets: {self.checkpoint} has its own")
        known: dict[str, tuple[Iterable[str | None], Collection[str]]] = {
            "preset": ([self.preset], PRESETS),
            "router": ([self.router], BENCH_ROUTERS),
            "dtype": ([self.dtype], DTYPES),
            "implementation": (self.implementations, WHOLE),
        }
        for what, (names, registry) in known.items():
            for name in names:
                if name is not None and name not in registry:
                    raise MoefyError(f"unknown {what} {name!r}; choose from {', '.join(registry)}")
        if self.share is not None and not 0 < self.share <= 1:
            raise MoefyError(f"the share of experts (--k) must lie in (0, 1], got {self.share}")
        for name in ("threads", "rounds", "seconds"):
            if vars(self)[name] <= 0:
                raise MoefyError(f"{name} must be positive, got {vars(self)[name]}")
        if "cpu" in self.implementations:
            try:
                library()
            except BuildError as error:
                raise MoefyError(f"the kernel of implementation 'cpu' cannot be made here: {error}") from error

    @property
    def source(self) -> str:
        """Return the name of the preset, or of the checkpoint."""
        return self.preset or str(self.checkpoint)

    def moefication(self) -> MoEficationConfig:
        """Return how a preset is converted: with a split and a router that learn nothing."""
        k = float(self.share or SHARE)
        size = EXPERT_SIZE if self.expert_size is None else self.expert_size
        router = self.router or ROUTER
        return MoEficationConfig(expert_size=size, splitter="random", router=router, k=k, allocation="uniform")

    def to_dict(self) -> dict[str, Any]:
        """Return what the rows depend on, for the record."""
        settings = {name: value for name, value in vars(self).items() if name not in ("implementations", "seconds")}
        if self.preset:
            settings |= {"share": self.share or SHARE, "expert_size": self.moefication().expert_size}
            settings |= {"router": self.moefication().router}
        return settings
