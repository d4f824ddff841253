"""Results of benchmarks in the files that the Hub shows beside a model: `.eval_results/*.yaml`.

The format is that of https://huggingface.co/docs/hub/eval-results.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from transformers.utils import logging

from ..evaluation.benchmarks import DENSE, OWN, Benchmarks
from ..io import is_hub_id, write_whole
from .card_text import budget

logger = logging.get_logger("moefy_hf")

FOLDER = ".eval_results"


def write_eval_results(folder: str | Path, benchmarks: Benchmarks) -> list[Path]:
    """Write a file for each task and budget into a checkpoint's folder; return their paths.

    An entry has a task's first metric, under the task's data set on the Hub. Tasks with other data have none, and
    neither has the dense model: it is another one. Results of a part of a task are none.

    Args:
        folder: of the checkpoint.
        benchmarks: what was measured.
    """
    if benchmarks.facts["limit"] is not None:
        logger.warning(f"nothing goes to {FOLDER}: --limit measures a part of the tasks")
        return []
    first: dict[tuple[str, str], Path] = {}
    for row in benchmarks.rows:
        dataset, point = row["dataset"], (row["budget"], row["task"])
        if row["budget"] == DENSE or point in first or not is_hub_id(dataset["name"] or ""):
            continue
        notes = f"lm-eval {benchmarks.facts['lm_eval']}, task {row['task']}, {row['metric']}, {row['shots']}-shot"
        entry = EvalResultEntry(
            dataset_id=dataset["name"],
            task_id=dataset["config"] or "default",
            value=row["value"],
            dataset_revision=dataset["revision"],
            date=benchmarks.facts["date"],
            notes=f"{notes}; MoEfied: {budget(row['selection'])}",
        )
        name = row["task"] if row["budget"] == OWN else f"{row['task']}_{row['budget']}"
        path = Path(folder, FOLDER, re.sub(r"[^\w.-]", "_", name) + ".yaml")
        path.parent.mkdir(exist_ok=True)
        write_whole(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True))
        first[point] = path
    return [*first.values()]
