"""Write a MoEfied model for ONNX Runtime, in files that are named as optimum names them."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import MoefyError, VerificationError
from ..loading import MoefiedModel
from ..measure.contexts import evaluating
from ..measure.made_up_inputs import made_up_batch
from .onnx_ffn import check_ffn
from .onnx_graphs import session_of, write_part
from .onnx_parts import Example, composite, inputs_for, made_up_batches, parts_of
from .onnx_times import times_of

FACTS = "moefy_onnx.json"
CLOSE = 1e-3  # largest difference, of the largest output: more is another function, not another order of sums
INT8_CLOSE = (
    0.25  # mean difference, of the mean output: bytes cost a few percent, and tokens near a tie route otherwise
)


def check_onnx(model: MoefiedModel) -> None:
    """Check, before anything is written, that a model can be exported for ONNX Runtime.

    Raises:
        MoefyError: a package is missing, or the model is none that can be; says what to change.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise MoefyError(f"ONNX export needs {', '.join(missing)}: pip install 'moefy-hf[onnx]'")
    if model.can_generate() and model.config.sub_configs:
        raise MoefyError(f"{model._get_name()} is {composite(model)}")
    if model.dtype != torch.float32:
        raise MoefyError(f"this model is {model.dtype}; ONNX is written from float32: model.float() first")
    if model.device.type != "cpu":
        raise MoefyError(f"this model is on {model.device.type}; ONNX is written from the CPU: model.cpu() first")
    for site in model.moe_sites():
        check_ffn(site)
    if not model.can_generate():
        inputs_for(model, made_up_batch(model))


def write_onnx(
    model: MoefiedModel,
    folder: Path,
    int8: bool = False,
    batches: Iterable[Mapping[str, Any]] | None = None,
    timing: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the ONNX files of a model and what is known of them, `moefy_onnx.json`, to a folder.

    Args:
        model: it has passed `check_onnx`.
        folder: that gets the files; it may have a tokenizer, which transformers 4 can read then.
        int8: whether matrices become 8-bit; routers stay in float32.
        batches: inputs on which the graphs are compared with the model; made up by default.
        timing: whether the graphs are timed against those of the dense model.
        progress: whether a bar is shown.

    Returns:
        the facts: the largest difference as a share of the largest output, the mean one as a share of the mean output,
            the largest one for each kind of input, the operator of each FFN, and `times_of`.

    Raises:
        UnsupportedModel: torch.onnx cannot write its graph, or its inputs are neither texts nor images.
        VerificationError: a graph gives something else than the model.
    """
    tokenizer_for_optimum(folder)
    operators: dict[str, str] = {}
    found: dict[str, tuple[float, float]] = {}
    with masked(model), evaluating(model), torch.no_grad():
        given = list(batches or ()) or made_up_batches(model)
        parts = parts_of(model, [made_up_batch(model), *given])
        for part in tqdm(parts, desc="ONNX", unit="file", disable=not progress):
            operators |= write_part(model, part, folder, int8)
            for kind, each in differences(folder / part.file, part.compared).items():
                found[kind] = tuple(map(max, each, found.get(kind, each)))  # type: ignore[assignment]
        largest, mean = (max(numbers) for numbers in zip(*found.values(), strict=True))
        if not (mean <= INT8_CLOSE if int8 else largest <= CLOSE):
            raise VerificationError(
                f"in ONNX Runtime this {model._get_name()} differs by {largest:.1e} of its largest output, and by "
                f"{mean:.1e} on average, which is no rounding: nothing was written"
            )
        facts: dict[str, Any] = {"largest_difference": largest, "mean_difference": mean}
        facts |= {"differences": {kind: each[0] for kind, each in found.items()}}
        facts |= {"int8": int8, "operators": operators}
        if timing:
            facts["times_dense"] = times_of(model, folder, int8, progress)
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def tokenizer_for_optimum(folder: Path) -> None:
    """Let transformers 4, which optimum needs, read the tokenizer in a folder, too.

    Version 5 has one more class of tokenizers, and another name for further special tokens. It reads both.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def differences(path: Path, examples: list[Example]) -> dict[str, tuple[float, float]]:
    """Return the largest and the mean difference between a file and what the model gave, for each kind of input.

    They are shares of the largest and of the mean output, and those of the output that is worst.
    """
    session = session_of(path)
    found: dict[str, tuple[float, float]] = {}
    for example in examples:
        results = session.run(list(example.outputs), {name: value.numpy() for name, value in example.inputs.items()})
        for result, (name, want) in zip(results, example.outputs.items(), strict=True):
            real = example.real.get(name, torch.ones(()).bool()).expand_as(want)
            if not real.any():  # padding alone
                continue
            off, want = (torch.from_numpy(result) - want).abs().nan_to_num(torch.inf)[real], want[real].abs()
            shares = float(off.max() / want.max().clamp_min(1e-12)), float(off.mean() / want.mean().clamp_min(1e-12))
            worst = found.get(example.kind, shares)
            found[example.kind] = max(shares[0], worst[0]), max(shares[1], worst[1])
    return found


@contextlib.contextmanager
def masked(model: MoefiedModel) -> Iterator[None]:
    """Let a model run masked for a while, which is what a graph is compared with."""
    from ..runtime.sparse_ffn import sparse_ffn_of

    running = [ffn for site in model.moe_sites() if (ffn := sparse_ffn_of(site)) is not None]
    for ffn in running:
        ffn.remove_()
    try:
        yield
    finally:
        for ffn in running:
            ffn.install_()
