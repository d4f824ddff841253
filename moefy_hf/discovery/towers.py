"""The towers of a composite model: its text model, its vision encoder, and so on."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import MoefyError
from ..modeling.ffn_sites import FfnSite

ALL = "all"
KINDS = {  # main input of a tower -> what it reads
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}


def tower_names(config: PreTrainedConfig) -> dict[int, str]:
    """Return the names of the configs that are nested in one, by identity: {id(config.vision_config): "vision"}."""
    found: dict[int, str] = {}
    for key in config.sub_configs:
        nested = getattr(config, key, None)
        if isinstance(nested, PreTrainedConfig):
            found[id(nested)] = key.removesuffix("_config")
            found |= tower_names(nested)
    text = _text_config(config)
    if id(text) in found:
        found[id(text)] = "text"
    return found


def _text_config(config: PreTrainedConfig) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # there are several
        return None


def tower_of(model: PreTrainedModel, name: str) -> str | None:
    """Return the tower that a module lies in, None where the model has none there.

    Args:
        model: the whole.
        name: of the module.

    Example:
        >>> tower_of(clip, "vision_model.encoder.layers.0.mlp")
        'vision'
    """
    names, found, last, module = tower_names(model.config), None, None, model
    types: dict[type, str] = {type(nested): names[id(nested)] for nested in _nested(model.config)}
    for part in name.split(".") if name else ():
        module = getattr(module, part)
        config = getattr(module, "config", None)
        tower = names.get(id(config)) or (types.get(type(config)) if config is not model.config else None)
        if tower is not None and tower != last:  # its outermost module says what it reads
            found, last = _reading(tower, getattr(module, "main_input_name", "")), tower
    return found


def _reading(tower: str, main_input: str) -> str:
    """Return the name of a tower by what it reads."""
    if tower == "text" or tower == "encoder" and main_input == "input_ids":  # of two models that read texts
        return "text"
    return KINDS.get(main_input, tower)


def _nested(config: PreTrainedConfig) -> Iterable[PreTrainedConfig]:
    for key in config.sub_configs:
        nested = getattr(config, key, None)
        if isinstance(nested, PreTrainedConfig):
            yield nested
            yield from _nested(nested)


def deciding_configs(
    model: PreTrainedModel, sites: Iterable[FfnSite], config: PreTrainedConfig
) -> list[PreTrainedConfig]:
    """Return the parts of a config that decide how FFNs are made: the whole, and those of the towers that they lie in.

    Args:
        model: the whole.
        sites: some of its FFNs.
        config: the model's config, or a copy of it.

    Example:
        >>> deciding_configs(clip, find_sites(clip), clip.config) == [clip.config, clip.config.text_config]
        True
    """
    kinds = set()
    for site in sites:
        parts = site.name.split(".")
        holders = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1))
        kinds |= {type(holder.config) for holder in holders if hasattr(holder, "config")}
    return [config, *(part for part in _nested(config) if type(part) in kinds)]


def in_towers(model: PreTrainedModel, sites: list[FfnSite], towers: str | Sequence[str] | None) -> list[FfnSite]:
    """Return the FFNs of some towers of a model.

    Args:
        model: the model.
        sites: its FFNs.
        towers: names ("text", "vision", "audio", ...), or "all"; None: the text towers, or all where there is none.

    Raises:
        MoefyError: the model has no tower of that name; those it has are named.

    Example:
        >>> in_towers(clip, find_sites(clip), "vision")
    """
    of = [tower_of(model, site.name) for site in sites]
    known = list(dict.fromkeys(name for name in of if name is not None))
    if towers is None:
        towers = "text" if "text" in known else ALL
    asked = [towers] if isinstance(towers, str) else list(towers)
    if ALL in asked:
        return sites
    if unknown := [name for name in asked if name not in known]:
        valid = ", ".join(map(repr, [*known, ALL]))
        raise MoefyError(f"{type(model).__name__} has no tower {unknown[0]!r} with FFNs; choose from {valid}")
    return [site for site, name in zip(sites, of, strict=True) if name in asked]
