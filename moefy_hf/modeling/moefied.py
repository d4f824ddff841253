"""The mixin that makes any supported `PreTrainedModel` class its MoEfied version, driven by `config.moefication`."""

import copy
import importlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from .adapters import warn_of_other_order
from .allocation import changed, resolve_selection
from .ffn_sites import FfnSite, find_sites, stacks_of
from .interventions import scaled
from .routed_activation import FollowReplacements, RoutedActivation, is_routed
from .router_base import Router
from .routers import ROUTERS, router_class

# A key of every checkpoint that no model has: transformers' load report names it where the dense model is loaded
DENSE_NOTE = "NOTE: this is the DENSE model, the MoEfied one loads with trust_remote_code=True"
FORMAT_VERSION = 3  # 2: shared experts, mean compensation, selections beside top_k; 3: settings of routers


def split_sizes(site: FfnSite, num_experts: int | None, expert_size: int | None) -> tuple[int, int]:
    """(E, m) of one FFN; `num_experts` wins where both are given.

    Raises:
        ValueError: the neurons do not divide evenly; the nearest sizes that do are named.
    """
    neurons = site.sizes[1]
    wanted = num_experts if num_experts is not None else expert_size
    what = "experts" if num_experts is not None else "experts of size"
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= neurons or neurons % wanted:
        divisors = [n for n in range(1, neurons + 1) if neurons % n == 0]
        near = sorted(divisors, key=lambda n: abs(n - wanted) if isinstance(wanted, int) else n)[:4]
        raise ValueError(
            f"{site.name}: {neurons} neurons do not split into {what} {wanted!r}; nearby divisors: "
            f"{', '.join(map(str, sorted(near)))}"
        )
    return (wanted, neurons // wanted) if num_experts is not None else (neurons // wanted, wanted)


def install_(model: nn.Module) -> None:
    """Put a routed activation into every FFN that `config.moefication` names."""
    section = getattr(model.config, "moefication", None)
    if section is None:
        raise ValueError(
            f"{type(model).__name__} needs a `moefication` section in its config; "
            "convert a dense model with moefy_hf.moefy_"
        )
    if section["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has moefication format {section['format_version']}, newer than {FORMAT_VERSION}: "
            "upgrade moefy-hf"
        )
    kind, settings = section["router"], section.get("router_settings")
    router_class(kind, settings)  # finds what is wrong with them first
    sites = selected_sites(find_sites(model), section["layers"])
    sizes = [split_sizes(site, section["num_experts"], section["expert_size"]) for site in sites]
    shared = section.get("shared_experts", 0)
    check_shared(shared, sites, sizes)
    selections = resolve_selection(section["selection"], [experts for experts, _ in sizes], section, shared)
    for site, (num_experts, expert_size), selection in zip(sites, sizes, selections, strict=True):
        if is_routed(site.act):  # a subclass called post_init again, as transformers' classes may
            continue
        router = new_router(kind, site, num_experts, shared, settings)
        routed = RoutedActivation(site.act, router, expert_size, selection, shared)
        site.replace_act(routed)
        routed.connect_(site.first)
        if section.get("compensation"):
            routed.compensate_(torch.zeros(site.sizes[1]))
        if section.get("neuron_order"):
            routed.register_buffer("neuron_order", torch.full((site.sizes[1],), -1, dtype=torch.int32))
        site.owner.register_forward_pre_hook(FollowReplacements(routed, site))
        site.owner.register_forward_hook(refuse_bypass(routed, site.name))
    connect_routers_(model, sites)


def new_router(
    name: str, site: FfnSite, num_experts: int, shared: int, settings: Mapping[str, Any] | None = None
) -> Router:
    """One of `ROUTERS` for an FFN of E experts, the shared ones included; not initialised."""
    router = router_class(name, settings).of(site.weights(), num_experts - shared, **(settings or {}))
    router.read_from_(site.weights, shared)
    return freeze_(router.float())  # whatever type a model is made in: as `from_pretrained` has them


def freeze_(router: Router) -> Router:
    """Routers are trained only where their loss is on: an unused trainable parameter stalls DDP, weight decay shrinks
    it, and FSDP wants one type for all it trains."""
    return router.requires_grad_(False)


def connect_routers_(model: nn.Module, sites: list[FfnSite]) -> None:
    """Connect routers that hand something on to those of later layers.

    Raises:
        ValueError: the layers of a stack have different numbers of experts, and one router for all.
    """
    for stack, members in stacks_of(sites).items():
        routed = [site.act for site in members]
        type(routed[0].router).connect_stack_(routed, model.get_submodule(stack), members[0].name)
    connect_checkpointing_(model)
    # FSDP wraps these, and nothing within: routers apart, whose type and training differ from the layer's. Not those
    # that hand scores on, which look for each other
    classes = {type(site.act.router) for site in sites if next(site.act.router.parameters(), None) is not None}
    named = {cls.__name__ for cls in classes if not cls.serves_stack}
    others = {each for each in model._no_split_modules or () if each not in {cls.__name__ for cls in ROUTERS.values()}}
    model._no_split_modules = others | named


def connect_checkpointing_(model: nn.Module) -> None:
    """Let the gradient checkpointing that transformers gave the layers carry what their routers hand on."""
    for cls in {type(module) for module in model.modules() if isinstance(module, Router)}:
        cls.connect_checkpointing_(model)


def check_shared(shared: int, sites: list[FfnSite], sizes: list[tuple[int, int]]) -> None:
    """
    Raises:
        ValueError: no number of experts, or no routed expert would be left.
    """
    for site, (experts, _) in zip(sites, sizes, strict=True):
        if not isinstance(shared, int) or isinstance(shared, bool) or not 0 <= shared < experts:
            raise ValueError(f"{site.name}: shared_experts={shared!r} must be from 0 to {experts - 1} of {experts}")


def selected_sites(sites: list[FfnSite], layers: list[int] | None) -> list[FfnSite]:
    """The FFNs that are converted: all of them, or those at the given positions."""
    if layers is None:
        return sites
    if not layers or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(sites) for i in layers):
        raise ValueError(f"layers={layers} must be a non-empty list of FFN positions from 0 to {len(sites) - 1}")
    return [sites[i] for i in sorted(set(layers))]


class refuse_bypass:
    """Forward hook of an FFN's owner: a fused MLP kernel that never calls the activation would silently be dense."""

    def __init__(self, routed: RoutedActivation, name: str):
        self.routed, self.name = routed, name

    def __call__(self, owner: nn.Module, args: tuple, output: Any) -> None:
        observed = self.routed.observed
        if observed.x is not None or observed.kept is not None:
            observed.x = observed.kept = None
            raise RuntimeError(f"{self.name}: the activation of this routed FFN never ran; disable fused MLP kernels")


def base_layer(linear: Any) -> Any:
    """What adapters wrap: the module that survives `merge_and_unload`."""
    return base_layer(linear.base_layer) if hasattr(linear, "base_layer") else linear


def is_moefied(model: nn.Module) -> bool:
    """Whether a model's FFNs are routed; by name, for a copy of this file that came with a checkpoint makes its own
    class of the mixin."""
    return any(base.__name__ == "MoefiedMixin" for base in type(model).__mro__)


class MoefiedMixin:
    """`class MoefiedX(MoefiedMixin, X)` is X whose FFNs are routed as `config.moefication` says.

    Keys of the state dict are those of X plus `*.router.*` and `*.neuron_order`, so that checkpoints load both ways.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        cls._keep_in_fp32_modules_strict = [*(stock._keep_in_fp32_modules_strict or ()), "router"]
        cls._keys_to_ignore_on_load_unexpected = [*(stock._keys_to_ignore_on_load_unexpected or ()), DENSE_NOTE]
        if cls.moefied_class() is cls:
            # Libraries that load a model again by the class its config names look for that among transformers' own:
            # TRL its reference models, which would silently be dense, without the trust that the model was loaded with
            setattr(transformers, cls.__name__, cls)
        # transformers denies its checkpoint renamings (ViT has some) to custom classes: claim them under our name
        mapping = get_checkpoint_conversion_mapping(stock.__name__)
        if mapping is None:
            mapping = get_checkpoint_conversion_mapping(stock.config_class.model_type)
        if mapping is not None:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)

    @classmethod
    def stock_class(cls) -> type[PreTrainedModel]:
        """The transformers class this one MoEfies."""
        return cls.__mro__[cls.__mro__.index(MoefiedMixin) + 1]

    @classmethod
    def moefied_class(cls) -> type[PreTrainedModel]:
        """The class that MoEfies the stock one: itself, or what a user's class extends."""
        return next(each for each in cls.__mro__ if MoefiedMixin in each.__bases__)

    def post_init(self):
        install_(self)  # first, so that routers are initialised, counted and loaded like every other module
        self.config.auto_map = self.auto_map()
        super().post_init()

    @classmethod
    def auto_map(cls) -> dict[str, str]:
        """Every MoEfied head of this architecture, under all AutoModel names it has: one that is missing here would
        load as the dense model."""
        module = cls.moefied_class().__module__
        classes = [
            c for c in vars(sys.modules[module]).values() if isinstance(c, type) and issubclass(c, MoefiedMixin)
        ]
        stem = module.rpartition(".")[2]
        heads = {c.stock_class().__name__: f"{stem}.{c.__name__}" for c in classes if "_auto_class" in vars(c)}
        found = {}
        for name, auto in vars(modeling_auto).items():
            if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
                stock = auto._model_mapping._model_mapping.get(cls.config_class.model_type)
                for each in stock if isinstance(stock, tuple) else (stock,):
                    if each in heads:
                        found[name] = heads[each]
        return found

    def initialize_weights(self):
        for module in self.modules():  # a nested stock model would apply its own standard deviation
            if isinstance(module, Router) and not getattr(module, "_is_hf_initialized", False):
                module.reset_parameters()
                module._is_hf_initialized = True
            elif isinstance(module, RoutedActivation) and module.neuron_order is not None:
                init.constant_(module.neuron_order, -1)  # unknown, where the checkpoint has none
        super().initialize_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.connect_()  # quantisers replace Linears after __init__
        for site in model.moe_sites():
            freeze_(site.act.router)  # loading makes new parameters, trainable ones
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """As transformers does; a subclass that was not registered for an Auto class is saved as the MoEfied class
        that it extends, as transformers does with subclasses of its own."""
        cls, saved, auto_map = type(self), self.moefied_class(), self.config.auto_map
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = self.state_dict() if state_dict is None else state_dict  # empty where another process saves
            state_dict = {DENSE_NOTE: torch.zeros(1, dtype=torch.uint8), **state_dict}
        if "_auto_class" not in vars(cls):
            self.__class__ = saved
        elif cls.__module__ != saved.__module__:  # its own file is saved, and not the one that has the other heads
            stem = saved.__module__.rpartition(".")[2]
            self.config.auto_map = {k: v for k, v in auto_map.items() if not v.startswith(f"{stem}.")}
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            self.__class__ = cls

    def load_adapter(self, *args, **kwargs):
        found = super().load_adapter(*args, **kwargs)
        names = dict.fromkeys(name for name, _ in self.named_parameters())
        warn_of_other_order(self, find_sites(self), names, "")  # type: ignore[arg-type]
        return found

    def _load_from_state_dict(self, state_dict, prefix, *args):
        warn_of_other_order(self, find_sites(self), state_dict, prefix)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected = args[3]
        if prefix + DENSE_NOTE in unexpected:
            unexpected.remove(prefix + DENSE_NOTE)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        connect_checkpointing_(self)  # type: ignore[arg-type]

    def _get_name(self):  # Trainer's label smoother compares this with the library's causal LM names
        return self.stock_class().__name__

    def moe_sites(self) -> list[FfnSite]:
        """The routed FFNs, in forward order."""
        return [site for site in find_sites(self) if is_routed(site.act)]  # type: ignore[arg-type]

    def connect_(self) -> None:
        """(Re)attach routers to the first Linear of their FFN, after something replaced Linear modules."""
        for site in self.moe_sites():
            site.act.connect_(site.first)

    def set_selection(self, **changes) -> None:
        """Change which experts run, now and in checkpoints saved from here on: the run-time budget.

        `model.set_selection(k=0.3)` keeps type and allocation as they are; k is a number of experts (int), a share of
        them (float in (0, 1]), or a list with one of these per layer; `allocation="sensitivity"` and "angular" spread
        one average k over layers by what `allocate_budgets` measured, "uniform" gives each the same.

        `model.set_selection(type="threshold", tau=0.9)` computes as many experts as each token needs: "threshold",
        "top_p" (setting `p`) and "level". They take a budget k, too, once `measure_reach` has found what each
        setting spends; allocation "global" is then one setting for all layers.

        Raises:
            ValueError: see `resolve_selection`; the selection stays as it was.
        """
        section, sites = self.config.moefication, self.moe_sites()
        selection = changed(section["selection"], changes)
        experts, shared = [site.act.num_experts for site in sites], section.get("shared_experts", 0)
        found = resolve_selection(selection, experts, section, shared)
        section["selection"] = copy.deepcopy(selection)
        for site, each in zip(sites, found, strict=True):
            site.act.selection = each

    def disable_experts(self, experts: Mapping[int, Iterable[int]]) -> AbstractContextManager[None]:
        """`with model.disable_experts({layer: [expert, ...]}):` what the model does without them; see `scaled`."""
        return self.boost_experts({layer: dict.fromkeys(each, 0.0) for layer, each in experts.items()})

    def boost_experts(self, factors: Mapping[int, Mapping[int, float]]) -> AbstractContextManager[None]:
        """`with model.boost_experts({layer: {expert: factor}}):` what these experts add, times a factor; see
        `scaled`."""
        return scaled(self.moe_sites(), factors)

    def set_moe_implementation(self, name: str = "auto") -> None:
        """How the FFNs run from here on; never saved.

        Args:
            name: "masked" computes every neuron and zeroes those not selected, the form that trains, and what a model
                begins with; "cpu" computes the selected experts alone (C++, float32 or bfloat16, compiled on first
                use), "torch" does so without a compiler, for a few tokens; "triton" on GPUs (the extra of that name),
                in float32 or half precision, also where gradients or autocast are wanted; "auto" takes the best of
                these that can run here, and is masked where it would not be faster. Other calls that need gradients or
                autocast, and all that need a compiled graph or dropout of an FFN's neurons, are masked.

        Raises:
            ValueError: an unknown name, or an FFN that cannot run so: adapted, quantised, offloaded, of another dtype
                or activation; "auto" leaves such FFNs masked.
            ImportError: moefy-hf is not installed: a checkpoint's own files hold no kernels; or Triton is not.
        """
        try:
            # a string: no file of this one travels there
            execution = importlib.import_module("moefy_hf.runtime.execution")
        except ImportError as error:
            raise ImportError(f"implementations come with the package: pip install moefy-hf ({error})") from error
        execution.set_implementation_(self, name)
