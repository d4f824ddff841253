"""The model card of a checkpoint, rendered from its config and model card data; what is not known is left out."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from ..errors import MoefyError, NotMoefied
from ..evaluation.benchmarks import Benchmarks
from ..evaluation.plots import allocation_words, plot_experts
from ..evaluation.sweep import Sweep
from ..io import is_hub_id, write_whole
from ..modeling.needs import TRANSFORMERS
from ..modeling.section import NAME, Section
from .card_text import analysis_table, conversion_report, data_of, example, ffns_of, linked, speed_table, summary
from .facts import read_facts

logger = logging.get_logger("moefy_hf")

PLOT = "quality_against_compute.png"
EXPERTS_PLOT = "experts.png"
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
    """Render the card of a MoEfied checkpoint.

    Args:
        folder: of the checkpoint.
        repo_id: where it is going to be; by default the card names the folder.
        revision: a branch or tag that its example loads.

    Returns:
        the card; `str` of it is the text of README.md.

    Raises:
        MoefyError: the folder holds no checkpoint.
        NotMoefied: the folder holds a dense checkpoint.

    Example:
        >>> print(model_card("my-moe", repo_id="me/my-moe"))
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
        ffns=ffns_of(config, section, report),
        summary=summary(section, report, facts),
        training=facts.get("training"),
        sweep=sweep and sweep.table(),
        quality=sweep and sweep.facts["quality"],
        evaluation=data_of(facts.get("evaluation")),
        benchmarks=Benchmarks(**facts["benchmarks"]) if "benchmarks" in facts else None,
        plot=PLOT if (folder / PLOT).exists() else None,
        conversion=report and report.table(),
        analysis=facts.get("analysis") and analysis_table(facts["analysis"]),
        experts_plot=EXPERTS_PLOT if (folder / EXPERTS_PLOT).exists() else None,
        speed=facts.get("speed") and speed_table(facts["speed"]),
        calibration=data_of(facts.get("calibration")),
        license=facts.get("license"),
    )


def write_card(
    folder: str | Path, repo_id: str | None = None, revision: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write a checkpoint's card, README.md, and the plot of its sweep (where matplotlib is installed).

    A card that was rendered and not edited since is rendered anew.

    Args:
        folder: of the checkpoint.
        repo_id: where it is going to be; by default the card names the folder.
        revision: a branch or tag that its example loads.
        overwrite: also replace a README.md that somebody has edited.

    Returns:
        the path of README.md.

    Raises:
        MoefyError: the folder holds no checkpoint.
        NotMoefied: the folder holds a dense checkpoint.
        FileExistsError: there is a README.md that somebody has edited, and not `overwrite`.

    Example:
        >>> write_card("my-moe", repo_id="me/my-moe")
        PosixPath('my-moe/README.md')
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
    write_whole(path, with_checksum(str(model_card(folder, repo_id, revision))))
    return path


def with_checksum(text: str) -> str:
    """Return a card with a last line that holds the checksum of the rest, by which `is_rendered` sees edits."""
    return f"{text.rstrip()}\n\n<!-- rendered: {hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]} -->\n"


def is_rendered(text: str) -> bool:
    """Return whether a card is as it was rendered: nobody has edited it."""
    body, _, _ = text.rpartition("\n\n<!-- rendered: ")
    return with_checksum(body) == text


def known_facts(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's model card data, with the base model that the conversion saw where nobody named one."""
    facts = read_facts(folder)
    base = facts.get("conversion", {}).get("base_model")
    return facts if base is None else {"base_model": base} | facts


def moefied_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a MoEfied checkpoint.

    Raises:
        MoefyError: there is none.
        NotMoefied: the checkpoint is dense.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MoefyError(f"{folder} holds no checkpoint: there is no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoefyError(f"{path} cannot be read: {error}") from error
    if Section.of(config) is None:
        raise NotMoefied(f"{folder} holds a checkpoint that is not MoEfied")
    return config


def auto_class(config: dict[str, Any]) -> str:
    """Return the name of the Auto class that loads a checkpoint with the head it was saved with.

    Args:
        config: what its config.json holds.
    """
    architecture = config["architectures"][0]
    models = {name: path for name, path in config["auto_map"].items() if name.startswith("AutoModel")}
    names = [name for name, path in models.items() if path.rpartition(".")[2] == architecture]
    heads = [name for name in names if name != "AutoModel"]  # CLIP has two names
    return next((name for name in heads if name in TASKS), (heads or ["AutoModel"])[0])


def card_data(name: str, facts: dict[str, Any], auto: str, sweep: Sweep | None) -> ModelCardData:
    """Return the metadata that the Hub reads from the head of a card.

    Args:
        name: of the model.
        facts: the model card data.
        auto: the Auto class that loads it.
        sweep: quality against compute, for the Hub's list of results.
    """
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
    """Return one result for each budget of the checkpoint's own router (the Hub's model-index).

    Args:
        evaluation: the part of that name of the model card data, with a "data".
        task: the Hub's name of it.
        sweep: quality against compute.
    """
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
