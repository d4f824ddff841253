"""llama.cpp, through llama-cpp-python, on the dense GGUF file and the MoE one that is made from it."""

import ctypes
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import MoefyError
from ...exporters.export import check_routing, check_sizes, export_gguf
from ...loading import MoefiedModel
from .base import LANGUAGE_MODEL, Engine, Running, Subject


def quiet() -> Any:
    """Return the module llama_cpp, ready, which from now on prints errors alone."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    return llama_cpp


class LlamaCppModel:
    """A GGUF file in llama.cpp: token ids go in, logits come out. Its cache is float32, without flash attention.

    Args:
        path: of the file.
        tokens: that it remembers.
        threads: of the CPU.

    Raises:
        MoefyError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, tokens: int, threads: int):
        self.library = llama = quiet()
        given = llama.llama_model_default_params()
        given.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), given)
        if not self.model:
            raise MoefyError(f"llama.cpp cannot load {path}")
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = llama.GGML_TYPE_F32
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama.llama_init_from_model(self.model, settings)
        if not self.context:
            raise MoefyError(f"llama.cpp cannot run {path} on {tokens} tokens")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(tokens, 0, 1)
        self.seen = 0

    def forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.seen = 0

    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        count, batch = len(ids), self.batch
        batch.n_tokens = count
        for place, token in enumerate(ids.tolist()):
            batch.token[place], batch.pos[place] = token, self.seen + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = not last or place == count - 1
        if failure := self.library.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp did not read {count} tokens after {self.seen}: error {failure}")
        self.seen += count
        rows = 1 if last else count
        logits = np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (rows, self.vocabulary))
        return torch.from_numpy(logits.copy())  # the next call writes over them

    def __del__(self) -> None:
        if vars(self).get("batch"):
            self.library.llama_batch_free(self.batch)
        if vars(self).get("context"):
            self.library.llama_free(self.context)
        if vars(self).get("model"):
            self.library.llama_model_free(self.model)


class LlamaCpp(Engine):
    """Runs the dense GGUF file as it is or in Q8_0, and the MoE file that is made of it.

    Args:
        name: on the command line.
        q8_0: whether llama.cpp quantises the dense file first.
    """

    modules, distribution, extra = ("llama_cpp", "gguf"), "llama-cpp-python", "llama-cpp"
    kinds = (LANGUAGE_MODEL,)
    reads_gguf = True

    def __init__(self, name: str, q8_0: bool):
        super().__init__(name)
        self.q8_0 = q8_0

    def check(self, model: MoefiedModel, gguf: str | None) -> None:
        super().check(model, gguf)
        from ...exporters.dense_gguf import check_same_model, open_dense
        from ...exporters.llama_cpp import check_ffns

        check_routing(model, self.name, shared_experts=True)
        check_sizes(model)
        check_ffns(model)
        check_same_model(open_dense(gguf), model)

    def dense(self, subject: Subject) -> Running:
        return LlamaCppModel(self.source(subject), subject.tokens, subject.threads)

    def moefied(self, subject: Subject) -> Running:
        path = subject.folder / f"{self.name}-moefied.gguf"
        export_gguf(subject.moefied, path, self.source(subject))
        return LlamaCppModel(path, subject.tokens, subject.threads)

    def source(self, subject: Subject) -> Path:
        """Return the dense file, which is quantised at the first call.

        Raises:
            MoefyError: llama.cpp cannot quantise it.
        """
        given = Path(str(subject.gguf))
        if not self.q8_0:
            return given
        path = subject.folder / "q8_0.gguf"
        if not path.exists():
            llama = quiet()
            how = llama.llama_model_quantize_default_params()
            how.nthread, how.ftype = subject.threads, llama.LLAMA_FTYPE_MOSTLY_Q8_0
            if llama.llama_model_quantize(str(given).encode(), str(path).encode(), ctypes.byref(how)):
                raise MoefyError(f"llama.cpp cannot quantise {given}: give a dense GGUF file of F32, F16 or BF16")
        return path
