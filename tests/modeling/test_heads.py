"""Every head of every architecture: converted, it is the dense model with routers, in memory and on disk."""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    EXPERT_SIZE,
    NAMES,
    TINY,
    VARIANTS,
    convert,
    distance,
    run,
    tiny,
    tiny_inputs,
    tiny_model,
    tiny_moefied,
)
from torch import nn
from transformers.models.auto import modeling_auto

from moefy_hf.loading import moefied_class
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.moefied import DENSE_NOTE, MoefiedMixin

MODELING = Path(sys.modules[MoefiedMixin.__module__].__file__).parent


def modeling_file(model_type: str):
    return importlib.import_module(f"moefy_hf.modeling.modeling_moefied_{model_type.replace('-', '_')}")


def heads(model_type: str) -> dict[str, type]:
    """AutoModel class -> Moefied class, of every class in the architecture's modeling file."""
    classes = [c for c in vars(modeling_file(model_type)).values() if isinstance(c, type)]
    return {c._auto_class: c for c in classes if issubclass(c, MoefiedMixin) and c is not MoefiedMixin}


# the base model and one head; test_popular_heads has every head of more types
SOME = {name: dict.fromkeys(["AutoModel", [*heads(name)][-1]]) for name in TINY}
ALL = [(name, head) for name, some in SOME.items() for head in some] + [(name, "AutoModel") for name in VARIANTS]


@dataclass
class Converted:
    """One head of one architecture: what the dense model answered, the converted one, and where it was saved."""

    name: str
    head: str
    dense_keys: list[str]
    inputs: dict[str, torch.Tensor]
    dense: list[torch.Tensor]
    full: list[torch.Tensor]  # every expert selected
    sparse: list[torch.Tensor]  # two experts
    model: nn.Module  # two experts
    same_object: bool
    report: object
    folder: Path


@pytest.fixture(scope="module", params=ALL, ids=[f"{name}-{head}" for name, head in ALL])
def converted(request, tmp_path_factory) -> Converted:
    name, head = request.param
    model, inputs = tiny_model(name, head), tiny_inputs(name, head)
    keys, dense, address = list(model.state_dict()), run(model, inputs), id(model)
    report = convert(model)
    full = run(model, inputs)
    model.set_selection(k=2)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    sparse = run(model, inputs)
    return Converted(name, head, keys, inputs, dense, full, sparse, model, id(model) == address, report, folder)


COMMON_HEADS = [
    "AutoModel",
    "AutoModelForAudioClassification",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTextEncoding",
    "AutoModelForTokenClassification",
    "AutoModelForZeroShotImageClassification",
]


@pytest.mark.parametrize("model_type", TINY)
def test_heads_are_what_transformers_would_load(model_type):
    """Every class answers to the AutoModel class whose mapping holds its stock class; all common heads are there."""
    found, config = heads(model_type), transformers.CONFIG_MAPPING[model_type]
    classes = [c for c in vars(modeling_file(model_type)).values() if isinstance(c, type) and "_auto_class" in vars(c)]
    assert len(found) == len(classes)  # no AutoModel class twice
    for head, cls in found.items():
        assert getattr(modeling_auto, head)._model_mapping[config] is cls.stock_class()
        assert cls.stock_class().config_class is config
    auto_map = next(iter(found.values())).auto_map()
    assert auto_map.keys() >= found.keys()
    for head in COMMON_HEADS:  # a class may have two names: BertModel is what AutoModelForTextEncoding builds, too
        mapping = getattr(modeling_auto, head)._model_mapping
        if config in mapping:
            cls = getattr(modeling_file(model_type), auto_map[head].rpartition(".")[2])
            assert cls.stock_class() is mapping[config], head


def test_in_place(converted):
    assert converted.same_object and type(converted.model) is moefied_class(type(converted.model).stock_class())
    assert type(converted.model) is heads(tiny(converted.name).model_type)[converted.head]
    assert converted.report.experts == [site.sizes[1] // EXPERT_SIZE for site in find_sites(converted.model)]
    assert not converted.model.training


def test_keys_are_the_dense_ones_and_routers(converted):
    keys = converted.model.state_dict().keys()
    added = [key for key in keys if ".router." in key or key.endswith(".neuron_order")]
    assert [key for key in keys if key not in added] == converted.dense_keys
    assert len(added) == 2 * len(converted.report.experts)


def test_all_experts_equal_dense(converted):
    assert distance(converted.full, converted.dense) < 1e-5


def masked_by_hand(converted: Converted, k: int) -> list[torch.Tensor]:
    """A stock model with the converted weights, whose `down` matrices are fed masked neurons: routing from scratch."""
    state = converted.model.state_dict()
    stock = type(converted.model).stock_class()(transformers.AutoConfig.from_pretrained(converted.folder)).eval()
    stock.load_state_dict({key: value for key, value in state.items() if key in converted.dense_keys})
    for site in find_sites(stock):
        prefix = ".".join(part for part in (site.name, site.spec.act) if part)
        weight, x = state[f"{prefix}.router.weight"], []
        site.first.register_forward_pre_hook(lambda module, args, x=x: x.append(args[0]))

        def mask(module, args, weight=weight, x=x):
            scores = (x.pop().unsqueeze(-2) * weight).sum(-1)  # (..., E)
            kth = scores.sort(dim=-1, descending=True).values[..., k - 1, None]
            return torch.where((scores >= kth).repeat_interleave(EXPERT_SIZE, dim=-1), args[0], 0.0)

        site.down.register_forward_pre_hook(mask)
    return run(stock, converted.inputs)


def test_fewer_experts_equal_masking_by_hand(converted):
    assert distance(converted.sparse, masked_by_hand(converted, 2)) < 1e-5
    assert distance(converted.sparse, converted.dense) > 1e-3


def test_saved_and_loaded(converted):
    loaded, info = type(converted.model).from_pretrained(converted.folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, converted.model.state_dict()[key]), key
    # the last bit of a matrix product may hang on where in memory its operands lie
    assert distance(run(loaded, converted.inputs), converted.sparse) < 1e-6
    loaded.set_selection(k=1.0)
    assert distance(run(loaded, converted.inputs), converted.full) < 1e-6
    assert list(loaded.state_dict()) == list(converted.model.state_dict())


def test_the_stock_class_loads_the_dense_model(converted):
    stock = type(converted.model).stock_class()
    loaded, info = stock.from_pretrained(converted.folder, output_loading_info=True)
    assert type(loaded) is stock and list(loaded.state_dict()) == converted.dense_keys
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == {DENSE_NOTE, *converted.model.state_dict()} - {*converted.dense_keys}
    assert distance(run(loaded, converted.inputs), converted.dense) < 1e-5


def test_the_folder_names_and_carries_its_code(converted):
    saved = json.loads((converted.folder / "config.json").read_text())
    stem, found = modeling_file(saved["model_type"]).__name__.rpartition(".")[2], heads(saved["model_type"])
    assert saved["auto_map"].items() >= {head: f"{stem}.{cls.__name__}" for head, cls in found.items()}.items()
    assert saved["auto_map"] == type(converted.model).auto_map()
    shared = {"ffn_sites", "moefied", "routed_activation", "routers", "selection", stem}
    assert {path.stem for path in converted.folder.glob("*.py")} >= shared
    written = Path(modeling_file(saved["model_type"]).__file__)
    for path in converted.folder.glob("*.py"):
        assert path.read_text() == (written if path.stem == stem else MODELING / path.name).read_text()


@pytest.mark.parametrize(
    ("name", "head", "second"),
    [("bert", "AutoModel", "AutoModelForTextEncoding"), ("bart", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")],
)
def test_a_second_name_loads_the_moefied_class_too(name, head, second, tmp_path):
    model, inputs = tiny_model(name, head), tiny_inputs(name, head)
    convert(model, k=2)
    for folder in ("first", "again"):
        model.save_pretrained(tmp_path / folder)
        loaded = getattr(transformers, second).from_pretrained(tmp_path / folder, trust_remote_code=True).eval()
        assert type(loaded).__name__ == type(model).__name__
        assert distance(run(loaded, inputs), run(model, inputs)) < 1e-6
        model = loaded


def test_the_class_of_a_head_is_found_or_its_absence_said():
    assert moefied_class(transformers.BertModel) is heads("bert")["AutoModel"]
    assert moefied_class(transformers.CLIPModel) is heads("clip")["AutoModel"]  # not the zero-shot one
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel has no Auto class; those of 'gpt2': .*GPT2LMHeadModel"):
        moefied_class(transformers.GPT2DoubleHeadsModel)


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "AutoModel") for name in TINY), ("vit", "AutoModelForImageClassification")]
)
def test_the_file_holds_the_dense_names(name, head, tmp_path):
    """Also where transformers writes older names than the model has (ViT): other tools find what they know."""
    model = tiny_model(name, head)
    model.save_pretrained(tmp_path / "dense")
    convert(model)
    model.save_pretrained(tmp_path / "converted")
    dense, routed = ({*load_file(tmp_path / folder / "model.safetensors")} for folder in ("dense", "converted"))
    added = {key for key in routed if ".router." in key or key.endswith(".neuron_order")}
    assert dense == routed - added - {DENSE_NOTE}
    assert len(added) == 2 * len(model.moe_sites()) and DENSE_NOTE in routed


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_has_initialised_routers(name):
    """Built from a config, not from a checkpoint: T5 would use a standard deviation of 1, `empty` is garbage."""
    model = tiny_moefied(name, k=1.0)
    auto_map = model.config.__dict__.pop("auto_map")
    torch.manual_seed(0)
    new = type(model)(model.config)
    assert new.config.auto_map == auto_map
    weights = [site.act.router.weight for site in new.moe_sites()]
    assert len(weights) == tiny(name).ffns and not any(weight.requires_grad for weight in weights)
    for weight in weights:
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.35)
    assert new._get_name() == type(model).stock_class().__name__  # Trainer's label smoother looks it up
    run(new.eval(), tiny_inputs(name))
