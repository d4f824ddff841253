"""What a conversion costs in quality, before its result is written: measured on calibration data that nothing was
fitted on, against the dense model and experts drawn at random."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..conversion.budgets import MEASURES
from ..loading import check_moefied
from ..measure.contexts import all_experts, selecting
from ..measure.metrics import Quality, is_causal, predictions
from ..measure.router_inputs import run_alone
from .controls import routed_by

TOKENS = 2048  # positions that are compared
WARNING, DEGENERATE = 0.1, 1.0  # growth of the loss, or of the perplexity
AGREEMENT = 0.9  # without labels: less is warned of
FINE = 8  # neurons of the finest experts that are recommended
LARGER = (0.3, 0.5, 0.7, 0.9)  # shares that are tried where the asked one is bad


@dataclass(frozen=True)
class Prediction:
    """What the converted model does at its budget, on `positions` held-out positions.

    Attributes:
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
        """Of the loss, or a language model's perplexity, relative to dense."""
        if self.loss is None or not self.dense_loss:
            return None
        return (math.exp(self.loss - self.dense_loss) if self.language else self.loss / self.dense_loss) - 1

    @property
    def measure(self) -> str:
        return "perplexity" if self.language else "loss"

    @property
    def bad(self) -> bool:
        """The loss or perplexity grows by more than 10 %; without labels, fewer than 90 % of best guesses agree."""
        return self.agreement < AGREEMENT if self.growth is None else self.growth > WARNING

    @property
    def degenerate(self) -> str | None:
        """Why the model is of no use as it is, if so."""
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
        return asdict(self) | {"growth": self.growth, "bad": self.bad, "degenerate": self.degenerate}

    def line(self) -> str:
        """One line for people."""
        told = f"agreement with dense {self.agreement:.1%}, divergence {self.kl:.3g} nats (random experts"
        told += f" {self.random_kl:.3g}), on {self.positions:,} positions that nothing was fitted on"
        if self.growth is not None and self.loss is not None:
            value = math.exp(self.loss) if self.language else self.loss
            told = f"{self.measure} {value:.4g}, {self.growth:+.1%} on dense, {told}"
        return told

    def message(self) -> str:
        """What to do about it; empty where quality is good."""
        if not self.bad:
            return ""
        lines = [f"this model is much worse than its dense self: {self.line()}"]
        if self.degenerate:
            lines[0] = f"this model is of no use as it is, {self.degenerate}: {self.line()}"
        return "\n".join([*lines, *(f"- try {option}" for option in self.options)])


@torch.no_grad()
def predict_quality(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_positions: int = TOKENS,
    progress: bool = True,
) -> Prediction:
    """Measure a freshly converted model at the budget it has, on batches that it was not calibrated on; where that is
    bad, at larger shares of its experts too. It comes back as it was.

    Raises:
        ValueError: the model is not MoEfied or has no head whose predictions could be compared, or `batches` are
            empty.
    """
    check_moefied(model)
    kept, training = [], model.training
    dense, own, chance, uniform = (Quality() for _ in range(4))
    bar = tqdm(total=max_positions, desc="predict", unit="position", unit_scale=True, disable=not progress)
    model.eval()
    try:
        with bar:
            for batch in batches:
                expected, labels = dense_predictions(model, batch)
                dense.update_(expected, expected, labels)
                uniform.update_(torch.zeros_like(expected), expected, labels)
                own.update_(predictions(model, batch)[0], expected, labels)
                with routed_by(model, "random"):
                    chance.update_(predictions(model, batch)[0], expected, labels)
                kept.append(batch)
                bar.update(dense.count - bar.n)
                if dense.count >= max_positions:
                    break
        if not dense.count:
            raise ValueError("quality cannot be predicted: no batch, or none with a position that counts, was given")
        found = predicted(dense, own, chance, uniform, is_causal(model))
        return replace(found, **better(model, kept, progress)) if found.bad else found
    finally:
        model.train(training)


def dense_predictions(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    with all_experts(model):
        return predictions(model, batch)


def predicted(dense: Quality, own: Quality, chance: Quality, uniform: Quality, language: bool) -> Prediction:
    figures, labels = own.figures(), dense.labelled > 0
    return Prediction(
        positions=own.count,
        kl=figures["kl"],
        random_kl=chance.figures()["kl"],
        uniform_kl=uniform.figures()["kl"],
        agreement=figures["agreement"],
        loss=figures["loss"] if labels else None,
        dense_loss=dense.figures()["loss"] if labels else None,
        language=language,
    )


def better(model: PreTrainedModel, batches: list[Mapping[str, Any]], progress: bool) -> dict[str, Any]:
    """What a bad model could be instead: `enough` and `options` of a Prediction."""
    section, sites = model.config.moefication, model.moe_sites()
    measured = next((name for name in MEASURES if section.get(name)), "uniform")
    share, enough = share_of(model), None
    tried = [each for each in LARGER if each > share + 0.01]
    for k in tqdm(tried, desc="larger budgets", unit="share", disable=not progress):
        dense, own = Quality(), Quality()
        for batch in batches:
            expected, labels = dense_predictions(model, batch)
            dense.update_(expected, expected, labels)
            with selecting(model, type="top_k", k=k, allocation=measured):
                own.update_(predictions(model, batch)[0], expected, labels)
        if not predicted(dense, own, own, own, is_causal(model)).bad:
            enough = k
            break
    options = [f"a larger k: {enough} is enough" if enough else f"other settings: k={LARGER[-1]} is bad, too"]
    size = max(site.act.expert_size for site in sites)
    if size > FINE:
        options.append(f"finer experts than {size} neurons, down to {FINE}")
    if measured != "sensitivity" and len(sites) > 1:
        options.append('budgets by sensitivity (allocation "sensitivity")')
    if not sites[0].act.router.trainable:
        options.append(f"a router that is fitted to data, such as 'linear', instead of {section['router']!r}")
    if not run_alone(sites):
        options.append("a router for each layer, such as 'linear': one choice for all costs quality")
    act = type(sites[0].act.inner).__name__
    if "relu" not in act.lower():
        options.append(f"ReLU-fication first (moefy_hf.relufy_ and fine-tuning): {act} is never zero")
    options.append("fine-tuning at this budget (the recipes' --recovery_epochs, or MoEficationCallback)")
    return {"enough": enough, "options": options}


def share_of(model: PreTrainedModel) -> float:
    """Of the experts that a token computes, on average; 0 where nobody has measured it."""
    sites = model.moe_sites()
    return sum(site.act.k or 0 for site in sites) / sum(site.act.num_experts for site in sites)
