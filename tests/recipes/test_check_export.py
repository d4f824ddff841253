"""check_export.py on a tiny Llama: an export is found exact, a damaged one is not, bad input is one line."""

import contextlib
import io
import json
import random
import sys

import check_export
import pytest
import torch
from batches import text_batches
from tiny import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moefy_hf import MoEficationConfig, export, load, moefy_


@pytest.fixture(scope="module")
def made(tmp_path_factory, word_tokenizer):
    """A MoEfied checkpoint, its export, and sentences of words that the tokenizer has."""
    folder, choose = tmp_path_factory.mktemp("made"), random.Random(0)
    words = [f"Word{number}" for number in range(VOCAB - 3)]
    model = tiny_model("llama-without-biases", "AutoModelForCausalLM").eval()
    settings = {"expert_size": 8, "splitter": "random", "router": "linear", "calibration_tokens": 300}
    selection = {"type": "top_k", "k": 2, "allocation": "uniform"}
    moefy_(model, MoEficationConfig(selection=selection, **settings), text_batches(8), progress=False)
    model.save_pretrained(folder / "moe")
    word_tokenizer.save_pretrained(folder / "moe")
    model.set_selection(k=3)  # another budget than the checkpoint's
    export(model, folder / "exported", tokenizer=word_tokenizer)
    sentences = (" ".join(choose.choices(words, k=7)) + "." for _ in range(30))
    (folder / "texts.txt").write_text("\n".join(sentences))
    return folder


@pytest.fixture(scope="module")
def check(made):
    """Run the script in this process; what it wrote, and what it printed."""

    def run(*flags, moefied="moe", exported="exported", texts="texts.txt", facts="facts.json") -> tuple[dict, str]:
        given = [made / moefied, made / exported, "--texts", made / texts, "--facts", made / facts]
        sizes = ["--tokens", "48", "--prompt_tokens", "5", "--new_tokens", "4"]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", ["check_export.py", *map(str, given), *sizes, *map(str, flags)])
            check_export.main()
        return json.loads((made / facts).read_text()), out.getvalue()

    return run


@pytest.fixture(scope="module")
def exact(check, made):
    """Facts, output and prompts of the export as it is."""
    found = check("--prompts", made / "prompts.json")
    return *found, json.loads((made / "prompts.json").read_text())


def test_an_export_is_exact(exact):
    facts, out, prompts = exact
    assert facts["architecture"] == "GraniteMoeForCausalLM" and facts["experts"] == 6 and facts["k"] == 3
    assert facts["logits"]["tokens"] == 48 and facts["logits"]["relative_difference"] <= 1e-5
    assert facts["logits"]["ties"] == [] and facts["logits"]["tokens_before_ties"] == 48
    assert facts["generations"]["identical"] == facts["generations"]["prompts"] == 20
    assert "| identical greedy generations, 4 tokens | 20 of 20 |" in out and "engine" not in facts
    assert {len(prompt) for prompt in prompts["prompts"]} == {5} and prompts["stop"] == [2]
    assert len({tuple(prompt) for prompt in prompts["prompts"]}) == len(prompts["expected"]) == 20
    assert all(len(each) == 4 or each[-1] == 2 for each in prompts["expected"])


def test_a_damaged_export_is_found(check, made):
    model = AutoModelForCausalLM.from_pretrained(made / "exported")
    with torch.no_grad():
        model.model.layers[0].block_sparse_moe.router.weight.neg_()  # the wrong experts
    model.save_pretrained(made / "damaged")
    facts, _ = check(exported="damaged")
    assert facts["logits"]["relative_difference"] > 1e-2 and facts["logits"]["same_top_token"] < 1
    assert facts["generations"]["identical"] == 20 - len(facts["generations"]["differing"]) < 20
    assert all(each["token"] < 4 and each["margin"] >= 0 for each in facts["generations"]["differing"])


def test_ties_are_found_and_named(check, made):
    """Two experts with the same scores, between which the export chooses otherwise."""
    model = load(made / "moe")
    router = model.moe_sites()[1].act.router
    router.weight.data[4] = router.weight.data[3]
    model.save_pretrained(made / "tied")
    PreTrainedTokenizerFast.from_pretrained(made / "moe").save_pretrained(made / "tied")
    model.set_selection(k=3)
    export(model, made / "tied-exported")
    served = AutoModelForCausalLM.from_pretrained(made / "tied-exported")
    served.model.layers[1].block_sparse_moe.router.weight.data[3] *= 1 - 1e-6
    served.save_pretrained(made / "tied-exported")
    facts, _ = check(moefied="tied", exported="tied-exported")
    (tie,) = facts["logits"]["ties"]
    assert tie["layer"] == 1 and tie["margin"] == 0 and facts["logits"]["tokens_before_ties"] == tie["token"] < 48
    assert facts["logits"]["relative_difference"] > 1e-4
    assert facts["logits"]["relative_difference_before_ties"] < 1e-5


def test_an_engine_is_compared(check, exact, made):
    prompts = exact[2]
    served = AutoModelForCausalLM.from_pretrained(made / "exported")
    with torch.no_grad():
        first = [served(input_ids=torch.tensor([each])).logits[0, -1].tolist() for each in prompts["prompts"]]
    generations = [list(each) for each in prompts["expected"]]
    generations[7][-1] += 1
    found = {"engine": "an engine 1.0", "generations": generations, "first_logits": first}
    (made / "generations.json").write_text(json.dumps(found))
    facts, out = check("--generations", made / "generations.json")
    engine = facts["engine"]
    assert engine["identical"] == 19 and [each["prompt"] for each in engine["differing"]] == [7]
    assert engine["first_step"]["same_top_token"] == 20 and engine["first_step"]["relative_difference"] <= 1e-4
    assert "| an engine 1.0: identical generations | 19 of 20 |" in out


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"moefied": "nothing"}, (), "nothing is no checkpoint"),
        ({"moefied": "exported"}, (), "exported is not MoEfied"),
        ({"exported": "moe"}, (), "moe is MoEfied, not exported"),
        ({"texts": "nothing.txt"}, (), "No such file"),
        ({}, ("--tokens", "5000"), "tokens, 5000 are needed"),
        ({}, ("--prompt_tokens", "9"), "0 sentences of more than 9 tokens"),
        ({}, ("--generations", "empty.json"), "lacks engine, generations or first_logits"),
    ],
)
def test_bad_input_is_one_line(check, made, changes, flags, message):
    (made / "empty.json").write_text("{}")
    with pytest.raises(SystemExit, match=f"^check_export.py: [^\n]*{message}[^\n]*$"):
        check(*(made / flag if flag == "empty.json" else flag for flag in flags), **changes, facts="none.json")
    assert not (made / "none.json").exists()
