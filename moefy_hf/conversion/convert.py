"""`moefy_`: a dense model becomes its MoEfied self, in place."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import MoEficationConfig
from ..io import is_hub_id
from ..loading import check_moefied
from ..measure.processes import ALONE, Processes
from ..measure.profile import ModelProfile, NotFiniteError, profile
from .budgets import COMPARING_PREDICTIONS
from .checks import check_convertible, check_predictions, check_profile, with_allocation
from .compensation import compensate_
from .fit_routers import RouterFit
from .pipeline import find_experts_, timed
from .work import Work, identity

logger = logging.get_logger("moefy_hf")


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        experts, expert_sizes: E and m of each FFN.
        k: experts that a token computes in each FFN, on average; None where nobody has measured it.
        calibration_tokens: that the dense model was profiled on.
        sparsity: share of each FFN's neurons that are not active, over tokens and neurons.
        fits: how well each router finds its experts; empty without calibration data.
        seconds: that each step took.
        base_model: the Hub id that the dense model was loaded by, if it was.

    Example:
        >>> report = moefy_(model, MoEficationConfig(k=0.25), batches)
        >>> print(report.table())
    """

    experts: list[int]
    expert_sizes: list[int]
    k: list[float | None]
    calibration_tokens: int
    sparsity: list[float]
    fits: list[RouterFit]
    seconds: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Return a Markdown table, a line per FFN: sizes, budget, and how well its router finds the best experts."""
        lines = ["| FFN | experts | k | not active | captured | oracle | random |", "|---|---|---|---|---|---|---|"]
        for position, (experts, size, k) in enumerate(zip(self.experts, self.expert_sizes, self.k, strict=True)):
            cells = [str(position), f"{experts} of {size}", "?" if k is None else f"{k:.4g}"]
            if self.fits:
                fit = self.fits[position]
                cells += [f"{share:.1%}" for share in (self.sparsity[position], fit.captured, fit.oracle, fit.random)]
            lines.append("| " + " | ".join(cells + [""] * (7 - len(cells))) + " |")
        return "\n".join(lines)


def moefy_(
    model: PreTrainedModel,
    config: MoEficationConfig | None = None,
    calibration: Iterable[Mapping[str, Any]] | ModelProfile | None = None,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> ConversionReport:
    """MoEfy a dense model in place: profile, split, route, select. The same Python object, now of its Moefied class.

    Parameters stay where they are; neurons are permuted, and routers are added (MoEfication, section 3).

    Args:
        calibration: model-ready batches (mappings of tensors), shuffled; or a profile of this model, made with
            `profile`, to convert copies of it in several ways. Methods that learn nothing from data (splits "random",
            "parameter_clustering" and "gate_clustering" with routers that are not fitted) work without.
        work_dir: folder that keeps what is found, batch by batch and layer by layer. A conversion that was interrupted
            goes on from there, given the same model, settings and batches. It may be deleted afterwards.
        processes: that share the work, see `moefy_hf.measure.processes.together`. Each is given the same, and has the
            whole converted model afterwards; a `work_dir`, which all of them see, then keeps layers only.

    Raises:
        MoefyError: unsupported, already MoEfied, wrapped, adapted or sharded model, part of a larger one, settings
            that do not fit it, missing, too little or not finite calibration data, or a `work_dir` of another
            conversion. The model is unchanged then.

    Example:
        >>> report = moefy_(model, MoEficationConfig(expert_size=32, k=0.2), batches)
        >>> model.save_pretrained("my-moe")
    """
    config = config or MoEficationConfig()
    sites, sizes = check_convertible(model, config, calibration)
    config, base_model = with_allocation(config, model, calibration is not None), model.name_or_path or ""
    seconds: dict[str, float] = {}
    work = None
    if work_dir is not None:
        about = {"settings": asdict(config)}
        work = processes.by_first(lambda: Work(work_dir, about | {"model": identity(model, sites)}))
    with profile_of(model, calibration, config, work, seconds, progress, processes) as dense:
        if dense is not None:
            check_profile(config, sites, sizes, dense)
            if config.allocation in COMPARING_PREDICTIONS:
                check_predictions(model, dense.batches)
        experts = find_experts_(model, sites, config, dense, work=work, progress=progress, processes=processes)
        (moefied := check_moefied(model)).set_selection(**config.selection_section())
        seconds |= experts.seconds
        if config.compensation and dense is not None:
            with timed(seconds, "compensation"):
                compensate_(moefied, dense, progress=progress)
    return ConversionReport(
        experts=[experts for experts, _ in sizes],
        expert_sizes=[size for _, size in sizes],
        k=[site.act.k for site in moefied.moe_sites()],
        calibration_tokens=dense.tokens if dense else 0,
        sparsity=[stats.sparsity for stats in dense.sites] if dense else [],
        fits=experts.fits,
        seconds=seconds,
        base_model=base_model if is_hub_id(base_model) else None,
    )


@contextmanager
def profile_of(
    model: PreTrainedModel,
    calibration: Iterable[Mapping[str, Any]] | ModelProfile | None,
    config: MoEficationConfig,
    work: Work | None,
    seconds: dict[str, float],
    progress: bool,
    processes: Processes,
) -> Iterator[ModelProfile | None]:
    """Give the profile that a conversion uses, and close it afterwards unless it is the caller's.

    It is None without calibration data, and where that is not finite and nothing in `config.needs()` it.
    """
    if calibration is None or isinstance(calibration, ModelProfile):
        yield calibration
        return
    dense = None
    try:
        with timed(seconds, "profile"):
            which: dict[str, Any] = {"towers": config.towers, "layers": config.layers}
            which["folder"] = work.folder / "profile" if work and processes.size == 1 else None
            options: dict[str, Any] = {"progress": progress, "processes": processes}
            dense = profile(model, calibration, max_tokens=config.calibration_tokens, **which, **options)
    except NotFiniteError as error:
        if config.needs():
            raise
        logger.warning(f"converted without calibration, which nothing here needs: {error}")
    with dense or nullcontext():
        yield dense
