"""Texts as blocks of tokens for language models: tokenised, joined, and cut into equal parts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, load_dataset
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MoefyError
from ..measure.metrics import Quality, predictions
from .arguments import ContinuationArguments, HeldOutArguments, ProseDataArguments
from .inputs import PREFIX, public, resolve
from .run import Run
from .stages import write_json
from .steps import budgets

KEPT = 8  # blocks of the training texts that nothing is fitted on


def load_prose(
    data: ProseDataArguments, held_out: HeldOutArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> DatasetDict:
    """Return blocks with `input_ids`: "train", "validation" (of the same texts), and each held-out text by its name.

    Raises:
        MoefyError: a number out of range, a missing split or column (what there is is named), or too little text.
    """
    for part, name in ((data, "max_seq_length"), (data, "train_tokens"), (held_out, "held_out_tokens")):
        if getattr(part, name) < 2:
            raise MoefyError(f"{name} must be at least 2, got {getattr(part, name)}")
    length = data.max_seq_length
    train = blocks(data, data.dataset_name, data.train_split, tokenizer, data.train_tokens // length + KEPT, seed)
    if len(train) < 2 * KEPT:
        raise MoefyError(
            f"{' and '.join(data.dataset_name)}: {len(train)} blocks of {length} tokens within "
            f"train_tokens={data.train_tokens} are too few, at least {2 * KEPT} are needed"
        )
    splits = {"train": train.select(range(KEPT, len(train))), "validation": train.select(range(KEPT))}
    places = [([name], "train") for name in held_out.held_out_name]
    places = places or [(data.dataset_name[:1], split) for split in held_out.held_out_splits]
    for names, split in places:
        key = short(names[0]) if held_out.held_out_name else f"{short(names[0])}-{split}"
        if key in splits:
            raise MoefyError(f"held-out texts need names of their own, and {key!r} is taken")
        splits[key] = blocks(data, names, split, tokenizer, max(1, held_out.held_out_tokens // length), 0)
        if not len(splits[key]):
            raise MoefyError(f"{names[0]}, {split}, has no block of {length} tokens to measure on")
    return DatasetDict(splits)


def short(name: str) -> str:
    return Path(name.removeprefix(PREFIX)).stem


def blocks(
    data: ProseDataArguments,
    names: Sequence[str],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
) -> Dataset:
    """At most `count` blocks, drawn at random; of a stream the first of shuffled texts, as many of each name."""
    found = []
    for name in names:
        packed = pack(load_texts(data, name, split), data.text_column, tokenizer, data.max_seq_length, seed)
        if isinstance(packed, IterableDataset):
            part = [row["input_ids"] for row in packed.take(-(-count // len(names)))]
            packed = Dataset.from_dict({"input_ids": part})
        found.append(packed)
    whole = concatenate_datasets(found)
    return whole.shuffle(seed=seed).select(range(min(count, len(whole))))


def load_texts(data: ProseDataArguments, name: str, split: str) -> Dataset | IterableDataset:
    """One data set's split; each .txt file is one text."""
    path = Path(resolve(name))
    files = sorted(map(str, path.glob("*.txt"))) if path.is_dir() else [str(path)] if path.suffix == ".txt" else []
    if files:
        raw: Any = load_dataset("text", data_files=files, sample_by="document", streaming=data.streaming)
    else:
        raw = load_dataset(str(path), data.dataset_config_name, streaming=data.streaming)
    if split not in raw:
        raise MoefyError(f"{name} has no split {split!r}; it has {', '.join(raw)}")
    columns = raw[split].column_names or list(next(iter(raw[split])))
    if data.text_column not in columns:
        raise MoefyError(f"split {split!r} of {name} has no column {data.text_column!r}; it has {', '.join(columns)}")
    return raw[split].select_columns([data.text_column])


def pack(texts: Any, column: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Any:
    """Texts one after the other, each with the end-of-text token, cut into blocks; what is left over is dropped."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        ids: list[int] = []
        for text in tokenizer(rows[column])["input_ids"]:
            ends = tokenizer.eos_token_id is None or text[-1:] == [tokenizer.eos_token_id]
            ids += text if ends else [*text, tokenizer.eos_token_id]
        return {"input_ids": [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]}

    settings = {"batched": True, "remove_columns": [column]}
    if isinstance(texts, IterableDataset):
        return texts.shuffle(seed=seed, buffer_size=1000).map(encode, **settings)
    return texts.map(encode, **settings, desc="tokenize and pack")


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """(B, length): every token is to be predicted from those before it."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass
class ProseRun(Run):
    """A run that measures on texts of their own."""

    def held_out(self, rows: int | None = None) -> Any:
        """Return all held-out texts together as batches, or so many of their blocks."""
        blocks = concatenate_datasets(list(self.held_out_texts().values()))
        return self.batches(blocks if rows is None else blocks.select(range(min(rows, len(blocks)))), False, 0)

    def held_out_texts(self) -> dict[str, Dataset]:
        """Return the blocks of each text that nothing was fitted on, by its name."""
        return {name: rows for name, rows in self.splits.items() if name not in ("train", "validation")}

    def measured_on(self) -> dict[str, str]:
        """Return names and splits of what `held_out` reads."""
        if names := self.arguments[HeldOutArguments].held_out_name:
            return {"data": public(names)}
        return {"data": public(self.arguments.data.dataset_name), "split": " and ".join(self.held_out_texts())}


@torch.no_grad()
def read_prose(run: ProseRun, name: str, path: Path) -> None:
    """Write a model's perplexity on each held-out text, at every budget, and greedy continuations at its own.

    The file has "perplexity": {"TEXT at BUDGET": ...}, and "continuations".
    """
    model = run.load(name).eval()
    found: dict[str, Any] = {"perplexity": {}, "continuations": continuations(run, model)}
    for budget in budgets(run, model):
        for text, rows in run.held_out_texts().items():
            quality = Quality()
            with run.autocast():
                for batch in run.batches(rows, False, 0):
                    logits, labels = predictions(model, batch)
                    quality.update_(logits, logits, labels)
            found["perplexity"][f"{text}{budget}"] = quality.figures()["perplexity"]
    write_json(path, found)


def continuations(run: ProseRun, model: PreTrainedModel) -> list[dict[str, str]]:
    """Return beginnings of blocks, as many of each text, and what a model goes on with."""
    asked, texts = run.arguments[ContinuationArguments], list(run.held_out_texts().values())
    generating, found = cast(GenerationMixin, model), []  # a causal language model
    for number in range(asked.generated_rows):
        rows, position = texts[number % len(texts)], number // len(texts)
        if position < len(rows):
            ids = torch.tensor([rows[position]["input_ids"][: asked.generated_tokens]], device=model.device)
            settings = {"max_new_tokens": asked.generated_tokens, "do_sample": False}
            with run.autocast():
                whole = generating.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            begun, gone_on = (run.processor.decode(part) for part in (ids[0], whole[0, ids.shape[1] :]))
            found.append({"beginning": begun, "continuation": gone_on})
    return found


def perplexities(run: ProseRun, name: str, path: Path) -> dict[str, dict[str, float]]:
    """Read what `read_prose` wrote: "NAME at BUDGET" -> text -> perplexity."""
    found: dict[str, dict[str, float]] = {}
    written = json.loads(path.read_text())["perplexity"]
    for text in run.held_out_texts():
        for key, value in written.items():
            if key == text or key.startswith((f"{text} at ", f"{text} as ")):
                found.setdefault(name + key[len(text) :], {})[text] = value
    return found
