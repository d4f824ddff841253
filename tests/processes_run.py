"""Run by torchrun in two processes, and by the tests in one: profiles, conversions and sweeps that processes share."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tiny import tiny_inputs, tiny_model  # noqa: E402

from moefy_hf import MoEficationConfig, evaluate, moefy_, profile  # noqa: E402
from moefy_hf.cli.main import main  # noqa: E402
from moefy_hf.conversion import fit_routers  # noqa: E402
from moefy_hf.errors import MoefyError  # noqa: E402
from moefy_hf.measure import rounds  # noqa: E402
from moefy_hf.measure.processes import ALONE, Processes, together  # noqa: E402

HEADS = {"bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}
BATCHES, TOKENS = 7, 12  # uneven for two processes; tokens of a batch that are no padding
# what cuts in the batch of the second process; in that of the first; at the end of one; and nothing
MOST = (5 * TOKENS + 7, 4 * TOKENS + 1, 4 * TOKENS, 10**6)
SETTINGS = {"expert_size": 8, "calibration_tokens": MOST[0], "splitter": "coactivation", "router": "linear", "k": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"allocation": "sensitivity"}),
    "t5": ("t5", {"allocation": "sensitivity"}),
    "one router for all layers": ("bert", {"router": "pre_gated", "allocation": "angular"}),
    "thresholds": ("bert", {"selection": "threshold", "compensation": True}),
}


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    made = [tiny_inputs(name, HEADS[name], seed) for seed in range(BATCHES)]
    for number, batch in enumerate(made):
        batch["labels"] = batch["decoder_input_ids"] if name == "t5" else torch.tensor([number % 2, 1])
    return made


def profiled(name: str, most: int, processes: Processes) -> dict[str, Any]:
    """What a profile is that keeps two batches or three of those that were run."""
    kept, rounds.KEPT_TOKENS = rounds.KEPT_TOKENS, 2 * TOKENS + 1
    model = tiny_model(name, HEADS[name])
    try:
        with profile(model, batches(name), max_tokens=most, progress=False, processes=processes) as found:
            sites = [[each.tokens, each.active, each.square, each.inputs.clone()] for each in found.sites]
            return {"sites": sites, "kept": len(found.batches)}
    finally:
        rounds.KEPT_TOKENS = kept


def converted(case: str, work: Path | None, processes: Processes) -> dict[str, Any]:
    """What a conversion comes to, and a sweep of it."""
    name, changes = CASES[case]
    model, config = tiny_model(name, HEADS[name]), MoEficationConfig(**SETTINGS | changes)
    options: dict[str, Any] = {"progress": False, "processes": processes}
    report = moefy_(model, config, batches(name), work_dir=work, **options)
    controls = ["oracle", "random", *(["teal"] if case == "bert" else [])]
    sweep = evaluate(model, batches(name), [0.3, 0.6], controls=controls, calibration=batches(name), **options)
    return {
        "orders": [site.act.neuron_order.clone() for site in model.moe_sites()],
        "routers": [site.act.router.state_dict() for site in model.moe_sites()],
        "section": model.config.moefication,
        "k": report.k,
        "fits": [fit.to_dict() for fit in report.fits],
        "tokens": report.calibration_tokens,
        "rows": sweep.rows,
        "facts": sweep.facts,
    }


def raised(data: list[dict[str, torch.Tensor]], processes: Processes) -> list[str]:
    """What each process raises where such data are profiled."""
    try:
        profile(tiny_model("bert", HEADS["bert"]), data, progress=False, processes=processes)
    except MoefyError as error:
        message = f"{type(error).__name__}: {error}"
    return processes.gathered(lambda: message)


def found(work: Path, processes: Processes) -> dict[Any, Any]:
    """Everything that is compared."""
    good, bad = batches("bert")[0], {"input_ids": torch.tensor([[1000]])}
    return {
        **{("profile", name, most): profiled(name, most, processes) for name in HEADS for most in MOST},
        **{case: converted(case, work if case == "bert" else None, processes) for case in CASES},
        "bad batch": raised([good, bad, good], processes),
        "nothing": raised([], processes),
    }


def die(*_: Any, **__: Any) -> None:
    """End as a process does that the system kills."""
    Path(sys.argv[2]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def run() -> None:
    """`die FILE COMMAND`: run a command until the second process ends. `share FOLDER COMMAND + COMMAND`: write what is
    compared, and run commands."""
    what, folder, *words = sys.argv[1:]
    if what == "die":
        if os.environ["RANK"] == "1":
            fit_routers._fit = die
        main(words)
        return
    dist.init_process_group("gloo")
    processes = together()
    assert processes.size == 2 and processes != ALONE
    result = found(Path(folder, "work"), processes)
    if processes.first:
        torch.save(result, Path(folder, "found.pt"))
    for command in " ".join(words).split(" + "):
        main(command.split())


if __name__ == "__main__":
    run()
