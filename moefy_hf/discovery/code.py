"""The modeling code of a MoEfied architecture, written from one template: a class for each of its heads.

`moefy_hf.modeling.modeling_moefied_bert` is such a module: nobody keeps it as a file, it is made when it is imported.
A checkpoint gets it as a file beside its weights, with the files of `moefy_hf/modeling` that it imports.
"""

import importlib.machinery
import shutil
import sys
import tempfile
import types
import weakref
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto

from .. import modeling
from ..errors import UnsupportedModel
from ..modeling.moefied import model_type_of

HOME = Path(modeling.__file__).parent
PREFIX = f"{modeling.__name__}.modeling_moefied_"
REMOTE = "transformers_modules."  # where transformers keeps the code of checkpoints

TEMPLATE = '''"""MoEfied {model_type}, written by moefy-hf.

The files that it needs, named here for transformers 4, which copies no others and would not get to `needs`:

{siblings}
"""

from .needs import TRANSFORMERS  # noqa: F401

# isort: split
{imports}

from .moefied import MoefiedMixin
{classes}'''

CLASS = '''

class Moefied{name}(MoefiedMixin, {name}):
    _auto_class = "{auto}"
'''


def heads_of(model_type: str) -> dict[str, str]:
    """Return the heads of an architecture of transformers: class -> its Auto class, the most telling where there are
    several.

    Example:
        >>> heads_of("gpt2")["GPT2LMHeadModel"]
        'AutoModelForCausalLM'
    """
    found: dict[str, list[str]] = {}
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            classes = auto._model_mapping._model_mapping.get(model_type, ())
            for each in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(each, []).append(name)
    config = CONFIG_MAPPING[model_type]
    own = (each for each in found if _class(each, model_type).config_class is config)  # others wrap any model
    return {each: min(found[each], key=_rank) for each in own}


def _rank(auto: str) -> tuple[bool, bool, str]:
    return auto in ("AutoModelForPreTraining", "AutoModelForTextEncoding"), auto != "AutoModel", auto


@lru_cache(maxsize=None)
def module_of(cls: type[PreTrainedModel]) -> types.ModuleType:
    """Return the module that has the MoEfied version of a model class, and of the other heads of its architecture.

    Raises:
        UnsupportedModel: no Auto class has this head, so that nobody could load it.
    """
    model_type = model_type_of(cls)
    if not cls.__module__.startswith(REMOTE):
        name = PREFIX + _stem(model_type)
        heads = heads_of(model_type)
        if cls.__name__ not in heads:
            known = ", ".join(heads) or "none"
            raise UnsupportedModel(f"{cls.__name__} has no Auto class; those of {model_type!r}: {known}")
        return importlib.import_module(name)
    return _exec(GeneratedModule(f"{PREFIX}{_stem(model_type)}", model_type, _own_heads(cls), cls.__module__))


def _stem(model_type: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in model_type)


def _own_heads(cls: type[PreTrainedModel]) -> dict[str, str]:
    """Return the heads in the code that a checkpoint brought: class -> Auto class."""
    classes = vars(sys.modules[cls.__module__]).values()
    heads = [each for each in classes if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    return {each.__name__: vars(each).get("_auto_class") or "AutoModel" for each in heads if _is_head(each, cls)}


def _is_head(each: type[PreTrainedModel], cls: type[PreTrainedModel]) -> bool:
    same = each.__module__ == cls.__module__ and each.config_class is cls.config_class
    return same and (each is cls or "_auto_class" in vars(each) and each._auto_class is not None)


class GeneratedModule(types.ModuleType):
    """A module that is made from the template; its file is written where somebody asks for it, to save it.

    Args:
        name: of the module.
        model_type: the architecture.
        heads: class -> Auto class.
        base: module that has these classes, where that is a checkpoint's own code.
    """

    def __init__(self, name: str, model_type: str, heads: dict[str, str], base: str | None = None):
        super().__init__(name, f"MoEfied {model_type}.")
        vars(self).update(_model_type=model_type, _heads=heads, _base=base, __package__=modeling.__name__)

    def _text(self, base: str | None) -> str:
        siblings = sorted(path.stem for path in HOME.glob("*.py") if path.stem != "__init__")
        names = sorted(self._heads)
        return TEMPLATE.format(
            model_type=self._model_type,
            siblings="\n".join(f"from .{stem} import *" for stem in siblings),
            imports=f"from {base} import {', '.join(names)}" if base else _imports(names, self._model_type),
            classes="".join(CLASS.format(name=name, auto=auto) for name, auto in self._heads.items()),
        )

    @cached_property
    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="moefy_hf_"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        base = None if self._base is None else Path(str(sys.modules[self._base].__file__))
        needed = [*HOME.glob("*.py"), *([base, *map(Path, get_relative_import_files(base))] if base else ())]
        for path in needed:
            shutil.copy(path, folder)
        text = self._text(f".{base.stem}" if base else None)
        (folder / f"{self.__name__.rpartition('.')[2]}.py").write_text(text, encoding="utf-8")
        return folder

    @property
    def __file__(self) -> str:  # type: ignore[override]
        return str(self._folder / f"{self.__name__.rpartition('.')[2]}.py")


def _imports(names: list[str], model_type: str) -> str:
    listed = [name for name in names if hasattr(transformers, name)]
    lines = ["from transformers import (", *(f"    {name}," for name in listed), ")"] if listed else []
    others = [name for name in names if name not in listed]
    lines += [f"from {_class(name, model_type).__module__} import {name}" for name in others]
    return "\n".join(lines)


def _class(name: str, model_type: str) -> type[PreTrainedModel]:
    """Return a model class, also one that transformers does not export."""
    if (found := getattr(transformers, name, None)) is None:
        package = importlib.import_module(CONFIG_MAPPING[model_type].__module__.rpartition(".")[0])
        files = sorted(Path(str(package.__file__)).parent.glob("modeling_*.py"))
        modules = (importlib.import_module(f"{package.__name__}.{path.stem}") for path in files)
        found = next(vars(module)[name] for module in modules if name in vars(module))
    return found


def _exec(module: GeneratedModule) -> types.ModuleType:
    exec(compile(module._text(module._base), module.__name__, "exec"), vars(module))
    sys.modules[module.__name__] = module
    return module


class Loader(importlib.machinery.SourceFileLoader):
    """Makes the module of an architecture of transformers, when it is imported."""

    def __init__(self, name: str, model_type: str):
        super().__init__(name, "")
        self.model_type = model_type

    def create_module(self, spec: Any) -> types.ModuleType:
        return GeneratedModule(spec.name, self.model_type, heads_of(self.model_type))

    def exec_module(self, module: Any) -> None:
        exec(compile(module._text(None), module.__name__, "exec"), vars(module))


def spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return how a module of this name is imported, if its name is that of an architecture of transformers."""
    for model_type in CONFIG_MAPPING:
        if name == PREFIX + _stem(model_type):
            return importlib.machinery.ModuleSpec(name, Loader(name, model_type))
    return None
