"""The command line with people's files, tokenizers and models."""

import csv
import gzip
from pathlib import Path

import pytest
import torch
import transformers
from test_cli import number_tokenizer
from tiny import VOCAB, convert, tiny_model
from transformers import AutoTokenizer

from moefy_hf import load
from moefy_hf.cli import common
from moefy_hf.cli import convert as convert_command
from moefy_hf.cli.main import main
from moefy_hf.data import TextBatches, TextSource, decoder_start_of, longest_text

CLASSIFIER, SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"
ROWS = [("5 6 7", 0), ("8 9 10 é", 1)] * 20


def words(count: int = 40, length: int = 12) -> str:
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return "\n".join(" ".join(map(str, row)) for row in ids)


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    number_tokenizer().save_pretrained(folder)
    return folder


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, arguments)])
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = tiny_model("bert", CLASSIFIER)
    convert(model, k=2)
    return save(model, folder / "moe")


def table(path: Path, rows=ROWS, encoding: str = "utf-8", columns=("text", "label")) -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_a_table_that_excel_saved_is_read(classifier, tmp_path, capsys):
    plain, excel = (table(tmp_path / f"{name}.csv", encoding=name) for name in ("utf-8", "utf-8-sig"))
    model = load(classifier)
    one, other = (TextSource(str(path)).open().read(model, labels=True) for path in (plain, excel))
    assert one == other and one.labels == [label for _, label in ROWS]
    main(["sweep", str(classifier), "--data", str(excel), "--k", "0.5", "--controls"])
    assert "| own |" in capsys.readouterr().out
    main(["analyze", str(classifier), "--data", str(excel), "--output", str(tmp_path / "report")])
    assert (tmp_path / "report" / "report.html").exists()
    (tmp_path / "marked.txt").write_text("5 6\n7 8", encoding="utf-8-sig")
    assert TextSource(str(tmp_path / "marked.txt")).open().read(model).texts == ["5 6", "7 8"]


@pytest.mark.parametrize("kind", ["latin-1", "utf-16", "utf-16-le", "gzip"])
@pytest.mark.parametrize("command", ["sweep", "analyze"])
def test_another_encoding_is_one_line_that_names_the_file(command, kind, classifier, tmp_path, capsys):
    path = tmp_path / "data.csv"
    if kind == "gzip":
        path.write_bytes(gzip.compress(b"text,label\n5 6,0\n"))
    else:
        table(path, encoding=kind)
    output = ["--output", tmp_path / "report"] if command == "analyze" else []
    said = refused(capsys, command, classifier, "--data", path, *output)
    assert said == (
        f"moefy {command}: {path} is not UTF-8 text: "
        + ("unpack it first" if kind == "gzip" else "save it as UTF-8 (iconv -f latin1 -t utf-8, or -f utf-16)")
    )
    assert not (tmp_path / "report").exists()


def test_a_row_without_a_label_is_named(classifier, tmp_path, capsys):
    path = table(tmp_path / "data.csv", [*ROWS[:3], ("5 6", ""), *ROWS])
    assert f"{path}: row 4 has no label" in refused(capsys, "sweep", classifier, "--data", path)
    path = table(tmp_path / "data.csv", [*ROWS[:3], ("5 6", "maybe")])
    said = refused(capsys, "analyze", classifier, "--data", path, "--output", tmp_path / "report")
    assert f"{path}: row 4 has label 'maybe', which is none of LABEL_0, LABEL_1" in said
    path = table(tmp_path / "data.csv", columns=("words", "label"))
    assert "has no column text; it has words, label" in refused(capsys, "sweep", classifier, "--data", path)


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart", "mt5"])
def test_encoder_decoders_read_texts_with_both(name, tmp_path, capsys):
    folder = save(tiny_model(name, SEQ2SEQ), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(words(60))
    main(["profile", str(folder), "--data", str(tmp_path / "texts.txt")])
    settings = ["--data", str(tmp_path / "texts.txt"), "--expert_size", "8", "--k", "3"]
    main(["convert", str(folder), str(tmp_path / "moe"), *settings, "--force"])
    out = capsys.readouterr().out
    assert "predicted: agreement with dense" in out
    model = load(tmp_path / "moe")
    assert len(model.moe_sites()) == 4 and all(len(v) == 4 for v in [model.config.moefication["sensitivity"]["k"]])


def test_what_a_decoder_reads_is_the_text_shifted():
    model = tiny_model("t5", SEQ2SEQ)
    batches = TextBatches(["5 6 7", "8"], number_tokenizer(), decoder_start=decoder_start_of(model))
    (batch,) = batches
    for ids, mask, read, seen in zip(
        batch["input_ids"],
        batch["attention_mask"],
        batch["decoder_input_ids"],
        batch["decoder_attention_mask"],
        strict=True,
    ):
        assert torch.equal(read[1:], ids[:-1]) and read[0] == model.config.decoder_start_token_id
        assert torch.equal(seen[1:], mask[:-1]) and seen[0] == 1
    assert decoder_start_of(tiny_model("bert")) is None
    assert decoder_start_of(tiny_model("bart", CLASSIFIER)) is None  # it makes its decoder's inputs itself


@pytest.mark.parametrize(("name", "what"), [("vit", "pixel_values"), ("whisper", "input_features")])
def test_a_model_that_reads_no_texts_says_what_it_reads(name, what, tmp_path, capsys):
    folder = save(tiny_model(name), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(words())
    command = ["convert", folder, tmp_path / "moe", "--data", tmp_path / "texts.txt", "--expert_size", 8]
    assert f"reads {what}, not texts" in refused(capsys, *command, "--allocation", "uniform")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "bert", "gpt2"])
def test_texts_are_cut_to_what_a_model_can_take(name, tmp_path):
    model = tiny_model(name)
    shift = 1 if "roberta" in name else 0  # positions begin behind that of the padding token
    longest = 32 - shift * (model.config.pad_token_id + 1)
    assert longest_text(model, number_tokenizer(), 600) == longest
    assert longest_text(model, number_tokenizer(), 8) == 8
    tokenizer = number_tokenizer()
    tokenizer.model_max_length = 16
    assert longest_text(model, tokenizer, 600) == 16
    head = "AutoModelForCausalLM" if name == "gpt2" else "AutoModelForMaskedLM"
    folder = save(tiny_model(name, head), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(words(40, 60))
    settings = ["--data", str(tmp_path / "texts.txt"), "--max_length", "600", "--expert_size", "8", "--k", "3"]
    main(["convert", str(folder), str(tmp_path / "moe"), *settings, "--allocation", "uniform", "--force"])
    assert (tmp_path / "moe" / "config.json").exists()


def test_a_tokenizer_that_knows_more_than_the_model_is_one_line(tmp_path, capsys):
    folder = save(tiny_model("llama", "AutoModelForCausalLM", vocab_size=50), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(words())
    command = ["convert", folder, tmp_path / "moe", "--data", tmp_path / "texts.txt", "--expert_size", 8]
    said = refused(capsys, *command)
    assert "the model has embeddings of 50 tokens: use its own tokenizer" in said and "resize_token_embeddings" in said


def test_a_config_that_names_no_head_takes_one(tmp_path, capsys):
    folder = save(tiny_model("deberta-v2", "AutoModelForMaskedLM"), tmp_path / "dense")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.architectures = None
    config.save_pretrained(folder)
    said = refused(capsys, "inspect", folder)
    assert "does not say which head it has; choose one (--head) from AutoModel" in said
    assert "has no head 'Masked'" in refused(capsys, "inspect", folder, "--head", "Masked")
    main(["inspect", str(folder), "--head", "AutoModelForMaskedLM"])
    assert "DebertaV2ForMaskedLM" in capsys.readouterr().out
    settings = ["--splitter", "random", "--router", "random", "--expert_size", "8", "--allocation", "uniform"]
    main(["convert", str(folder), str(tmp_path / "moe"), *settings, "--head", "AutoModelForMaskedLM"])
    assert type(load(tmp_path / "moe")).__name__ == "MoefiedDebertaV2ForMaskedLM"


@pytest.mark.parametrize("native", [True, False])
def test_a_processor_without_bfloat16_computes_in_float32_and_saves_bfloat16(native, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "computes_bfloat16", lambda: native)
    folder = save(tiny_model("llama-without-biases", "AutoModelForCausalLM").bfloat16(), tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(words(60))
    computed, original = [], convert_command.moefy_

    def seen(model, *args, **kwargs):
        computed.append(model.dtype)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(convert_command, "moefy_", seen)
    settings = ["--data", str(tmp_path / "texts.txt"), "--expert_size", "8", "--k", "3", "--force"]
    main(["convert", str(folder), str(tmp_path / "moe"), *settings])
    assert computed == [torch.bfloat16 if native else torch.float32]
    model = load(tmp_path / "moe")
    for name, each in model.named_parameters():
        assert each.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    dense, loaded = load(folder), load(tmp_path / "moe")
    loaded.set_selection(k=1.0)
    ids = AutoTokenizer.from_pretrained(folder)("5 6 7 8", return_tensors="pt")
    torch.testing.assert_close(loaded(**ids).logits, dense(**ids).logits, rtol=0.05, atol=0.05)
    main(["convert", str(folder), str(tmp_path / "asked"), *settings, "--dtype", "bfloat16"])
    assert computed[-1] == torch.bfloat16


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_heads_whose_classes_do_not_exclude_each_other_are_not_compared(problem, tmp_path, capsys):
    model = tiny_model("bert", CLASSIFIER, problem_type=problem)
    folder = save(model, tmp_path / "dense")
    (tmp_path / "texts.txt").write_text(words(60))
    command = ["convert", folder, tmp_path / "moe", "--data", tmp_path / "texts.txt", "--expert_size", 8, "--k", 3]
    said = refused(capsys, *command)
    assert f"its problem_type is {problem}" in said and '"allocation": "angular" or "uniform"' in said
    main([*map(str, command), "--allocation", "angular"])
    out = capsys.readouterr().out
    assert "quality is not predicted" in out and problem in out and "agreement" not in out


def test_pruning_saves_the_type_that_it_came_in(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "computes_bfloat16", lambda: False)
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM").bfloat16()
    convert(model, k=3)
    folder = save(model, tmp_path / "moe")
    (tmp_path / "texts.txt").write_text(words())
    main(["prune", str(folder), str(tmp_path / "less"), "--count", "1", "--data", str(tmp_path / "texts.txt")])
    for name, each in load(tmp_path / "less").named_parameters():
        assert each.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
