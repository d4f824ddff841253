"""ONNX Runtime, on graphs that `moefy export --to onnx` writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import MoefyError
from ...exporters.onnx_export import check_onnx, write_onnx
from ...exporters.onnx_graphs import session_of
from ...exporters.onnx_parts import inputs_for
from ...loading import MoefiedModel
from ...measure.contexts import all_experts
from .base import ENCODER, ENCODER_DECODER, LANGUAGE_MODEL, Batch, Engine, Running, Subject
from .greedy import Writer

DECODED = 8  # tokens that a decoder reads, where its graph is compared


def run_graph(session: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Run a graph on ONNX Runtime's own tensors, or torch's; return its own, by their names, uncopied."""
    import onnxruntime

    names = [each.name for each in session.get_outputs()]
    value_of = onnxruntime.OrtValue.ortvalue_from_numpy
    fed = {name: value_of(each.numpy()) if torch.is_tensor(each) else each for name, each in given.items()}
    return dict(zip(names, session.run_with_ort_values(names, fed), strict=True))


def tensor_of(value: Any) -> torch.Tensor:
    """Return one of ONNX Runtime's tensors as torch's."""
    return torch.from_numpy(value.numpy())


def past_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys and values that a graph gives, by the names that the next call takes them by."""
    return {f"past_key_values{name[7:]}": each for name, each in outputs.items() if name.startswith("present")}


class OnnxEncoder:
    """A graph of an encoder."""

    def __init__(self, folder: Path, model: MoefiedModel, threads: int):
        self.session, self.model = session_of(folder / "model.onnx", threads), model

    def __call__(self, batch: Batch, /) -> Mapping[str, Any]:
        outputs = run_graph(self.session, inputs_for(self.model, batch))
        return {name: tensor_of(value) for name, value in outputs.items()}


class OnnxLanguageModel:
    """A graph of a decoder, with its cache; it has the logits after every token."""

    def __init__(self, folder: Path, model: MoefiedModel, threads: int):
        self.session = session_of(folder / "model.onnx", threads)
        self.shapes = {each.name: each.shape for each in self.session.get_inputs()}
        self.forget()

    def forget(self) -> None:
        self.seen, self.past = 0, dict[str, Any]()
        for name, (_, heads, _, width) in ((name, shape) for name, shape in self.shapes.items() if len(shape) == 4):
            self.past[name] = torch.zeros(1, heads, 0, width)

    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        places = torch.arange(self.seen, self.seen + len(ids))
        self.seen += len(ids)
        texts = {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones(self.seen, dtype=torch.long)}
        given = {name: value[None] for name, value in texts.items() if name in self.shapes}
        outputs = run_graph(self.session, given | self.past)
        self.past = past_of(outputs)
        logits = tensor_of(outputs["logits"])[0]
        return logits[-1:] if last else logits


class OnnxEncoderDecoder(Writer):
    """The three graphs of an encoder-decoder."""

    def __init__(self, folder: Path, model: MoefiedModel, threads: int):
        super().__init__(model)
        names = ("encoder_model", "decoder_model", "decoder_with_past_model")
        self.encoder, self.first, self.further = (session_of(folder / f"{name}.onnx", threads) for name in names)
        self.given: dict[str, Any] = {}
        self.past: dict[str, Any] = {}

    def encode(self, batch: Batch) -> torch.Tensor:
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return tensor_of(run_graph(self.encoder, read)["last_hidden_state"])

    def begin(self, hidden: torch.Tensor, mask: torch.Tensor) -> None:
        self.given, self.past = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden}, {}

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        outputs = run_graph(self.further if self.past else self.first, {"input_ids": ids} | self.given | self.past)
        self.given.pop("encoder_hidden_states", None)  # whose keys and values are known now
        self.past |= past_of(outputs)
        return tensor_of(outputs["logits"])[:, -1]


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
        if model.config.is_encoder_decoder and not model.can_generate():
            raise MoefyError(f"{self.name} runs encoder-decoders that generate, which {model._get_name()} does not")
        check_onnx(model)

    def dense(self, subject: Subject) -> Running:
        with all_experts(subject.moefied):
            return self.written(subject, "dense")

    def moefied(self, subject: Subject) -> Running:
        return self.written(subject, "moefied")

    def written(self, subject: Subject, name: str) -> Running:
        """Write the graphs of the model as it is now, and open them."""
        folder, batches = subject.folder / f"{self.name}-{name}", subject.batches
        folder.mkdir()
        if subject.kind == ENCODER_DECODER:  # graphs are compared on what a decoder reads, too
            batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :DECODED]} for batch in batches]
        write_onnx(subject.moefied, folder, self.int8, batches, timing=False, progress=False)
        return KINDS[subject.kind](folder, subject.moefied, subject.threads)
