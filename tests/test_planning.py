"""Plans: candidates, what is measured of them, and what is chosen."""

import json
import math
from dataclasses import replace

import pytest
import torch
from batches import text_batches
from test_cli import number_tokenizer
from tiny import convert, tiny_inputs, tiny_model

from moefy_hf import MoEficationConfig, MoefyError, evaluate, moefy_
from moefy_hf.bench.engines import Engine
from moefy_hf.cli.main import main
from moefy_hf.evaluation.quality_check import share_of
from moefy_hf.hub.facts import read_facts
from moefy_hf.loading import load
from moefy_hf.measure.contexts import all_experts
from moefy_hf.modeling.ffn_sites import find_sites
from moefy_hf.modeling.section import Section
from moefy_hf.planning import advice
from moefy_hf.planning.candidates import (
    CANDIDATES,
    RELU,
    SMOOTH,
    Candidate,
    activation_of,
    candidates_for,
    config_of,
    nearest_divisor,
)
from moefy_hf.planning.clock import Clock, Load, Speed, rebatched, rows_of
from moefy_hf.planning.held_out import ACCURACY, AGREEMENT, COSINE, PERPLEXITY, HeldOut, Relative
from moefy_hf.planning.plan import best_of, plan
from moefy_hf.planning.trial import Goal, Row, Trial, boundary

CLASSIFIER, LANGUAGE, WRITER = (f"AutoModelFor{head}" for head in ("SequenceClassification", "CausalLM", "Seq2SeqLM"))
QUICK = Load(prompt=4, new_tokens=2, seconds=0.0)


def data(count=8, labels=None, rows=4):
    torch.manual_seed(0)
    found = text_batches(count, rows=rows, length=12, seed=2)
    if labels == "pixels":
        return [tiny_inputs("vit", seed=seed) for seed in range(2 * count)]
    if labels == "next":
        return [
            {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in found
        ]
    return [{**batch, "labels": torch.randint(2, (rows,))} for batch in found] if labels == "classes" else found


def classifier(act="relu"):
    return tiny_model("bert", CLASSIFIER, hidden_act=act, intermediate_size=256)


def timed(monkeypatch, overhead=0.3):
    """Speeds as if a pass took `overhead` of the dense one, and the rest for all experts."""

    def speed(self, masked, auto):
        taken = overhead + (1 - overhead) * share_of(auto)
        return Speed(1 / taken, (1 / taken, 1 / taken), 1.0, taken)

    monkeypatch.setattr(Clock, "speed", speed)
    monkeypatch.setattr(advice, "eight_bits", lambda model, clock: ["eight bits"])


# ---- candidates


@pytest.mark.parametrize(("act", "expected"), [("relu", RELU), ("relu2", RELU), ("gelu", SMOOTH), ("silu", SMOOTH)])
def test_activations_are_told_by_their_zeros(act, expected):
    assert activation_of(find_sites(classifier(act))) == expected
    assert {each.activation for each in candidates_for(classifier(act), MoEficationConfig())} == {expected}


def test_every_candidate_says_why_and_converts():
    for each in CANDIDATES:
        assert each.reason and each.source
        settings = config_of(each, classifier(), MoEficationConfig(seed=3, calibration_tokens=77), 0.5)
        assert (settings.seed, settings.calibration_tokens, settings.k) == (3, 77, 0.5)
        assert 256 % settings.expert_size == 0


def test_sizes_divide_the_ffn():
    assert [nearest_divisor(1536, size) for size in (32, 128, 1)] == [32, 128, 1]
    assert (nearest_divisor(1000, 32), nearest_divisor(128, 128), nearest_divisor(7, 3)) == (40, 32, 1)


def test_unknown_methods_are_refused():
    with pytest.raises(MoefyError, match="unknown method magic; choose from moefication"):
        candidates_for(classifier(), MoEficationConfig(), ("magic",))


# ---- quality


@pytest.mark.parametrize(
    ("model", "labels", "measure"),
    [
        (classifier, "classes", ACCURACY),
        (classifier, None, AGREEMENT),
        (lambda: tiny_model("llama", LANGUAGE), "next", PERPLEXITY),
        (lambda: tiny_model("llama", LANGUAGE), None, AGREEMENT),
        (lambda: tiny_model("bert"), None, COSINE),
        (lambda: tiny_model("vit"), "pixels", COSINE),
    ],
)
def test_quality_is_what_evaluate_measures(model, labels, measure):
    model, batches = model(), data(4, labels)
    batches[0]["return_dict"] = True  # no tensor
    held_out = HeldOut(model, batches, progress=False)
    assert held_out.measure == measure
    convert(model, 1)
    if measure != COSINE:
        (row,) = evaluate(model, batches, [1], controls=[], local_tokens=0, progress=False).rows[1:]
        assert held_out.relative(model, False).value == pytest.approx(row["relative_quality"], abs=1e-5)
    assert held_out.relative(model, False).value != pytest.approx(1, abs=1e-6)
    with all_experts(model):
        assert held_out.relative(model, False).value == pytest.approx(1, abs=1e-5)


def test_errors_are_those_of_independent_rows():
    """Rows drawn again and again scatter as the error of one draw says."""
    held_out = HeldOut(classifier(), data(4, "classes"), progress=False)
    generator = torch.Generator().manual_seed(0)
    # wrong ones of 64 parts of 16 rows
    draws = (torch.rand(400, 64, 16, generator=generator) < 0.1).double().sum(-1)
    found = [held_out.summed((-draw).tolist(), [16] * 64) for draw in draws]
    scatter = torch.tensor([each.value for each in found]).std()
    assert float(scatter) == pytest.approx(sum(each.error for each in found) / len(found), rel=0.1)


def test_rows_are_independent_and_tokens_of_a_row_are_not():
    """What is compared of each row is counted by itself, however batches are cut."""
    model, batches = classifier(), data(8, "classes")
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    held_out, same = (HeldOut(model, each, progress=False) for each in (batches, [whole]))
    convert(model, 1)
    found, again = (each.relative(model, False) for each in (held_out, same))
    assert found.value == pytest.approx(again.value) and found.error == pytest.approx(again.error)


def test_rows_that_all_agree_are_no_certainty():
    held_out = HeldOut(classifier(), data(4, "classes"), progress=False)
    assert held_out.summed([0.0] * 4, [25] * 4).error == pytest.approx(0.01 / held_out.dense)


def test_clear_decisions_read_few_rows():
    model = classifier()
    held_out = HeldOut(model, data(100), progress=False)
    convert(model, 1)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    held_out.relative(model, False, lambda found: True)
    assert len(seen) == 64  # 256 rows
    goal = Goal(quality=0.99)
    assert not goal.clear(Relative(0.985, 0.004), ACCURACY) and not goal.clear(Relative(1.0, 0.002), ACCURACY)
    assert goal.clear(Relative(0.97, 0.004), ACCURACY) and goal.clear(Relative(1.0, 0.001), ACCURACY)
    assert Goal(quality=1.05).clear(Relative(1.2, 0.01), PERPLEXITY)
    assert goal.good(Relative(0.995, 0.0015), ACCURACY) and not goal.good(Relative(0.995, 0.003), ACCURACY)
    assert Goal(quality=1.05).good(Relative(1.03, 0.005), PERPLEXITY)
    assert not Goal(quality=1.05).good(Relative(1.03, 0.015), PERPLEXITY)


def test_nothing_to_measure_on():
    with pytest.raises(MoefyError, match="no held-out rows"):
        HeldOut(classifier(), [], progress=False)
    with pytest.raises(MoefyError, match="4 held-out rows are too few"):
        HeldOut(classifier(), data(1), progress=False)
    wrong = [{**batch, "labels": 1 - classifier()(**batch).logits.argmax(-1)} for batch in data(2)]
    with pytest.raises(MoefyError, match="right on none"):
        HeldOut(classifier(), wrong, progress=False)


# ---- time


@pytest.mark.parametrize(
    "name, head", [("bert", CLASSIFIER), ("llama", LANGUAGE), ("t5", WRITER), ("vit", "AutoModel")]
)
def test_any_kind_of_model_is_timed(name, head):
    model = tiny_model(name, head)
    batches = [tiny_inputs(name, head)]
    if name == "llama":
        batches = data(2)
    clock = Clock(QUICK, model, batches, progress=False)
    convert(masked := tiny_model(name, head), 2, towers=None)
    speed = clock.speed(masked.eval(), masked)
    assert speed.ratio > 0 and speed.spread[0] <= speed.ratio <= speed.spread[1]
    assert speed.dense_milliseconds > 0 < speed.milliseconds


def test_rows_lose_their_padding_and_get_as_little_as_they_need():
    (batch,) = data(1, "classes")
    rows = list(rows_of([batch], "encoder"))
    assert [row["input_ids"].tolist() for row in rows] == [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    pairs = rebatched(classifier(), 2, [batch])
    assert len(pairs) == 2 and "labels" not in pairs[0]
    for pair, of in zip(pairs, (rows[:2], rows[2:]), strict=True):
        assert pair["input_ids"].shape == (2, max(len(row["input_ids"]) for row in of))
        assert pair["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in of]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Load(runtime="tensorrt"), "unknown runtime 'tensorrt'; choose from pytorch, onnxruntime"),
        (lambda: Load(batch=0), "batch must be 1 or more, got 0"),
        (lambda: Clock(Load(batch=64), classifier(), data(2)), "8 held-out rows are too few for a batch of 64"),
        (lambda: Clock(Load(batch=2), tiny_model("llama", LANGUAGE), data(2)), "one text at once, got batch 2"),
        (lambda: Clock(Load(), tiny_model("llama", LANGUAGE), data(1, rows=1)), "too few for a prompt of 64"),
        (
            lambda: Clock(Load("llama.cpp"), tiny_model("llama", LANGUAGE), data(2)),
            "llama.cpp needs the dense model's",
        ),
        (lambda: plan(classifier().to("meta"), data(24), quality=0.9), "timed on the CPU, the model is on meta"),
        (Goal, "a plan needs a goal"),
        (lambda: Goal(speedup=0.9), "speed-up of 0.9 is no goal"),
        (lambda: Goal(quality=0.9).check(PERPLEXITY), "perplexity of 0.9 of dense is no target"),
        (lambda: Goal(quality=1.1).check(ACCURACY), "1.1 of the dense model's accuracy is no target"),
    ],
)
def test_bad_input(make, message, monkeypatch):
    monkeypatch.setattr(Engine, "check_installed", lambda self: None)
    with pytest.raises(MoefyError, match=message):
        make()


# ---- the search


@pytest.mark.parametrize("edge", [0.03, 0.31, 0.98])
def test_boundaries_are_found_from_either_side(edge):
    below = boundary(lambda share: share <= edge, 0.0, 1.0, 1 / 48)
    above = boundary(lambda share: share >= edge, 1.0, 0.0, 1 / 48)
    assert edge - 1 / 48 <= below <= edge <= above <= edge + 1 / 48


@pytest.mark.parametrize("fast", [0.05, 0.2, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("good", [0.01, 0.1, 0.3, 0.55, 0.9])
def test_budgets_that_are_good_and_fast_enough_are_found(good, fast):
    made, timings = object.__new__(Trial), []
    made.least = 1 / 48
    made.good = lambda share, goal: share >= good
    made.speed = lambda share: timings.append(share) or Speed(2.0 if share <= fast else 1.0, (1, 1), 1, 1)
    share, reached = made.search(Goal(quality=0.99))
    if good + 1 / 8 < fast:  # it need not find a narrower range
        assert reached
    if reached:
        assert good <= fast and share <= fast
        assert good <= share <= max(good, 1 / 16) + 1 / 48
    else:
        assert share <= max(fast, 1 / 16)
    assert len(timings) <= 5


def test_the_fastest_that_is_good_enough(monkeypatch):
    timed(monkeypatch)
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = plan(model, data(24), quality=0.7, load=QUICK, progress=False)
    assert {row.candidate for row in found.rows} == {"moefication", "moefication_large"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    chosen = found.chosen
    assert chosen and chosen.reached and chosen.quality.value - 3 * chosen.quality.error >= 0.7
    assert chosen.speed.ratio == max(row.speed.ratio for row in found.rows if row.reached)
    assert chosen.experts == pytest.approx((1 / chosen.speed.ratio - 0.3) / 0.7)
    assert "chosen" in found.table() and chosen.candidate in found.line()
    convert(again := classifier(), calibration=data(24), **vars_of(chosen.settings))
    assert share_of(again) == pytest.approx(chosen.experts)


def vars_of(settings):
    kept = ("expert_size", "splitter", "router", "seed", "calibration_tokens")
    return {name: getattr(settings, name) for name in kept} | {"k": settings.k}


def test_nothing_that_is_worth_it(monkeypatch):
    timed(monkeypatch, overhead=0.95)
    found = plan(classifier("gelu"), data(24), quality=0.9, load=QUICK, progress=False)
    assert found.chosen is None and not any(row.reached for row in found.rows)
    assert found.to_dict()["chosen"] is None
    assert "moefy train classification" in found.advice[0] and "--activation relu" in found.advice[0]
    assert all(each in found.line() for each in found.advice) and "1.1 times" in found.line()


def test_eight_bits_are_measured_where_a_runtime_has_them():
    pytest.importorskip("onnxruntime")
    model = tiny_model("bert", CLASSIFIER, num_hidden_layers=1)
    (line,) = advice.eight_bits(model, Clock(QUICK, model, data(2), progress=False))
    assert "the dense model in onnxruntime-int8 is" in line
    language = tiny_model("llama", LANGUAGE)
    (line,) = advice.eight_bits(language, Clock(QUICK, language, data(2), progress=False))
    assert "--runtime llama.cpp-q8_0 --dense FILE.gguf" in line


def test_what_is_not_good_enough_where_it_is_fast_is_not_searched_further(monkeypatch):
    timed(monkeypatch)
    shares = []
    original = HeldOut.relative

    def relative(self, model, *rest):
        shares.append(share_of(model))
        return original(self, model, *rest)

    monkeypatch.setattr(HeldOut, "relative", relative)
    found = plan(classifier(), data(24), quality=0.999, speedup=2.0, load=QUICK, progress=False)
    assert not any(row.reached for row in found.rows) and len(shares) == 2 * len(found.rows)
    assert all(row.speed.ratio >= 2 for row in found.rows)


def test_the_best_at_a_speed(monkeypatch):
    timed(monkeypatch)
    found = plan(classifier(), data(24), speedup=1.5, load=QUICK, progress=False)
    assert all(row.reached and 1.5 <= row.speed.ratio < 1.7 for row in found.rows)
    assert found.chosen.quality.value == max(row.quality.value for row in found.rows)


def test_candidates_that_cannot_be_made_say_so(monkeypatch):
    timed(monkeypatch)
    config, unfitted = MoEficationConfig(calibration_tokens=20), {"splitter": "random", "router": "random"}
    candidates = [Candidate("odd", {**unfitted, "expert_size": 30}, RELU, "", ""), CANDIDATES[0]]
    candidates.append(Candidate("fine", {**unfitted, "num_experts": 8}, RELU, "", ""))
    found = plan(classifier(), data(24), speedup=1.2, load=QUICK, config=config, candidates=candidates, progress=False)
    refused = {row.candidate: row.refused for row in found.rows}
    assert "calibration is too small" in refused["moefication"] and "30" in refused["odd"]
    assert found.chosen.candidate == "fine" and "calibration is too small" in found.table()
    with pytest.raises(MoefyError, match="no candidate could be tried: moefication: calibration is too small"):
        plan(classifier(), data(24), quality=0.5, load=QUICK, config=config, progress=False)


def test_what_was_measured_is_what_is_made(monkeypatch):
    """With the means of experts that do not run, which depend on the budget."""
    timed(monkeypatch)
    model, batches, others = classifier("gelu"), data(24), data(40)[24:]
    settings = {"splitter": "random", "router": "similarity", "expert_size": 32, "compensation": True}
    given = {"candidates": [Candidate("means", settings, SMOOTH, "", "")], "load": QUICK, "progress": False}
    row = plan(model, batches, others, speedup=1.7, **given).chosen
    held_out = HeldOut(model, others, progress=False)
    moefy_(model, row.settings, batches, progress=False)
    assert held_out.relative(model, False) == row.quality and any(
        site.act.compensation.any() for site in model.moe_sites()
    )
    moefy_(bare := classifier("gelu"), replace(row.settings, compensation=False), batches, progress=False)
    logits = [each(**others[0]).logits for each in (model, bare)]
    assert not torch.allclose(*logits)


def test_of_perplexities_the_least_is_best():
    row = Row("a", MoEficationConfig(), 0.5, Relative(1.2, 0.01), Speed(1.5, (1.5, 1.5), 1, 1), True)
    other = replace(row, candidate="b", quality=Relative(1.1, 0.01), speed=Speed(1.4, (1.4, 1.4), 1, 1))
    assert best_of([row, other], Goal(speedup=1.3), PERPLEXITY) is other
    assert best_of([row, other], Goal(quality=1.3), PERPLEXITY) is row
    assert best_of([replace(row, reached=False)], Goal(quality=1.3), PERPLEXITY) is None


def test_a_perplexity_that_overflows_is_no_crash():
    held_out = HeldOut(tiny_model("llama", LANGUAGE), data(2, "next"), progress=False)
    assert math.isfinite(held_out.summed([-1e6], [10]).value)


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny classifier with a tokenizer of numbers, and labelled texts."""
    folder = tmp_path_factory.mktemp("planned")
    classifier().save_pretrained(folder / "dense")
    number_tokenizer().save_pretrained(folder / "dense")
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("train", 120), ("validation", 40)):
        lines = [" ".join(map(str, torch.randint(3, 99, (9,), generator=generator).tolist())) for _ in range(rows)]
        table = "\n".join(f"{line},{place % 2}" for place, line in enumerate(lines))
        (folder / f"{name}.csv").write_text(f"text,label\n{table}\n")
    return folder


def command(folder, *arguments):
    given = [
        str(folder / "dense"),
        *arguments,
        "--data",
        str(folder / "train.csv"),
        "--seconds",
        "0",
        "--threads",
        "1",
    ]
    main(["convert", *given])


def test_convert_writes_what_the_plan_chose(folder, tmp_path, monkeypatch, capsys):
    timed(monkeypatch)
    output, validation = str(tmp_path / "moe"), str(folder / "validation.csv")
    command(folder, output, "--quality", "0.6", "--validation", validation, "--calibration_tokens", "600", "--json")
    found = json.loads(capsys.readouterr().out)
    (row,) = [row for row in found["plan"]["rows"] if row["candidate"] == found["plan"]["chosen"]]
    assert found["plan"]["measure"] == ACCURACY and found["plan"]["positions"] == 40 and found["plan"]["validated"]
    model = load(output)
    assert share_of(model) == pytest.approx(row["experts"])
    assert Section(model.config).router == row["settings"]["router"]
    assert read_facts(output)["speed"]["rows"] and "prediction" in read_facts(output)


def test_a_dry_run_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    timed(monkeypatch)
    before = sorted(folder.iterdir())
    command(folder, "--speedup", "1.5", "--dry_run", "--method", "moefication", "--calibration_tokens", "600")
    shown = capsys.readouterr().out
    assert "| moefication |" in shown and "moefication_large" not in shown and "Chosen: moefication" in shown
    assert "a model that was trained on it looks better there" in shown
    assert sorted(folder.iterdir()) == before


def test_settings_take_the_place_of_the_plan(folder, monkeypatch, capsys):
    timed(monkeypatch)
    settings = ("--splitter", "random", "--router", "similarity", "--expert_size", "16")
    command(folder, "--speedup", "1.5", "--dry_run", *settings, "--calibration_tokens", "600", "--json")
    (row,) = json.loads(capsys.readouterr().out)["plan"]["rows"]
    kept = {"splitter": "random", "router": "similarity", "expert_size": 16}
    assert row["candidate"] == "as given" and kept.items() <= row["settings"].items()


def test_nothing_is_written_where_nothing_is_worth_it(folder, tmp_path, monkeypatch, capsys):
    timed(monkeypatch, overhead=0.99)
    with pytest.raises(SystemExit) as stopped:
        command(folder, str(tmp_path / "moe"), "--quality", "0.99", "--calibration_tokens", "600")
    assert stopped.value.code == 3 and "1.1 times as fast" in capsys.readouterr().out
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry_run",), "give --quality or --speedup"),
        (("out", "--batch", "32"), "give --quality or --speedup"),
        (("--quality", "0.9"), "OUTPUT is missing"),
        (("out", "--quality", "0.9", "--k", "0.2"), "--k is what a plan finds"),
        (("out", "--quality", "1.5"), "1.5 of the dense model's accuracy is no target"),
        (("out", "--quality", "0.9", "--method", "moefication", "--router", "mlp"), "leave out router"),
        (("out", "--speedup", "0.5"), "a speed-up of 0.5 is no goal"),
        (("out", "--quality", "0.9", "--batch", "500"), "too few for a batch of 500"),
        (("out", "--quality", "0.9", "--runtime", "llama.cpp"), "llama.cpp runs language models"),
    ],
)
def test_bad_arguments(folder, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "check_installed", lambda self: None)
    with pytest.raises(SystemExit) as stopped:
        command(folder, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
