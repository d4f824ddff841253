"""What the experts of a MoEfied model respond to, and how much of that is there by chance."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..io import markdown, write_whole
from ..loading import check_moefied
from . import significance as statistics
from .measuring import VIEWS, LayerSums, Survey, measure, survey
from .texts import TextStream
from .words import KINDS, bare

WORDS = 1000  # token ids, the most frequent ones, that are tested one by one
SHOWN = 8  # findings and partners listed per expert
SUPER = 10.0  # an expert is extreme where its largest output is so many times that of the median expert
OFTEN = 0.99  # share of tokens at which an expert counts as always on


@dataclass
class Analysis:
    """What `analyze` found, as JSON can hold it: `facts`, `specialisation` by view, and `layers`."""

    facts: dict[str, Any]
    specialisation: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "specialisation": self.specialisation, "layers": self.layers}

    def summary(self) -> dict[str, Any]:
        """For a checkpoint's facts: all but the single experts, and which of them respond to which class in the layer
        whose use classes explain best."""
        short: dict[str, Any] = {"facts": self.facts, "specialisation": self.specialisation}
        if "class_times" in self.layers[0]:
            explained = [np.nanmean(np.array(layer["variance_explained"], float)) for layer in self.layers]
            best = int(np.argmax(explained))
            layer = self.layers[best]
            times = np.where(np.array(layer["class_found"]) > 0, layer["class_times"], 1.0)
            seen, names = np.flatnonzero((times > 1).any(1)), list(self.facts["texts_of_class"])
            if len(seen):
                order = np.lexsort((-times[seen].max(0), times[seen].argmax(0)))
                short["strongest"] = {
                    "layer": best,
                    "classes": [names[i] for i in seen],
                    "experts": order.tolist(),
                    "times": times[seen][:, order].tolist(),
                }
        return short

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> str:
        """How specialised the experts are, as a Markdown table."""
        return markdown(self.specialisation)


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: TextStream,
    *,
    rate: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Run texts through a MoEfied model, all experts computed, and see which ones its routers would select.

    Args:
        rate: of false discoveries among the classes, tokens and kinds of words that experts are said to respond to.
        seed: of the random split and the shuffled labels that are measured beside.

    Raises:
        ValueError: the model is not MoEfied, is an encoder-decoder or selects all experts; or there is no text.
    """
    check_moefied(model)
    if model.config.is_encoder_decoder:
        raise ValueError("an encoder-decoder sees two texts at once; analyze takes models of one")
    if not 0 < rate < 1:
        raise ValueError(f"the rate of false discoveries must lie between 0 and 1, got {rate}")
    if all(site.act.computes_all for site in model.moe_sites()):
        raise ValueError("every layer computes all its experts: choose a budget first, model.set_selection(k=0.2)")
    found = survey(stream, model.config.vocab_size, len(label_names(model)) if stream.labelled else 1)
    words = found.ids.argsort(descending=True, stable=True)[: min(WORDS, int((found.ids > 0).sum()))]
    start = time.perf_counter()
    layers = measure(model, tokenizer, stream, found, words, seed=seed, progress=progress)
    seconds = time.perf_counter() - start
    names = {
        "class": [label_names(model)[i] for i in sorted(label_names(model))],
        "token": [bare(piece) for piece in tokenizer.convert_ids_to_tokens(words.tolist())],
        "kind": list(KINDS),
    }
    tests = {view: tested(layers, view, rate) for view in VIEWS}
    described = [describe(layers, i, tests["routed"], names, tokenizer) for i in range(len(layers))]
    flag_super_(described)
    return Analysis(facts(model, stream, found, seconds, rate), specialisation(layers, tests), described)


def label_names(model: PreTrainedModel) -> dict[int, str]:
    return {int(i): str(name) for i, name in (model.config.id2label or {}).items()}


def facts(model: PreTrainedModel, stream: TextStream, found: Survey, seconds: float, rate: float) -> dict[str, Any]:
    used = {name: int(found.classes[i]) for i, name in label_names(model).items()} if stream.labelled else {}
    return {
        "model": model._get_name(),
        "data": Path(stream.path).name,
        "texts": found.texts,
        "tokens": found.tokens,
        "texts_of_class": used,
        "selection": model.config.moefication["selection"],
        "false_discovery_rate": rate,
        "fewest_texts": statistics.FEWEST_TEXTS,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(found.tokens / seconds),
        "threads": torch.get_num_threads(),
        "views": VIEWS,
    }


def tested(layers: list[LayerSums], view: str, rate: float) -> dict[str, dict[str, np.ndarray]]:
    """For classes, shuffled classes, tokens and kinds: `times` as often, p-values `p`, and what is `found`, each
    (L, things, E). False discoveries are bounded over all layers together."""
    results: dict[str, dict[str, np.ndarray]] = {}
    for name in ("class", "shuffled", "token", "kind"):
        sums = [layer.views[view] for layer in layers]
        if name in sums[0].classes:
            each = [statistics.class_excess(*use.classes[name].arguments()) for use in sums]
        elif name in sums[0].slots:
            each = [statistics.token_excess(*use.slots[name].arguments()) for use in sums]
        else:
            continue
        width = max(times.shape[1] for times, _ in each)  # layers may have different numbers of experts
        times, p = (np.stack([padded(pair[i], width) for pair in each]) for i in (0, 1))
        results[name] = {"times": times, "p": p, "found": statistics.false_discoveries(p, rate)}
    return results


def padded(values: np.ndarray, width: int) -> np.ndarray:
    """(things, E) -> (things, width), nan where there is no expert."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=np.nan)


def specialisation(layers: list[LayerSums], tests: dict[str, dict]) -> list[dict[str, Any]]:
    """A row per way of choosing experts: how many have a function, and how much of their use classes explain."""
    rows = []
    for view in VIEWS:
        row: dict[str, Any] = {"experts by": view}
        for name, title in (("class", "a class"), ("shuffled", "a shuffled class"), ("token", "a token")):
            if name in tests[view]:
                row[f"experts with {title}"] = float(tests[view][name]["found"].any(1).sum() / experts_of(layers))
        if "class" in tests[view]:
            for name, title in (("class", "classes"), ("shuffled", "shuffled classes")):
                explained = [
                    statistics.explained_variance(*layer.views[view].classes[name].arguments()) for layer in layers
                ]
                row[f"variance that {title} explain"] = float(np.nanmean(np.concatenate(explained)))
            for name, title in (("class", "classes"), ("shuffled", "shuffled classes")):
                row[f"profile over {title} that neurons of an expert share"] = shared_profile(layers, view, name)
            strongest = np.where(tests[view]["class"]["found"], tests[view]["class"]["times"], 1.0).max(1)
            real = np.isfinite(tests[view]["class"]["p"]).any(1)
            row["strongest class, times as often"] = float(strongest[real].mean()) if real.any() else None
        rows.append(row)
    return rows


def shared_profile(layers: list[LayerSums], view: str, name: str) -> float:
    """Mean over layers of `statistics.shared_function`: of the model's own experts, or of random ones."""
    found = []
    for layer in layers:
        expert = torch.arange(layer.site.sizes[1]) // layer.site.act.expert_size
        if view == "random":
            expert = torch.empty_like(expert).scatter(0, layer.order, expert)
        counts = layer.views[view].classes[name].counts.numpy()
        found.append(statistics.shared_function(layer.neurons.classes[name].numpy(), counts, expert.numpy()))
    return float(np.mean(found))


def experts_of(layers: list[LayerSums]) -> int:
    return sum(layer.site.act.num_experts for layer in layers)


def describe(
    layers: list[LayerSums],
    position: int,
    tests: dict[str, dict[str, np.ndarray]],
    names: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """One layer: its figures, and its experts."""
    layer, use = layers[position], layers[position].views["routed"]
    load, active = use.load / use.tokens, layer.neurons.active.numpy() / layer.neurons.tokens
    within = statistics.correlations(use.pairs.numpy(), use.load, use.load, use.tokens)
    np.fill_diagonal(within, 0)
    following = layers[position + 1] if position + 1 < len(layers) else None
    found: dict[str, Any] = {
        "name": layer.site.name,
        "num_experts": len(load),
        "expert_size": layer.site.act.expert_size,
        "share": float(load.mean()),
        "load_entropy": statistics.entropy(use.load),
        "dead": int((use.load == 0).sum()),
        "always_on": int((load >= OFTEN).sum()),
        "active_neurons": float(active.mean()),
        "never_active_neurons": int((active == 0).sum()),
        "mostly_active_neurons": int((active > 0.5).sum()),
        "coactivation": np.round(within, 3).tolist(),
        "alignment_with_next": None,
    }
    across = None
    if following is not None and following.cross is not None:
        after = following.views["routed"]
        across = statistics.correlations(following.cross.numpy(), use.load, after.load, use.tokens)
        cross = following.cross.numpy() / use.tokens - np.outer(load, after.load / after.tokens)
        found["alignment_with_next"] = statistics.alignment(cross, use.covariance(), after.covariance())
    if "class" in use.classes:
        sums = use.classes["class"]
        explained = statistics.explained_variance(*sums.arguments())
        times, real = tests["class"]["times"][position], tests["class"]["found"][position]
        found["class_times"] = np.round(np.nan_to_num(times[:, : len(load)]), 3).tolist()
        found["class_found"] = real[:, : len(load)].astype(int).tolist()
        found["variance_explained"] = [None if np.isnan(each) else round(float(each), 4) for each in explained]
    norms = layer.neurons.norms.numpy() / layer.neurons.tokens
    found["experts"] = [
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
    return found


def partners(correlations: np.ndarray) -> list[list[Any]]:
    """[expert, correlation] of those that most often run with an expert."""
    return [[int(i), round(float(correlations[i]), 3)] for i in (-correlations).argsort()[:3] if correlations[i] > 0]


def findings(test: dict[str, np.ndarray], position: int, expert: int, names: list[str]) -> list[dict[str, Any]]:
    """What an expert responds to, the strongest first."""
    times, p = test["times"][position, :, expert], test["p"][position, :, expert]
    which = np.flatnonzero(test["found"][position, :, expert])
    which = which[np.argsort(-times[which], kind="stable")][:SHOWN]
    return [{"name": names[i], "times": round(float(times[i]), 3), "p": float(f"{p[i]:.2g}")} for i in which]


def examples(layer: LayerSums, expert: int, tokenizer: PreTrainedTokenizerBase) -> list[list[list[Any]]]:
    """Texts as lists of [token, whether it uses the expert], the one to which it adds most first."""
    kept = layer.examples
    texts = []
    for place in kept.value[expert].argsort(descending=True).tolist():
        ids = [each for each in kept.ids[expert, place].tolist() if each >= 0]
        if ids:
            fired = kept.fired[expert, place].tolist()
            pieces = tokenizer.convert_ids_to_tokens(ids)
            texts.append([[piece, int(on)] for piece, on in zip(pieces, fired, strict=False)])
    return texts


def flag_super_(layers: list[dict[str, Any]]) -> None:
    """Mark the experts whose largest output is extreme among all of the model."""
    median = float(np.median([expert["largest_output"] for layer in layers for expert in layer["experts"]]))
    for layer in layers:
        for expert in layer["experts"]:
            expert["super"] = expert["largest_output"] > SUPER * max(median, 1e-12)
