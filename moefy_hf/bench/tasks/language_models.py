"""A language model's prompt and its greedy continuation."""

from collections.abc import Mapping
from functools import partial

import torch

from ...errors import MoefyError
from ...measure.batches import check_batch
from ...measure.metrics import Quality
from ..engines.base import Batch, LanguageModel
from ..timing import Call, take_turns
from .base import Task, Timed
from .inputs import TextInputs


class LanguageTask(Task):
    """A prompt, then tokens one by one: perplexity on the texts."""

    defaults = {"prompt": 64, "new_tokens": 32}
    inputs: TextInputs

    def read(self) -> None:
        inputs, rows = self.inputs, self.inputs.rows
        limits = {"truncation": True, "max_length": inputs.max_length}
        found = self.processor(rows.texts, rows.pairs, **limits)["input_ids"]
        with inputs.cut:
            inputs.cut.count(rows, [len(ids) for ids in found])
        self.ids = [torch.tensor(ids) for ids in found if len(ids) > 1]
        for batch in self.batches:
            check_batch(self.model, batch)
        size, rounds = self.options["prompt"], self.reading.rounds
        stream = torch.cat(self.ids or [torch.tensor([], dtype=torch.long)])
        self.prompts = list(stream[: len(stream) // size * size].view(-1, size)[:rounds])
        if not self.prompts:
            raise MoefyError(f"{inputs.data.name} has {len(stream)} tokens, too few for a prompt of {size}")

    @property
    def batches(self) -> list[Batch]:
        return [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in self.ids]

    def quality(self, running: Mapping[str, LanguageModel], most: int | None = None) -> tuple[str, dict[str, float]]:
        sums, dense = {name: Quality() for name in running}, next(iter(running))
        for ids in self.bar(self.ids[:most]):
            logits = {}
            for name, model in running.items():
                model.forget()
                logits[name] = model.read(ids)[:-1]
                sums[name].update_(logits[name], logits[dense], ids[1:])
        return "perplexity", {name: each.figures()["perplexity"] for name, each in sums.items()}

    def times(self, running: Mapping[str, LanguageModel]) -> list[Timed]:
        new, prompts = self.options["new_tokens"], self.prompts
        found = [Timed("prompt", 1, len(prompts[0]), self.turns("prompts", running, prompts, first))]

        def prepare(turn: int) -> dict[str, Call]:
            ids = prompts[turn % len(prompts)]
            return {name: partial(continued, model, first(model, ids), new) for name, model in running.items()}

        taken = take_turns(prepare, self.reading.rounds, self.reading.seconds, "new tokens", self.progress)
        return [*found, Timed("generate", 1, new, taken)]


def first(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Let a model read a prompt (n,); return the logits (1, V) after it."""
    model.forget()
    return model.read(ids, last=True)


def continued(model: LanguageModel, logits: torch.Tensor, tokens: int) -> torch.Tensor:
    """Let a model go on greedily for some tokens; return the logits (1, V) after them."""
    for _ in range(tokens):
        logits = model.read(logits.argmax(-1), last=True)
    return logits
