"""Selections: from router scores to the experts that run, one class per method; `SELECTIONS` is their registry."""

import math
from dataclasses import astuple, dataclass
from typing import ClassVar, Protocol

import torch

from .errors import MoefyError


class Selection(Protocol):
    """scores (..., E) of the routed experts -> their ids (..., K) and which of these slots are used (..., K); K is
    static.

    A method is one class and one line of `SELECTIONS`; whatever else has to be known of it is a class attribute.

    Attributes:
        k: how many a token computes, on average where that depends on the token; None where nobody has measured it.
        dynamic: whether that depends on the token. Dynamic selections take routing weights instead of scores.
        exportable: whether served MoEs select so.
        paper: where the method is from; empty for this package's own.
        kernel_name: what the C++ kernel calls the method; None where it does not know it. Not inherited.
    """

    dynamic: ClassVar[bool]
    exportable: ClassVar[bool]
    paper: ClassVar[str]
    kernel_name: ClassVar[str | None]

    @property
    def k(self) -> float | None: ...

    def __call__(self, scores: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]: ...

    def keeps_all(self, num_experts: int) -> bool: ...


@dataclass(frozen=True)
class TopK:
    """The k best experts of each token (MoEfication, section 3.3)."""

    k: int
    dynamic: ClassVar[bool] = False
    exportable: ClassVar[bool] = True
    paper: ClassVar[str] = "MoEfication, section 3.3"
    kernel_name: ClassVar[str | None] = "top_k"

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = scores.topk(self.k, dim=-1, sorted=False).indices
        return index, torch.ones_like(index, dtype=torch.bool)

    def keeps_all(self, num_experts: int) -> bool:
        return self.k >= num_experts


@dataclass(frozen=True)
class Dynamic:
    """As many experts as a token needs: those that a threshold reaches. The larger the threshold, the more.

    What comes in are routing weights: the router's `strengths`, (..., E) and not negative.

    Attributes:
        threshold: from `lowest` to `highest`.
        name: what the threshold is called in configs and in `set_selection`.
    """

    threshold: float
    k: float | None = None
    dynamic: ClassVar[bool] = True
    exportable: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    kernel_name: ClassVar[str | None] = None
    name: ClassVar[str]
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0

    @classmethod
    def needs(cls, weights: torch.Tensor) -> torch.Tensor:
        """(..., E) -> (..., E): the least threshold with which each expert runs."""
        raise TypeError(f"{cls.__name__} defines no needs")

    def __call__(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.arange(weights.shape[-1], device=weights.device).expand(weights.shape)
        return index, self.needs(weights.float()) <= self.threshold  # sums and ratios of halves would be coarse

    def keeps_all(self, num_experts: int) -> bool:
        return self.k is not None and self.k >= num_experts

    @classmethod
    def checked(cls, threshold: float) -> float:
        """Return a threshold as a float.

        Raises:
            MoefyError: it is no number, or out of range.
        """
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not math.isfinite(threshold) or not cls.lowest <= threshold <= cls.highest:
            valid = f"number from {cls.lowest:g} to {cls.highest:g}" if cls.highest < math.inf else "finite number"
            raise MoefyError(f"{cls.name} must be a {valid}, got {threshold!r}")
        return float(threshold)


class Threshold(Dynamic):
    """Experts whose routing weight is at least (1 - tau) times the token's largest (D2DMoE, section 3.3)."""

    paper = "D2DMoE, section 3.3"
    kernel_name = "threshold"
    name = "tau"

    @classmethod
    def needs(cls, weights: torch.Tensor) -> torch.Tensor:
        return 1 - weights / weights.amax(-1, keepdim=True).clamp_min(1e-30)


class TopP(Dynamic):
    """The experts of the largest routing weights until together they have the share p of the token's sum ("Harder
    Tasks Need More Experts", section 3.2)."""

    paper = "Harder Tasks Need More Experts, section 3.2"
    kernel_name = "top_p"
    name = "p"

    @classmethod
    def needs(cls, weights: torch.Tensor) -> torch.Tensor:
        best = weights.sort(-1, descending=True)
        total = best.values.sum(-1, keepdim=True)
        before = best.values.cumsum(-1) - best.values  # what stronger experts have
        shares = (1 - (total - before) / total.clamp_min(1e-30)).clamp(0, 1)  # all of it where there is none
        return torch.zeros_like(shares).scatter(-1, best.indices, shares)


class Level(Dynamic):
    """Experts whose routing weight is at least exp(-level), the same for all tokens: a token without any skips its
    FFN."""

    kernel_name = "level"
    name = "level"
    lowest, highest = -math.inf, math.inf

    @classmethod
    def needs(cls, weights: torch.Tensor) -> torch.Tensor:
        return -weights.clamp_min(1e-30).log()


SELECTIONS: dict[str, type[TopK] | type[Dynamic]] = {
    "top_k": TopK,
    "threshold": Threshold,
    "top_p": TopP,
    "level": Level,
}


def selection_facts(selection: Selection) -> type[TopK] | type[Dynamic]:
    """Return the class that says what is known of a selection's method: its own, or the one of the same name here, as
    `router_facts` does."""
    if isinstance(selection, TopK | Dynamic):
        return type(selection)
    return next(cls for cls in SELECTIONS.values() if cls.__name__ == type(selection).__name__)


def kernel_name_of(selection: Selection) -> str | None:
    """Return what the C++ kernel calls a selection; None where it does not know it, as a subclass of one it knows."""
    return vars(selection_facts(selection)).get("kernel_name")


def threshold_of(selection: Selection) -> float:
    """Return the threshold of a dynamic selection: its first field, which has another name in the code of older
    checkpoints."""
    return astuple(selection)[0]  # type: ignore[call-overload]
