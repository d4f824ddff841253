"""One router for all layers of a stack: its scores are those of the first FFN's input, in every way a model can run,
and whatever would be scores of something else raises."""

import copy
import io
import threading

import peft
import pytest
import torch
import transformers
from batches import text_batches
from tiny import NAMES, distance, run, tensors, tiny, tiny_inputs, tiny_model
from torch import nn

from moefy_hf import MoEficationConfig, calibrate_thresholds_, moefy_, profile, reroute_
from moefy_hf.conversion.pipeline import install_routers_
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.routed_activation import RoutedActivation
from moefy_hf.modeling.router_pre_gated import PreGatedRouter
from moefy_hf.runtime.triton_kernel import selected_experts

SIZE = 8
BATCHES = text_batches(20, rows=8, length=16)


def pre_gated(name: str, head: str = "AutoModel", k=2, **changes):
    """Not fitted: routers as they begin, and experts that lie as the neurons do."""
    model = tiny_model(name, head, **changes)
    install_routers_(model, MoEficationConfig(expert_size=SIZE, router="pre_gated", towers="all").section())
    model.set_selection(type="top_k", k=k, allocation="uniform")
    return model


def stacks(name: str, sites: list) -> list[list]:
    """Tiny models have one stack, or two of equally many FFNs."""
    half = len(sites) // 2
    return [sites[:half], sites[half:]] if tiny(name).ffns == 4 else [sites]


def masked_by_hand(name: str, model, dense, inputs, k: int) -> list[torch.Tensor]:
    """The stock model with the neurons zeroed that are not of the k best experts by W x of each stack's first FFN."""
    handles, best = [], {}
    pairs = zip(stacks(name, model.moe_sites()), stacks(name, find_sites(dense, "all")), strict=True)
    for number, (ours, stock) in enumerate(pairs):
        weight = ours[0].act.router.weight

        def choose(_, args, number=number, weight=weight):
            best[number] = (args[0] @ weight.T).topk(k, dim=-1).indices

        def mask(_, args, number=number):
            keep = torch.zeros(*args[0].shape[:-1], args[0].shape[-1] // SIZE, dtype=torch.bool)
            return args[0] * keep.scatter(-1, best[number], True).repeat_interleave(SIZE, -1)

        handles.append(stock[0].first.register_forward_pre_hook(choose))
        handles += [site.down.register_forward_pre_hook(mask) for site in stock]
    try:
        return run(dense, inputs)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bert-sigmoid"])  # zero is not act(0) there
def test_all_layers_run_the_experts_of_the_first(name):
    torch.manual_seed(0)
    dense, inputs = tiny_model(name), tiny_inputs(name)
    torch.manual_seed(0)
    model = pre_gated(name)
    expected = masked_by_hand(name, model, dense, inputs, k=2)
    assert distance(run(model, inputs), expected) < 1e-5
    for first, *later in stacks(name, model.moe_sites()):
        assert first.act.router.weight.shape == (first.act.num_experts, first.sizes[0])
        assert later and not any(list(site.act.router.parameters()) for site in later)
        assert all(site.act.router.leader is first.act.router for site in (first, *later))
        assert first.act.router.handed.now is None  # nothing outlives the call


@pytest.mark.parametrize("budgets", [[6, 2], [2, 6], [6, 6], [3, 3]])
def test_scores_are_computed_once_or_not_at_all(budgets, monkeypatch):
    calls, score = [], PreGatedRouter.score
    monkeypatch.setattr(PreGatedRouter, "score", lambda self, x: calls.append(1) or score(self, x))
    model, inputs = pre_gated("bert", k=budgets), tiny_inputs("bert")
    scores = {}
    for position, site in enumerate(model.moe_sites()):
        site.act.router.register_forward_hook(lambda _, args, y, i=position: scores.__setitem__(i, y))
    run(model, inputs)
    assert len(calls) == (budgets != [6, 6])
    if budgets == [3, 3]:
        assert torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("implementation", ["torch", "cpu"])
@pytest.mark.parametrize("selection", [{"k": 2}, {"k": [6, 2, 3]}, {"type": "threshold", "tau": [0.5, 0.3, 0.6]}])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_implementations(name, selection, implementation):
    model = pre_gated(name, num_hidden_layers=3)
    model.set_selection(**{"type": "top_k"} | selection)
    inputs = tiny_inputs(name)
    one = {key: value[:1, :1] for key, value in inputs.items()}  # "torch" runs few tokens only
    expected = run(model, inputs), run(model, one)
    model.set_moe_implementation(implementation)
    assert distance(run(model, inputs), expected[0]) < 1e-5
    assert distance(run(model, one), expected[1]) < 1e-5


@pytest.mark.parametrize("budgets", [[2, 2, 2], [6, 2, 2]])
def test_experts_as_triton_takes_them(budgets, monkeypatch):
    calls, score = [], PreGatedRouter.score
    monkeypatch.setattr(PreGatedRouter, "score", lambda self, x: calls.append(1) or score(self, x))

    def keep(act, x):
        index = selected_experts(act, x).long()
        return torch.zeros(*x.shape[:-1], 6, dtype=torch.bool).scatter(-1, index, True)

    model, inputs = pre_gated("llama", k=budgets, num_hidden_layers=3), tiny_inputs("llama")
    expected = run(model, inputs)
    monkeypatch.setattr(RoutedActivation, "keep", keep)
    model.set_moe_implementation("cpu")
    assert distance(run(model, inputs), expected) < 1e-5 and len(calls) == 2


@torch.no_grad()
def continued(model, ids: torch.Tensor, steps: int, **inputs) -> torch.Tensor:
    """Greedy, without a cache."""
    for _ in range(steps):
        given = {"input_ids": ids} | inputs if not inputs else {"decoder_input_ids": ids} | inputs
        ids = torch.cat([ids, model(**given, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("implementation", ["masked", "cpu"])
@pytest.mark.parametrize(("name", "head"), [("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM")])
def test_generate_with_a_cache(name, head, implementation):
    model = pre_gated(name, head)
    model.set_moe_implementation(implementation)
    ids = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, **options)
    if name == "llama":
        assert torch.equal(found, continued(model, ids, 6))
    else:
        start = torch.zeros(2, 1, dtype=torch.long)
        assert torch.equal(found, continued(model, start, 6, input_ids=ids))
    assert all(site.act.router.leader.handed.now is None for site in model.moe_sites())


@pytest.mark.parametrize("implementation", ["masked", "cpu"])
def test_threads_share_a_model(implementation):
    model = pre_gated("bert")
    model.set_moe_implementation(implementation)
    batches = [tiny_inputs("bert", seed=seed) for seed in range(8)]
    expected, wrong = [run(model, each) for each in batches], []

    def work(position: int) -> None:
        for _ in range(20):
            if distance(run(model, batches[position]), expected[position]) > 1e-6:
                wrong.append(position)

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name, reentrant, when):
    """Two batches of one shape run before either is differentiated: layers must not see the other's scores again."""
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = tiny_model(name, num_hidden_layers=3) if name in ("bert", "llama") else tiny_model(name)
        section = MoEficationConfig(expert_size=SIZE, router="pre_gated").section()
        for step in ("before", "convert", "after"):
            if step == "convert":
                install_routers_(model, section)
                model.set_selection(type="top_k", k=2, allocation="uniform")
            elif step == when and checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads() if reentrant else None
        model.train()
        calls = []
        model.moe_sites()[-1].first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = sum(model(**tiny_inputs(name, seed=seed))[0].square().mean() for seed in (1, 2))
        backward = threading.Thread(target=loss.backward)  # as on GPUs
        backward.start()
        backward.join()
        assert len(calls) == 2 + 2 * checkpointing  # recomputed
        losses.append(loss.item())
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert all(site.act.router.leader.handed.now is None for site in model.moe_sites())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and gradients[0].keys() == gradients[1].keys()
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in gradients[0].values())
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-5, atol=rounding, msg=key)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_that_carries_nothing_raises():
    model = pre_gated("bert", "AutoModelForSequenceClassification").train()
    model.bert.gradient_checkpointing_enable({"use_reentrant": False})  # of a stock part, which knows of no routers
    loss = model(**tiny_inputs("bert"))[0].sum()
    with pytest.raises(RuntimeError, match="no scores to return.*whole model"):
        loss.backward()


def test_an_interrupted_call_leaves_nothing_to_use():
    model, inputs = pre_gated("bert", num_hidden_layers=3), tiny_inputs("bert")
    other, expected = tiny_inputs("bert", seed=2), run(model, inputs)
    layers = model.encoder.layer

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, other)
    handle.remove()
    assert distance(run(model, inputs), expected) == 0
    assert model.moe_sites()[0].act.router.handed.now is None
    with pytest.raises(RuntimeError, match="no scores to return"):
        layers[1](torch.randn(2, 7, 16))


def test_what_runs_layers_otherwise_raises():
    inputs = tiny_inputs("bert")
    model = pre_gated("bert", chunk_size_feed_forward=1)
    with pytest.raises(RuntimeError, match="in chunks"):
        run(model, inputs)
    model = pre_gated("bert", num_hidden_layers=3)
    first, second, third = model.encoder.layer
    model.encoder.layer = nn.ModuleList([second, third])  # as if layer drop had skipped the first
    with pytest.raises(RuntimeError, match="layer drop"):
        run(model, inputs)
    model.encoder.layer = nn.ModuleList([first, third])
    run(model, inputs)
    model.encoder.layer = nn.ModuleList([first, third, second])
    with pytest.raises(RuntimeError, match="did not run before this one"):
        run(model, inputs)
    model.set_selection(k=1.0)
    run(model, inputs)  # nothing is asked for


def test_a_later_router_by_itself_raises():
    model = pre_gated("bert")
    first, second = (site.act.router for site in model.moe_sites())
    x = torch.randn(2, 7, 16)
    with pytest.raises(RuntimeError, match="router.leader"):
        second(x)
    assert torch.equal(second.leader(x), x @ first.weight.T)
    seen = []

    def ask(*_):  # of a layer that is not its own
        with pytest.raises(RuntimeError, match="router.leader"):
            second(x)
        seen.append(1)

    model.moe_sites()[0].down.register_forward_pre_hook(ask)
    run(model, tiny_inputs("bert"))
    assert seen


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_copies_are_independent(name, copied):
    model, inputs = pre_gated(name), tiny_inputs(name)
    expected = run(model, inputs)
    other = copied(model)
    assert distance(run(other, inputs), expected) == 0
    with torch.no_grad():
        for site, old in zip(other.moe_sites(), model.moe_sites(), strict=True):
            assert site.act.router.leader is not old.act.router.leader
            assert site.act.router.leader.handed is not old.act.router.leader.handed
            if site.act.router.weight is not None:
                site.act.router.weight.neg_()
    assert distance(run(other, inputs), expected) > 1e-3
    assert distance(run(model, inputs), expected) == 0
    assert all(site.act.router.leader.handed.now is None for site in other.moe_sites())


@pytest.mark.parametrize("trust", [True, False])
def test_saved_and_loaded(trust, tmp_path):
    model = tiny_model("llama")
    selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
    config = MoEficationConfig(expert_size=SIZE, router="pre_gated", selection=selection)
    moefy_(model, config, BATCHES, progress=False)
    model.save_pretrained(tmp_path)
    if trust:
        again = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(again).__module__.startswith("transformers_modules")
    else:
        again = type(model).from_pretrained(tmp_path)
    inputs = tiny_inputs("llama")
    assert distance(run(again.eval(), inputs), run(model, inputs)) == 0
    assert sum(".router." in key for key in again.state_dict()) == 1
    assert [site.act.router.position for site in again.moe_sites()] == [0, 1]
    calibrate_thresholds_(again, BATCHES, ["level"], progress=False)
    calibrate_thresholds_(model, BATCHES, ["level"], progress=False)
    assert again.config.moefication["reach"] == model.config.moefication["reach"]
    if trust:
        with profile(again, BATCHES, progress=False) as found, pytest.raises(ValueError, match="load"):
            reroute_(again, "pre_gated", found, progress=False)


def test_compiles_without_graph_breaks():
    """What is handed from layer to layer; other architectures' graphs are test_routed_activation's."""
    model = pre_gated("llama")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (1, 2):
            inputs = tiny_inputs("llama", seed=seed)
            assert distance(tensors(compiled(**inputs)), run(model, inputs)) < 1e-5
        for budgets in ([6, 2], [2, 6], 1.0):
            model.set_selection(k=budgets)
            assert distance(tensors(compiled(**inputs)), run(model, inputs)) < 1e-5


def test_adapters_leave_routing_alone():
    model, inputs = pre_gated("bert"), tiny_inputs("bert")
    expected = run(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["intermediate.dense", "output.dense"]))
    assert distance(run(adapted, inputs), expected) < 1e-6
    assert not any("router" in key for key, p in adapted.named_parameters() if p.requires_grad)
    assert distance(run(adapted.merge_and_unload(), inputs), expected) < 1e-5


def test_layers_that_are_left_dense():
    """The first of the routed ones leads."""
    model, inputs = tiny_model("bert", num_hidden_layers=4), tiny_inputs("bert")
    dense = copy.deepcopy(model)
    section = MoEficationConfig(expert_size=SIZE, router="pre_gated", layers=[1, 3]).section()
    install_routers_(model, section)
    model.set_selection(type="top_k", k=2, allocation="uniform")
    weight, stock = model.moe_sites()[0].act.router.weight, find_sites(dense)
    best = []
    stock[1].first.register_forward_pre_hook(lambda _, args: best.append((args[0] @ weight.T).topk(2).indices))

    def mask(_, args):
        keep = torch.zeros(*args[0].shape[:-1], 6, dtype=torch.bool).scatter(-1, best[-1], True)
        return args[0] * keep.repeat_interleave(SIZE, -1)

    for position in (1, 3):
        stock[position].down.register_forward_pre_hook(mask)
    assert distance(run(model, inputs), run(dense, inputs)) < 1e-5


def test_layers_of_different_numbers_of_experts_are_refused():
    model = tiny_model("bert")
    narrow = find_sites(model)[1]
    narrow.owner.intermediate.dense = nn.Linear(16, 32)
    narrow.owner.output.dense = nn.Linear(32, 16)
    config = MoEficationConfig(expert_size=SIZE, router="pre_gated")
    with pytest.raises(ValueError, match="all need the same number; got 6, 4"):
        moefy_(model, config, BATCHES, progress=False)
    assert type(model).__name__ == "BertModel"
    bart = pre_gated("bart-uneven")  # encoder and decoder may differ
    assert [site.act.num_experts for site in bart.moe_sites()] == [4, 4, 8, 8]


def test_without_data_it_is_refused():
    with pytest.raises(ValueError, match="router 'pre_gated' learns from it"):
        moefy_(tiny_model("bert"), MoEficationConfig(expert_size=SIZE, splitter="random", router="pre_gated"))
