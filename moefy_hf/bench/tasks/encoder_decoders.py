"""An encoder-decoder's pass over a text, and what it writes."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ...measure.batches import unlabelled
from ..engines.base import Batch, EncoderDecoder
from .base import CHECKED_AT_ONCE, Task, Timed, median_tokens


class EncoderDecoderTask(Task):
    """A pass of the encoder, and generation: exact matches with targets, else with what the dense model writes."""

    def read(self) -> None:
        numbered = replace(self.texts, labels=list(range(len(self.texts))), targets=None)
        self.numbered = list(self.in_batches(numbered, CHECKED_AT_ONCE))
        self.sized = {size: self.full_batches(size) for size in self.reading.batch_sizes}

    @property
    def batches(self) -> list[Batch]:
        return [unlabelled(batch) for batch in self.numbered]

    def quality(self, running: Mapping[str, EncoderDecoder], most: int | None = None) -> tuple[str, dict[str, float]]:
        found: dict[str, list[str]] = {name: [] for name in running}
        numbered = self.numbered[:most]
        for batch in self.bar(numbered):
            for name, model in running.items():
                ids = model.generate(unlabelled(batch), self.reading.new_tokens)
                found[name] += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        right = next(iter(found.values()))
        targets = self.texts.targets
        if targets is not None:
            right = [targets[row] for batch in numbered for row in batch["labels"].tolist()]
        shares = {name: sum(map(str.__eq__, texts, right)) / len(right) for name, texts in found.items()}
        return "exact match" if targets is not None else "agreement", shares

    def times(self, running: Mapping[str, EncoderDecoder]) -> list[Timed]:
        found, new = [], self.reading.new_tokens
        for size, batches in self.sized.items():
            encode = [{name: partial(model.encode, batch) for name, model in running.items()} for batch in batches]
            taken = self.turns(f"encoder, batches of {size}", encode)
            found.append(Timed("forward", size, median_tokens(batches), taken))
        for size, batches in self.sized.items():
            write = [
                {name: partial(model.generate, batch, new, new) for name, model in running.items()}
                for batch in batches
            ]
            found.append(Timed("generate", size, size * new, self.turns(f"writing, batches of {size}", write)))
        return found
