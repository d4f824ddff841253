"""Run batches through a model, and show what goes through its FFNs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.ffn_sites import FfnSite
from ..modeling.offload import device_of
from .batches import check_batch
from .contexts import evaluating, hooked
from .metrics import is_causal
from .padding import real_tokens, tokens_first

SeeFfn = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]  # position, x, neurons, text


@contextmanager
def run_with_hooks(
    model: PreTrainedModel, sites: list[FfnSite], see: SeeFfn
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that runs one batch in evaluation mode, without gradients, and shows each FFN to `see`.

    Hooks are removed and the training mode is restored when the context ends.

    Args:
        sites: the FFNs to show.
        see: called with an FFN's position in `sites`, x (T, d), neurons (T, f) and text (T,), the number of the
            batch's row that each token is of; padding is left out.

    Example:
        with run_with_hooks(model, find_sites(model), lambda i, x, neurons, text: print(i, len(x))) as run:
            run(batch)
    """
    batch_now: Mapping[str, Any] = {}
    inputs: dict[int, torch.Tensor] = {}
    device = device_of(model)

    def on_input(position: int, args: tuple) -> None:
        inputs[position] = args[0]

    def on_neurons(position: int, args: tuple) -> None:
        x, neurons = inputs.pop(position), args[0]
        sizes, mask = x.shape[:-1], batch_now.get("attention_mask")
        x, neurons = x.reshape(-1, x.shape[-1]), neurons.reshape(-1, neurons.shape[-1])
        text = torch.arange(len(x), device=x.device)
        text = text % sizes[-1] if mask is not None and tokens_first(mask.shape, sizes) else text // sizes[-1]
        real = real_tokens(model, sites[position], batch_now, *sizes)
        see(position, *((x, neurons, text) if real is None else (x[real], neurons[real], text[real])))

    def run(batch: Mapping[str, Any]) -> None:
        nonlocal batch_now
        check_batch(model, batch)
        batch_now = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        if is_causal(model):  # nothing here needs what the head predicts, a fifth of a small model's work
            model.base_model(**{key: value for key, value in batch_now.items() if key != "labels"})
        else:
            model(**batch_now)

    hooks = []
    for position, site in enumerate(sites):
        hooks.append(site.first.register_forward_pre_hook(lambda _, args, i=position: on_input(i, args)))
        hooks.append(site.down.register_forward_pre_hook(lambda _, args, i=position: on_neurons(i, args)))
    with hooked(hooks), evaluating(model), torch.no_grad():
        yield run
