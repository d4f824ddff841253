"""`moefy analyze`, `ablate` and `prune`: what the words do, and their settings."""

import argparse
import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from ..analysis import TextStream, analyze, compare_partitions, write_report
from ..analysis.ablation import ablate, read_ablation, remove_together, split_by_class
from ..analysis.measuring import measure_load
from ..analysis.pruning import check_count, least_needed, least_used, prune
from ..data import TextBatches, longest_text, read_labelled, read_lines
from ..hub.facts import add_facts, read_facts
from ..hub.push import add_license
from ..io import check_files, markdown, write_whole, written_whole
from ..loading import check_moefied, load_checkpoint
from ..measure.metrics import is_causal
from ..modeling.moefied import is_moefied
from ..modeling.protocol import MoefiedModel, routed
from .argument_types import positive, share_or_count
from .commands import as_loaded, load_model, load_tokenizer, processors, text_batches

CARRIED = ("base_model", "license", "calibration")  # facts that hold for what is left after pruning


def moefied(args: Namespace) -> MoefiedModel:
    """The model, at the budget that was asked for."""
    model = load_model(args)
    if not is_moefied(model):
        raise ValueError(f"{args.model} is not MoEfied: moefy convert makes a checkpoint that is")
    model = check_moefied(model)
    if args.k is not None:
        model.set_selection(k=args.k, allocation="uniform")
    return model


def stream_of(args: Namespace, model: PreTrainedModel) -> TextStream:
    tokenizer = load_tokenizer(args)
    longest = longest_text(model, tokenizer, args.max_length)
    return TextStream(args.data, tokenizer, model.config, max_length=longest, limit=args.max_tokens)


def analyze_model(args: Namespace) -> dict[str, Any]:
    if find_spec("plotly") is None:
        raise ValueError("the report needs plotly: pip install 'moefy-hf[report]'")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: name a folder for the report")
    removal = read_ablation(args.removal, "title", "together") if args.removal else None
    model = moefied(args)
    other = load_checkpoint(args.compare, head=args.head, dtype=args.dtype) if args.compare else None
    partitions = compare_partitions(model, other, args.seed) if other is not None else None
    found = analyze(model, load_tokenizer(args), stream_of(args, model), rate=args.rate, seed=args.seed)
    facts = add_facts(args.model, analysis=found.summary()) if Path(args.model).is_dir() else {}
    page = write_report(
        output,
        found,
        sweep=facts.get("sweep"),
        partitions=partitions,
        removal=removal and {"title": removal["title"], "rows": removal["together"]},
    )
    return {"report": str(page), "table": f"{found.table()}\n\n{page}", **found.to_dict()}


def ablate_model(args: Namespace) -> dict[str, Any]:
    if bool(args.csv) == bool(args.texts):
        raise ValueError("give --csv (a classifier) or --texts (a language model)")
    if args.topic and (args.other or args.texts):
        raise ValueError("--topic splits --csv into a class and the others: leave out --other and --texts")
    if args.test and not args.together or args.other_test and not (args.test and args.other):
        raise ValueError("--test is for --together, and --other_test is that of --other")
    check_files(args.output, plot=None)
    model = moefied(args)
    tasks = tasks_of(args, model, args.csv or args.texts, args.other)
    held_out = tasks_of(args, model, args.test, args.other_test) if args.test else tasks
    experts = sum(site.act.num_experts for site in model.moe_sites())
    if max(args.together or [1]) > experts:
        raise ValueError(f"--together {max(args.together)} is more than the {experts} experts that the model has")
    found = ablate(model, tasks["task"], tasks.get("other"), measured=args.measure)
    found["title"] = f"Without what {args.topic!r} needs" if args.topic else "Without what the task needs"
    if args.together:
        named = {args.topic or "the task": held_out["task"]}
        named |= {"all others" if args.topic else "the other": held_out["other"]} if "other" in held_out else {}
        found["together"] = remove_together(model, found["ranking"], named, args.together, seed=args.seed)
        found["table"] += "\n\n" + markdown(found["together"])
    if args.output:
        write_whole(Path(args.output), json.dumps(found, indent=1))
    return found


def tasks_of(args: Namespace, model: PreTrainedModel, path: str, other: str | None) -> dict[str, TextBatches]:
    """Batches of the task, and of the second one, where there is one: another file, or the other classes of this."""
    tokenizer = load_tokenizer(args)

    def batches(texts: list[str], labels: list[int] | str) -> TextBatches:
        own = labels if isinstance(labels, str) else labels[: args.max_texts]
        return text_batches(args, model, tokenizer, texts[: args.max_texts], own)

    if is_causal(model) != bool(args.texts):
        raise ValueError("a language model takes --texts, and a classifier --csv")
    if args.texts:
        files = {"task": path} | ({"other": other} if other else {})
        return {name: batches(read_lines(file), "next") for name, file in files.items()}
    texts, labels = read_labelled(path, model.config)
    if not args.topic:
        found = {"task": batches(texts, labels)}
        return found | ({"other": batches(*read_labelled(other, model.config))} if other else {})
    return {name: batches(*part) for name, part in split_by_class(texts, labels, model.config, args.topic).items()}


def prune_model(args: Namespace) -> dict[str, Any]:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists: choose another output_dir")
    if bool(args.ranking) == bool(args.data):
        raise ValueError("give --ranking (what moefy ablate wrote) or --data (the experts that it uses least go)")
    ranking = read_ablation(args.ranking, "ranking")["ranking"] if args.ranking else None
    model = moefied(args)
    check_count(model, args.count)
    if ranking is not None:
        by, experts = f"the least needed in {Path(args.ranking).name}", least_needed(model, ranking, args.count)
    else:
        shared = model.config.moefication.get("shared_experts", 0)
        by, loads = f"the least used on {Path(args.data).name}", measure_load(model, stream_of(args, model))
        experts = least_used(loads, args.count, shared)
    size = routed(model.moe_sites()[0]).num_experts
    pruned = prune(model, experts)
    before, after = model.num_parameters(), pruned.num_parameters()
    known = read_facts(args.model) if Path(args.model).is_dir() else {}
    with written_whole(output_dir) as folder:
        as_loaded(pruned).save_pretrained(folder)
        for processor in processors(args):
            processor.save_pretrained(folder)
        add_facts(folder, **{name: known[name] for name in CARRIED if name in known})
        add_facts(folder, pruning={"pruned": args.count, "experts": size, "by": by})
        add_license(folder, HfApi())
    table = f"{output_dir}: {before:,} parameters became {after:,}; {args.count} of {size} experts of every layer went"
    return {"output_dir": str(output_dir), "experts": experts, "before": before, "after": after, "table": table}


DATA = "csv file with columns text and label, or text file with a text per line"


def add_analyze(analyze_: argparse.ArgumentParser) -> None:
    add_reading(analyze_)
    analyze_.add_argument("--data", required=True, help=DATA)
    analyze_.add_argument("--max_tokens", type=positive, help="stop after about so many (default: all)")
    analyze_.add_argument("--seed", type=int, default=0)
    analyze_.add_argument("--output", required=True, help="folder for report.html, analysis.json and csv files")
    analyze_.add_argument("--rate", type=float, default=0.05, help="of false discoveries (default: 0.05)")
    analyze_.add_argument("--compare", help="another MoEfied checkpoint of this model: how alike are the partitions?")
    analyze_.add_argument("--removal", help="what moefy ablate --together wrote, for the report")


def add_ablate(ablate_: argparse.ArgumentParser) -> None:
    add_reading(ablate_)
    ablate_.add_argument("--seed", type=int, default=0)
    ablate_.add_argument("--csv", help="the task: csv file with columns text and label")
    ablate_.add_argument("--texts", help="the task of a language model: text file")
    ablate_.add_argument("--topic", help="a class of --csv: what it loses, and, as the second task, all others")
    ablate_.add_argument("--other", help="file of the second task, which is to lose little")
    ablate_.add_argument("--measure", type=positive, default=20, help="experts switched off one by one (default: 20)")
    ablate_.add_argument("--together", type=positive, nargs="+", help="also switch the first so many off together")
    ablate_.add_argument("--test", help="file that is measured on, instead of the one that experts are ranked on")
    ablate_.add_argument("--other_test", help="the same for --other")
    ablate_.add_argument("--max_texts", type=positive, default=500, help="of each file or part (default: 500)")
    ablate_.add_argument("--output", help="JSON file that gets the figures")


def add_prune(prune_: argparse.ArgumentParser) -> None:
    add_reading(prune_)
    prune_.add_argument("--data", help=DATA)
    prune_.add_argument("--max_tokens", type=positive, help="stop after about so many (default: all)")
    prune_.add_argument("output_dir", help="directory that gets the smaller model; must not exist")
    prune_.add_argument("--count", type=positive, required=True, help="experts to take out of every layer")
    prune_.add_argument("--ranking", help="JSON file of moefy ablate: the least needed go")


def add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max_length", type=positive, default=256, help="tokens of a text (default: 256)")
    command.add_argument("--k", type=share_or_count, help="experts of every layer (default: those the model has)")
