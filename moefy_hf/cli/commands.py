"""What the `moefy` command's words do: each takes the parsed arguments and returns what `--json` prints."""

import contextlib
import platform
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import MoeficationConfig
from ..conversion.adapters import permute_adapter
from ..conversion.checks import check_convertible
from ..conversion.convert import moefy_
from ..data import TextBatches, decoder_start_of, longest_text, read_lines, split_off
from ..evaluation.quality_check import Prediction, predict_quality
from ..exporters.export import export
from ..exporters.formats import EXPORT_FORMATS
from ..hub.card import is_rendered, moefied_config, router_settings_of, write_card
from ..hub.facts import add_facts
from ..hub.push import add_license, push_to_hub
from ..io import written_whole
from ..loading import checkpoint_class, load_checkpoint
from ..measure.cett import cett_curves, ppl_activation
from ..measure.metrics import is_causal
from ..measure.profile import profile
from ..measure.profile_table import described, profile_table
from ..modeling.ffn_sites import find_sites
from ..modeling.moefied import is_moefied

logger = logging.get_logger("moefy_hf")


def inspect(args: Namespace) -> dict[str, Any]:
    """Without loading weights."""
    config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    with torch.device("meta"):
        model = checkpoint_class(config, args.head)(config)
    sites = find_sites(model)
    ffn = sum(param.numel() for site in sites for param in {id(p): p for _, p, _, _ in site.neuron_dims()}.values())
    return {
        "model_type": config.model_type,
        "architecture": model._get_name(),
        "parameters": model.num_parameters(),
        "ffn_parameters": ffn,
        "moefication": getattr(config, "moefication", None),
        "export": [name for name, each in EXPORT_FORMATS.items() if config.model_type in each.sources] + ["dense"],
        "ffns": [
            {
                "name": site.name,
                "hidden_size": site.sizes[0],
                "neurons": site.sizes[1],
                "gated": site.gate is not None or site.spec.parts == 2,
                "expert_sizes": [n for n in range(8, site.sizes[1] // 2 + 1) if site.sizes[1] % n == 0],
            }
            for site in sites
        ],
    }


def show_inspected(found: dict[str, Any]) -> str:
    share = found["ffn_parameters"] / found["parameters"]
    section = found["moefication"]
    lines = [
        f"{found['architecture']} ({found['model_type']}), {found['parameters'] / 1e6:,.1f} M parameters, "
        f"{share:.0%} of them in {len(found['ffns'])} FFNs",
        f"can be exported to {', '.join(found['export'])}" if section else "dense",
    ]
    if section:
        router = f"{section['router']} router{router_settings_of(section)}"
        lines.append(f"MoEfied: {section['splitter']} split, {router}, {section['selection']}")
    lines += ["", "| FFN | d | neurons | gated | expert sizes |", "|---|---|---|---|---|"]
    for ffn in found["ffns"]:
        sizes = ", ".join(map(str, [n for n in ffn["expert_sizes"] if n <= 256]))
        gated = "yes" if ffn["gated"] else "no"
        lines.append(f"| {ffn['name']} | {ffn['hidden_size']} | {ffn['neurons']} | {gated} | {sizes} |")
    return "\n".join(lines)


def profile_model(args: Namespace) -> dict[str, Any]:
    if args.ppl is not None and not args.ppl > 0:
        raise ValueError(f"--ppl is a growth in percent, more than 0: got {args.ppl}")
    texts = read_lines(args.texts)
    model, tokenizer = load_model(args), load_tokenizer(args)
    batches = text_batches(args, model, tokenizer, texts)
    if args.ppl is not None and not is_causal(model):
        raise ValueError(f"--ppl needs a language model, whose labels are the texts; {model._get_name()} is none")
    with profile(model, batches, max_tokens=args.calibration_tokens, sample=False) as found:
        first = found.batches
    curves = cett_curves(model, first)
    sites = find_sites(model)
    rows = [
        {"ffn": site.name, **described(stats, curve)}
        for site, stats, curve in zip(sites, found.sites, curves, strict=True)
    ]
    result: dict[str, Any] = {"tokens": found.tokens, "cett_tokens": curves[0].tokens, "rows": rows}
    if args.ppl is not None:
        labelled = [
            {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in first
        ]
        ppl = ppl_activation(model, labelled, curves, args.ppl / 100)
        result["ppl"] = asdict(ppl)
        for row, active in zip(rows, ppl.active, strict=True):
            row["active_at_ppl"] = active
    return result | {"table": profile_table(result)}


def convert(args: Namespace) -> dict[str, Any]:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists: choose another output_dir")
    selection = {"type": args.selection, "k": args.k} | ({"allocation": args.allocation} if args.allocation else {})
    config = MoeficationConfig(
        num_experts=args.num_experts,
        expert_size=args.expert_size,
        splitter=args.splitter,
        router=args.router,
        router_settings=dict(args.router_settings),
        selection=selection,
        shared_experts=args.shared_experts,
        compensation=args.compensation,
        calibration_tokens=args.calibration_tokens,
        seed=args.seed,
    )
    texts = read_lines(args.texts) if args.texts else None
    model = load_model(args)
    check_convertible(model, config, texts)
    batches, held_out = None, None
    if texts is not None:
        tokenizer = load_tokenizer(args)
        fitted, kept = split_off(texts)
        batches = text_batches(args, model, tokenizer, fitted)
        held_out = text_batches(args, model, tokenizer, kept, "next" if is_causal(model) else None)
    report = moefy_(model, config, batches)
    prediction, told = predict(model, held_out)
    if prediction is not None and prediction.degenerate and not args.force:
        raise ValueError(f"{prediction.message()}; nothing was written (--force writes it all the same)")
    with written_whole(output_dir) as folder:
        as_loaded(model).save_pretrained(folder)
        for processor in processors(args):
            processor.save_pretrained(folder)
        calibration = Path(args.texts).name if texts else None
        add_facts(folder, conversion=report, calibration=calibration, prediction=prediction)
        add_license(folder, HfApi())
    found = {"output_dir": str(output_dir), "table": f"{report.table()}\n\n{told}", **report.to_dict()}
    return found | {"prediction": prediction and prediction.to_dict()}


def predict(model: PreTrainedModel, held_out: TextBatches | None) -> tuple[Prediction | None, str]:
    """How good a model that was just converted is, and what is said of it."""
    if held_out is None or not len(held_out):
        return None, "quality is not predicted without texts: moefy sweep measures it"
    try:
        found = predict_quality(model, held_out)
    except ValueError as error:  # a model without a head, or a regression
        return None, f"quality is not predicted: {error}"
    if found.bad:
        logger.warning(found.message())
    return found, f"predicted: {found.line()}"


def card(args: Namespace) -> dict[str, Any]:
    folder = checkpoint_folder(args)
    readme = folder / "README.md"
    if readme.exists() and not args.overwrite and not is_rendered(readme.read_text(encoding="utf-8")):
        raise FileExistsError(f"{readme} exists, and somebody has written in it: move it away, or --overwrite it")
    add_facts(folder, base_model=args.base_model, license=args.license)
    add_license(folder, HfApi())
    return {"card": str(write_card(folder, args.repo_id, overwrite=True))}


def push(args: Namespace) -> dict[str, Any]:
    commit = push_to_hub(
        checkpoint_folder(args),
        args.repo_id,
        private=args.private,
        branch=args.branch,
        create_pr=args.create_pr,
        overwrite=args.overwrite,
        message=args.message,
    )
    return {"url": commit.pr_url or commit.commit_url, "commit": commit.oid}


def export_model(args: Namespace) -> dict[str, Any]:
    # on the CPU, where it is written from
    model = load_checkpoint(args.model, args.revision, head=args.head, dtype=args.dtype)
    if args.k is not None and is_moefied(model):
        model.set_selection(k=args.k, allocation="uniform")
    try:
        tokenizer = load_tokenizer(args)
    except (ValueError, OSError):  # a checkpoint without one is exported without one
        tokenizer = None
    return {"output_dir": str(export(model, args.output_dir, args.to, tokenizer=tokenizer))}


def permuted_adapter(args: Namespace) -> dict[str, Any]:
    model = load_checkpoint(args.model, args.revision, head=args.head, dtype=args.dtype)
    return {"output_dir": str(permute_adapter(args.adapter, model, args.output_dir))}


def load_model(args: Namespace) -> PreTrainedModel:
    """On the accelerator, where there is one; computing in float32 where the processor knows no bfloat16."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = load_checkpoint(args.model, args.revision, head=args.head, dtype=args.dtype)
    if device is not None:
        return model.to(device)  # type: ignore[arg-type]
    if args.dtype == "auto" and model.dtype == torch.bfloat16 and not computes_bfloat16():
        logger.warning("this processor has no bfloat16: computing in float32 (--dtype bfloat16 keeps it, slowly)")
        model.float()
    return model


def computes_bfloat16() -> bool:
    """Whether the CPU has instructions for it; without, it is several times as slow as float32."""
    x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return x86 or platform.machine() in ("aarch64", "arm64")


def as_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """The model in the type that it was loaded in, whichever it computed in; routers stay in float32."""
    if model.config.dtype is not None and model.config.dtype != model.dtype:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not set(name.split(".")) & set(model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.to(model.config.dtype)
    return model


def text_batches(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    labels: list[int] | str | None = None,
) -> TextBatches:
    """Texts as this model reads them.

    Raises:
        ValueError: it reads none.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"a {model._get_name()} reads {model.main_input_name}, not texts: use moefy_hf in Python, or a recipe"
        )
    return TextBatches(
        texts,
        tokenizer,
        labels=labels,
        max_length=longest_text(model, tokenizer, args.max_length),
        seed=args.seed,
        decoder_start=decoder_start_of(model),
    )


def processors(args: Namespace) -> list[Any]:
    """The tokenizer and image processor that a checkpoint has, to go with what is made of it."""
    found = []
    for auto in (AutoTokenizer, AutoImageProcessor):
        with contextlib.suppress(ValueError, OSError, ImportError, KeyError):
            found.append(auto.from_pretrained(args.model, revision=args.revision))
    return found


def load_tokenizer(args: Namespace) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(args.model, revision=args.revision)


def checkpoint_folder(args: Namespace) -> Path:
    """A local checkpoint, for what is written beside its weights."""
    folder = Path(args.model)
    moefied_config(folder)
    return folder
