"""The `moefy` command: a thin layer over the Python functions of the same names."""

import argparse
import importlib
import json
import sys

COMMANDS = {  # in the order of work; arguments.py has their settings, which take torch and seconds to import
    "inspect": "What can be MoEfied in a model: its FFNs, and the sizes of experts.",
    "profile": "How sparse a model's FFNs are on texts, layer by layer.",
    "convert": "Split a dense model's FFNs and fit routers.",
    "sweep": "Quality against compute of a MoEfied model, beside its dense self.",
    "card": "Write the card of a MoEfied checkpoint's folder.",
    "push": "Verify a MoEfied checkpoint's folder and upload it.",
    "export": "Write a MoEfied model as a served architecture.",
    "permute-adapter": "Fit an adapter of the dense model to the MoEfied one.",
    "analyze": "What experts respond to, against chance; a report to open.",
    "ablate": "Rank experts by what a task loses without them.",
    "prune": "Remove experts: a smaller checkpoint.",
    "bench": "Time dense FFNs, or whole models, against the selected experts alone, in turns, on the CPU.",
    "kernels": "The compiled kernel of this machine's CPU.",
}
EXAMPLES = """examples:
  moefy inspect google-bert/bert-base-uncased
  moefy profile HuggingFaceTB/SmolLM2-135M --texts train.txt --ppl 1
  moefy convert HuggingFaceTB/SmolLM2-135M smol-moe --texts train.txt --expert_size 8 --k 0.75
  moefy convert my-model my-moe --splitter parameter_clustering --router similarity --allocation uniform
  moefy sweep smol-moe --texts held_out.txt --shares 0.5 0.75 --controls oracle wina --calibration_texts train.txt
  moefy sweep my-classifier-moe --csv test.csv --plot quality.png
  moefy sweep my-classifier-moe --csv test.csv --quality 0.98
  moefy analyze my-classifier-moe --data test.csv --output report
  moefy ablate my-classifier-moe --csv validation.csv --topic sports --together 2 4 8 --test test.csv
  moefy prune my-classifier-moe my-smaller-moe --count 12 --data train.csv
  moefy card smol-moe --repo_id me/smol-moe
  moefy push smol-moe me/smol-moe --private
  moefy bench --preset t5-base --threads 1 --tokens 1 128 512 --json bench.json
  moefy bench --preset opt-1.3b --generate 128 32
  moefy bench smol-moe --dtype bfloat16 --plot speed.png
  moefy kernels info
  moefy export smol-moe smol-llama4 --k 0.25 --dtype float32
  moefy export smol-moe smol-dense --to dense
  moefy permute-adapter smol-moe my-lora my-lora-for-smol-moe

MODEL is a Hub id or a local directory. Exit code 2: something about the input, said in one line."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser(arguments).parse_args(arguments)
    try:
        found = args.run(args)
    except (ValueError, OSError) as error:  # what users can mend; anything else is a bug and shows its traceback
        print(f"moefy {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found, indent=1) if args.json else args.show(found))


def parser(arguments: list[str]) -> argparse.ArgumentParser:
    """With the settings of the one command that is asked for."""
    top = argparse.ArgumentParser(
        prog="moefy", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name == asked:
            importlib.import_module(".arguments", __package__).ADDED[name](command)
    return top


if __name__ == "__main__":
    main()
