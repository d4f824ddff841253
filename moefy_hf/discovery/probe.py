"""Run one FFN on random input, to tell what its structure does not: which Linear is the gate, and what is applied.

The module that runs is a copy with small random Linears, so that nothing of the model is read, moved or changed, and
models on the meta device can be asked too.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..modeling.ffn_layouts import FfnSpec
from ..modeling.ffn_weights import ChangedActivation
from .parts import dropouts, linear_sizes

FUNCTIONS = ("relu", "gelu", "gelu_new", "silu", "relu2", "quick_gelu", "tanh", "sigmoid")  # told by their values
TINY = (8, 24)  # d and f of the copy; where its code needs the true sizes, these are taken


class CannotRun(Exception):
    """The module does not run by itself on a tensor of the FFN's input."""


@dataclass
class Run:
    """What was seen in a run: input and output of each Linear, by its name."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def confirmed(owner: nn.Module, candidates: Iterable[FfnSpec], sizes: tuple[int, int]) -> list[FfnSpec]:
    """Return the candidates whose formula gives what a module computes.

    Args:
        owner: the module that holds an FFN and nothing else; it is called with one tensor.
        candidates: possible layouts. Those without an activation module are completed by the function's name.
        sizes: (d, f).

    Raises:
        CannotRun: the module cannot be run by itself.

    Example:
        >>> confirmed(mlp, [FfnSpec("fc1", "fc2", "act")], (8, 32))
    """
    candidates = list(candidates)
    twin, run = _run_copy(owner, candidates[0].linears, sizes)
    fitting = []
    for before in (None, *_methods(owner)):
        for candidate in candidates:
            for function in FUNCTIONS if candidate.function == "" else (candidate.function,):
                spec = replace(candidate, function=function, before=before)
                if _fits(twin, run, spec):
                    fitting.append(replace(spec, dropout=_dropout_of(twin, run, spec)))
        if fitting:
            break
    return fitting


def function_of(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Return transformers' name of an activation function by its values; None where that is none we know."""
    # also far from 0, where ReLU6 is no ReLU
    x = torch.tensor([*(i / 4 for i in range(-16, 17)), -50.0, -9.0, 9.0, 50.0], device="cpu")
    for name in FUNCTIONS:
        try:
            if torch.allclose(function(x), ACT2FN[name](x), rtol=1e-5, atol=1e-6):
                return name
        except Exception:
            return None
    return None


def called_after(layer: nn.Module, up: str) -> str | None:
    """Return transformers' name of the function that is applied to what a Linear of a layer gives.

    The module around the Linear is run, which has to have nothing else (ESM's `intermediate`).

    Args:
        layer: the module that holds the FFN.
        up: the Linear, below it.
    """
    around, _, name = up.rpartition(".")
    module, linear = layer.get_submodule(around), layer.get_submodule(up)
    size = linear_sizes(linear)
    if not around or size is None or len(list(module.parameters())) > len(list(linear.parameters())):
        return None
    twin = copy_with_linears(module, [name], size, TINY)
    outputs: list[torch.Tensor] = []
    twin.get_submodule(name).register_forward_hook(lambda _, args, y: outputs.append(y))
    try:
        with torch.no_grad():
            result = twin(torch.randn(2, 3, TINY[0], generator=torch.Generator("cpu").manual_seed(1), device="cpu"))
            fits = (torch.allclose(ACT2FN[each](outputs[0]), result, rtol=1e-4, atol=1e-5) for each in FUNCTIONS)
            return next((name for name, fit in zip(FUNCTIONS, fits, strict=True) if fit), None)
    except Exception:  # it wants other arguments
        return None


def _methods(module: nn.Module) -> list[str]:
    """Return the methods of a module's class that may take part in its `forward`."""
    return [name for name, value in vars(type(module)).items() if inspect.isfunction(value) and name[:2] != "__"]


def _run_copy(owner: nn.Module, paths: list[str], sizes: tuple[int, int]) -> tuple[nn.Module, Run]:
    problem: Exception | None = None
    tiny = TINY if sizes[0] != sizes[1] else (TINY[0], TINY[0])
    for d, f in dict.fromkeys((tiny, sizes)):
        twin = copy_with_linears(owner, paths, sizes, (d, f))
        for shape in ((2, 3, d), (6, d)):
            try:
                return twin, _record(twin, paths, shape)
            except Exception as error:  # whatever a module that wants other arguments or sizes raises
                problem = error
    raise CannotRun(f"{type(owner).__name__} does not run on one tensor by itself ({type(problem).__name__})")


def copy_with_linears(owner: nn.Module, paths: list[str], sizes: tuple[int, int], new: tuple[int, int]) -> nn.Module:
    """Copy a module without its Linears, which become random ones of other sizes, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = dict(zip(sizes, new, strict=True))
    memo: dict[int, Any] = {}
    for path in paths:
        old = owner.get_submodule(path)
        inputs, outputs = (_resized(n, size, sizes[1]) for n in linear_sizes(old) or (0, 0))
        memo[id(old)] = _random_linear(inputs, outputs, getattr(old, "bias", None) is not None, generator)
    for name, tensor in itertools.chain(owner.named_parameters(), owner.named_buffers()):
        if id(tensor) not in memo and not any(name.startswith(f"{path}.") for path in paths):
            value = 1 + 0.1 * torch.randn(tensor.shape, generator=generator, device="cpu")
            memo[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    twin = copy.deepcopy(owner, memo)
    for module in twin.modules():
        vars(module).pop("forward", None)  # what offloading or a kernel has put there
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin.eval()


def _resized(n: int, size: Mapping[int, int], f: int) -> int:
    return size[n] if n in size else size[f] * (n // f)  # fused: 2f


def _random_linear(inputs: int, outputs: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias)
    for name, parameter in list(linear.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
        linear.register_parameter(name, nn.Parameter(value / inputs**0.5 if name == "weight" else value))
    return linear


def _record(twin: nn.Module, paths: list[str], shape: tuple[int, ...]) -> Run:
    run, handles = Run({}, {}), []

    def see(path: str, args: tuple, output: torch.Tensor) -> None:
        run.inputs[path], run.outputs[path] = args[0], output

    for path in paths:
        hook = twin.get_submodule(path).register_forward_hook(lambda _, args, y, path=path: see(path, args, y))
        handles.append(hook)
    try:
        x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        with torch.no_grad():
            twin(*[x] * max(1, _required(twin)))  # BLOOM's wants the residual too
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in paths if path not in run.inputs]:
        raise CannotRun(f"{', '.join(missing)} did not run")
    return run


def _required(module: nn.Module) -> int:
    """Return how many arguments a module has to be called with."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


@torch.no_grad()
def _fits(twin: nn.Module, run: Run, spec: FfnSpec) -> bool:
    """Whether what `down` got is what the formula makes of what the other Linears gave."""
    x = run.inputs[spec.up]
    if spec.gate is not None and not torch.equal(run.inputs[spec.gate], x):
        return False
    try:
        neurons = _neurons(twin, run, spec)
    except Exception:
        return False
    got = run.inputs[spec.down]
    return neurons.shape == got.shape and torch.allclose(neurons, got, rtol=1e-4, atol=1e-5)


def _neurons(twin: nn.Module, run: Run, spec: FfnSpec) -> torch.Tensor:
    act: Any = ACT2FN[spec.function] if spec.function else twin.get_submodule(spec.act)
    if spec.before is not None:
        act = ChangedActivation(getattr(twin, spec.before), act)
    up = run.outputs[spec.up]
    if spec.parts == 2:
        halves = up.chunk(2, -1)
        up, gate = halves if spec.up_first else halves[::-1]
        neurons = act(gate) * up
    elif spec.gate is None:
        neurons = act(up)
    else:
        neurons = act(run.outputs[spec.gate]) * up
    return twin.get_submodule(spec.norm)(neurons) if spec.norm else neurons


def _dropout_of(twin: nn.Module, run: Run, spec: FfnSpec) -> str | None:
    """Return the attribute whose dropout, if it is on, changes what `down` gets."""
    x = run.inputs[spec.up]
    found = dropouts(twin)
    with torch.random.fork_rng(devices=[]):
        for name, set_rate in found.items():
            for each in found.values():
                each(0.0)
            set_rate(0.5)
            twin.train()
            changed = not _fits(twin, _record(twin, spec.linears, x.shape), spec)
            twin.eval()
            if changed:
                return name
    return None
