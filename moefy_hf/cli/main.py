"""The `moefy` command: a thin layer over the Python functions of the same names."""

import argparse
import importlib
import json
import sys

from ..errors import MoefyError
from .launched import check_launched

COMMANDS = {  # in the order of work: where its arguments are, which take torch and seconds to import; what it does
    "inspect": ("inspect_model:add_arguments", "What can be MoEfied in a model: its FFNs, and the sizes of experts."),
    "profile": ("profile_model:add_arguments", "How sparse a model's FFNs are on texts, layer by layer."),
    "convert": ("convert:add_arguments", "Split a dense model's FFNs and fit routers."),
    "train": ("train:add_arguments", "Fine-tune, convert, recover and measure a model on a task, in one run."),
    "sweep": ("sweep:add_arguments", "Quality against compute of a MoEfied model, beside its dense self."),
    "eval": ("eval_tasks:add_arguments", "Benchmark tasks of lm-eval, at one budget or several."),
    "card": ("hub:add_card", "Write the card of a MoEfied checkpoint's folder."),
    "push": ("hub:add_push", "Verify a MoEfied checkpoint's folder and upload it."),
    "export": ("export:add_export", "Write a MoEfied model as a served architecture, or for ONNX Runtime."),
    "permute-adapter": ("export:add_adapter", "Fit an adapter of the dense model to the MoEfied one."),
    "analyze": ("analysis:add_analyze", "What experts respond to, against chance; a report to open."),
    "ablate": ("analysis:add_ablate", "Rank experts by what a task loses without them."),
    "prune": ("analysis:add_prune", "Remove experts: a smaller checkpoint."),
    "bench": (
        "bench:add_arguments",
        "Time dense FFNs or models against the selected experts alone, on the CPU.",
    ),
    "kernels": ("kernels:add_arguments", "The compiled kernel of this machine's CPU."),
    "env": ("env:add_arguments", "Versions, processor, kernel and accelerator: what a bug report needs."),
}
RENAMED = {  # flag of version 0.1 -> what it is now; gone with the next release
    "--texts": "--data",
    "--csv": "--data",
    "--calibration_texts": "--calibration",
    "--shares": "--k",
    "--share": "--k",
    "--expert-size": "--expert_size",
}
EXAMPLES = """examples:
  moefy inspect google-bert/bert-base-uncased
  moefy profile HuggingFaceTB/SmolLM2-135M --data train.txt --ppl 1
  moefy convert my-classifier my-classifier-moe --data train.csv --validation validation.csv --quality 0.99 --batch 32
  moefy convert my-classifier my-classifier-moe --data train.csv --speedup 1.5 --runtime onnxruntime
  moefy convert HuggingFaceTB/SmolLM2-135M --data train.txt --quality 1.05 --dry_run
  moefy convert HuggingFaceTB/SmolLM2-135M smol-moe --data train.txt --expert_size 8 --k 0.9
  moefy convert my-model my-moe --data train.csv --config settings.yaml --k 0.3
  moefy convert my-model my-moe --splitter parameter_clustering --router similarity --allocation uniform
  moefy train classification --config settings.yaml --k 0.3
  moefy sweep smol-moe --data held_out.txt --k 0.5 0.75 --controls oracle wina --calibration train.txt
  moefy sweep my-classifier-moe --data test.csv --plot quality.png
  moefy sweep my-classifier-moe --data test.csv --quality 0.98
  moefy eval smol-moe --tasks hellaswag arc_easy --k 0.25 0.5 --batch_size 8
  moefy analyze my-classifier-moe --data test.csv --output report
  moefy ablate my-classifier-moe --data validation.csv --topic sports --together 2 4 8 --test test.csv
  moefy prune my-classifier-moe my-smaller-moe --count 12 --data train.csv
  moefy card smol-moe --repo_id me/smol-moe
  moefy push smol-moe me/smol-moe --private
  moefy bench --preset t5-base --threads 1 --tokens 1 128 512 --output bench.json
  moefy bench --preset opt-1.3b --generate 128 32
  moefy bench my-classifier-moe --data test.csv --against onnxruntime onnxruntime-int8 torchao-int8
  moefy bench smol-moe --dtype bfloat16 --plot speed.png
  moefy kernels info
  moefy env
  moefy export smol-moe smol-granitemoe --k 0.25 --dtype float32
  moefy export smol-moe smol-dense --to dense
  moefy export smol-moe smol-moe.gguf --to gguf --dense smol-dense.gguf
  moefy permute-adapter smol-moe my-lora my-lora-for-smol-moe

MODEL is a Hub id or a local directory. Exit code 2: something about the input, said in one line; 3: a plan found
nothing that is worth it."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command, and print its result.

    Where something about the input is wrong, exit with code 2 and one line.

    Args:
        arguments: the command and its arguments; by default those of the process.
    """
    arguments = renamed(sys.argv[1:] if arguments is None else arguments)
    args = parser(arguments).parse_args(arguments)
    try:
        check_launched(args.command)
        result = args.run(args)
    except (MoefyError, OSError) as error:  # what users can mend; anything else is a bug and shows its traceback
        print(f"moefy {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if result is None:  # one of several processes has nothing to say
        return
    print(json.dumps(result, indent=1) if args.json else args.show(result))
    if result.get("exit_code"):
        sys.exit(result["exit_code"])


def renamed(arguments: list[str]) -> list[str]:
    """Return the arguments with flags of version 0.1 as they are now, and say so."""
    bench = "bench" in arguments[:1]
    flags = RENAMED | ({"--csv": "--output"} if bench else {})
    words = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        now = flags.get(flag, flag)
        if bench and flag == "--json" and (value or following).endswith(".json"):  # it named a file
            now = "--output"
        if now != flag:
            print(f"moefy: {flag} is {now} now", file=sys.stderr)
        words.append(now + equals + value)
    return words


def parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Make a parser that knows all commands, and the arguments of the one that is asked for.

    Args:
        arguments: those that are going to be parsed.
    """
    top = argparse.ArgumentParser(
        prog="moefy", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    name = next((word for word in arguments if not word.startswith("-")), None)
    for command, (home, description) in COMMANDS.items():
        added = commands.add_parser(command, help=description, description=description, allow_abbrev=False)
        if command == name:
            module, _, add = home.partition(":")
            vars(importlib.import_module(f".{module}", __package__))[add](added)
    return top


if __name__ == "__main__":
    main()
