"""Write docs/architectures.md from architectures.json, the outcome of check_all.py.

python tests/registry/table.py
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUTCOMES, DOCUMENT = HERE / "architectures.json", HERE.parents[1] / "docs" / "architectures.md"
FACTS = HERE.parents[1] / "model_cards" / "reaction_model.json"
LONGEST = 160  # characters of a reason

CHECKS = {  # what `checking.check_type` and `clean_process` find out
    "dense": "With all experts it is the dense model (largest difference 1e-5 of the scale).",
    "sparse": "With half the experts its output changes.",
    "keys": "Its state dict has the dense model's keys, and those of routers.",
    "stock": "Saved, it loads as its stock class, equal to the dense model.",
    "own_code": "Saved, it loads with its own code in a process without this package, equal to the MoEfied model.",
    "trains": "A training step changes FFNs and leaves routers alone.",
}

HEAD = """# Architectures

moefy-hf has no list of supported architectures. It searches a model for its FFNs, and runs each kind of them to see
what it computes. At conversion, the model with all experts is compared with the dense one.

The table shows what that finds in every model type that transformers {transformers} has an `AutoModel` for. Each type
was made as a tiny model with random weights, converted with a random split, and checked:

{checks}

{passed} of {types} types pass all checks. The others say why not.

{real}

`moefy inspect MODEL` shows what is found in your model, without loading its weights. The table is made by
`python tests/registry/check_all.py`, about an hour on two cores, and `python tests/registry/table.py`.

| type | FFNs | all checks |
|---|---|---|
"""


REAL = """A real model of a type that nothing here was written for is {model}. Its {uses} layers share one FFN of {f}
neurons. It reads chemical reactions, and predicts hidden characters of molecules here, {dense:.1%} of them rightly.
It is converted without training, on {tokens:,} tokens. It keeps {rows}. The command is `{command}`."""


def real_model() -> str:
    """A paragraph on the real model, of its facts."""
    facts = json.loads(FACTS.read_text())
    own = [row for row in facts["rows"] if row["router"] == "own"]
    rows = ", ".join(f"{row['relative_quality']:.1%} with {row['experts']:.0%} of the experts" for row in own)
    text = REAL.format(
        model=facts["model"],
        uses=facts["uses"],
        f=facts["ffn"]["f"],
        tokens=facts["calibration_tokens"],
        dense=facts["rows"][0]["accuracy"],
        rows=rows,
        command=facts["command"],
    )
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False)


def passes(found: dict[str, Any]) -> bool:
    return all(found.get(key) is True for key in CHECKS)


def plain(reason: str) -> str:
    """A reason for a cell of the table, in one line."""
    text = re.sub(r"\s+", " ", reason).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[: LONGEST - 4].rstrip() + " ..."


def reason_of(found: dict[str, Any]) -> str:
    wrong = [f"{key}: {value}" for key, value in found.items() if key in CHECKS and value is not True]
    return found.get("reason") or "; ".join(wrong)


def row(model_type: str, found: dict[str, Any]) -> str:
    ffns = ", ".join(
        str(count) if tower == "model" else f"{tower} {count}"
        for tower, count in sorted(found.get("ffns", {}).items())
    )
    return f"| `{model_type}` | {ffns or '-'} | {'yes' if passes(found) else plain(reason_of(found))} |"


def document(outcomes: dict[str, Any]) -> str:
    types = outcomes["types"]
    head = HEAD.format(
        transformers=outcomes["transformers"],
        checks="\n".join(f"- {what}" for what in CHECKS.values()),
        passed=sum(map(passes, types.values())),
        types=len(types),
        real=real_model(),
    )
    return head + "\n".join(row(model_type, types[model_type]) for model_type in sorted(types)) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(json.loads(OUTCOMES.read_text())), encoding="utf-8")
