"""MoEfy a pretrained language model without training, and measure perplexity and time against compute.

    moefy train causal_lm --config recipes/configs/smollm2/moefication.yaml

Stages, each skipped when its result is there: dense/ (the model as it came), moefied/ (converted on blocks of the
training texts, with what its quality is predicted to be), sweep.json and sweep.png (perplexity on all held-out texts
at several budgets, beside the controls), served/ (a checkpoint that serving engines know, where that is exact),
prose_*.json (each model's perplexity on every held-out text, and greedy continuations), and times.json (of a batch,
dense and MoEfied). With --recovery_epochs also recovered/ (fine-tuned at its budget on --train_tokens) and control/
(the dense model, trained for as many steps). Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --held_out_name none --recovery_epochs 1 --recovery_parameters lora
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from ...config import MoEficationConfig
from ...conversion.checks import check_convertible
from ...errors import MoefyError
from ...exporters.export import check_expressible, choose_format, export
from ...loading import check_moefied
from .. import arguments as of
from ..data import load_tokenizer
from ..plans import given_plan, models
from ..prose import ProseRun, collate, load_prose, perplexities, read_prose
from ..run import Run
from ..scores import Metrics
from ..settings import Arguments, checking
from ..stages import Stage, Stages
from ..steps import save
from .base import Scores, Task, load_dense


def plan_of(arguments: Arguments) -> dict[str, Stage]:
    """Return the stages of a run, and what each reads; nothing that trains decides what is converted."""
    read = (of.HeldOutArguments, of.ContinuationArguments)
    trained = (of.RecoveryArguments, of.SparsityArguments, TrainingArguments)
    plan = {
        "dense": Stage((of.ModelArguments,)),
        "moefied": Stage((of.ProseDataArguments, MoEficationConfig), after=("dense",), measuring=True),
        "sweep.json": Stage((of.HeldOutArguments, of.EvaluationArguments, of.ControlArguments), after=("moefied",)),
        "prose_dense.json": Stage((of.ProseDataArguments, *read), after=("dense",), measuring=True),
        "prose_moefied.json": Stage((*read, of.EvaluationArguments), after=("moefied",)),
    }
    if arguments.recovers:
        del plan["sweep.json"]
        plan |= given_plan(arguments)
    elif arguments[of.ExportArguments].export:
        plan["served"] = Stage(after=("moefied",))
    if arguments[of.RecoveryArguments].recovery_epochs:
        plan["recovered"] = Stage((*trained, of.DistillationArguments, of.LearnedArguments), after=("moefied",))
        plan["recovered.json"] = Stage((of.HeldOutArguments, of.EvaluationArguments), after=("recovered",))
        plan["prose_recovered.json"] = Stage((*read, of.EvaluationArguments), after=("recovered",))
    if arguments[of.RecoveryArguments].recovery_epochs and not arguments.recovers:
        plan["control"] = Stage((of.ProseDataArguments, *trained), after=("dense",))
        plan["control.json"] = Stage((of.HeldOutArguments,), after=("control",))
        plan["prose_control.json"] = Stage(read, after=("control",))
    if arguments[of.TimingArguments].timed_batches:
        timed = (of.HeldOutArguments, of.EvaluationArguments, of.TimingArguments)
        plan["times.json"] = Stage(timed, after=("moefied",))
    return plan


def load(arguments: Arguments, stages: Stages) -> ProseRun:
    """Load prose.

    Raises:
        ValueError: bad settings or texts.
    """
    training, held_out = arguments[TrainingArguments], arguments[of.HeldOutArguments]
    if held_out.held_out_name == ["none"]:
        held_out.held_out_name = []
    if arguments[of.ContinuationArguments].generated_tokens < 2:
        raise MoefyError("generated_tokens must be at least 2")
    tokenizer = load_tokenizer(arguments.model)
    splits = load_prose(arguments.data, held_out, tokenizer, training.seed)
    auto, judge = AutoModelForCausalLM, Metrics([], [])
    return ProseRun(
        *(arguments, stages, splits, [], tokenizer, auto, judge),
        collator=collate,
        batch_size=training.per_device_eval_batch_size,
        task_type="CAUSAL_LM",
    )


def keep_dense(run: Run, make: Callable[[], PreTrainedModel]) -> None:
    """Leave the model as it came in the run's folder."""
    if run.writes:
        run.stages.run("dense", lambda path: save_dense(run, path, [run.config]))


def save_dense(run: Run, path: Path, configs: Sequence[MoEficationConfig]) -> None:
    """Save the model as it came, once it is known that it can be converted, in all ways that are asked for."""
    with checking():
        model = load_dense(run)
        for config in configs:
            check_convertible(model, config, run.splits["train"])
    save(model, run.processor, path)


def serve(run: Run) -> None:
    """Export the converted model where an architecture computes exactly what it does; say so where none does."""
    if "served" not in run.stages.plan:
        return
    model = AutoModelForCausalLM.from_pretrained(run.folder / "moefied", trust_remote_code=True)
    try:
        target = choose_format(model, None)
        check_expressible(check_moefied(model), target)
    except ValueError as error:
        print(f"not exported: {error}")
        return
    if not target.exact:
        print(f"not exported: {target.architecture} would come close only (moefy export writes it)")
        return

    def write(path: Path) -> None:
        export(model, path, target.name, tokenizer=run.processor)

    path = run.stages.run("served", write)
    print(f"exported: {path}")


def read_models(run: Run) -> Scores:
    """Let every model read the held-out texts; return perplexities."""
    prose, scores = cast(ProseRun, run), Scores()
    for name in models(run.stages.plan):
        path = run.stages.run(f"prose_{name}.json", partial(read_prose, prose, name))
        print(f"{name}: {path.read_text()}")
        scores |= perplexities(prose, name, path)
    return scores


TASK = Task(
    __doc__,
    (of.ModelArguments, of.ProseDataArguments, of.HeldOutArguments, of.ContinuationArguments, of.ExportArguments),
    load,
    load_dense,
    plan=plan_of,
    prepare=keep_dense,
    convert_further=serve,
    score=read_models,
    percent=False,
)
