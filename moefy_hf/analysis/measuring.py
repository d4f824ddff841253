"""One pass of texts through a MoEfied model: which experts tokens use, by the router, by what experts add, and in a
random split of the same neurons."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..measure.contexts import all_experts
from ..measure.profile import observed
from ..measure.router_inputs import RouterInputs, expert_mask
from ..modeling.ffn_sites import FfnSite
from .sums import Examples, Groups, NeuronSums, TextBatch, UseSums
from .texts import TextStream
from .words import KINDS, token_kinds

VIEWS = {
    "routed": "the experts that the router selects",
    "split": "as many experts, those that add most to the FFN's output",
    "random": "the same, but neurons are put into experts at random",
}


@dataclass
class Survey:
    """What a file holds: texts, tokens, how often each token id occurs (V,), texts of each class (C,)."""

    texts: int
    tokens: int
    ids: torch.Tensor
    classes: torch.Tensor


def survey(stream: TextStream, vocabulary: int, classes: int) -> Survey:
    """Count, without running the model.

    Raises:
        ValueError: there is no text.
    """
    found = Survey(0, 0, torch.zeros(vocabulary, dtype=torch.int64), torch.zeros(classes, dtype=torch.int64))
    for ids, labels in stream.windows():
        flat = torch.tensor([token for text in ids for token in text])
        found.texts, found.tokens = found.texts + len(ids), found.tokens + len(flat)
        found.ids += torch.bincount(flat, minlength=vocabulary)
        found.classes += torch.bincount(torch.tensor(labels), minlength=classes)
    if not found.tokens:
        raise ValueError(f"{stream.path} holds no text")
    return found


class Shuffled:
    """The labels of a file in random order, one text after the other: the control that must find nothing."""

    def __init__(self, counts: torch.Tensor, seed: int):
        self.left, self.generator = counts.double(), torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> torch.Tensor:
        drawn = []
        for _ in range(count):
            label = torch.multinomial(self.left, 1, generator=self.generator)
            self.left[label] -= 1
            drawn.append(label)
        return torch.cat(drawn)


def expert_norms(neurons: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """neurons (T, f), gram (E, m, m) of the experts' columns of `down` -> (T, E) L2 norm of what each expert adds."""
    experts = neurons.unflatten(-1, gram.shape[:2]).transpose(0, 1)  # (E, T, m)
    return ((experts @ gram) * experts).sum(-1).clamp_min(0).sqrt().t()


def grams(down: torch.Tensor, experts: int) -> torch.Tensor:
    """down (d, f) -> (E, m, m)"""
    columns = down.float().unflatten(1, (experts, -1)).permute(1, 2, 0)  # (E, m, d)
    return columns @ columns.transpose(1, 2)


def largest(norms: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """norms (T, E), counts (T,) -> (T, E) bool: each token's `counts` largest."""
    order = norms.argsort(-1, descending=True)
    chosen = torch.arange(norms.shape[1], device=norms.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


class LayerSums:
    """Everything that is summed over tokens at one FFN."""

    def __init__(self, site: FfnSite, slots: dict[str, int], classes: dict[str, int], length: int, seed: int):
        experts, neurons = site.act.num_experts, site.sizes[1]
        self.site, self.selection = site, site.act.selection
        self.order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
        down = site.weights().down.detach()
        self.grams = {"split": grams(down, experts), "random": grams(down[:, self.order], experts)}
        self.views = {view: UseSums(experts, slots, classes) for view in VIEWS}
        self.neurons, self.examples = NeuronSums(neurons, experts, classes), Examples(experts, length)
        self.cross: torch.Tensor | None = None  # (E of the layer before, E) tokens that use both

    def update_(self, x: torch.Tensor, neurons: torch.Tensor, batch: TextBatch) -> torch.Tensor:
        """x (T, d) that the router reads, neurons (T, f) of all experts -> (T, E) float: the experts it selects."""
        act, dense = self.site.act, self.site.act.selection
        act.selection = self.selection  # the model runs all experts; what would it select?
        try:
            keep = expert_mask(act, x)
        finally:
            act.selection = dense
        keep = torch.ones(len(x), act.num_experts, dtype=torch.bool) if keep is None else keep
        neurons = neurons.float()
        norms = {
            "split": expert_norms(neurons, self.grams["split"]),
            "random": expert_norms(neurons[:, self.order], self.grams["random"]),
        }
        used = {"routed": keep} | {view: largest(each, keep.sum(-1)) for view, each in norms.items()}
        on_cpu = {view: each.cpu().float() for view, each in used.items()}
        for view, each in on_cpu.items():
            self.views[view].update_(each, batch)
        self.neurons.update_(neurons.cpu(), norms["split"].cpu(), batch)
        self.examples.update_(on_cpu["routed"], norms["split"].cpu(), batch)
        return on_cpu["routed"]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: TextStream,
    found: Survey,
    words: torch.Tensor,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[LayerSums]:
    """One `LayerSums` per routed FFN. `words` (M,): the token ids that are tested one by one."""
    sites = model.moe_sites()
    vocabulary = len(found.ids)
    number = torch.full((vocabulary,), -1)
    number[words] = torch.arange(len(words))
    kinds, plain = token_kinds(tokenizer, vocabulary), torch.ones(vocabulary, dtype=torch.bool)
    plain[[each for each in tokenizer.all_special_ids if each < vocabulary]] = False
    slots = {"token": len(words), "kind": len(KINDS)}
    classes = {name: len(found.classes) for name in ("class", "shuffled")} if stream.labelled else {}
    layers = [LayerSums(site, slots, classes, stream.max_length, seed + i) for i, site in enumerate(sites)]
    shuffled, reading = Shuffled(found.classes, seed), RouterInputs(sites)
    batch: TextBatch
    before: torch.Tensor

    def seen(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        nonlocal before
        used = layers[position].update_(reading.of(position, x), neurons, batch)
        if position:
            cross, pairs = layers[position].cross, (before.t() @ used).double()
            layers[position].cross = pairs if cross is None else cross + pairs
        before = used

    bar = tqdm(total=found.tokens, unit="token", unit_scale=True, desc="analyze", disable=not progress)
    everything = all_experts(model)
    with bar, everything, observed(model, sites, seen) as run:
        for rows in stream:
            labels = rows.pop("labels")
            ids, text, place = flat(rows)
            groups = {
                "token": Groups.of(text, number[ids], len(words)),
                "kind": Groups.of(text, kinds[ids], len(KINDS)),
            }
            given = {"class": labels, "shuffled": shuffled.draw(len(labels))} if stream.labelled else {}
            lengths = rows["attention_mask"].sum(1)
            batch = TextBatch(text, place, lengths, rows["input_ids"], plain[ids], groups, given)
            run(rows)
            bar.update(len(ids))
    return layers


def flat(rows: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, text and place in it of a padded batch's tokens, (T,) each."""
    text, place = rows["attention_mask"].nonzero(as_tuple=True)
    return rows["input_ids"][text, place], text, place


@torch.no_grad()
def measure_load(model: PreTrainedModel, stream: TextStream) -> list[list[float]]:
    """For each routed FFN, how many tokens its router sends to each expert as the model runs."""
    sites = model.moe_sites()
    loads = [torch.zeros(site.act.num_experts, dtype=torch.float64) for site in sites]
    reading = RouterInputs(sites)

    def seen(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        keep = expert_mask(sites[position].act, reading.of(position, x))
        loads[position] += len(x) if keep is None else keep.sum(0).double().cpu()

    with observed(model, sites, seen) as run:
        for rows in stream:
            rows.pop("labels")
            run(rows)
    if not loads[0].sum():
        raise ValueError(f"{stream.path} holds no text")
    return [load.tolist() for load in loads]
