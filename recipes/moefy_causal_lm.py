# /// script
# requires-python = ">=3.10"
# dependencies = ["moefy-hf[plots,gguf]"]
# ///
"""MoEfy a pretrained language model without training, and measure perplexity and time against compute.

    accelerate launch recipes/moefy_causal_lm.py --config recipes/configs/smollm2/moefication.yaml

Stages, each skipped when its result is there: dense/ (the model as it came), moefied/ (converted on blocks of the
training texts, with what its quality is predicted to be), sweep.json and sweep.png (perplexity on all held-out texts
at several budgets, beside the controls), served/ (a checkpoint that serving engines know, where that is exact),
prose_*.json (each model's perplexity on every held-out text, and greedy continuations), and times.json (of a batch,
dense and MoEfied). With --recovery_epochs also recovered/ (fine-tuned at its budget on --train_tokens) and control/
(the dense model, trained for as many steps). Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --held_out_name none --recovery_epochs 1 --recovery_parameters lora
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM, TrainingArguments

from moefy_hf import MoEficationConfig, export
from moefy_hf.conversion.checks import check_convertible
from moefy_hf.exporters.export import check_expressible, choose_format
from moefy_hf.recipes import arguments as of
from moefy_hf.recipes.data import CollatedBatches, load_tokenizer
from moefy_hf.recipes.inputs import resolve
from moefy_hf.recipes.plans import models
from moefy_hf.recipes.prose import ProseRun, collate, load_prose, perplexities, read_prose
from moefy_hf.recipes.publishing import publish
from moefy_hf.recipes.scores import Metrics
from moefy_hf.recipes.settings import Arguments, check, checking, parse
from moefy_hf.recipes.stages import Plan, Stage, Stages
from moefy_hf.recipes.steps import compare_budgets, convert, save, show_sweep
from moefy_hf.recipes.summary import summarise
from moefy_hf.recipes.timing import measure_times
from moefy_hf.recipes.training import recover

TYPES = (
    *(of.ModelArguments, of.ProseDataArguments, of.HeldOutArguments, of.EvaluationArguments, of.ControlArguments),
    *(of.TimingArguments, of.ContinuationArguments, of.ExportArguments, of.SparsityArguments, of.RecoveryArguments),
    *(of.DistillationArguments, of.LearnedArguments, of.OutputArguments, TrainingArguments),
)


def main() -> None:
    with checking():
        run = begin(parse(TYPES, __doc__))
    if run.writes:
        run.stages.run("dense", lambda path: save_dense(run, path, [run.config]))
        convert(run)
        run.stages.run("sweep.json", partial(compare_budgets, run, "moefied"))
        show_sweep(run.folder)
        if "served" in run.stages.plan:
            serve(run)
    if "recovered" in run.stages.plan:
        recover(run)
    if run.writes:
        scores: dict[str, dict[str, float]] = {}
        for name in models(run.stages.plan):
            path = run.stages.run(f"prose_{name}.json", partial(read_prose, run, name))
            print(f"{name}: {path.read_text()}")
            scores |= perplexities(run, name, path)
        if "times.json" in run.stages.plan:
            run.stages.run("times.json", partial(measure_times, run))
        publish(run)
        print(f"Perplexity:\n\n{summarise(run, scores, percent=False)}")


def plan_of(arguments: Arguments) -> dict[str, Stage]:
    """Return the stages of a run, and what each reads; nothing that trains decides what is converted."""
    read = (of.HeldOutArguments, of.ContinuationArguments)
    plan = {
        "dense": Stage((of.ModelArguments,)),
        "moefied": Stage((of.ProseDataArguments, MoEficationConfig), after=("dense",), measuring=True),
        "sweep.json": Stage((of.HeldOutArguments, of.EvaluationArguments, of.ControlArguments), after=("moefied",)),
        "prose_dense.json": Stage((of.ProseDataArguments, *read), after=("dense",), measuring=True),
        "prose_moefied.json": Stage((*read, of.EvaluationArguments), after=("moefied",)),
    }
    if arguments[of.ExportArguments].export:
        plan["served"] = Stage(after=("moefied",))
    if arguments[of.RecoveryArguments].recovery_epochs:
        trained = (of.RecoveryArguments, of.SparsityArguments, TrainingArguments)
        plan["recovered"] = Stage((*trained, of.DistillationArguments, of.LearnedArguments), after=("moefied",))
        plan["recovered.json"] = Stage((of.HeldOutArguments, of.EvaluationArguments), after=("recovered",))
        plan["prose_recovered.json"] = Stage((*read, of.EvaluationArguments), after=("recovered",))
        plan["control"] = Stage((of.ProseDataArguments, *trained), after=("dense",))
        plan["control.json"] = Stage((of.HeldOutArguments,), after=("control",))
        plan["prose_control.json"] = Stage(read, after=("control",))
    if arguments[of.TimingArguments].timed_batches:
        timed = (of.HeldOutArguments, of.EvaluationArguments, of.TimingArguments)
        plan["times.json"] = Stage(timed, after=("moefied",))
    return plan


def begin(arguments: Arguments, plan: Plan | None = None) -> ProseRun:
    """Load texts, and find what is wrong with the settings before anything is written; by default for all stages.

    Raises:
        ValueError: bad settings or texts, or results of other settings in the output directory.
    """
    training, held_out = arguments[TrainingArguments], arguments[of.HeldOutArguments]
    if held_out.held_out_name == ["none"]:
        held_out.held_out_name = []
    if arguments[of.ContinuationArguments].generated_tokens < 2:
        raise ValueError("generated_tokens must be at least 2")
    check(arguments)
    redo = arguments[of.OutputArguments].redo
    stages = Stages(training.output_dir, plan or plan_of(arguments), arguments, redo)
    tokenizer = load_tokenizer(arguments.model)
    with training.main_process_first(desc="tokenisation"):
        splits = load_prose(arguments.data, held_out, tokenizer, training.seed)
    if training.should_save:
        stages.begin()
    size = training.per_device_eval_batch_size

    def batches(rows, shuffle, seed):
        return CollatedBatches(rows, collate, size, shuffle=shuffle, seed=seed)

    auto, judge = AutoModelForCausalLM, Metrics([], [])
    return ProseRun(
        *(arguments, stages, splits, [], tokenizer, auto, batches, judge), collator=collate, task_type="CAUSAL_LM"
    )


def save_dense(run: ProseRun, path: Path, configs: Sequence[MoEficationConfig]) -> None:
    """Save the model as it came, once it is known that it can be converted, in all ways that are asked for."""
    settings = run.arguments.model
    with checking():
        model = AutoModelForCausalLM.from_pretrained(
            resolve(settings.model_name_or_path),
            revision=settings.model_revision,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
        )
        for config in configs:
            check_convertible(model, config, run.splits["train"])
    save(model, run.processor, path)


def serve(run: ProseRun) -> None:
    """Export the converted model where an architecture computes exactly what it does; say so where none does."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "moefied", trust_remote_code=True)
    try:
        target = choose_format(model, None)
        check_expressible(model, target)
    except ValueError as error:
        print(f"not exported: {error}")
        return
    if not target.exact:
        print(f"not exported: {target.architecture} would come close only (moefy export writes it)")
        return
    path = run.stages.run("served", lambda path: export(model, path, target.name, tokenizer=run.processor))
    print(f"exported: {path}")


if __name__ == "__main__":
    main()
