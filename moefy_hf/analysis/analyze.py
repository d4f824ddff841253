"""What the experts of a MoEfied model respond to, and how much of that is there by chance."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MoefyError
from ..io import markdown, write_whole
from ..loading import MoefiedModel, check_moefied, routed
from ..modeling.section import Section
from . import significance
from .describe import describe, flag_super_
from .measuring import VIEWS, LayerSums, Survey, measure, survey_texts
from .texts import TextStream
from .words import KINDS, bare

WORDS = 1000  # token ids, the most frequent ones, that are tested one by one


@dataclass
class Analysis:
    """What `analyze` measured, as JSON can hold it.

    Attributes:
        facts: of the model, the texts and the tests.
        specialisation: a row for each way of choosing experts, see `VIEWS`.
        layers: the figures of each routed FFN, with those of its `experts`.
    """

    facts: dict[str, Any]
    specialisation: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return what `save` writes."""
        return {"facts": self.facts, "specialisation": self.specialisation, "layers": self.layers}

    def summary(self) -> dict[str, Any]:
        """Return what a checkpoint's facts hold: all but the single experts, and which of them respond to which class
        in the layer whose use classes explain best."""
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
        """Write a JSON file."""
        write_whole(Path(path), json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Read a file that `save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> str:
        """Return how specialised the experts are, as a Markdown table."""
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
        stream: the texts, with classes where they have some.
        rate: of false discoveries among the classes, tokens and kinds of words that experts are said to respond to.
        seed: of the random split and the shuffled labels that are measured beside.

    Raises:
        MoefyError: the model is not MoEfied, is an encoder-decoder or selects all experts; or there is no text.

    Example:
        stream = TextStream(TextSource("reviews.csv").open().rows(model, labels=True), tokenizer)
        print(analyze(model, tokenizer, stream).table())
    """
    model = check_moefied(model)
    if model.config.is_encoder_decoder:
        raise MoefyError("an encoder-decoder sees two texts at once; analyze takes models of one")
    if not 0 < rate < 1:
        raise MoefyError(f"the rate of false discoveries must lie between 0 and 1, got {rate}")
    if all(routed(site).computes_all for site in model.moe_sites()):
        raise MoefyError("every layer computes all its experts: choose a budget first, model.set_selection(k=0.2)")
    vocabulary = model.config.get_text_config().vocab_size
    survey = survey_texts(stream, vocabulary, len(label_names(model)) if stream.labelled else 1)
    words = survey.ids.argsort(descending=True, stable=True)[: min(WORDS, int((survey.ids > 0).sum()))]
    start = time.perf_counter()
    layers = measure(model, tokenizer, stream, survey, words, seed=seed, progress=progress)
    seconds = time.perf_counter() - start
    names = {
        "class": [label_names(model)[i] for i in sorted(label_names(model))],
        "token": [bare(piece) for piece in tokenizer.convert_ids_to_tokens(words.tolist())],
        "kind": list(KINDS),
    }
    tests = {view: tested(layers, view, rate) for view in VIEWS}
    descriptions = [describe(layers, i, tests["routed"], names, tokenizer) for i in range(len(layers))]
    flag_super_(descriptions)
    return Analysis(facts_of(model, stream, survey, seconds, rate), specialisation(layers, tests), descriptions)


def label_names(model: PreTrainedModel) -> dict[int, str]:
    """Return the names of the classes that a model knows, by id."""
    return {int(i): str(name) for i, name in (model.config.id2label or {}).items()}


def facts_of(model: MoefiedModel, stream: TextStream, survey: Survey, seconds: float, rate: float) -> dict[str, Any]:
    """Return what an analysis was of: `facts` of an `Analysis`; `seconds` it took, `rate` of false discoveries."""
    used = {name: int(survey.classes[i]) for i, name in label_names(model).items()} if stream.labelled else {}
    return {
        "model": model._get_name(),
        "data": stream.rows.name,
        "texts": survey.texts,
        "tokens": survey.tokens,
        "texts_of_class": used,
        "selection": Section(model.config).selection,
        "false_discovery_rate": rate,
        "fewest_texts": significance.FEWEST_TEXTS,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(survey.tokens / seconds),
        "threads": torch.get_num_threads(),
        "views": VIEWS,
    }


def tested(layers: list[LayerSums], view: str, rate: float) -> dict[str, dict[str, np.ndarray]]:
    """Test what experts respond to, over all layers together.

    Args:
        view: how experts are chosen, of `VIEWS`.
        rate: of false discoveries.

    Returns:
        for "class", "shuffled" (classes), "token" and "kind", as far as there are any: how many `times` as often an
        expert is used, the p-value `p`, and whether that is `found` to be no chance, each (L, things, E).
    """
    results: dict[str, dict[str, np.ndarray]] = {}
    for name in ("class", "shuffled", "token", "kind"):
        sums = [layer.views[view] for layer in layers]
        if name in sums[0].classes:
            excess = [significance.class_excess(*use.classes[name].arguments()) for use in sums]
        elif name in sums[0].slots:
            excess = [significance.token_excess(*use.slots[name].arguments()) for use in sums]
        else:
            continue
        width = max(times.shape[1] for times, _ in excess)  # layers may have different numbers of experts
        times, p = (np.stack([padded(pair[i], width) for pair in excess]) for i in (0, 1))
        results[name] = {"times": times, "p": p, "found": significance.false_discoveries(p, rate)}
    return results


def padded(values: np.ndarray, width: int) -> np.ndarray:
    """Return (things, width) from (things, E), nan where there is no expert."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=np.nan)


def specialisation(layers: list[LayerSums], tests: dict[str, dict]) -> list[dict[str, Any]]:
    """Return a row for each way of choosing experts: how many have a function, and how much of their use classes
    explain."""
    rows = []
    for view in VIEWS:
        row: dict[str, Any] = {"experts by": view}
        for name, title in (("class", "a class"), ("shuffled", "a shuffled class"), ("token", "a token")):
            if name in tests[view]:
                row[f"experts with {title}"] = float(tests[view][name]["found"].any(1).sum() / experts_of(layers))
        if "class" in tests[view]:
            for name, title in (("class", "classes"), ("shuffled", "shuffled classes")):
                explained = [
                    significance.explained_variance(*layer.views[view].classes[name].arguments()) for layer in layers
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
    """Return the mean over layers of `significance.shared_function`, of the model's experts, or of random ones.

    Args:
        name: of the classes, "class" or "shuffled".
    """
    shares = []
    for layer in layers:
        expert = torch.arange(layer.site.sizes[1]) // layer.act.expert_size
        if view == "random":
            expert = torch.empty_like(expert).scatter(0, layer.order, expert)
        counts = layer.views[view].classes[name].counts.numpy()
        shares.append(significance.shared_function(layer.neurons.classes[name].numpy(), counts, expert.numpy()))
    return float(np.mean(shares))


def experts_of(layers: list[LayerSums]) -> int:
    """Return how many experts all layers have."""
    return sum(layer.act.num_experts for layer in layers)
