"""Check by hand, not in the test suite, that optimum and sentence-transformers load exported ONNX folders.

optimum-onnx wants transformers 4, so they get an environment of their own, in a folder that you name:

    python tests/optimum_check.py FOLDER [--int8]

It makes FOLDER/venv (once, a few minutes), and exports tiny models with tokenizers into FOLDER/models, beside what the
MoEfied models give; in 8 bits what their graphs give in ONNX Runtime itself. Then it runs itself in that environment,
and compares. Every check prints a line, and the exit status is 1 if one failed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TEXTS = ["7 8 9 10 11", "12 13 14 15 16"]  # of equal length: nothing is padded
NEW = 16  # tokens
PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnxruntime", "sentence-transformers")
ONE = {"num_hidden_layers": 1}
ONE_EACH = {"encoder_layers": 1, "decoder_layers": 1}
CHANGES = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "bart": ONE_EACH, "gpt2": {"n_layer": 1}}
GENERATES = {"t5": "Seq2SeqLM", "bart": "Seq2SeqLM", "gpt2": "CausalLM", "llama": "CausalLM", "opt": "CausalLM"}
CLOSE = 1e-4  # of the largest number
LIMITS = {"do_sample": False, "num_beams": 1, "min_new_tokens": NEW, "max_new_tokens": NEW}


def make_environment(folder: Path) -> Path:
    """Return the Python of FOLDER/venv, which is made where there is none."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
        torch_version = version("torch").partition("+")[0]
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, f"torch=={torch_version}"], check=True)
        wanted = ("optimum-onnx[onnxruntime]", "sentence-transformers[onnx]", f"torch=={torch_version}")
        subprocess.run([*install, *wanted], check=True)
    return python


# ---- in the environment of moefy_hf


def write_models(folder: Path, int8: bool) -> None:
    """Export tiny models, each with `expected.json` beside its files."""
    from tiny import convert, tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from moefy_hf import export
    from moefy_hf.exporters.onnx_graphs import session_of
    from moefy_hf.exporters.onnx_parts import inputs_for

    words = {{0: "[PAD]", 2: "[END]"}.get(number, str(number)): number for number in range(99)}
    plain = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]")
    given = tokenizer(TEXTS, return_tensors="pt", return_token_type_ids=False)
    heads = {"classifier": ("bert", "AutoModelForSequenceClassification"), "sentences": ("bert", "AutoModel")}
    heads |= {name: (name, f"AutoModelFor{head}") for name, head in GENERATES.items()}
    for name, (architecture, head) in heads.items():
        model = tiny_model(architecture, head, **CHANGES.get(architecture, ONE))
        convert(model, 2)
        export(model, folder / name, "onnx", tokenizer=tokenizer, int8=int8, timing=False)
        with torch.no_grad():
            if name in GENERATES:
                numbers = model.generate(**given, **LIMITS)
            elif int8:  # bytes may route a token otherwise, and the graph was compared with the model when written
                fed = {key: value.numpy() for key, value in inputs_for(model, given).items()}
                numbers = torch.from_numpy(session_of(folder / name / "model.onnx").run(None, fed)[0])
                numbers = numbers if name == "classifier" else numbers.mean(1)
            elif name == "classifier":
                numbers = model(**given).logits
            else:
                numbers = model(**given).last_hidden_state.mean(1)  # as sentence-transformers pools
        (folder / name / "expected.json").write_text(json.dumps(numbers.tolist()))


# ---- in the environment of optimum


def loaded(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each way to load a folder, with what gives its numbers."""
    from optimum.onnxruntime import (
        ORTModelForCausalLM,
        ORTModelForSeq2SeqLM,
        ORTModelForSequenceClassification,
        pipeline,
    )
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer

    def classify() -> Any:
        given = AutoTokenizer.from_pretrained(folder / "classifier")(TEXTS, return_tensors="pt")
        return ORTModelForSequenceClassification.from_pretrained(folder / "classifier")(**given).logits

    def in_pipeline() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder / "classifier")
        model = ORTModelForSequenceClassification.from_pretrained(folder / "classifier")
        classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
        found = classifier(TEXTS, top_k=None, function_to_apply="none", batch_size=len(TEXTS))
        return [[{each["label"]: each["score"] for each in row}[f"LABEL_{i}"] for i in range(2)] for row in found]

    def encode() -> Any:
        return SentenceTransformer(str(folder / "sentences"), backend="onnx").encode(TEXTS)

    def generate(name: str) -> Any:
        cls = ORTModelForCausalLM if GENERATES[name] == "CausalLM" else ORTModelForSeq2SeqLM
        given = AutoTokenizer.from_pretrained(folder / name)(TEXTS, return_tensors="pt", return_token_type_ids=False)
        return cls.from_pretrained(folder / name).generate(**given, **LIMITS)

    yield "classifier: ORTModelForSequenceClassification", classify
    yield "classifier: pipeline", in_pipeline
    yield "sentences: SentenceTransformer", encode
    for name in GENERATES:
        yield f"{name}: ORTModelFor{GENERATES[name]}.generate", lambda name=name: generate(name)


def check(folder: Path, int8: bool) -> bool:
    """Load every folder, print what comes of it, and return whether all gives what was expected."""
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    good = True
    for what, numbers in loaded(folder):
        expected = torch.tensor(json.loads((folder / what.partition(":")[0] / "expected.json").read_text()))
        try:
            found = torch.as_tensor(numbers())
        except Exception as error:  # of any of these packages
            print(f"FAILED  {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            good = False
            continue
        if found.is_floating_point():
            off = float((found - expected).abs().max() / expected.abs().max())
            same, told = off <= CLOSE, f"differs by {off:.1e} of the largest number"
        else:
            same = found.shape == expected.shape and (int8 or bool((found == expected).all()))
            told = f"{int((found[:, -NEW:] == expected[:, -NEW:]).sum())} of {len(TEXTS) * NEW} tokens are the same"
        print(f"{'good' if same else 'FAILED'}  {what}: {told}")
        good &= same
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument(
        "--int8", action="store_true", help="8-bit exports: their graphs' numbers, and tokens are counted"
    )
    parser.add_argument("--load", action="store_true", help="what runs in FOLDER/venv")
    args = parser.parse_args()
    models = args.folder / ("models8" if args.int8 else "models")
    if args.load:
        sys.exit(not check(models, args.int8))
    args.folder.mkdir(parents=True, exist_ok=True)
    python = make_environment(args.folder)
    shutil.rmtree(models, ignore_errors=True)
    models.mkdir()
    write_models(models, args.int8)
    flags = ["--int8"] if args.int8 else []
    sys.exit(subprocess.run([python, __file__, args.folder, "--load", *flags], check=False).returncode)


if __name__ == "__main__":
    main()
