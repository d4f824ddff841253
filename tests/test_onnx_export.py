"""ONNX exports compute in ONNX Runtime what the MoEfied model does, for any number of rows and tokens."""

import importlib.util
import json

import pytest
import torch
import transformers
from batches import text_batches
from tiny import VOCAB, convert, tiny_inputs, tiny_model
from transformers import AutoConfig

from moefy_hf import export as export_model
from moefy_hf.errors import MoefyError, UnsupportedModel, VerificationError
from moefy_hf.exporters import export as exporting
from moefy_hf.exporters import onnx_export, onnx_ffn, onnx_graphs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSIFIER, QUESTIONS, CHOICE = (
    f"AutoModelFor{n}" for n in ("SequenceClassification", "QuestionAnswering", "MultipleChoice")
)
TOKENS, WORDS, IMAGES = (f"AutoModelFor{n}" for n in ("TokenClassification", "MaskedLM", "ImageClassification"))
ONE = {"num_hidden_layers": 1}
CASES = [  # model, head, its activation, operator
    ("bert", TOKENS, {"hidden_act": "gelu_new"}, "MoE"),
    ("bert", CHOICE, {"hidden_act": "relu"}, "MoE"),
    ("bert", QUESTIONS, {"hidden_act": "gelu"}, "Experts"),
    ("roberta", "AutoModel", {"hidden_act": "quick_gelu"}, "Experts"),
    ("vit", IMAGES, {"hidden_act": "gelu"}, "Experts"),
    ("modernbert", WORDS, {"hidden_activation": "silu"}, "MoE"),
    ("modernbert", WORDS, {"hidden_activation": "gelu"}, "Experts"),
]


def export(model, output, to="onnx", **options):
    """Without what takes as long again; `test_graphs_are_timed` is for that."""
    options |= {"timing": False, "progress": False} if to == "onnx" else {}
    return export_model(model, output, to, **options)


def session(folder):
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def inputs_of(name: str, head: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + length)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    shape = (rows, 2, length) if head == CHOICE else (rows, length)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, ..., length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def difference(model, running, inputs) -> float:
    """As a share of the largest output, over all outputs of the file."""
    given = {each.name for each in running.get_inputs()}
    fed = inputs | {name: torch.zeros_like(inputs["input_ids"]) for name in given - set(inputs)}
    names = [each.name for each in running.get_outputs()]
    results = running.run(names, {name: value.numpy() for name, value in fed.items()})
    with torch.no_grad():
        expected = model.eval()(**inputs)
    wanted = [expected[name] for name in names]
    return max(
        float((torch.from_numpy(a) - b).abs().max() / b.abs().max()) for a, b in zip(results, wanted, strict=True)
    )


@pytest.mark.parametrize(("name", "head", "changes", "operator"), CASES)
def test_graphs_compute_the_same(name, head, changes, operator, tmp_path):
    model = tiny_model(name, head, **changes)
    convert(model, [1, 3])
    assert export(model, tmp_path / "out", "onnx") == tmp_path / "out"
    running = session(tmp_path / "out")
    for rows in (1, 3):
        for length in (1, 13):
            assert difference(model, running, inputs_of(name, head, rows, length)) <= 1e-5
    facts = json.loads((tmp_path / "out" / "moefy_onnx.json").read_text())
    assert {*facts["operators"].values()} == {operator} and len(facts["operators"]) == 2
    assert facts["largest_difference"] <= 1e-5
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert sum(node.op_type == "MoE" for node in graph.graph.node) == 2 * (operator == "MoE")
    assert {node.domain for node in graph.graph.node} <= {"", "com.microsoft"}
    model.set_selection(k=6)  # the selection matters
    assert difference(model, running, inputs_of(name, head, 3, 13)) > 1e-3


class Classifier:
    """A classifier in training, whose experts are computed alone; exported once, and compared on given batches."""

    def __init__(self, folder):
        self.model, self.folder = tiny_model("bert", CLASSIFIER, hidden_act="relu", num_labels=3, **ONE), folder
        convert(self.model, 2)
        self.model.train()
        self.model.set_moe_implementation("torch")
        self.forwards, self.logits = self.forwards_now(), self.logits_now()
        export(self.model, folder, "onnx", batches=text_batches(2))

    def forwards_now(self) -> list:
        return [vars(site.first)["forward"] for site in self.model.moe_sites()]

    def logits_now(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**tiny_inputs("bert", CLASSIFIER)).logits


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Classifier:
    return Classifier(tmp_path_factory.mktemp("classifier") / "out")


@pytest.mark.xdist_group("onnx_classifier")
def test_files_are_what_optimum_reads(classifier):
    folder = classifier.folder
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json", "moefy_onnx.json"}
    config = AutoConfig.from_pretrained(folder)
    assert (config.architectures, config.num_labels) == (["BertForSequenceClassification"], 3)
    assert not {"moefication", "auto_map"} & set(config.to_dict())
    running = session(folder)
    axes = ["batch_size", "sequence_length"]
    assert {each.name: each.shape for each in running.get_inputs()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), axes
    )
    assert [(each.name, each.shape) for each in running.get_outputs()] == [("logits", ["batch_size", 3])]


@pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="needs optimum-onnx")
@pytest.mark.parametrize("int8", [False, True])
def test_optimum_loads_it(int8, tmp_path):
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = tiny_model("bert", CLASSIFIER, hidden_act="relu")
    convert(model, 2)
    export(model, tmp_path / "out", "onnx", int8=int8)
    inputs = tiny_inputs("bert")
    loaded = ORTModelForSequenceClassification.from_pretrained(tmp_path / "out")(**inputs).logits
    with torch.no_grad():
        logits = model(**inputs).logits
    assert (loaded - logits).abs().max() <= (0.2 if int8 else 1e-5) * logits.abs().max()


@pytest.mark.parametrize(("act", "shared"), [("relu", 1), ("gelu", 0)])
def test_shared_experts_and_means_come_along(act, shared, tmp_path):
    model = tiny_model("bert", CLASSIFIER, hidden_act=act, **ONE)
    convert(model, 3, text_batches(8), router="linear", shared_experts=shared, compensation=True)
    export(model, tmp_path / "out", "onnx")
    running, inputs = session(tmp_path / "out"), inputs_of("bert", CLASSIFIER, 3, 9)
    assert difference(model, running, inputs) <= 1e-5
    for site in model.moe_sites():
        site.act.compensation.zero_()
    assert difference(model, running, inputs) > 1e-3


@pytest.mark.parametrize(("activation", "operator"), [("relu", "MoE"), ("gelu", "Experts")])
def test_dynamic_selections_have_their_operators(activation, operator, tmp_path):
    model = tiny_model("bert", CLASSIFIER, hidden_act=activation)
    convert(model, 2, text_batches(8), router="mlp")
    model.set_selection(type="top_p", p=0.5)
    export(model, tmp_path / "out", "onnx")
    facts = json.loads((tmp_path / "out" / "moefy_onnx.json").read_text())
    assert {*facts["operators"].values()} == {operator}
    assert difference(model, session(tmp_path / "out"), inputs_of("bert", CLASSIFIER, 3, 9)) <= 1e-5


@pytest.mark.parametrize(("name", "changes"), [("bert", {"hidden_act": "relu"}), ("llama", {})])
def test_large_experts_are_products(name, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_ffn, "LARGE", 8)
    model = tiny_model(name, CLASSIFIER, num_hidden_layers=1, **changes)
    convert(model, 2)
    export(model, tmp_path / "out", "onnx")
    facts = json.loads((tmp_path / "out" / "moefy_onnx.json").read_text())
    assert {*facts["operators"].values()} == {"Experts"}
    for rows, length in ((1, 1), (3, 13), (128, 16)):  # the last in several threads, which must not lose a sum
        assert difference(model, session(tmp_path / "out"), inputs_of(name, CLASSIFIER, rows, length)) <= 1e-5


def test_layers_that_compute_all_experts_stay_dense(tmp_path):
    model = tiny_model("bert", CLASSIFIER, hidden_act="silu")
    convert(model, [6, 2])
    export(model, tmp_path / "out", "onnx")
    facts = json.loads((tmp_path / "out" / "moefy_onnx.json").read_text())
    assert facts["operators"] == {model.moe_sites()[1].key: "MoE"}
    assert difference(model, session(tmp_path / "out"), inputs_of("bert", CLASSIFIER, 3, 9)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "operator"),
    [
        ("bert", {"hidden_act": "relu"}, "QMoE"),
        ("bert", {"hidden_act": "gelu"}, "MatMulIntegerToFloat"),
        ("modernbert", {"hidden_activation": "silu"}, "QMoE"),
    ],
)
def test_int8_leaves_routers_alone(name, changes, operator, tmp_path):
    model = tiny_model(name, **changes, **ONE)
    convert(model, 3)
    export(model, tmp_path / "out", "onnx", int8=True)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert operator in kinds and "MatMulInteger" in kinds and "MoE" not in kinds
    floats = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.data_type == 1]
    for site in model.moe_sites():
        weight = site.act.router.weight.detach().numpy()
        assert any(each.shape == weight.shape and (each == weight).all() for each in floats) or any(
            each.shape == weight.T.shape and (each == weight.T).all() for each in floats
        )
    assert not [each.shape for each in floats if each.ndim > 1 and each.size >= 16 * 16], "still in float32"
    running, inputs = session(tmp_path / "out"), inputs_of(name, "AutoModel", 3, 13)
    fed = {each.name: inputs.get(each.name, 0 * inputs["input_ids"]).numpy() for each in running.get_inputs()}
    result = torch.from_numpy(running.run(["last_hidden_state"], fed)[0])
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    off = (result - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-4 < off.median() < 0.05  # some tokens are so near a tie that bytes route them otherwise
    assert running.run(None, {name: value[:1, :1] for name, value in fed.items()})  # most experts have no token


def test_int8_rows_are_as_close_as_a_byte():
    matrices = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    numbers, scale = onnx_ffn.int8_rows(matrices)
    back = (numbers.float() - 128) * scale.unsqueeze(-1)
    assert ((back - matrices).abs() <= 0.5001 * scale.unsqueeze(-1)).all() and numbers.dtype == torch.uint8


@pytest.mark.parametrize("int8", [False, True])
def test_large_models_have_a_second_file(int8, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "LARGEST_FILE", 0)
    model = tiny_model("bert", CLASSIFIER, hidden_act="relu")
    convert(model, 2)
    export(model, tmp_path / "out", "onnx", int8=int8)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("model*")}
    assert len(files) == 2 and all(size > 1000 for size in files.values())
    if not int8:
        assert difference(model, session(tmp_path / "out"), inputs_of("bert", CLASSIFIER, 3, 9)) <= 1e-5


@pytest.mark.xdist_group("onnx_classifier")
def test_the_model_is_as_it_was(classifier):
    model = classifier.model
    assert model.training and torch.equal(classifier.logits_now(), classifier.logits)
    assert classifier.forwards_now() == classifier.forwards
    model.set_moe_implementation("masked")
    assert "forward" not in {key for module in model.modules() for key in vars(module)}
    model.set_moe_implementation("torch")


def test_decoders_with_another_head_are_one_graph(tmp_path):
    model = tiny_model("llama", CLASSIFIER, use_cache=True, num_hidden_layers=1)
    convert(model, 2)
    export(model, tmp_path / "out")
    running = session(tmp_path / "out")
    assert [each.name for each in running.get_outputs()] == ["logits"]
    assert difference(model, running, inputs_of("llama", CLASSIFIER, 3, 9)) <= 1e-5


# ---- checks


@pytest.mark.xdist_group("onnx_classifier")
def test_it_is_compared_on_given_batches(classifier, tmp_path):
    assert json.loads((classifier.folder / "moefy_onnx.json").read_text())["largest_difference"] <= 1e-5
    with pytest.raises(UnsupportedModel, match="texts or of images"):
        export(classifier.model, tmp_path / "other", "onnx", batches=[{"input_values": torch.zeros(1, 9)}])


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_ffn, "NEVER", 1.0)  # the others are chosen
    model = tiny_model("bert", CLASSIFIER, hidden_act="relu")
    convert(model, 2)
    with pytest.raises(VerificationError, match="differs by"):
        export(model, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def moefied(name: str, head: str, router: str = "random", **changes):
    model = tiny_model(name, head, **changes)
    convert(model, 2, None if router == "random" else text_batches(8), router=router)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny_model("bert", CLASSIFIER), {}, "is not MoEfied"),
        (lambda: moefied("whisper", "AutoModelForSpeechSeq2Seq"), {}, "encoder-decoders are written of texts"),
        (lambda: moefied("t5", "AutoModel"), {}, "texts or of images"),
        (lambda: moefied("clip", "AutoModel"), {}, "texts or of images"),
        (lambda: moefied("bert", CLASSIFIER).bfloat16(), {}, r"bfloat16.*model.float\(\)"),
        (lambda: moefied("bert", CLASSIFIER, hidden_act="mish"), {}, "relufy_ it first"),
        (lambda: moefied("bert", CLASSIFIER, "pre_gated"), {}, "router='linear'"),
        (lambda: moefied("bert", CLASSIFIER), {"to": "dense", "int8": True}, "belong to to='onnx'"),
        (lambda: moefied("bert", CLASSIFIER), {"to": "dense", "timing": False}, "belong to to='onnx'"),
    ],
)
def test_what_cannot_be_written_is_refused(make, options, message, tmp_path):
    with pytest.raises(MoefyError, match=message):
        export(make(), tmp_path / "out", **{"to": "onnx", **options})
    assert not list(tmp_path.iterdir())


def test_what_has_to_be_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MoefyError, match=r"needs onnxscript: pip install 'moefy-hf\[onnx\]'"):
        export(moefied("bert", CLASSIFIER), tmp_path / "out", "onnx")


def test_two_towers_are_refused_before_any_work(tmp_path, monkeypatch):
    model = moefied("clip", "AutoModel")
    monkeypatch.setattr(exporting, "written_whole", None)
    with pytest.raises(MoefyError, match="made of vision_config, text_config: export one of these models by itself"):
        export(model, tmp_path / "out", "onnx")
    model.save_pretrained(tmp_path / "clip")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    convert(tower, 2)
    onnx_export.check_onnx(tower)
