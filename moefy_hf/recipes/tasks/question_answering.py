"""Fine-tune an encoder to find answers in texts, MoEfy it, and measure quality and time against compute.

    moefy train question_answering --config recipes/configs/minilm_cloze/moefication.yaml

The data have the columns of SQuAD: a text, a question, and answers with their places in the text; or are SQuAD's json
files. Long texts are cut into windows that overlap. A question without answers is unanswerable. The stages are those
of moefy train classification. Quality in sweep.json is the accuracy of the answers' first and last tokens;
scores_*.json hold exact match and F1 of SQuAD, as shares:

    ... --model_name_or_path google-bert/bert-base-uncased --dataset_name rajpurkar/squad --test_split validation
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import MoefyError
from .. import arguments as of
from ..data import load_splits, load_tokenizer, sampled
from ..inputs import resolve
from ..run import Run
from ..scores import Metrics
from ..settings import Arguments
from ..stages import Stages
from .base import Task, load_dense

BEGINNINGS = {"train": "train", "dev": "validation", "val": "validation", "test": "test"}  # of SQuAD's file names
ONE = {"text": ["an answer"], "answer_start": [0]}


def load(arguments: Arguments, stages: Stages) -> Run:
    """Load questions.

    Raises:
        ValueError: bad settings or data.
    """
    data, tokenizer = arguments[of.QuestionDataArguments], load_tokenizer(arguments.model)
    raw = load_questions(data)
    splits = DatasetDict({use: windows(rows, data, tokenizer, use) for use, rows in raw.items()})
    judge = Metrics(
        arguments[of.MetricArguments].metrics,
        sample=[{"id": "0", "prediction_text": "an answer"}],
        expected=[{"id": "0", "answers": ONE}],
    )
    pad = partial(collate, tokenizer)

    return Run(
        arguments,
        stages,
        splits,
        [],
        tokenizer,
        AutoModelForQuestionAnswering,
        judge,
        predict=partial(answers, raw),
        collator=pad,
        task_type="QUESTION_ANS",
    )


def load_questions(data: of.QuestionDataArguments) -> DatasetDict:
    """Return train, validation and test rows with `context`, `question` and `answers`.

    Raises:
        MoefyError: a split or column is missing, a number is out of range, or an answer is not where it should be.
    """
    if not 0 <= data.doc_stride < data.max_seq_length:
        raise MoefyError(f"doc_stride must be less than max_seq_length {data.max_seq_length}, got {data.doc_stride}")
    columns = {data.context_column: "context", data.question_column: "question", data.answers_column: "answers"}
    splits = {"train": "train", "validation": data.validation_split, "test": data.test_split}
    raw = load_splits(data, splits.values(), columns, read_squad(Path(resolve(data.dataset_name))))
    found = DatasetDict()
    for use, split in splits.items():
        rows = raw[split].select_columns(list(columns))
        rows = rows.rename_columns({old: new for old, new in columns.items() if old != new})
        found[use] = sampled(rows, data.max_train_samples if use == "train" else data.max_eval_samples)
        for row in found[use]:
            check_answers(row, f"split {split!r} of {data.dataset_name}")
    return found


def check_answers(row: dict[str, Any], where: str) -> None:
    """Check that a row's answers are where it says.

    Raises:
        MoefyError: one is not.
    """
    if not isinstance(row["answers"], dict) or not {"text", "answer_start"} <= row["answers"].keys():
        raise MoefyError(f"{where}: answers are {{text: [...], answer_start: [...]}}, got {row['answers']!r:.80}")
    for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
        if row["context"][start : start + len(text)] != text:
            raise MoefyError(f"{where}: the answer {text!r:.80} is not at character {start} of its text")


def read_squad(folder: Path) -> DatasetDict | None:
    """Read the json files of a folder that have SQuAD's form; None where it has none.

    A file is of the split that its name begins with: train, dev or validation, test.
    """
    found: dict[str, Dataset] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        split = next((split for start, split in BEGINNINGS.items() if path.name.startswith(start)), path.stem)
        written = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(written, dict) and "data" in written:
            found[split] = Dataset.from_list([row for each in written["data"] for row in rows_of(each)])
    return DatasetDict(found) if found else None


def rows_of(article: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the questions of an article, which may be a row already, with their texts and answers."""
    if "paragraphs" not in article:
        return [article]
    return [
        {
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
        }
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def windows(rows: Dataset, data: of.QuestionDataArguments, tokenizer: PreTrainedTokenizerBase, use: str) -> Dataset:
    """Return windows of the texts, each with its question, and where the answer is: at the first token where not here.

    `row` is the number of the question, `offsets` (T, 2) the characters of each token of the text, -1 elsewhere.

    Raises:
        MoefyError: the tokenizer does not know which characters a token has.
    """
    if not tokenizer.is_fast:
        raise MoefyError(f"{type(tokenizer).__name__} cannot tell where in a text a token is: a fast tokenizer can")

    def encode(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        encoded = tokenizer(
            [question.strip() for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=data.max_seq_length,
            stride=data.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources, places = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        made: dict[str, list] = {"start_positions": [], "end_positions": [], "row": [], "offsets": []}
        for number, (source, offsets) in enumerate(zip(sources, places, strict=True)):
            parts = encoded.sequence_ids(number)
            offsets = [list(pair) if part == 1 else [-1, -1] for pair, part in zip(offsets, parts, strict=True)]
            start, end = position(offsets, batch["answers"][source])
            for name, value in zip(made, (start, end, numbers[source], offsets), strict=True):
                made[name].append(value)
        return {**encoded, **made}

    columns = rows.column_names
    return rows.map(encode, batched=True, with_indices=True, remove_columns=columns, desc=f"tokenize {use}")


def position(offsets: Sequence[Sequence[int]], right: dict[str, list]) -> tuple[int, int]:
    """Return the first and last token of the first answer; (0, 0) where it is not whole in this window."""
    if not right["text"]:
        return 0, 0
    begins, ends = right["answer_start"][0], right["answer_start"][0] + len(right["text"][0])
    start = next((token for token, (a, b) in enumerate(offsets) if 0 <= a <= begins < b), None)
    end = next((token for token, (a, b) in enumerate(offsets) if 0 <= a < ends <= b), None)
    return (0, 0) if start is None or end is None else (start, end)


def collate(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return windows as a model-ready batch."""
    names = tokenizer.model_input_names
    inputs = tokenizer.pad([{name: row[name] for name in names if name in row} for row in rows], return_tensors="pt")
    right = {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
    return {**inputs, **right}


@torch.no_grad()
def answers(raw: DatasetDict, run: Run, model: PreTrainedModel) -> tuple[list[dict], list[dict]]:
    """Return a model's answers to all held-out questions, and the right ones, as SQuAD's metrics take them.

    Of all windows' spans the likeliest is the answer; an empty one if that is likelier, and training had such
    questions.
    """
    longest = run.arguments[of.QuestionDataArguments].max_answer_length
    unanswerable = any(not right["text"] for right in raw["train"]["answers"])
    found: dict[str, tuple[float, str]] = {}
    empty: dict[str, float] = {}
    right: dict[str, dict] = {}
    for split in ("validation", "test"):
        right |= {f"{split} {number}": row["answers"] for number, row in enumerate(raw[split])}
        rows, done = run.splits[split], 0
        for batch in tqdm(run.batches(rows, False, 0), desc="score", unit="batch"):
            with run.autocast():
                output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            for start, end in zip(output.start_logits.float().cpu(), output.end_logits.float().cpu(), strict=True):
                row, done = rows[done], done + 1
                key, offsets = f"{split} {row['row']}", torch.tensor(row["offsets"])
                score, (first, last) = best_span(start, end, offsets[:, 0] >= 0, longest)
                text = raw[split][row["row"]]["context"][offsets[first, 0] : offsets[last, 1]]
                found[key] = max(found.get(key, (-torch.inf, "")), (score, text))
                if unanswerable:  # it is where no window has an answer
                    empty[key] = min(empty.get(key, torch.inf), float(start[0] + end[0]))
    chosen = {key: text if score >= empty.get(key, -torch.inf) else "" for key, (score, text) in found.items()}
    return (
        [{"id": key, "prediction_text": chosen[key]} for key in right],
        [{"id": key, "answers": answer} for key, answer in right.items()],
    )


def best_span(
    start: torch.Tensor, end: torch.Tensor, inside: torch.Tensor, longest: int
) -> tuple[float, tuple[int, int]]:
    """Return the score and the first and last token of the likeliest span.

    Args:
        start, end: (T,) or longer, logits of first and last tokens; padding is at the end.
        inside: (T,) bool, the tokens of the text.
        longest: tokens that a span may have.
    """
    size = len(inside)
    scores = start[:size, None] + end[None, :size]  # (T, T)
    allowed = torch.ones(size, size, dtype=torch.bool).triu().tril(longest - 1) & inside[:, None] & inside[None, :]
    scores = scores.masked_fill(~allowed, -torch.inf)
    place = int(scores.argmax())
    return float(scores.max()), (place // size, place % size)


TASK = Task(
    __doc__,
    (of.ClassifierArguments, of.QuestionDataArguments, of.MetricArguments, of.ScheduleArguments),
    load,
    load_dense,
    metric="squad",
)
