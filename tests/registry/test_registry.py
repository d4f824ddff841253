"""A fixed tenth of transformers' model types, and every special layout, are found, converted and loaded again.

`python tests/registry/check_all.py` does so with all of them; docs/architectures.md is its outcome.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from checking import check_type  # noqa: E402
from table import CHECKS, DOCUMENT, OUTCOMES, document, passes  # noqa: E402
from tiny_registry import HEADS_OF, model_types  # noqa: E402

KNOWN = json.loads(OUTCOMES.read_text())["types"]
SPECIAL = {  # what is special about a type
    "albert": "layers share an FFN",
    "bitnet": "a norm of the neurons, squared ReLU",
    "bloom": "its FFN adds the residual",
    "bridgetower": "a ModuleDict",
    "clip": "two towers",
    "ctrl": "a Sequential",
    "esm": "a function called in a layer's part",
    "gemma3n_text": "keeps the largest inputs of the activation",
    "gpt2": "Conv1D",
    "lfm2": "a function called in the FFN",
    "lxmert": "two FFNs in a layer",
    "mask2former": "a function as attribute",
    "modernbert": "fused, with dropout",
    "moonshine": "fused, up first",
    "nemotron": "squared ReLU",
    "xlnet": "tokens come first",
}
TENTH = [name for name in model_types()[1::10] if passes(KNOWN[name])]  # the quickest of the ten


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.mark.parametrize("model_type", sorted({*TENTH, *SPECIAL}))
def test_a_type_passes(model_type, folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("types") / model_type
    found = check_type(model_type, folder)
    assert {key: found.get(key) for key in CHECKS if key != "own_code"} == {
        key: True for key in CHECKS if key != "own_code"
    }
    assert found["ffns"] == KNOWN[model_type]["ffns"]
    folders[model_type] = folder


def test_they_load_with_their_own_code_in_a_clean_process(folders):
    if not folders:
        pytest.skip("no type was converted in this run")
    program = Path(__file__).parent / "clean_process.py"
    command = [sys.executable, str(program), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes == {str(folder): True for folder in folders.values()}


REFUSED = {
    "mixtral": "native Mixture of Experts",
    "apertus": "XIELUActivation has parameters",
    "segformer": "convolution",
    "mamba": "no pair of Linears",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_left_alone_has_its_reason(model_type, tmp_path):
    found = check_type(model_type, tmp_path)
    assert REFUSED[model_type] in found["reason"] and not found["ffns"]


def test_the_table_is_of_these_outcomes():
    outcomes = json.loads(OUTCOMES.read_text())
    assert DOCUMENT.read_text() == document(outcomes)
    assert {*outcomes["types"]} >= {*model_types(), *HEADS_OF} or outcomes["transformers"] != transformers.__version__
    assert sum(map(passes, outcomes["types"].values())) >= 420
    assert all(passes(found) or found.get("reason") or found.get("ffns") for found in outcomes["types"].values())
