"""MoEfy a pretrained language model without training, and measure perplexity against compute.

    accelerate launch recipes/moefy_causal_lm.py --config recipes/configs/smollm2/moefication.yaml

Stages, each skipped when its result is there: dense/ (the model as it came), moefied/ (converted on blocks of the
training texts, with what its quality is predicted to be), sweep.json and sweep.png (perplexity on all held-out texts
at several budgets, beside the controls), served/ (a checkpoint that serving engines know, where that is exact), and
prose_*.json (each model's perplexity on every held-out text, and greedy continuations). With --recovery_epochs also
recovered/ (fine-tuned at its budget on --train_tokens) and control/ (the dense model, trained for as many steps).
Any setting of the YAML file can be given on the command line:

    ... --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --held_out_name none --recovery_epochs 1 --recovery_parameters lora
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import real_inputs
import torch
from common import CollatedBatches, MoeficationArguments, load_tokenizer, parse
from datasets import concatenate_datasets
from pipeline import budgets, convert, recover, save, show, sweep
from prose import ProseArguments, collate, load_prose
from publishing import publish
from run import MODELS, UNUSED, Run, begin_stages, models_of, public
from stages import write_json
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from moefy_hf import MoEficationConfig, export
from moefy_hf.conversion.checks import check_convertible
from moefy_hf.exporters.export import check_expressible, choose_format
from moefy_hf.measure.metrics import Quality, predictions

PROSE = ("held_out_name", "held_out_splits", "held_out_tokens", "generated_rows", "generated_tokens", "export")
UNTRAINED = ("dense", "moefied", "served", "sweep.json", "prose_dense.json", "prose_moefied.json")
READ = ("seed", "per_device_eval_batch_size", "bf16", "fp16")  # of TrainingArguments, by what trains nothing


@dataclass
class CausalModelArguments:
    """The dense model to convert."""

    model_name_or_path: str = field(metadata={"help": "Hub id, local directory, or package:NAME (see real_inputs.py)"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit on the Hub"})
    dtype: str = field(default="float32", metadata={"help": "dtype the weights are loaded in"})
    attn_implementation: str | None = field(default=None, metadata={"help": "attention implementation"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run modeling code that comes with the model"})
    export: bool = field(default=True, metadata={"help": "also write a served architecture, where that is exact"})


class ProseRun(Run):
    def held_out(self, rows: int | None = None) -> Any:
        """All held-out texts together, or so many of their blocks."""
        found = concatenate_datasets(list(self.held_out_texts().values()))
        return self.batches(found if rows is None else found.select(range(min(rows, len(found)))), False, 0)

    def held_out_texts(self) -> dict[str, Any]:
        return {name: rows for name, rows in self.splits.items() if name not in ("train", "validation")}

    def measured_on(self) -> dict[str, str]:
        names = self.stages.settings["held_out_name"]
        if names:
            return {"data": public(names)}
        return {"data": public(self.stages.settings["dataset_name"]), "split": " and ".join(self.held_out_texts())}


def main() -> None:
    types = (CausalModelArguments, ProseArguments, MoeficationArguments, TrainingArguments)
    model_args, data_args, moe_args, training_args = parse(types, __doc__)
    run = begin(model_args, data_args, moe_args, training_args)
    stages, writes = run.stages, training_args.should_save
    if writes:
        dense = stages.run("dense", partial(save_dense, run, model_args))
        moefied = stages.run("moefied", lambda path: convert(run, dense, path))
        stages.run("sweep.json", lambda path: sweep(run, moefied, path, moe_args.controls))
        show(stages.directory)
        if model_args.export:
            serve(run, moefied)
    if moe_args.recovery_epochs:
        training_args.distributed_state.wait_for_everyone()
        recover(run, stages.directory / "dense", stages.directory / "moefied")
    if writes:
        for name in models_of(moe_args):
            found = stages.run(f"prose_{name}.json", partial(read_prose, run, data_args, name))
            print(f"{name}: {found.read_text()}")
        publish(run)


def begin(
    model_args: CausalModelArguments,
    data_args: ProseArguments,
    moe_args: MoeficationArguments,
    training_args: TrainingArguments,
    unused: Mapping[str, Collection[str]] | None = None,
) -> ProseRun:
    """Load texts, and find what is wrong with the settings before anything is written; `unused` as `Stages` takes
    it."""
    if moe_args.schedule is not None:
        raise ValueError("schedule needs a dense training, which this recipe has not: use recovery_epochs")
    if data_args.held_out_name == ["none"]:
        data_args.held_out_name = []
    stages = begin_stages(moe_args, training_args, model_args, data_args, unused=unused or unused_settings())
    tokenizer = load_tokenizer(model_args)
    with training_args.main_process_first(desc="tokenisation"):
        splits = load_prose(data_args, tokenizer, training_args.seed)
    if training_args.should_save:
        stages.begin()
    size = training_args.per_device_eval_batch_size

    def batches(rows, shuffle, seed):
        return CollatedBatches(rows, collate, size, shuffle=shuffle, seed=seed)

    auto = AutoModelForCausalLM
    return ProseRun(
        moe_args, training_args, stages, splits, [], tokenizer, auto, batches, collate, task_type="CAUSAL_LM"
    )


def unused_settings() -> dict[str, list[str]]:
    """What each stage's result does not depend on: nothing that trains decides what is converted."""
    training = [each.name for each in fields(TrainingArguments) if each.name not in READ]
    known = UNUSED | {f"prose_{name}.json": UNUSED[f"generated_{name}.json"] for name in MODELS}
    known |= {"served": UNUSED["moefied"]}
    return {
        name: [*old, *(training if name in UNTRAINED else ()), *(() if name.endswith(".json") else PROSE)]
        for name, old in known.items()
    }


def save_dense(
    run: Run, model_args: CausalModelArguments, path: Path, configs: Sequence[MoEficationConfig] = ()
) -> None:
    """The model as it came, once it is known that it can be converted, in all ways that are asked for."""
    model = AutoModelForCausalLM.from_pretrained(
        real_inputs.resolve(model_args.model_name_or_path),
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=model_args.trust_remote_code,
    )
    for config in configs or [run.config]:
        check_convertible(model, config, run.splits["train"])
    save(model, run.processor, path)


def serve(run: Run, moefied: Path) -> None:
    """Export the converted model where an architecture computes exactly what it does."""
    model = AutoModelForCausalLM.from_pretrained(moefied, trust_remote_code=True)
    try:
        export_format = choose_format(model, None)
        check_expressible(model, export_format)
    except ValueError as error:
        print(f"not exported: {error}")
        return
    if not export_format.exact:
        print(f"not exported: {export_format.architecture} would come close only (moefy export writes it)")
        return
    print(f"exported: {run.stages.run('served', lambda path: served(model, run, path))}")


def served(model: PreTrainedModel, run: Run, path: Path) -> None:
    export(model, path, "llama4", tokenizer=run.processor)


@torch.no_grad()
def read_prose(run: ProseRun, data: ProseArguments, name: str, path: Path) -> None:
    """Perplexity on each held-out text, at every share of the experts, and greedy continuations at the model's own."""
    own_code = name not in ("dense", "control")
    model = run.load(run.stages.directory / name, trust_remote_code=own_code)
    model.eval()
    found: dict[str, Any] = {"perplexity": {}, "continuations": continuations(run, data, model)}
    for budget in budgets(run, model):
        for text, rows in run.held_out_texts().items():
            quality = Quality()
            with run.autocast():
                for batch in run.batches(rows, False, 0):
                    logits, labels = predictions(model, batch)
                    quality.update_(logits, logits, labels)
            found["perplexity"][f"{text}{budget}"] = quality.figures()["perplexity"]
    write_json(path, found)


def continuations(run: ProseRun, data: ProseArguments, model: PreTrainedModel) -> list[dict[str, str]]:
    """Beginnings of blocks, as many of each text, and what a model goes on with."""
    texts = list(run.held_out_texts().values())
    found = []
    for number in range(data.generated_rows):
        rows, position = texts[number % len(texts)], number // len(texts)
        if position < len(rows):
            ids = torch.tensor([rows[position]["input_ids"][: data.generated_tokens]], device=model.device)
            with run.autocast():
                whole = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=data.generated_tokens,
                    do_sample=False,
                )
            begun, gone_on = (run.processor.decode(part) for part in (ids[0], whole[0, ids.shape[1] :]))
            found.append({"beginning": begun, "continuation": gone_on})
    return found


if __name__ == "__main__":
    main()
