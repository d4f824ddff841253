"""The sample of FFN inputs that a profile keeps on disk, for what learns from data."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..modeling.ffn_sites import FfnWeights

CHUNK = 4096  # tokens whose activations are in memory at once


@dataclass(frozen=True)
class FfnSample:
    """The inputs that one FFN has on calibration tokens.

    Attributes:
        inputs: (T, d), memory-mapped, in the model's dtype.
    """

    inputs: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield the inputs (t, d), some thousand tokens at a time."""
        yield from self.inputs.split(CHUNK)

    def activations(self, weights: FfnWeights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield chunks of the inputs (t, d) and of the neurons' activations on them (t, f), on the weights' device."""
        for x in self.chunks():
            x = x.to(weights.down.device)
            with torch.no_grad():  # left before each yield: readers keep their own gradient mode
                neurons = weights.neurons(x)
            yield x, neurons


class TensorFile:
    """Rows on their way into a file.

    They are written, not mapped: a full disk raises an OSError then, where a write into mapped memory would kill the
    process.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self.width, self.dtype = path, 0, 0, torch.float32
        self.file: BinaryIO | None = None

    def append(self, rows: torch.Tensor) -> None:
        """Write rows (t, d), of the same d and dtype in every call.

        Raises:
            OSError: the disk is full.
        """
        rows = rows.detach().cpu().contiguous()
        self.file = self.file or open(self.path, "wb")
        self.width, self.dtype, self.rows = rows.shape[1], rows.dtype, self.rows + len(rows)
        try:
            self.file.write(rows.view(torch.uint8).numpy().tobytes())
            self.file.flush()
        except OSError as error:
            what = f"{error.strerror} for the sample of FFN inputs; use fewer tokens, or set TMPDIR"
            raise OSError(error.errno, what, str(self.path)) from error

    def cut_to(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Go on behind the first rows (rows, width) of a file that was there before."""
        if self.file is not None:
            self.file.close()
        self.file = open(self.path, "r+b")
        self.file.truncate(rows * width * dtype.itemsize)
        self.file.seek(0, 2)
        self.rows, self.width, self.dtype = rows, width, dtype

    def mapped(self) -> torch.Tensor:
        """Return all rows (T, d), memory-mapped; nothing can be appended any more."""
        if self.file is not None:
            self.file.close()
        size = self.rows * self.width
        return torch.from_file(str(self.path), shared=True, size=size, dtype=self.dtype).view(self.rows, self.width)
