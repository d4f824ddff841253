"""Quality against compute: sweep the budget of one converted model, with dense, oracle and random controls."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..io import write_whole
from ..loading import MoefiedModel, check_code, check_moefied, routed
from ..measure.contexts import evaluating
from ..measure.flops import ModelFlops
from ..measure.metrics import is_causal
from ..measure.processes import ALONE, Processes
from ..modeling.ffn_sites import find_sites
from ..modeling.section import Section
from .baselines import baseline_rows
from .controls import BASELINES, check_control
from .local_figures import local_figures
from .measured import Measured, measure_points
from .sweep_points import SweepPoint, sweep_points

COLUMNS = {  # of the table: figure -> title and format; the quality stands after the FLOPs
    "router": ("router", "{}"),
    "type": ("selection", "{}"),
    "allocation": ("allocation", "{}"),
    "experts": ("experts", "{:.1%}"),
    "ffn_flops": ("FFN FLOPs", "{:.1%}"),
    "model_flops": ("model FLOPs", "{:.1%}"),
    "quality": ("quality", "{:.4g}"),
    "relative_quality": ("of dense", "{:.1%}"),
    "agreement": ("agreement", "{:.1%}"),
    "output_error": ("output error", "{:.3f}"),
    "captured_mass": ("captured mass", "{:.1%}"),
    "chunk_share": ("chunk of 8", "{:.1%}"),
}


@dataclass
class Sweep:
    """What `evaluate` measured.

    Attributes:
        rows: one per point, the dense model first; see `evaluate`.
        facts: "quality", the name of the figure in `rows` that is compared; "positions" it was measured on; "router",
            "dtype", and "flops_per_token" of the dense model.

    Example:
        >>> sweep = Sweep.load("sweep.json")
        >>> print(sweep.table())
    """

    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what `save` writes."""
        return {"facts": self.facts, "rows": self.rows}

    def save(self, path: str | Path) -> None:
        """Write a JSON file, over an old one."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read a file that `save` wrote."""
        saved = json.loads(Path(path).read_text())
        return cls(saved["rows"], saved["facts"])

    def table(self) -> str:
        """Return a Markdown table of the figures people compare."""
        quality = self.facts["quality"]
        columns = {
            (quality if key == "quality" else key): ((quality if key == "quality" else title), form)
            for key, (title, form) in COLUMNS.items()
        }
        columns = {key: column for key, column in columns.items() if any(key in row for row in self.rows)}
        lines = ["| " + " | ".join(title for title, _ in columns.values()) + " |", "|---" * len(columns) + "|"]
        for row in self.rows:
            cells = [form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw quality against FFN FLOPs.

        Raises:
            ImportError: matplotlib, the extra `plots`, is not installed.
        """
        from .plots import plot_sweep

        plot_sweep(self, path)


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    budgets: Iterable[int | float] = (0.1, 0.2, 0.3, 0.5),
    *,
    controls: Iterable[str] = ("oracle", "random"),
    selections: Iterable[str | Mapping[str, Any]] | None = None,
    allocations: Iterable[str] | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    local_tokens: int = 5_000,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Sweep:
    """Sweep the budget of one converted model, beside its dense self and the controls; the model comes back as it was.

    Args:
        batches: model-ready batches, with `labels` for accuracy or perplexity; read more than once.
        budgets: k as `set_selection` takes it.
        controls: of "oracle" (experts chosen by the norm of their output), "oracle_mass" (by their summed
            activation, the paper's ground truth) and "random" (drawn per token); and of what leaves out single
            neurons of the dense model at the same share of its FFNs' weights, "cats", "teal" and "wina" (see
            `moefy_hf.evaluation.baselines`).
        selections: types that are swept, those that depend on the token at the same average number of experts
            (`calibrate_thresholds_` must have been called); by default that of the model. Controls select "top_k". A
            whole selection, `{"type": "level", "level": 0.7}`, is one more row, which has no k.
        allocations: of "uniform", "sensitivity", "angular" and "global"; by default that of the model. "top_k" is
            uniform where others are "global".
        calibration: batches, some thousand tokens, that thresholds of "cats", "teal" and "wina" are set on.
        local_tokens: tokens on which each layer's captured mass, output error and chunk share are measured; 0 for
            none.
        processes: that share the batches, see `moefy_hf.measure.processes.together`. Each calls this with the same
            model and all batches, in the same order; each gets the whole sweep.

    Returns:
        rows with the quality ("accuracy", or "perplexity" for language models), loss, agreement of predictions with
        the dense model, divergence `kl` of its distribution (nats), mean share of `experts` computed, `ffn_flops` and
        `model_flops` relative to dense (routers included; a control's own cost is left out).

    Raises:
        MoefyError: the model is not MoEfied, `batches` is empty or can be read only once, an unknown name, or no
            `calibration` for what needs it.

    Example:
        print(evaluate(model, batches, [0.1, 0.2], controls=["random"]).table())
    """
    model = check_moefied(model)
    check_code(model)
    if iter(batches) is batches:
        raise MoefyError("evaluate reads the batches more than once: give a list or a DataLoader, not an iterator")
    budgets, (controls, baselines) = list(budgets), sorted_controls(controls, calibration)
    points = points_of(model, selections, controls, allocations, budgets)
    with evaluating(model), torch.no_grad():
        measured = measure_points(model, batches, points, progress, processes)
        rows = []
        if baselines and calibration is not None:
            options: dict[str, Any] = {"progress": progress, "processes": processes}
            rows = baseline_rows(model, batches, calibration, baselines, budgets, measured.flops, **options)
    local = local_figures(model, batches, points, local_tokens) if local_tokens else None
    return sweep_of(model, points, measured, local, rows)


def sorted_controls(
    controls: Iterable[str], calibration: Iterable[Mapping[str, Any]] | None
) -> tuple[list[str], list[str]]:
    """Return those of the names that stand in for routers, and those that leave out single neurons.

    Raises:
        MoefyError: an unknown name, or no calibration data for what needs it.
    """
    names = list(controls)
    for name in names:
        check_control(name)
    baselines = [name for name in names if name in BASELINES]
    if baselines and calibration is None:
        raise MoefyError(f"{', '.join(baselines)} set thresholds on calibration data: give `calibration`")
    return [name for name in names if name not in BASELINES], baselines


def points_of(
    model: MoefiedModel,
    selections: Iterable[str | Mapping[str, Any]] | None,
    controls: Sequence[str],
    allocations: Iterable[str] | None,
    budgets: Sequence[int | float],
) -> list[SweepPoint]:
    """Return the points that `evaluate` measures, with the model's own selection and allocation where none is given.

    Raises:
        MoefyError: a point that the model cannot run at: every bad value is named before work begins.
    """
    current = Section(model.config).selection
    kinds = [current["type"]] if selections is None else list(selections)
    spreads = [current.get("allocation", "uniform")] if allocations is None else list(allocations)
    points = sweep_points(kinds, controls, spreads, budgets)
    for point in points:
        with point.on(model):
            pass
    return points


def sweep_of(
    model: MoefiedModel,
    points: Sequence[SweepPoint],
    measured: Measured,
    local: list[list[dict[str, float]]] | None,
    baselines: list[dict[str, Any]],
) -> Sweep:
    """Return the sweep that was measured.

    Args:
        local: what `local_figures` returned for the same points.
        baselines: rows of `baseline_rows`.
    """
    dense = measured.dense.figures()
    quality = ("perplexity" if is_causal(model) else "accuracy") if measured.dense.labelled else "agreement"
    rows = [
        {"router": "dense", "experts": 1.0, "ffn_flops": 1.0, "model_flops": 1.0, "relative_quality": 1.0, **dense}
    ]
    for position, point in enumerate(points):
        figures = measured.qualities[position].figures()
        row = {"router": point.router, **dict(point.selection)}
        row |= cost_of(model, point, measured.counts[position], measured.flops) | figures
        if dense[quality]:  # nothing is relative to an accuracy of zero
            row["relative_quality"] = figures[quality] / dense[quality]
        if local is not None:
            layers = local[position]
            row |= {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
            row["layers"] = layers
        rows.append(row)
    for row in baselines:
        rows.append(row | ({"relative_quality": row[quality] / dense[quality]} if dense[quality] else {}))
    facts = {"quality": quality, "positions": measured.dense.count, "router": Section(model.config).router}
    facts |= {"dtype": str(model.dtype).removeprefix("torch."), "flops_per_token": measured.flops.total}
    return Sweep(rows, facts)


def cost_of(
    model: MoefiedModel, point: SweepPoint, counts: Mapping[str, Sequence[float]], flops: ModelFlops
) -> dict[str, Any]:
    """Return `k_per_layer`, the mean share of `experts`, `ffn_flops` and `model_flops` of one point of a sweep.

    Args:
        counts: the key of an FFN -> (experts computed, tokens), where that depends on the token.
        flops: of the dense model.
    """
    with point.on(model):
        sites = model.moe_sites()
        computed = {site.key: routed(site).k for site in sites}
        computed |= {name: experts / tokens for name, (experts, tokens) in counts.items()}
        known = {name: experts for name, experts in computed.items() if experts is not None}
        ffn, whole = flops.ratio(flops.routed(find_sites(model), known))
    return {
        "k_per_layer": list(known.values()),
        "experts": sum(known.values()) / sum(routed(site).num_experts for site in sites),
        "ffn_flops": ffn,
        "model_flops": whole,
    }
