"""`moefy_`: in place and exact, settings and data checked before anything is changed, reproducible."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from batches import real_count, text_batches
from tiny import TINY, distance, run, tiny_inputs, tiny_model
from torch import nn

from moefy_hf import MoEficationConfig, moefy_, profile
from moefy_hf.conversion import pipeline
from moefy_hf.loading import moefied_class
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.moefied import MoefiedMixin
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.splitters import SPLITTERS, Splitter

SIZE, EXPERTS, FREE = 8, 6, {"splitter": "random", "router": "random"}
KEYS = {
    "bert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "t5-gated": "AutoModelForSeq2SeqLM",
}
KEYS |= dict.fromkeys(["opt", "llama", "gpt2"], "AutoModelForCausalLM")
LABELS = {"AutoModelForSequenceClassification": "class", "AutoModelForSeq2SeqLM": "seq2seq"}


def build(name: str = "bert"):
    model = tiny_model(name, KEYS[name])
    if name == "bert":  # or the first forward pass would write it into the config
        model.config.problem_type = "single_label_classification"
    return model


def data(name: str = "bert", count: int = 6, **kwargs) -> list[dict]:
    return text_batches(count, labels=LABELS.get(KEYS[name], "causal"), classes=2, **kwargs)


def settings(k=0.5, allocation=None, **changes) -> MoEficationConfig:
    selection = {"type": "top_k", "k": k, **({"allocation": allocation} if allocation else {})}
    return MoEficationConfig(**{"expert_size": SIZE, "splitter": "random", "selection": selection, **changes})


def state_of(model: nn.Module) -> dict:
    """Everything a failed conversion could have touched."""
    return {
        "class": type(model),
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "addresses": {name: p.data_ptr() for name, p in model.named_parameters()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def assert_untouched(model: nn.Module, before: dict, weights: dict[str, torch.Tensor]) -> None:
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", KEYS)
def test_same_object_same_parameters_same_function(name):
    model, inputs = build(name), tiny_inputs(name, KEYS[name])
    address, stock, parameters = id(model), type(model), dict(model.named_parameters())
    weights, dense = copy.deepcopy(model.state_dict()), run(model, inputs)
    report = moefy_(model, settings(), data(name), progress=False)
    assert id(model) == address and type(model) is moefied_class(stock) and isinstance(model, stock)
    after = dict(model.named_parameters())
    assert {key for key in after if ".router." not in key} == set(parameters)
    for key, parameter in parameters.items():  # the very same Parameters, in place
        assert after[key] is parameter and parameter.requires_grad
        assert parameter.shape == weights[key].shape
        assert torch.equal(parameter.flatten().sort().values, weights[key].flatten().sort().values)
    owned = {f"{site.name}.{key}" for site in find_sites(model) for key, *_ in site.neuron_dims()}
    assert {key for key in parameters if not torch.equal(parameters[key], weights[key])} == owned
    model.set_selection(k=1.0)
    assert distance(run(model, inputs), dense) < 1e-5
    model.set_selection(k=1, allocation="uniform")
    assert distance(run(model, inputs), dense) > 1e-3  # routing does something
    assert len(report.fits) == len(model.moe_sites())


def test_report(monkeypatch):
    model, batches = build(), data()
    report = moefy_(model, settings(k=0.5, allocation="uniform"), batches, progress=False)
    with profile(build(), batches, progress=False) as found:
        assert report.sparsity == pytest.approx([stats.sparsity for stats in found.sites])
    assert report.experts == [EXPERTS] * 2 and report.expert_sizes == [SIZE] * 2 and report.k == [3, 3]
    assert report.calibration_tokens == real_count(batches)
    assert {"profile", "split", "routers"} <= set(report.seconds) and all(s >= 0 for s in report.seconds.values())
    assert [fit.name for fit in report.fits] == [site.name for site in model.moe_sites()]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_table_of_the_report():
    report = moefy_(build(), settings(k=[1, 2]), data(), progress=False)
    head, rule, *lines = report.table().splitlines()
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    for position, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [str(position), "6 of 8", str(position + 1), f"{report.sparsity[position]:.1%}"]
        assert cells[4] == f"{report.fits[position].captured:.1%}" and cells[6] == "16.7%"
    head, rule, *lines = moefy_(build(), settings(router="random")).table().splitlines()
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1 and len(lines) == 2


def test_a_model_without_head_gets_uniform_budgets():
    model = tiny_model("bert")
    assert moefy_(model, settings(), text_batches(6), progress=False).k == [3, 3]
    assert model.config.moefication["selection"]["allocation"] == "uniform"


def test_without_calibration_the_report_says_so():
    model = build()
    report = moefy_(model, settings(router="random"))
    assert (report.calibration_tokens, report.sparsity, report.fits) == (0, [], [])
    assert report.k == [3, 3]


def test_config_is_the_travelling_section():
    model = build()
    config = settings(k=0.5, allocation="uniform", router="random", seed=5)
    moefy_(model, config)
    bert = {"modules": "encoder.layer.*", "up": "intermediate.dense", "down": "output.dense"}
    ffns = [{**bert, "act": "intermediate.intermediate_act_fn"}]
    assert model.config.moefication == {**config.section(), "neuron_order": True, "ffns": ffns}
    assert config == settings(k=0.5, allocation="uniform", router="random", seed=5)  # ours to change, not theirs
    assert "AutoModelForSequenceClassification" in model.config.auto_map


@pytest.mark.parametrize(("splitter", "router"), [("random", "random"), ("parameter_clustering", "similarity")])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_some_methods_need_no_data(name, splitter, router):
    model, inputs = build(name), tiny_inputs(name)
    dense = run(model, inputs)
    moefy_(model, settings(splitter=splitter, router=router))
    assert model.config.moefication["selection"]["allocation"] == "uniform"
    model.set_selection(k=EXPERTS)
    assert distance(run(model, inputs), dense) < 1e-5


@pytest.mark.parametrize("splitter", SPLITTERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_method_with_data(splitter, router):
    model, inputs = build(), tiny_inputs("bert")
    dense = run(model, inputs)
    report = moefy_(model, settings(splitter=splitter, router=router), data(), progress=False)
    assert all(0 <= fit.captured <= fit.oracle <= 1 for fit in report.fits)
    assert sum(report.k) == 6 and all(1 <= k <= EXPERTS for k in report.k)  # half of 2 x 6, spread by sensitivity
    assert model.config.moefication["selection"]["allocation"] == "sensitivity"
    model.set_selection(k=1.0)
    assert distance(run(model, inputs), dense) < 1e-5


def test_data_that_can_be_read_only_once():
    a, b = build(), build()
    reports = [
        moefy_(a, settings(), data(), progress=False),
        moefy_(b, settings(), (batch for batch in data()), progress=False),
    ]
    assert reports[0].k == reports[1].k and reports[0].fits == reports[1].fits
    assert all(torch.equal(value, a.state_dict()[key]) for key, value in b.state_dict().items())


def test_a_profile_serves_several_conversions():
    direct, shared, again = build(), build(), build()
    report = moefy_(direct, settings(splitter="coactivation"), data(), progress=False)
    with profile(shared, data(), progress=False) as found:
        reports = [
            moefy_(model, settings(splitter="coactivation"), found, progress=False) for model in (shared, again)
        ]
        assert found.sites[0].inputs is not None  # still open: it is the caller's
    for other, model in zip(reports, (shared, again), strict=True):
        assert other.fits == report.fits and other.k == report.k
        assert all(torch.equal(value, direct.state_dict()[key]) for key, value in model.state_dict().items())


def test_reproducible_under_the_seed():
    states = []
    for seed in (0, 0, 1):
        model = build()
        torch.rand(seed)  # the global generator plays no part
        moefy_(model, settings(splitter="coactivation", seed=seed), data(), progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items() if ".router." in key)


def test_layers_are_split_differently():
    """One seed must not give each layer the same random split."""
    model = build()
    old = [site.up.weight.detach().clone() for site in find_sites(model)]
    moefy_(model, settings(router="random"))
    orders = [
        torch.cdist(site.up.weight.detach(), weight).argmin(1)
        for site, weight in zip(model.moe_sites(), old, strict=True)
    ]
    assert not torch.equal(*orders)


def test_only_some_layers():
    model, dense = build(), build()
    report = moefy_(model, settings(layers=[1], **FREE | {"router": "linear"}), data(), progress=False)
    assert report.experts == [EXPERTS] and len(report.fits) == len(report.k) == 1
    assert [site.name for site in model.moe_sites()] == [find_sites(model)[1].name]
    for key, value in dense.bert.encoder.layer[0].state_dict().items():
        assert torch.equal(value, model.bert.encoder.layer[0].state_dict()[key])


def test_layers_of_different_width():
    model = tiny_model("bart-uneven", "AutoModelForSeq2SeqLM")  # 32 in the encoder, 64 in the decoder
    inputs = tiny_inputs("bart-uneven", "AutoModelForSeq2SeqLM")
    dense = run(model, inputs)
    report = moefy_(model, settings(), text_batches(8, labels="seq2seq"), progress=False)
    assert (report.experts, report.expert_sizes) == ([4, 4, 8, 8], [8] * 4)
    assert sum(report.k) == 12
    model.set_selection(k=1.0)
    assert distance(run(model, inputs), dense) < 1e-5
    model = tiny_model("bart-uneven", "AutoModelForSeq2SeqLM")
    report = moefy_(model, settings(num_experts=4, router="random"))
    assert (report.experts, report.expert_sizes) == ([4] * 4, [8, 8, 16, 16])


def test_one_k_per_layer():
    model = build()
    assert moefy_(model, settings(k=[1, 0.5]), data(), progress=False).k == [1, 3]
    assert model.config.moefication["selection"]["allocation"] == "uniform"


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_stays(training):
    model = build().train(training)
    moefy_(model, settings(), data(), progress=False)
    assert all(module.training is training for module in model.modules())
    model = build().train(training)
    moefy_(model, settings(router="random"))
    assert all(module.training is training for module in model.modules())


def test_routers_stay_float32_and_frozen():
    model = build().to(torch.bfloat16)
    moefy_(model, settings(), data(), progress=False)
    for key, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in key else torch.bfloat16)
        assert parameter.requires_grad is (".router." not in key)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_routers_start_at_their_experts(name, monkeypatch):
    """Centres of the rows as permuted (gate rows where there is a gate); the MLP's second matrix is the identity."""
    monkeypatch.setattr(pipeline, "fit_routers_", lambda *args, **kwargs: [])
    for router, weight in (("linear", "weight"), ("mlp", "proj_in"), ("similarity", "centres")):
        model = build(name)
        moefy_(model, settings(router=router, allocation="uniform"), data(name), progress=False)
        for site in model.moe_sites():
            rows = (site.gate if name == "llama" else site.up).weight
            for expert in range(EXPERTS):
                centre = F.normalize(rows[expert * SIZE : (expert + 1) * SIZE], dim=-1).mean(0)
                if router == "similarity":
                    centre = centre / centre.norm()
                torch.testing.assert_close(getattr(site.act.router, weight)[expert], centre.detach())
            if router == "mlp":
                assert torch.equal(site.act.router.proj_out, torch.eye(EXPERTS))


def test_default_settings_are_used_without_any():
    model = tiny_model("bert", KEYS["bert"], intermediate_size=128)
    report = moefy_(model, calibration=data(count=10), progress=False)
    assert report.experts == [4, 4] and sum(report.k) == 2
    assert model.config.moefication["splitter"] == "coactivation"


# ---- what is refused, and that nothing was changed


def meta_part():
    model = build()
    model.bert.encoder.layer[1].output.dense.to("meta")
    return model


def quantised_part():
    class Packed(nn.Parameter):
        pass

    model = build()
    model.bert.encoder.layer[0].intermediate.dense.weight = Packed(torch.zeros(48, 16))
    return model


def with_parameters():
    model = build()
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.PReLU()
    return model


def xielu():
    config = {"intermediate_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.ApertusForCausalLM(
        transformers.ApertusConfig(vocab_size=99, pad_token_id=0, num_key_value_heads=1, **config)
    )


def already_moefied():
    model = build()
    moefy_(model, settings(**FREE))
    return model


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )


def mamba():
    config = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**config))


def segformer():
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "decoder_hidden_size": 16}
    sizes |= {"patch_sizes": [3, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [3, 3]}
    return transformers.SegformerModel(transformers.SegformerConfig(num_encoder_blocks=2, **sizes))


REFUSED = {  # what: (model, settings, calibration, what the message says)
    "no FFN": (mamba, {}, data, r"no FFN of this MambaForCausalLM \(mamba\) can be split into experts"),
    "a convolution in the FFN": (segformer, {}, data, r"blocks.0.mlp: it has a convolution \(Conv2d\) in it"),
    "a Mixture of Experts": (mixtral, {}, data, "layers.0.mlp.*: it is part of a native Mixture of Experts"),
    "activation with parameters in an MLP": (xielu, {}, data, "mlp: its activation XIELUActivation has parameters"),
    "no such tower": (build, {"towers": "vision"}, data, "has no tower 'vision'.*choose from 'all'"),
    "MoEfied already": (already_moefied, {}, data, "MoEfied already"),
    "on the meta device": (meta_part, {}, data, "meta device"),
    "quantised": (quantised_part, {}, data, "Packed.*neither sharded, quantised"),
    "activation with parameters": (with_parameters, {}, data, "PReLU has parameters"),
    "expert size": (build, {"expert_size": 7}, data, r"48 neurons.*size 7.*6.*8"),
    "number of experts": (build, {"num_experts": 5}, data, r"48 neurons.*experts 5.*4.*6"),
    "more experts than neurons": (build, {"num_experts": 96}, data, "48 neurons.*96.*48"),
    "size zero": (build, {"expert_size": 0}, data, "48 neurons.*0.*1"),
    "k above E": (build, {"k": EXPERTS + 1}, data, "1 to 6"),
    "k above E in a list": (build, {"k": [1, 7]}, data, "1 to 6"),
    "k too many": (build, {"k": [1, 2, 3]}, data, "3 entries.*2"),
    "a setting out of range in a list": (
        build,
        {"selection": {"type": "threshold", "tau": [0.1, 5.0]}},
        data,
        "tau must be a number from 0 to 1, got 5.0",
    ),
    "settings too many": (build, {"selection": {"type": "top_p", "p": [0.1] * 3}}, data, "3 entries.*2"),
    "layers": (build, {"layers": [0, 2]}, data, "from 0 to 1"),
    "no data, coactivation": (build, {"splitter": "coactivation", "router": "random"}, None, "missing.*coactivation"),
    "no data, linear": (build, {}, None, "missing.*linear.*random.*parameter_clustering.*similarity"),
    "no data, mlp": (build, {"router": "mlp"}, None, "missing.*mlp"),
    "no data, sensitivity": (build, {"router": "random", "allocation": "sensitivity"}, None, "missing.*sensitivity"),
    "empty": (build, {}, lambda: [], "calibration is empty"),
    "empty, nothing to learn": (build, {"router": "random"}, lambda: [], "calibration is empty"),
    "small for a router": (build, {}, lambda: data(count=1, rows=1, length=31), r"\b31\b.*linear.*\b32\b"),
    "small for the graph": (
        build,
        {"splitter": "coactivation", "router": "random"},
        lambda: data(count=2, rows=1, length=23),
        r"\b46\b.*coactivation.*\b48\b",
    ),
    "no batch": (build, {}, lambda: [torch.ones(2, 3).long()], "mappings of tensors"),
    "token out of range": (build, {}, lambda: [{"input_ids": torch.tensor([[1000]])}], "token id 1000"),
    "batch on the meta device": (build, {}, lambda: [{"input_ids": torch.ones(2, 3).long().to("meta")}], "meta"),
    "a model without head": (
        lambda: tiny_model("bert"),
        {"allocation": "sensitivity"},
        text_batches,
        "no head.*uniform",
    ),
    "a model without logits": (
        lambda: tiny_model("bert", "AutoModelForPreTraining"),
        {},
        text_batches,
        "no logits.*uniform",
    ),
    "nothing labelled": (
        lambda: build("llama"),
        {},
        lambda: [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in data("llama")],
        "labels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(case):
    make, changes, calibration, message = REFUSED[case]
    model, config = make(), settings(**changes)
    if case != "on the meta device":
        weights = copy.deepcopy(model.state_dict())
    before = state_of(model)
    with pytest.raises((ValueError, TypeError, IndexError, NotImplementedError)) as error:
        moefy_(model, config, calibration and calibration(), progress=False)
    assert re.search(message, str(error.value)), str(error.value)
    if case == "on the meta device":
        assert state_of(model) == before
    else:
        assert_untouched(model, before, weights)


@pytest.mark.parametrize("router", [name for name, router in ROUTERS.items() if not router.trainable])
def test_little_data_is_enough_where_nothing_is_learnt(router):
    model = build()
    report = moefy_(model, settings(router=router), data(count=1, rows=1, length=3), progress=False)
    assert report.calibration_tokens == 3 and len(report.fits) == 2


def test_a_splitter_that_fails_leaves_the_model_alone(monkeypatch):
    def half(weights, stats, experts, generator, warm):
        return torch.zeros(48, dtype=torch.long)

    model = build()
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    monkeypatch.setitem(SPLITTERS, "half", Splitter(half, needs_profile=False))
    with pytest.raises(ValueError, match="permutation"):
        moefy_(model, settings(splitter="half", router="random"))
    assert_untouched(model, before, weights)


@pytest.mark.parametrize("how", ["other layers", "no sample", "closed", "other width"])
def test_a_profile_that_does_not_fit_is_refused(how):
    source = tiny_model("bert", KEYS["bert"], **({"intermediate_size": 64} if how == "other width" else {}))
    found = profile(
        source, data(), layers=[1] if how == "other layers" else None, sample=how != "no sample", progress=False
    )
    if how == "closed":
        found.close()
    model = build()
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="profile|calibration"):
        moefy_(model, settings(), found, progress=False)
    assert_untouched(model, before, weights)
    found.close()


def test_one_expert_is_the_dense_model():
    model, inputs = build(), tiny_inputs("bert")
    dense = run(model, inputs)
    moefy_(model, settings(k=1, num_experts=1), data(), progress=False)
    assert distance(run(model, inputs), dense) < 1e-5


def test_a_head_of_the_user_has_a_moefied_version():
    class Custom(transformers.BertModel):
        pass

    assert moefied_class(Custom).stock_class() is Custom and issubclass(moefied_class(Custom), MoefiedMixin)


def test_architectures_that_nobody_described_have_moefied_classes():
    assert moefied_class(transformers.AlbertModel).stock_class() is transformers.AlbertModel


def test_a_layer_that_no_split_can_follow_stays_as_it_is():
    model = build()
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.PReLU()
    before = copy.deepcopy(model.bert.encoder.layer[0].state_dict())
    report = moefy_(model, settings(**FREE))
    assert report.experts == [EXPERTS] and [site.name for site in model.moe_sites()] == ["bert.encoder.layer.1"]
    assert all(torch.equal(value, before[key]) for key, value in model.bert.encoder.layer[0].state_dict().items())


def test_layers_that_share_one_ffn_share_its_experts():
    torch.manual_seed(0)
    config = {"vocab_size": 99, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 48}
    config = transformers.AlbertConfig(**config, num_hidden_layers=3, num_attention_heads=2)
    model, inputs = transformers.AlbertForSequenceClassification(config).eval(), tiny_inputs("bert")
    dense = run(model, inputs)
    assert moefy_(model, settings(k=1.0, **FREE)).experts == [EXPERTS]
    assert distance(run(model, inputs), dense) < 1e-5
    model.set_selection(k=1)
    assert distance(run(model, inputs), dense) > 1e-4


@pytest.mark.parametrize(("towers", "widths"), [(None, [48, 48]), ("vision", [32, 32]), ("all", [48, 48, 32, 32])])
def test_the_text_tower_is_converted_unless_others_are_asked_for(towers, widths):
    model, inputs = tiny_model("clip"), tiny_inputs("clip")
    dense, before = run(model, inputs), copy.deepcopy(model.state_dict())
    report = moefy_(model, settings(k=1.0, towers=towers, **FREE))
    assert report.experts == [width // SIZE for width in widths]
    assert [site.sizes[1] for site in model.moe_sites()] == widths
    assert distance(run(model, inputs), dense) < 1e-5
    others = {"text": "vision_model.", "vision": "text_model."}.get(towers or "text", "visual_projection.")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items() if key.startswith(others))


def test_every_moefied_class_is_found_by_its_stock_class():
    for stock in (
        transformers.BertForMaskedLM,
        transformers.LlamaForCausalLM,
        transformers.T5ForConditionalGeneration,
    ):
        assert issubclass(moefied_class(stock), (MoefiedMixin, stock))


def test_autocast_does_not_remember_the_old_order():
    model, batch = build(), data(count=1)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(model, batch)  # autocast keeps copies of the weights from here on
        moefy_(model, settings(k=0.5, router="similarity"), progress=False)
        within = run(model, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert distance(within, run(model, batch)) == 0


@pytest.mark.parametrize("splitter", SPLITTERS)
def test_half_precision_around_a_conversion_changes_neither_split_nor_router(splitter):
    plain, mixed = build(), build()
    with profile(plain, data(), progress=False) as found:
        config = settings(allocation="uniform", splitter=splitter, router="linear")
        moefy_(plain, config, found, progress=False)
        with torch.autocast("cpu", torch.bfloat16):
            moefy_(mixed, config, found, progress=False)
    assert all(torch.equal(value, mixed.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_model_for_generation_has_predictions_to_be_sensitive_in():
    model = build("t5")
    moefy_(model, settings(k=0.5, allocation="sensitivity", router="similarity"), data("t5"), progress=False)
    assert model.config.moefication["selection"]["allocation"] == "sensitivity"
    assert any(loss > 0 for layer in model.config.moefication["sensitivity"]["loss"] for loss in layer)


def test_conversion_works_where_gradients_are_off():
    model = build()
    with torch.no_grad():
        report = moefy_(model, settings(router="linear", allocation="uniform"), data(), progress=False)
    assert any(fit.best_epoch > 0 for fit in report.fits)


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_recorded_as_before(name):
    model, inputs = tiny_model(name).eval(), tiny_inputs(name)
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True, output_attentions=False)
        moefy_(model, MoEficationConfig(expert_size=SIZE, **FREE, selection={"type": "top_k", "k": 1.0}))
        after = model(**inputs, output_hidden_states=True, output_attentions=False)
    assert before.keys() == after.keys()
    for key in before:
        if "hidden_states" in key:
            assert len(before[key]) == len(after[key]) and all(
                torch.allclose(old, new, atol=1e-5) for old, new in zip(before[key], after[key], strict=True)
            )
