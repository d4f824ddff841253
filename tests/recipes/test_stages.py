"""Steps of a run: each is done once, whole or not at all, and never over results of other settings."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
from transformers import TrainingArguments

from moefy_hf import MoEficationConfig
from moefy_hf.recipes import arguments as of
from moefy_hf.recipes.plans import training_plan
from moefy_hf.recipes.settings import Arguments
from moefy_hf.recipes.stages import MARKER, Stage, Stages, hash_of, read_made


@dataclass
class Size:
    share: float = 0.2
    shares: list[float] = field(default_factory=lambda: [0.1, 0.2])


@dataclass
class Name:
    name: str | None = None


BOTH = Stage((Size, Name))
PLAN = {"result": BOTH}


def settings(*parts) -> Arguments:
    return Arguments([Size(), Name()]).replaced(*parts)


def test_stages_run_once(tmp_path, capsys):
    calls = []

    def make(path: Path) -> None:
        calls.append(path.name)
        path.write_text("result")

    plan = {"result.txt": BOTH}
    for attempt in range(2):
        stages = Stages(tmp_path / "out", plan, settings())
        assert stages.run("result.txt", make) == tmp_path / "out" / "result.txt"
        assert stages.finished("result.txt")
        assert (tmp_path / "out" / "result.txt").read_text() == "result" and len(calls) == 1, attempt
    assert "skipped" in capsys.readouterr().out
    read = {"Size": {"share": 0.2, "shares": [0.1, 0.2]}, "Name": {"name": None}}
    made = json.loads((tmp_path / "out" / MARKER).read_text())
    assert made == {"result.txt": {"hash": hash_of(read), "settings": read}} and len(hash_of(read)) == 64
    assert read_made(tmp_path / "out") == {"result.txt": {"share": 0.2, "shares": [0.1, 0.2], "name": None}}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.txt", MARKER}


@pytest.mark.parametrize("folder", [True, False])
def test_a_stage_that_failed_leaves_no_result_and_runs_again(tmp_path, folder):
    def write(path: Path, text: str) -> None:
        if folder:
            path.mkdir()
        (path / "file" if folder else path).write_text(text)

    def fail(path: Path) -> None:
        write(path, "half")
        raise RuntimeError("in the middle")

    stages = Stages(tmp_path, PLAN, settings())
    with pytest.raises(RuntimeError, match="in the middle"):
        stages.run("result", fail)
    assert not (tmp_path / "result").exists() and not stages.finished("result")
    again = Stages(tmp_path, PLAN, settings())
    path = again.run("result", lambda path: write(path, "whole"))
    assert (path / "file" if folder else path).read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"result", MARKER}
    redone = Stages(tmp_path, PLAN, settings(), redo=True)
    with pytest.raises(RuntimeError, match="in the middle"):  # the old result stays until there is a new one
        redone.run("result", fail)
    assert (path / "file" if folder else path).read_text() == "whole"
    redone.run("result", lambda path: write(path, "new"))
    assert (path / "file" if folder else path).read_text() == "new"


def test_changed_settings_are_refused_and_named(tmp_path):
    Stages(tmp_path, PLAN, settings()).run("result", lambda path: path.write_text("old"))
    before = (tmp_path / MARKER).read_text()
    for changed, key in ((Size(0.3), "share"), (Size(shares=[0.1]), "shares"), (Name("other"), "name")):
        with pytest.raises(ValueError, match=rf"\({key} changed\).*--redo true"):
            Stages(tmp_path, PLAN, settings(changed))
    with pytest.raises(ValueError, match=r"\(name, share changed\)"):
        Stages(tmp_path, PLAN, settings(Size(0.3), Name("other")))
    with pytest.raises(ValueError, match=r"\(redo changed\)"):  # a part that the stage did not read before
        Stages(tmp_path, {"result": Stage((Size, Name, of.OutputArguments))}, Arguments([*settings().parts, REDO]))
    assert (tmp_path / MARKER).read_text() == before
    stages = Stages(tmp_path, PLAN, settings(Size(0.3)), redo=True)
    stages.run("result", lambda path: path.write_text("new"))
    assert (tmp_path / "result").read_text() == "new"
    assert Stages(tmp_path, PLAN, settings(Size(0.3))).finished("result")


REDO = of.OutputArguments()


def test_an_interrupted_redo_does_not_pass_old_results_off_as_new(tmp_path):
    plan = {"one": BOTH, "two": BOTH}
    before, after = settings(), settings(Size(0.3))
    first = Stages(tmp_path, plan, before)
    for name in plan:
        first.run(name, lambda path: path.write_text("old"))
    redone = Stages(tmp_path, plan, after, redo=True)
    redone.begin()
    redone.run("one", lambda path: path.write_text("new"))  # and then the machine went down
    assert redone.finished("one") and not redone.finished("two")
    for arguments in (before, after):
        with pytest.raises(ValueError, match=r"\(share changed\).*--redo true"):
            Stages(tmp_path, plan, arguments)
    again = Stages(tmp_path, plan, after, redo=True)
    assert not again.finished("one") and not again.finished("two")


def test_a_result_that_nobody_finished_does_not_count(tmp_path):
    stages = Stages(tmp_path, PLAN, settings())
    stages.begin()
    (tmp_path / "result").write_text("from elsewhere")
    assert not Stages(tmp_path, PLAN, settings()).finished("result")


@pytest.mark.parametrize("redo", [False, True])
def test_a_foreign_folder_is_refused_with_nothing_written(tmp_path, redo):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not the output of a moefy recipe"):
        Stages(tmp_path, PLAN, settings(), redo=redo)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_nested_ones_are_fine(tmp_path):
    Stages(tmp_path, PLAN, settings())
    stages = Stages(tmp_path / "a" / "b", PLAN, settings())
    assert not (tmp_path / "a").exists()  # nothing is written before the work begins
    stages.begin()
    assert (tmp_path / "a" / "b" / MARKER).exists()


def test_settings_that_a_stage_does_not_read_may_change(tmp_path):
    plan = {"dense": Stage((Name,)), "moefied": Stage((Size,), after=("dense",))}
    Stages(tmp_path, plan, settings()).run("dense", lambda path: path.write_text("model"))
    later = Stages(tmp_path, plan, settings(Size(0.3)))
    assert later.finished("dense")
    later.run("moefied", lambda path: path.write_text("converted"))
    with pytest.raises(ValueError, match=r"\(share changed\)"):  # the second one does read it
        Stages(tmp_path, plan, settings())
    (tmp_path / "dense").unlink()
    with pytest.raises(ValueError, match=r"\(name changed\)"):  # and what the first one reads
        Stages(tmp_path, plan, settings(Size(0.3), Name("other")))


def test_results_that_are_not_asked_for_are_left_alone(tmp_path):
    plan, all_of_it = {"moefied": BOTH}, {"moefied": BOTH, "recovered": Stage(after=("moefied",))}
    Stages(tmp_path, all_of_it, settings()).run("recovered", lambda path: path.write_text("model"))
    changed = settings(Size(0.3))
    Stages(tmp_path, plan, changed).run("moefied", lambda path: path.write_text("other"))
    assert set(json.loads((tmp_path / MARKER).read_text())) == {"recovered", "moefied"}
    with pytest.raises(ValueError, match=r"\(share changed\)"):
        Stages(tmp_path, all_of_it, changed)
    redone = Stages(tmp_path, plan, changed, redo=True)
    redone.run("moefied", lambda path: path.write_text("again"))
    again = Stages(tmp_path, all_of_it, changed)  # what the old one was made from is gone
    assert again.finished("moefied") and not again.finished("recovered")


def test_stages_can_be_added_with_settings_of_their_own(tmp_path):
    stages = Stages(tmp_path, {"dense": Stage((Name,))}, settings())
    for share in (0.3, 0.4):
        stages.add(f"{share}.json", Stage((Size,), after=("dense",)), settings(Size(share)))
        stages.run(f"{share}.json", lambda path: path.write_text("cell"))
    again = Stages(tmp_path, {"dense": Stage((Name,))}, settings())
    again.add("0.3.json", Stage((Size,), after=("dense",)), settings(Size(0.3)))
    assert again.finished("0.3.json")
    with pytest.raises(ValueError, match=r"\(share changed\)"):
        again.add("0.4.json", Stage((Size,), after=("dense",)), settings(Size(0.3)))


# ---- what recipes read


def arguments_of(tmp_path, **training) -> Arguments:
    parts = [of.ClassifierArguments("model"), of.TextDataArguments("texts"), of.EvaluationArguments()]
    parts += [of.ControlArguments(), of.MetricArguments(["accuracy"]), of.TimingArguments(), of.SparsityArguments()]
    parts += [of.RecoveryArguments(1.0), of.DistillationArguments(), of.LearnedArguments()]
    parts += [of.ScheduleArguments("anneal"), TrainingArguments(str(tmp_path), use_cpu=True, **training)]
    return Arguments([*parts, MoEficationConfig()])


TRAINED = {"ClassifierArguments", "TextDataArguments", "SparsityArguments", "TrainingArguments"}
RECOVERED = {"RecoveryArguments", "DistillationArguments", "LearnedArguments"}
DECISIVE = {
    "dense": TRAINED,
    "moefied": TRAINED | {"MoEficationConfig"},
    "sweep.json": TRAINED | {"MoEficationConfig", "EvaluationArguments", "ControlArguments"},
    "times.json": TRAINED | {"MoEficationConfig", "EvaluationArguments", "TimingArguments"},
    "recovered": TRAINED | {"MoEficationConfig"} | RECOVERED,
    "recovered.json": TRAINED | {"MoEficationConfig", "EvaluationArguments"} | RECOVERED,
    "control": TRAINED | {"RecoveryArguments"},
    "control.json": TRAINED | {"RecoveryArguments"},
    "scheduled": TRAINED | {"MoEficationConfig", "ScheduleArguments", "DistillationArguments"},
    "scheduled.json": TRAINED
    | {"MoEficationConfig", "ScheduleArguments", "DistillationArguments", "EvaluationArguments"},
    "scores_dense.json": TRAINED | {"MetricArguments"},
    "scores_moefied.json": TRAINED | {"MoEficationConfig", "MetricArguments", "EvaluationArguments"},
    "scores_control.json": TRAINED | {"RecoveryArguments", "MetricArguments"},
    "scores_recovered.json": TRAINED | {"MoEficationConfig", "MetricArguments", "EvaluationArguments"} | RECOVERED,
    "scores_scheduled.json": TRAINED
    | {"MoEficationConfig", "ScheduleArguments", "DistillationArguments", "EvaluationArguments", "MetricArguments"},
}


def test_what_each_result_depends_on(tmp_path):
    """Of every dataclass: when one field changes, the stages that read the class are others, and no others are."""
    arguments = arguments_of(tmp_path)
    plan = training_plan(arguments)
    assert plan.keys() == DECISIVE.keys()
    before = Stages(tmp_path / "run", plan, arguments).settings
    for part in arguments.parts:
        name = "learning_rate" if isinstance(part, TrainingArguments) else fields(part)[0].name
        other = replace(part, **{name: 16 if name == "expert_size" else 0.5})
        after = Stages(tmp_path / "run", plan, arguments.replaced(other)).settings
        changed = {stage for stage in plan if hash_of(before[stage]) != hash_of(after[stage])}
        assert changed == {stage for stage, read in DECISIVE.items() if type(part).__name__ in read}, part


@pytest.mark.parametrize(
    "reporting", [{"logging_steps": 3}, {"report_to": "none"}, {"disable_tqdm": True}, {"dataloader_num_workers": 2}]
)
def test_what_only_reports_decides_nothing(tmp_path, reporting):
    plain, changed = arguments_of(tmp_path / "a"), arguments_of(tmp_path / "b", **reporting)
    plan = training_plan(plain)
    before, after = (Stages(tmp_path / "run", plan, each).settings for each in (plain, changed))
    assert before == after
    assert before != Stages(tmp_path / "run", plan, arguments_of(tmp_path, seed=3)).settings


def test_what_trains_nothing_reads_how_it_measures(tmp_path):
    plan = {"moefied": Stage((MoEficationConfig,), measuring=True)}
    hashes = {
        hash_of(Stages(tmp_path / "run", plan, arguments_of(tmp_path, **training)).settings["moefied"])
        for training in ({}, {"seed": 1}, {"per_device_eval_batch_size": 3}, {"learning_rate": 0.1}, {"max_steps": 4})
    }
    assert len(hashes) == 3
