"""Which experts a task needs: what its loss becomes when they are switched off."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..io import markdown
from ..loading import check_moefied
from ..measure.metrics import is_causal, predictions, usable

Batches = Iterable[Mapping[str, Any]]
Experts = dict[int, list[int]]


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What `down` is given in each routed FFN of the next forward pass, with its gradient after a backward pass."""
    sites, kept = model.moe_sites(), []

    def keep(_: Any, args: tuple) -> tuple:
        neurons = args[0].detach().requires_grad_() if not args[0].requires_grad else args[0]
        neurons.retain_grad()
        kept.append(neurons)
        return (neurons, *args[1:])

    handles = [site.down.register_forward_pre_hook(keep) for site in sites]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def labelled(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) and labels (N,) of a batch that has some."""
    logits, labels = predictions(model, batch)
    if labels is None:
        raise ValueError("ablation needs batches with labels")
    return logits.float(), labels


def estimated_effects(model: PreTrainedModel, batches: Batches) -> torch.Tensor:
    """(L, E): how much the mean loss would rise with each expert off, to first order: -sum a dL/da over its neurons.
    One backward pass for all experts. Layers with fewer experts than others end in zeros."""
    sites = model.moe_sites()
    effects = torch.zeros(len(sites), max(site.act.num_experts for site in sites), dtype=torch.float64)
    count = 0
    for batch in batches:
        with torch.enable_grad(), recorded(model) as kept:
            logits, labels = labelled(model, batch)
            F.cross_entropy(logits, labels, reduction="sum").backward(inputs=kept)
        count += len(labels)
        for position, (site, neurons) in enumerate(zip(sites, kept, strict=True)):
            effect = -(neurons.detach() * neurons.grad).float().unflatten(-1, (site.act.num_experts, -1)).sum(-1)
            effects[position, : site.act.num_experts] += effect.flatten(0, -2).sum(0).double().cpu()
    return effects / max(count, 1)


@dataclass
class Task:
    """How a model does on a task: losses and hits, one per text (per position for language models)."""

    losses: torch.Tensor
    hits: torch.Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())


@torch.no_grad()
def task(model: PreTrainedModel, batches: Batches) -> Task:
    losses, hits = [], []
    for batch in batches:
        logits, labels = labelled(model, batch)
        losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        hits.append((logits.argmax(-1).masked_fill(~usable(logits), -1) == labels).float().cpu())
    return Task(torch.cat(losses), torch.cat(hits))


def ablate(
    model: PreTrainedModel,
    batches: Batches,
    other: Batches | None = None,
    *,
    measured: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Rank experts by what a task loses without each of them, and what a second task loses.

    All experts are ranked by a first-order estimate, rise on the task less rise on the other; those of the largest
    `measured` are then switched off, one at a time.

    Args:
        batches, other: model-ready batches with labels; read more than once.

    Returns:
        `ranking` of all experts, `rows` of the measured ones: rise of the loss on either task, with its standard
        error over texts (over positions for language models, where it is too small: tokens of one text are not
        independent).

    Raises:
        ValueError: the model is not MoEfied, or batches can be read only once or have no labels.
    """
    check_moefied(model)
    tasks: dict[str, Batches] = {"task": batches} | ({} if other is None else {"other": other})
    if any(iter(each) is each for each in tasks.values()):
        raise ValueError("ablate reads the batches more than once: give a list or a DataLoader, not an iterator")
    training = model.training
    model.eval()
    try:
        dense = {name: task(model, each) for name, each in tasks.items()}
        effects = {name: estimated_effects(model, each) for name, each in tasks.items()}
        score = effects["task"] - effects.get("other", torch.zeros_like(effects["task"]))
        ranking = ranked(score, [site.act.num_experts for site in model.moe_sites()])
        rows = []
        for layer, expert in tqdm(ranking[:measured], desc="ablate", unit="expert", disable=not progress):
            row: dict[str, Any] = {"layer": layer, "expert": expert}
            with model.disable_experts({layer: [expert]}):
                for name, each in tasks.items():
                    rise = task(model, each).losses - dense[name].losses
                    row[f"{name}: estimate"] = float(effects[name][layer, expert])
                    row[f"{name}: rise of the loss"] = float(rise.mean())
                    row[f"{name}: standard error"] = float(rise.std() / len(rise) ** 0.5)
            rows.append(row)
    finally:
        model.train(training)
    rows.sort(key=lambda row: row.get("other: rise of the loss", 0.0) - row["task: rise of the loss"])
    figures = {name: {"loss": each.loss, "accuracy": each.accuracy} for name, each in dense.items()}
    unit = "position" if is_causal(model) else "text"
    return {"unit": unit, "whole": figures, "ranking": ranking, "rows": rows, "table": markdown(rows) if rows else ""}


def ranked(score: torch.Tensor, sizes: list[int]) -> list[tuple[int, int]]:
    """(L, E) -> (layer, expert) of the first `sizes` experts of each layer, the highest score first."""
    width = score.shape[1]
    order = score.flatten().argsort(descending=True, stable=True).tolist()
    return [(i // width, i % width) for i in order if i % width < sizes[i // width]]


def by_layer(experts: Iterable[tuple[int, int]]) -> Experts:
    """(layer, expert) pairs as `disable_experts` takes them."""
    found: Experts = {}
    for layer, expert in experts:
        found.setdefault(layer, []).append(expert)
    return found


def remove_together(
    model: PreTrainedModel,
    ranking: list[tuple[int, int]],
    tasks: Mapping[str, Batches],
    counts: Iterable[int],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy on each task without the first so many experts of a ranking, and, as the control, without as many
    drawn at random from the same layers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [site.act.num_experts for site in model.moe_sites()]
    rows = []
    for count in (0, *counts):
        chosen = by_layer(ranking[:count])
        control = {
            layer: torch.randperm(sizes[layer], generator=generator)[: len(experts)].tolist()
            for layer, experts in chosen.items()
        }
        row: dict[str, Any] = {"experts off": count}
        for what, experts in (("", chosen), ("random: ", control)):
            with model.disable_experts(experts):
                row |= {f"{what}{name}": task(model, each).accuracy for name, each in tasks.items()}
        rows.append(row)
    return rows
