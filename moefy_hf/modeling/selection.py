"""Selections: from router scores to the experts that run, one class per method; `SELECTIONS` is their registry."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


class Selection(Protocol):
    """scores (..., E) of the routed experts -> their ids (..., K) and which of these slots are used (..., K); K is
    static.

    Attributes:
        k: how many a token computes, on average where that depends on the token; None where nobody has measured it.
    """

    @property
    def k(self) -> float | None: ...

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def keeps_all(self, num_experts: int) -> bool: ...


@dataclass(frozen=True)
class TopK:
    """The k best experts of each token (MoEfication, section 3.3)."""

    k: int
    dynamic: ClassVar[bool] = False

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = scores.topk(self.k, dim=-1, sorted=False).indices
        return index, torch.ones_like(index, dtype=torch.bool)

    def keeps_all(self, num_experts: int) -> bool:
        return self.k >= num_experts


@dataclass(frozen=True)
class Dynamic:
    """As many experts as a token needs: those that the setting reaches. The larger the setting, the more.

    What comes in are the router's strengths, (..., E) and not negative.
    """

    setting: float
    k: float | None = None
    dynamic: ClassVar[bool] = True
    name: ClassVar[str]  # of the setting
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0

    @classmethod
    def needs(cls, strengths: torch.Tensor) -> torch.Tensor:
        """(..., E) -> (..., E): the least setting with which each expert runs."""
        raise TypeError(f"{cls.__name__} defines no needs")

    def __call__(self, strengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(strengths.shape[-1], device=strengths.device).expand(strengths.shape)
        return index, self.needs(strengths.float()) <= self.setting  # sums and ratios of halves would be coarse

    def keeps_all(self, num_experts: int) -> bool:
        return self.k is not None and self.k >= num_experts

    @classmethod
    def checked(cls, setting: float) -> float:
        """
        Raises:
            ValueError: no number, or out of range.
        """
        number = isinstance(setting, int | float) and not isinstance(setting, bool)
        if not number or not math.isfinite(setting) or not cls.lowest <= setting <= cls.highest:
            valid = f"number from {cls.lowest:g} to {cls.highest:g}" if cls.highest < math.inf else "finite number"
            raise ValueError(f"{cls.name} must be a {valid}, got {setting!r}")
        return float(setting)


class Threshold(Dynamic):
    """Experts at least (1 - tau) times as strong as the token's strongest (D2DMoE, section 3.3)."""

    name = "tau"

    @classmethod
    def needs(cls, strengths: torch.Tensor) -> torch.Tensor:
        return 1 - strengths / strengths.amax(-1, keepdim=True).clamp_min(1e-30)


class TopP(Dynamic):
    """The strongest experts until together they have the share p of the token's strength ("Harder Tasks Need More
    Experts", section 3.2)."""

    name = "p"

    @classmethod
    def needs(cls, strengths: torch.Tensor) -> torch.Tensor:
        best = strengths.sort(-1, descending=True)
        total = best.values.sum(-1, keepdim=True)
        before = best.values.cumsum(-1) - best.values  # what stronger experts have
        shares = (1 - (total - before) / total.clamp_min(1e-30)).clamp(0, 1)  # all of it where there is none
        return torch.zeros_like(shares).scatter(-1, best.indices, shares)


class Level(Dynamic):
    """Experts of at least the strength exp(-level), the same for all tokens: one whose experts are all weaker computes
    none and skips its FFN."""

    name = "level"
    lowest, highest = -math.inf, math.inf

    @classmethod
    def needs(cls, strengths: torch.Tensor) -> torch.Tensor:
        return -strengths.clamp_min(1e-30).log()


SELECTIONS: dict[str, type[TopK] | type[Dynamic]] = {
    "top_k": TopK,
    "threshold": Threshold,
    "top_p": TopP,
    "level": Level,
}
