"""Loading: which class a model or a checkpoint has, dense or MoEfied."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from .discovery.code import module_of
from .errors import MoefyError, NotMoefied, UnsupportedModel
from .modeling.ffn_sites import FfnSite
from .modeling.moefied import MoefiedMixin, is_moefied
from .modeling.routed_activation import RoutedActivation, is_routed
from .modeling.section import FORMAT_VERSION, Section

if TYPE_CHECKING:

    class MoefiedModel(MoefiedMixin):
        """Is the type of MoEfied models, from this package's classes or from a checkpoint's own code.

        It is for annotations alone: `loading.check_moefied` is what tells a MoEfied model from a dense one.
        """
else:
    MoefiedModel = PreTrainedModel


def routed(site: FfnSite) -> RoutedActivation:
    """Return the routed activation of one FFN of a MoEfied model.

    The check goes by name: a model that was loaded with `trust_remote_code` has its checkpoint's own classes.

    Raises:
        TypeError: the FFN is dense.
    """
    if not is_routed(site.act):
        raise TypeError(f"{site.name} is a dense FFN, and has no experts")
    return cast(RoutedActivation, site.act)


def is_inline(site: FfnSite) -> bool:
    """Return whether the code of a routed FFN calls a function, so that its routed activation acts on `down`'s input.

    Code that came with an older checkpoint knows no such FFNs.
    """
    return bool(vars(site.act).get("inline"))


def moefied_class(cls: type[PreTrainedModel], config: PreTrainedConfig | None = None) -> type[PreTrainedModel]:
    """Return the MoEfied version of a transformers model class, or of one with code of its own.

    Args:
        cls: the model class.
        config: of a model with code of its own, which names the other heads that the code has.

    Raises:
        UnsupportedModel: this architecture has no MoEfied version of this head; those it has are named.

    Example:
        >>> moefied_class(transformers.BertForMaskedLM)
        <class 'moefy_hf.modeling.modeling_moefied_bert.MoefiedBertForMaskedLM'>
    """
    module = vars(module_of(cls, config))
    classes = [c for c in module.values() if isinstance(c, type) and issubclass(c, MoefiedMixin)]
    heads = {c.stock_class(): c for c in classes if "_auto_class" in vars(c)}
    if cls not in heads:
        known = ", ".join(stock.__name__ for stock in heads)
        raise UnsupportedModel(f"{cls.__name__} has no MoEfied version; supported for its type: {known}")
    return heads[cls]


def checkpoint_class(
    config: Any, head: str | None = None, *, trust_remote_code: bool = False, revision: str = "main"
) -> type[PreTrainedModel]:
    """Return the model class that a checkpoint's config names, or the one of a head, MoEfied where the checkpoint is.

    Args:
        config: of the checkpoint.
        head: the name of an Auto class, "AutoModelForMaskedLM" or another.
        trust_remote_code: whether classes in code that comes with the checkpoint count; that code is run.
        revision: where that code lies on the Hub.

    Raises:
        UnsupportedModel: it names none, or none that this version of transformers has, or there is no such head.
    """
    stock = own_class(config, head, revision) if trust_remote_code else None
    stock = stock or stock_class(config, head)
    return moefied_class(stock, config) if Section.of(config) is not None else stock


def own_class(config: Any, head: str | None, revision: str) -> type[PreTrainedModel] | None:
    """Return the dense class in the code that comes with a checkpoint; None where it has none of this head."""
    auto_map = vars(config).get("auto_map") or {}
    heads = {auto: path for auto, path in auto_map.items() if auto.startswith("AutoModel")}
    named = [auto for auto, path in heads.items() if path.rpartition(".")[2] in (config.architectures or ())]
    auto = head or next(iter(named), None)
    if auto not in heads:
        return None
    cls: Any = get_class_from_dynamic_module(heads[auto], config.name_or_path, revision=revision)
    if any(base.__name__ == "MoefiedMixin" for base in cls.__mro__):
        cls = cls.stock_class()
    if not cls.__module__.startswith("transformers."):  # as Auto classes do, so that it is saved with its code
        cls.register_for_auto_class(auto)
        cls.config_class.register_for_auto_class()
    return cls


def stock_class(config: Any, head: str | None) -> type[PreTrainedModel]:
    """Return the dense class of transformers; see `checkpoint_class`."""
    names = config.architectures or []
    if head is not None or not names:
        heads = heads_of(config)
        if head in heads:
            return heads[head]
        problem = (
            f"a {config.model_type} has no head {head!r}" if head else "its config does not say which head it has"
        )
        known = ", ".join(dict.fromkeys([*heads, *(vars(config).get("auto_map") or {})]))
        raise UnsupportedModel(f"{problem}; choose one (--head) from {known}")
    stock = getattr(transformers, names[0].removeprefix("Moefied"), None)
    if stock is None:
        raise UnsupportedModel(f"{names[0]} is no architecture of transformers {transformers.__version__}")
    return stock


def heads_of(config: Any) -> dict[str, type[PreTrainedModel]]:
    """Return the Auto classes that have a model for a config: name -> the class of that model."""
    heads = {}
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            if type(config) in auto._model_mapping:
                stock = auto._model_mapping[type(config)]
                heads[name] = stock[0] if isinstance(stock, tuple) else stock
    return heads


def read_config(name: str | Path, revision: str = "main", *, trust_remote_code: bool = False) -> Any:
    """Read the config of a checkpoint.

    Args:
        name: repository on the Hub, or folder.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        UnsupportedModel: this version of transformers does not know its model type, or it has code of its own.
        OSError: there is no such checkpoint, or the Hub cannot be reached.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedModel(str(error)) from error


def load(
    name: str | Path,
    revision: str = "main",
    *,
    head: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a dense or MoEfied model with this package's own modeling code.

    Args:
        name: repository on the Hub, or folder.
        revision: branch, tag or commit on the Hub.
        head: the name of an Auto class, where the config does not say which head the checkpoint has.
        trust_remote_code: whether code that comes with the checkpoint may run; models that are none of transformers'
            need it.
        kwargs: further arguments of `from_pretrained`.

    Returns:
        the model, of the class that `checkpoint_class` finds.

    Raises:
        UnsupportedModel: an unknown model type, architecture or head.
        OSError: there is no such checkpoint, or the Hub cannot be reached.

    Example:
        >>> model = load("my-moe")
        >>> model.set_selection(k=0.3)
    """
    config = read_config(name, revision, trust_remote_code=trust_remote_code)
    cls = checkpoint_class(config, head, trust_remote_code=trust_remote_code, revision=revision)
    try:
        return cls.from_pretrained(name, revision=revision, **kwargs)
    except MoefyError:
        raise
    except ValueError as error:  # transformers', in whatever words
        raise UnsupportedModel(f"{name} cannot be loaded: {error}") from error


def check_moefied(model: PreTrainedModel) -> MoefiedModel:
    """Return the model itself, which a type checker knows to be MoEfied from here on.

    Raises:
        NotMoefied: it is dense.
    """
    if not is_moefied(model):
        raise NotMoefied(f"{type(model).__name__} is not MoEfied; convert it with moefy_hf.moefy_ first")
    return cast(MoefiedModel, model)


def check_code(model: PreTrainedModel) -> None:
    """Check that a model's code is of this package's format.

    A model that was loaded with `trust_remote_code` runs the code its checkpoint came with, which an older or newer
    version of this package wrote.

    Raises:
        UnsupportedModel: it is of another format than this package's.
    """
    mixin = next((base for base in type(model).__mro__ if base.__name__ == "MoefiedMixin"), None)
    version = vars(sys.modules[mixin.__module__])["FORMAT_VERSION"] if mixin else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise UnsupportedModel(
            f"this model runs code of format {version} that came with its checkpoint, and this package is of format "
            f"{FORMAT_VERSION}: load it with moefy_hf.load(name), whose code is the package's"
        )
