"""What is saved works where this package is not installed."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny import TINY, VOCAB, convert, distance, run, tiny_inputs, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil, pipeline
from transformers.models.auto.modeling_auto import AutoModelForMaskedLM

from moefy_hf import evaluate, load
from moefy_hf.modeling import moefied

FILES = sorted(path for path in Path(moefied.__file__).parent.iterdir() if path.name != "__pycache__")
CLASSIFIER, CAUSAL, SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
HEADS = {
    "seq2seq": SEQ2SEQ,
    "speech": "AutoModelForSpeechSeq2Seq",
    "image": "AutoModelForImageClassification",
    "clip": "AutoModelForZeroShotImageClassification",
}


def usual_head(name: str) -> str:
    """What the architecture is mostly used for; a text encoder is one that has a masked language model."""
    if TINY[name].inputs != "text":
        return HEADS[TINY[name].inputs]
    encoder = transformers.CONFIG_MAPPING[TINY[name].model_type] in AutoModelForMaskedLM._model_mapping
    return CLASSIFIER if encoder else CAUSAL


def run_elsewhere(folder: Path, scripts: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """Run scripts in a process of its own, in which importing moefy_hf fails and nobody can answer a question.

    Args:
        folder: of the process' files; a script runs in the folder of its name there.
        scripts: name -> (code, arguments), run one after the other.

    Returns:
        what each wrote to standard error; they must succeed, and write nothing to standard output.
    """
    environment = {
        "PATH": os.defpath,
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(scripts)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return dict(zip(scripts, done.stderr.split(END), strict=False))


END = "---- this script is done ----"
ONE_AFTER_THE_OTHER = f"""
import json
import os
import sys

sys.modules["moefy_hf"] = None
top = os.getcwd()
for name, (code, arguments) in json.loads(sys.argv[1]).items():
    os.chdir(os.path.join(top, name))
    sys.argv[1:] = arguments
    exec(code, {{}})
    print({END!r}, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, tuple]:
    """Script -> (its folder, what it printed, what is expected): all run in one process, which takes long to start.

    Where nobody is trusted comes first, in a process that has loaded nothing yet.
    """
    top, prepared = tmp_path_factory.mktemp("elsewhere"), {}
    for name, prepare in (("stock", for_stock), ("architectures", for_architectures), ("uses", for_uses)):
        (top / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(top / name)  # as elsewhere: the image has one name in both processes
            prepared[name] = prepare(top / name)
    printed = run_elsewhere(top, {name: (code, arguments) for name, (code, arguments, _) in prepared.items()})
    return {name: (top / name, printed[name], expected) for name, (_, _, expected) in prepared.items()}


ARCHITECTURES = """
import sys
import torch
import transformers

for name, head in zip(sys.argv[1::2], sys.argv[2::2]):
    auto = getattr(transformers, head)
    model = auto.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__name__.startswith("Moefied"), type(model)
    inputs = torch.load(f"{name}/inputs.pt")
    with torch.no_grad():
        sparse = model(**inputs)[0]
        model.save_pretrained(f"{name}/again")
        again = auto.from_pretrained(f"{name}/again", trust_remote_code=True).eval()
        assert type(again).__name__ == type(model).__name__ and type(again) is not type(model)
        resaved = again(**inputs)[0]
        model.set_selection(k=1.0)
        full = model(**inputs)[0]
    torch.save([sparse, resaved, full], f"{name}/outputs.pt")
"""


def for_architectures(folder: Path) -> tuple:
    heads, expected = {name: usual_head(name) for name in TINY}, {}
    for name, head in heads.items():
        model, inputs = tiny_model(name, head), tiny_inputs(name, head)
        dense = run(model, inputs)[0]
        convert(model, k=2)
        model.save_pretrained(folder / name)
        torch.save(inputs, folder / name / "inputs.pt")
        expected[name] = (run(model, inputs)[0], dense)
    return ARCHITECTURES, [word for pair in heads.items() for word in pair], expected


def test_every_architecture_loads_without_the_package(elsewhere):
    folder, _, expected = elsewhere["architectures"]
    assert expected.keys() == TINY.keys()
    for name, (sparse, dense) in expected.items():
        found, resaved, full = torch.load(folder / name / "outputs.pt")
        assert torch.equal(found, sparse) and torch.equal(resaved, sparse), name
        assert distance([full], [dense]) < 1e-5 < distance([sparse], [dense]), name


LONGER = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
GENERATE = {"gpt_neox": CAUSAL, "mt5": SEQ2SEQ}
PIPELINES = {  # name -> task, its input, settings
    "bert": ("text-classification", ["5 6 7", "8 9 10 11"], {"top_k": None}),
    "llama": ("text-generation", ["5 6 7", "8 9 10 11"], LONGER),
    "vit": ("image-classification", "image.png", {}),
}
USES = """
import json
import torch
import transformers

asked, answers = json.load(open("asked.json")), {}
for name, head in asked["generate"].items():
    model = getattr(transformers, head).from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__name__.startswith("Moefied"), type(model)
    answers[name] = model.generate(**torch.load(f"{name}/inputs.pt"), **asked["longer"]).tolist()
for name, (task, data, settings) in asked["pipelines"].items():
    pipe = transformers.pipeline(task, model=name, trust_remote_code=True)
    assert type(pipe.model).__name__.startswith("Moefied"), type(pipe.model)
    answers[name] = pipe(data, **settings)
json.dump(answers, open("answers.json", "w"))
"""


def preprocessor(task: str) -> dict[str, Any]:
    """What a pipeline needs besides the model, by the name under which it takes it."""
    if task == "image-classification":
        return {"image_processor": ViTImageProcessorPil(size={"height": 8, "width": 8})}
    numbers = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=numbers, pad_token="0", eos_token="2")}


def for_uses(folder: Path) -> tuple:
    expected = {}
    for name, head in GENERATE.items():
        model = tiny_model(name, head, use_cache=True)
        inputs = {key: value[:1] for key, value in tiny_inputs(name, CAUSAL).items()}  # the text without padding
        dense = model.generate(**inputs, **LONGER).tolist()
        convert(model, k=2)
        expected[name] = model.generate(**inputs, **LONGER).tolist()
        assert expected[name] != dense
        model.save_pretrained(name)
        torch.save(inputs, f"{name}/inputs.pt")
    noise = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save("image.png")
    for name, (task, data, settings) in PIPELINES.items():
        model, parts = tiny_model(name, usual_head(name)), preprocessor(task)
        convert(model, k=2)
        expected[name] = pipeline(task, model=model, **parts)(data, **settings)
        model.save_pretrained(name)
        for part in parts.values():
            part.save_pretrained(name)
    asked = {"generate": GENERATE, "pipelines": PIPELINES, "longer": LONGER}
    (folder / "asked.json").write_text(json.dumps(asked))
    return USES, [], expected


def test_generate_and_pipelines_work_without_the_package(elsewhere):
    folder, _, expected = elsewhere["uses"]
    answers, expected = json.loads((folder / "answers.json").read_text()), dict(expected)
    for task in ("bert", "vit"):  # the last bit of a score may hang on where in memory a file's tensors lie
        found, own = (sorted(scores_of(each.pop(task))) for each in (answers, expected))
        assert [label for label, _ in found] == [label for label, _ in own]
        assert [score for _, score in found] == pytest.approx([score for _, score in own], abs=1e-6)
    assert answers == expected


def scores_of(answers: list) -> list[tuple[str, float]]:
    """(text's number and label, score) of what a classification pipeline answers for one input or several."""
    rows = answers if isinstance(answers[0], list) else [answers]
    return [(f"{number} {each['label']}", each["score"]) for number, row in enumerate(rows) for each in row]


STOCK = """
import sys
import torch
import transformers

for name, head in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, head).from_pretrained(name).eval()
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        torch.save(model(**torch.load(f"{name}/inputs.pt"))[0], f"{name}/outputs.pt")
"""


def for_stock(folder: Path) -> tuple:
    heads, dense, routers = {"bert": CLASSIFIER, "llama": CAUSAL}, {}, []
    for name, head in heads.items():
        model, inputs = tiny_model(name, head), tiny_inputs(name, head)
        dense[name] = run(model, inputs)[0]
        convert(model, k=2)
        model.save_pretrained(folder / name)
        torch.save(inputs, folder / name / "inputs.pt")
        added = {key for key in model.state_dict() if ".router." in key or key.endswith(".neuron_order")}
        routers += [*{re.sub(r"\.\d\.", ".{0, 1}.", key) for key in added}, moefied.DENSE_NOTE]
    return STOCK, [word for pair in heads.items() for word in pair], (dense, routers)


def test_without_trust_it_is_the_dense_model_and_the_routers_are_reported(elsewhere):
    """No question, no error and no warning but transformers' report of keys that the dense model has no use for."""
    folder, printed, (dense, routers) = elsewhere["stock"]
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if "|" in line]
    found = sorted(row[:2] for row in rows if row[0] != "Key")
    assert found == sorted([key, "UNEXPECTED"] for key in routers), printed
    printed = printed.replace(moefied.DENSE_NOTE, "")
    assert printed.count("LOAD REPORT") == 2 and not re.search("trust|error|warn|MISSING", printed, re.I), printed
    for name, outputs in dense.items():
        assert distance([torch.load(folder / name / "outputs.pt")], [outputs]) < 1e-5, name


def test_the_folder_is_flat():
    assert all(path.suffix == ".py" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_are_ones_that_travel(path):
    """transformers finds relative imports by regular expression, copies the files flat, and checks absolute ones."""
    source, siblings = path.read_text(), {path.stem for path in FILES}
    relative = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}: not a sibling"
            assert node.module in siblings, f"line {node.lineno}: no file {node.module}.py"
            relative.add(node.module)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                root = name.partition(".")[0]
                assert root in {"torch", "transformers"} or root in sys.stdlib_module_names, (
                    f"line {node.lineno}: {name}"
                )
    # what transformers' regular expressions see, in docstrings and comments too
    seen = re.findall(r"^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE)
    seen += re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
    if path.stem.startswith("modeling_"):  # these name the files that others need, for transformers 4
        assert set(seen) >= relative and set(seen) <= siblings
    else:
        assert set(seen) == relative


def test_code_of_another_format_is_told_from_the_packages(tmp_path):
    convert(model := tiny_model("bert"), k=2)
    model.save_pretrained(tmp_path)
    code = tmp_path / "section.py"
    code.write_text(code.read_text().replace(f"FORMAT_VERSION = {moefied.FORMAT_VERSION}", "FORMAT_VERSION = 99"))
    old = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    inputs = tiny_inputs("bert")
    assert distance(run(old.eval(), inputs), run(model, inputs)) == 0
    for use in (lambda: old.set_moe_implementation("torch"), lambda: evaluate(old, [inputs])):
        with pytest.raises(ValueError, match=r"code of format 99 .* moefy_hf\.load"):
            use()
    load(tmp_path).set_moe_implementation("torch")
