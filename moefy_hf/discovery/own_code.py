"""Models with code of their own: which heads it has, and which files a checkpoint needs of it.

Such code came with a checkpoint (`trust_remote_code=True`), or is a module of the user.
"""

import ast
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from ..errors import UnsupportedModel


def own_heads(cls: type[PreTrainedModel], auto_map: Mapping[str, Any]) -> dict[type[PreTrainedModel], str | None]:
    """Return the heads that a model class's module has: class -> Auto class.

    A class that no Auto class is known for is alone: nothing can be saved then.

    Args:
        cls: the model class.
        auto_map: of its config, which names heads: {"AutoModelForCausalLM": "modeling_foo.FooForCausalLM"}.
    """
    here = vars(sys.modules[cls.__module__])
    found: dict[type[PreTrainedModel], str | None] = {}
    for auto, path in auto_map.items():
        head: Any = here.get(path.rpartition(".")[2].removeprefix("Moefied")) if auto.startswith("AutoModel") else None
        if _is_head(head, cls) and found.get(head, "AutoModel") == "AutoModel":
            found[head] = auto
    for head in here.values():
        if _is_head(head, cls) and vars(head).get("_auto_class") is not None:
            found.setdefault(head, head._auto_class)
    return dict(sorted(found.items(), key=lambda item: item[0].__name__)) if cls in found else {cls: None}


def _is_head(head: Any, cls: type[PreTrainedModel]) -> TypeGuard[type[PreTrainedModel]]:
    return isinstance(head, type) and issubclass(head, PreTrainedModel) and head.config_class is cls.config_class


def check_own_code(
    cls: type[PreTrainedModel], auto: str | None, config: type[PreTrainedConfig], taken: Iterable[str]
) -> None:
    """Check that a model's code can travel with its checkpoint.

    Args:
        cls: the model class.
        auto: its Auto class.
        config: the class of its config.
        taken: names of files that the checkpoint has of this package.

    Raises:
        UnsupportedModel: the class or its config is not registered, or its files cannot travel.
    """
    own = [cls] if config.__module__.startswith("transformers.") else [cls, config]
    for each in own:
        if each.__module__ == "__main__":
            raise UnsupportedModel(
                f"{each.__name__} is defined in __main__, whose code no checkpoint can carry: define it in a file of "
                f"its own, import it from there, call {_how_to_register(own)}, and convert again"
            )
    if auto is None or own[-1] is config and config._auto_class is None:
        raise UnsupportedModel(
            f"{cls.__name__} is no class of transformers, and its code would not be saved with it: call "
            f"{_how_to_register(own)}, and save again"
        )
    for file in dict.fromkeys(file for each in own for file in own_files(each)):
        _check(file, set(taken))


def own_files(cls: type) -> list[Path]:
    """Return the file that defines a class, then those that it imports.

    Raises:
        UnsupportedModel: it imports from another folder, or its module was taken from `sys.modules`.
    """
    if cls.__module__ not in sys.modules:
        raise UnsupportedModel(f"the module {cls.__module__} of {cls.__name__} is not imported any more")
    file = Path(str(sys.modules[cls.__module__].__file__))
    try:
        return [file, *map(Path, get_relative_import_files(file))]
    except FileNotFoundError as error:
        raise UnsupportedModel(
            f"{file.name} imports from another folder ({error.filename}), which no checkpoint can carry: have all of "
            "the model's code in one folder, imported as in `from .file import name`"
        ) from error


def _how_to_register(own: list[Any]) -> str:
    config = [f"{each.__name__}.register_for_auto_class()" for each in own[1:]]
    return " and ".join([*config, 'type(model).register_for_auto_class("AutoModelFor...")'])


def _check(file: Path, taken: set[str]) -> None:
    if file.name in taken:
        raise UnsupportedModel(
            f"the model's code has a file {file.name}, and so has a MoEfied checkpoint: give it another name"
        )
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level and (node.level > 1 or node.module is None):
            raise UnsupportedModel(
                f"{file.name} has `{ast.unparse(node)}`, which no checkpoint can carry: have all of the model's code "
                "in one folder, imported as in `from .file import name`"
            )
    known = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    if unknown := [name for name in get_imports(file) if name not in known]:
        raise UnsupportedModel(
            f"{file.name} imports {unknown[0]}, which is part of no installed package, so that others could not load "
            f"the checkpoint: put it beside {file.name} and import it as in `from .{unknown[0]} import name`"
        )
