"""One pass of texts through a MoEfied model: which experts tokens use, by the router, by what experts add, and in a
random split of the same neurons."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import MoefyError
from ..loading import MoefiedModel, routed
from ..measure.contexts import all_experts
from ..measure.hooks import run_with_hooks
from ..measure.progress import token_bar
from ..measure.router_inputs import RouterInputs, select_experts
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
    """What a file holds.

    Attributes:
        texts, tokens: how many.
        ids: (V,) how often each token id occurs.
        classes: (C,) texts of each class.
    """

    texts: int
    tokens: int
    ids: torch.Tensor
    classes: torch.Tensor


def survey_texts(stream: TextStream, vocabulary: int, classes: int) -> Survey:
    """Count what a file holds, without running the model.

    Args:
        vocabulary, classes: how many token ids and classes there are.

    Raises:
        MoefyError: there is no text.
    """
    survey = Survey(0, 0, torch.zeros(vocabulary, dtype=torch.int64), torch.zeros(classes, dtype=torch.int64))
    for encoded, labels in stream.windows():
        ids = encoded["input_ids"]
        flat = torch.tensor([token for text in ids for token in text])
        survey.texts, survey.tokens = survey.texts + len(ids), survey.tokens + len(flat)
        survey.ids += torch.bincount(flat, minlength=vocabulary)
        survey.classes += torch.bincount(torch.tensor(labels), minlength=classes)
    if not survey.tokens:
        raise MoefyError(f"{stream.path} holds no text")
    return survey


class Shuffled:
    """The labels of a file in random order, one text after the other: the control that must find nothing.

    Args:
        counts: (C,) texts of each class.
    """

    def __init__(self, counts: torch.Tensor, seed: int):
        self.left, self.generator = counts.double(), torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> torch.Tensor:
        """Return the labels (count,) of the next texts."""
        drawn = []
        for _ in range(count):
            label = torch.multinomial(self.left, 1, generator=self.generator)
            self.left[label] -= 1
            drawn.append(label)
        return torch.cat(drawn)


def expert_norms(neurons: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return (T, E), the L2 norm of what each expert adds.

    Args:
        neurons: (T, f).
        gram: (E, m, m), of each expert's columns of `down`.
    """
    experts = neurons.unflatten(-1, gram.shape[:2]).transpose(0, 1)  # (E, T, m)
    return ((experts @ gram) * experts).sum(-1).clamp_min(0).sqrt().t()


def grams(down: torch.Tensor, experts: int) -> torch.Tensor:
    """Return the Gram matrices (E, m, m) of the experts' columns of down (d, f)."""
    columns = down.float().unflatten(1, (experts, -1)).permute(1, 2, 0)  # (E, m, d)
    return columns @ columns.transpose(1, 2)


def largest(norms: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return (T, E) bool, each token's `counts` (T,) largest of norms (T, E)."""
    order = norms.argsort(-1, descending=True)
    chosen = torch.arange(norms.shape[1], device=norms.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


class LayerSums:
    """Everything that is summed over tokens at one FFN.

    Args:
        slots, classes: how many there are, by name.
        length: tokens of the longest text.
        seed: of the random split.
    """

    def __init__(self, site: FfnSite, slots: dict[str, int], classes: dict[str, int], length: int, seed: int):
        self.site, self.act, neurons = site, routed(site), site.sizes[1]
        experts, self.selection = self.act.num_experts, self.act.selection
        self.order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
        down = site.weights().down.detach()
        self.grams = {"split": grams(down, experts), "random": grams(down[:, self.order], experts)}
        self.views = {view: UseSums(experts, slots, classes) for view in VIEWS}
        self.neurons, self.examples = NeuronSums(neurons, experts, classes), Examples(experts, length)
        self.cross: torch.Tensor | None = None  # (E of the layer before, E) tokens that use both

    def update_(self, x: torch.Tensor, neurons: torch.Tensor, batch: TextBatch) -> torch.Tensor:
        """Add a batch, and return (T, E) float, which experts the router selects.

        Args:
            x: (T, d), what the router reads.
            neurons: (T, f), of all experts.
        """
        act, dense = self.act, self.act.selection
        act.selection = self.selection  # the model runs all experts; what would it select?
        try:
            selected = select_experts(act, x)
        finally:
            act.selection = dense
        expert_mask = torch.ones(len(x), act.num_experts, dtype=torch.bool) if selected is None else selected
        neurons = neurons.float()
        norms = {
            "split": expert_norms(neurons, self.grams["split"]),
            "random": expert_norms(neurons[:, self.order], self.grams["random"]),
        }
        used = {"routed": expert_mask} | {view: largest(norm, expert_mask.sum(-1)) for view, norm in norms.items()}
        on_cpu = {view: mask.cpu().float() for view, mask in used.items()}
        for view, mask in on_cpu.items():
            self.views[view].update_(mask, batch)
        self.neurons.update_(neurons.cpu(), norms["split"].cpu(), batch)
        self.examples.update_(on_cpu["routed"], norms["split"].cpu(), batch)
        return on_cpu["routed"]


class Vocabulary:
    """What is tested of each token id: its number among some words, and its kind.

    Args:
        size: V, how many token ids there are.
        words: (M,) those that are tested one by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, words: torch.Tensor):
        self.number = torch.full((size,), -1)
        self.number[words] = torch.arange(len(words))
        self.kinds, self.plain = token_kinds(tokenizer, size), torch.ones(size, dtype=torch.bool)
        self.plain[[special for special in tokenizer.all_special_ids if special < size]] = False
        self.slots = {"token": len(words), "kind": len(KINDS)}

    def batch(self, rows: Mapping[str, Any], labels: dict[str, torch.Tensor]) -> TextBatch:
        """Return what all FFNs share about a padded batch; `labels` are class ids (B,), by the name of the classes."""
        text, place = rows["attention_mask"].nonzero(as_tuple=True)
        ids = rows["input_ids"][text, place]  # (T,)
        groups = {
            "token": Groups.of(text, self.number[ids], self.slots["token"]),
            "kind": Groups.of(text, self.kinds[ids], self.slots["kind"]),
        }
        lengths = rows["attention_mask"].sum(1)
        return TextBatch(text, place, lengths, rows["input_ids"], self.plain[ids], groups, labels)


@torch.no_grad()
def measure(
    model: MoefiedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: TextStream,
    survey: Survey,
    words: torch.Tensor,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[LayerSums]:
    """Run texts through a model with all its experts, and sum what each FFN does.

    Args:
        survey: of the same texts.
        words: (M,) token ids that are tested one by one.
        seed: of the random splits and the shuffled labels.

    Returns:
        one `LayerSums` per routed FFN.
    """
    sites = model.moe_sites()
    vocabulary = Vocabulary(tokenizer, len(survey.ids), words)
    classes = {name: len(survey.classes) for name in ("class", "shuffled")} if stream.labelled else {}
    layers = [LayerSums(site, vocabulary.slots, classes, stream.max_length, seed + i) for i, site in enumerate(sites)]
    shuffled, inputs = Shuffled(survey.classes, seed), RouterInputs(sites)
    batch: TextBatch
    before: torch.Tensor

    def see(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        nonlocal before
        used = layers[position].update_(inputs.of(position, x), neurons, batch)
        if position:
            cross, pairs = layers[position].cross, (before.t() @ used).double()
            layers[position].cross = pairs if cross is None else cross + pairs
        before = used
        bar.update(len(x) / len(sites))

    bar = token_bar(survey.tokens, "analyze", progress)
    with bar, all_experts(model), run_with_hooks(model, sites, see) as run:
        for rows in stream:
            labels = rows.pop("labels")
            given = {"class": labels, "shuffled": shuffled.draw(len(labels))} if stream.labelled else {}
            batch = vocabulary.batch(rows, given)
            run(rows)
    return layers


@torch.no_grad()
def measure_load(model: MoefiedModel, stream: TextStream) -> list[list[float]]:
    """Return for each routed FFN how many tokens its router sends to each expert as the model runs.

    Raises:
        MoefyError: there is no text.
    """
    sites = model.moe_sites()
    acts = [routed(site) for site in sites]
    loads = [torch.zeros(act.num_experts, dtype=torch.float64) for act in acts]
    inputs = RouterInputs(sites)

    def see(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        expert_mask = select_experts(acts[position], inputs.of(position, x))
        loads[position] += len(x) if expert_mask is None else expert_mask.sum(0).double().cpu()

    with run_with_hooks(model, sites, see) as run:
        for rows in stream:
            rows.pop("labels")
            run(rows)
    if not loads[0].sum():
        raise MoefyError(f"{stream.path} holds no text")
    return [load.tolist() for load in loads]
