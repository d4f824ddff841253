"""The table of FFNs that `moefy profile` prints: how sparse each is."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from .profile import SiteProfile
from .sparsity import LEVELS, CettCurve


def describe_ffn(stats: SiteProfile, curve: CettCurve) -> dict[str, Any]:
    """Return the figures of one FFN that `profile_table` shows.

    `zero` and `not_active` are the shares of activations that are exactly zero, and not positive. `half_of_the_mass`
    is the smallest share of neurons that has half of the summed |activation|. `active_at_X` is what is kept at CETT X.
    """
    mass = stats.mass.sort(descending=True).values
    half = int((mass.cumsum(0) < mass.sum() / 2).sum()) + 1
    return {
        "neurons": len(mass),
        "zero": curve.zeros,
        "not_active": stats.sparsity,
        "never_active": int((stats.active == 0).sum()),
        "half_of_the_mass": half / len(mass),
        **{f"active_at_{level}": curve.at(level)[1] for level in LEVELS},
    }


def profile_table(figures: Mapping[str, Any]) -> str:
    """Return a Markdown table with a line per FFN; `active at` a CETT is the share of neurons that is kept there.

    Args:
        figures: `rows` of `describe_ffn` with the FFN's name as `ffn`; and, where perplexity was measured, `ppl`, a
            `PplActivation` as a dictionary, and `active_at_ppl` in each row.
    """
    rows, ppl = figures["rows"], figures.get("ppl")
    levels = [f"active at CETT {level}" for level in LEVELS] + (["at that growth"] if ppl else [])
    titles = ["FFN", "neurons", "zero", "not active", "never active", "half of the mass", *levels]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        shares = [row[f"active_at_{level}"] for level in (*LEVELS, *(["ppl"] if ppl else []))]
        cells = [row["ffn"], row["neurons"], f"{row['zero']:.1%}", f"{row['not_active']:.1%}", row["never_active"]]
        cells += [f"{share:.1%}" for share in (row["half_of_the_mass"], *shares)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if ppl:
        lines += ["", f"perplexity grows by {ppl['growth']:.2%} at CETT {ppl['cett']:.3f}, "]
        lines[-1] += f"where {mean(ppl['active']):.1%} of the neurons are kept"
    return "\n".join(lines)
