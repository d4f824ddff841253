"""Adapters: those of the dense model permuted for its MoEfied self, and those that change what a Linear reads."""

import copy
import json

import peft
import pytest
import torch
from batches import text_batches
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import convert, distance, run, tiny, tiny_inputs, tiny_model
from transformers import AutoModel

from moefy_hf import load, permute_adapter_
from moefy_hf.analysis.pruning import prune
from moefy_hf.cli.main import main
from moefy_hf.conversion.adapters import permute_adapter
from moefy_hf.modeling.ffn_sites import find_sites

FFN = {
    "bert": ["intermediate.dense", "output.dense"],
    "gpt2": ["c_fc", "c_proj"],  # Conv1D
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "phi3": ["gate_up_proj", "down_proj"],  # fused
    "t5-gated": ["wi_0", "wi_1", "wo"],
}
NOISE = 0.3
KINDS = {
    "lora": lambda targets: LoraConfig(r=4, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=4, target_modules=targets, use_dora=True),
    "lora with biases": lambda targets: LoraConfig(r=4, target_modules=targets, bias="all", lora_bias=True),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[targets[-1]]),
    "loha": lambda targets: LoHaConfig(r=4, target_modules=targets),
}
INPUTS = {  # adapters that change what the Linear inside reads, or never call it
    "oft": peft.OFTConfig(target_modules=FFN["llama"], oft_block_size=8, r=0),
    "boft": peft.BOFTConfig(target_modules=["gate_proj"], boft_block_size=4),
    "ia3": IA3Config(target_modules=["gate_proj"], feedforward_modules=["gate_proj"]),
    "hra": peft.HRAConfig(target_modules=FFN["llama"], r=4),
    "shira": peft.ShiraConfig(target_modules=FFN["llama"], r=2),
}


def trained(model, config) -> PeftModel:
    """With an adapter that does something."""
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * NOISE)
    return adapted


@pytest.fixture
def saved(tmp_path):
    """A dense and a MoEfied model, all of its experts selected, and an adapter of the dense one with what it gives."""

    def make(name: str, kind: str, targets: list[str] | None = None):
        dense, inputs = tiny_model(name), tiny_inputs(name)
        dense.save_pretrained(tmp_path / "dense")
        before = run(dense, inputs)
        dense.name_or_path = str(tmp_path / "dense")
        adapted = trained(dense, KINDS[kind](targets or FFN[name]))
        adapted.save_pretrained(tmp_path / "adapter")
        want = run(adapted, inputs)
        assert distance(want, before) > 1e-2
        model = tiny_model(name)
        convert(model, k=1.0)
        model.save_pretrained(tmp_path / "moefied")
        return inputs, want, tmp_path

    return make


def put_on(folder, adapter="adapter") -> PeftModel:
    return PeftModel.from_pretrained(load(folder / "moefied"), folder / adapter).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FFN)
def test_an_adapter_of_the_dense_model_fits_once_it_is_permuted(name, kind, saved, recwarn):
    if name == "gpt2" and kind == "loha" or name in ("gpt2", "t5-gated") and kind == "lora with biases":
        pytest.skip("peft has no LoHa for Conv1D, and no lora_bias for it or for a Linear without a bias")
    inputs, want, folder = saved(name, kind)
    model = put_on(folder)
    assert distance(run(model, inputs), want) > 1e-3  # as it came, it is wrong
    (warning,) = [each for each in recwarn if "permute_adapter_" in str(each.message)]
    assert "'default' was trained on" in str(warning.message)
    recwarn.clear()
    permute_adapter_(model)
    assert distance(run(model, inputs), want) < 1e-4
    model.save_pretrained(folder / "fits")
    assert distance(run(put_on(folder, "fits"), inputs), want) < 1e-4
    assert not [each for each in recwarn if "permute_adapter_" in str(each.message)]
    with pytest.raises(ValueError, match="permuted for, .*moefied', a MoEfied model: it fits as it is"):
        permute_adapter_(model)
    with pytest.raises(ValueError, match="it fits as it is"):
        permute_adapter(folder / "fits", load(folder / "moefied"), folder / "twice")


def test_an_adapter_of_attention_alone_fits_as_it_is(saved, recwarn):
    inputs, want, folder = saved("llama", "lora", ["q_proj", "v_proj"])
    model = put_on(folder)
    assert distance(run(model, inputs), want) < 1e-4 and not [
        each for each in recwarn if "permut" in str(each.message)
    ]
    permute_adapter_(model)
    assert distance(run(model, inputs), want) < 1e-4


def test_an_adapter_of_the_moefied_model_is_not_warned_of(tmp_path, recwarn):
    model = tiny_model("llama")
    convert(model, k=2)
    model.save_pretrained(tmp_path / "moefied")
    adapted = trained(load(tmp_path / "moefied"), KINDS["lora"](FFN["llama"]))
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs("llama")
    assert distance(run(put_on(tmp_path), inputs), run(adapted, inputs)) < 1e-6
    assert not [each for each in recwarn if "permut" in str(each.message)]


def test_a_model_that_was_converted_in_this_process_is_not_its_dense_self(saved, recwarn):
    """It has the dense model's name but for a mark, by which adapters know what they were trained on."""
    inputs, want, folder = saved("llama", "lora")
    model = AutoModel.from_pretrained(folder / "dense").eval()
    convert(model, k=1.0)
    wrong = PeftModel.from_pretrained(copy.deepcopy(model), folder / "adapter").eval()
    assert distance(run(wrong, inputs), want) > 1e-3
    assert [each for each in recwarn if "permute_adapter_" in str(each.message)]
    recwarn.clear()
    own = trained(model, KINDS["lora"](FFN["llama"]))
    own.save_pretrained(folder / "own")
    own.get_base_model()
    convert(again := AutoModel.from_pretrained(folder / "dense").eval(), k=1.0)
    again.save_pretrained(folder / "moefied")
    loaded = put_on(folder, "own")
    assert distance(run(loaded, inputs), run(own, inputs)) < 1e-5
    assert not [each for each in recwarn if "permute_adapter_" in str(each.message)]
    with pytest.raises(ValueError, match="MoEfied in memory.*it fits as it is"):
        permute_adapter_(loaded)


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_an_adapter_that_never_ran():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    convert(model, k=2)
    adapted = trained(model, KINDS["lora"](FFN["llama"]))
    compiled = torch.compile(copy.deepcopy(adapted), fullgraph=True, backend="eager")
    assert distance(run(compiled, inputs), run(adapted, inputs)) < 1e-5


def test_on_the_command_line(saved, capsys):
    inputs, want, folder = saved("llama", "lora")
    (folder / "adapter" / "notes.txt").write_text("mine")
    command = ["permute-adapter", *(str(folder / name) for name in ("moefied", "adapter", "fits"))]
    main(command)
    assert str(folder / "fits") in capsys.readouterr().out
    assert distance(run(put_on(folder, "fits"), inputs), want) < 1e-4
    assert (folder / "fits" / "notes.txt").read_text() == "mine"
    config = json.loads((folder / "fits" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "moefied")
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "exists: choose another OUTPUT" in capsys.readouterr().err


def test_what_cannot_be_permuted_is_refused(tmp_path):
    model = tiny_model("llama")
    convert(model, k=2)
    with pytest.raises(ValueError, match="no adapter 'default'; it has: none that PeftModel has loaded"):
        permute_adapter_(model)
    adapted = trained(model, INPUTS["oft"])
    adapted.peft_config["default"].base_model_name_or_path = "dense"
    before = {name: each.clone() for name, each in adapted.state_dict().items()}
    with pytest.raises(ValueError, match="oft_R.* mixes neurons.*merge this adapter into the dense model"):
        permute_adapter_(adapted)
    assert all(torch.equal(each, before[name]) for name, each in adapted.state_dict().items())
    with pytest.raises(ValueError, match="no adapter 'other'; it has: default"):
        permute_adapter_(adapted, "other")
    dense = get_peft_model(tiny_model("llama"), KINDS["lora"](FFN["llama"]))
    with pytest.raises(ValueError, match="is not MoEfied"):
        permute_adapter_(dense)


def test_a_checkpoint_that_does_not_know_its_order_says_so(saved):
    _, _, folder = saved("llama", "lora")
    model = load(folder / "moefied")
    for site in model.moe_sites():
        site.act.neuron_order = None
    with pytest.raises(ValueError, match="does not know the order of neurons"):
        permute_adapter(folder / "adapter", model, folder / "fits")
    assert not (folder / "fits").exists()


@pytest.mark.parametrize("name", ["bert", "llama", "phi3"])
def test_the_order_is_that_of_the_dense_neurons(name, tmp_path):
    """Also after it was saved, split again, and pruned."""
    dense = tiny_model(name)
    model = tiny_model(name)
    convert(model, k=2, router="linear", splitter="parameter_clustering", calibration=text_batches(20))
    width = model.moe_sites()[0].sizes[1]
    pruned = prune(model, {layer: [1] for layer in range(tiny(name).ffns)})
    model.save_pretrained(tmp_path)
    for each in (model, load(tmp_path), pruned):
        for site, before in zip(each.moe_sites(), find_sites(dense), strict=True):
            order = site.act.neuron_order.long()
            assert not torch.equal(order, torch.arange(len(order)))
            assert len(order.unique()) == len(order) == site.sizes[1] <= width
            assert torch.equal(site.weights().up, before.weights().up[order])
            assert torch.equal(site.weights().down, before.weights().down[:, order])


@pytest.mark.parametrize("kind", INPUTS)
def test_routers_read_what_the_ffn_reads_whatever_its_linear_does(kind):
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    convert(model, k=2)
    without = run(model, inputs)
    adapted = trained(model, INPUTS[kind])
    seen, expected = [], []
    for site in model.moe_sites():
        site.owner.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
        site.act.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with_adapter = run(adapted, inputs)
    assert distance(with_adapter, without) > 1e-3
    assert len(seen) == len(expected) == 2 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    merged = adapted.merge_and_unload()
    assert distance(run(merged, inputs), with_adapter) < 1e-4


def test_merged_adapters_are_what_is_saved(tmp_path):
    model = tiny_model("llama")
    convert(model, k=2)
    merged = trained(model, KINDS["lora"](FFN["llama"])).merge_and_unload()
    merged.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert not [name for name in names if "lora" in name] and sum("neuron_order" in name for name in names) == 2
