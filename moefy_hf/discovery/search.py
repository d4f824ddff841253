"""Find the FFNs of any Transformer by their structure.

An FFN is a pair of Linears d -> f and f -> d with an activation between them, with a gate or without, in a layer. It
is held by a module of its own (an MLP), or by the layer itself (BERT's, BART's). An MLP is run by itself, in
`probe`, so that what is found is what its code computes. A layer cannot be; there only FFNs without a gate are found,
whose parts can be put together in one way. Conversion compares both with what a run of the model shows.

Symbols: d model width, f FFN width (neurons).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from ..modeling.ffn_layouts import FfnSpec
from ..modeling.ffn_sites import FfnSite
from .parts import functions_of, is_activation, is_norm, linear_sizes, words
from .probe import CannotRun, called_after, confirmed, function_of

NATIVE, BOTTLENECK = "part of a native Mixture of Experts", "a bottleneck"
OTHERS = ("an adapter", "what connects two towers", "a head")  # no FFNs of layers
NOT_AN_FFN = {  # word in the name of a module, or of its class -> what it is
    **dict.fromkeys(["expert", "experts", "router"], NATIVE),
    **dict.fromkeys(["adapter", "adapters"], OTHERS[0]),
    **dict.fromkeys(["merger", "projector", "connector", "resampler", "aligner"], OTHERS[1]),
    **dict.fromkeys(["head", "heads", "pooler", "classifier"], OTHERS[2]),
}
FFN_WORDS = {"mlp", "ffn", "feedforward", "ffw"}  # of classes that one would expect here: their absence is explained
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
INLINE = "moefied_activation"  # name of the activation that an owner gets which calls a function


@dataclass(frozen=True)
class LeftAlone:
    """A module that looks like an FFN, and why it is not converted."""

    name: str
    reason: str

    @property
    def of_a_layer(self) -> bool:
        """Whether it is the FFN of a layer, and not a head, an adapter, a bottleneck or a connection of towers."""
        return not self.reason.startswith(tuple(f"it is {what}" for what in (*OTHERS, BOTTLENECK)))


@dataclass
class Found:
    """What `search` found: FFNs in the order of the model's modules, and what looks like one but is left alone."""

    sites: list[FfnSite] = field(default_factory=list)
    left: list[LeftAlone] = field(default_factory=list)


@dataclass
class Scope:
    """What a module holds that may be parts of one FFN, at most two names below it.

    Attributes:
        sizes: Linears: path -> (inputs, outputs).
        acts: paths of activations.
        functions: activation functions: path -> transformers' name; None where that is not known.
        norms: paths of norms.
        alone: whether these Linears, with norms, are all that it computes with.
    """

    owner: nn.Module
    sizes: dict[str, tuple[int, int]]
    acts: list[str]
    functions: dict[str, str | None]
    norms: list[str]
    alone: bool


def search(model: nn.Module) -> Found:
    """Find the FFNs of a model, on whatever device, without a run of the model.

    Example:
        >>> [site.spec.down for site in search(model).sites]
        ['output.dense', 'output.dense']
    """
    finder = _Finder()
    finder.visit(model, "")
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    finder.found.sites.sort(key=lambda site: order[site.name])
    return finder.found


class _Finder:
    def __init__(self) -> None:
        self.found = Found()
        self.claimed: set[int] = set()
        self.seen: set[int] = set()
        self.known: dict[tuple, tuple[list[FfnSpec], str | None]] = {}

    def visit(self, module: nn.Module, path: str, within: nn.Module | None = None) -> None:
        """Look at the parts of a module first, then at the module itself, which is part of another one."""
        if id(module) in self.seen or linear_sizes(module) is not None:
            return
        self.seen.add(id(module))
        for name, child in module.named_children():
            self.visit(child, f"{path}.{name}" if path else name, module)
        if type(module) is nn.ModuleList or is_attention(module) or not any(p.isdigit() for p in path.split(".")):
            return
        scope = self.scope(module)
        plain = [(name, value) for name, value in vars(module).items() if isinstance(value, int | float | str)]
        key = (type(module), *plain, *scope.sizes.items(), *scope.acts, *scope.norms, scope.alone)
        key = (*key, *scope.functions.items())
        if key not in self.known:
            self.known[key] = _specs_of(scope)
        specs, reason = self.known[key]
        is_what = _not_an_ffn(path, type(module).__name__)
        beside = list(within.modules()) if within is not None and "shared" in words(path.rpartition(".")[2]) else []
        if any(map(_has_experts, beside)):
            is_what = NATIVE
        if is_what is not None and (specs or _named_like_an_ffn(module)):
            reason, specs = f"it is {is_what}", []
        elif not specs and reason is None and _named_like_an_ffn(module) and not self.inside(module):
            reason = _why_none(module)
        for spec in specs:
            self.found.sites.append(FfnSite(path, module, spec))
        if specs or reason is not None and len(scope.sizes) > 1:
            self.claimed.update(id(module.get_submodule(name)) for name in scope.sizes)
        if reason is not None:
            self.found.left.append(LeftAlone(path, reason))

    def inside(self, module: nn.Module) -> bool:
        """Whether an FFN, or what was left alone, lies inside a module."""
        return any(id(part) in self.claimed for part in module.modules())

    def scope(self, module: nn.Module) -> Scope:
        sizes, acts, functions, norms = dict[str, tuple[int, int]](), [], dict[str, str | None](), []
        functions.update((name, function_of(function)) for name, function in functions_of(module))
        for path, part in _nearby(module):
            if (size := linear_sizes(part)) is not None:
                if id(part) not in self.claimed:
                    sizes[path] = size
            elif is_activation(part):
                acts.append(path)
            elif is_norm(part):
                norms.append(path)
        # with what adapters and parametrizations put into a Linear, which conversion refuses by name
        parts = {id(part) for path in (*sizes, *norms) for part in module.get_submodule(path).modules()}
        held = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        return Scope(module, sizes, acts, functions, norms, all(id(part) in parts for part in held))


def _nearby(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules at most two names below one, but for what is in attention."""
    for name, child in module.named_children():
        yield name, child
        if linear_sizes(child) is None and not is_attention(child):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is attention, by its class's name."""
    return type(module).__name__.lower().endswith(("attention", "attn"))


def _not_an_ffn(path: str, kind: str) -> str | None:
    named = words(kind) | words(path)
    return next((what for word, what in NOT_AN_FFN.items() if word in named), None)


def _named_like_an_ffn(module: nn.Module) -> bool:
    name = type(module).__name__
    return (
        bool(FFN_WORDS & words(name)) or name.lower().endswith(("feedforward", "mlp", "ffn")) or _has_experts(module)
    )


def _has_experts(module: nn.Module) -> bool:
    """Whether a module has the matrices of several experts in one parameter."""
    if type(module).__module__.startswith("torch.nn"):  # a convolution
        return False
    return any(parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in module.parameters(recurse=False))


def _specs_of(scope: Scope) -> tuple[list[FfnSpec], str | None]:
    """Return the FFNs of a scope; and why there is none, where its parts look like one."""
    if scope.alone and 2 <= len(scope.sizes) <= 3:
        specs, reason = _mlp(scope)
        return specs, reason if scope.acts or _named_like_an_ffn(scope.owner) else None
    specs, sizes = _layer(scope), {*scope.sizes.values()}
    paired = any(f > d and (f, d) in sizes for d, f in sizes)
    learned = (_learned(part) for _, part in _nearby(scope.owner)) if paired and not specs else ()
    return specs, next(filter(None, learned), None)


def _learned(part: nn.Module) -> str | None:
    """Say so where a module is an activation with parameters."""
    kind = type(part).__name__
    named = "Activation" in kind or kind.lower().endswith("lu")
    if named and next(part.children(), None) is None and next(part.parameters(), None) is not None:
        return f"its activation {kind} has parameters, which no split can follow"
    return None


def _mlp(scope: Scope) -> tuple[list[FfnSpec], str | None]:
    """Return the FFN that a module is, as running it shows."""
    candidates = [
        replace(spec, act=act, function=function, norm=norm)
        for spec in _assignments(scope.sizes)
        for act, function in _activations(scope)
        for norm in [None, *scope.norms]
    ]
    if not candidates:
        return [], None
    f, d = scope.sizes[candidates[0].down]
    if f * 4 <= d:
        return [], f"it is {BOTTLENECK} of {f} neurons in a width of {d}, as adapters are"
    if type(scope.owner).forward is nn.ModuleDict.forward:  # BridgeTower's: the layer calls its parts
        return [spec for spec in candidates if spec.function is None][:1], None
    try:
        fitting = confirmed(scope.owner, candidates, (d, f))
    except CannotRun as problem:
        return [], f"what it computes cannot be told: {problem}"
    return fitting[:1], None if fitting else _why_none(scope.owner)


def _why_none(module: nn.Module) -> str:
    """Say what it is about a module that is no FFN to us."""
    for part in module.modules():
        if (learned := _learned(part)) is not None:
            return learned
        if isinstance(part, CONVOLUTIONS):
            return f"it has a convolution ({type(part).__name__}) in it, for which neurons are not alike"
        if _has_experts(part):
            return f"it is {NATIVE}"
    return "it computes something else than down(act(up(x))) or down(act(gate(x)) * up(x))"


def _activations(scope: Scope) -> Iterable[tuple[str, str | None]]:
    """(path, function) of what may be the activation; a function that its code calls where nothing else is there."""
    modules: list[tuple[str, str | None]] = [(path, None) for path in scope.acts]
    known = [(path, name) for path, name in scope.functions.items() if name is not None]
    return modules or known or [(INLINE, "")]


def _assignments(sizes: dict[str, tuple[int, int]]) -> Iterator[FfnSpec]:
    """Yield every way in which Linears may be the parts of one FFN, all of them used."""
    for paths in itertools.permutations(sizes):
        *first, down = paths
        f, d = sizes[down]
        if all(sizes[path] == (d, f) for path in first):
            yield FfnSpec(first[-1], down, "", gate=first[0] if len(first) == 2 else None)
        elif len(first) == 1 and sizes[first[0]] == (d, 2 * f):
            yield FfnSpec(first[0], down, "", parts=2)
            yield FfnSpec(first[0], down, "", parts=2, up_first=True)


def _layer(scope: Scope) -> list[FfnSpec]:
    """Return the FFNs without a gate that a layer holds: as many activations as pairs of Linears, in one order."""
    ups = [path for path, (d, f) in scope.sizes.items() if f > d and (f, d) in scope.sizes.values()]
    downs = [path for path, (f, d) in scope.sizes.items() if f > d and (d, f) in scope.sizes.values()]
    acts: list[tuple[str, str | None]] = [(path, None) for path in scope.acts]
    acts = acts or [(path, name) for path, name in scope.functions.items() if name is not None]
    acts = [act for act in acts if _beside(act[0], ups)]
    if not acts and len(ups) == 1 and (name := called_after(scope.owner, ups[0])):
        acts = [(INLINE, name)]
    order = list(scope.sizes)
    if not len(ups) == len(downs) == len(acts):
        return []
    for up, down in zip(ups, downs, strict=True):
        if scope.sizes[up] != scope.sizes[down][::-1] or order.index(up) > order.index(down):  # a bottleneck
            return []
    if any(_between(scope.owner, up, down) for up, down in zip(ups, downs, strict=True)):
        return []
    dropout = next((name for name in vars(scope.owner) if _of_neurons(name)), None)
    return [
        FfnSpec(up, down, act, function=function, dropout=dropout)
        for up, down, (act, function) in zip(ups, downs, acts, strict=True)
    ]


def _between(owner: nn.Module, up: str, down: str) -> bool:
    """Whether a layer has something of its own for each neuron between an FFN's Linears: a convolution, a norm."""
    f = (linear_sizes(owner.get_submodule(down)) or (0,))[0]
    names = [name for name, _ in owner.named_children()]
    children = names[names.index(up.split(".")[0]) : names.index(down.split(".")[0]) + 1]
    parts = [f"{child}.{name}" for child in children for name, _ in owner.get_submodule(child).named_parameters()]
    others = [part for part in parts if not part.startswith((f"{up}.", f"{down}."))]
    convolutions = [part for _, part in _nearby(owner) if isinstance(part, CONVOLUTIONS)]  # wherever it is declared
    return any(f in tensor.shape for tensor in (*map(owner.get_parameter, others), *(c.weight for c in convolutions)))


def _beside(act: str, ups: list[str]) -> bool:
    """Whether an activation lies in the module that holds one of the Linears, or in the layer itself."""
    parent = act.rpartition(".")[0]
    return parent == "" or any(up.rpartition(".")[0] == parent for up in ups)


def _of_neurons(name: str) -> bool:
    """Whether an attribute of a layer is the dropout of its neurons, by its name: a layer is not run by itself."""
    return "dropout" in name and bool({"activation", "act", "relu", "ffn", "intermediate"} & words(name))
