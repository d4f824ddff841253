"""A tiny classifier one of whose experts responds to one token, and texts."""

import csv
from pathlib import Path

import torch
from tiny import convert, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LAYER, EXPERT, TOKEN, CLASS = 0, 2, 42, 1
LENGTH = 16


def number_tokenizer() -> PreTrainedTokenizerFast:
    """Writes each number as the token of that id."""
    words = {str(number) if number else "[PAD]": number for number in range(99)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def planted_model(k: int = 1) -> PreTrainedModel:
    """A BERT of 2 FFNs and 6 experts each. In layer 0 the router of one expert looks for one token."""
    model = tiny_model("bert", "AutoModelForSequenceClassification", num_labels=3)
    convert(model, k=k)
    seen = {}
    site = model.moe_sites()[LAYER]
    handle = site.first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    ids = torch.randint(3, 99, (400, LENGTH), generator=torch.Generator().manual_seed(5))
    ids[:, ::4] = TOKEN
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    x, wanted = seen["x"].flatten(0, 1), ids.flatten() == TOKEN
    direction = torch.linalg.lstsq(x, wanted.float()[:, None] - 0.5).solution[:, 0]
    with torch.no_grad():
        site.act.router.weight[EXPERT] = 60 * direction
    return model


def write_texts(path: Path, rows: int, related: bool = True, seed: int = 0) -> str:
    """Texts of 6 to 16 numbers. `related`: those of one class hold the token twice as likely."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            length, label = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((6, 17), (0, 3)))
            ids = torch.randint(3, 40, (length,), generator=generator)
            share = 0.4 if related and label == CLASS else 0.1
            ids[torch.rand(length, generator=generator) < share] = TOKEN
            writer.writerow([" ".join(map(str, ids.tolist())), f"LABEL_{label}"])
    return str(path)
