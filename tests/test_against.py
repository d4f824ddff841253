"""`moefy bench --against`: every engine computes what the models do; rows, quality and refusals. Never speeds."""

import csv
import json

import pytest
import speed_blocks
import torch
from batches import text_batches
from gguf_files import DOUBLE, write_dense
from tiny import convert, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moefy_hf.bench import Reading, SideBySide, bench_against
from moefy_hf.bench.engines import ENGINES, PYTORCH, base
from moefy_hf.bench.engines.onnx_runtime import OnnxRuntime
from moefy_hf.bench.engines.pytorch import running
from moefy_hf.bench.models import checkpoint_models, variants
from moefy_hf.bench.side_by_side import rows_of
from moefy_hf.bench.tasks import TASKS, Timed
from moefy_hf.cli.main import main, renamed
from moefy_hf.data import TextSource
from moefy_hf.errors import MoefyError
from moefy_hf.measure.contexts import all_experts

CLASSIFIER, HIDDEN, CAUSAL, SEQ2SEQ = (
    *("AutoModelForSequenceClassification", "AutoModel"),
    *("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
)
MODELS = {  # kind of model -> tiny model, head, changes
    "classifier": ("bert", CLASSIFIER, {"hidden_act": "relu", "num_labels": 2}),
    "hidden states": ("bert", HIDDEN, {"hidden_act": "relu"}),
    "decoder": ("llama-without-biases", CAUSAL, {**DOUBLE, "use_cache": True, "vocab_size": 259}),
    "encoder-decoder": ("t5", SEQ2SEQ, {"use_cache": True, "num_layers": 1, "num_decoder_layers": 1}),
}
# of a row's length: of the worst row in float32, of the median one in 8 bits, where some tokens are routed otherwise
ERRORS = {"PyTorch": 1e-4, "onnxruntime": 1e-4, "llama.cpp": 1e-4}
MEDIANS = {"onnxruntime-int8": 0.15, "llama.cpp-q8_0": 0.03, "torchao-int8": 0.1}


def words_of(number: int) -> str:
    return " ".join(f"w{3 + (7 * number + place * place) % 90}" for place in range(6 + number % 5))


def saved(kind: str, tmp_path):
    """A tiny checkpoint with a tokenizer, its dense GGUF file, and texts; returns (folder, data, GGUF file)."""
    name, head, changes = MODELS[kind]
    model = tiny_model(name, head, **changes)
    gguf = write_dense(model, tmp_path / "dense.gguf") if kind == "decoder" else None
    if kind == "decoder":  # as llama.cpp wants it
        convert(model, 2, text_batches(8), router="linear", expert_size=32)
    else:
        convert(model, 2)
    model.save_pretrained(tmp_path / "moe")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    tokenizer.save_pretrained(tmp_path / "moe")
    data = tmp_path / "texts.csv"
    with open(data, "w", newline="") as file:
        rows = [(words_of(n), "w5" if kind == "encoder-decoder" else n % 2) for n in range(12)]
        csv.writer(file).writerows([("text", "label"), *rows])
    return tmp_path / "moe", data, gguf


def given(moe, engines, **changes) -> SideBySide:
    folder, data, gguf = moe
    source = TextSource(str(data), **changes)
    options = {"prompt": 6, "new_tokens": 4} if gguf else {"batch_sizes": (1, 3)}
    reading = Reading(source, rounds=2, **options)
    return SideBySide(str(folder), engines, reading, str(gguf) if gguf and engines else None)


def subject(moe, folder) -> base.Subject:
    side = given(moe, ())
    dense, model = checkpoint_models(side.settings)
    task = TASKS[base.kind_of(dense)](side.reading, dense, AutoTokenizer.from_pretrained(moe[0]), progress=False)
    (auto,) = variants(model, ("auto",)).values()
    return base.Subject(dense, model, auto, task.batches[:1], folder, 64, 1, str(moe[2]) if moe[2] else None)


def outputs(model, subject) -> torch.Tensor:
    """What a model gives for a batch: logits, or hidden states of what is no padding."""
    batch = subject.batches[0]
    if subject.kind == base.ENCODER:
        output = model(batch)
        return output["logits"] if "logits" in output else output["last_hidden_state"][batch["attention_mask"] == 1]
    if subject.kind == base.LANGUAGE_MODEL:
        ids = batch["input_ids"][0]
        model.read(ids)  # which has to be forgotten
        model.forget()
        return torch.cat([model.read(ids[:3]), model.read(ids[3:4], last=True), model.read(ids[4:])])
    return model.encode(batch)[batch["attention_mask"] == 1]


def installed(name: str) -> bool:
    try:
        ENGINES[name].check_installed()
    except MoefyError:
        return False
    return True


# graphs take long to write: in 8 bits those of classifiers and of decoders stand for all
CASES = [(kind, name) for kind in MODELS for name in ("PyTorch", *ENGINES)]
for kind in ("hidden states", "encoder-decoder"):
    CASES.remove((kind, "onnxruntime-int8"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_engines_compute_what_the_models_do(kind, name, tmp_path):
    moe = saved(kind, tmp_path)
    engine = PYTORCH if name == "PyTorch" else ENGINES[name]
    if name != "PyTorch" and not installed(name):
        pytest.skip(f"needs {engine.extra}")
    with torch.no_grad():
        made = subject(moe, tmp_path)
        if made.kind not in engine.kinds:
            with pytest.raises(MoefyError, match=f"{name} runs "):
                engine.check(made.moefied, made.gguf)
            return
        engine.check(made.moefied, made.gguf)
        before = outputs(PYTORCH.dense(made), made), outputs(base_of(made), made)
        running_in_it = engine.dense(made), engine.moefied(made)
        found = tuple(outputs(each, made) for each in running_in_it)
        if made.kind == base.ENCODER_DECODER and name in ERRORS:
            for model, each in zip((made.dense, made.moefied), running_in_it, strict=True):
                written = model.generate(**made.batches[0], do_sample=False, max_new_tokens=6, min_new_tokens=4)
                assert torch.equal(each.generate(made.batches[0], 6, 4), written)
        after = outputs(PYTORCH.dense(made), made), outputs(base_of(made), made)
        with all_experts(made.moefied):
            dense = outputs(base_of(made), made)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # an engine leaves the models alone
    torch.testing.assert_close(dense, before[0], rtol=1e-4, atol=1e-4)
    for ours, expected in zip(found, before, strict=True):
        assert ours.shape == expected.shape
        errors = distances(ours, expected)
        assert errors.max() <= ERRORS[name] if name in ERRORS else 1e-5 < errors.median() <= MEDIANS[name]
    assert distances(*before).median() > 0.01  # dense and MoEfied are two things


def distances(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (ours - expected).norm(dim=-1) / expected.norm(dim=-1)


def base_of(made):
    """The masked model in PyTorch."""
    return running(made.moefied)


QUALITY = {"classifier": "accuracy", "hidden states": "cosine", "decoder": "perplexity"}
QUALITY |= {"encoder-decoder": "exact match"}
WORK = {base.ENCODER: [("forward", 1), ("forward", 3)], base.LANGUAGE_MODEL: [("prompt", 1), ("generate", 1)]}
WORK |= {base.ENCODER_DECODER: [("forward", 1), ("forward", 3), ("generate", 1), ("generate", 3)]}


@pytest.mark.parametrize("kind", MODELS)
def test_rows(kind, tmp_path):
    moe = saved(kind, tmp_path)
    engines = {"decoder": ("llama.cpp",), "classifier": ("onnxruntime",)}.get(kind, ())
    engines = tuple(name for name in engines if installed(name))
    found = bench_against(given(moe, engines), progress=False)
    assert found["settings"]["quality"] == QUALITY[kind] and {*found["versions"]} == {"PyTorch", *engines}
    names = [(engine, which) for engine in ("PyTorch", *engines) for which in ("dense", "MoEfied")]
    work = WORK[found["settings"]["kind"]]
    assert [(row["work"], row["batch"], row["engine"], row["model"]) for row in found["rows"]] == [
        (*each, *name) for each in work for name in names
    ]
    quality = {}
    for row in found["rows"]:
        quality.setdefault(row["model"], row["quality"])
        assert row["quality"] == pytest.approx(quality[row["model"]], rel=1e-4)  # the same in every engine
        assert row["rounds"] == 2 and row["milliseconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["milliseconds"] * 1e3)
        if row["model"] == "dense":
            assert row["ratio_in_engine"] == 1 and (row["engine"] != "PyTorch" or row["ratio"] == 1)
    if kind == "hidden states":
        assert quality["dense"] == pytest.approx(1) and quality["MoEfied"] < 0.999
    if kind == "decoder":
        assert quality["dense"] != pytest.approx(quality["MoEfied"], rel=1e-3)
    assert found["settings"]["experts"] == pytest.approx(0.5 if kind == "decoder" else 1 / 3)


def test_ratios():
    places = {"a": ("PyTorch", "dense"), "PyTorch, dense": ("PyTorch", "dense"), "b": ("x", "MoEfied")}
    places["x, dense"] = ("x", "dense")
    taken = {"PyTorch, dense": [2.0, 4.0, 8.0], "x, dense": [1.0, 2.0, 4.0], "b": [0.5, 0.5, 0.5]}
    quality = dict.fromkeys(taken, 0.5)
    rows = rows_of(Timed("forward", 4, 100, taken), places, quality)
    assert [row["ratio"] for row in rows] == [1, 2, 8] and [row["ratio_in_engine"] for row in rows] == [1, 1, 4]
    assert rows[2]["spread"] == [6, 12] and rows[0]["tokens_per_second"] == 25


def test_accuracy_is_that_of_the_labels(tmp_path):
    """A model that finds every text's class has 1; with the other labels it has 0."""
    folder, data, _ = saved("classifier", tmp_path)
    first = bench_against(given((folder, data, None), ()), progress=False)["rows"][0]["quality"]
    flipped = data.read_text().replace(",0", ",x").replace(",1", ",0").replace(",x", ",1")
    data.write_text(flipped)
    second = bench_against(given((folder, data, None), ()), progress=False)["rows"][0]["quality"]
    assert first + second == pytest.approx(1) and 0 <= first <= 1
    few = bench_against(given((folder, data, None), (), max_rows=3), progress=False)["rows"][0]["quality"]
    assert few * 3 == pytest.approx(round(few * 3))


def test_texts_without_labels_are_compared_with_dense(tmp_path):
    for kind in ("classifier", "encoder-decoder"):
        folder = tmp_path / kind
        folder.mkdir()
        moe, _, _ = saved(kind, folder)
        texts = folder / "texts.txt"
        texts.write_text("\n".join(words_of(n) for n in range(5)))
        found = bench_against(given((moe, texts, None), ()), progress=False)
        assert found["settings"]["quality"] == "agreement" and found["rows"][0]["quality"] == 1


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OnnxRuntime, "dense", lambda engine, subject: PYTORCH.dense(subject))  # which is fast to make
    monkeypatch.setattr(OnnxRuntime, "moefied", lambda engine, subject: PYTORCH.moefied(subject))
    folder, data, _ = saved("classifier", tmp_path)
    files = [tmp_path / "out.json", tmp_path / "out.csv"]
    flags = ["--batch_sizes", "1", "2", "--rounds", "2", "--output", *map(str, files), "--k", "0.5"]
    main(["bench", str(folder), "--data", str(data), "--against", "onnxruntime", *flags])
    rows = json.loads(files[0].read_text())["rows"]
    with open(files[1], newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["ratio"]) for line in lines] == [row["ratio"] for row in rows] and len(rows) == 8
    printed = capsys.readouterr().out
    assert printed.count("| onnxruntime | MoEfied |") == 2 and "experts 0.5" in printed and "accuracy" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--against", "onnxruntime"], "give MODEL and --data"),
        (["moe", "--against", "onnxruntime"], "give MODEL and --data"),
        (
            ["moe", "--data", "x", "--against", "onnxruntime", "--tokens", "1", "--dtype", "float32"],
            "--dtype, --tokens",
        ),
        (["m", "--data", "x", "--against", "onnxruntime", "--dense", "x"], "is for llama.cpp, llama.cpp-q8_0"),
        (["moe", "--batch_sizes", "1"], "--batch_sizes belong to --against"),
        (["moe", "--data", "x", "--against", "onnxruntime", "--k", "2"], r"(--k) must lie in (0, 1]"),
        (["moe", "--data", "x", "--against", "onnxruntime", "--generate", "0", "2"], "prompt must be positive"),
        (["moe", "--data", "texts.csv", "--against", "onnxruntime", "--batch_sizes", "13"], "12 texts, too few"),
        (
            ["moe", "--data", "texts.csv", "--against", "onnxruntime", "--generate", "8", "8"],
            "no use for --generate: leave it out; it takes --batch_sizes, --max_length",
        ),
        (["moe", "--data", "texts.csv", "--against", "llama.cpp"], "llama.cpp runs language models"),
        (["moe", "--data", "nothing.csv", "--against", "onnxruntime"], "nothing.csv is no file"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    saved("classifier", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_encoder_decoders_without_words_to_write_are_refused():
    model = tiny_model("t5", CLASSIFIER)
    convert(model, 2)
    with pytest.raises(MoefyError, match="runs encoder-decoders that generate, which T5ForSequence"):
        ENGINES["onnxruntime"].check(model, None)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_that_are_not_installed_say_so_first(name, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(MoefyError, match=rf"{name} needs .*pip install 'moefy-hf\[{ENGINES[name].extra}\]'"):
        SideBySide("nothing", (name,), Reading(TextSource("nothing")))


def test_what_a_prompt_or_a_dense_file_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    folder, data, _ = saved("decoder", tmp_path)
    for engines, prompt, message in ((("llama.cpp",), 6, "dense GGUF file"), ((), 1000, "positions|too few")):
        side = SideBySide(str(folder), engines, Reading(TextSource(str(data)), prompt=prompt, new_tokens=4))
        with pytest.raises(MoefyError, match=message):
            bench_against(side, progress=False)


def test_options_of_other_kinds_of_models(tmp_path):
    for kind, options, message in (
        (
            "decoder",
            {"batch_sizes": (1,)},
            "no use for --batch_sizes: leave it out; it takes --generate, --max_length",
        ),
        ("encoder-decoder", {"prompt": 4, "max_length": 8}, "--generate or --max_length, not both"),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        moe, data, _ = saved(kind, folder)
        with pytest.raises(MoefyError, match=message):
            bench_against(SideBySide(str(moe), (), Reading(TextSource(str(data)), **options)), progress=False)
    reading = Reading(TextSource(str(data)), batch_sizes=(2,), prompt=4, new_tokens=3, rounds=1)
    found = bench_against(SideBySide(str(moe), (), reading), progress=False)
    assert found["settings"]["max_length"] == 4 and "prompt" not in found["settings"]
    assert [row["tokens"] for row in found["rows"]] == [2 * 4] * 2 + [2 * 3] * 2


def test_a_file_after_json_is_an_output(capsys):
    """In version 0.1 `--json` of bench named a file."""
    assert renamed(["bench", "moe", "--json", "out.json"]) == ["bench", "moe", "--output", "out.json"]
    assert renamed(["bench", "moe", "--json=out.json"]) == ["bench", "moe", "--output=out.json"]
    assert capsys.readouterr().err.count("--json is --output now") == 2
    for same in (["bench", "--json", "moe"], ["bench", "moe", "--json"], ["sweep", "--json", "out.json"]):
        assert renamed(same) == same and not capsys.readouterr().err


def test_the_table_of_the_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_blocks, "SPEED", tmp_path)
    assert speed_blocks.against() == ""
    names = [(engine, which) for engine in ("PyTorch", "llama.cpp") for which in ("dense", "MoEfied")]
    rows = [
        {"work": work, "batch": 1, "engine": engine, "model": which, "ratio": 1 + place, "quality": 20.5 - place}
        for work in ("prompt", "generate")
        for place, (engine, which) in enumerate(names)
    ]
    settings = {"quality": "perplexity", "experts": 0.25}
    found = {"settings": settings, "versions": {"PyTorch": "2", "llama.cpp": "1"}, "rows": rows}
    (tmp_path / "against_smollm2.json").write_text(json.dumps(found))
    *_, pytorch, llama = speed_blocks.against().splitlines()
    prose = "| SmolLM2-135M, prose | 25% |"
    assert pytorch == f"{prose} PyTorch | 1.00, 2.00 | 1.00, 2.00 | perplexity 20.5, 19.5 |"
    assert llama == f"{prose} llama.cpp | 3.00, 4.00 | 3.00, 4.00 | perplexity 18.5, 17.5 |"
