"""`auto_map` of a checkpoint's config: which of its classes the Auto classes of transformers load."""

from collections.abc import Mapping
from types import ModuleType
from typing import cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


def model_type_of(cls: type[PreTrainedModel]) -> str:
    """Return the model type that a model class of transformers is for."""
    return cast(type[PreTrainedConfig], cls.config_class).model_type  # only the base class has no config class


def auto_classes(model_type: str) -> dict[str, tuple[str, ...]]:
    """Return the Auto classes that have models of a type: {"AutoModelForMaskedLM": ("BertForMaskedLM",)}."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            stock = auto._model_mapping._model_mapping.get(model_type, ())
            found[name] = stock if isinstance(stock, tuple) else (stock,)
    return {name: stock for name, stock in found.items() if stock}


def heads_in(module: ModuleType, mixin: type, own: type[PreTrainedModel]) -> dict[str, str]:
    """Return every MoEfied head that a module has, under all AutoModel names that its stock class has.

    Args:
        module: of the architecture.
        mixin: what MoEfied classes are mixed of.
        own: the class that is saved; of several heads with one Auto class (DeiT's), that loads it.
    """
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, mixin)]
    classes = [c for c in classes if vars(c).get("_auto_class") is not None]
    stem = module.__name__.rpartition(".")[2]
    heads = {c.__name__.removeprefix("Moefied"): f"{stem}.{c.__name__}" for c in classes}
    names = {str(vars(c)["_auto_class"]): f"{stem}.{c.__name__}" for c in classes}
    for name, stock in auto_classes(model_type_of(own)).items():
        for head in reversed(stock):
            if head in heads:
                names[name] = heads[head]
    if own in classes:
        names[str(own._auto_class)] = heads[own.__name__.removeprefix("Moefied")]
    return names


def with_heads(auto_map: Mapping[str, str], heads: Mapping[str, str]) -> dict[str, str]:
    """Return an `auto_map` with MoEfied heads in place of dense ones, beside its own config and tokenizer."""
    kept = {name: value for name, value in auto_map.items() if not name.startswith("AutoModel")}
    known = {path.rpartition(".Moefied")[2]: path for path in heads.values()}
    for name in auto_map.keys() - kept.keys():  # code of its own may have one class under several names
        if (head := auto_map[name].rpartition(".")[2].removeprefix("Moefied")) in known:
            kept[name] = known[head]
    return {**kept, **heads}
