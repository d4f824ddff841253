"""`Section`: the typed view of `config.moefication`, and the only code that knows its keys.

Format 1 had sizes, splits, routers and top-k selections; 2 added shared experts, mean compensation and dynamic
selections; 3 added the settings of routers, and later the
layouts of FFNs. What a format lacks has the default that it meant.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

NAME = "moefication"  # of the section in a config
FORMAT_VERSION = 3
MEASURED_WITH_ROUTERS = ("reach", "sensitivity")  # what a change of routers makes stale
MEASURED_OF_EXPERTS = ("reach", "sensitivity", "angular")  # what a change of the experts makes stale

ALL_EXPERTS = {"type": "top_k", "k": 1.0, "allocation": "uniform"}  # a selection: an exact no-op

T = TypeVar("T")


class Key(Generic[T]):
    """Makes one key of the section an attribute of `Section`.

    Args:
        name: the key.
        kind: type of its value.
        default: what formats without the key mean; none where every format has it.
    """

    def __init__(self, name: str, kind: type[T] | None = None, *default: Any):
        self.name, self.default = name, default

    @overload
    def __get__(self, section: None, owner: type) -> "Key[T]": ...
    @overload
    def __get__(self, section: "Section", owner: type) -> T: ...
    def __get__(self, section, owner):
        if section is None:
            return self
        if self.name in section.values or not self.default:
            return section.values[self.name]
        return copy.copy(self.default[0])

    def __set__(self, section: "Section", value: T) -> None:
        section.values[self.name] = value


class Section:
    """Views what a checkpoint's config says of its experts; changes go into the config.

    Args:
        config: a config with a `moefication` section.

    Attributes:
        values: the section as the config has it.

    Example:
        >>> Section(model.config).router
        'linear'
    """

    format_version = Key("format_version", int)
    num_experts = Key[int | None]("num_experts")
    expert_size = Key[int | None]("expert_size")
    splitter = Key("splitter", str)
    router = Key("router", str)
    router_settings = Key[dict[str, Any]]("router_settings", None, {})
    selection = Key[dict[str, Any]]("selection")
    shared_experts = Key("shared_experts", int, 0)
    compensation = Key("compensation", bool, False)
    towers = Key[str | list[str] | None]("towers", None, None)
    layers = Key[list[int] | None]("layers")
    ffns = Key[list[dict[str, Any]]]("ffns", None, [])  # where the FFNs are, and their parts (FfnSpec)
    calibration_tokens = Key("calibration_tokens", int)
    seed = Key("seed", int, 0)
    neuron_order = Key("neuron_order", bool, False)  # whether each FFN has the buffer of that name
    splits = Key[int | None]("splits", None, None)  # splits that a training has done; None where it was to do none
    thresholds = Key[dict[str, Any]]("reach", None, {})  # threshold -> experts computed, of dynamic selections

    def __init__(self, config: Any):
        self.values: dict[str, Any] = config.moefication

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> "Section":
        """View a mapping that is no config's, such as one that was read from a file."""
        section = object.__new__(cls)
        section.values = values if isinstance(values, dict) else dict(values)
        return section

    @classmethod
    def of_file(cls, path: Path) -> "Section | None":
        """Read the section of a config.json; None where that is a dense model's."""
        return cls.of(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def of(cls, config: Any) -> "Section | None":
        """View the section of a config, or of what a config.json holds; None where that is a dense model's."""
        values = config.get(NAME) if isinstance(config, Mapping) else getattr(config, NAME, None)
        return None if values is None else cls.of_values(values)

    @staticmethod
    def put(config: Any, values: Mapping[str, Any]) -> "Section":
        """Give a dense model's config a section."""
        config.moefication = dict(values)
        return Section(config)

    def measured(self, allocation: str) -> Mapping[str, Any] | None:
        """Return what was measured of the layers for an allocation of `MEASURED`, or None."""
        return self.values.get(allocation)

    def set_measured(self, allocation: str, values: Mapping[str, Any]) -> None:
        """Store what was measured of the layers for an allocation of `MEASURED`."""
        self.values[allocation] = values

    def forget(self, stale: tuple[str, ...]) -> None:
        """Delete measurements that a change has made stale: `MEASURED_WITH_ROUTERS` or `MEASURED_OF_EXPERTS`."""
        for name in stale:
            self.values.pop(name, None)

    def replace(self, values: Mapping[str, Any]) -> None:
        """Replace all values by another section's."""
        values = copy.deepcopy(dict(values))
        self.values.clear()
        self.values.update(values)
