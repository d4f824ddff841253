"""What a conversion finds layer by layer: on disk, so that one that was interrupted goes on; in several processes."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import MoefyError
from ..io import write_whole, written_file
from ..measure.processes import Processes
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


def each_layer(
    name: str,
    layers: int,
    find: Callable[[int], Found],
    take: Callable[[int, Found], None],
    *,
    work: Work | None,
    processes: Processes,
    apart: bool = True,
    progress: bool = True,
) -> None:
    """Find something for each layer, the layers shared among processes, and take it in all of them.

    Args:
        name: of what is found.
        layers: how many there are.
        find: finds it for the layer at a position.
        take: takes what was found for a layer; before the next is begun, where this process found it.
        work: keeps what is found, and has what was.
        apart: no layer needs what is taken for another; otherwise the first process finds it for all.
    """

    def part() -> dict[int, Found]:
        here: dict[int, Found] = {}
        mine = processes.share(range(layers)) if apart else range(layers if processes.first else 0)
        for position in tqdm([*mine], desc=f"{name}s", unit="layer", disable=not progress):
            now = functools.partial(find, position)
            found = work.found(f"{name}_{position}", now) if work else now()
            here[position] = {key: each.detach().cpu() for key, each in found[0].items()}, found[1]
            take(position, found)
        return here

    for rank, there in enumerate(processes.gathered(part)):
        for position, found in there.items() if rank != processes.rank else ():
            take(position, found)
