#!/usr/bin/env python
"""Is an exported checkpoint the MoEfied model it was made of? Measured on real text, in float32 on the CPU.

    python recipes/figures/check_export.py my-moe my-mixtral --texts held_out.txt --facts facts.json \\
        --prompts prompts.json
    node recipes/serving/llama_cpp.mjs my-mixtral.gguf prompts.json generations.json
    python recipes/figures/check_export.py my-moe my-mixtral --texts held_out.txt --facts facts.json \\
        --generations generations.json

Compares logits token by token, and greedy generations of 20 beginnings of sentences; with --generations also those of
an engine that was given the token ids in prompts.json (serving/README.md). The MoEfied model computes as many experts
as the exported one says. Ties, where rounding lets a router select another expert, are found and named.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moefy_hf.loading import MoefiedModel
from moefy_hf.measure.contexts import hooked
from moefy_hf.recipes.stages import write_json

WINDOW, PROMPTS = 256, 20


def main() -> None:
    args = parser().parse_args()
    try:
        facts = check(args)
    except (ValueError, OSError) as error:
        sys.exit(f"check_export.py: {' '.join(str(error).split())}")
    print(table(facts))


def parser() -> argparse.ArgumentParser:
    added = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    added.add_argument("moefied", type=Path, help="MoEfied checkpoint, a local directory with its tokenizer")
    added.add_argument("exported", type=Path, help="what `moefy export` made of it")
    added.add_argument("--texts", type=Path, required=True, help="text that neither training nor calibration has seen")
    added.add_argument("--facts", type=Path, required=True, help="JSON file that gets the figures")
    added.add_argument("--prompts", type=Path, help="JSON file that gets the prompts, for an engine")
    added.add_argument("--generations", type=Path, help="JSON file of an engine's generations")
    added.add_argument("--tokens", type=int, default=4096, help="tokens to compare logits on (default: 4096)")
    added.add_argument("--prompt_tokens", type=int, default=12, help="tokens of a prompt (default: 12)")
    added.add_argument("--new_tokens", type=int, default=32, help="tokens to generate (default: 32)")
    return added


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and write what was asked for.

    Raises:
        ValueError: the checkpoints are not a MoEfied one and an export, the text is too short, or the engine's file is
            not of these prompts.
    """
    stop = check_checkpoints(args)
    tokenizer = AutoTokenizer.from_pretrained(args.moefied)
    windows, prompts = read_texts(args, tokenizer)
    engine = read_generations(args.generations, len(prompts)) if args.generations else None

    model = AutoModelForCausalLM.from_pretrained(args.moefied, trust_remote_code=True, dtype=torch.float32).eval()
    served = AutoModelForCausalLM.from_pretrained(args.exported, dtype=torch.float32).eval()
    k = getattr(served.config, "num_experts_per_tok", 1.0)
    model.set_selection(k=k, allocation="uniform")
    sites = model.moe_sites()
    facts: dict[str, Any] = {
        "command": "python recipes/figures/check_export.py " + " ".join(sys.argv[1:]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32",
        "architecture": type(served).__name__,
        "moefication": model.config.moefication,
        "experts": sites[0].act.num_experts,
        "k": sites[0].act.k,
        "layers": len(sites),
        "logits": compare_logits(model, served, windows),
    }
    ours, theirs = ([greedy(each, prompt, args.new_tokens, stop) for prompt in prompts] for each in (model, served))
    facts["generations"] = {"new_tokens": args.new_tokens, "prompt_tokens": args.prompt_tokens}
    facts["generations"] |= compare_generations(model, prompts, ours, theirs)
    if engine is not None:
        found = compare_generations(model, prompts, ours, engine["generations"])
        found["first_step"] = compare_first_logits(model, prompts, engine["first_logits"])
        facts["engine"] = {"name": engine["engine"], **found}
    if args.prompts:
        write_json(args.prompts, {"prompts": prompts, "new_tokens": args.new_tokens, "stop": stop, "expected": ours})
    args.facts.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.facts, facts)
    return facts


# ---- what is compared


def check_checkpoints(args: argparse.Namespace) -> list[int]:
    """The tokens that end a generation."""
    for path in (args.moefied, args.exported):
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no checkpoint: it has no config.json")
    config, served = (AutoConfig.from_pretrained(path) for path in (args.moefied, args.exported))
    if not hasattr(config, "moefication"):
        raise ValueError(f"{args.moefied} is not MoEfied: make it with moefy convert")
    if hasattr(served, "moefication"):
        raise ValueError(f"{args.exported} is MoEfied, not exported: make it with moefy export")
    if config.vocab_size != served.vocab_size or config.num_hidden_layers != served.num_hidden_layers:
        raise ValueError(f"{args.exported} was not made of {args.moefied}: vocabularies or layers differ in number")
    stop = config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def read_texts(args: argparse.Namespace, tokenizer: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Consecutive windows of token ids (N, WINDOW), and the beginnings of sentences spread over the whole text."""
    text = " ".join(args.texts.read_text(encoding="utf-8").split())
    windows = tokenizer(text, return_tensors="pt")["input_ids"][0, : args.tokens]
    width = min(WINDOW, args.tokens)
    if len(windows) < args.tokens:
        raise ValueError(f"{args.texts} has {len(windows)} tokens, {args.tokens} are needed")
    sentences = [tokenizer(each)["input_ids"] for each in re.split(r"(?<=[.!?]) (?=[A-Z])", text)]
    beginnings = {tuple(ids[: args.prompt_tokens]): None for ids in sentences if len(ids) > args.prompt_tokens}
    if len(beginnings) < PROMPTS:
        raise ValueError(
            f"{args.texts} has {len(beginnings)} sentences of more than {args.prompt_tokens} tokens that begin "
            f"differently, {PROMPTS} are needed"
        )
    every = len(beginnings) // PROMPTS
    prompts = [list(each) for each in list(beginnings)[::every][:PROMPTS]]
    return windows[: len(windows) // width * width].view(-1, width), prompts


def read_generations(path: Path, prompts: int) -> dict[str, Any]:
    engine = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(engine, dict) or not {"engine", "generations", "first_logits"} <= engine.keys():
        raise ValueError(f"{path} lacks engine, generations or first_logits: it is no output of an engine's script")
    if not len(engine["generations"]) == len(engine["first_logits"]) == prompts:
        raise ValueError(f"{path} holds {len(engine['generations'])} generations, there are {prompts} prompts")
    return engine


# ---- comparing


@torch.no_grad()
def compare_logits(model: MoefiedModel, served: PreTrainedModel, windows: torch.Tensor) -> dict[str, Any]:
    """Compare all logits, and those before the first tie of each window: see `first_tie`."""
    differences, top, same, ties = [], [], [], []
    for number, window in enumerate(windows.split(1)):
        with selections(model, served) as (scores, chosen):
            ours, theirs = model(input_ids=window).logits[0], served(input_ids=window).logits[0]
        differences.append((ours - theirs).abs().amax(-1))
        top.append(ours.abs().max())
        same.append(ours.argmax(-1) == theirs.argmax(-1))
        if tie := first_tie(scores, chosen):
            ties.append({"window": number, **tie})
    difference, scale = torch.stack(differences), float(torch.stack(top).max())
    before = torch.ones_like(difference, dtype=torch.bool)
    for tie in ties:
        before[tie["window"], tie["token"] :] = False
    return {
        "tokens": windows.numel(),
        "largest": scale,
        "largest_difference": float(difference.max()),
        "relative_difference": float(difference.max()) / scale,
        "same_top_token": float(torch.stack(same).float().mean()),
        "ties": ties,
        "tokens_before_ties": int(before.sum()),
        "relative_difference_before_ties": float(difference[before].max()) / scale if before.any() else None,
    }


@contextlib.contextmanager
def selections(
    model: MoefiedModel, served: PreTrainedModel
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Collect our scores (T, E) and the experts that the export selects (T, k), a layer each."""
    scores: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    hooks = [
        site.act.router.register_forward_hook(lambda router, args, output: scores.append(output.flatten(0, -2)))
        for site in model.moe_sites()
    ]
    hooks += [
        module.register_forward_pre_hook(
            lambda experts, args: chosen.append(args[1])
        )  # hidden states, indices, weights
        for name, module in served.named_modules()
        if name.endswith(".experts")
    ]
    with hooked(hooks):
        yield scores, chosen


def first_tie(scores: list[torch.Tensor], chosen: list[torch.Tensor]) -> dict[str, Any] | None:
    """Find the first token whose selection differs, and by how much its scores said so; None where none differs.

    Rounding decides between experts with nearly the same score. All earlier tokens have equal selections.

    Returns:
        `token`, `layer`, and `margin`: between the last score that is selected and the next, over the scores' standard
        deviation.
    """
    found = []
    for layer, (ours, theirs) in enumerate(zip(scores, chosen, strict=bool(chosen))):
        k = theirs.shape[-1]
        differs = (ours.topk(k).indices.sort().values != theirs.sort().values).any(-1).nonzero()
        if len(differs):
            token = int(differs[0])
            last, following = ours[token].topk(k + 1).values[-2:]
            found.append({"token": token, "layer": layer, "margin": float((last - following) / ours[token].std())})
    return min(found, key=lambda tie: (tie["token"], tie["layer"]), default=None)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int, stop: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"eos_token_id": stop or None, "pad_token_id": stop[0] if stop else 0}
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, **settings
    )
    return found[0, len(prompt) :].tolist()


def compare_generations(
    model: PreTrainedModel, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> dict[str, Any]:
    """How many are the same; where one is not, the first token that differs and how close our two best were there."""
    differing = []
    for number, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            best = last_logits(model, prompt + a[:at]).topk(2).values
            differing.append({"prompt": number, "token": at, "margin": float(best[0] - best[1])})
    return {"prompts": len(prompts), "identical": len(prompts) - len(differing), "differing": differing}


def compare_first_logits(
    model: PreTrainedModel, prompts: list[list[int]], theirs: list[list[float]]
) -> dict[str, float]:
    ours = torch.stack([last_logits(model, prompt) for prompt in prompts])
    other = torch.tensor(theirs)
    if ours.shape != other.shape:
        raise ValueError(f"the engine has {other.shape[-1]} logits per token, the model {ours.shape[-1]}")
    difference, scale = float((ours - other).abs().max()), float(ours.abs().max())
    same = int((ours.argmax(-1) == other.argmax(-1)).sum())
    return {"largest_difference": difference, "relative_difference": difference / scale, "same_top_token": same}


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


def table(facts: dict[str, Any]) -> str:
    logits, generations = facts["logits"], facts["generations"]
    lines = [
        f"{facts['architecture']}, {facts['k']} of {facts['experts']} experts in {facts['layers']} layers, "
        f"{facts['dtype']}",
        "",
        "| compared with the MoEfied model | |",
        "|---|---|",
        f"| largest logit difference / largest logit, {logits['tokens']:,} tokens | "
        f"{logits['relative_difference']:.1e} |",
        f"| the same, {logits['tokens_before_ties']:,} tokens before one that selects another expert | "
        f"{logits['relative_difference_before_ties'] or 0:.1e} |",
        f"| same top token | {logits['same_top_token']:.2%} |",
        f"| identical greedy generations, {generations['new_tokens']} tokens | "
        f"{generations['identical']} of {generations['prompts']} |",
    ]
    if engine := facts.get("engine"):
        first = engine["first_step"]
        lines += [
            f"| {engine['name']}: identical generations | {engine['identical']} of {engine['prompts']} |",
            f"| ... largest logit difference of the first step / largest logit | {first['relative_difference']:.1e} |",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
