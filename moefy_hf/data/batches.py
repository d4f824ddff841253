"""Texts as padded batches, and what a model can take of them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .texts import Row, Texts, say

IGNORED = -100  # a label that no loss counts


class TextBatches:
    """Makes padded batches of texts in a seeded order; they can be read any number of times.

    Targets, where the texts have some, become `labels`, of which an encoder-decoder makes what its decoder reads.

    Args:
        texts: the texts, with pairs, labels and targets as `Texts`, or alone in a list.
        tokenizer: of the model; it stays as it is.
        labels: one class id per text, instead of those of `texts`; or "next", for language models, whose labels are
            the tokens themselves.
        max_length: tokens of a text, at most; how many texts were cut is said after the first pass.
        seed: of the order.
        batch_size: texts of a batch.
        decoder_start: for encoder-decoders: the token that their decoder reads first, before the tokens of the text;
            of no use where there are targets.
        cut: counts the texts that were cut, where others of the same texts do, too.

    Example:
        >>> batches = TextBatches(["one text", "another"], tokenizer, max_length=64)
    """

    def __init__(
        self,
        texts: Sequence[str] | Texts,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: list[int] | str | None = None,
        max_length: int = 256,
        seed: int = 0,
        batch_size: int = 16,
        decoder_start: int | None = None,
        cut: "CutTexts | None" = None,
    ):
        self.texts = texts if isinstance(texts, Texts) else Texts(list(texts))
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.labels = self.texts.labels if labels is None else labels
        self.max_length, self.decoder_start = max_length, decoder_start
        self.tokenizer = padding(tokenizer)
        self.cut = cut or CutTexts(self.tokenizer, max_length)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        with self.cut:
            for rows in self.batches:
                yield self.batch(self.texts.select(rows), rows)

    def batch(self, part: Texts, rows: list[int]) -> dict[str, torch.Tensor]:
        """Return the texts at these positions as a batch: tensors (B, T), and labels (B,) or (B, T)."""
        limits: dict[str, Any] = {"truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        limits |= {"padding": True, "padding_side": "right"}
        batch = dict(self.tokenizer(part.texts, part.pairs, **limits))
        self.cut.count(part, batch["attention_mask"].sum(1).tolist())
        if part.targets is not None:
            targets = self.tokenizer(text_target=part.targets, **limits)
            batch["labels"] = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
        elif self.decoder_start is not None:
            for name, first in (("input_ids", self.decoder_start), ("attention_mask", 1)):
                start = torch.full_like(batch[name][:, :1], first)
                batch[f"decoder_{name}"] = torch.cat([start, batch[name][:, :-1]], 1)
        if self.labels == "next":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif self.labels is not None and part.targets is None:
            batch["labels"] = torch.tensor([self.labels[row] for row in rows])
        return batch


class CutTexts:
    """Counts the texts that were longer than a model is given, in the first pass over them, and says how many.

    Args:
        tokenizer: that cut them.
        max_length: tokens, at most.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.read = self.cut = self.passes = 0

    def __enter__(self) -> "CutTexts":
        self.passes += 1
        return self

    def __exit__(self, *error: object) -> None:
        if self.passes == 1 and self.cut:
            say(f"{self.cut} of {self.read} texts were cut to {self.max_length} tokens (--max_length)")
        self.passes += 1  # and never again

    def count(self, part: Texts, lengths: Sequence[int]) -> None:
        """Count texts that were tokenised to these lengths: only those as long as is allowed can have been cut."""
        if self.passes > 1:
            return
        self.read += len(part)
        if full := [row for row, length in enumerate(lengths) if length >= self.max_length]:
            these = part.select(full)
            whole = self.tokenizer(these.texts, these.pairs, verbose=False)["input_ids"]
            self.cut += sum(len(ids) > self.max_length for ids in whole)


class TokenBudget:
    """Says when rows hold enough tokens, as a model is given them.

    Args:
        tokenizer: of the model.
        max_length: tokens of a text, at most.
        tokens: how many are enough.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, tokens: int):
        self.tokenizer, self.max_length, self.left = tokenizer, max_length, tokens

    def spent(self, rows: Sequence[Row]) -> bool:
        """Return whether these rows, after all earlier ones, are enough."""
        part = Texts.of(rows)
        ids = self.tokenizer(part.texts, part.pairs, truncation=True, max_length=self.max_length)["input_ids"]
        self.left -= sum(map(len, ids))
        return self.left <= 0


def padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy that can pad: where there is no token for that, with the one that ends texts."""
    tokenizer = copy.deepcopy(tokenizer)  # the caller's is saved as it came
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def decoder_start_of(model: PreTrainedModel) -> int | None:
    """Return the token that an encoder-decoder's decoder begins with; None for models that read texts as they are."""
    config = model.config
    if not config.is_encoder_decoder or model._get_name().endswith(("Classification", "Answering")):
        return None
    values = config.to_dict()
    starts = (values.get(f"{name}_token_id") for name in ("decoder_start", "bos", "pad"))
    return next((token for token in starts if token is not None), 0)


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Return the tokens of a text, at most: as many as asked for, or as model and tokenizer can take.

    Args:
        model: that reads the texts.
        tokenizer: of the model.
        max_length: as many as asked for.
    """
    limits = [max_length, tokenizer.model_max_length]
    if positions := getattr(model.config, "max_position_embeddings", None):
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:  # RoBERTa and its relatives count from behind the padding token's id
                limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)
