"""What a user would pick instead of PyTorch: the engines that `moefy bench MODEL --against` knows."""

from .base import Engine
from .llama_cpp import LlamaCpp
from .onnx_runtime import OnnxRuntime
from .pytorch import PyTorch
from .torch_ao import TorchAo

PYTORCH = PyTorch("PyTorch")
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        OnnxRuntime("onnxruntime", int8=False),
        OnnxRuntime("onnxruntime-int8", int8=True),
        LlamaCpp("llama.cpp", q8_0=False),
        LlamaCpp("llama.cpp-q8_0", q8_0=True),
        TorchAo("torchao-int8"),
    )
}
