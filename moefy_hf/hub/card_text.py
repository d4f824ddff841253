"""The sentences and tables of a model card."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..conversion.convert import ConversionReport
from ..conversion.fit_routers import RouterFit
from ..evaluation.quality_check import QualityCheck
from ..io import is_hub_id, markdown
from ..modeling.section import Section
from ..modeling.selection_config import setting_name

ALLOCATION_PHRASES = {  # allocation -> how many experts it gives a layer
    "uniform": "the same in each layer",
    "sensitivity": "more where a layer needs them",
    "angular": "more where a layer turns the hidden states further",
    "global": "by one setting for all layers",
}


def summary(section: Section, report: ConversionReport | None, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of a card's first table: what, and its value.

    Args:
        section: of the checkpoint's config.
        report: of the conversion.
        facts: the model card data.
    """
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
        rows.append(("right after conversion", quality_check(facts["prediction"]).line()))
    if "pruning" in facts:
        pruned = facts["pruning"]
        rows.append(("pruned", f"{pruned['pruned']} of {pruned['experts']} experts of every layer: {pruned['by']}"))
    for name, value in facts.get("training", {}).items():
        rows.append((f"training: {name}", f"{value}"))
    if "versions" in facts:
        rows.append(("made with", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())))
    return [(what, value.replace("|", "\\|")) for what, value in rows]


def ffns_of(config: Mapping[str, Any], section: Section, report: ConversionReport | None) -> str:
    """Return which feed-forward networks have experts, in words: how many, and of which towers.

    Args:
        config: what the checkpoint's config.json holds.
        section: of it.
        report: of the conversion.
    """
    text = any(isinstance(config.get(part), Mapping) for part in ("text_config", "decoder"))
    towers = section.towers or (["text"] if text else [])
    named = [towers] if isinstance(towers, str) else [*towers]
    where = "" if not named or "all" in named else f" of its {' and '.join(named)} tower{'s' if named[1:] else ''}"
    if section.layers is not None:
        count = f"{len(section.layers)} of {'the' if where else 'its'}"
    else:
        count = ("all" if where else "all its") + (f" {len(report.experts)}" if report else "")
    return f"{count} feed-forward networks{where}"


def example(selection: dict[str, Any]) -> str:
    """Return the last argument of the card's `set_selection` call, with a comment.

    It is the threshold of a selection that has one, and k otherwise.
    """
    name = setting_name(selection["type"])
    if name in selection:
        value = selection[name]
        value = value[0] if isinstance(value, list) else value
        return f"{name}={value:g})  # the budget, any time: the larger, the more experts"
    return "k=0.5)  # the budget, any time: a share of the experts, a number, or one per layer"


def budget(selection: dict[str, Any]) -> str:
    """Return a selection in words: how many experts, and by what.

    Args:
        selection: as the config holds it.
    """
    kind, k = selection["type"], selection.get("k")
    name = setting_name(kind)
    if name is not None and k is None:
        return f"as many experts as a token needs: `{kind}`, {name} {selection[name]}"
    on_average = "" if name is None else f" on average, by `{kind}`"
    if isinstance(k, list):
        return f"{', '.join(map(str, k))} experts, layer by layer{on_average}"
    share = f"{k:.0%} of the experts" if isinstance(k, float) else f"{k} experts"
    return f"{share}{on_average}, {ALLOCATION_PHRASES[selection.get('allocation', 'uniform')]}"


def router_settings_of(section: Section) -> str:
    """Return the settings of a section's router in brackets, with a space before; nothing where it has none."""
    settings = section.router_settings
    return f" ({', '.join(f'{name} {value}' for name, value in settings.items())})" if settings else ""


def analysis_table(analysis: dict[str, Any]) -> str:
    """Return a Markdown table of how specialised the experts are, under what that was measured on."""
    measured = analysis["facts"]
    return f"Measured on {measured['texts']:,} texts of {measured['data']}.\n\n{markdown(analysis['specialisation'])}"


def speed_table(speed: dict[str, Any]) -> str:
    """Return a Markdown table of timings, under the hardware they were measured on."""
    columns = list(speed["rows"][0])
    lines = [f"Measured on {speed['hardware']}.", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(f"{row[name]}" for name in columns) + " |" for row in speed["rows"]]
    return "\n".join(lines)


def data_of(part: dict[str, Any] | None) -> str | None:
    """Return name and split of a data set, as in 'imdb, test', or None where a part names none."""
    if not part or "data" not in part:
        return None
    return ", ".join(f"{part[key]}" for key in ("data", "split") if part.get(key))


def linked(name: str) -> str:
    """Return a name as a link to the Hub, where it can be that of a repository."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else name


def conversion_report(values: dict[str, Any]) -> ConversionReport:
    """Return a report from what its `to_dict` returned."""
    return ConversionReport(**values | {"fits": [RouterFit(**fit) for fit in values["fits"]]})


def quality_check(values: dict[str, Any]) -> QualityCheck:
    """Return a check from what its `to_dict` returned; what another version of it had is left out."""
    return QualityCheck(**{field.name: values[field.name] for field in fields(QualityCheck) if field.name in values})
