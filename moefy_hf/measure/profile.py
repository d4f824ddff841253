"""Profile a model's FFNs on calibration data: streaming sums per layer, and a bounded sample of FFN inputs on disk.

Everything a splitter or router learns from is a function of an FFN's weights and its inputs x, so the sample of x is
all that is kept; activations are recomputed from it, one layer and one chunk of tokens at a time.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import CalibrationError, MoefyError
from ..modeling.ffn_sites import FfnSite, FfnWeights, find_sites
from ..modeling.install import selected_sites
from .hooks import run_with_hooks
from .kept_profile import SUMS, Folder, Progress
from .metrics import OVERFLOW
from .processes import ALONE, Processes
from .progress import token_bar
from .rounds import Rounds
from .sample import FfnSample, TensorFile


class SiteProfile:
    """What calibration tokens do in one FFN.

    Attributes:
        tokens: number of tokens seen.
        active: (f,) how often each neuron was positive.
        mass: (f,) sum of |activation|.
        total: (f,) sum of activations.
        square: (f,) sum of squared activations.
        inputs: (T, d) sample of FFN inputs, memory-mapped, in the model's dtype; T <= tokens. None where none is kept:
            code that needs one takes `sample`.
    """

    def __init__(self, neurons: int):
        self.tokens = 0
        self.active, self.mass, self.total, self.square = (torch.zeros(neurons, dtype=torch.float64) for _ in range(4))
        self._inputs: torch.Tensor | TensorFile | None = None

    @property
    def inputs(self) -> torch.Tensor | None:
        """Return the sample; one that lies in a file is mapped anew, so that no more of it is held than is in use."""
        return self._inputs.mapped() if isinstance(self._inputs, TensorFile) else self._inputs

    @inputs.setter
    def inputs(self, inputs: torch.Tensor | TensorFile | None) -> None:
        self._inputs = inputs

    def update_(self, neurons: torch.Tensor) -> None:
        """Add tokens to the sums: neurons (T, f)."""
        a = neurons.float()
        self.tokens += len(a)
        self.active += (a > 0).sum(0).double().cpu()
        self.mass += a.abs().sum(0).double().cpu()
        self.total += a.sum(0).double().cpu()
        self.square += a.square().sum(0).double().cpu()

    def empty(self) -> "SiteProfile":
        """Return a profile of this FFN on no token."""
        return SiteProfile(len(self.active))

    def add_(self, other: "SiteProfile") -> None:
        """Add the sums of other tokens, whose number is counted elsewhere."""
        for name in SUMS:
            getattr(self, name).add_(getattr(other, name))

    @property
    def sample(self) -> FfnSample:
        """Return the sample of inputs.

        Raises:
            MoefyError: this profile kept none, or was closed.
        """
        if (inputs := self.inputs) is None:
            raise MoefyError("this profile kept no sample of FFN inputs; profile with sample=True")
        return FfnSample(inputs)

    @property
    def sampled(self) -> int:
        """Return the number of tokens whose inputs are kept."""
        inputs = self.inputs
        return 0 if inputs is None else len(inputs)

    @property
    def sparsity(self) -> float:
        """Return the share of activations that are not positive: exact zeros for ReLU."""
        return 1 - float(self.active.sum()) / max(self.tokens * len(self.active), 1)

    def activations(self, weights: FfnWeights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return chunks of the sample, as `FfnSample.activations` does.

        Raises:
            MoefyError: this profile kept no sample, or was closed.
        """
        return self.sample.activations(weights)


@dataclass
class ModelProfile:
    """One `SiteProfile` per FFN, in forward order. Use as a context manager: leaving it deletes the sample on disk.

    Attributes:
        batches: the first batches that were read, some thousand tokens, for what needs whole sequences.
        directory: where the sample lies.
    """

    sites: list[SiteProfile]
    batches: list[Mapping[str, Any]] = field(default_factory=list, repr=False)
    directory: tempfile.TemporaryDirectory | Folder | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Return how many tokens the FFN saw that saw most."""
        return max((site.tokens for site in self.sites), default=0)

    def file(self, name: str) -> TensorFile:
        """Return a new file beside the sample, for what is computed from it; it goes when the profile is closed.

        Raises:
            MoefyError: this profile keeps no sample.
        """
        if self.directory is None:
            raise MoefyError("this profile kept no sample of FFN inputs; profile with sample=True")
        return TensorFile(Path(self.directory.name, name))

    def close(self) -> None:
        """Delete the sample."""
        for site in self.sites:
            site.inputs = None
        if self.directory is not None:
            self.directory.cleanup()

    def __enter__(self) -> "ModelProfile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_sample(sites: Sequence[FfnSite], profile: ModelProfile) -> None:
    """Check that a profile has a sample of these FFNs.

    Raises:
        MoefyError: a profile of another number of FFNs, or without a sample.
    """
    if len(sites) != len(profile.sites):
        raise MoefyError(f"the profile has {len(profile.sites)} layers, the model {len(sites)} routed FFNs")
    if any(stats.inputs is None for stats in profile.sites):
        raise MoefyError("this profile kept no sample of FFN inputs, or was closed")


class NotFiniteError(CalibrationError):
    """Hidden states overflowed."""


def check_finite(name: str, x: torch.Tensor, neurons: torch.Tensor) -> None:
    """Check what an FFN read and computed.

    Args:
        name: of the FFN.
        x, neurons: (T, d), (T, f).

    Raises:
        NotFiniteError: inf or nan, from which nothing can be learned.
    """
    for what, values in (("input", x), ("neurons", neurons)):
        if not values.isfinite().all():
            raise NotFiniteError(f"{name}: the FFN's {what} are not finite in {values.dtype}: {OVERFLOW}")


def profile(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 50_000,
    sample: bool = True,
    towers: str | Sequence[str] | None = None,
    layers: list[int] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> ModelProfile:
    """Run calibration batches through the model once and describe what its FFNs do.

    Args:
        batches: model-ready batches (mappings of tensors); padding is left out by their `attention_mask`. Shuffle
            first: reading stops once `max_tokens` tokens were seen.
        sample: keep the FFN inputs of these tokens in a temporary directory on disk (TMPDIR; d numbers per token and
            layer), for splitters and routers that learn from data. Memory does not grow with the number of tokens.
        towers: parts of a composite model, see `MoEficationConfig`.
        layers: positions of the FFNs to profile; all by default.
        folder: keeps the sample, also when the profile is closed. One that was interrupted goes on there behind the
            last batch that was run; the same batches must be given. Processes that share the work keep nothing.
        progress: show a progress bar.
        processes: that share the work, see `together`. Each calls this with the same model and all batches, in the
            same order; each gets the whole profile, with a sample of its own on disk.

    Raises:
        MoefyError: unsupported model type, no token in `batches`, hidden states that are not finite, or a folder with
            the profile of other batches, or with several processes.
        OSError: the disk is full.

    Example:
        >>> [site.sparsity for site in profile(model, batches, max_tokens=10_000).sites]
    """
    if folder and processes.size > 1:
        raise MoefyError(f"{processes.size} processes share this profile, which is not kept then: leave `folder` out")
    sites = selected_sites(find_sites(model, towers), layers)
    result = ModelProfile([SiteProfile(site.sizes[1]) for site in sites])
    of = {"max_tokens": max_tokens, "ffns": [[site.key, *site.sizes] for site in sites]}
    state = Progress(result, of, sample, folder)
    rounds = Rounds(result, state.files, max_tokens, processes)
    bar = token_bar(max_tokens, "profile", progress, result.tokens)

    def see(position: int, x: torch.Tensor, neurons: torch.Tensor, text: torch.Tensor) -> None:
        check_finite(sites[position].name, x, neurons)
        bar.update(rounds.see(position, x, neurons) / len(sites))

    batch = None
    with bar, run_with_hooks(model, sites, see) as run:
        for batch in rounds.run(state.new(iter(batches)), run):
            if processes.size > 1:  # what others have run, too
                bar.update(result.tokens - bar.n)
            state.save(batch)
    if result.tokens == 0:
        result.close()
        raise MoefyError(why_empty(batches, batch))
    rounds.join_()
    state.map_sample()
    return result


def why_empty(batches: Iterable[Mapping[str, Any]], last: Mapping[str, Any] | None) -> str:
    """Return why calibration data held no token; `last` is the last batch that was read."""
    if last is None and iter(batches) is batches:
        return "calibration is an iterator that has no batch left: give a list, or a DataLoader"
    return "calibration is empty: no batch held a token that is not padding"
