"""The FFNs of a model that are converted, and what a checkpoint's config remembers of them."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UnsupportedModel
from ..modeling.ffn_sites import FfnSite, place_of
from .search import LeftAlone, search
from .towers import in_towers, tower_of

logger = logging.get_logger("moefy_hf")


def discovered_sites(model: PreTrainedModel, towers: str | Sequence[str] | None = None) -> list[FfnSite]:
    """Search a model for its FFNs, in the order of its modules.

    Args:
        model: the model.
        towers: see `in_towers`.

    Raises:
        UnsupportedModel: it has none, or its text tower has none and no other was asked for; what looks like one is
            named, with the reason.
        MoefyError: it has no such tower.
    """
    found = search(model)
    reasons = {each.reason: each.name for each in reversed(found.left)}
    known = "".join(f"; {name}: {reason}" for reason, name in reasons.items())
    if not found.sites:
        raise UnsupportedModel(
            f"no FFN of this {type(model).__name__} ({model.config.model_type}) can be split into experts{known}"
        )
    of = dict.fromkeys(name for site in found.sites if (name := tower_of(model, site.name)) is not None)
    # an image classifier may have the config of a text tower that it does not have
    if (
        towers is None
        and "text" not in of
        and any(tower_of(model, name) == "text" for name, _ in model.named_modules())
    ):
        raise UnsupportedModel(
            f"no FFN of the text tower of this {type(model).__name__} can be split into experts{known}; "
            f"towers that have some: {', '.join(map(repr, of))}"
        )
    sites = in_towers(model, found.sites, towers)
    say_left_dense(model, sites, found.left)
    return sites


def say_left_dense(model: PreTrainedModel, sites: Iterable[FfnSite], left: Iterable[LeftAlone]) -> None:
    """Say once which layers' FFNs stay as they are, in the towers that are converted.

    Heads, adapters, bottlenecks and what connects towers are no FFNs of layers, and are not mentioned.
    """
    towers = {tower_of(model, site.name) for site in sites}
    reasons = {
        each.reason: place_of(model, each.name)
        for each in left
        if each.of_a_layer and tower_of(model, each.name) in towers
    }
    if reasons:
        what = "; ".join(f"{place} ({reason})" for reason, place in reasons.items())
        logger.warning_once(f"left as they are in this {type(model).__name__}: {what}")


def remembered(model: PreTrainedModel, sites: Iterable[FfnSite]) -> list[dict[str, Any]]:
    """Return where FFNs are and what their parts are called, as `remembered_sites` reads it.

    Layers that are alike are one entry, with * for their numbers.
    """
    modules = dict(model.named_modules())
    holders: dict[tuple[str, Any], set[str]] = {}
    for site in sites:
        holders.setdefault((place_of(model, site.name), site.spec), set()).add(site.name)
    entries = []
    for (place, spec), names in holders.items():
        paths = spec.linears
        alike = {
            name
            for name in modules
            if place_of(model, name) == place and all(f"{name}.{path}".lstrip(".") in modules for path in paths)
        }
        for where in [place] if alike == names else [place_of(model, name, numbered=True) for name in sorted(names)]:
            entries.append({"modules": where, **spec.to_dict()})
    return entries
