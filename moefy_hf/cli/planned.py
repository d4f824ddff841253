"""What `moefy convert` does with a goal: plan, instead of being told the settings."""

import argparse
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arguments import given, positive, read_yaml
from ..config import SETTINGS, MoEficationConfig
from ..data import TextBatches
from ..errors import MoefyError
from ..planning.candidates import CANDIDATES, NAMES, Candidate, candidates_for
from ..planning.clock import RUNTIMES, Load
from ..planning.plan import TOKENS, Plan, plan
from ..planning.trial import FAST_ENOUGH, Goal

EXIT_CODE = 3  # of a plan that chose nothing
KEPT = ("towers", "layers", "seed", "calibration_tokens", "allocation")  # settings that every candidate has
PLANS = ("validation", "runtime", "batch", "threads", "seconds", "method", "dense", "dry_run")  # of a plan alone


def add_plan(command: argparse.ArgumentParser) -> None:
    """Add the arguments of a plan to `moefy convert`."""
    group = command.add_argument_group(
        "plan", "Say what you want instead of how: candidates are tried and timed here, and the best one is written."
    )
    keep = "keep so much of the dense model's quality: accuracy of at least 0.99 of it, say; of language models "
    group.add_argument("--quality", type=float, help=f"{keep}perplexity of at most 1.05 of it")
    fast = f"times as fast as dense, at least (default, with --quality: {FAST_ENOUGH})"
    group.add_argument("--speedup", type=float, help=fast)
    rows = "as --data: rows that quality is measured on (default: every fourth of --data)"
    group.add_argument("--validation", metavar="FILE", help=rows)
    group.add_argument("--runtime", choices=[*RUNTIMES], help="that runs it later (default: pytorch)")
    group.add_argument("--batch", type=positive, help="texts at once (default: 1)")
    group.add_argument("--threads", type=positive, help="of the CPU (default: all cores)")
    group.add_argument("--seconds", type=float, help="for each timing (default: 6)")
    group.add_argument("--dense", metavar="FILE", help="the dense model's GGUF file, for llama.cpp")
    methods = "; ".join(f"{each.name}: {each.reason}" for each in CANDIDATES)
    group.add_argument("--method", nargs="+", choices=NAMES, metavar="NAME", help=f"try these alone. {methods}")
    group.add_argument("--dry_run", action="store_true", help="plan, and write nothing; OUTPUT may be left out")


def is_planned(args: Namespace) -> bool:
    """Return whether a goal was given.

    Raises:
        MoefyError: none, and arguments of a plan; or a goal, and a budget or no data.
    """
    if args.quality is None and args.speedup is None:
        useless = [f"--{name}" for name in PLANS if vars(args)[name] not in (None, False)]
        if useless:
            raise MoefyError(f"{', '.join(useless)} are for a plan: give --quality or --speedup")
        return False
    Goal(args.quality, args.speedup)
    if not args.data:
        raise MoefyError("a plan measures on texts: give --data")
    if budget := sorted({"k", "threshold"} & vars(args).keys()):
        raise MoefyError(f"--{budget[0]} is what a plan finds: leave it out")
    return True


def load_of(args: Namespace) -> Load:
    """Return what is timed.

    Raises:
        MoefyError: as `Load`.
    """
    names = {"runtime": "runtime", "batch": "batch", "threads": "threads", "seconds": "seconds", "dense": "gguf"}
    said = {field: vars(args)[name] for name, field in names.items() if vars(args)[name] is not None}
    return Load(**{"threads": torch.get_num_threads(), **said})


def found_plan(
    args: Namespace, model: PreTrainedModel, config: MoEficationConfig, batches: TextBatches, held_out: TextBatches
) -> Plan:
    """Plan a conversion: of --method, of the settings that were given, or of whatever suits the model.

    Raises:
        MoefyError: as `plan`, or both a method and settings.
    """
    said = {*given(args, MoEficationConfig), *(read_yaml(args.config) if args.config else ())}
    if "calibration_tokens" not in said:
        config = replace(config, calibration_tokens=TOKENS)
    tried = candidates_for(model, config, tuple(args.method)) if args.method else None
    if own := [name for name in SETTINGS if name in said and name not in (*KEPT, "k", "threshold")]:
        if args.method:
            raise MoefyError(f"--method has settings of its own: leave out {', '.join(own)}")
        settings = {name: value for name, value in vars(config).items() if name not in (*KEPT, "k", "threshold")}
        tried = [Candidate("as given", settings, "", "the settings that were given", "")]
    goal: dict[str, Any] = {"quality": args.quality, "speedup": args.speedup}
    found = plan(model.to("cpu"), batches, held_out, load=load_of(args), config=config, candidates=tried, **goal)  # type: ignore[arg-type]
    return replace(found, validated=bool(args.validation))
