"""One layer of an analysis: its figures, and what each of its experts responds to."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from . import significance
from .measuring import LayerSums
from .sums import UseSums

SHOWN = 8  # findings listed per expert
SUPER = 10.0  # an expert is extreme where its largest output is so many times that of the median expert
OFTEN = 0.99  # share of tokens at which an expert counts as always on


def describe(
    layers: list[LayerSums],
    position: int,
    tests: dict[str, dict[str, np.ndarray]],
    names: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Return the figures of one layer, and of its experts.

    Args:
        tests: what `tested` returned for the experts that the router selects.
        names: of the classes, tokens and kinds of words that were tested.
    """
    layer, use = layers[position], layers[position].views["routed"]
    within = significance.correlations(use.pairs.numpy(), use.load, use.load, use.tokens)
    np.fill_diagonal(within, 0)
    across, alignment = with_next(use, layers[position + 1] if position + 1 < len(layers) else None)
    description = layer_figures(layer)
    description |= {"coactivation": np.round(within, 3).tolist(), "alignment_with_next": alignment}
    if "class" in use.classes:
        description |= class_figures(use, tests["class"], position)
    load, norms = use.load / use.tokens, layer.neurons.norms.numpy() / layer.neurons.tokens
    description["experts"] = [
        {
            "expert": expert,
            "load": float(load[expert]),
            "mean_output": float(norms[expert]),
            "largest_output": float(layer.neurons.largest[expert]),
            "partners": partners(within[expert]),
            "next_partners": partners(across[expert]) if across is not None else [],
            **{name: findings(tests[name], position, expert, names[name]) for name in names if name in tests},
            "examples": examples(layer, expert, tokenizer),
        }
        for expert in range(len(load))
    ]
    return description


def layer_figures(layer: LayerSums) -> dict[str, Any]:
    """Return how evenly the experts of a layer are used, and how often its neurons fire."""
    use = layer.views["routed"]
    load, active = use.load / use.tokens, layer.neurons.active.numpy() / layer.neurons.tokens
    return {
        "name": layer.site.name,
        "num_experts": len(load),
        "expert_size": layer.act.expert_size,
        "share": float(load.mean()),
        "load_entropy": significance.entropy(use.load),
        "dead": int((use.load == 0).sum()),
        "always_on": int((load >= OFTEN).sum()),
        "active_neurons": float(active.mean()),
        "never_active_neurons": int((active == 0).sum()),
        "mostly_active_neurons": int((active > 0.5).sum()),
    }


def with_next(use: UseSums, following: LayerSums | None) -> tuple[np.ndarray | None, float | None]:
    """Return how experts of a layer run together with those of the next, (E, F) correlations and one alignment; None
    for the last layer."""
    if following is None or following.cross is None:
        return None, None
    after = following.views["routed"]
    across = significance.correlations(following.cross.numpy(), use.load, after.load, use.tokens)
    cross = following.cross.numpy() / use.tokens - np.outer(use.load / use.tokens, after.load / after.tokens)
    return across, significance.alignment(cross, use.covariance(), after.covariance())


def class_figures(use: UseSums, test: dict[str, np.ndarray], position: int) -> dict[str, Any]:
    """Return how often the texts of each class use each expert of a layer, and what classes explain of that."""
    experts = len(use.load)
    explained = significance.explained_variance(*use.classes["class"].arguments())
    times, discovered = test["times"][position], test["found"][position]
    return {
        "class_times": np.round(np.nan_to_num(times[:, :experts]), 3).tolist(),
        "class_found": discovered[:, :experts].astype(int).tolist(),
        "variance_explained": [None if np.isnan(share) else round(float(share), 4) for share in explained],
    }


def partners(correlations: np.ndarray) -> list[list[Any]]:
    """Return [expert, correlation] of those that most often run with an expert; correlations (E,)."""
    return [[int(i), round(float(correlations[i]), 3)] for i in (-correlations).argsort()[:3] if correlations[i] > 0]


def findings(test: dict[str, np.ndarray], position: int, expert: int, names: list[str]) -> list[dict[str, Any]]:
    """Return what an expert responds to, the strongest first."""
    times, p = test["times"][position, :, expert], test["p"][position, :, expert]
    which = np.flatnonzero(test["found"][position, :, expert])
    which = which[np.argsort(-times[which], kind="stable")][:SHOWN]
    return [{"name": names[i], "times": round(float(times[i]), 3), "p": float(f"{p[i]:.2g}")} for i in which]


def examples(layer: LayerSums, expert: int, tokenizer: PreTrainedTokenizerBase) -> list[list[list[Any]]]:
    """Return texts as lists of [token, whether it uses the expert], the one to which it adds most first."""
    best, texts = layer.examples, []
    for place in best.value[expert].argsort(descending=True).tolist():
        ids = [token for token in best.ids[expert, place].tolist() if token >= 0]
        if ids:
            fired = best.fired[expert, place].tolist()
            pieces = tokenizer.convert_ids_to_tokens(ids)
            texts.append([[piece, int(on)] for piece, on in zip(pieces, fired, strict=False)])
    return texts


def flag_super_(layers: list[dict[str, Any]]) -> None:
    """Mark the experts whose largest output is extreme among all of the model."""
    median = float(np.median([expert["largest_output"] for layer in layers for expert in layer["experts"]]))
    for layer in layers:
        for expert in layer["experts"]:
            expert["super"] = expert["largest_output"] > SUPER * max(median, 1e-12)
