"""What the commands share: arguments of every command on a model, and how models, tokenizers and texts are read."""

import argparse
import contextlib
import platform
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..arguments import add_arguments, given, positive
from ..data import TextBatches, Texts, TextSource, TextTable, TokenBudget, decoder_start_of, longest_text
from ..errors import MoefyError, NotMoefied
from ..hub.card import moefied_config
from ..loading import MoefiedModel, check_moefied, load
from ..modeling.moefied import is_moefied

logger = logging.get_logger("moefy_hf")
_FOLDERS: list[TemporaryDirectory] = []  # that go when the process ends
DTYPES = ("auto", "float32", "bfloat16", "float16")
DATA = (
    "csv, tsv, json lines or parquet file, plain text with a text per line, a folder of one kind of these, - for "
    "standard input, or a dataset of the Hub: imdb:test, owner/name:train, owner/name/config; glue/sst2 is "
    "configuration sst2 of glue, as there is a dataset glue without an owner. Files win over datasets"
)
NEW_FOLDER = "folder that gets it; must not exist"


def of_model(
    command: argparse.ArgumentParser, run: Callable, show: Callable, *, optional: bool = False
) -> argparse.ArgumentParser:
    """Give a command the arguments of every command on a model; return it.

    Args:
        command: the parser.
        run: computes the result, a dict, from the parsed arguments.
        show: makes the printed text of the result.
        optional: whether MODEL may be left out.
    """
    command.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help="Hub id or local folder")
    command.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="load in this type (default: as saved)")
    head = "AutoModelForMaskedLM or another Auto class, where its config does not say which head it has"
    command.add_argument("--head", metavar="AUTO", help=head)
    trust = "run code that comes with MODEL, if it has any"
    command.add_argument("--trust_remote_code", action="store_true", help=trust)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run, show=show)
    return command


def add_data(
    command: argparse.ArgumentParser,
    *,
    required: bool,
    help: str = DATA,
    seed: bool = True,
    max_length: int | None = 256,
    leave_out: tuple[str, ...] = (),
) -> None:
    """Give a command the arguments that name texts: the fields of `TextSource`, of which --data is the path.

    Args:
        command: the parser.
        required: whether --data must be given.
        help: of --data.
        seed: whether the command has --seed, which orders the texts.
        max_length: tokens of a text by default.
        leave_out: fields that the command has no use for.
    """
    command.add_argument("--data", required=required, help=help)
    tokens = "tokens of a text; longer ones are cut (default: 256)"
    command.add_argument("--max_length", type=positive, default=max_length, help=tokens)
    if seed:
        command.add_argument("--seed", type=int, default=0, help="of the order of texts (default: 0)")
    add_arguments(command, TextSource, ("path", *leave_out), flags=True)


def open_data(args: Namespace, path: str | None = None) -> TextTable:
    """Open the texts of --data, or others with the same columns.

    Raises:
        MoefyError: there are none, they cannot be read, or a column is missing.
    """
    return TextSource(path or args.data, **given(args, TextSource)).open()


def add_towers(command: argparse.ArgumentParser) -> None:
    """Give a command the argument that names parts of a composite model."""
    command.add_argument("--towers", nargs="+", metavar="TOWER", help="text (the default), vision, audio, all")


def show_table(result: dict[str, Any]) -> str:
    """Return the table of a result, which is what its command prints."""
    return result["table"]


def show_output(result: dict[str, Any]) -> str:
    """Return the folder of a result, which is what its command prints."""
    return result["output"]


def new_folder(path: str) -> Path:
    """Return the path of a folder that is going to be made.

    Raises:
        MoefyError: there is something at this path.
    """
    if Path(path).exists():
        raise MoefyError(f"{path} exists: choose another OUTPUT")
    return Path(path)


def load_model(args: Namespace, offloaded: bool = False) -> PreTrainedModel:
    """Load MODEL on the accelerator, where there is one; in float32 where the processor knows no bfloat16.

    Args:
        args: with MODEL.
        offloaded: leave weights on disk until they are used, and compute on the CPU.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = load_as_saved(args, offloaded)
    if device is not None and not offloaded:
        return model.to(device)  # type: ignore[arg-type]
    if args.dtype == "auto" and model.dtype == torch.bfloat16 and not computes_bfloat16():
        logger.warning("this processor has no bfloat16: computing in float32 (--dtype bfloat16 keeps it, slowly)")
        model.float()
    return model


def load_as_saved(args: Namespace, offloaded: bool = False) -> PreTrainedModel:
    """Load MODEL on the CPU, in --dtype.

    Args:
        args: with MODEL.
        offloaded: leave weights on disk until they are used.
    """
    options: dict[str, Any] = {"head": args.head, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if offloaded:
        _FOLDERS.append(TemporaryDirectory(prefix="moefy_offload_"))  # for weights that are saved in another shape
        options |= {"device_map": {"": "disk"}, "offload_folder": _FOLDERS[-1].name}
    return load(args.model, args.revision, **options)


def load_moefied(args: Namespace) -> MoefiedModel:
    """Load MODEL, at the budget --k where that is given.

    Raises:
        NotMoefied: it is dense.
    """
    model = check_is_moefied(args, load_model(args))
    if args.k is not None:
        model.set_selection(k=args.k, allocation="uniform")
    return model


def check_is_moefied(args: Namespace, model: PreTrainedModel) -> MoefiedModel:
    """Return the model itself, which a type checker knows to be MoEfied from here on.

    Raises:
        NotMoefied: it is dense.
    """
    if not is_moefied(model):
        raise NotMoefied(f"{args.model} is not MoEfied: moefy convert makes a checkpoint that is")
    return check_moefied(model)


def computes_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16; without, it is several times as slow as float32."""
    x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return x86 or platform.machine() in ("aarch64", "arm64")


def as_loaded(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in the type that it was loaded in, whichever it computed in; routers stay in float32."""
    if model.config.dtype is not None and model.config.dtype != model.dtype:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not set(name.split(".")) & set(model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.to(model.config.dtype)
    return model


def read_for_calibration(
    args: Namespace,
    table: TextTable,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    labels: bool = False,
) -> Texts:
    """Read the texts for something that uses at most so many tokens: of --streaming no more than that takes.

    Raises:
        MoefyError: what `TextTable.read` finds wrong.
    """
    check_reads_texts(model)
    return table.read(
        model, labels=labels, enough=TokenBudget(tokenizer, longest_text(model, tokenizer, args.max_length), tokens)
    )


def text_batches(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    labels: str | None = None,
) -> TextBatches:
    """Make batches of texts as a model reads them.

    Args:
        args: with --max_length and --seed.
        model: that reads them.
        tokenizer: of the model.
        texts: the texts.
        labels: see `TextBatches`.

    Raises:
        MoefyError: the model does not read texts.
    """
    check_reads_texts(model)
    return TextBatches(
        texts,
        tokenizer,
        labels=labels,
        max_length=longest_text(model, tokenizer, args.max_length),
        seed=args.seed,
        decoder_start=decoder_start_of(model),
    )


def check_reads_texts(model: PreTrainedModel) -> None:
    """Check that a model reads texts.

    Raises:
        MoefyError: it does not.
    """
    if model.main_input_name != "input_ids":
        raise MoefyError(
            f"a {model._get_name()} reads {model.main_input_name}, not texts: use moefy_hf in Python, or a recipe"
        )


def load_tokenizer(args: Namespace) -> PreTrainedTokenizerBase:
    """Load MODEL's tokenizer.

    Raises:
        MoefyError: transformers cannot make it.
        OSError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=args.trust_remote_code
        )
    except ValueError as error:
        raise MoefyError(f"the tokenizer of {args.model} cannot be loaded: {error}") from error


def save_beside(args: Namespace, model: PreTrainedModel, folder: Path) -> None:
    """Save a model made of MODEL, in MODEL's type, with its tokenizer and image processor.

    Args:
        args: with MODEL.
        model: what is saved.
        folder: where.
    """
    as_loaded(model).save_pretrained(folder)
    trusted = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    for auto in (AutoTokenizer, AutoImageProcessor):
        with contextlib.suppress(ValueError, OSError, ImportError, KeyError):  # it has none
            auto.from_pretrained(args.model, **trusted).save_pretrained(folder)


def checkpoint_folder(args: Namespace) -> Path:
    """Return the folder of MODEL, for what is written beside its weights.

    Raises:
        MoefyError: it is no folder with a checkpoint.
        NotMoefied: the checkpoint is dense.
    """
    folder = Path(args.model)
    moefied_config(folder)
    return folder
