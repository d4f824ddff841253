"""Benchmark tasks of lm-eval (EleutherAI's Language Model Evaluation Harness) at a model's budgets."""

import contextlib
import copy
import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MoefyError, UnsupportedModel
from ..io import markdown
from ..loading import MoefiedModel, check_moefied
from ..measure.contexts import all_experts, selecting
from ..modeling.section import Section

DENSE, OWN = "dense", "own budget"  # names of budgets: all experts, and what the checkpoint selects


@dataclass
class Benchmarks:
    """What tasks measured.

    Attributes:
        rows: one per budget, task and metric: "budget" as `table` shows it, "selection" (None of the dense model),
            "task", "metric", "filter" of answers, "higher_is_better", "value", its standard error "stderr" or None,
            "examples" and "shots". "dataset" has name, config, split and revision of the data.
        facts: "lm_eval", its version; "date"; "limit" of examples, or None.
    """

    rows: list[dict[str, Any]]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return rows and facts, as JSON has them."""
        return {"facts": self.facts, "rows": self.rows}

    def table(self) -> str:
        """Return a Markdown table: a line per task and metric, a column per budget."""
        lines: dict[tuple, dict[str, Any]] = {}
        for row in self.rows:
            metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
            arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
            line = {"task": row["task"], "metric": metric + arrow, "shots": row["shots"], "examples": row["examples"]}
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
            lines.setdefault((row["task"], metric), line)[row["budget"]] = f"{row['value']:.4g}{error}"
        return markdown([*lines.values()])


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Return lm-eval's index of tasks, once it is known to have these.

    Args:
        tasks: names of tasks, groups and tags, or paths of yaml files.
        include_path: a folder with tasks of one's own.

    Raises:
        MoefyError: lm-eval is not installed, or there is no such task or folder.
    """
    if find_spec("lm_eval") is None:
        raise MoefyError("benchmark tasks need lm-eval: pip install 'moefy-hf[eval]'")
    if include_path is not None and not Path(include_path).is_dir():
        raise MoefyError(f"there is no folder {include_path}")
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if {*tasks} <= {*own.all_subtasks}:  # groups may have tasks of lm-eval
            return own
    manager = all_tasks(include_path)
    for task in tasks:
        if task not in manager.all_tasks and not (Path(task).suffix == ".yaml" and Path(task).is_file()):
            near = difflib.get_close_matches(task, manager.all_tasks)
            hint = f"; did you mean {' or '.join(near)}?" if near else ": `lm-eval ls tasks` lists them"
            raise MoefyError(f"lm-eval has no task {task!r}{hint}")
    return manager


@functools.cache
def all_tasks(include_path: str | Path | None) -> Any:
    """Return the index of all tasks of lm-eval, which takes half a minute, and of a folder's."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    budgets: Iterable[int | float] | None = None,
    *,
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
) -> Benchmarks:
    """Run tasks of lm-eval on a MoEfied language model; the model comes back as it was.

    Args:
        model: a MoEfied model that generates text, in its own selection.
        tokenizer: of the model.
        tasks: names of tasks, groups and tags, or paths of yaml files.
        budgets: shares of the experts, or their number in every FFN. The dense model (all experts) is measured
            beside them. By default tasks run once, at the model's own budget.
        include_path: a folder with tasks of one's own.
        limit: examples of each task, or their share below 1; for trying out.
        batch_size: examples at once.
        num_fewshot: examples in the prompt; by default the task's.

    Raises:
        MoefyError: lm-eval is not installed, an unknown task, or a budget out of range.
        NotMoefied: the model is dense.
        UnsupportedModel: the model does not generate text.

    Example:
        >>> print(run_benchmarks(model, tokenizer, ["hellaswag"], budgets=[0.25, 0.5]).table())
    """
    moefied = check_moefied(model)
    if not model.can_generate():
        raise UnsupportedModel(f"lm-eval scores language models, and a {model._get_name()} does not generate text")
    manager = task_manager(tasks, include_path)
    points = points_of(moefied, budgets)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    rows: list[dict[str, Any]] = []
    for name, context in points:
        with context:
            selection = None if name == DENSE else copy.deepcopy(Section(model.config).selection)
            found = lm_eval.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
            )
        rows += [{"budget": name, "selection": selection} | row for row in rows_of(found)]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Benchmarks(rows, {"lm_eval": lm_eval.__version__, "date": date, "limit": limit})


def points_of(
    model: MoefiedModel, budgets: Iterable[int | float] | None
) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
    """Return name and context of every budget that is measured.

    Raises:
        MoefyError: a budget out of range.
    """
    if budgets is None:
        return [(OWN, contextlib.nullcontext())]
    kind, points = Section(model.config).selection["type"], [(DENSE, all_experts(model))]
    for k in budgets:
        selection = {"type": kind, "k": k, "allocation": "uniform"}
        with selecting(model, **selection):  # raises now, not after an hour
            pass
        points.append((f"k={k:g}", selecting(model, **selection)))
    return points


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return task, metric and value of each figure that lm-eval computed.

    Args:
        found: what its `simple_evaluate` returned.
    """
    rows = []
    for task, figures in found["results"].items():
        config = found["configs"].get(task, {})  # a group has none
        dataset = {
            "name": config.get("dataset_path"),
            "config": config.get("dataset_name"),
            "split": config.get("test_split") or config.get("validation_split"),
            "revision": (config.get("dataset_kwargs") or {}).get("revision"),
        }
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "examples": found["n-samples"].get(task, {}).get("effective"),
                    "shots": found["n-shot"].get(task),
                    "dataset": dataset,
                }
            )
    return rows
