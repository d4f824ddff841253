"""Models whose FFNs compute the selected experts alone give what they give masked."""

import copy
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from batches import text_batches
from moefy_ffn import BuildError, build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import NAMES, convert, distance, run, tiny_inputs, tiny_model, tiny_moefied
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx

from moefy_hf import MoEficationConfig, evaluate, moefy_, profile
from moefy_hf.modeling.router_base import Router
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.runtime import backends, cpu_kernel, sparse_ffn
from moefy_hf.runtime.backend_base import Backend
from moefy_hf.runtime.backends import BACKENDS
from moefy_hf.runtime.sparse_ffn import SparseFfn

CLASSIFIER = "AutoModelForSequenceClassification"
SIGMOID = "bert-sigmoid"  # an activation that no kernel has


def moefied(name: str):
    return tiny_moefied(name).requires_grad_(False)


def calls(monkeypatch) -> list[tuple]:
    """The shapes of what kernels compute from here on."""
    found = []
    for backend in BACKENDS.values():

        def counted(self, x, most, compute=backend.compute):
            if (y := compute(self, x, most)) is not None:
                found.append(tuple(x.shape))
            return y

        monkeypatch.setattr(backend, "compute", counted)
    return found


def scorings(monkeypatch) -> list[str]:
    """The routers that score in torch from here on."""
    found, original = [], Router.forward

    def counted(router, x):
        found.append(type(router).__name__)
        return original(router, x)

    monkeypatch.setattr(Router, "forward", counted)
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != SIGMOID])
def test_every_architecture_gives_the_same(name, monkeypatch):
    model, inputs = moefied(name), tiny_inputs(name)
    masked, before = run(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    found = calls(monkeypatch)
    model.set_moe_implementation("cpu")
    assert distance(run(model, inputs), masked) < 1e-5
    assert len(found) == len(model.moe_sites())  # every FFN, once
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    model.set_moe_implementation("masked")
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), masked, strict=True))
    assert all(value.is_contiguous() for value in model.state_dict().values())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3"])
def test_torch_does_a_few_tokens(name, monkeypatch):
    model, found = moefied(name), calls(monkeypatch)
    inputs = {"input_ids": tiny_inputs(name)["input_ids"][:1, :3]}
    masked = run(model, inputs)
    model.set_moe_implementation("torch")
    assert distance(run(model, inputs), masked) < 1e-5 and len(found) == 2
    run(model, tiny_inputs(name))  # 14 tokens
    assert len(found) == 2


@pytest.mark.parametrize("implementation", ["cpu", "torch"])
def test_no_tokens_give_no_tokens(implementation):
    model = moefied("gpt2")
    model.set_moe_implementation(implementation)
    site = model.moe_sites()[0]
    with torch.no_grad():
        assert site.owner(torch.zeros(1, 0, site.sizes[0])).shape == (1, 0, site.sizes[0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_interrupted_call_leaves_nothing_to_the_next(name):
    model, inputs = moefied(name), tiny_inputs(name)
    model.set_moe_implementation("cpu")
    sparse = run(model, inputs)
    site = model.moe_sites()[0]
    x = torch.randn(1, 1, site.sizes[0])
    with torch.no_grad():
        site.first(x)  # and nothing after it
    model.set_selection(k=1.0)
    everything = run(model, inputs)
    model.set_moe_implementation("masked")
    assert distance(everything, run(model, inputs)) < 1e-6 < distance(everything, sparse)


@pytest.mark.parametrize("router", ["random", "similarity", "mean_gate", "analytic"])
@pytest.mark.parametrize("budget", [1, 3, [1, 4]])
def test_routers_and_budgets(router, budget):
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    convert(model, budget, router=router, splitter="parameter_clustering")
    model.requires_grad_(False)
    masked = run(model, inputs)
    model.set_moe_implementation("cpu")
    assert distance(run(model, inputs), masked) < 1e-5
    model.set_selection(k=2)  # follows at once
    sparse = run(model, inputs)
    model.set_moe_implementation("masked")
    assert distance(run(model, inputs), sparse) < 1e-5


SELECTIONS = {"threshold": {"tau": 0.3}, "top_p": {"p": 0.5}, "level": {"level": 1.7}, "top_k": {"k": 3}}


def select(model, selection: str, router: str = "random") -> None:
    """Some experts, not all: sigmoids are larger than shares."""
    settings = {"level": 0.8} if (selection, router) == ("level", "sigmoid") else SELECTIONS[selection]
    model.set_selection(type=selection, **settings)


@functools.cache
def calibrated(name: str, router: str, shared: int = 0):
    model = tiny_model(name)
    config = MoEficationConfig(
        expert_size=8, splitter="random", router=router, selection={"type": "top_k", "k": 3}, shared_experts=shared
    )
    moefy_(model, config, text_batches(2))
    return model.requires_grad_(False)


@pytest.mark.parametrize("implementation", ["cpu", "torch"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("name", "router"), [("llama", "random"), ("gpt2", "random"), ("llama", "sigmoid")])
def test_selections_shared_experts_and_compensation(
    name, router, selection, shared, compensated, implementation, monkeypatch
):
    model = copy.deepcopy(calibrated(name, router, shared))
    select(model, selection, router)
    for site in model.moe_sites() if compensated else ():
        site.act.compensate_(torch.randn(site.sizes[1]))
    inputs = {"input_ids": tiny_inputs(name)["input_ids"][:1, :4]}
    masked, found, scored = run(model, inputs), calls(monkeypatch), scorings(monkeypatch)
    model.set_moe_implementation(implementation)
    assert distance(run(model, inputs), masked) < 1e-5 and len(found) == 2
    assert len(scored) == (0 if implementation == "cpu" else 2)  # else in the kernel's one call
    for site in model.moe_sites():  # means follow
        site.down.weight.mul_(2)
    after = run(model, inputs)
    model.set_moe_implementation("masked")
    assert distance(run(model, inputs), after) < 1e-5 < distance(masked, after)


@pytest.mark.parametrize("router", [name for name in ROUTERS if not ROUTERS[name].reuses_expert_compute])
@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "top_k"])
def test_every_router_and_dynamic_selection(selection, router, monkeypatch):
    """In the kernel's call where the router is one or two matrices, by torch otherwise; each token scored once."""
    model, inputs = copy.deepcopy(calibrated("llama", router)), tiny_inputs("llama")
    select(model, selection, router)
    masked, found, scored = run(model, inputs), calls(monkeypatch), scorings(monkeypatch)
    model.set_moe_implementation("cpu")
    assert distance(run(model, inputs), masked) < 1e-5 and len(found) == 2
    assert len(scored) in ([0] if ROUTERS[router].kernel_weights else [1, 2])  # a pre-gated layer waits


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.kernel_weights])
def test_the_kernel_scores_as_these_routers_do(name):
    router = ROUTERS[name](8, 6)
    matrices = [router.get_parameter(each) for each in router.kernel_weights]
    assert {id(each) for each in router.parameters()} == {id(each) for each in matrices}
    x = scores = torch.randn(5, 8)
    for matrix in matrices:
        matrix.data.normal_()
        scores = scores @ matrix.T
    assert scores.shape == (5, 6)
    torch.testing.assert_close(router(x), scores)
    expected = {"softmax": scores.softmax(-1), "sigmoid": scores.sigmoid()}
    assert torch.equal(router.strengths(scores), expected[router.kernel_strengths])
    assert router.strengths(scores.bfloat16()).dtype == torch.float32  # rounded, they would tie


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_bfloat16(name, router_dtype, selection):
    """As near to the float32 model as the masked bfloat16 model is."""
    model, inputs = moefied(name), tiny_inputs(name)
    select(model, selection)
    exact = run(model, inputs)
    model.bfloat16()
    for site in model.moe_sites():
        site.act.router.to(router_dtype)
    masked = run(model, inputs)
    model.set_moe_implementation("cpu")
    sparse = run(model, inputs)
    assert {each.dtype for each in sparse} == {torch.bfloat16}
    error, allowed = (
        torch.cat([(a - b).flatten() for a, b in zip(found, exact, strict=True)]).norm() for found in (sparse, masked)
    )
    assert 0 < error < 1.2 * allowed


def test_a_router_that_lies_otherwise_is_run_by_torch():
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    moefy_(model, MoEficationConfig(expert_size=8, splitter="random", router="low_rank"), text_batches(2))
    select(model.requires_grad_(False), "top_k", "low_rank")
    model.set_moe_implementation("cpu")
    before = run(model, inputs)
    for site in model.moe_sites():
        router = site.act.router
        router.proj_in.data, router.proj_out.data = router.proj_in.data[:2], router.proj_out.data[:, :2]
    found = run(model, inputs)
    for site in model.moe_sites():  # contiguous, on the same memory, of another shape
        site.act.router.proj_out.data = site.act.router.proj_out.data.contiguous()
    again = run(model, inputs)
    model.set_moe_implementation("masked")
    masked = run(model, inputs)
    assert distance(found, masked) < 1e-5 and distance(again, masked) < 1e-5 < distance(before, masked)


def test_why_calls_are_masked_is_said_once(caplog):
    model, inputs = moefied("llama"), tiny_inputs("llama")
    model.set_moe_implementation("cpu")
    sparse_ffn.logger.warning_once.cache_clear()
    for _ in range(2):
        in_autocast(model, inputs)
    assert [each.message for each in caplog.records] == ["FFNs run masked: autocast wants another dtype"]


def test_a_router_that_reuses_expert_compute_stays_masked(monkeypatch):
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    convert(model, 2, router="partial_input", splitter="random")
    masked, found = run(model, inputs), calls(monkeypatch)
    with pytest.raises(ValueError, match="PartialInputRouter computes part of each neuron"):
        model.set_moe_implementation("cpu")
    model.set_moe_implementation("auto")
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), masked, strict=True)) and not found


def test_changed_weights_are_seen():
    model, inputs = moefied("llama"), tiny_inputs("llama")
    model.set_moe_implementation("cpu")
    before = run(model, inputs)
    for site in model.moe_sites():
        site.down.weight.mul_(2)
    after = run(model, inputs)
    model.set_moe_implementation("masked")
    assert distance(run(model, inputs), after) < 1e-5 < distance(before, after)


def test_saved_as_ever(tmp_path):
    model = moefied("gpt2")
    model.save_pretrained(tmp_path / "masked")
    model.set_moe_implementation("cpu")
    model.save_pretrained(tmp_path / "cpu")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("masked", "cpu"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "masked" / "config.json").read_text() == (tmp_path / "cpu" / "config.json").read_text()


REASONS = {
    "gradients": lambda model, inputs: model.requires_grad_(True)(**inputs)[0].sum().backward(),
    "autocast": lambda model, inputs: in_autocast(model, inputs),
    "all experts": lambda model, inputs: model.set_selection(k=1.0) or run(model, inputs),
    "profiling": lambda model, inputs: profile(model, [inputs], progress=False).close(),
}


def in_autocast(model, inputs):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_sparse_is_masked(reason, monkeypatch):
    model, inputs, found = moefied("llama"), tiny_inputs("llama"), calls(monkeypatch)
    model.set_moe_implementation("cpu")
    REASONS[reason](model, inputs)
    assert not found
    if reason == "gradients":
        assert all(site.down.weight.grad.abs().sum() > 0 for site in model.moe_sites())


def test_figures_are_the_same():
    """A sweep of a sparse model: quality by its own routers and by controls, what each layer loses, and how many
    experts run where that depends on the token."""
    kinds = ["top_k", {"type": "threshold", "tau": 0.3}, {"type": "level", "level": 1.7}]
    settings = {"controls": ["oracle"], "selections": kinds, "progress": False}
    masked, *others = (
        evaluate(model, text_batches(4, labels="causal"), (2, 3), **settings).rows
        for model in map(causal_run_by, ("masked", "cpu", "auto"))
    )
    for rows in others:
        for a, b in zip(masked, rows, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            assert a.get("output_error") == pytest.approx(b.get("output_error"), abs=1e-5)
            assert a.get("k_per_layer") == b.get("k_per_layer")


def causal_run_by(implementation: str):
    model = tiny_model("llama", "AutoModelForCausalLM")
    convert(model, 2)
    model.set_moe_implementation(implementation)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_leaves_many_tokens_of_fine_experts_to_dense(dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    def limits(tokens: int, name: str = "cpu") -> list[float]:
        return [BACKENDS[name].largest_share(torch.zeros(tokens, 3, dtype=dtype), size) for size in (1, 2, 32)]

    assert limits(1) == [1, 1, 1] and limits(2) == limits(16) and limits(1, "torch") == [0.8] * 3
    for n, most in ((16, 0.8), (17, 0.5)):
        few, some, all_ = limits(n)
        assert few < some <= all_ == most
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert (limits(17)[2] == 0) is (dtype == torch.bfloat16)


@pytest.mark.parametrize("selection", ["top_k", "threshold"])
def test_auto_runs_fine_experts_token_by_token(selection, monkeypatch):
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    moefy_(model, MoEficationConfig(expert_size=1, splitter="random", router="random"))
    settings = {"k": 0.6} if selection == "top_k" else {"type": selection, "tau": 0.9}
    model.requires_grad_(False).set_selection(**settings)
    model.set_moe_implementation("auto")
    found = calls(monkeypatch)
    one = {"input_ids": inputs["input_ids"][:1, :1]}
    run(model, one)
    assert len(found) == 2
    run(model, inputs)  # more tokens: so many of their neurons are too many
    assert len(found) == 2


def test_auto_takes_what_there_is(monkeypatch):
    model, inputs, found = moefied("llama"), tiny_inputs("llama"), calls(monkeypatch)
    masked = run(model, inputs)
    model.set_moe_implementation()
    assert distance(run(model, inputs), masked) < 1e-5 and len(found) == 2
    model.set_selection(k=5)  # of 6
    many = {name: each.repeat(2, 1) for name, each in inputs.items()}
    run(model, many)  # 28 tokens: dense is as fast
    assert len(found) == 2
    scored = scorings(monkeypatch)
    model.set_selection(type="threshold", tau=0.9)  # nearly all experts, which the kernel finds and computes nothing
    dense = run(model, many)
    assert len(found) == 2 and len(scored) == 2
    model.set_selection(type="threshold", tau=0.05)
    run(model, many)
    assert len(found) == 4 and len(scored) == 2
    model.set_selection(type="threshold", tau=0.9)
    model.set_moe_implementation("masked")
    assert all(torch.equal(a, b) for a, b in zip(run(model, many), dense, strict=True))
    model.set_moe_implementation()

    def fails():
        raise BuildError("no compiler")

    monkeypatch.setattr(cpu_kernel, "library", fails)
    model.set_moe_implementation("auto")
    assert {site.first.forward.__self__.backend.name for site in model.moe_sites()} == {"torch"}
    with pytest.raises(BuildError, match="no compiler"):
        model.set_moe_implementation("cpu")


@pytest.mark.parametrize("broken", ["compiler", "cache"])
def test_auto_does_without_a_kernel_that_cannot_be_made(broken, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEFY_KERNELS", str(tmp_path / ("file" if broken == "cache" else "folder")))
    if broken == "compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    build.library.cache_clear()
    try:
        assert backends.best_for("cpu") == "torch"
        with pytest.raises(BuildError, match="cannot be compiled or loaded here.*(none|file)"):
            moefied("llama").set_moe_implementation("cpu")
    finally:
        build.library.cache_clear()


def test_what_does_not_fit():
    model, inputs = moefied(SIGMOID), tiny_inputs(SIGMOID)
    with pytest.raises(ValueError, match="encoder.layer.0: activation Sigmoid is none of relu"):
        model.set_moe_implementation("cpu")
    masked = run(model, inputs)
    model.set_moe_implementation("auto")
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), masked, strict=True))
    with pytest.raises(ValueError, match="float16: only float32 or bfloat16 can"):
        moefied("llama").half().set_moe_implementation("cpu")
    mixed = moefied("llama").bfloat16()
    mixed.moe_sites()[0].down.float()  # as T5 keeps it
    with pytest.raises(ValueError, match="gate_proj is torch.bfloat16, down_proj torch.float32: only one dtype can"):
        mixed.set_moe_implementation("cpu")
    with pytest.raises(
        ValueError, match="unknown implementation 'cuda'; choose from auto, masked, torch, cpu, triton"
    ):
        model.set_moe_implementation("cuda")
    adapted = moefied("llama")
    get_peft_model(adapted, LoraConfig(target_modules=["gate_proj"]))
    with pytest.raises(ValueError, match="gate_proj is a Linear, adapted"):
        adapted.set_moe_implementation("cpu")


def test_copies_are_models_of_their_own():
    model, inputs = moefied("llama"), tiny_inputs("llama")
    model.set_moe_implementation("cpu")
    before = run(model, inputs)
    other = copy.deepcopy(model)
    assert distance(run(other, inputs), before) == 0
    for site in other.moe_sites():
        assert (
            isinstance(site.first.forward.__self__, SparseFfn) and site.first.forward.__self__.site.owner is site.owner
        )
        site.down.weight.mul_(2)
    assert distance(run(model, inputs), before) == 0 < distance(run(other, inputs), before)


def test_threads_may_share_a_model():
    model = moefied("llama")
    model.set_moe_implementation("cpu")
    inputs = [{"input_ids": torch.randint(3, 99, (1, 5 + seed))} for seed in range(4)]
    expected, wrong = [run(model, each) for each in inputs], []

    def call(number: int) -> None:
        for _ in range(20):
            if distance(run(model, inputs[number]), expected[number]) > 1e-6:
                wrong.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))  # raises what they raise
    assert not wrong


@pytest.mark.parametrize("router", ["linear", "sigmoid"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_generation_is_the_same(selection, router, monkeypatch):
    model = tiny_model("llama", "AutoModelForCausalLM", use_cache=True)
    moefy_(model, MoEficationConfig(expert_size=8, splitter="random", router=router), text_batches(2))
    select(model, selection, router)
    prompt = tiny_inputs("llama")["input_ids"][:1, :4]
    masked = model.generate(prompt, do_sample=False, max_new_tokens=12)
    for implementation in ("cpu", "auto"):
        model.set_moe_implementation(implementation)
        with monkeypatch.context() as context:
            found, scored = calls(context), scorings(context)
            assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=12), masked)
        assert len(found) == 24 if implementation == "cpu" else found
        assert len(scored) == 24 - len(found)


def test_without_the_package_there_is_a_clear_error(monkeypatch):
    def fails(name):
        raise ImportError(name)

    model = moefied("llama")
    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(ImportError, match="pip install moefy-hf"):
        model.set_moe_implementation("cpu")


@pytest.mark.parametrize("name", [name for name in NAMES if name != SIGMOID and name != "clip"])
def test_in_training_mode_dropout_falls_where_it_did(name):
    model, inputs = moefied(name).train(), tiny_inputs(name)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in key or key == "p"):
                setattr(module, key, 0.3)
    found = []
    for implementation in ("masked", "cpu"):
        model.set_moe_implementation(implementation)
        torch.manual_seed(0)
        found.append(run(model, inputs))
    assert distance(*found) < 1e-5


def test_without_triton_a_clear_error_and_auto_masks(monkeypatch):
    model = moefied("llama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs Triton: pip install 'moefy-hf\[triton\]'"):
        model.set_moe_implementation("triton")
    assert backends.best_for("cuda") == "masked"
    monkeypatch.undo()
    assert backends.best_for("cpu") == "cpu"


@pytest.mark.parametrize(
    ("name", "target"),
    [("bert", "output.dense"), ("llama", "down_proj"), ("llama", "up_proj"), ("llama", "gate_proj")],
)
def test_an_adapter_added_later_is_computed_masked(name, target):
    convert(model := tiny_model(name), k=2)
    inputs = tiny_inputs(name)
    model.set_moe_implementation("cpu")
    adapted = get_peft_model(model, LoraConfig(target_modules=[target], init_lora_weights=False)).eval()
    found = run(adapted, inputs)
    model.set_moe_implementation("masked")
    assert distance(found, run(adapted, inputs)) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("implementation", ["cpu", "torch", "auto"])
def test_a_trace_is_masked(implementation, mode):
    """What a kernel writes would be a constant of the trace."""
    model, inputs = moefied("bert"), tiny_inputs("bert")
    others = tiny_inputs("bert", seed=5)
    want = run(model, others)
    model.set_moe_implementation(implementation)
    with mode():
        trace = torch.jit.trace(model, tuple(inputs.values()), strict=False, check_trace=False)
        assert distance([trace(*others.values())["last_hidden_state"]], want[:1]) < 1e-6


def test_recorded_operations_are_masked():
    model = moefied("bert")
    model.set_moe_implementation("cpu")
    ffn = model.encoder.layer[0].intermediate
    first, second = (torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def neurons(x):
        return model.encoder.layer[0].output.dense(ffn(x))

    with torch.no_grad():
        graph = make_fx(neurons)(first)
        model.set_moe_implementation("masked")
        torch.testing.assert_close(graph(second), neurons(second), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnx and onnxruntime")
def test_onnx_by_tracing_is_masked(tmp_path):
    import onnxruntime

    model, inputs, others = tiny_model("bert", CLASSIFIER), tiny_inputs("bert"), tiny_inputs("bert", seed=5)
    convert(model, 2)
    want = run(model.requires_grad_(False), others)[0]
    model.set_moe_implementation("auto")
    names, path = list(inputs), str(tmp_path / "model.onnx")
    torch.onnx.export(model, tuple(inputs.values()), path, input_names=names, output_names=["y"], dynamo=False)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {name: others[name].numpy() for name in names})[0]
    assert distance([torch.from_numpy(found)], [want]) < 1e-5


@pytest.mark.parametrize("version", [1, 2])
def test_parameters_that_fsdp_owns_are_refused(version, tmp_path):
    """One group holds them all and leaves them gathered after a forward pass, when they look like any others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = moefied("llama"), tiny_inputs("llama")
        masked = run(model, inputs)
        if version == 2:
            whole = fully_shard(model, reshard_after_forward=False)
        else:
            whole = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert distance(run(whole, inputs), masked) < 1e-6
        with pytest.raises(ValueError, match="cannot run .*FSDP owns its parameters"):
            model.set_moe_implementation("cpu")
        model.set_moe_implementation("auto")
        assert not any("forward" in vars(site.down) for site in model.moe_sites())
    finally:
        dist.destroy_process_group()


def test_a_model_that_fsdp_wraps_afterwards_runs_masked(tmp_path, monkeypatch):
    """FSDP 2 refuses by itself: a transposed matrix is none that it shards."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = moefied("llama"), tiny_inputs("llama")
        masked = run(model, inputs)
        model.set_moe_implementation("cpu")
        found = calls(monkeypatch)
        whole = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert distance(run(whole, inputs), masked) < 1e-6 and not found
    finally:
        dist.destroy_process_group()


def test_transformed_functions_are_masked():
    model, inputs = moefied("bert"), tiny_inputs("bert")["input_ids"]
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    layer = model.encoder.layer[0]

    def neurons(x):
        return layer.output.dense(layer.intermediate(x))

    run(model, {"input_ids": inputs})
    with torch.no_grad():
        masked = neurons(hidden)
        model.set_moe_implementation("cpu")
        torch.testing.assert_close(torch.func.vmap(neurons)(hidden), masked, rtol=1e-5, atol=1e-6)
        value, _ = torch.func.jvp(neurons, (hidden,), (torch.ones_like(hidden),))
        torch.testing.assert_close(value, masked, rtol=1e-5, atol=1e-6)


def test_a_kernel_is_prepared_once_until_something_changes(monkeypatch):
    model, inputs = moefied("llama"), tiny_inputs("llama")
    prepared, prepare = [], cpu_kernel.CpuKernel.prepare
    monkeypatch.setattr(cpu_kernel.CpuKernel, "prepare", lambda self: prepared.append(self) or prepare(self))
    model.set_moe_implementation("cpu")
    for _ in range(3):
        run(model, inputs)
    assert len(prepared) == len(model.moe_sites()) == 2
    first, second = model.moe_sites()
    changes = {
        "budget": lambda: model.set_selection(k=3),
        "weights": lambda: setattr(first.up, "weight", torch.nn.Parameter(first.up.weight.clone(), False)),
        "router": lambda: setattr(second.act, "router", copy.deepcopy(second.act.router)),
        "means": lambda: first.act.compensate_(torch.randn(first.sizes[1])),
        "means in place": lambda: first.act.compensation.mul_(2),
    }
    for change, made in zip(changes.values(), (2, 1, 1, 1, 1), strict=True):
        prepared.clear()
        change()
        for _ in range(2):
            found = run(model, inputs)
        assert len(prepared) == made
    model.set_moe_implementation("masked")
    assert distance(run(model, inputs), found) < 1e-5


class Zeroing(Backend):
    """All experts, and zeros for those not selected, for two tokens at most."""

    name = "zeroing"
    dtypes = (torch.float32,)
    compensation = False
    most_tokens = 2
    counts_experts = False

    @classmethod
    def largest_share(cls, x, expert_size):
        return 0.5

    def prepare(self):
        return self.site.weights()

    def compute(self, x, most):
        weights, mask = self.prepared(), self.act.keep(x)
        neurons = weights.neurons(x) * mask.repeat_interleave(self.act.expert_size, -1)
        return torch.nn.functional.linear(neurons, weights.down, self.site.down.bias)


def test_a_new_backend_is_one_class_and_one_line(monkeypatch, caplog):
    monkeypatch.setitem(BACKENDS, "zeroing", Zeroing)
    model, inputs = moefied("llama"), tiny_inputs("llama")
    few = {"input_ids": inputs["input_ids"][:1, :2]}
    masked = run(model, few)
    found = calls(monkeypatch)
    model.set_moe_implementation("zeroing")
    assert distance(run(model, few), masked) < 1e-5 and len(found) == 2
    sparse_ffn.logger.warning_once.cache_clear()
    for change, reason in (
        (lambda: None, "many tokens"),
        (lambda: [site.act.compensate_(torch.zeros(site.sizes[1])) for site in model.moe_sites()], "their mean"),
    ):
        change()
        run(model, inputs if reason == "many tokens" else few)
        assert reason in caplog.records[-1].message and len(found) == 2
    with pytest.raises(ValueError, match="is torch.bfloat16: only float32 can"):
        moefied("llama").bfloat16().set_moe_implementation("zeroing")
    with pytest.raises(ValueError, match="choose from auto, masked, torch, cpu, triton, zeroing"):
        model.set_moe_implementation("dense")
