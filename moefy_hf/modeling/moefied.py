"""The mixin that makes any supported `PreTrainedModel` class its MoEfied version, driven by `config.moefication`."""

import copy
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .adapters import warn_of_other_order
from .auto_map import heads_in, model_type_of, with_heads
from .ffn_sites import FfnSite, find_sites
from .install import connect_checkpointing_, freeze_, install_
from .interventions import scaled
from .offload import is_offloaded
from .routed_activation import RoutedActivation, is_routed
from .router_base import Router
from .section import FORMAT_VERSION as FORMAT_VERSION  # home code looks for it here
from .section import Section
from .selection_config import changed, resolve_selection

if TYPE_CHECKING:
    _Base = PreTrainedModel  # what every class has that the mixin is mixed into
else:
    _Base = object

# A key of every checkpoint that no model has: transformers' load report names it where the dense model is loaded
DENSE_NOTE = "NOTE: this is the DENSE model, the MoEfied one loads with trust_remote_code=True"


def base_layer(linear: Any) -> Any:
    """Return what adapters wrap: the module that survives `merge_and_unload`."""
    return base_layer(linear.base_layer) if hasattr(linear, "base_layer") else linear


def is_moefied(model: nn.Module) -> bool:
    """Return whether a model's FFNs are routed.

    It goes by name: a copy of this file that came with a checkpoint makes its own class of the mixin.
    """
    return any(base.__name__ == "MoefiedMixin" for base in type(model).__mro__)


class MoefiedMixin(_Base):
    """Makes `class MoefiedX(MoefiedMixin, X)` an X whose FFNs are routed as `config.moefication` says.

    Keys of the state dict are those of X plus `*.router.*` and `*.neuron_order`, so that checkpoints load both ways.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        cls._keys_to_ignore_on_load_unexpected = [*(stock._keys_to_ignore_on_load_unexpected or ()), DENSE_NOTE]
        if cls.moefied_class() is cls:
            # Libraries that load a model again by the class its config names look for that among transformers' own:
            # TRL its reference models, which would silently be dense, without the trust that the model was loaded with
            setattr(transformers, cls.__name__, cls)
        # transformers denies its checkpoint renamings (ViT has some) to custom classes: claim them under our name
        mapping = get_checkpoint_conversion_mapping(stock.__name__)
        if mapping is None:
            mapping = get_checkpoint_conversion_mapping(model_type_of(stock))
        if mapping is not None:
            register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)

    @classmethod
    def stock_class(cls) -> type[PreTrainedModel]:
        """Return the transformers class that this one MoEfies."""
        return cls.__mro__[cls.__mro__.index(MoefiedMixin) + 1]

    @classmethod
    def moefied_class(cls) -> type[PreTrainedModel]:
        """Return the class that MoEfies the stock one: itself, or what a user's class extends."""
        return next(base for base in cls.__mro__ if MoefiedMixin in base.__bases__)

    def post_init(self) -> None:
        """Install routers, then do what transformers does at the end of a model's `__init__`."""
        install_(self)  # first, so that routers are initialised, counted and loaded like every other module
        ours = {f"{site.spec.act.rpartition('.')[2]}.router" for site in self.moe_sites()}  # not a native MoE's
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *ours}
        self.set_auto_map_()
        super().post_init()

    @classmethod
    def auto_map(cls) -> dict[str, str]:
        """Return every MoEfied head of this architecture, under all AutoModel names it has.

        A head that is missing here would load as the dense model.
        """
        module = sys.modules[cls.moefied_class().__module__]
        return heads_in(module, MoefiedMixin, cls.moefied_class())

    def set_auto_map_(self) -> None:
        """Name every MoEfied head in the config, in place of dense ones, beside its own config and tokenizer."""
        self.config.auto_map = with_heads(getattr(self.config, "auto_map", None) or {}, self.auto_map())

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return whether transformers may not trust this class's way to initialise: as with the stock class.

        Of custom code it skips what has no parameters of its own, and leaves buffers empty that Falcon-H1 fills.
        """
        return cls.stock_class().is_custom_code() if cls.moefied_class() is cls else super().is_custom_code()

    def initialize_weights(self) -> None:
        """Initialise routers, which have a way of their own, then what transformers initialises."""
        for module in self.modules():  # a nested stock model would apply its own standard deviation
            if isinstance(module, Router) and not getattr(module, "_is_hf_initialized", False):
                module.reset_parameters()
                module._is_hf_initialized = True
            elif isinstance(module, RoutedActivation) and module.neuron_order is not None:
                init.constant_(module.neuron_order, -1)  # unknown, where the checkpoint has none
        super().initialize_weights()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does; its routers are connected and frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.connect_()  # quantisers replace Linears after __init__
        for site in model.moe_sites():
            freeze_(site.act.router)  # loading makes new parameters, trainable ones
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save a model as transformers does.

        A subclass that was not registered for an Auto class is saved as the MoEfied class that it extends:
        transformers does so with subclasses of its own classes. An offloaded model is read shard by shard, of 1 GB by
        default.

        Args:
            save_directory: the folder.
            is_main_process: False where another process writes the files.
            state_dict: what is saved, by default the model's; empty where another process saves.
            args, kwargs: further arguments of transformers' method.

        Raises:
            MoefyError: the model has code of its own, which cannot be saved: the message says what to do.
        """
        cls, saved, auto_map = type(self), self.moefied_class(), {**self.config.auto_map}
        if type(module := sys.modules[saved.__module__]) is not ModuleType:
            module.check(type(self.config))  # it was generated; with code of the user it may have to stay here
        if is_offloaded(self):
            self.tie_weights()  # accelerate has put new objects in the places of those that were tied
            kwargs.setdefault("max_shard_size", "1GB")
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = self.state_dict() if state_dict is None else state_dict  # empty where another process saves
            state_dict = {DENSE_NOTE: torch.zeros(1, dtype=torch.uint8), **state_dict}
        if "_auto_class" not in vars(cls):
            self.__class__ = saved
        elif cls.__module__ != saved.__module__:  # its own file is saved, and not the one that has the other heads
            stem = saved.__module__.rpartition(".")[2]
            self.config.auto_map = {k: v for k, v in auto_map.items() if not v.startswith(f"{stem}.")}
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
            if is_main_process and "Tokenizer" in saved.__name__:  # transformers takes these for tokenizers
                self.config.auto_map = auto_map
                self.config.save_pretrained(save_directory)
        finally:
            self.__class__ = cls

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter as transformers does; warn where it may be the dense model's."""
        result = super().load_adapter(*args, **kwargs)
        names = dict.fromkeys(name for name, _ in self.named_parameters())
        warn_of_other_order(self, find_sites(self), names, "")
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        warn_of_other_order(self, find_sites(self), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected = args[3]
        if prefix + DENSE_NOTE in unexpected:
            unexpected.remove(prefix + DENSE_NOTE)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        connect_checkpointing_(self)

    def _get_name(self) -> str:  # Trainer's label smoother compares this with the library's causal LM names
        return self.stock_class().__name__

    def moe_sites(self) -> list[FfnSite]:
        """Return the routed FFNs, in forward order."""
        return [site for site in find_sites(self) if is_routed(site.act)]

    def connect_(self) -> None:
        """Attach routers to the first Linear of their FFN again, after something replaced Linear modules."""
        for site in self.moe_sites():
            site.act.connect_(site.first)

    def set_selection(self, **changes: Any) -> None:
        """Change which experts run, now and in checkpoints saved from here on: the budget.

        `model.set_selection(k=0.3)` sets the budget, and keeps type and allocation as they are.

        `model.set_selection(type="threshold", tau=0.9)` computes as many experts as each token needs. Such types are
        "threshold", "top_p" (its threshold is called `p`) and "level". The larger the threshold, the more experts.
        They take a budget k, too, once thresholds were calibrated on data (`moefy_hf.calibrate_thresholds_`).

        Args:
            changes: `type`; `k`: a number of experts (int), a share of them (float in (0, 1]), or a list with one of
                these per layer; `tau`, `p` or `level`: the threshold of that type, or a list; `allocation`: "uniform"
                gives each layer the same k, "sensitivity" and "angular" share an average k among layers by what
                `moefy_hf.allocate_budgets_` measured, "global" is one threshold for all layers.

        Raises:
            MoefyError: see `resolve_selection`; the selection stays as it was.

        Example:
            >>> model.set_selection(k=0.3)
        """
        section, sites = Section(self.config), self.moe_sites()
        selection = changed(section.selection, changes)
        experts, shared = [site.act.num_experts for site in sites], section.shared_experts
        per_layer = resolve_selection(selection, experts, section, shared)
        section.selection = copy.deepcopy(selection)
        for site, layer_selection in zip(sites, per_layer, strict=True):
            site.act.selection = layer_selection

    def disable_experts(self, experts: Mapping[int, Iterable[int]]) -> AbstractContextManager[None]:
        """Return a context in which some experts add nothing; see `scaled`.

        Args:
            experts: position of an FFN -> its experts, numbered from 0.

        Example:
            >>> with model.disable_experts({0: [3, 5]}):
            ...     model(**inputs)
        """
        return self.boost_experts({layer: dict.fromkeys(numbers, 0.0) for layer, numbers in experts.items()})

    def boost_experts(self, factors: Mapping[int, Mapping[int, float]]) -> AbstractContextManager[None]:
        """Return a context in which what some experts add is multiplied by a factor; see `scaled`.

        Args:
            factors: position of an FFN -> expert, numbered from 0 -> factor.

        Example:
            >>> with model.boost_experts({0: {3: 2.0}}):
            ...     model(**inputs)
        """
        return scaled(self.moe_sites(), factors)

    def set_moe_implementation(self, name: str = "auto") -> None:
        """Choose how the FFNs run from here on; the choice is never saved.

        Calls that need a compiled graph, or dropout of an FFN's neurons, are always masked. So are those that need
        gradients or autocast, except with "triton".

        Args:
            name: "masked" computes every neuron and zeroes those not selected; a model begins with it, and trains
                with it. "cpu" computes the selected experts alone (C++, float32 or bfloat16, compiled on first use).
                "torch" does so without a compiler, for a few tokens. "triton" is for GPUs (the extra of that name), in
                float32 or half precision, also where gradients or autocast are wanted. "auto" takes the best of these
                that can run here, and is masked where it would not be faster.

        Raises:
            MoefyError: an unknown name, or an FFN that cannot run so: adapted, quantised, offloaded, of another dtype
                or activation; "auto" leaves such FFNs masked.
            ImportError: moefy-hf is not installed (a checkpoint's own files hold no kernels), or Triton is not.

        Example:
            >>> model.set_moe_implementation("cpu")
        """
        try:
            # a string: no file of this one travels there
            execution = importlib.import_module("moefy_hf.runtime.execution")
        except ImportError as error:
            raise ImportError(f"implementations come with the package: pip install moefy-hf ({error})") from error
        execution.set_implementation_(self, name)
