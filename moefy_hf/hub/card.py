"""The model card of a checkpoint, rendered from its config and facts; what is not known is left out."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from ..conversion.convert import ConversionReport
from ..conversion.fit_routers import RouterFit
from ..evaluation.plots import allocation_words, plot_experts
from ..evaluation.quality_check import QualityCheck
from ..evaluation.sweep import Sweep
from ..io import is_hub_id, markdown, write_whole
from ..modeling.needs import TRANSFORMERS
from ..modeling.section import NAME, Section
from ..modeling.selection_config import setting_name
from .facts import read_facts

logger = logging.get_logger("moefy_hf")

PLOT = "quality_against_compute.png"
EXPERTS_PLOT = "experts.png"
SPREAD = {  # of ALLOCATIONS
    "uniform": "the same in each layer",
    "sensitivity": "more where a layer needs them",
    "angular": "more where a layer turns the hidden states further",
    "global": "by one setting for all layers",
}
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}


def model_card(folder: str | Path, repo_id: str | None = None, revision: str | None = None) -> ModelCard:
    """The card of a MoEfied checkpoint.

    Args:
        repo_id: where it is going to be; by default the card names the folder.
        revision: a branch or tag that its example loads.

    Raises:
        ValueError: the folder holds no MoEfied checkpoint.
    """
    folder = Path(folder)
    config = moefied_config(folder)
    facts, section = known_facts(folder), Section.of_values(config[NAME])
    architecture = config["architectures"][0].removeprefix("Moefied")
    auto = auto_class(config)
    sweep = Sweep(facts["sweep"]["rows"], facts["sweep"]["facts"]) if "sweep" in facts else None
    report = conversion_report(facts["conversion"]) if "conversion" in facts else None
    name = (repo_id or folder.resolve().name).rpartition("/")[2]
    return ModelCard.from_template(
        card_data(name, facts, auto, sweep),
        template_path=str(Path(__file__).with_name("card_template.md")),
        name=name,
        repo_id=repo_id or folder.resolve().name,
        revision="" if revision is None else f', revision="{revision}"',
        pin=revision is None,
        base_model=linked(facts["base_model"]) if "base_model" in facts else None,
        architecture=architecture,
        transformers=".".join(map(str, TRANSFORMERS)),
        auto=auto,
        example=example(section.selection),
        ffns="all its" if section.layers is None else f"{len(section.layers)} of its",
        summary=summary(section, report, facts),
        training=facts.get("training"),
        sweep=sweep and sweep.table(),
        quality=sweep and sweep.facts["quality"],
        evaluation=data_of(facts.get("evaluation")),
        plot=PLOT if (folder / PLOT).exists() else None,
        conversion=report and report.table(),
        analysis=facts.get("analysis") and analysis_table(facts["analysis"]),
        experts_plot=EXPERTS_PLOT if (folder / EXPERTS_PLOT).exists() else None,
        speed=facts.get("speed") and speed_table(facts["speed"]),
        calibration=data_of(facts.get("calibration")),
        license=facts.get("license"),
    )


def example(selection: dict[str, Any]) -> str:
    """How the budget is set: by its setting, where nobody has measured what that spends."""
    name = setting_name(selection["type"])
    if name in selection:
        value = selection[name]
        value = value[0] if isinstance(value, list) else value
        return f"{name}={value:g})  # the budget, any time: the larger, the more experts"
    return "k=0.5)  # the budget, any time: a share of the experts, a number, or one per layer"


def write_card(
    folder: str | Path, repo_id: str | None = None, revision: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write a checkpoint's card, README.md, and the plot of its sweep (where matplotlib is installed).

    A card that was rendered and not touched since is rendered anew.

    Raises:
        ValueError: the folder holds no MoEfied checkpoint.
        FileExistsError: there is a README.md that somebody has written in, and not `overwrite`.
    """
    folder = Path(folder)
    moefied_config(folder)
    path = folder / "README.md"
    if path.exists() and not overwrite and not is_rendered(path.read_text(encoding="utf-8")):
        raise FileExistsError(f"{path} exists, and somebody has written in it: move it away, or overwrite it")
    facts = read_facts(folder)
    try:
        if "sweep" in facts:
            Sweep(facts["sweep"]["rows"], facts["sweep"]["facts"]).plot(folder / PLOT)
        if "analysis" in facts:
            plot_experts(facts["analysis"], folder / EXPERTS_PLOT)
    except ImportError as error:
        logger.warning_once(f"the card has no plot: {error}")
    write_whole(path, sealed(str(model_card(folder, repo_id, revision))))
    return path


def sealed(text: str) -> str:
    """With a last line by which it is known, later, that nobody has changed it."""
    return f"{text.rstrip()}\n\n<!-- rendered: {hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]} -->\n"


def is_rendered(text: str) -> bool:
    """Whether a card is as it was rendered."""
    own, _, _ = text.rpartition("\n\n<!-- rendered: ")
    return sealed(own) == text


def known_facts(folder: Path) -> dict[str, Any]:
    """A checkpoint's facts, with the base model that its conversion saw where nobody named one."""
    facts = read_facts(folder)
    base = facts.get("conversion", {}).get("base_model")
    return facts if base is None else {"base_model": base} | facts


def moefied_config(folder: Path) -> dict[str, Any]:
    """The config.json of a MoEfied checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no checkpoint: there is no config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if Section.of(config) is None:
        raise ValueError(f"{folder} holds a checkpoint that is not MoEfied")
    return config


def auto_class(config: dict[str, Any]) -> str:
    """The AutoModel name that a checkpoint's own head is loaded by."""
    own = config["architectures"][0]
    names = [name for name, path in config["auto_map"].items() if path.rpartition(".")[2] == own]
    heads = [name for name in names if name != "AutoModel"]  # CLIP has two names
    return next((name for name in heads if name in TASKS), (heads or ["AutoModel"])[0])


def card_data(name: str, facts: dict[str, Any], auto: str, sweep: Sweep | None) -> ModelCardData:
    base = facts.get("base_model")
    known: dict[str, Any] = {}
    if base is not None and is_hub_id(base):
        known = {"base_model": base, "base_model_relation": "finetune"}
    data = facts.get("evaluation", {}).get("data")
    if sweep is not None and data is not None and auto in TASKS:
        known |= {"model_name": name, "eval_results": eval_results(facts["evaluation"], TASKS[auto], sweep)}
    return ModelCardData(
        library_name="transformers",
        license=facts.get("license"),
        pipeline_tag=TASKS.get(auto),
        tags=["moefication", "moe", "custom_code"],
        **known,
    )


def eval_results(evaluation: dict[str, Any], task: str, sweep: Sweep) -> list[EvalResult]:
    """The model-index: a metric per budget of the checkpoint's own router."""
    quality, data = sweep.facts["quality"], evaluation["data"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=data if is_hub_id(data) else "other",
            dataset_name=data,
            dataset_split=evaluation.get("split"),
            metric_type=quality,
            metric_name=f"{quality}, {row['experts']:.0%} of experts ({allocation_words(row)})",
            metric_value=row[quality],
        )
        for row in sweep.rows
        if row["router"] == "own"
    ]


def conversion_report(found: dict[str, Any]) -> ConversionReport:
    return ConversionReport(**found | {"fits": [RouterFit(**fit) for fit in found["fits"]]})


def prediction_of(found: dict[str, Any]) -> QualityCheck:
    return QualityCheck(**{each.name: found[each.name] for each in fields(QualityCheck) if each.name in found})


def router_settings_of(section: Section) -> str:
    settings = section.router_settings
    return f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""


def summary(section: Section, report: ConversionReport | None, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the first table."""
    selection, base = section.selection, facts.get("base_model")
    size, experts = section.expert_size, section.num_experts
    rows = [] if base is None else [("base model", linked(base))]
    rows += [
        ("experts", f"{size} neurons each" if experts is None else f"{experts} per FFN"),
        ("split", f"`{section.splitter}`"),
        ("router", f"`{section.router}`" + router_settings_of(section)),
        ("budget", budget(selection)),
    ]
    if report is not None and report.calibration_tokens:
        data = data_of(facts.get("calibration"))
        rows.append(("calibration", f"{report.calibration_tokens:,} tokens" + (f" of {data}" if data else "")))
    if "prediction" in facts:
        rows.append(("right after conversion", prediction_of(facts["prediction"]).line()))
    if "pruning" in facts:
        pruned = facts["pruning"]
        rows.append(("pruned", f"{pruned['pruned']} of {pruned['experts']} experts of every layer: {pruned['by']}"))
    for name, value in facts.get("training", {}).items():
        rows.append((f"training: {name}", f"{value}"))
    if "versions" in facts:
        rows.append(("made with", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())))
    return [(what, value.replace("|", "\\|")) for what, value in rows]


def budget(selection: dict[str, Any]) -> str:
    kind, k = selection["type"], selection.get("k")
    name = setting_name(kind)
    if name is not None and k is None:
        return f"as many experts as a token needs: `{kind}`, {name} {selection[name]}"
    on_average = "" if name is None else f" on average, by `{kind}`"
    if isinstance(k, list):
        return f"{', '.join(map(str, k))} experts, layer by layer{on_average}"
    share = f"{k:.0%} of the experts" if isinstance(k, float) else f"{k} experts"
    return f"{share}{on_average}, {SPREAD[selection.get('allocation', 'uniform')]}"


def analysis_table(found: dict[str, Any]) -> str:
    """How specialised the experts are, under what that was measured on."""
    measured = found["facts"]
    return f"Measured on {measured['texts']:,} texts of {measured['data']}.\n\n{markdown(found['specialisation'])}"


def speed_table(speed: dict[str, Any]) -> str:
    """Rows of equal keys as a Markdown table, under the hardware they were measured on."""
    columns = list(speed["rows"][0])
    lines = [f"Measured on {speed['hardware']}.", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(f"{row[name]}" for name in columns) + " |" for row in speed["rows"]]
    return "\n".join(lines)


def data_of(found: dict[str, Any] | None) -> str | None:
    """'imdb, test': name and split of a data set."""
    if not found or "data" not in found:
        return None
    return ", ".join(f"{found[key]}" for key in ("data", "split") if found.get(key))


def linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else name
