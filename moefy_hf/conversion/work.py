"""What a conversion has found so far, on disk: one that was interrupted goes on from there."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..io import write_whole, written_file
from ..modeling.ffn_sites import FfnSite

Found = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]  # tensors, and what JSON can say


class Work:
    """A folder with what a conversion has found so far, layer by layer.

    Args:
        folder: is made where there is none.
        of: what is converted, and how, as JSON can say it.

    Raises:
        MoefyError: the folder holds something else, or the work of another conversion.
    """

    def __init__(self, folder: str | Path, of: Mapping[str, Any]):
        self.folder = Path(folder)
        about, text = self.folder / "conversion.json", json.dumps(of, indent=1, sort_keys=True, default=str)
        if about.exists():
            if about.read_text(encoding="utf-8") != text:
                raise MoefyError(
                    f"{folder} holds an unfinished conversion with other settings, or of another model: delete it to "
                    "start anew, or convert as before to go on"
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise MoefyError(f"{folder} holds something else than an unfinished conversion: choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(about, text)

    def found(self, name: str, find: Callable[[], Found]) -> Found:
        """Return what was found under a name; find and keep it, where nothing was."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            tensors, facts = find()
            with written_file(path) as temporary:
                held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(held, temporary, metadata={"facts": json.dumps(facts)})
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])


def identity(model: PreTrainedModel, sites: Sequence[FfnSite]) -> dict[str, Any]:
    """Return what tells one model from another of its kind: the weights of its first and last FFN."""
    weights = [site.weights().down.detach().cpu().contiguous() for site in (sites[0], sites[-1])]
    digests = [hashlib.sha256(each.view(torch.uint8).numpy().tobytes()).hexdigest() for each in weights]
    return {"class": type(model).__name__, "ffns": [site.key for site in sites], "weights": digests}


def found(work: Work | None, name: str, find: Callable[[], Found]) -> Found:
    """Return `work.found(name, find)`, or what is found now where nothing is kept."""
    return find() if work is None else work.found(name, find)
