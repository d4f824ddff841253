"""Exported models that generate text: step by step, what the MoEfied model gives, and the same greedy texts."""

import json

import pytest
import torch
from analysis.planted import number_tokenizer
from tiny import VOCAB, convert, tiny_model
from transformers import AutoConfig, AutoTokenizer

from moefy_hf import export
from moefy_hf.errors import MoefyError, UnsupportedModel, VerificationError
from moefy_hf.exporters import onnx_export, onnx_ffn, onnx_times

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CAUSAL, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
ONE = {"num_hidden_layers": 1}
DECODERS = {  # name -> changes, operator
    "llama": ({**ONE, "mlp_bias": False}, "MoE"),
    "gpt2": ({"n_layer": 1}, "MoE"),
    "opt": ({**ONE, "activation_function": "gelu"}, "Experts"),
}
PAIRS = {  # the same of encoder-decoders
    "t5": ({"num_layers": 1, "num_decoder_layers": 1}, "MoE"),
    "bart": ({"encoder_layers": 1, "decoder_layers": 1}, "Experts"),
}
NEW = 16  # tokens


class Exported:
    """A model beside its folder; `run` gives the outputs of a file by name."""

    def __init__(self, model, folder, **options):
        self.model, self.folder = model, folder
        export(model, folder, "onnx", timing=False, progress=False, **options)
        self.facts = json.loads((folder / "moefy_onnx.json").read_text())
        self.sessions = {
            path.name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def run(self, file: str = "model.onnx", **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        session = self.sessions[file]
        names = [each.name for each in session.get_outputs()]
        fed = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
        return dict(zip(names, map(torch.from_numpy, session.run(names, fed)), strict=True))

    def shapes(self, file: str) -> dict[str, list]:
        session = self.sessions[file]
        return {each.name: each.shape for each in (*session.get_inputs(), *session.get_outputs())}


def exported(name: str, head: str, folder, **options) -> Exported:
    changes, _ = {**DECODERS, **PAIRS}[name]
    model = tiny_model(name, head, **changes)
    convert(model, 2)
    return Exported(model, folder, **options)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request, tmp_path_factory) -> Exported:
    return exported(request.param, CAUSAL, tmp_path_factory.mktemp(request.param) / "out")


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> Exported:
    return exported(request.param, SEQ2SEQ, tmp_path_factory.mktemp(request.param) / "out")


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


# ---- decoders


def past_of(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("present", "past_key_values"): v for k, v in results.items() if k.startswith("present")}


def nothing(decoder: Exported, rows: int) -> dict[str, torch.Tensor]:
    """A past of no tokens."""
    shapes = {k: v for k, v in decoder.shapes("model.onnx").items() if k.startswith("past_key_values")}
    return {name: torch.zeros(rows, shape[1], 0, shape[3]) for name, shape in shapes.items()}


def fed_in_parts(decoder: Exported, text: torch.Tensor, mask: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Logits of a text of which a call reads as many tokens as `parts` say."""
    past, start, found = nothing(decoder, len(text)), 0, []
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for length in parts:
        end = start + length
        inputs = {"input_ids": text[:, start:end], "position_ids": positions[:, start:end]}
        results = decoder.run(**inputs, attention_mask=mask[:, :end], **past)
        found.append(results["logits"])
        past, start = past_of(results), end
    return torch.cat(found, 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("parts", [[9], [1] * 9, [4, 5], [1, 7, 1]])
def test_decoders_read_prompts_and_single_tokens(decoder, rows, parts):
    text = ids(rows, 9)
    with torch.no_grad():
        expected = decoder.model(input_ids=text).logits
    assert close(fed_in_parts(decoder, text, torch.ones_like(text), parts), expected)


def test_prompts_may_be_padded_on_the_left(decoder):
    text, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    logits = fed_in_parts(decoder, text, mask, [6, 1, 1, 1])
    for row, start in ((0, 4), (1, 0), (2, 0)):
        with torch.no_grad():
            expected = decoder.model(input_ids=text[row : row + 1, start:]).logits
        assert close(logits[row : row + 1, start:], expected)


def test_decoders_write_the_same_text(decoder):
    text = ids(2, 5)
    mask = torch.ones_like(text)
    expected = decoder.model.generate(
        input_ids=text, attention_mask=mask, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0
    )
    past, written = nothing(decoder, 2), text
    for _ in range(NEW):
        length = past["past_key_values.0.key"].shape[2]
        positions = torch.arange(length, written.shape[1]).expand(2, -1)
        results = decoder.run(
            input_ids=written[:, length:],
            attention_mask=torch.ones_like(written),
            position_ids=positions,
            **past,
        )
        logits = results["logits"][:, -1]
        logits[:, decoder.model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
        past, written = past_of(results), torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, expected)


def test_files_of_decoders_are_what_optimum_reads(decoder):
    files = {path.name for path in decoder.folder.iterdir()}
    assert files == {"model.onnx", "config.json", "generation_config.json", "moefy_onnx.json"}
    config = AutoConfig.from_pretrained(decoder.folder)
    assert not {"moefication", "auto_map"} & set(config.to_dict())
    heads, width = decoder.shapes("model.onnx")["past_key_values.0.key"][1::2]
    tokens, past, all_tokens = "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"
    expected = dict.fromkeys(("input_ids", "position_ids"), ["batch_size", tokens])
    expected |= {"attention_mask": ["batch_size", all_tokens], "logits": ["batch_size", tokens, VOCAB]}
    for each in ("key", "value"):
        expected[f"past_key_values.0.{each}"] = ["batch_size", heads, past, width]
        expected[f"present.0.{each}"] = ["batch_size", heads, all_tokens, width]
    assert decoder.shapes("model.onnx") == expected
    assert isinstance(heads, int) and isinstance(width, int)


def test_facts_tell_prompts_from_steps(decoder):
    _, operator = DECODERS[decoder.model.config.model_type]
    assert {*decoder.facts["operators"].values()} == {operator} and len(decoder.facts["operators"]) == 1
    found = decoder.facts["differences"]
    assert found.keys() == {"prompt", "steps", "step"} and max(found.values()) == decoder.facts["largest_difference"]
    assert 0 < decoder.facts["largest_difference"] <= 1e-5


# ---- encoder-decoders


def steps_of(pair: Exported, source: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, first: int):
    """Logits of `target`, of which the first call reads `first` tokens, and others one each."""
    hidden = pair.run("encoder_model.onnx", input_ids=source, attention_mask=mask)["last_hidden_state"]
    results = pair.run(
        "decoder_model.onnx",
        input_ids=target[:, :first],
        encoder_attention_mask=mask,
        encoder_hidden_states=hidden,
    )
    found, past = [results["logits"]], past_of(results)
    for position in range(first, target.shape[1]):
        step = {"input_ids": target[:, position : position + 1], "encoder_attention_mask": mask}
        results = pair.run("decoder_with_past_model.onnx", **step, **past)
        found.append(results["logits"])
        past |= past_of(results)  # those of the encoder stay
    return torch.cat(found, 1)


@pytest.mark.parametrize(("rows", "length", "first"), [(1, 1, 1), (1, 9, 4), (3, 8, 1)])
def test_encoder_decoders_do_one_step_after_the_other(pair, rows, length, first):
    source, target = ids(rows, length), ids(rows, 7, seed=1)
    mask = torch.ones_like(source)
    mask[-1, length // 2 + 1 :] = 0
    with torch.no_grad():
        expected = pair.model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    assert close(steps_of(pair, source, mask, target, first), expected)


def test_encoder_decoders_write_the_same_text(pair):
    source = ids(2, 6)
    mask = torch.ones_like(source)
    limits = {"min_new_tokens": NEW, "max_new_tokens": NEW}
    expected = pair.model.generate(input_ids=source, attention_mask=mask, do_sample=False, num_beams=1, **limits)
    written = torch.full((2, 1), pair.model.config.decoder_start_token_id)
    for _ in range(NEW):
        logits = steps_of(pair, source, mask, written, 1)[:, -1]
        logits[:, pair.model.config.eos_token_id] = -torch.inf
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, expected)


def test_files_of_encoder_decoders_are_what_optimum_reads(pair):
    files = {path.name for path in pair.folder.iterdir()}
    graphs = {"encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"}
    assert files == {*graphs, "config.json", "generation_config.json", "moefy_onnx.json"}
    rows, source, target = "batch_size", "encoder_sequence_length", "decoder_sequence_length"
    past = f"past_{target}"
    text = {"input_ids": [rows, source], "attention_mask": [rows, source], "last_hidden_state": [rows, source, 16]}
    assert pair.shapes("encoder_model.onnx") == text
    first = pair.shapes("decoder_model.onnx")
    expected = {"input_ids": [rows, target], "encoder_attention_mask": [rows, source]}
    expected |= {"encoder_hidden_states": [rows, source, 16], "logits": [rows, target, VOCAB]}
    for each in ("key", "value"):
        expected |= {
            f"present.0.decoder.{each}": [rows, 2, target, 8],
            f"present.0.encoder.{each}": [rows, 2, source, 8],
        }
    assert first == expected
    assert [name for name in first if name.startswith("present")] == [
        f"present.0.{side}.{each}" for side in ("decoder", "encoder") for each in ("key", "value")
    ]
    expected = {"input_ids": [rows, target], "encoder_attention_mask": [rows, source]}
    expected |= {"logits": [rows, target, VOCAB]}
    for each in ("key", "value"):
        expected[f"past_key_values.0.decoder.{each}"] = [rows, 2, past, 8]
        expected[f"past_key_values.0.encoder.{each}"] = [rows, 2, source, 8]
        expected[f"present.0.decoder.{each}"] = [rows, 2, f"{past} + {target}", 8]
    assert pair.shapes("decoder_with_past_model.onnx") == expected


def test_facts_of_encoder_decoders(pair):
    _, operator = PAIRS[pair.model.config.model_type]
    assert [*pair.facts["operators"].values()] == [operator] * 2
    found = pair.facts["differences"]
    assert found.keys() == {"texts", "prompt", "steps", "step"} and 0 < max(found.values()) <= 1e-5


# ---- both


@pytest.mark.parametrize(("name", "head"), [("gpt2", CAUSAL), ("t5", SEQ2SEQ)])
def test_int8(name, head, tmp_path):
    small = exported(name, head, tmp_path / "out", int8=True)
    assert {*small.facts["operators"].values()} == {"QMoE"}
    for file in small.sessions:
        graph = onnx.load(small.folder / file).graph
        assert {"MatMulInteger", "QMoE"} <= {node.op_type for node in graph.node}
        floats = [each.dims for each in graph.initializer if each.data_type == 1 and len(each.dims) > 1]
        assert not [dims for dims in floats if torch.Size(dims).numel() >= 16 * 16], "still in float32"
    text = ids(2, 9)
    with torch.no_grad():
        if name == "gpt2":
            expected = small.model(input_ids=text).logits
            logits = fed_in_parts(small, text, torch.ones_like(text), [5, 1, 1, 1, 1])
        else:
            expected = small.model(input_ids=text, decoder_input_ids=text).logits
            logits = steps_of(small, text, torch.ones_like(text), text, 4)
    off = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-4 < off.median() < 0.1  # some tokens are so near a tie that bytes route them otherwise


def test_graphs_are_timed_and_compared_on_given_batches(tmp_path, monkeypatch):
    """Also on those that are padded on the left, and those whose last tokens all are padding."""
    monkeypatch.setattr(onnx_times, "SECONDS", 0.1)
    model = tiny_model("gpt2", CAUSAL, n_layer=1)
    convert(model, 2)
    before = model.config.to_dict()
    mask, right = torch.ones(2, 2, 9, dtype=torch.long)
    mask[0, :5] = 0
    right[:, 3:] = 0
    given = [{"input_ids": ids(2, 9), "attention_mask": each} for each in (mask, right)]
    export(model, tmp_path / "out", "onnx", batches=given)
    facts = json.loads((tmp_path / "out" / "moefy_onnx.json").read_text())
    assert 0 < facts["largest_difference"] <= 1e-5
    assert facts["times_dense"].keys() == {"prompt", "step"}
    assert all(by_rows.keys() == {"1", "8"} and min(by_rows.values()) > 0 for by_rows in facts["times_dense"].values())
    assert model.config.to_dict() == before and int(model.moe_sites()[0].act.k) == 2
    assert len([*(tmp_path / "out").rglob("*.onnx")]) == 1


@pytest.mark.parametrize("ratio", [0.5, 1.25])
def test_slow_exports_say_so(ratio):
    line = onnx_times.times_line({"texts": {"1": ratio, "8": 2.0}})
    assert f"{ratio:.2f}" in line and "2.00" in line
    assert ("slower than dense at one text" in line) == (ratio < 1)


def test_a_decoder_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_ffn, "NEVER", 1.0)  # the others are chosen
    model = tiny_model("gpt2", CAUSAL, n_layer=1)
    convert(model, 2)
    with pytest.raises(VerificationError, match="differs by"):
        export(model, tmp_path / "out", "onnx", timing=False)
    assert not list(tmp_path.iterdir())


def test_tokenizers_are_readable_by_transformers_4(tmp_path):
    """It knows no TokenizersBackend, and wants a dict where version 5 has a list of further special tokens."""
    tokenizer = number_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["7"]})
    tokenizer.save_pretrained(tmp_path)
    onnx_export.tokenizer_for_optimum(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["7"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.all_special_tokens == tokenizer.all_special_tokens
    assert again("5 7 9").input_ids == tokenizer("5 7 9").input_ids


def test_models_that_also_look_are_refused(tmp_path, monkeypatch):
    model = tiny_model("gpt2", CAUSAL, n_layer=1)
    convert(model, 2)
    monkeypatch.setattr(type(model.config), "sub_configs", {"text_config": AutoConfig})
    with pytest.raises(MoefyError, match="made of text_config: export one of these"):
        export(model, tmp_path / "out", "onnx")


def test_batches_have_to_be_texts(tmp_path):
    model = tiny_model("t5", SEQ2SEQ, **PAIRS["t5"][0])
    convert(model, 2)
    with pytest.raises(UnsupportedModel, match="reads input_ids: ONNX encoder-decoders"):
        export(model, tmp_path / "out", "onnx", batches=[{"input_ids": ids(1, 3)}])
