"""Convert one tiny model of a type, and compare what it computes with the dense model in every way a user would."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tiny_registry import first_output, float_tensors, tiny_model
from transformers import PreTrainedModel

from moefy_hf import MoEficationConfig, moefy_
from moefy_hf.discovery.search import search
from moefy_hf.discovery.towers import tower_of
from moefy_hf.measure.contexts import hooked
from moefy_hf.measure.made_up_inputs import made_up_batch
from moefy_hf.modeling.ffn_sites import starred

TOLERANCE = 1e-5  # of the largest output


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number of `b`; what is not finite has to be so in both."""
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return math.inf
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def check_type(model_type: str, folder: Path, head: str = "AutoModel") -> dict[str, Any]:
    """Check a type, and save its MoEfied model, a batch and its output in a folder, for `own_code`.

    Returns:
        found FFNs by tower, modules left alone with the reason, and for each check True or what is wrong.

    Raises:
        Exception: the type cannot be built or run, has no FFN, or cannot be converted.
    """
    model = tiny_model(model_type, head=head)
    found = search(model)
    counted = Counter(tower_of(model, site.name) or "model" for site in found.sites)
    result: dict[str, Any] = {"ffns": dict(counted), "left": _reasons(found.left)}
    if not found.sites:
        made_up_batch(model)  # a type that does not run says so
        return result | {"reason": _why_none(result["left"])}
    part, batch = reached(model, found.sites)
    keys, stock = list(model.state_dict()), type(model)
    dense = first_output(model.get_submodule(part), batch)
    config = MoEficationConfig(
        num_experts=math.gcd(8, *(site.sizes[1] for site in found.sites)),
        splitter="random",
        router="similarity",
        k=0.5,
        allocation="uniform",
        towers="all",
    )
    moefy_(model, config, progress=False)
    model.set_selection(k=1.0)
    result["dense"] = _same(first_output(model.get_submodule(part), batch), dense)
    model.set_selection(k=0.5)
    sparse = first_output(model.get_submodule(part), batch)
    result["sparse"] = difference(sparse, dense) > TOLERANCE or "half the experts change nothing"
    result["keys"] = _keys(model, keys)
    model.save_pretrained(folder)
    expected = {"batch": batch, "output": sparse, "auto": type(model)._auto_class, "part": part}
    torch.save(expected, folder / "expected.pt")
    reloaded = stock.from_pretrained(folder).eval()
    result["stock"] = _same(first_output(reloaded.get_submodule(part), batch), dense)
    result["trains"] = _training_step(model, part, batch)
    return result


def reached(model: PreTrainedModel, sites: list[Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the part of a model that is run, and a batch: the whole, or a tower that has FFNs, if a batch for the
    whole gets to none."""
    batch, ran = made_up_batch(model), []
    with hooked([site.down.register_forward_hook(lambda *_: ran.append(True)) for site in sites]):
        first_output(model, batch)
    if ran:
        return "", batch
    names = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    part = next(name for name in names if sites[0].name.startswith(f"{name}."))
    if model.get_submodule(part) is model.base_model:
        part = next(name for name in names if name != part and sites[0].name.startswith(f"{name}."))
    return part, made_up_batch(model.get_submodule(part))


def _same(now: torch.Tensor, before: torch.Tensor) -> bool | str:
    apart = difference(now, before)
    return apart <= TOLERANCE or f"differs by {apart:.1e} of the scale"


def _keys(model: PreTrainedModel, dense: list[str]) -> bool | str:
    now = list(model.state_dict())
    more = [key for key in now if key not in dense]
    others = [key for key in more if ".router." not in key and not key.endswith(".neuron_order")]
    kept = [key for key in now if key in dense] == dense
    return (kept and not others) or f"keys differ: {sorted({*now} ^ {*dense})[:3]}"


def _training_step(model: PreTrainedModel, part: str, batch: dict[str, torch.Tensor]) -> bool | str:
    model = copy.deepcopy(model).train()
    sites = model.moe_sites()
    routers = [value for site in sites for value in site.act.router.parameters()]
    before, downs = [value.clone() for value in routers], [site.down.weight.detach().clone() for site in sites]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.get_submodule(part)(**batch)
    tensors = [each for each in float_tensors(output) if each.requires_grad]
    if not tensors:
        return "no output has a gradient"
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    sum(each.float().nan_to_num(0, 0, 0).square().sum() for each in tensors).backward()
    optimizer.step()
    if any(not torch.equal(old, now) for old, now in zip(before, routers, strict=True)):
        return "routers moved"
    moved = [not torch.equal(old, site.down.weight) for old, site in zip(downs, sites, strict=True)]
    return any(moved) or "no FFN moved"


def _reasons(left: list[Any]) -> dict[str, str]:
    """Reason by place, with * for the numbers of layers."""
    return {starred(each.name): each.reason for each in left}


def _why_none(left: dict[str, str]) -> str:
    return "; ".join(dict.fromkeys(left.values())) or "it has no pair of Linears with an activation between them"
