"""An encoder-decoder's pass over a text, and what it writes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import MoefyError
from ...measure.batches import unlabelled
from ..engines.base import Batch, EncoderDecoder
from .base import CHECKED_AT_ONCE, SIZES, TRIED, Task, Timed
from .inputs import TextInputs


class EncoderDecoderTask(Task):
    """A pass of the encoder, and generation: exact matches with targets, else with what the dense model writes."""

    defaults = {"batch_sizes": SIZES, "new_tokens": 32}
    inputs: TextInputs

    def chosen(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options: the prompt is the text, of so many tokens at most.

        Raises:
            MoefyError: that is said twice, or an option has no use.
        """
        given = self.reading
        if given.prompt is not None and given.max_length is not None:
            raise MoefyError("the prompt of an encoder-decoder is its text: give --generate or --max_length, not both")
        given = replace(given, prompt=None, max_length=given.max_length if given.prompt is None else given.prompt)
        return given.options(defaults, self.model)

    def read(self) -> None:
        rows = self.inputs.rows
        numbered = replace(rows, labels=list(range(len(rows))), targets=None)
        self.numbered = self.inputs.in_batches(numbered, CHECKED_AT_ONCE)
        self.sized = {size: self.full_batches(size) for size in self.options["batch_sizes"]}

    @property
    def batches(self) -> list[Batch]:
        return [unlabelled(batch) for batch in self.numbered[:TRIED]]

    def quality(self, running: Mapping[str, EncoderDecoder], most: int | None = None) -> tuple[str, dict[str, float]]:
        found: dict[str, list[str]] = {name: [] for name in running}
        numbered = self.numbered[:most]
        for batch in self.bar(numbered):
            for name, model in running.items():
                ids = model.generate(unlabelled(batch), self.options["new_tokens"])
                found[name] += [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        right = next(iter(found.values()))
        targets = self.inputs.rows.targets
        if targets is not None:
            right = [targets[row] for batch in numbered for row in batch["labels"].tolist()]
        shares = {name: sum(map(str.__eq__, texts, right)) / len(right) for name, texts in found.items()}
        return "exact match" if targets is not None else "agreement", shares

    def times(self, running: Mapping[str, EncoderDecoder]) -> list[Timed]:
        found, new = [], self.options["new_tokens"]
        for size, batches in self.sized.items():
            title = f"encoder, batches of {size}"
            taken = self.turns(title, running, batches, lambda model, batch: model.encode(batch))
            found.append(Timed("forward", size, self.inputs.amount(batches), taken))
        for size, batches in self.sized.items():
            title = f"writing, batches of {size}"
            taken = self.turns(title, running, batches, lambda model, batch: model.generate(batch, new, new))
            found.append(Timed("generate", size, size * new, taken))
        return found
