"""Convert a pretrained ALBERT, whose layers share one FFN, and write what it costs: model_cards/reaction_model.json.

    python recipes/figures/reaction_model.py

The model reads chemical reactions as text (RXNMapper, Schwaller et al., Science Advances 2021). It is a real model of
a type that this package has no line of code for. Texts are molecules, of which it predicts hidden characters.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from moefy_hf import MoEficationConfig, evaluate, find_sites, moefy_
from moefy_hf.recipes.inputs import resolve

TOGETHER = 4  # molecules in a text, as in a reaction
HIDDEN = 0.15  # share of the characters that the model has to predict
BATCH = 16


def batches(texts: list[str], tokenizer: Any, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of texts in which some characters are hidden, which are the labels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    rows = [".".join(texts[i] for i in order[at : at + TOGETHER]) for at in range(0, len(order), TOGETHER)]
    made = []
    for at in range(0, len(rows), BATCH):
        batch = tokenizer(rows[at : at + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt")
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        hidden = (torch.rand(ids.shape, generator=generator) < HIDDEN) & ~special
        masked = ids.masked_fill(hidden, tokenizer.mask_token_id)
        labels = ids.masked_fill(~hidden, -100)
        made.append({"input_ids": masked, "attention_mask": batch["attention_mask"], "labels": labels})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert_size", type=int, default=8, help="neurons per expert")
    parser.add_argument("--k", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares of the experts")
    parser.add_argument("--output", type=Path, default=Path("model_cards/reaction_model.json"), help="the facts")
    arguments = parser.parse_args()
    folder, texts = resolve("package:reaction-model"), Path(resolve("package:molecules")) / "molecules.txt"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    lines = texts.read_text(encoding="utf-8").split()
    held_out = batches(lines[::4], tokenizer, seed=1)
    train = batches([line for place, line in enumerate(lines) if place % 4], tokenizer, seed=0)
    (site,) = find_sites(model)
    config = MoEficationConfig(expert_size=arguments.expert_size, k=0.5)
    report = moefy_(model, config, train)
    sweep = evaluate(model, held_out, arguments.k)
    print(sweep.table())
    facts = {
        "model": "RXNMapper's ALBERT",
        "ffn": {"name": site.name, "d": site.sizes[0], "f": site.sizes[1]},
        "uses": model.config.num_hidden_layers,
        "calibration_tokens": report.calibration_tokens,
        "expert_size": arguments.expert_size,
        "rows": sweep.rows,
        "command": "python recipes/figures/reaction_model.py",
    }
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
