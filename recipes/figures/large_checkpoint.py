#!/usr/bin/env python
"""A checkpoint that is larger than memory: made with random weights, and what converting and exporting it takes.

    tokenizer="$(python -m moefy_hf.recipes.inputs smollm2)"
    python recipes/figures/large_checkpoint.py make llama-8b --tokenizer "$tokenizer"
    python recipes/figures/large_checkpoint.py measure large.json -- moefy convert llama-8b llama-8b-moe \\
        --offload yes --data texts.txt --calibration_tokens 2048 --expert_size 64 --k 0.25 \\
        --splitter gate_clustering --router similarity --json

`make` writes the shape of Llama 3 8B in bfloat16, 16 GB, shard by shard; --layers writes fewer layers. `measure` runs
a command and writes how long it took and the most memory that it held, pages of files that it has mapped included. Of
a conversion it also writes the seconds of each step, which `--json` prints.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moefy_hf.bench.timing import hardware
from moefy_hf.io import write_whole, written_whole

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "architectures": ["LlamaForCausalLM"],
}
STD = 0.02  # of weights, as models are initialised


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    made = commands.add_parser("make", help="write a checkpoint of random weights")
    made.add_argument("output", type=Path, help="folder that gets it; must not exist")
    made.add_argument("--tokenizer", required=True, help="folder with a tokenizer, whose ids the model has, too")
    made.add_argument("--layers", type=int, default=32)
    made.set_defaults(run=make)
    measured = commands.add_parser("measure", help="run a command; write its time and memory")
    measured.add_argument("output", type=Path, help="JSON file that gets the figures")
    measured.add_argument("command", nargs="+", help="behind --")
    measured.set_defaults(run=measure)
    args = top.parse_args()
    args.run(args)


def make(args: argparse.Namespace) -> None:
    """Write the checkpoint, a shard per layer: no more than one is in memory."""
    if args.output.exists():
        sys.exit(f"{args.output} exists")
    config = LlamaConfig(**LLAMA_8B, num_hidden_layers=args.layers)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    generator = torch.Generator().manual_seed(0)
    with written_whole(args.output) as folder:
        places = {}
        for number, names in enumerate(tqdm(shards.values(), unit="shard")):
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            weights = {name: random(shapes[name], generator) for name in names}
            save_file(weights, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        size = sum(shape.numel() for shape in shapes.values()) * 2
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(folder)


def random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return random weights; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=STD, generator=generator).bfloat16()


def measure(args: argparse.Namespace) -> None:
    """Run the command, and write its wall time in seconds and its largest resident set in GB."""
    started = time.perf_counter()
    done = subprocess.run(args.command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    printed = json.loads(done.stdout) if "--json" in args.command else {}
    found = {
        "command": " ".join(args.command),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        "steps": {name: round(each, 1) for name, each in printed.get("seconds", {}).items()},
        "hardware": hardware(),
    }
    write_whole(args.output, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
