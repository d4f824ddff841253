"""Files that travel with a checkpoint. Those of its architecture (`modeling_moefied_bert`) are made when imported."""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class _Architectures(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}.modeling_moefied_"):
            return None
        return importlib.import_module("moefy_hf.discovery.code").spec_of(name)


sys.meta_path.append(_Architectures())
