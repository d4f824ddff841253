"""Adapters that were trained on the dense model, whose neurons have another order."""

import warnings
from collections.abc import Iterable
from typing import Any

from .ffn_sites import FfnSite
from .routed_activation import is_routed


def ffn_linears(site: FfnSite) -> dict[str, str]:
    """Return the names of an FFN's Linears by their part in it: {"up": "model.layers.0.mlp.up_proj", ...}."""
    prefix = f"{site.name}." if site.name else ""
    parts = {"gate": site.spec.gate, "up": site.spec.up, "down": site.spec.down}
    return {part: prefix + path for part, path in parts.items() if path is not None}


IN_MEMORY = " (MoEfied in memory)"  # follows the dense model's name, until the MoEfied model is saved and loaded


def is_of_moefied(config: Any, model: Any) -> bool:
    """Return whether an adapter says that it was trained on the MoEfied model, or was permuted for it.

    Args:
        config: of the adapter.
        model: the MoEfied model.
    """
    base, mapping = config.base_model_name_or_path or "", getattr(config, "auto_mapping", None) or {}
    return (
        (base != "" and base == model.name_or_path)
        or base.endswith(IN_MEMORY)
        or str(mapping.get("base_model_class", "")).startswith("Moefied")
    )


def warn_of_other_order(model: Any, sites: Iterable[FfnSite], state_dict: dict, prefix: str) -> None:
    """Warn where an adapter acts on FFNs and says that it was trained on another checkpoint, maybe the dense one.

    Args:
        model: the MoEfied model.
        sites: its FFNs.
        state_dict: what is loaded.
        prefix: what the keys of this model's tensors begin with.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if is_of_moefied(config, model):
            continue
        linears = [f"{prefix}{path}." for site in sites if is_routed(site.act) for path in ffn_linears(site).values()]
        if any(key.startswith(tuple(linears)) and name in key.split(".") for key in state_dict):
            warnings.warn(
                f"adapter {name!r} was trained on {config.base_model_name_or_path!r}, and acts on FFNs whose neurons "
                "are permuted here. If that is the dense model, it does not fit as it is: call "
                "moefy_hf.permute_adapter_(model) once, or run moefy permute-adapter; adapters of this model fit",
                stacklevel=2,
            )
