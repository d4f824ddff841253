"""Quality against compute: sweep the budget of one converted model, with dense, oracle and random controls."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..conversion.thresholds import counted_experts
from ..io import write_whole
from ..loading import check_code, check_moefied
from ..measure.contexts import all_experts, selecting
from ..measure.flops import model_flops
from ..measure.metrics import Quality, is_causal, predictions
from ..measure.profile import observed
from ..measure.router_inputs import RouterInputs, scores_of
from ..modeling.allocation import check_selection
from ..modeling.ffn_sites import find_sites
from ..modeling.routed_activation import chosen as kept
from ..modeling.selection import SELECTIONS
from .baselines import baseline_rows
from .controls import BASELINES, check_control, routed_by


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: who routes (None: the model's own routers), and what is selected."""

    control: str | None
    selection: tuple[tuple[str, Any], ...]

    @property
    def router(self) -> str:
        return self.control or "own"

    def counting(self, model: PreTrainedModel, batch: Mapping[str, Any], counts: dict[str, list[float]]):
        """Count the experts that are computed, where that depends on the token."""
        dynamic = SELECTIONS[dict(self.selection)["type"]].dynamic
        return counted_experts(model, batch, counts) if dynamic else contextlib.nullcontext()

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        with routed_by(model, self.control), selecting(model, **dict(self.selection)):
            yield


def settings_of(
    kinds: Sequence[str | Mapping[str, Any]],
    controls: Sequence[str],
    allocations: Sequence[str],
    shares: Sequence[int | float],
) -> list[Setting]:
    """The points of a sweep; controls always select "top_k". Whole selections come last."""
    whole = [{"allocation": "uniform", **kind} if "k" in kind else kind for kind in kinds if isinstance(kind, Mapping)]
    for selection in whole:
        check_selection(selection)
    routings = [(None, kind) for kind in kinds if isinstance(kind, str)]
    routings += [(control, "top_k") for control in controls]
    swept = [
        Setting(control, (("type", kind), ("k", share), ("allocation", spread)))
        for allocation in allocations
        for control, kind in routings
        for spread in ["uniform" if (kind, allocation) == ("top_k", "global") else allocation]  # no setting
        if spread == allocation or spread not in allocations
        for share in shares
    ]
    return [*swept, *(Setting(None, tuple(selection.items())) for selection in whole)]


def local_figures(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], settings: list[Setting], max_tokens: int
) -> list[list[dict[str, float]]]:
    """What each setting keeps of each FFN, given the dense model's inputs: one list of layers per setting.

    `captured_mass`: share of the summed positive activations (MoEfication's measure). `output_error`: squared norm
    of what the dropped experts would have added, relative to the FFN's output without bias. `chunk_share`: share of
    experts that at least one of 8 consecutive tokens of a text needs (BlockFFN), which decides batched and speculative
    speed; absent where no text has 8 tokens.
    """
    sites = model.moe_sites()
    reading = RouterInputs(sites)
    chosen = []
    for setting in settings:
        with setting.on(model):
            chosen.append([(site.act.router, site.act.selection) for site in sites])
    sums = torch.zeros(len(settings), len(sites), 3, dtype=torch.float64)
    totals = torch.zeros(len(sites), 3, dtype=torch.float64)
    tokens = 0

    def seen(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        nonlocal tokens
        tokens += len(x) * (position == 0)
        site = sites[position]
        experts = neurons.unflatten(-1, (site.act.num_experts, -1))  # (T, E, m)
        mass, down = experts.clamp_min(0).sum(-1, dtype=torch.float32), site.weights().down
        chunks = chunks_of(text, 8)  # (C, 8)
        output = F.linear(neurons, down).float().square().sum()
        totals[position] += torch.tensor([float(mass.sum()), float(output), len(chunks) * site.act.num_experts])
        read = reading.of(position, x)
        for each, routing in enumerate(chosen):
            router, selection = routing[position]
            scores = scores_of(router, read if router is site.act.router else x)  # a control reads its own FFN's
            keep = kept(scores, router, selection, site.act.shared)
            dropped = F.linear(experts.masked_fill(keep.unsqueeze(-1), 0).flatten(-2), down).float().square().sum()
            union = keep[chunks].any(1).sum()
            sums[each, position] += torch.tensor([float((mass * keep).sum()), float(dropped), int(union)])

    with all_experts(model), observed(model, sites, seen) as run:
        for batch in batches:
            run(batch)
            if tokens >= max_tokens:
                break
    figures = sums / totals.clamp_min(1e-30)
    names = ("captured_mass", "output_error", "chunk_share")[: None if totals[:, 2].all() else 2]
    return [[dict(zip(names, layer, strict=False)) for layer in setting] for setting in figures.tolist()]


def chunks_of(text: torch.Tensor, size: int) -> torch.Tensor:
    """text (T,), the number of the text each token is of, not decreasing -> (C, size): positions of consecutive tokens
    of one text; what is left over at a text's end is left out."""
    _, lengths = text.unique_consecutive(return_counts=True)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(text), device=text.device) - starts.repeat_interleave(lengths)  # within its text
    whole = (lengths - lengths % size).repeat_interleave(lengths)
    return (place < whole).nonzero()[:, 0].view(-1, size)


@dataclass
class Sweep:
    """What `evaluate` found: one row per setting, the dense model first."""

    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "rows": self.rows}

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        found = json.loads(Path(path).read_text())
        return cls(found["rows"], found["facts"])

    def table(self) -> str:
        """A Markdown table of the figures people compare."""
        columns = {
            "router": ("router", "{}"),
            "type": ("selection", "{}"),
            "allocation": ("allocation", "{}"),
            "experts": ("experts", "{:.1%}"),
            "ffn_flops": ("FFN FLOPs", "{:.1%}"),
            "model_flops": ("model FLOPs", "{:.1%}"),
            self.facts["quality"]: (self.facts["quality"], "{:.4g}"),
            "relative_quality": ("of dense", "{:.1%}"),
            "agreement": ("agreement", "{:.1%}"),
            "output_error": ("output error", "{:.3f}"),
            "captured_mass": ("captured mass", "{:.1%}"),
            "chunk_share": ("chunk of 8", "{:.1%}"),
        }
        columns = {key: column for key, column in columns.items() if any(key in row for row in self.rows)}
        lines = ["| " + " | ".join(title for title, _ in columns.values()) + " |", "|---" * len(columns) + "|"]
        for row in self.rows:
            cells = [form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Quality against FFN FLOPs, as a picture (needs the `plots` extra)."""
        from .plots import plot_sweep

        plot_sweep(self, path)


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    shares: Iterable[int | float] = (0.1, 0.2, 0.3, 0.5),
    *,
    controls: Iterable[str] = ("oracle", "random"),
    selections: Iterable[str | Mapping[str, Any]] | None = None,
    allocations: Iterable[str] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    local_tokens: int = 5_000,
    progress: bool = True,
) -> Sweep:
    """Sweep the budget of one converted model, beside its dense self and the controls; the model comes back as it was.

    Args:
        batches: model-ready batches, with `labels` for accuracy or perplexity; read more than once.
        shares: k as `set_selection` takes it.
        controls: of "oracle" (experts chosen by the norm of their output), "oracle_mass" (by their summed
            activation, the paper's ground truth) and "random" (drawn per token); and of what leaves out single
            neurons of the dense model at the same share of its FFNs' weights, "cats", "teal" and "wina" (see
            `moefy_hf.evaluation.baselines`).
        selections: types that are swept, those that depend on the token at the same average number of experts
            (`measure_reach` must have been called); by default that of the model. Controls always select "top_k". A
            whole selection, `{"type": "level", "level": 0.7}`, is one more row, which has no k.
        allocations: of "uniform", "sensitivity", "angular" and "global"; by default that of the model. "top_k" is
            uniform where others are "global".
        calibration: batches, some thousand tokens, that thresholds of these are set on.
        local_tokens: tokens on which each layer's captured mass, output error and chunk share are measured; 0 for
            none.

    Returns:
        rows with the quality ("accuracy", or "perplexity" for language models), loss, agreement of predictions with
        the dense model, divergence `kl` of its distribution (nats), mean share of `experts` computed, `ffn_flops` and
        `model_flops` relative to dense (routers included; a control's own cost is left out).

    Raises:
        ValueError: the model is not MoEfied, `batches` is empty or can be read only once, an unknown name, or no
            `calibration` for what needs it.
    """
    check_moefied(model)
    check_code(model)
    if iter(batches) is batches:
        raise ValueError("evaluate reads the batches more than once: give a list or a DataLoader, not an iterator")
    current = model.config.moefication["selection"]
    allocations = [current.get("allocation", "uniform")] if allocations is None else list(allocations)
    kinds = [current["type"]] if selections is None else list(selections)
    shares, controls = list(shares), list(controls)
    for name in controls:
        check_control(name)
    baselines = [name for name in controls if name in BASELINES]
    if baselines and calibration is None:
        raise ValueError(f"{', '.join(baselines)} set thresholds on calibration data: give `calibration`")
    settings = settings_of(kinds, [name for name in controls if name not in BASELINES], allocations, shares)
    for setting in settings:  # every bad value is found before work begins
        with setting.on(model):
            pass
    dense = Setting(None, (("type", "top_k"), ("k", 1.0), ("allocation", "uniform")))
    reference = Quality()
    results = [Quality() for _ in settings]
    counts: list[dict[str, list[float]]] = [{} for _ in settings]
    flops, training = None, model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
                with dense.on(model):
                    expected, labels = predictions(model, batch)
                    flops = flops or model_flops(model, batch)
                reference.update_(expected, expected, labels)
                for setting, quality, count in zip(settings, results, counts, strict=True):
                    with setting.on(model), setting.counting(model, batch, count):
                        quality.update_(predictions(model, batch)[0], expected, labels)
        neurons = []
        if baselines and calibration is not None and flops is not None and reference.count:
            neurons = baseline_rows(model, batches, calibration, baselines, shares, flops, progress)
    finally:
        model.train(training)
    if flops is None or reference.count == 0:
        raise ValueError("there is nothing to evaluate on: `batches` is empty, or all its labels are -100")
    local = local_figures(model, batches, settings, local_tokens) if local_tokens else None
    return _sweep(model, flops, settings, reference, results, counts, local, neurons)


def _sweep(model, flops, settings, reference, results, counts, local, neurons) -> Sweep:
    dense = reference.figures()
    quality = ("perplexity" if is_causal(model) else "accuracy") if reference.labelled else "agreement"
    rows = [
        {"router": "dense", "experts": 1.0, "ffn_flops": 1.0, "model_flops": 1.0, "relative_quality": 1.0, **dense}
    ]
    for position, (setting, result) in enumerate(zip(settings, results, strict=True)):
        with setting.on(model):
            sites = model.moe_sites()
            computed = {site.name: site.act.k for site in sites}
            computed |= {name: experts / tokens for name, (experts, tokens) in counts[position].items()}
            ffn, whole = flops.ratio(flops.routed(find_sites(model), computed))
        figures = result.figures()
        row = {"router": setting.router, **dict(setting.selection), "k_per_layer": list(computed.values())}
        row |= {
            "experts": sum(computed.values()) / sum(site.act.num_experts for site in sites),
            "ffn_flops": ffn,
            "model_flops": whole,
        }
        row |= figures
        if dense[quality]:  # nothing is relative to an accuracy of zero
            row["relative_quality"] = figures[quality] / dense[quality]
        if local is not None:
            row |= {name: sum(layer[name] for layer in local[position]) / len(sites) for name in local[position][0]}
            row["layers"] = local[position]
        rows.append(row)
    rows += [row | ({"relative_quality": row[quality] / dense[quality]} if dense[quality] else {}) for row in neurons]
    facts = {"quality": quality, "positions": reference.count, "router": model.config.moefication["router"]}
    return Sweep(rows, facts | {"dtype": str(model.dtype).removeprefix("torch."), "flops_per_token": flops.total})
