#!/usr/bin/env python
"""MoEfied language models in llama.cpp: are they the same models, how fast are they, and how good?

    pip install "moefy-hf[llama-cpp]"
    python recipes/figures/gguf_speed.py smol-32 smol-128 --dense smol-dense.gguf --texts held_out.txt \\
        --output model_cards/speed/gguf_smollm2.json

Each checkpoint is exported at each share of its experts, from the dense GGUF file and from its Q8_0. In float32,
logits and 20 greedy generations are compared with the masked model. Then all files are timed in turns, prompt and new
tokens apart, for each number of threads. Perplexity on the same text stands beside every speed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from moefy_hf.bench.engines import ENGINES
from moefy_hf.bench.engines.base import LanguageModel, Subject
from moefy_hf.bench.engines.llama_cpp import LlamaCppModel
from moefy_hf.bench.engines.pytorch import TorchLanguageModel
from moefy_hf.bench.tasks import Reading
from moefy_hf.bench.tasks.language_models import LanguageTask, first
from moefy_hf.bench.timing import against, hardware, quartiles
from moefy_hf.data import TextSource
from moefy_hf.errors import MoefyError
from moefy_hf.exporters.export import export_gguf
from moefy_hf.io import check_files, markdown, write_whole
from moefy_hf.loading import MoefiedModel, check_moefied, load

ENGINE_NAMES = {"F32": "llama.cpp", "Q8_0": "llama.cpp-q8_0"}
PROMPTS, SAME = 20, 1e-4  # share of the largest logit: more is another expert, not another order of sums
DENSE = "dense"


def main() -> None:
    args = parser().parse_args()
    try:
        for name in ENGINE_NAMES.values():
            ENGINES[name].check_installed()
        check_files(str(args.output), plot=None)
        figures = measure(args)
    except (ValueError, OSError) as error:
        sys.exit(f"gguf_speed.py: {' '.join(str(error).split())}")
    write_whole(args.output, json.dumps(figures, indent=1))
    print(table(figures))


def parser() -> argparse.ArgumentParser:
    added = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    added.add_argument("moefied", nargs="+", help="MoEfied checkpoints of one dense model, with a tokenizer")
    added.add_argument("--dense", required=True, help="GGUF file of the dense model, in F32, F16 or BF16")
    added.add_argument("--texts", required=True, help="text that neither training nor calibration has seen")
    added.add_argument("--output", type=Path, required=True, help="JSON file that gets the figures")
    added.add_argument("--k", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of the experts")
    added.add_argument(
        "--compare", type=float, nargs="+", default=[0.5], help="those that are compared (default: 0.5)"
    )
    added.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    added.add_argument("--rows", type=int, default=40, help="texts for perplexity, a line each (default: 40)")
    added.add_argument("--rounds", type=int, default=8, help="timings of each model (default: 8)")
    return added


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Export all models, compare and time them.

    Raises:
        ValueError: a checkpoint is not MoEfied, or cannot be exported.
    """
    models = {name: check_moefied(load(name, dtype="float32").eval()) for name in args.moefied}
    reading = Reading(TextSource(args.texts, max_rows=args.rows), prompt=64, new_tokens=32, rounds=args.rounds)
    one = next(iter(models.values()))
    task = LanguageTask(reading, one, AutoTokenizer.from_pretrained(args.moefied[0]))
    if sum(map(len, task.ids)) < PROMPTS * reading.prompt:
        raise ValueError(
            f"{args.texts} has too few tokens in {args.rows} texts: {PROMPTS * reading.prompt} are needed"
        )
    figures: dict[str, Any] = {
        "command": "python recipes/figures/gguf_speed.py " + " ".join(sys.argv[1:]),
        "hardware": hardware(),
        "versions": {name: ENGINES[name].version() for name in ENGINE_NAMES.values()},
    }
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        subject = Subject(one, one, one, [], Path(folder), 1024, max(args.threads), args.dense)
        files, figures["refused"] = written(models, sorted({*args.k, *args.compare}), subject)
        figures["same"] = [
            same(name, models[name], share, files["F32", name, share], task)
            for name in models
            for share in args.compare
            if ("F32", name, share) in files
        ]
        running = {key: LlamaCppModel(path, 1024, max(args.threads)) for key, path in files.items()}
        _, quality = task.quality(running)
        del running
        figures["rows"] = [row for threads in args.threads for row in timed(files, threads, task, quality)]
    return figures


def written(
    models: dict[str, MoefiedModel], shares: list[float], subject: Subject
) -> tuple[dict[Any, Path], dict[str, str]]:
    """Write a GGUF file of each model at each share in each type.

    Returns:
        (type, model, share) -> file; and why some cannot be, which is said of each once.
    """
    found: dict[Any, Path] = {}
    refused: dict[str, str] = {}
    for kind, engine in ENGINE_NAMES.items():
        source = ENGINES[engine].source(subject)  # type: ignore[attr-defined]
        found[kind, DENSE, 1.0] = source
        for name, model in models.items():
            for share in shares:
                model.set_selection(k=share, allocation="uniform")
                path = subject.folder / f"{Path(name).name}-{share}-{kind}.gguf"
                try:
                    found[kind, name, share] = export_gguf(model, path, source).output
                except MoefyError as error:
                    refused[f"{name} at {share:.0%}"] = str(error)
    return found, refused


def same(name: str, model: MoefiedModel, share: float, path: Path, task: LanguageTask) -> dict[str, Any]:
    """Compare a file with the masked model: logits after each token of the prompts, and what they write."""
    model.set_selection(k=share, allocation="uniform")
    readers = TorchLanguageModel(model), LlamaCppModel(path, 256, torch.get_num_threads())
    size, new = task.reading.prompt, task.reading.new_tokens
    prompts = torch.cat(task.ids)[: PROMPTS * size].view(PROMPTS, size)
    differences, identical = [], 0
    for ids in tqdm(prompts, desc=f"{name} at {share:.0%} and its file", unit="prompt"):
        ours, theirs = (everywhere(reader, ids) for reader in readers)
        differences.append((ours - theirs).abs().amax(-1) / ours.abs().max())
        written, read = (greedy(reader, ids, new) for reader in readers)
        identical += written == read
    difference = torch.cat(differences)
    return {
        "model": name,
        "k": share,
        "largest_difference": float(difference.max()),
        "tokens": len(difference),
        "tokens_that_differ": int((difference > SAME).sum()),
        "identical_generations": identical,
        "generations": PROMPTS,
    }


def everywhere(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (n, V) after each token of a new text."""
    model.forget()
    return model.read(ids)


def greedy(model: LanguageModel, ids: torch.Tensor, tokens: int) -> list[int]:
    """Return what a model writes after a prompt."""
    logits, found = first(model, ids), []
    for _ in range(tokens):
        found.append(int(logits.argmax()))
        logits = model.read(logits.argmax(-1), last=True)
    return found


def timed(files: dict[Any, Path], threads: int, task: LanguageTask, quality: dict[Any, float]) -> list[dict[str, Any]]:
    """Time all files in turns; `quality` is their perplexity."""
    running = {key: LlamaCppModel(path, 1024, threads) for key, path in files.items()}
    rows = []
    for each in task.times(running):
        for key, seconds in each.taken.items():
            kind, name, share = key
            row = {"work": each.work, "threads": threads, "type": kind, "model": name, "k": share}
            row |= {"tokens_per_second": each.amount / quartiles(seconds)[1], "perplexity": quality[key]}
            rows.append(row | against(each.taken[kind, DENSE, 1.0], seconds))
    return rows


def table(figures: dict[str, Any]) -> str:
    """Return the figures as markdown: what is the same, then speeds."""
    rows = [{name: value for name, value in row.items() if name != "spread"} for row in figures["rows"]]
    return f"{markdown(figures['same'])}\n\n{markdown(rows)}"


if __name__ == "__main__":
    main()
