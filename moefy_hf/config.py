"""`MoEficationConfig`: what a conversion is told to do; stored in the model's config.json under "moefication"."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .arguments import about, name_and_number, positive, share_or_count, switch
from .errors import MoefyError
from .modeling.budget_allocation import ALLOCATIONS, MEASURED
from .modeling.routers import ROUTERS, router_class
from .modeling.section import FORMAT_VERSION
from .modeling.selection import SELECTIONS
from .modeling.selection_config import check_selection, count_experts, resolve_selection, setting_name
from .splitters import SPLITTERS

AUTO = "auto"  # an allocation that depends on the model and on whether there is data


@dataclass(kw_only=True)
class MoEficationConfig:
    """Settings of a conversion; the same for Python, `moefy convert` and the recipes.

    Args:
        expert_size: neurons per expert (the paper uses 32); ignored where `num_experts` is given.
        num_experts: experts per FFN.
        splitter: how neurons are grouped, of `SPLITTERS`.
        router: what predicts the experts that a token needs, of `ROUTERS`.
        router_settings: what the router is made with, instead of its defaults: `{"rank": 64}` of "low_rank",
            `{"hidden": 128}` of "norm_regression", `{"inputs": 0.4}` (share of the FFN's inputs that it reads) of
            "partial_input".
        k: experts that a token computes: a share of them (float), a count (int), or a list with one of these per
            layer. Dynamic selections compute k on average. Ignored where `threshold` is given.
        selection: of `SELECTIONS`: "top_k", or "threshold", "top_p" and "level", which compute as many experts as a
            token needs. Also the whole selection as `config.json` holds it: `{"type": "top_k", "k": 0.2}`.
        threshold: of a dynamic selection, instead of a budget k: its `tau`, `p` or `level`; one, or a list.
        allocation: how the layers share the budget k: "uniform" gives each the same, "sensitivity" more to those whose
            experts the predictions depend on, "angular" to those that turn the hidden states further (CFSP), "global"
            is one threshold for all layers. "auto" is by sensitivity where there is data and a head, else uniform.
        shared_experts: how many experts run for every token; `k` counts them. They are made of the neurons that most
            tokens need (CMoE); the splitter groups the others.
        compensation: let an expert that does not run contribute what it does on average when it does not.
        towers: which parts of a composite model are converted: "text", "vision", "audio" or another that it has, a
            list of them, or "all"; by default its text model, or all where it has none.
        layers: positions of the FFNs to convert, in the order of these towers' modules; all by default.
        calibration_tokens: at most so many tokens of the calibration data are used.
        seed: of splits and router fitting.

    Raises:
        MoefyError: an unknown name (the valid ones are listed) or a number out of range.

    Example:
        >>> MoEficationConfig(expert_size=16, k=0.25, allocation="uniform")
    """

    expert_size: int | None = field(default=32, metadata=about("neurons per expert", int))
    num_experts: int | None = field(default=None, metadata=about("experts per FFN, instead of a size", int))
    splitter: str = field(
        default="coactivation", metadata=about(f"how neurons are grouped: {', '.join(SPLITTERS)}", str)
    )
    router: str = field(
        default="linear", metadata=about(f"what predicts a token's experts: {', '.join(ROUTERS)}", str)
    )
    router_settings: dict[str, Any] = field(
        default_factory=dict,
        metadata=about(
            "of the router: rank of low_rank, hidden of norm_regression, inputs of partial_input",
            name_and_number,
            nargs="+",
            metavar="NAME=NUMBER",
        ),
    )
    k: int | float | list = field(
        default=0.2, metadata=about("share (0.2) or number (4) of experts that a token computes", share_or_count)
    )
    selection: str | Mapping[str, Any] = field(
        default="top_k", metadata=about(f"which experts run: {', '.join(SELECTIONS)}", str)
    )
    threshold: float | list[float] | None = field(
        default=None, metadata=about("of a dynamic selection, instead of k: its tau, p or level", float)
    )
    allocation: str = field(
        default=AUTO,
        metadata=about(
            f"how layers share the budget k: {', '.join(ALLOCATIONS)}; auto is sensitivity, where there are data and "
            "a head, else uniform",
            str,
        ),
    )
    shared_experts: int = field(default=0, metadata=about("experts that run for every token; k counts them", int))
    compensation: bool = field(
        default=False,
        metadata=about("let experts that do not run contribute what they do on average when they do not", switch),
    )
    towers: str | list[str] | None = field(
        default=None,
        metadata=about(
            "parts of a composite model to convert: text (the default), vision, audio, all", str, nargs="+"
        ),
    )
    layers: list[int] | None = field(
        default=None, metadata=about("positions of the FFNs to convert; all by default", int, nargs="+")
    )
    calibration_tokens: int = field(
        default=50_000, metadata=about("use at most so many tokens of the calibration data", positive)
    )
    seed: int = field(default=0, metadata=about("of splits and router fitting", int))

    def __post_init__(self):
        if self.num_experts is not None:
            self.expert_size = None
        elif self.expert_size is None:
            raise MoefyError("give num_experts or expert_size")
        if self.splitter not in SPLITTERS:
            raise MoefyError(f"unknown splitter {self.splitter!r}; choose from {', '.join(SPLITTERS)}")
        self.router_settings = dict(self.router_settings)
        router_class(self.router, self.router_settings)
        if not isinstance(self.calibration_tokens, int) or self.calibration_tokens < 1:
            raise MoefyError(f"calibration_tokens must be a positive integer, got {self.calibration_tokens!r}")
        shared = self.shared_experts
        if not isinstance(shared, int) or isinstance(shared, bool) or shared < 0:
            raise MoefyError(f"shared_experts must be a number of experts, 0 or more, got {shared!r}")
        if isinstance(self.selection, Mapping):
            self._take(self.selection)
        selection = self.selection_section()
        check_selection(selection)
        if self.threshold is None:
            ks: Sequence[Any] = self.k if isinstance(self.k, list | tuple) and self.k else [self.k]
            for k in ks:
                count_experts(k, 2**31)  # finds bad shares, whatever the model, and an empty list
        elif not isinstance(self.threshold, list | tuple):
            resolve_selection(selection, [1])

    def _take(self, selection: Mapping[str, Any]) -> None:
        """Set the four fields from a selection as `config.json` holds it."""
        check_selection(selection)
        name = setting_name(selection["type"])
        self.selection, self.allocation = selection["type"], selection.get("allocation", AUTO)
        self.threshold = selection.get(name) if name else None
        self.k = selection.get("k") if self.threshold is None else 0.2  # type: ignore[assignment]  # None is refused

    def selection_section(self) -> dict[str, Any]:
        """Return the selection as `config.json` and `set_selection` have it, without an allocation that is "auto"."""
        if self.threshold is not None:
            name = setting_name(self.selection)
            if name is None:
                valid = ", ".join(kind for kind in SELECTIONS if setting_name(kind))
                raise MoefyError(f"threshold {self.threshold!r} is for selections {valid}, not {self.selection!r}")
            chosen = {"type": self.selection, name: self.threshold}
        else:
            chosen = {"type": self.selection, "k": self.k}
        return chosen if self.allocation == AUTO else {**chosen, "allocation": self.allocation}

    def section(self) -> dict[str, Any]:
        """Return the `moefication` section of a config.json."""
        flat = {name: value for name, value in asdict(self).items() if name not in ("k", "threshold", "allocation")}
        return copy.deepcopy({"format_version": FORMAT_VERSION, **flat, "selection": self.selection_section()})

    def needs(self) -> list[str]:
        """Name what of this conversion learns from calibration data; empty where none is needed."""
        uses = {
            f"splitter {self.splitter!r}": SPLITTERS[self.splitter].needs_profile,
            f"router {self.router!r}": ROUTERS[self.router].trainable,
            f'allocation "{self.allocation}"': self.allocation in MEASURED,
            f"selection {self.selection!r} with a budget k": (
                setting_name(self.selection) is not None and self.threshold is None
            ),
            "shared_experts": self.shared_experts > 0,
            "compensation": self.compensation,
        }
        return [what for what, learns in uses.items() if learns]


def overrule(settings: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return settings without those that others overrule which were given later: sizes by sizes, budgets by budgets.

    Args:
        settings: of a file and, over them, of a command line.
        given: names that the command line has.
    """
    pairs = (("num_experts", "expert_size"), ("threshold", "k"))
    gone = {loser for loser, winner in pairs if winner in given and loser not in given}
    return {name: value for name, value in settings.items() if name not in gone}


SETTINGS = tuple(each.name for each in fields(MoEficationConfig))
