"""Fine-tune an encoder to tag words, MoEfy it, and measure quality and time against compute.

    moefy train token_classification --config recipes/configs/minilm_oanc/moefication.yaml

The data have a list of words and one of tags in each row, or are files in the form of CoNLL: a word and its tag in a
line, an empty line between texts. A word's first token carries its tag. The stages are those of moefy train
classification. scores_*.json hold the accuracy of tags; with tags like B-PER also precision, recall and F1 of entities
(pip install 'moefy-hf[tokens]'):

    ... --model_name_or_path google-bert/bert-base-cased --dataset_name eriktks/conll2003 --tags_column ner_tags
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...errors import MoefyError
from .. import arguments as of
from ..data import encoded_splits, load_splits, load_tokenizer, sampled
from ..inputs import resolve
from ..run import Run
from ..scores import Metrics
from ..settings import Arguments
from ..stages import Stages
from .base import Task, load_dense

ENDINGS = (".txt", ".conll", ".iob", ".iob2", ".bio")  # of files in the form of CoNLL
UNTAGGED = -100  # label of a token that has no tag: losses leave it out


def load(arguments: Arguments, stages: Stages) -> Run:
    """Load tagged texts.

    Raises:
        ValueError: bad settings or data.
    """
    tokenizer = load_tokenizer(arguments.model)
    splits, names = load_tokens(arguments[of.TokenDataArguments], tokenizer)
    judge = Metrics(arguments[of.MetricArguments].metrics, sample=[names])
    pad = DataCollatorForTokenClassification(tokenizer)

    def shown(found: EvalPrediction) -> dict[str, float]:
        return judge(*tag_lists(np.asarray(found.predictions).argmax(-1), found.label_ids, names))

    return Run(
        arguments,
        stages,
        splits,
        names,
        tokenizer,
        AutoModelForTokenClassification,
        judge,
        predict=tags,
        collator=pad,
        task_type="TOKEN_CLS",
        compute_metrics=shown,
    )


def load_tokens(data: of.TokenDataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[DatasetDict, list[str]]:
    """Return tokenised train, validation and test splits with `labels`, and the names of the tags.

    Raises:
        MoefyError: a split or column is missing, a row has not one tag for each word, a tag is in no training row, or
            the tokenizer does not know which token is of which word.
    """
    if not tokenizer.is_fast:
        raise MoefyError(f"{type(tokenizer).__name__} cannot tell which word a token is of: a fast tokenizer can")
    columns = words, tagged = data.tokens_column, data.tags_column
    splits = {"train": "train", "validation": data.validation_split, "test": data.test_split}
    raw = load_splits(data, splits.values(), columns, read_conll(Path(resolve(data.dataset_name)), columns))
    feature = raw["train"].features[tagged]
    kind = getattr(feature, "feature", None)
    names = kind.names if isinstance(kind, ClassLabel) else None
    known = names or sorted({str(tag) for row in raw["train"][tagged] for tag in listed(row)})
    index = {name: position for position, name in enumerate(known)}

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [listed(row) for row in rows[words]]
        encoded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=data.max_seq_length)
        labels = []
        for number, (text, row) in enumerate(zip(texts, map(listed, rows[tagged]), strict=True)):
            if len(text) != len(row):
                raise MoefyError(
                    f"{data.dataset_name}: {len(text)} words have {len(row)} tags: {' '.join(text)!r:.80}"
                )
            try:
                ids = row if names else [index[str(tag)] for tag in row]
            except KeyError as error:
                raise MoefyError(
                    f"{data.dataset_name} has the tag {error}, which no training row has: {', '.join(known)}"
                ) from None
            labels.append(list(first_tokens(encoded.word_ids(number), ids)))
        return {**encoded, "labels": labels}

    for use, split in splits.items():
        raw[split] = sampled(raw[split], data.max_train_samples if use == "train" else data.max_eval_samples)
    return encoded_splits(raw, splits, encode), known


def listed(row: str | Sequence[Any]) -> list[Any]:
    """Return the words or tags of a row; those in a text have spaces between them, as csv files need."""
    return row.split() if isinstance(row, str) else list(row)


def first_tokens(words: Iterable[int | None], labels: Sequence[int]) -> Iterator[int]:
    """Give a word's label to its first token, and `UNTAGGED` to the others and to special tokens."""
    before = None
    for word in words:
        yield UNTAGGED if word is None or word == before else labels[word]
        before = word


def read_conll(folder: Path, columns: tuple[str, str]) -> DatasetDict | None:
    """Read the files of a folder that are in the form of CoNLL, a split each; None where it has none.

    The word is the first of a line, its tag the last. Documents' marks and comments like "# id = 3" are left out.

    Raises:
        MoefyError: a line without a tag.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS) if folder.is_dir() else []
    found = {}
    for path in files:
        rows: list[list[list[str]]] = [[]]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            parts = line.split()
            if not parts or parts[0] == "-DOCSTART-":
                rows.append([])
            elif not (line.startswith("# ") and " = " in line):
                if len(parts) < 2:
                    raise MoefyError(f"{path.name}, line {number}: a word and its tag are needed, got {line!r:.80}")
                rows[-1].append([parts[0], parts[-1]])
        texts = [list(zip(*row, strict=True)) for row in rows if row]
        found[path.stem] = Dataset.from_dict(
            {column: [list(text[part]) for text in texts] for part, column in enumerate(columns)}
        )
    return DatasetDict(found) if found else None


def tag_lists(best: Any, labels: Any, names: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the names of predicted and right tags of every text, from ids (B, T) and labels (B, T)."""
    pairs = [
        [(names[found], names[right]) for found, right in zip(*row, strict=True) if right != UNTAGGED]
        for row in zip(np.asarray(best).tolist(), np.asarray(labels).tolist(), strict=True)
    ]
    return [[found for found, _ in row] for row in pairs], [[right for _, right in row] for row in pairs]


@torch.no_grad()
def tags(run: Run, model: PreTrainedModel) -> tuple[list[list[str]], list[list[str]]]:
    """Return the most likely tag and the right one of every held-out word."""
    found: list[list[str]] = []
    right: list[list[str]] = []
    with run.autocast():
        for batch in tqdm(run.held_out(), desc="score", unit="batch"):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            lists = tag_lists(model(**batch).logits.argmax(-1).cpu(), batch["labels"].cpu(), run.names)
            found, right = found + lists[0], right + lists[1]
    return found, right


TASK = Task(
    __doc__,
    (of.ClassifierArguments, of.TokenDataArguments, of.MetricArguments, of.ScheduleArguments),
    load,
    load_dense,
    metric="seqeval",
)
