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
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .. import modeling
from ..errors import UnsupportedModel
from ..modeling.auto_map import auto_classes, model_type_of
from .own_code import check_own_code, own_files, own_heads

HOME = Path(modeling.__file__).parent
PREFIX = f"{modeling.__name__}.modeling_moefied_"

TEMPLATE = '''"""MoEfied {model_type}, written by moefy-hf.

The files that it needs, named here for transformers 4, which copies no others and would not get to `needs`:

{siblings}
"""

from .needs import TRANSFORMERS  # noqa: F401

# isort: split
{imports}

from .moefied import MoefiedMixin
{classes}'''

CLASS = """

class Moefied{name}(MoefiedMixin, {name}):
    _auto_class = {auto}
"""


def heads_of(model_type: str) -> dict[str, str]:
    """Return the heads of an architecture of transformers: class -> its Auto class, the most telling where there are
    several.

    Example:
        >>> heads_of("gpt2")["GPT2LMHeadModel"]
        'AutoModelForCausalLM'
    """
    found: dict[str, list[str]] = {}
    for name, classes in auto_classes(model_type).items():
        for each in classes:
            found.setdefault(each, []).append(name)
    config = CONFIG_MAPPING[model_type]
    own = (each for each in found if _class(each, model_type).config_class is config)  # others wrap any model
    return {each: min(found[each], key=_rank) for each in own}


def _rank(auto: str) -> tuple[bool, bool, str]:
    return auto in ("AutoModelForPreTraining", "AutoModelForTextEncoding"), auto != "AutoModel", auto


def module_of(cls: type[PreTrainedModel], config: PreTrainedConfig | None = None) -> types.ModuleType:
    """Return the module that has the MoEfied version of a model class, and of the other heads of its architecture.

    Args:
        cls: the class.
        config: of the model, which names the heads in code that came with a checkpoint.

    Raises:
        UnsupportedModel: no Auto class has this head of transformers, so that nobody could load it.
    """
    model_type = model_type_of(cls)
    if cls.__module__.startswith("transformers."):
        heads = heads_of(model_type)
        if cls.__name__ not in heads:
            known = ", ".join(heads) or "none"
            raise UnsupportedModel(f"{cls.__name__} has no Auto class; those of {model_type!r}: {known}")
        return importlib.import_module(PREFIX + _stem(model_type))
    auto_map = {} if config is None else vars(config).get("auto_map") or {}
    return _own_module(_stem(model_type or cls.__name__), tuple(own_heads(cls, auto_map).items()))


@cache
def _own_module(stem: str, heads: tuple[tuple[type[PreTrainedModel], str | None], ...]) -> types.ModuleType:
    """Make the module of a model with code of its own, under a name that no other has."""
    names = "_".join(head.__name__ for head, _ in heads)
    name = f"{modeling.__name__}.{heads[0][0].__module__}.{names}.modeling_moefied_{stem}"
    module = GeneratedModule(name, stem, {head.__name__: auto for head, auto in heads}, [head for head, _ in heads])
    vars(module).update((head.__name__, head) for head, _ in heads)
    sys.modules[name] = module
    exec(compile(module._text(""), name, "exec"), vars(module))
    return module


def _stem(model_type: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in model_type)


class GeneratedModule(types.ModuleType):
    """A module that is made from the template; its file is written where somebody asks for it, to save it.

    Args:
        name: of the module.
        model_type: the architecture.
        heads: class -> Auto class.
        own: these classes, where they are not transformers'.
    """

    def __init__(
        self,
        name: str,
        model_type: str,
        heads: Mapping[str, str | None],
        own: Sequence[type[PreTrainedModel]] = (),
    ):
        super().__init__(name, f"MoEfied {model_type}.")
        vars(self).update(_model_type=model_type, _heads=heads, _own=own, __package__=modeling.__name__)

    def _text(self, imports: str) -> str:
        siblings = sorted(path.stem for path in HOME.glob("*.py") if path.stem != "__init__")
        return TEMPLATE.format(
            model_type=self._model_type,
            siblings="\n".join(f"from .{stem} import *" for stem in siblings),
            imports=imports,
            classes="".join(CLASS.format(name=name, auto=self._auto(name)) for name in self._heads),
        )

    def _auto(self, name: str) -> str | None:
        """The Auto class of a head as it would be written; the MoEfied class may be registered later."""
        made = vars(self).get(f"Moefied{name}")
        auto = self._heads[name] if made is None else vars(made)["_auto_class"]
        return None if auto is None else f'"{auto}"'

    @cached_property
    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="moefy_hf_"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def check(self, config: type[PreTrainedConfig]) -> None:
        """Check that this module can be saved, with a config of this class.

        Raises:
            UnsupportedModel: the model's own code cannot travel with a checkpoint.
        """
        if self._own:
            taken = [path.name for path in HOME.glob("*.py")]
            check_own_code(self._own[0], self._auto(self._own[0].__name__), config, taken)

    @property
    def __file__(self) -> str:  # type: ignore[override]
        file = self._folder / f"{self.__name__.rpartition('.')[2]}.py"
        if not file.exists() or self._own:  # its heads may have been registered since
            try:
                own = own_files(self._own[0]) if self._own else []
            except UnsupportedModel as error:  # who looks for the files of all modules finds none
                raise AttributeError(str(error)) from error
            for path in (*HOME.glob("*.py"), *own):
                shutil.copy(path, self._folder)
            names = sorted(self._heads)
            theirs = f"from .{own[0].stem} import {', '.join(names)}" if own else _imports(names, self._model_type)
            file.write_text(self._text(theirs), encoding="utf-8")
        return str(file)


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


class Loader(importlib.machinery.SourceFileLoader):
    """Makes the module of an architecture of transformers, when it is imported."""

    def __init__(self, name: str, model_type: str):
        super().__init__(name, "")
        self.model_type = model_type

    def create_module(self, spec: Any) -> types.ModuleType:
        return GeneratedModule(spec.name, self.model_type, heads_of(self.model_type))

    def exec_module(self, module: Any) -> None:
        imports = _imports(sorted(module._heads), self.model_type)
        exec(compile(module._text(imports), module.__name__, "exec"), vars(module))


def spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return how a module of this name is imported, if its name is that of an architecture of transformers."""
    for model_type in CONFIG_MAPPING:
        if name == PREFIX + _stem(model_type):
            return importlib.machinery.ModuleSpec(name, Loader(name, model_type))
    return None
