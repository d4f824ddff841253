"""What `moefy_hf` exports, and the names of version 0.1, which still work and say so once."""

import ast
import sys
import warnings
from pathlib import Path

import pytest

import moefy_hf


@pytest.mark.parametrize("name", moefy_hf.__all__)
def test_a_public_name_is_documented(name):
    value = getattr(moefy_hf, name)
    if callable(value):
        assert "Example" in (value.__doc__ or ""), f"{name} has no docstring with an example"


@pytest.mark.parametrize("name", sorted(moefy_hf._OLD))
def test_an_old_name_warns_once(name):
    vars(moefy_hf).pop(name, None)
    with pytest.warns(FutureWarning, match=rf"moefy_hf\.{name} is moefy_hf\.") as caught:
        value = getattr(moefy_hf, name)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(moefy_hf, name) is value
    module, new = moefy_hf._OLD[name]
    assert value is vars(sys.modules[f"moefy_hf.{module}"])[new]
    vars(moefy_hf).pop(name)


def test_the_types_that_editors_see_are_the_names_that_there_are():
    tree = ast.parse(Path(moefy_hf.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == set(moefy_hf._HOMES.items())


def test_no_name_is_old_and_new():
    assert not moefy_hf._OLD.keys() & moefy_hf._HOMES.keys()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moefy_hf.nothing
