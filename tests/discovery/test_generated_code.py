"""The modeling code of an architecture is generated: it imports like a file, and travels like one."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from moefy_hf.discovery.code import heads_of, module_of
from moefy_hf.discovery.own_code import own_files
from moefy_hf.errors import UnsupportedModel
from moefy_hf.loading import moefied_class
from moefy_hf.modeling import moefied

PACKAGE = "moefy_hf.modeling"
KINDS = ["bert", "gpt2", "xlm-roberta", "mobilebert", "clip", "llama4_text", "albert"]  # most of them nobody described


def module(model_type: str):
    return importlib.import_module(f"{PACKAGE}.modeling_moefied_{model_type.replace('-', '_')}")


@pytest.mark.parametrize("model_type", KINDS)
def test_it_has_every_head_of_transformers(model_type):
    heads = heads_of(model_type)
    assert heads
    for name, auto in heads.items():
        cls = getattr(module(model_type), f"Moefied{name}")
        assert cls.stock_class().__name__ == name and cls._auto_class == auto
        assert cls.__module__ == module(model_type).__name__ and moefied_class(cls.stock_class()) is cls
        stock = getattr(transformers, auto)._model_mapping[transformers.CONFIG_MAPPING[model_type]]
        assert cls.stock_class() in (stock if isinstance(stock, tuple) else (stock,))


@pytest.mark.parametrize("model_type", KINDS)
def test_it_is_imported_once_and_pickled_by_name(model_type):
    first = module(model_type)
    assert first is module(model_type) is sys.modules[first.__name__]
    for name in heads_of(model_type):
        cls = getattr(first, f"Moefied{name}")
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_another_process_unpickles_it():
    """Where nothing was imported before."""
    pickled = pickle.dumps(moefied_class(transformers.AlbertForMaskedLM))
    program = f"import pickle; print(pickle.loads({pickled!r}).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["MoefiedAlbertForMaskedLM"]


@pytest.mark.parametrize("model_type", KINDS)
def test_its_file_imports_only_what_travels(model_type):
    """torch, transformers, and files beside it; those import nothing else either."""
    file = Path(module(model_type).__file__)
    assert file.stem == module(model_type).__name__.rpartition(".")[2]
    beside = {path.stem for path in file.parent.glob("*.py")}
    assert beside >= {path.stem for path in Path(moefied.__file__).parent.glob("*.py")} - {"__init__"}
    for path in file.parent.glob("*.py"):
        if path.stem == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in beside, ast.unparse(node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {name.partition(".")[0] for name in names}
                assert roots <= {*sys.stdlib_module_names, "torch", "transformers"}, ast.unparse(node)


def test_a_head_that_no_auto_class_has_is_refused():
    with pytest.raises(UnsupportedModel, match="GPT2DoubleHeadsModel has no Auto class; those of 'gpt2': .*GPT2Model"):
        module_of(transformers.GPT2DoubleHeadsModel)


@pytest.mark.parametrize("name", ["modeling_moefied_no_such_type", "modeling_moefied_", "no_such_file"])
def test_other_names_are_no_modules(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{PACKAGE}.{name}")


def test_code_whose_module_is_gone_has_no_files():
    """So that who asks all modules for their files, as `inspect` does, is not stopped."""
    gone = type("Gone", (), {"__module__": "a_module_that_was_taken_away"})
    with pytest.raises(UnsupportedModel, match="a_module_that_was_taken_away of Gone is not imported any more"):
        own_files(gone)
