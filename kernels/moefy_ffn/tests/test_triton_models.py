"""Models whose FFNs run by the Triton kernels give what they give masked, and the same gradients."""

import pytest
import torch
from tiny import convert, distance, run, tensors, tiny_inputs, tiny_model

pytest.importorskip("triton")

from test_triton import on_each_device  # noqa: E402

from moefy_hf.runtime.triton_kernel import TritonKernel  # noqa: E402


def moefied(name: str, device: str, k: int = 2):
    model = tiny_model(name)
    convert(model, k)
    return model.to(device), {key: value.to(device) for key, value in tiny_inputs(name).items()}


def calls(monkeypatch) -> list[bool]:
    """One entry for each call of the kernels from here on."""
    found, compute = [], TritonKernel.compute
    monkeypatch.setattr(TritonKernel, "compute", lambda self, x, most: (found.append(True), compute(self, x, most))[1])
    return found


def gradients(model, inputs) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs, and the gradient of each parameter."""
    model.zero_grad()
    found = tensors(model(**inputs))
    sum((each.float() * torch.linspace(-1, 1, each.shape[-1], device=each.device)).sum() for each in found).backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [each.detach() for each in found], named


@on_each_device
@pytest.mark.parametrize("name", ["t5", "t5-gated", "opt", "bert", "gpt2", "llama", "phi3", "modernbert"])
def test_outputs_and_gradients_are_those_of_masked(device, name, monkeypatch):
    model, inputs = moefied(name, device)
    masked, expected = gradients(model, inputs)
    model.set_moe_implementation("triton")
    found = calls(monkeypatch)
    sparse, grads = gradients(model, inputs)
    assert len(found) == len(model.moe_sites()) and distance(sparse, masked) < 1e-5
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        assert distance([grad], [expected[key]]) < 1e-5 * max(float(expected[key].abs().max()), 1), key
    assert distance(run(model, inputs), masked) < 1e-5 and len(found) == 2 * len(model.moe_sites())
    few = {key: value[:1, :3] for key, value in inputs.items()}
    sparse = run(model, few)
    model.set_moe_implementation("masked")
    assert distance(run(model, few), sparse) < 1e-5
    assert not any("forward" in vars(module) for module in model.modules())


@on_each_device
@pytest.mark.parametrize("selection", [{"k": 3}, {"type": "threshold", "tau": 0.5}, {"type": "level", "level": 1.0}])
def test_shared_experts_and_as_many_as_a_token_needs(device, selection, monkeypatch):
    model = tiny_model("llama")
    convert(model, 3, calibration=[tiny_inputs("llama")], shared_experts=1)
    model.set_selection(**selection)
    model, inputs = model.to(device), {key: value.to(device) for key, value in tiny_inputs("llama").items()}
    act = model.moe_sites()[0].act
    counts = act.keep(torch.randn(50, 16, device=device)).sum(-1)
    assert act.shared == 1 and counts.min() >= 1 and (len(counts.unique()) > 1) == ("type" in selection)
    masked, expected = gradients(model, inputs)
    model.set_moe_implementation("triton")
    found = calls(monkeypatch)
    sparse, grads = gradients(model, inputs)
    assert len(found) == 2 and distance(sparse, masked) < 1e-5
    assert max(distance([grads[key]], [expected[key]]) for key in expected) < 1e-4


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(device, dtype, monkeypatch):
    """As far from float32 as masked in the same precision, about; gradients as well."""
    model, inputs = moefied("llama", device)
    exact, exact_grads = gradients(model, inputs)
    found = calls(monkeypatch)

    def errors(autocast: bool) -> tuple[float, float]:
        with torch.autocast(device, dtype, enabled=autocast):
            outputs, grads = gradients(model, inputs)
        return distance(outputs, exact), max(distance([grads[key]], [exact_grads[key]]) for key in grads)

    for autocast in (True, False):
        model.to(torch.float32 if autocast else dtype)
        model.set_moe_implementation("masked")
        masked = errors(autocast)
        model.set_moe_implementation("triton")
        sparse = errors(autocast)
        assert all(ours < 3 * theirs for ours, theirs in zip(sparse, masked, strict=True))
    assert len(found) == 4


@on_each_device
def test_trains_as_masked_does(device):
    """Three steps of Adam, with activation checkpointing."""
    losses = []
    for name in ("masked", "triton"):
        model, inputs = moefied("llama", device)
        model.train().gradient_checkpointing_enable()
        model.set_moe_implementation(name)
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-3)
        for _ in range(3):
            loss = model(**inputs)[0].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-5) and losses[2] < losses[0]


@on_each_device
def test_where_it_does_not_fit(device):
    model, _ = moefied("llama", device)
    model.layers[0].mlp.down_proj.bfloat16()
    with pytest.raises(ValueError, match="gate_proj is torch.float32, down_proj torch.bfloat16: only one dtype can"):
        model.set_moe_implementation("triton")
    with pytest.raises(ValueError, match="is torch.float64: only float32 or bfloat16 or float16 can"):
        model.double().set_moe_implementation("triton")


@on_each_device
def test_auto_takes_triton_on_gpus(device):
    model, inputs = moefied("llama", device)
    masked = run(model, inputs)
    model.set_moe_implementation("auto")
    names = {site.first.forward.__self__.backend.name for site in model.moe_sites()}
    assert (names == {"triton"}) == (device == "cuda") and distance(run(model, inputs), masked) < 1e-5


def test_without_a_gpu_and_the_interpreter_there_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model, _ = moefied("llama", "cpu")
    with pytest.raises(ValueError, match="has a Parameter on cpu: only plain ones on cuda can"):
        model.set_moe_implementation("triton")
