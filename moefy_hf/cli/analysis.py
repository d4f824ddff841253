"""`moefy analyze`, `ablate` and `prune`: arguments, and what the commands do."""

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
from ..arguments import positive, share_or_count
from ..data import TextBatches, Texts, TextTable, longest_text
from ..errors import MoefyError
from ..hub.facts import add_facts, read_facts
from ..hub.push import add_license
from ..io import check_files, markdown, write_whole, written_whole
from ..loading import load, routed
from ..measure.metrics import is_causal
from ..modeling.section import Section
from .common import (
    DATA,
    NEW_FOLDER,
    add_data,
    load_moefied,
    load_tokenizer,
    new_folder,
    of_model,
    open_data,
    save_beside,
    show_table,
    text_batches,
)

CARRIED = ("base_model", "license", "calibration")  # parts of the model card data that also hold after pruning


def stream_of(args: Namespace, table: TextTable, model: PreTrainedModel, *, labels: bool) -> TextStream:
    """Return the texts of a table as a model reads them, with class ids if wanted, up to --max_tokens."""
    tokenizer = load_tokenizer(args)
    rows = table.rows(model, labels=labels, bounded=args.max_tokens is not None)
    return TextStream(
        rows, tokenizer, max_length=longest_text(model, tokenizer, args.max_length), limit=args.max_tokens
    )


def analyze_model(args: Namespace) -> dict[str, Any]:
    """Analyze the experts of MODEL on texts, and write the report; return its path and the figures.

    Raises:
        MoefyError: plotly is not installed, --output is a file, or --data cannot be read.
        NotMoefied: MODEL is dense.
    """
    if find_spec("plotly") is None:
        raise MoefyError("the report needs plotly: pip install 'moefy-hf[report]'")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise MoefyError(f"{output} is a file: name a folder for the report")
    removal = read_ablation(args.removal, "title", "together") if args.removal else None
    table, model = open_data(args), load_moefied(args)
    trust = args.trust_remote_code
    other = load(args.compare, head=args.head, dtype=args.dtype, trust_remote_code=trust) if args.compare else None
    partitions = compare_partitions(model, other, args.seed) if other is not None else None
    stream = stream_of(args, table, model, labels=True)
    analysis = analyze(model, load_tokenizer(args), stream, rate=args.rate, seed=args.seed)
    facts = add_facts(args.model, analysis=analysis.summary()) if Path(args.model).is_dir() else {}
    page = write_report(
        output,
        analysis,
        sweep=facts.get("sweep"),
        partitions=partitions,
        removal=removal and {"title": removal["title"], "rows": removal["together"]},
    )
    return {"report": str(page), "table": f"{analysis.table()}\n\n{page}", **analysis.to_dict()}


def ablate_model(args: Namespace) -> dict[str, Any]:
    """Rank the experts of MODEL by what a task loses without them; return the ranking and tables.

    Raises:
        MoefyError: arguments that exclude each other, or --data that cannot be read.
        NotMoefied: MODEL is dense.
    """
    if args.topic and args.other:
        raise MoefyError("--topic splits --data into a class and the others: leave out --other")
    if args.test and not args.together or args.other_test and not (args.test and args.other):
        raise MoefyError("--test is for --together, and --other_test is that of --other")
    check_files(args.output, plot=None)
    files = {"task": args.data, "other": args.other, "held-out task": args.test, "held-out other": args.other_test}
    tables = {name: open_data(args, file) for name, file in files.items() if file}
    model = load_moefied(args)
    tasks = tasks_of(args, model, tables["task"], tables.get("other"))
    held_out = tasks
    if args.test:
        held_out = tasks_of(args, model, tables["held-out task"], tables.get("held-out other"))
    experts = sum(site.act.num_experts for site in model.moe_sites())
    if max(args.together or [1]) > experts:
        raise MoefyError(f"--together {max(args.together)} is more than the {experts} experts that the model has")
    result = ablate(model, tasks["task"], tasks.get("other"), measured=args.measure)
    result["title"] = f"Without what {args.topic!r} needs" if args.topic else "Without what the task needs"
    if args.together:
        named = {args.topic or "the task": held_out["task"]}
        named |= {"all others" if args.topic else "the other": held_out["other"]} if "other" in held_out else {}
        result["together"] = remove_together(model, result["ranking"], named, args.together, seed=args.seed)
        result["table"] += "\n\n" + markdown(result["together"])
    if args.output:
        write_whole(Path(args.output), json.dumps(result, indent=1))
    return result


def tasks_of(
    args: Namespace, model: PreTrainedModel, task: TextTable, other: TextTable | None
) -> dict[str, TextBatches]:
    """Return batches of "task" and, where there is a second task, of "other".

    Args:
        args: with --topic, a class of the task's texts; the other classes are the second task then.
        model: that reads the texts.
        task: its texts.
        other: those of the second task, or None.

    Raises:
        MoefyError: --topic of a language model, or texts that cannot be read, or have no labels.
    """
    tokenizer, language = load_tokenizer(args), is_causal(model)
    if language and args.topic:
        raise MoefyError("a language model has no classes: leave out --topic")
    most = None if args.topic else args.max_texts
    parts: dict[str, Texts] = {}
    for name, table in {"task": task, "other": other}.items():
        if table is not None:
            parts[name] = table.read(model, labels=not language, most=most)
            if not language and parts[name].labels is None:
                raise MoefyError(table.lacking("label"))
    if args.topic:
        parts = split_by_class(parts["task"], model.config, args.topic)
    labels = "next" if language else None
    return {
        name: text_batches(args, model, tokenizer, part.select(range(min(len(part), args.max_texts))), labels)
        for name, part in parts.items()
    }


def prune_model(args: Namespace) -> dict[str, Any]:
    """Remove experts of MODEL, and save what is left; return which, and the numbers of parameters.

    Raises:
        MoefyError: both or neither of --ranking and --data, or more experts than the model can lose.
        NotMoefied: MODEL is dense.
    """
    output = new_folder(args.output)
    if bool(args.ranking) == bool(args.data):
        raise MoefyError("give --ranking (what moefy ablate wrote) or --data (the experts that it uses least go)")
    ranking = read_ablation(args.ranking, "ranking")["ranking"] if args.ranking else None
    data = open_data(args) if args.data else None
    model = load_moefied(args)
    check_count(model, args.count)
    if ranking is not None:
        by, experts = f"the least needed in {Path(args.ranking).name}", least_needed(model, ranking, args.count)
    elif data is not None:
        loads = measure_load(model, stream_of(args, data, model, labels=False))
        by = f"the least used on {data.source.name}"
        experts = least_used(loads, args.count, Section(model.config).shared_experts)
    size = routed(model.moe_sites()[0]).num_experts
    pruned = prune(model, experts)
    before, after = model.num_parameters(), pruned.num_parameters()
    known = read_facts(args.model) if Path(args.model).is_dir() else {}
    with written_whole(output) as folder:
        save_beside(args, pruned, folder)
        add_facts(folder, **{name: known[name] for name in CARRIED if name in known})
        add_facts(folder, pruning={"pruned": args.count, "experts": size, "by": by})
        add_license(folder, HfApi())
    table = f"{output}: {before:,} parameters became {after:,}; {args.count} of {size} experts of every layer went"
    return {"output": str(output), "experts": experts, "before": before, "after": after, "table": table}


def add_analyze(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy analyze`."""
    of_model(command, analyze_model, show_table)
    add_data(command, required=True, leave_out=("target_column",))
    add_budget(command)
    command.add_argument("--max_tokens", type=positive, help="stop after about so many (default: all)")
    command.add_argument("--output", required=True, help="folder for report.html, analysis.json and csv files")
    command.add_argument("--rate", type=float, default=0.05, help="of false discoveries (default: 0.05)")
    command.add_argument("--compare", help="another MoEfied checkpoint of this model: how alike are the partitions?")
    command.add_argument("--removal", help="what moefy ablate --together wrote, for the report")


def add_ablate(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy ablate`."""
    of_model(command, ablate_model, show_table)
    add_data(command, required=True, help=f"the task: {DATA}", leave_out=("target_column",))
    add_budget(command)
    command.add_argument("--topic", help="a class of --data: what it loses, and, as the second task, all others")
    command.add_argument("--other", help="the second task, as --data, which is to lose little")
    command.add_argument("--measure", type=positive, default=20, help="experts switched off one by one (default: 20)")
    command.add_argument("--together", type=positive, nargs="+", help="also switch the first so many off together")
    test = "what is measured on, instead of what experts are ranked on"
    command.add_argument("--test", help=test)
    command.add_argument("--other_test", help="the same for --other")
    command.add_argument("--max_texts", type=positive, default=500, help="of each file or part (default: 500)")
    command.add_argument("--output", metavar="FILE", help="JSON file that gets the figures")


def add_prune(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `moefy prune`."""
    of_model(command, prune_model, show_table)
    command.add_argument("output", metavar="OUTPUT", help=NEW_FOLDER)
    help = f"texts, whose least used experts go: {DATA}"
    add_data(command, required=False, help=help, seed=False, leave_out=("label_column", "target_column"))
    add_budget(command)
    command.add_argument("--max_tokens", type=positive, help="stop after about so many (default: all)")
    command.add_argument("--count", type=positive, required=True, help="experts to take out of every layer")
    command.add_argument("--ranking", help="JSON file of moefy ablate: the least needed go")


def add_budget(command: argparse.ArgumentParser) -> None:
    """Add --k, the budget that the model is used at."""
    command.add_argument("--k", type=share_or_count, help="experts of every layer (default: those the model has)")
