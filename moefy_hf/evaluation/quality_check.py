"""What a conversion costs in quality, before its result is written: measured on calibration data that nothing was
fitted on, against the dense model and experts drawn at random."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..conversion.budgets import MEASURES
from ..errors import MoefyError
from ..loading import MoefiedModel, check_moefied, routed
from ..measure.contexts import all_experts, evaluating, selecting
from ..measure.metrics import Quality, is_causal, predictions
from ..measure.router_inputs import run_alone
from ..modeling.section import Section
from .controls import routed_by

TOKENS = 2048  # positions that are compared
WARNING, DEGENERATE = 0.1, 1.0  # growth of the loss, or of the perplexity
AGREEMENT = 0.9  # without labels: less is warned of
FINE = 8  # neurons of the finest experts that are recommended
LARGER = (0.3, 0.5, 0.7, 0.9)  # shares of experts that are tried where the model's own is bad


@dataclass(frozen=True)
class QualityCheck:
    """How good a converted model is at its budget, on held-out data.

    Attributes:
        positions: how many were compared.
        kl, random_kl: divergence from the dense model's distributions, nats; with experts drawn at random beside it.
        uniform_kl: the same of a model that guesses uniformly.
        agreement: how often its best guess is the dense model's.
        loss, dense_loss: where there are labels.
        language: whether the loss is that of a language model, which perplexity says more of.
        enough: the smallest larger share of the experts that was tried and found good; None if none was.
        options: what to try, where quality is bad.
    """

    positions: int
    kl: float
    random_kl: float
    uniform_kl: float
    agreement: float
    loss: float | None = None
    dense_loss: float | None = None
    language: bool = False
    enough: float | None = None
    options: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float | None:
        """Return the growth of the loss, or of a language model's perplexity, over dense; None without labels."""
        if self.loss is None or not self.dense_loss:
            return None
        return (math.exp(self.loss - self.dense_loss) if self.language else self.loss / self.dense_loss) - 1

    @property
    def measure(self) -> str:
        """Return the name of what grows."""
        return "perplexity" if self.language else "loss"

    @property
    def bad(self) -> bool:
        """Return whether the loss or perplexity grows by more than 10 %; without labels, whether fewer than 90 % of
        best guesses agree."""
        return self.agreement < AGREEMENT if self.growth is None else self.growth > WARNING

    @property
    def degenerate(self) -> str | None:
        """Return why the model is of no use as it is, if so."""
        if not self.bad:
            return None
        if self.growth is not None and self.growth > DEGENERATE:
            return f"its {self.measure} grows by more than {DEGENERATE:.0%}"
        if self.kl >= self.uniform_kl:
            return "it is as far from the dense model as uniform guessing"
        if self.kl >= self.random_kl:
            return "experts drawn at random are as good as those its routers choose"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for a checkpoint's facts."""
        return asdict(self) | {"growth": self.growth, "bad": self.bad, "degenerate": self.degenerate}

    def line(self) -> str:
        """Return one line for people."""
        line = f"agreement with dense {self.agreement:.1%}, divergence {self.kl:.3g} nats (random experts"
        line += f" {self.random_kl:.3g}), on {self.positions:,} positions that nothing was fitted on"
        if self.growth is not None and self.loss is not None:
            value = math.exp(self.loss) if self.language else self.loss
            line = f"{self.measure} {value:.4g}, {self.growth:+.1%} on dense, {line}"
        return line

    def message(self) -> str:
        """Return what to do about bad quality, one line for each option; empty where quality is good."""
        if not self.bad:
            return ""
        lines = [f"this model is much worse than its dense self: {self.line()}"]
        if self.degenerate:
            lines[0] = f"this model is of no use as it is, {self.degenerate}: {self.line()}"
        return "\n".join([*lines, *(f"- try {option}" for option in self.options)])


@torch.no_grad()
def check_quality(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_positions: int = TOKENS,
    progress: bool = True,
) -> QualityCheck:
    """Measure a freshly converted model at the budget it has, on batches that it was not calibrated on.

    Where quality is bad, larger shares of its experts are measured, too. The model comes back as it was.

    Args:
        batches: model-ready batches, with labels if there are any.
        max_positions: no further batch is read after so many positions.

    Raises:
        MoefyError: the model is not MoEfied or has no head whose predictions could be compared, or `batches` are
            empty.

    Example:
        quality = check_quality(model, held_out_batches)
        print(quality.message() or quality.line())
    """
    model = check_moefied(model)
    seen: list[Mapping[str, Any]] = []
    dense, converted, chance, uniform = (Quality() for _ in range(4))
    bar = tqdm(total=max_positions, desc="quality", unit="position", unit_scale=True, disable=not progress)
    with evaluating(model):
        with bar:
            for batch in batches:
                expected, labels = dense_predictions(model, batch)
                dense.update_(expected, expected, labels)
                uniform.update_(torch.zeros_like(expected), expected, labels)
                converted.update_(predictions(model, batch)[0], expected, labels)
                with routed_by(model, "random"):
                    chance.update_(predictions(model, batch)[0], expected, labels)
                seen.append(batch)
                bar.update(dense.count - bar.n)
                if dense.count >= max_positions:
                    break
        if not dense.count:
            raise MoefyError("quality cannot be checked: no batch, or none with a position that counts, was given")
        check = check_of(dense, converted, chance, uniform, is_causal(model))
        if not check.bad:
            return check
        allocation = best_allocation(model)
        enough = enough_experts(model, seen, allocation, progress)
        return replace(check, enough=enough, options=options_of(model, enough, allocation))


def dense_predictions(model: MoefiedModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `predictions` does of the model's dense self."""
    with all_experts(model):
        return predictions(model, batch)


def check_of(dense: Quality, model: Quality, chance: Quality, uniform: Quality, language: bool) -> QualityCheck:
    """Return the check that these sums amount to.

    Args:
        dense, model, chance, uniform: of the dense model, of the converted one, with experts drawn at random, and of
            uniform guessing.
    """
    figures, labels = model.figures(), dense.labelled > 0
    return QualityCheck(
        positions=model.count,
        kl=figures["kl"],
        random_kl=chance.figures()["kl"],
        uniform_kl=uniform.figures()["kl"],
        agreement=figures["agreement"],
        loss=figures["loss"] if labels else None,
        dense_loss=dense.figures()["loss"] if labels else None,
        language=language,
    )


def best_allocation(model: MoefiedModel) -> str:
    """Return the allocation that what was measured of the model allows."""
    return next((name for name in MEASURES if Section(model.config).measured(name)), "uniform")


def enough_experts(
    model: MoefiedModel, batches: Sequence[Mapping[str, Any]], allocation: str, progress: bool
) -> float | None:
    """Return the smallest share of experts of `LARGER`, above the model's own, that is good; None if none is."""
    shares = [share for share in LARGER if share > share_of(model) + 0.01]
    for k in tqdm(shares, desc="larger budgets", unit="share", disable=not progress):
        dense, larger = Quality(), Quality()
        for batch in batches:
            expected, labels = dense_predictions(model, batch)
            dense.update_(expected, expected, labels)
            with selecting(model, type="top_k", k=k, allocation=allocation):
                larger.update_(predictions(model, batch)[0], expected, labels)
        if not check_of(dense, larger, larger, larger, is_causal(model)).bad:
            return k
    return None


def options_of(model: MoefiedModel, enough: float | None, allocation: str) -> list[str]:
    """Return what a bad model could be instead, one line each.

    Args:
        enough: a share of the experts that is good.
        allocation: what larger budgets were tried with.
    """
    section, sites = Section(model.config), model.moe_sites()
    options = [f"a larger k: {enough} is enough" if enough else f"other settings: k={LARGER[-1]} is bad, too"]
    size = max(routed(site).expert_size for site in sites)
    if size > FINE:
        options.append(f"finer experts than {size} neurons, down to {FINE}")
    if allocation != "sensitivity" and len(sites) > 1:
        options.append('budgets by sensitivity (allocation "sensitivity")')
    if not routed(sites[0]).router.trainable:
        options.append(f"a router that is fitted to data, such as 'linear', instead of {section.router!r}")
    if not run_alone(sites):
        options.append("a router for each layer, such as 'linear': one choice for all costs quality")
    act = type(routed(sites[0]).inner).__name__
    if "relu" not in act.lower():
        options.append(f"ReLU-fication first (moefy_hf.relufy_ and fine-tuning): {act} is never zero")
    options.append("fine-tuning at this budget (the recipes' --recovery_epochs, or MoEficationCallback)")
    return options


def share_of(model: MoefiedModel) -> float:
    """Return the share of the experts that a token computes, on average; 0 where nobody has measured it."""
    acts = [routed(site) for site in model.moe_sites()]
    return sum(act.k or 0 for act in acts) / sum(act.num_experts for act in acts)
