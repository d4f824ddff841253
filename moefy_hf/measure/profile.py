"""Profile a model's FFNs on calibration data: streaming sums per layer, and a bounded sample of FFN inputs on disk.

Everything a splitter or router learns from is a function of an FFN's weights and its inputs x, so the sample of x is
all that is kept; activations are recomputed from it, one layer and one chunk of tokens at a time.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling.ffn_sites import FfnSite, FfnWeights, find_sites
from ..modeling.moefied import selected_sites
from .batches import check_batch
from .metrics import OVERFLOW, is_causal

CHUNK = 4096  # tokens whose activations are in memory at once
KEPT_TOKENS = 4096  # of the batches that a profile keeps as they are


class SiteProfile:
    """What calibration tokens do in one FFN.

    Attributes:
        tokens: number of tokens seen.
        active: (f,) how often each neuron was positive.
        mass: (f,) sum of |activation|.
        total: (f,) sum of activations.
        square: (f,) sum of squared activations.
        inputs: (T, d) sample of FFN inputs, memory-mapped, in the model's dtype; T <= tokens.
    """

    def __init__(self, neurons: int):
        self.tokens = 0
        self.active, self.mass, self.total, self.square = (torch.zeros(neurons, dtype=torch.float64) for _ in range(4))
        self.inputs: torch.Tensor | None = None

    def update_(self, neurons: torch.Tensor) -> None:
        """neurons (T, f): add these tokens to the sums."""
        a = neurons.float()
        self.tokens += len(a)
        self.active += (a > 0).sum(0).double().cpu()
        self.mass += a.abs().sum(0).double().cpu()
        self.total += a.sum(0).double().cpu()
        self.square += a.square().sum(0).double().cpu()

    @property
    def sampled(self) -> int:
        """Number of tokens whose inputs were kept."""
        return 0 if self.inputs is None else len(self.inputs)

    @property
    def sparsity(self) -> float:
        """Share of activations that are not positive: exact zeros for ReLU."""
        return 1 - float(self.active.sum()) / max(self.tokens * len(self.active), 1)

    def activations(self, weights: FfnWeights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Chunks of the sample: inputs (t, d) and what the FFN's neurons do on them (t, f), on the weights' device."""
        if self.inputs is None:
            raise ValueError("this profile kept no sample of FFN inputs; profile with sample=True")
        for x in self.inputs.split(CHUNK):
            x = x.to(weights.down.device)
            with torch.no_grad():  # left before each yield: readers keep their own gradient mode
                neurons = weights.neurons(x)
            yield x, neurons


@dataclass
class ModelProfile:
    """One `SiteProfile` per FFN, in forward order. Use as a context manager: leaving it deletes the sample on disk.

    `batches` are the first batches that were read, some thousand tokens, for what needs whole sequences.
    """

    sites: list[SiteProfile]
    batches: list[Mapping[str, Any]] = field(default_factory=list, repr=False)
    directory: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        return max((site.tokens for site in self.sites), default=0)

    def close(self) -> None:
        for site in self.sites:
            site.inputs = None
        if self.directory is not None:
            self.directory.cleanup()

    def __enter__(self) -> "ModelProfile":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def check_sample(sites: Sequence[FfnSite], found: ModelProfile) -> None:
    """
    Raises:
        ValueError: a profile of another number of FFNs, or without a sample.
    """
    if len(sites) != len(found.sites):
        raise ValueError(f"the profile has {len(found.sites)} layers, the model {len(sites)} routed FFNs")
    if any(stats.inputs is None for stats in found.sites):
        raise ValueError("this profile kept no sample of FFN inputs, or was closed")


class TensorFile:
    """Rows on their way into a file. They are written, not mapped: a full disk raises an OSError then, where a write
    into mapped memory would kill the process."""

    def __init__(self, path: Path):
        self.path, self.rows = path, 0
        self.file = open(path, "wb")

    def append(self, rows: torch.Tensor) -> None:
        """rows (t, d), of the same d and dtype in every call."""
        rows = rows.detach().cpu().contiguous()
        self.width, self.dtype, self.rows = rows.shape[1], rows.dtype, self.rows + len(rows)
        try:
            self.file.write(rows.view(torch.uint8).numpy().tobytes())
            self.file.flush()
        except OSError as error:
            what = f"{error.strerror} for the sample of FFN inputs; use fewer tokens, or set TMPDIR"
            raise OSError(error.errno, what, str(self.path)) from error

    def mapped(self) -> torch.Tensor:
        """(T, d): all rows, memory-mapped; nothing can be appended any more."""
        self.file.close()
        size = self.rows * self.width
        return torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype).view(self.rows, self.width)


def real_tokens(model: PreTrainedModel, site: FfnSite, batch: Mapping[str, Any], tokens: int) -> torch.Tensor | None:
    """(tokens,) bool: which of the tokens this FFN sees are no padding; None where nothing is padded.

    A mask of another length belongs to another sequence (CLIP's image tower beside its text) and is ignored.
    """
    mask = batch.get("attention_mask")
    if model.config.is_encoder_decoder and "decoder" in site.name.split("."):
        mask = batch.get("decoder_attention_mask")
        if mask is None and batch.get("labels") is not None:
            mask = batch["labels"] != -100
    if mask is None or mask.numel() != tokens:
        return None
    return mask.reshape(-1).bool().to(site.down.weight.device)  # models may lie on several devices


@contextmanager
def observed(
    model: PreTrainedModel, sites: list[FfnSite], seen: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Run batches through the model in evaluation mode and show each FFN to
    `seen(position, x (T, d), neurons (T, f), text (T,))`; `text` numbers the rows of the batch that tokens are of.

    Yields a function that runs one batch; tokens that are padding are left out. Hooks and the training mode are
    restored when the context ends.
    """
    handles, training = [], model.training
    current: Mapping[str, Any] = {}
    inputs: dict[int, torch.Tensor] = {}
    device = next(model.parameters()).device

    def on_input(position: int, args: tuple) -> None:
        inputs[position] = args[0]

    def on_neurons(position: int, args: tuple) -> None:
        x, a = inputs.pop(position), args[0]
        length = x.shape[-2]
        x, a = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1])
        text = torch.arange(len(x), device=x.device) // length
        real = real_tokens(model, sites[position], current, len(x))
        seen(position, *((x, a, text) if real is None else (x[real], a[real], text[real])))

    def run(batch: Mapping[str, Any]) -> None:
        nonlocal current
        check_batch(model, batch)
        current = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        if is_causal(model):  # nothing here needs what the head predicts, a fifth of a small model's work
            model.base_model(**{key: value for key, value in current.items() if key != "labels"})
        else:
            model(**current)

    for position, site in enumerate(sites):
        handles.append(site.first.register_forward_pre_hook(lambda _, args, i=position: on_input(i, args)))
        handles.append(site.down.register_forward_pre_hook(lambda _, args, i=position: on_neurons(i, args)))
    model.eval()
    try:
        with torch.no_grad():
            yield run
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


class NotFiniteError(ValueError):
    """Hidden states overflowed."""


def check_finite(name: str, x: torch.Tensor, neurons: torch.Tensor) -> None:
    """
    Raises:
        NotFiniteError: the FFN read or computed inf or nan, from which nothing can be learned.
    """
    for what, values in (("input", x), ("neurons", neurons)):
        if not values.isfinite().all():
            raise NotFiniteError(f"{name}: the FFN's {what} are not finite in {values.dtype}: {OVERFLOW}")


def profile(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 100_000,
    sample: bool = True,
    layers: list[int] | None = None,
    progress: bool = True,
) -> ModelProfile:
    """Run calibration batches through the model once and describe what its FFNs do.

    Args:
        batches: model-ready batches (mappings of tensors); padding is left out by their `attention_mask`. Shuffle
            first: reading stops once `max_tokens` tokens were seen.
        sample: keep the FFN inputs of these tokens in a temporary directory on disk (TMPDIR; d numbers per token and
            layer), for splitters and routers that learn from data. Memory does not grow with the number of tokens.
        layers: positions of the FFNs to profile; all by default.
        progress: show a progress bar.

    Raises:
        ValueError: unsupported model type, no token in `batches`, or hidden states that are not finite.
        OSError: the disk is full.
    """
    sites = selected_sites(find_sites(model), layers)
    result = ModelProfile([SiteProfile(site.sizes[1]) for site in sites])
    files = []
    if sample:
        result.directory = tempfile.TemporaryDirectory(prefix="moefy_profile_")
        files = [TensorFile(Path(result.directory.name, f"{position}.bin")) for position in range(len(sites))]
    bar = tqdm(total=max_tokens, unit="token", unit_scale=True, desc="profile", disable=not progress)

    def seen(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        stats = result.sites[position]
        check_finite(sites[position].name, x, neurons)
        x, neurons = x[: max_tokens - stats.tokens], neurons[: max_tokens - stats.tokens]
        if sample and len(x):
            files[position].append(x)
        stats.update_(neurons)
        bar.update(len(x) / len(sites))

    batch = None
    with bar, observed(model, sites, seen) as run:
        for batch in batches:
            before = result.tokens
            run(batch)
            if before < KEPT_TOKENS:
                result.batches.append(batch)
            if result.tokens >= max_tokens:
                break
    if result.tokens == 0:
        result.close()
        if batch is None and iter(batches) is batches:
            raise ValueError("calibration is an iterator that has no batch left: give a list, or a DataLoader")
        raise ValueError("calibration is empty: no batch held a token that is not padding")
    for stats, file in zip(result.sites, files, strict=False):  # no file where nothing is kept
        if file.rows:
            stats.inputs = file.mapped()
    return result
