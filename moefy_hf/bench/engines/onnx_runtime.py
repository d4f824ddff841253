"""ONNX Runtime, on graphs that `moefy export --to onnx` writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...exporters.onnx_export import check_onnx, write_onnx
from ...exporters.onnx_parts import inputs_for
from ...loading import MoefiedModel
from ...measure.contexts import all_experts
from .base import ENCODER, ENCODER_DECODER, LANGUAGE_MODEL, Batch, Engine, Running, Subject

PAST, PRESENT = "past_key_values.", "present."


class Graph:
    """An ONNX file in ONNX Runtime; what it returns stays there, so that a cache is not copied.

    Args:
        path: of the file.
        threads: of the CPU.
    """

    def __init__(self, path: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # waiting threads would slow down the engine whose turn is next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.shapes = {each.name: each.shape for each in self.session.get_inputs()}

    def __call__(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs by name, of tensors, arrays and earlier outputs."""
        fed = {}
        for name, value in given.items():
            value = value.numpy() if torch.is_tensor(value) else value
            fed[name] = self.value(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        return dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, fed), strict=True))


def tensor(value: Any) -> torch.Tensor:
    """Return an output as a tensor."""
    return torch.from_numpy(value.numpy())


def past_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys and values of a graph as the next call takes them."""
    return {PAST + name.removeprefix(PRESENT): value for name, value in outputs.items() if name.startswith(PRESENT)}


class OnnxEncoder:
    """A graph of an encoder.

    Args:
        folder: with its file.
        model: that it is of.
        threads: of the CPU.
    """

    def __init__(self, folder: Path, model: MoefiedModel, threads: int):
        self.graph, self.model = Graph(folder / "model.onnx", threads), model

    def __call__(self, batch: Batch, /) -> Mapping[str, Any]:
        return {name: tensor(value) for name, value in self.graph(inputs_for(self.model, batch)).items()}


class OnnxLanguageModel:
    """A graph of a decoder, and what it has read; arguments as of `OnnxEncoder`."""

    def __init__(self, folder: Path, model: MoefiedModel, threads: int):
        self.graph = Graph(folder / "model.onnx", threads)
        self.forget()

    def forget(self) -> None:
        caches = {name: shape for name, shape in self.graph.shapes.items() if name.startswith(PAST)}
        self.past = {name: np.zeros((1, s[1], 0, s[3]), np.float32) for name, s in caches.items()}
        self.seen = 0

    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        positions = torch.arange(self.seen, self.seen + len(ids))[None]
        self.seen += len(ids)
        texts = {"input_ids": ids[None], "attention_mask": torch.ones(1, self.seen, dtype=torch.long)}
        texts |= {"position_ids": positions} if "position_ids" in self.graph.shapes else {}
        outputs = self.graph(texts | self.past)
        self.past = past_of(outputs)
        logits = tensor(outputs["logits"])[0]
        return logits[-1:] if last else logits


class OnnxEncoderDecoder:
    """The three graphs of an encoder-decoder; arguments as of `OnnxEncoder`."""

    def __init__(self, folder: Path, model: MoefiedModel, threads: int):
        names = ("encoder_model", "decoder_model", "decoder_with_past_model")
        self.encoder, self.first, self.next = (Graph(folder / f"{name}.onnx", threads) for name in names)
        settings: Any = model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        self.ends = torch.tensor([end for end in ends if end is not None], dtype=torch.long)
        self.start, self.pad = settings.decoder_start_token_id, settings.pad_token_id or 0

    def encode(self, batch: Batch) -> torch.Tensor:
        return tensor(self.encoder(batch)["last_hidden_state"])

    def generate(self, batch: Batch, most: int, least: int = 0) -> torch.Tensor:
        mask = {"encoder_attention_mask": batch["attention_mask"]}
        hidden = self.encoder(batch)["last_hidden_state"]
        found = torch.full((len(batch["input_ids"]), 1), self.start)
        ended = torch.zeros(len(found), 1, dtype=torch.bool)
        given: dict[str, Any] = {"encoder_hidden_states": hidden}
        for written in range(most):
            outputs = (self.next if written else self.first)({"input_ids": found[:, -1:]} | mask | given)
            given = given | past_of(outputs) if written else past_of(outputs)  # later steps return the decoder's alone
            logits = tensor(outputs["logits"])[:, -1]
            if written < least:
                logits = logits.index_fill(1, self.ends, -torch.inf)
            token = logits.argmax(-1, keepdim=True).masked_fill(ended, self.pad)
            found, ended = torch.cat([found, token], 1), ended | torch.isin(token, self.ends)
            if ended.all():
                break
        return found


KINDS: dict[str, Callable[[Path, MoefiedModel, int], Running]] = {
    ENCODER: OnnxEncoder,
    LANGUAGE_MODEL: OnnxLanguageModel,
    ENCODER_DECODER: OnnxEncoderDecoder,
}


class OnnxRuntime(Engine):
    """Writes the model with all its experts, and at its budget.

    Args:
        name: on the command line.
        int8: whether matrices are of 8 bits.
    """

    modules, distribution, extra = ("onnx", "onnxruntime", "onnxscript"), "onnxruntime", "onnx"
    kinds = tuple(KINDS)

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
        """Write the graphs of the model as it is now, and load them."""
        folder = subject.folder / f"{self.name}-{name}"
        folder.mkdir()
        batches = subject.batches if subject.kind != ENCODER_DECODER else None  # whose targets are generated
        write_onnx(subject.moefied, folder, self.int8, batches, timing=False, progress=False)
        return KINDS[subject.kind](folder, subject.moefied, subject.threads)
