"""What loading and saving leave as it was, and what they refuse or say."""

import importlib
import json
import logging as python_logging
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import TINY, convert, distance, run, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig, load, reroute_
from moefy_hf.errors import MoefyError, NotMoefied, UnsupportedModel
from moefy_hf.loading import check_moefied, moefied_class
from moefy_hf.modeling import moefied, needs
from moefy_hf.modeling.moefied import DENSE_NOTE
from moefy_hf.modeling.routers import ROUTERS

MODELING = Path(moefied.__file__).parent
CAUSAL = "AutoModelForCausalLM"


def routers(model) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if ".router." in name}


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "partial_input"])
def test_routers_stay_frozen(router, tmp_path):
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2, router=router, calibration=[tiny_inputs("llama")] * 20)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for each in (model, loaded, load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert routers(each) and not any(parameter.requires_grad for parameter in routers(each).values())
    others = {name: each.requires_grad for name, each in loaded.named_parameters() if ".router." not in name}
    assert all(others.values()) and not loaded.training


def test_routers_are_float32_however_a_model_is_made():
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    made = type(model)._from_config(model.config, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert {each.dtype for each in routers(made).values()} == {torch.float32}


def test_a_class_that_extends_a_moefied_one_is_saved_as_what_it_extends(tmp_path):
    model, inputs = tiny_model("llama", CAUSAL), tiny_inputs("llama")
    convert(model, k=2)
    model.save_pretrained(tmp_path / "moefied")

    class Extended(moefied_class(transformers.LlamaForCausalLM)):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(4, 4)
            self.post_init()  # as transformers' own classes do: a second time

    extended = Extended.from_pretrained(tmp_path / "moefied").eval()
    assert distance(run(extended, inputs), run(model, inputs)) == 0
    assert not any(parameter.requires_grad for parameter in routers(extended).values())
    extended.save_pretrained(tmp_path / "extended")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "extended", trust_remote_code=True).eval()
    assert type(loaded).__name__ == "MoefiedLlamaForCausalLM"
    assert loaded.config.auto_map == model.config.auto_map
    assert distance(run(loaded, inputs), run(model, inputs)) == 0
    assert type(extended) is Extended and type(load(tmp_path / "extended")).__name__ == type(loaded).__name__
    again = Extended.from_pretrained(tmp_path / "extended")
    assert torch.equal(again.extra.weight, extended.extra.weight)


def test_a_class_that_its_author_registers_is_saved_with_its_own_file(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from moefy_hf.modeling.modeling_moefied_llama import MoefiedLlamaForCausalLM\n"
        "class MyModel(MoefiedLlamaForCausalLM):\n    pass\n"
        'MyModel.register_for_auto_class("AutoModelForCausalLM")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    model.save_pretrained(tmp_path / "moefied")
    mine = importlib.import_module("my_model").MyModel.from_pretrained(tmp_path / "moefied")
    mine.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "my_model.py").exists()
    assert mine.config.auto_map == {"AutoModelForCausalLM": "my_model.MyModel"}  # files of other heads are not there
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine", trust_remote_code=True)
    assert type(loaded).__name__ == "MyModel"


def test_a_dense_load_says_that_it_is_one(tmp_path, caplog):
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    model.save_pretrained(tmp_path)
    report = python_logging.getLogger("transformers")
    report.addHandler(caplog.handler)
    try:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "LOAD REPORT" in caplog.text and DENSE_NOTE in caplog.text
        caplog.clear()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        assert "LOAD REPORT" not in caplog.text
    finally:
        report.removeHandler(caplog.handler)
    assert DENSE_NOTE not in loaded.state_dict() and not hasattr(loaded, DENSE_NOTE)
    result = loaded.load_state_dict({**model.state_dict(), DENSE_NOTE: torch.zeros(1)}, strict=True)
    assert not result.unexpected_keys  # a Trainer that resumes does so


def test_libraries_that_look_a_class_up_by_name_find_it(tmp_path):
    """TRL loads reference models so, and says nothing of trust."""
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    model.save_pretrained(tmp_path)
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    (name,) = transformers.AutoConfig.from_pretrained(tmp_path).architectures
    assert getattr(sys.modules["transformers"], name) is type(policy)


def test_an_encoder_decoder_of_moefied_parts_is_not_saved(tmp_path):
    parts = [tiny_model("bert"), tiny_model("bert", "AutoModelForCausalLM", is_decoder=True, add_cross_attention=True)]
    for part in parts:
        convert(part, k=2)
    whole = transformers.EncoderDecoderModel(encoder=parts[0], decoder=parts[1])
    with pytest.raises(ValueError, match="EncoderDecoderModel with MoEfied FFNs would load as a dense model"):
        whole.save_pretrained(tmp_path)
    parts[0].save_pretrained(tmp_path / "encoder")  # by itself, it is
    assert whole.state_dict() and torch.nn.Sequential(parts[0]).state_dict()


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_a_part_of_a_moefied_model_is_not_saved(name, tmp_path):
    model = tiny_model(name)
    convert(model, k=2)
    with pytest.raises(ValueError, match="would load as a dense model"):
        model.get_encoder().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "whole")


def test_an_old_transformers_is_told_which_is_needed():
    needs.check_version(transformers.__version__)
    needs.check_version("5.17.0.dev0")
    for old in ("4.57.1", "5.16.2"):
        with pytest.raises(ImportError, match=f"need transformers 5.17 or newer, and this is {old}"):
            needs.check_version(old)


def test_the_needed_version_is_that_of_the_package():
    project = (MODELING.parents[1] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, needs.TRANSFORMERS))},' in project


@pytest.mark.parametrize("model_type", TINY)
def test_each_modeling_file_names_all_it_needs_and_asks_for_the_version_first(model_type):
    """transformers 4 copies what the file itself names, and no file that another one needs."""
    module = importlib.import_module(f"moefy_hf.modeling.modeling_moefied_{model_type.replace('-', '_')}")
    text = Path(module.__file__).read_text()
    named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
    everything = {path.stem for path in MODELING.glob("*.py") if not path.stem.startswith(("modeling_", "__"))}
    assert named == everything
    code = text.partition('"""')[2].partition('"""')[2]
    assert code.lstrip().startswith("from .needs import")
    assert "moefied" in sys.modules["moefy_hf.modeling"].__dict__


def test_a_process_that_only_takes_part_gathers_nothing(tmp_path, monkeypatch):
    """Of a state that one process holds whole, the others are given an empty one."""
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    monkeypatch.setattr(type(model), "state_dict", lambda *_, **__: pytest.fail("gathers"))
    model.save_pretrained(tmp_path, is_main_process=False, state_dict={})
    assert not [*tmp_path.glob("*.safetensors")]


def test_a_model_names_the_routers_it_has_for_fsdp():
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    assert {"RandomRouter", "LlamaDecoderLayer"} <= {*model._no_split_modules}
    reroute_(model, "similarity")
    assert "SimilarityRouter" in model._no_split_modules and "RandomRouter" not in model._no_split_modules
    other = tiny_model("llama", CAUSAL)
    convert(other, k=2, router="pre_gated", calibration=[tiny_inputs("llama")] * 20)
    assert not [each for each in other._no_split_modules if "Router" in each]  # they hand scores to each other


def test_a_class_that_transformers_remakes_keeps_all_heads(tmp_path):
    """It adds GenerationMixin to custom classes that write a method of it anew."""
    model = tiny_model("llama", CAUSAL)
    convert(model, k=2)
    cls = type(model)
    model.__class__ = type(cls.__name__, (cls, transformers.GenerationMixin), {**cls.__dict__})
    heads = {**model.config.auto_map}
    model.save_pretrained(tmp_path)
    assert model.config.auto_map == heads and len(heads) > 1
    assert transformers.AutoConfig.from_pretrained(tmp_path).auto_map == heads


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba9"}, "model type `mamba9`"),
        ({"model_type": "bert"}, "does not say which head"),
        ({"model_type": "bert", "architectures": ["BertForChess"]}, "BertForChess is no architecture"),
        (
            {"model_type": "gpt2", "architectures": ["MoefiedGPT2DoubleHeadsModel"], "moefication": {}},
            "GPT2DoubleHeadsModel has no Auto class; those of 'gpt2': .*GPT2LMHeadModel",
        ),
    ],
)
def test_a_checkpoint_of_no_known_model_is_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path)


def test_a_checkpoint_of_a_model_without_ffns_is_refused(tmp_path):
    config = transformers.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaModel(config)
    model.config.moefication = MoEficationConfig(splitter="random", router="random").section()
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="no FFN of this MoefiedMambaModel"):
        load(tmp_path)


def test_a_dense_model_is_no_moefied_one():
    with pytest.raises(NotMoefied, match="BertModel is not MoEfied; convert it"):
        check_moefied(tiny_model("bert"))
    with pytest.raises(MoefyError, match="48 neurons do not split into experts of size 7"):
        convert(tiny_model("bert"), expert_size=7)
