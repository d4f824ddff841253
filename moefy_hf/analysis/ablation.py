"""Which experts a task needs: what its loss becomes when they are switched off."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..data import Texts
from ..errors import MoefyError
from ..io import markdown
from ..loading import MoefiedModel, check_moefied, routed
from ..measure.contexts import evaluating, hooked
from ..measure.metrics import is_causal, predictions, usable

Batches = Iterable[Mapping[str, Any]]
Experts = dict[int, list[int]]


@contextmanager
def neurons_with_gradients(model: MoefiedModel) -> Iterator[list[torch.Tensor]]:
    """Yield a list that gets the neurons of each routed FFN of the next forward pass, as `down` is given them; after a
    backward pass they have their gradients."""
    recorded: list[torch.Tensor] = []

    def record(_: Any, args: tuple) -> tuple:
        neurons = args[0].detach().requires_grad_() if not args[0].requires_grad else args[0]
        neurons.retain_grad()
        recorded.append(neurons)
        return (neurons, *args[1:])

    with hooked(site.down.register_forward_pre_hook(record) for site in model.moe_sites()):
        yield recorded


def labelled(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, C) and labels (N,) of a batch.

    Raises:
        MoefyError: it has no labels.
    """
    logits, labels = predictions(model, batch)
    if labels is None:
        raise MoefyError("ablation needs batches with labels")
    return logits.float(), labels


def estimated_effects(model: MoefiedModel, batches: Batches) -> torch.Tensor:
    """Return (L, E), how much the mean loss would rise with each expert off, to first order: -sum a dL/da over its
    neurons a.

    One backward pass serves all experts. Layers with fewer experts than others end in zeros.
    """
    sizes = [routed(site).num_experts for site in model.moe_sites()]
    effects = torch.zeros(len(sizes), max(sizes), dtype=torch.float64)
    count = 0
    for batch in batches:
        with torch.enable_grad(), neurons_with_gradients(model) as recorded:
            logits, labels = labelled(model, batch)
            F.cross_entropy(logits, labels, reduction="sum").backward(inputs=recorded)
        count += len(labels)
        for position, (experts, neurons) in enumerate(zip(sizes, recorded, strict=True)):
            gradient = torch.zeros_like(neurons) if neurons.grad is None else neurons.grad
            effect = -(neurons.detach() * gradient).float().unflatten(-1, (experts, -1)).sum(-1)
            effects[position, :experts] += effect.flatten(0, -2).sum(0).double().cpu()
    return effects / max(count, 1)


@dataclass
class Task:
    """How a model does on a task.

    Attributes:
        losses, hits: (N,) one per text, or per position for language models.
    """

    losses: torch.Tensor
    hits: torch.Tensor

    @property
    def loss(self) -> float:
        """Return the mean loss."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Return the share of hits."""
        return float(self.hits.mean())


@torch.no_grad()
def measure_task(model: PreTrainedModel, batches: Batches) -> Task:
    """Run a model on a task.

    Raises:
        MoefyError: a batch has no labels.
    """
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
        batches, other: the task and the second one, model-ready batches with labels; read more than once.
        measured: how many experts are switched off.

    Returns:
        `ranking` of all experts, (layer, expert); `rows` of the measured ones: rise of the loss on either task, with
        its standard error over texts (over positions for language models, where it is too small: tokens of one text
        are not independent); `whole`, the loss and accuracy with all experts; `unit`, what the error is over; `table`.

    Raises:
        MoefyError: the model is not MoEfied, or batches can be read only once or have no labels.

    Example:
        ranking = ablate(model, batches)["ranking"]
        print(remove_together(model, ranking, {"the task": batches}, [1, 4]))
    """
    model = check_moefied(model)
    tasks: dict[str, Batches] = {"task": batches} | ({} if other is None else {"other": other})
    if any(iter(data) is data for data in tasks.values()):
        raise MoefyError("ablate reads the batches more than once: give a list or a DataLoader, not an iterator")
    with evaluating(model):
        dense = {name: measure_task(model, data) for name, data in tasks.items()}
        effects = {name: estimated_effects(model, data) for name, data in tasks.items()}
        score = effects["task"] - effects.get("other", torch.zeros_like(effects["task"]))
        ranking = ranked(score, [routed(site).num_experts for site in model.moe_sites()])
        rows = []
        for layer, expert in tqdm(ranking[:measured], desc="ablate", unit="expert", disable=not progress):
            row: dict[str, Any] = {"layer": layer, "expert": expert}
            with model.disable_experts({layer: [expert]}):
                for name, data in tasks.items():
                    rise = measure_task(model, data).losses - dense[name].losses
                    row[f"{name}: estimate"] = float(effects[name][layer, expert])
                    row[f"{name}: rise of the loss"] = float(rise.mean())
                    row[f"{name}: standard error"] = float(rise.std() / len(rise) ** 0.5)
            rows.append(row)
    rows.sort(key=lambda row: row.get("other: rise of the loss", 0.0) - row["task: rise of the loss"])
    figures = {name: {"loss": whole.loss, "accuracy": whole.accuracy} for name, whole in dense.items()}
    unit = "position" if is_causal(model) else "text"
    return {"unit": unit, "whole": figures, "ranking": ranking, "rows": rows, "table": markdown(rows) if rows else ""}


def ranked(score: torch.Tensor, sizes: list[int]) -> list[tuple[int, int]]:
    """Return (layer, expert) of the experts that scores (L, E) are of, the highest score first.

    Args:
        sizes: how many experts each layer has.
    """
    width = score.shape[1]
    order = score.flatten().argsort(descending=True, stable=True).tolist()
    return [(i // width, i % width) for i in order if i % width < sizes[i // width]]


def by_layer(experts: Iterable[tuple[int, int]]) -> Experts:
    """Return (layer, expert) pairs as `disable_experts` takes them."""
    layers: Experts = {}
    for layer, expert in experts:
        layers.setdefault(layer, []).append(expert)
    return layers


def remove_together(
    model: PreTrainedModel,
    ranking: list[tuple[int, int]],
    tasks: Mapping[str, Batches],
    counts: Iterable[int],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure tasks without the first experts of a ranking, and, as the control, without as many drawn at random from
    the same layers.

    Args:
        ranking: (layer, expert), as `ablate` returned it.
        tasks: batches with labels, by the name of the task.
        counts: how many experts are switched off together.
        seed: of those drawn at random.

    Returns:
        a row for none and for each count: `experts off`, and the accuracy on each task, under its name, and under
        "random: " and its name.

    Raises:
        MoefyError: the model is not MoEfied, a count is larger than the number of experts, or a batch has no labels.
    """
    model = check_moefied(model)
    counts = list(counts)
    if max(counts, default=0) > len(ranking):
        raise MoefyError(f"{max(counts)} experts to remove together are more than the {len(ranking)} of the ranking")
    generator = torch.Generator().manual_seed(seed)
    sizes = [routed(site).num_experts for site in model.moe_sites()]
    rows = []
    for count in (0, *counts):
        first = by_layer(ranking[:count])
        control = {
            layer: torch.randperm(sizes[layer], generator=generator)[: len(experts)].tolist()
            for layer, experts in first.items()
        }
        row: dict[str, Any] = {"experts off": count}
        for what, experts in (("", first), ("random: ", control)):
            with model.disable_experts(experts):
                row |= {f"{what}{name}": measure_task(model, data).accuracy for name, data in tasks.items()}
        rows.append(row)
    return rows


def read_ablation(path: str | Path, *parts: str) -> dict[str, Any]:
    """Read a JSON file of what `ablate` returned, which `moefy ablate` writes.

    Args:
        parts: keys that it must have: "ranking", "rows", and of the command's own "title" and "together".

    Raises:
        MoefyError: there is no such file, or it has not all parts.
    """
    if not Path(path).is_file():
        raise MoefyError(f"{path} is no file that moefy ablate wrote")
    try:
        ablation = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # another encoding, or no JSON
        raise MoefyError(f"{path} is no file that moefy ablate wrote: {error}") from error
    missing = [part for part in parts if not isinstance(ablation, dict) or part not in ablation]
    if missing:
        raise MoefyError(f"{path} is not what moefy ablate writes: it has no {missing[0]!r}")
    return ablation


def split_by_class(texts: Texts, config: PreTrainedConfig, topic: str) -> dict[str, Texts]:
    """Split labelled texts into a task and a second one: the texts of one class, and all others.

    Args:
        texts: with labels.
        config: of a classifier, which knows the names of classes.
        topic: the name of the class.

    Returns:
        the texts of the "task", and of the "other".

    Raises:
        MoefyError: there is no such class, or no text of it, or none of another.
    """
    classes = {str(name): int(i) for i, name in (config.id2label or {}).items()}
    if topic not in classes:
        raise MoefyError(f"unknown class {topic!r}; choose from {', '.join(classes)}")
    labels = texts.labels or []
    parts = {
        "task": texts.select(i for i, label in enumerate(labels) if label == classes[topic]),
        "other": texts.select(i for i, label in enumerate(labels) if label != classes[topic]),
    }
    if not all(map(len, parts.values())):
        raise MoefyError(f"there must be texts of class {topic!r}, and of others")
    return parts
