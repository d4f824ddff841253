"""ONNX Runtime, on graphs that `moefy export --to onnx` writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...exporters.onnx_export import check_onnx, inputs_for, write_onnx
from ...loading import MoefiedModel
from ...measure.contexts import all_experts
from .base import ENCODER, Batch, Engine, Running, Subject


class OnnxEncoder:
    """A graph of an encoder.

    Args:
        path: of the graph.
        model: that it is of.
        threads: of the CPU.
    """

    def __init__(self, path: Path, model: MoefiedModel, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # waiting threads would slow down the engine whose turn is next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.model = model

    def __call__(self, batch: Batch, /) -> Mapping[str, Any]:
        fed = {name: value.numpy() for name, value in inputs_for(self.model, batch).items()}
        return dict(zip(self.outputs, map(torch.from_numpy, self.session.run(self.outputs, fed)), strict=True))


class OnnxRuntime(Engine):
    """Writes the model with all its experts, and at its budget.

    Args:
        name: on the command line.
        int8: whether matrices are of 8 bits.
    """

    modules, distribution, extra = ("onnx", "onnxruntime", "onnxscript"), "onnxruntime", "onnx"
    kinds = (ENCODER,)

    def __init__(self, name: str, int8: bool):
        super().__init__(name)
        self.int8 = int8

    def check(self, model: MoefiedModel, gguf: str | None) -> None:
        super().check(model, gguf)
        check_onnx(model)

    def dense(self, subject: Subject) -> Running:
        with all_experts(subject.moefied):
            return self.written(subject, "dense")

    def moefied(self, subject: Subject) -> Running:
        return self.written(subject, "moefied")

    def written(self, subject: Subject, name: str) -> Running:
        """Write the graph of the model as it is now, and load it."""
        folder = subject.folder / f"{self.name}-{name}"
        folder.mkdir()
        write_onnx(subject.moefied, folder, self.int8, subject.batches)
        return OnnxEncoder(folder / "model.onnx", subject.moefied, subject.threads)
