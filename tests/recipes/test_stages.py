"""Steps of a run: each is done once, whole or not at all, and never over results of other settings."""

import json
from pathlib import Path

import pytest
from run import CONVERSION, RECOVERY, SWEEP, UNUSED
from stages import MARKER, Stages

SETTINGS = {"share": 0.2, "shares": [0.1, 0.2], "name": None}


def test_stages_run_once(tmp_path, capsys):
    calls = []

    def make(path: Path) -> None:
        calls.append(path.name)
        path.write_text("result")

    for attempt in range(2):
        stages = Stages(tmp_path / "out", SETTINGS)
        assert stages.run("result.txt", make) == tmp_path / "out" / "result.txt"
        assert stages.finished("result.txt")
        assert (tmp_path / "out" / "result.txt").read_text() == "result" and len(calls) == 1, attempt
    assert "skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / MARKER).read_text()) == {"result.txt": SETTINGS}
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

    stages = Stages(tmp_path, SETTINGS)
    with pytest.raises(RuntimeError, match="in the middle"):
        stages.run("result", fail)
    assert not (tmp_path / "result").exists() and not stages.finished("result")
    again = Stages(tmp_path, SETTINGS)
    path = again.run("result", lambda path: write(path, "whole"))
    assert (path / "file" if folder else path).read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"result", MARKER}
    redone = Stages(tmp_path, SETTINGS, redo=True)
    with pytest.raises(RuntimeError, match="in the middle"):  # the old result stays until there is a new one
        redone.run("result", fail)
    assert (path / "file" if folder else path).read_text() == "whole"
    redone.run("result", lambda path: write(path, "new"))
    assert (path / "file" if folder else path).read_text() == "new"


def test_changed_settings_are_refused_and_named(tmp_path):
    Stages(tmp_path, SETTINGS).run("result", lambda path: path.write_text("old"))
    for changed in ({**SETTINGS, "share": 0.3}, {"shares": [0.1, 0.2], "name": None}, {**SETTINGS, "more": 1}):
        key = "share" if "more" not in changed else "more"
        with pytest.raises(ValueError, match=rf"\({key} changed\).*--redo true"):
            Stages(tmp_path, changed)
    assert json.loads((tmp_path / MARKER).read_text()) == {"result": SETTINGS}
    stages = Stages(tmp_path, {**SETTINGS, "share": 0.3}, redo=True)
    stages.run("result", lambda path: path.write_text("new"))
    assert (tmp_path / "result").read_text() == "new"
    assert Stages(tmp_path, {**SETTINGS, "share": 0.3}).finished("result")


def test_an_interrupted_redo_does_not_pass_old_results_off_as_new(tmp_path):
    before, after = SETTINGS, {**SETTINGS, "share": 0.3}
    first = Stages(tmp_path, before)
    for name in ("one", "two"):
        first.run(name, lambda path: path.write_text("old"))
    redone = Stages(tmp_path, after, redo=True)
    redone.begin()
    redone.run("one", lambda path: path.write_text("new"))  # and then the machine went down
    assert redone.finished("one") and not redone.finished("two")
    for settings in (before, after):
        with pytest.raises(ValueError, match=r"\(share changed\).*--redo true"):
            Stages(tmp_path, settings)
    again = Stages(tmp_path, after, redo=True)
    assert not again.finished("one") and not again.finished("two")


def test_a_result_that_nobody_finished_does_not_count(tmp_path):
    stages = Stages(tmp_path, SETTINGS)
    stages.begin()
    (tmp_path / "result").write_text("from elsewhere")
    assert not Stages(tmp_path, SETTINGS).finished("result")


@pytest.mark.parametrize("redo", [False, True])
def test_a_foreign_folder_is_refused_with_nothing_written(tmp_path, redo):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not the output of a moefy recipe"):
        Stages(tmp_path, SETTINGS, redo=redo)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_nested_ones_are_fine(tmp_path):
    Stages(tmp_path, SETTINGS)
    stages = Stages(tmp_path / "a" / "b", SETTINGS)
    assert not (tmp_path / "a").exists()  # nothing is written before the work begins
    stages.begin()
    assert (tmp_path / "a" / "b" / MARKER).exists()


def test_settings_that_a_stage_does_not_read_may_change(tmp_path):
    unused = {"dense": ["share"]}
    first = Stages(tmp_path, SETTINGS, unused=unused)
    first.run("dense", lambda path: path.write_text("model"))
    later = Stages(tmp_path, SETTINGS | {"share": 0.3}, unused=unused)
    assert later.finished("dense")
    later.run("moefied", lambda path: path.write_text("converted"))
    with pytest.raises(ValueError, match=r"\(share changed\)"):  # the second one does read it
        Stages(tmp_path, SETTINGS, unused=unused)
    with pytest.raises(ValueError, match=r"\(name changed\)"):
        Stages(tmp_path, SETTINGS | {"share": 0.3, "name": "other"}, unused=unused)


def test_results_that_are_not_asked_for_are_left_alone(tmp_path):
    Stages(tmp_path, SETTINGS).run("recovered", lambda path: path.write_text("model"))
    changed = SETTINGS | {"share": 0.3}
    Stages(tmp_path, changed, ignored=["recovered"]).run("moefied", lambda path: path.write_text("other"))
    assert set(json.loads((tmp_path / MARKER).read_text())) == {"recovered", "moefied"}
    with pytest.raises(ValueError, match=r"\(share changed\)"):
        Stages(tmp_path, changed)
    redone = Stages(tmp_path, changed, redo=True, ignored=["recovered"])
    redone.run("moefied", lambda path: path.write_text("again"))
    again = Stages(tmp_path, changed)  # what the old one was made from is gone
    assert again.finished("moefied") and not again.finished("recovered")


EVERYTHING = {"learning_rate", "sparsity_weight", "seed", *CONVERSION, *SWEEP, *RECOVERY, "generated_rows"}
TRAINED = {"learning_rate", "sparsity_weight", "seed"}
DECISIVE = {
    "dense": TRAINED,
    "moefied": TRAINED | {*CONVERSION},
    "sweep.json": TRAINED | {*CONVERSION, *SWEEP},
    "recovered": TRAINED | {*CONVERSION, *RECOVERY} - {"schedule"},
    "control": TRAINED | {"recovery_epochs", "recovery_parameters", "lora_rank"},
    "scheduled": TRAINED | {*CONVERSION, "schedule", "distillation_weight"},
    "scheduled.json": TRAINED | {*CONVERSION, "schedule", "distillation_weight", "shares", "selections"},
    "generated_dense.json": TRAINED | {"generated_rows", "shares"},
    "coactivation-linear-500.json": EVERYTHING - {"splitter", "router", *RECOVERY},
}


@pytest.mark.parametrize("name", DECISIVE)
def test_what_each_result_depends_on(name, tmp_path):
    settings = dict.fromkeys(EVERYTHING, 0)
    Stages(tmp_path / "run", settings, unused=UNUSED).run(name, lambda path: path.write_text(""))
    refused = set()
    for key in EVERYTHING:
        try:
            Stages(tmp_path / "run", settings | {key: 1}, unused=UNUSED)
        except ValueError:
            refused.add(key)
    assert refused == DECISIVE[name]
