"""How an FFN is laid out below the module that holds it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FfnSpec:
    """Names the parts of an FFN below its owner, the module that holds them all.

    `moefy_hf.discovery` finds these in a dense model; a MoEfied checkpoint remembers them in its config.

    Attributes:
        up: the Linear d -> f; or d -> 2f, which is gate and up projection in one (`parts=2`).
        down: the Linear f -> d.
        act: the activation module. Where the owner has none of that name, it calls a function in its `forward`.
        gate: the gate projection d -> f of a gated FFN (SwiGLU, GEGLU).
        parts: number of matrices in `up`.
        up_first: whether a fused `up` has the up rows first, then the gate rows; otherwise the gate rows are first.
        before: the owner's method that changes what the activation sees: Gemma 3n's, which keeps the largest.
        norm: a norm of the neurons, between activation and `down`.
        dropout: the owner's attribute that holds the dropout of its neurons: a module, or a probability.
        function: transformers' name of the activation, where that is a function and no module.

    Example:
        >>> FfnSpec("up_proj", "down_proj", "act_fn", gate="gate_proj")
    """

    up: str
    down: str
    act: str
    gate: str | None = None
    parts: int = 1
    up_first: bool = False
    before: str | None = None
    norm: str | None = None
    dropout: str | None = None
    function: str | None = None

    @property
    def linears(self) -> list[str]:
        """The names of the Linears, in the order in which they run."""
        return [path for path in (self.gate, self.up, self.down) if path is not None]

    @property
    def together(self) -> str | None:
        """What takes all neurons of a token together, so that experts cannot be computed alone; None: nothing does."""
        return self.norm or self.before

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, for a config."""
        defaults = FfnSpec("", "", "")
        return {key: value for key, value in asdict(self).items() if value != getattr(defaults, key)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FfnSpec":
        """Read what `to_dict` returned; keys of others are ignored."""
        return cls(**{key: values[key] for key in cls.__dataclass_fields__ if key in values})
