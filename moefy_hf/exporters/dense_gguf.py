"""Dense GGUF files of llama.cpp: what they hold, in transformers' terms, and whether it is what a model holds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ..errors import MoefyError
from ..loading import MoefiedModel
from ..modeling.ffn_sites import FfnSite
from ..modeling.offload import tensor_of
from .formats import layer_of

Type = gguf.GGMLQuantizationType
# architecture -> whether its queries and keys turn pairs (2i, 2i + 1) of a head; transformers turns (i, i + half)
SOURCES = {"llama": True, "qwen2": False, "qwen3": False}
FFN_PARTS = ("ffn_gate", "ffn_up", "ffn_down")
SETTINGS = (  # all that these architectures may say: another one would change what they compute
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor"),
)
# largest error of a number, as a share of the largest of its block of 32
ERRORS = {Type.F32: 1e-6, Type.F16: 2.0**-10, Type.BF16: 2.0**-7, Type.Q8_0: 2.0**-7}
ERRORS_OF_CHECKPOINTS = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
COARSE = 0.5  # of all other types; unrelated numbers are off by more
SAMPLE = 8  # rows of a tensor that are compared
HOW_TO_MAKE = (
    "`moefy export MODEL FOLDER --to dense`, then llama.cpp's `convert_hf_to_gguf.py FOLDER --outfile DENSE.gguf`"
)


@dataclass(frozen=True)
class DenseGguf:
    """A GGUF file of one of `SOURCES`.

    Attributes:
        path: of the file.
        architecture: one of `SOURCES`.
        reader: gguf's.
        tensors: by name.
    """

    path: Path
    architecture: str
    reader: Any
    tensors: dict[str, Any] = field(repr=False)

    def setting(self, name: str, default: Any = None) -> Any:
        """Return the value of one of `SETTINGS`, or the default where the file does not say it."""
        found = self.reader.get_field(f"{self.architecture}.{name}")
        return default if found is None else found.contents()

    @property
    def head_dim(self) -> int:
        whole = self.setting("embedding_length") // self.setting("attention.head_count")
        return self.setting("attention.key_length", whole)

    def row_order(self, name: str) -> np.ndarray | None:
        """Return (rows,), which row of a tensor is each row of transformers'; None: the same one."""
        if not SOURCES[self.architecture] or name.split(".")[-2] not in ("attn_q", "attn_k"):
            return None
        rows = np.arange(len(self.tensors[name].data)).reshape(-1, self.head_dim // 2, 2)
        return rows.swapaxes(1, 2).reshape(-1)

    def data(self, name: str) -> np.ndarray:
        """Return a tensor as it is stored (rows, bytes or numbers), rows in transformers' order."""
        order = self.row_order(name)
        return self.tensors[name].data if order is None else self.tensors[name].data[order]

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return some rows of a tensor (n, columns), or a whole vector, in float32."""
        order, tensor = self.row_order(name), self.tensors[name]
        taken = tensor.data[rows if order is None else order[rows]] if tensor.data.ndim > 1 else self.data(name)
        return gguf.dequantize(np.ascontiguousarray(taken), tensor.tensor_type)

    def frequencies(self) -> np.ndarray:
        """Return (head_dim / 2,), the angle by which positions turn each pair of a head."""
        base = self.setting("rope.freq_base", 10000.0)
        found = base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.setting("rope.scaling.type", "none") == "linear":
            found /= self.setting("rope.scaling.factor")
        return found / self.tensors["rope_freqs.weight"].data if "rope_freqs.weight" in self.tensors else found


def open_dense(path: str | Path | None) -> DenseGguf:
    """Read a dense GGUF file's table of contents.

    Raises:
        MoefyError: there is none, it is in several files, or of another architecture than `SOURCES`, or says or holds
            what the MoE architectures have no place for.
    """
    if path is None:
        raise MoefyError(f"the dense GGUF file of this model is needed (dense, --dense): {HOW_TO_MAKE} make it")
    if not (path := Path(path)).is_file():
        raise MoefyError(f"{path} is no file: {HOW_TO_MAKE} make the dense GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError) as error:
        raise MoefyError(f"{path} is no GGUF file: {error}") from error
    if architecture not in SOURCES:
        raise MoefyError(
            f"{path} is of architecture {architecture!r}; llama.cpp has MoEs like it for {', '.join(SOURCES)} only"
        )
    if reader.get_field("split.count") is not None:
        raise MoefyError(f"{path} is one of several files: join them with llama.cpp's `llama-gguf-split --merge`")
    dense = DenseGguf(path, architecture, reader, {tensor.name: tensor for tensor in reader.tensors})
    check_expressible(dense)
    return dense


def check_expressible(dense: DenseGguf) -> None:
    """Check that a file says and holds nothing beside what the MoE architectures have a place for.

    Raises:
        MoefyError: it does; names it.
    """
    known = {f"{dense.architecture}.{name}" for name in SETTINGS}
    more = [key for key in dense.reader.fields if key.startswith(f"{dense.architecture}.") and key not in known]
    if more:
        raise MoefyError(f"{dense.path} has {', '.join(more)}, which llama.cpp's MoE architectures do not")
    if (scaling := dense.setting("rope.scaling.type", "none")) not in ("none", "linear"):
        raise MoefyError(f"{dense.path} scales positions by {scaling!r}; expressible are none, linear and Llama 3's")
    if {
        dense.setting("attention.value_length", dense.head_dim),
        dense.setting("rope.dimension_count", dense.head_dim),
    } != {dense.head_dim}:
        raise MoefyError(f"{dense.path} has heads that are turned in part, or whose values have another width")
    weights = [*FFN_PARTS, "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"]
    weights += ["attn_q_norm", "attn_k_norm"] * (dense.architecture == "qwen3")
    parts = {f"{part}.weight" for part in weights} | {f"attn_{part}.bias" for part in "qkv"}
    whole = {f"{part}.weight" for part in ("token_embd", "output_norm", "output", "rope_freqs")}
    unknown = [n for n in dense.tensors if n not in whole and n.split(".", 2)[-1] not in parts]
    if unknown:
        raise MoefyError(f"{dense.path} has {', '.join(unknown)}, which llama.cpp's MoE architectures do not")


def check_same_model(dense: DenseGguf, model: MoefiedModel) -> None:
    """Check all of a model but its FFNs against a GGUF file: settings, names, shapes, and some rows of each tensor.

    Raises:
        MoefyError: the file is of another model; says by what.
    """
    config = model.config
    settings = {
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for name, ours in settings.items():
        if not np.isclose(theirs := dense.setting(name, settings["attention.head_count"]), ours, rtol=1e-6, atol=0):
            raise different(dense, f"{name} is {theirs}, and {ours} in the model")
    check_positions(dense, model)
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[dense.architecture], config.num_hidden_layers)
    ffns = tuple(f"{site.name}." for site in model.moe_sites())
    left = {name for name in dense.tensors if name.split(".")[-2] not in FFN_PARTS} - {"rope_freqs.weight"}
    for key in model.state_dict():
        if key.startswith(ffns):
            continue
        name = table.get_name(key, try_suffixes=(".weight", ".bias")) or ""
        if name == "output.weight" and name not in dense.tensors and config.tie_word_embeddings:
            continue
        if name not in dense.tensors:
            raise different(dense, f"it lacks the model's {key}")
        tensor = tensor_of(model, key)
        rows = sample(len(tensor))
        check_numbers(dense, name, rows, tensor.detach()[rows] if tensor.dim() > 1 else tensor.detach(), tensor.shape)
        left.discard(name)
    if left:
        raise different(dense, f"the model has no {', '.join(sorted(left))}")


def check_positions(dense: DenseGguf, model: MoefiedModel) -> None:
    """Check how positions turn queries and keys, and that attention reaches all of them.

    Raises:
        MoefyError: they differ, or the MoE architectures of llama.cpp cannot do it.
    """
    config = model.config.to_dict()
    if config.get("sliding_window") is not None or "sliding_attention" in (config.get("layer_types") or ()):
        raise MoefyError("llama.cpp's MoE architectures have no sliding attention, this model has")
    kind = (config.get("rope_parameters") or {}).get("rope_type")
    if kind not in ("default", "linear", "llama3"):
        raise MoefyError(f"positions of type {kind!r} cannot be expressed; default, linear and llama3 can")
    ours = next((b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)
    if ours is None:
        raise MoefyError(f"a {type(model).__name__} has no rotary positions, which llama.cpp's MoE architectures have")
    theirs = dense.frequencies()
    rtol = 1e-4 if ours.dtype == torch.float32 else 0.02
    if len(theirs) != len(ours) or not np.allclose(ours.float().cpu().numpy(), theirs, rtol=rtol, atol=0):
        raise different(dense, "positions turn queries and keys otherwise (rope.freq_base, rope.scaling, rope_freqs)")


def neuron_order(dense: DenseGguf, site: FfnSite) -> np.ndarray:
    """Return (f,), which neuron of the file is each neuron of the model.

    A file of the dense model that was converted has its order, which the model remembers; one of `--to dense`, the
    model's own.

    Raises:
        MoefyError: the FFN is another model's in either order; says which of its tensors differs.
    """
    orders = [np.arange(site.sizes[1])]
    remembered = site.act.neuron_order
    if remembered is not None and bool((remembered >= 0).all()):
        orders.append(remembered.cpu().numpy())
    for order in orders:
        try:
            check_ffn(dense, site, order)
        except MoefyError as error:
            refused = error
        else:
            return order
    raise refused


def check_ffn(dense: DenseGguf, site: FfnSite, order: np.ndarray) -> None:
    """Check an FFN in one order of its neurons.

    Raises:
        MoefyError: it differs.
    """
    weights = site.weights()
    parts = {"ffn_gate": weights.keys, "ffn_up": weights.up, "ffn_down": weights.down}
    for part, ours in parts.items():
        name = f"blk.{layer_of(site)}.{part}.weight"
        if name not in dense.tensors:
            raise different(dense, f"it lacks {name}")
        rows, ours = sample(len(ours)), ours.detach()
        if part == "ffn_down":  # neurons are its columns, and blocks of 32 lie along them
            back = torch.from_numpy(np.argsort(order)).to(ours.device)
            check_numbers(dense, name, rows, ours[rows][:, back], ours.shape)
        else:
            check_numbers(dense, name, order[rows], ours[rows], ours.shape)


def check_numbers(dense: DenseGguf, name: str, rows: np.ndarray, ours: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check some rows of a tensor, or a whole vector, up to what the file's type rounds.

    Args:
        dense: the file.
        name: of its tensor.
        rows: (n,) of the file's tensor.
        ours: (n, columns), the same rows of the model.
        shape: of the whole tensor in the model.

    Raises:
        MoefyError: shape or numbers differ.
    """
    tensor = dense.tensors[name]
    theirs_shape = tuple(int(size) for size in reversed(tensor.shape))
    if theirs_shape != tuple(shape):
        raise different(dense, f"{name} is {theirs_shape}, and {tuple(shape)} in the model")
    expected = ours.float().cpu().numpy()
    share = max(ERRORS.get(tensor.tensor_type, COARSE), ERRORS_OF_CHECKPOINTS[ours.dtype])
    width = 32 if expected.shape[-1] % 32 == 0 else 1
    error = np.abs(dense.numbers(name, rows) - expected).reshape(-1, width).max(-1)
    bound = np.abs(expected).reshape(-1, width).max(-1) * share + 1e-7
    if not (error <= bound).all():
        raise different(dense, f"{name} has other numbers than the model ({Type(tensor.tensor_type).name})")


def sample(rows: int) -> np.ndarray:
    """Return some row numbers, from the first to the last."""
    return np.unique(np.linspace(0, rows - 1, SAMPLE).astype(np.int64))


def different(dense: DenseGguf, what: str) -> MoefyError:
    """Return the error that a file is not the model's."""
    return MoefyError(f"{dense.path} is no dense GGUF file of this model: {what}. {HOW_TO_MAKE} make it")
