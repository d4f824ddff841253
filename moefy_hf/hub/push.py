"""Push a MoEfied checkpoint to the Hub: save, verify in a clean process, write the card, upload as one commit."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import MoefyError, PushError, UnsupportedModel, VerificationError
from ..io import is_hub_id, written_whole
from ..loading import check_moefied
from ..measure.metrics import is_adapted
from ..modeling.section import Section
from .card import is_rendered, known_facts, moefied_config, write_card
from .eval_results import FOLDER as EVAL_RESULTS
from .facts import add_facts, as_json
from .verification import verify

logger = logging.get_logger("moefy_hf")

# what a Trainer adds to a checkpoint, some of it with tokens and paths of this machine; `upload` adds hidden files
LEFT_OUT = [
    *("**/.*", "__pycache__/*", "*.tmp", "checkpoint-*/*", "runs/*", "optimizer*", "scheduler.pt", "scaler.pt"),
    *("rng_state*", "trainer_state.json", "training_args.bin", "global_step*", "latest", "zero_to_fp32.py"),
    "pytorch_model_fsdp*",
]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]  # old ones would be loaded first


@dataclass(frozen=True)
class Destination:
    """Says where a checkpoint goes on the Hub, and how; the fields are arguments of `push_to_hub`.

    Raises:
        MoefyError: no repository id, or a branch for a pull request.
    """

    repo_id: str
    branch: str | None
    private: bool | None
    create_pr: bool
    overwrite: bool
    message: str

    def __post_init__(self):
        if "/" not in self.repo_id:
            raise MoefyError(f"{self.repo_id!r} is no repository: give 'owner/name'")
        if self.create_pr and self.branch is not None:
            raise MoefyError(f"a pull request is against main: give branch={self.branch!r} or create_pr, not both")

    def command(self, folder: Path) -> str:
        """Return the command that pushes a folder there."""
        flags = [f"--{name}" for name, on in (("create_pr", self.create_pr), ("overwrite", self.overwrite)) if on]
        flags += ["--private"] if self.private else []
        flags += [] if self.branch is None else ["--branch", self.branch]
        return shlex.join(["moefy", "push", str(folder), self.repo_id, *flags, "--message", self.message])


def push_to_hub(
    source: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    folder: str | Path | None = None,
    processor: Any = None,
    facts: Mapping[str, Any] | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    token: str | None = None,
    message: str = "MoEfied checkpoint",
) -> CommitInfo:
    """Upload a MoEfied model with its modeling files, card and figures, as one commit, once it was verified.

    Verified means: a new Python process that cannot import this package loads it and gets the same outputs. Files that
    the repository already has are not uploaded again: after a failure, push the folder again. A card that somebody has
    edited stays, in the folder or in the repository. Old weights are deleted there.

    Args:
        source: a model, or the folder of a saved one.
        repo_id: "owner/name"; created where it does not exist.
        folder: where a model is saved first; must not exist. By default the name in repo_id.
        processor: tokenizer, image processor or feature extractor to save beside it.
        facts: model card data, what is known beyond the config: see `moefy_hf.hub.facts.PARTS`.
        inputs: model inputs to verify with; by default made up from the config.
        private: visibility of a new repository; by default the owner's setting.
        branch: push to this branch, created where it does not exist.
        create_pr: open a pull request instead of committing.
        overwrite: also push to a repository that holds something which is not MoEfied.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.
        message: of the commit.

    Raises:
        MoefyError: dense, an unknown part of facts, or no repository id; nothing was written or sent.
        FileExistsError: `folder` exists.
        PushError: no token, a repository that is refused, a checkpoint that failed verification, or the network.

    Example:
        >>> push_to_hub(model, "me/bert-moe", processor=tokenizer, facts={"calibration": "imdb"}).commit_url
    """
    destination = Destination(repo_id, branch, private, create_pr, overwrite, message)
    facts = as_json(facts or {})
    model, folder = model_and_folder(source, folder or repo_id.rpartition("/")[2])
    api = HfApi(token=token)
    check_repository(api, repo_id, branch, overwrite)
    save(model, folder, processor)
    add_facts(folder, **facts)
    add_license(folder, api)
    try:
        verify(folder, model, inputs)
    except VerificationError as error:
        raise PushError(f"{folder} was not pushed: {error}") from error
    return upload(api, folder, destination)


def model_and_folder(source: PreTrainedModel | str | Path, folder: str | Path) -> tuple[PreTrainedModel | None, Path]:
    """Return what is pushed: a model and the folder for it, or None and the folder of a saved one.

    Args:
        source: a model, or the folder of a saved one.
        folder: where a model is going to be saved.

    Raises:
        UnsupportedModel: a model with an adapter.
        NotMoefied: a dense model or checkpoint.
        FileExistsError: `folder` exists.
    """
    if is_adapted(source):
        raise UnsupportedModel("an adapter is not pushed with its model: merge_and_unload it first")
    if not isinstance(source, PreTrainedModel):
        moefied_config(Path(source))
        return None, Path(source)
    check_moefied(source)
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists: choose another folder, or push what is there by its name")
    return source, Path(folder)


def save(model: PreTrainedModel | None, folder: Path, processor: Any = None) -> None:
    """Save a model, where there is one, and its processor, where there is one.

    Args:
        model: the model, or None.
        folder: a new one for a model, or that of a saved one.
        processor: what its `save_pretrained` writes there, or None.
    """
    if model is None:
        if processor is not None:
            processor.save_pretrained(folder)
        return
    with written_whole(folder) as unfinished:
        model.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)


def check_repository(api: HfApi, repo_id: str, branch: str | None, overwrite: bool) -> None:
    """Check before any work that a repository can be pushed to.

    Args:
        api: with the token.
        repo_id: "owner/name".
        branch: that is pushed to, or None for main.
        overwrite: also accept a repository that holds something which is not MoEfied.

    Raises:
        PushError: no valid token, or something that is not MoEfied would be overwritten.
    """
    if not isinstance(api.token, str) and get_token() is None:
        raise PushError("there is no token: run `hf auth login`, set HF_TOKEN, or pass token")
    try:
        api.whoami()
        files, revision = files_of(api, repo_id, branch)
        if overwrite or set(files) <= {".gitattributes", "README.md"}:
            return
        path = "config.json" in files and api.hf_hub_download(repo_id, "config.json", revision=revision)
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except Exception as error:  # of the network, in whatever words
        raise PushError(f"cannot push to {repo_id}: {error}") from error
    if Section.of(config) is None:
        raise PushError(
            f"{repo_id} holds something that is not a MoEfied model ({', '.join(files[:3])}, ...): choose another "
            "repository, or overwrite=True (--overwrite)"
        )


def files_of(api: HfApi, repo_id: str, branch: str | None) -> tuple[list[str], str | None]:
    """Return the files that a push would change, and their revision.

    A new branch starts with the files of main, whose revision is None. A new repository has no files.

    Args:
        api: of the Hub.
        repo_id: "owner/name".
        branch: that is pushed to, or None for main.
    """
    try:
        return api.list_repo_files(repo_id, revision=branch), branch
    except RevisionNotFoundError:
        return api.list_repo_files(repo_id), None
    except RepositoryNotFoundError:
        return [], None


def add_license(folder: Path, api: HfApi) -> None:
    """Add the base model's licence to the model card data, where the Hub knows it; warn where it cannot be read.

    Args:
        folder: of the checkpoint.
        api: of the Hub.
    """
    facts = known_facts(folder)
    base = facts.get("base_model")
    if "license" in facts or base is None or not is_hub_id(base):
        return
    try:
        card = api.model_info(base).card_data
    except Exception as error:
        logger.warning(f"the card names no licence: that of {base} could not be read ({error})")
        return
    if card is not None and isinstance(card.license, str):  # a list of licences is not one
        add_facts(folder, license=card.license)


def renew_card(api: HfApi, folder: Path, repo_id: str, branch: str | None) -> None:
    """Render the card, unless there is one, here or in the repository, that somebody has edited.

    Args:
        api: of the Hub.
        folder: of the checkpoint.
        repo_id: "owner/name".
        branch: that is pushed to, or None for main.
    """
    path = folder / "README.md"
    if path.exists() and not is_rendered(path.read_text(encoding="utf-8")):
        return
    files, revision = files_of(api, repo_id, branch)
    if "README.md" in files:
        text = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
        if not is_rendered(text):
            path.write_text(text, encoding="utf-8")
            logger.warning(f"the card of {repo_id} is kept as it is: somebody has written in it")
            return
    write_card(folder, repo_id, branch, overwrite=True)


def upload(api: HfApi, folder: Path, destination: Destination) -> CommitInfo:
    """Upload a folder with its card, as one commit.

    Args:
        api: with the token.
        folder: of a verified checkpoint.
        destination: where it goes.

    Raises:
        PushError: the upload failed; the message has the command that continues it.
    """
    repo_id, branch = destination.repo_id, destination.branch
    hidden = [f"{path.name}{'/' * path.is_dir()}" for path in folder.glob(".*") if path.name != EVAL_RESULTS]
    try:
        renew_card(api, folder, repo_id, branch)
        api.create_repo(repo_id, private=destination.private, exist_ok=True)
        if branch is not None and not branch.startswith("refs/"):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=destination.message,
            revision=branch,
            create_pr=destination.create_pr,
            ignore_patterns=[*LEFT_OUT, *hidden],
            delete_patterns=WEIGHTS,
        )
    except Exception as error:  # of the network, in whatever words
        cause = error if error.__cause__ is None else f"{error} {error.__cause__}"
        raise PushError(
            f"the upload to {repo_id} failed: {cause}. {folder} is complete and verified; what was uploaded is not "
            f"sent again: {destination.command(folder)}"
        ) from error
