"""A new router or selection is one class and one line of its registry: everything else asks the class."""

import pytest
import torch
import torch.nn.functional as F
from batches import text_batches
from tiny import distance, run, tiny_inputs, tiny_model
from torch import nn

from moefy_hf import MoEficationConfig, evaluate, export, fit_routers_, load, moefy_, profile, reroute_
from moefy_hf.modeling.router_base import Router
from moefy_hf.modeling.routers import ROUTERS
from moefy_hf.modeling.routers_trained import LinearRouter
from moefy_hf.modeling.selection import SELECTIONS, Threshold
from moefy_hf.runtime.backends import BACKENDS

CAUSAL = "AutoModelForCausalLM"
TOP_2 = {"type": "top_k", "k": 2, "allocation": "uniform"}


class CosineRouter(Router):
    """Fitted, and no product of matrices."""

    settings = {"width": 8}

    def __init__(self, hidden_size: int, num_experts: int, width: int = settings["width"]):
        super().__init__(hidden_size, num_experts)
        self.keys = nn.Parameter(torch.empty(num_experts, width))
        self.queries = nn.Parameter(torch.empty(width, hidden_size))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.linear(x, self.queries), dim=-1) @ F.normalize(self.keys, dim=-1).t()


class TwoMatrixRouter(CosineRouter):
    """Not fitted; the kernel runs it."""

    trainable = False
    kernel_weights = ("queries", "keys")

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.queries), self.keys)


class SquaredRouter(LinearRouter):
    """Its scores are not those of its parent, which the kernel runs and served MoEs hold."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight).square()


NEW = {"cosine": CosineRouter, "two_matrices": TwoMatrixRouter, "squared": SquaredRouter}


@pytest.fixture(params=NEW)
def router(request, monkeypatch) -> str:
    monkeypatch.setitem(ROUTERS, request.param, NEW[request.param])
    return request.param


def moefied(router: str, selection: dict | None = None):
    model, batches = tiny_model("llama-without-biases", CAUSAL), text_batches(8, labels="causal")
    config = MoEficationConfig(
        expert_size=8, splitter="parameter_clustering", router=router, selection=selection or TOP_2
    )
    moefy_(model, config, batches, progress=False)
    return model.requires_grad_(False).eval()


def torch_scorings(monkeypatch) -> list[Router]:
    """The routers that score in torch from here on."""
    scored, forward = [], Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x: scored.append(self) or forward(self, x))
    return scored


@pytest.mark.parametrize("selection", [TOP_2, {"type": "threshold", "k": 2}])
def test_a_new_router_runs_in_every_way(router, selection, monkeypatch):
    model = moefied(router, selection)
    inputs = {"input_ids": tiny_inputs("llama", CAUSAL)["input_ids"][:1, :4]}
    masked = run(model, inputs)
    scored = torch_scorings(monkeypatch)
    for implementation in ("torch", "cpu", "auto"):
        scored.clear()
        model.set_moe_implementation(implementation)
        assert distance(run(model, inputs), masked) < 1e-5
        by_kernel = router == "two_matrices" and implementation != "torch"
        assert len(scored) == (0 if by_kernel else 2)
    model.set_selection(type="top_k", k=1.0)
    model.set_moe_implementation("masked")
    assert distance(run(model, inputs), masked) > 1e-4  # the selection matters


def test_a_new_router_is_saved_and_loaded(router, tmp_path):
    model, inputs = moefied(router), tiny_inputs("llama", CAUSAL)
    model.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    assert type(again.moe_sites()[0].act.router) is NEW[router]
    assert distance(run(again, inputs), run(model, inputs)) == 0


def test_a_new_router_is_fitted_measured_and_replaced(router):
    model, batches = moefied(router), text_batches(8, labels="causal")
    with profile(model, batches, progress=False) as found:
        before = [site.act.router.state_dict() for site in model.moe_sites()]
        fits = fit_routers_(model, found, epochs=1, progress=False)
        assert all(0 < fit.captured <= fit.oracle + 1e-6 for fit in fits)
        for state, site in zip(before, model.moe_sites(), strict=True):
            assert state.keys() == site.act.router.state_dict().keys()
        rows = evaluate(model, batches, (2,), controls=["random"], progress=False).rows
        assert all(0 < row["ffn_flops"] for row in rows)
        reroute_(model, "random")
        reroute_(model, router, found, progress=False)
    assert {type(site.act.router) for site in model.moe_sites()} == {NEW[router]}
    assert NEW[router].__name__ in model._no_split_modules


def test_a_new_router_is_refused_where_a_served_moe_cannot_hold_it(router, tmp_path):
    with pytest.raises(ValueError, match=f"a linear router, this model a '{router}' one: convert with router='lin"):
        export(moefied(router), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_settings_of_a_new_router_are_its_own(monkeypatch):
    monkeypatch.setitem(ROUTERS, "cosine", CosineRouter)
    config = MoEficationConfig(expert_size=8, router="cosine", router_settings={"width": 3}, splitter="random")
    moefy_(model := tiny_model("llama"), config, text_batches(4), progress=False)
    assert model.moe_sites()[0].act.router.keys.shape == (6, 3)
    with pytest.raises(ValueError, match="CosineRouter has no setting 'rank': choose from width"):
        MoEficationConfig(router="cosine", router_settings={"rank": 3})


class Sharper(Threshold):
    """Its thresholds are not those of its parent, which the kernel knows."""

    name = "sharpness"

    @classmethod
    def needs(cls, weights: torch.Tensor) -> torch.Tensor:
        return super().needs(weights.square())


@pytest.mark.parametrize("implementation", ["masked", *(name for name in BACKENDS if name != "triton"), "auto"])
def test_a_new_selection_is_one_class(implementation, monkeypatch, tmp_path):
    monkeypatch.setitem(SELECTIONS, "sharper", Sharper)
    model, inputs = moefied("linear"), {"input_ids": tiny_inputs("llama", CAUSAL)["input_ids"][:1, :4]}
    model.set_selection(type="threshold", tau=0.5)
    other = run(model, inputs)
    model.set_selection(type="sharper", sharpness=0.5)
    masked = run(model, inputs)
    model.set_moe_implementation(implementation)
    assert distance(run(model, inputs), masked) < 1e-5 < distance(masked, other)
    with pytest.raises(ValueError, match="this model selects by 'sharper'"):
        export(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    assert type(load(tmp_path / "saved").moe_sites()[0].act.selection) is Sharper
