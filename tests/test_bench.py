"""`moefy bench` times what it has checked, and refuses what makes no sense."""

import json
import re

import pytest

from moefy_hf import bench as module
from moefy_hf.bench import PRESETS, bench, least_seconds
from moefy_hf.cli import main


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(module, "COLD_BYTES", 10_000_000)
    monkeypatch.setattr(module, "machine_limits", lambda: {"bytes_per_second": 1e10, "flops_per_second": 1e11})


@pytest.mark.parametrize("preset", ["minilm", "smollm2-135m"])
def test_rows(little, preset, tmp_path, capsys):
    file = tmp_path / "bench.json"
    sizes = ["--tokens", "1", "9", "--rounds", "4", "--expert-size", "16"]
    main(["bench", "--preset", preset, *sizes, "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["settings"]["k"] == 19 and found["settings"]["gated"] is PRESETS[preset].gated
    assert [(row["implementation"], row["tokens"]) for row in found["rows"]] == [("cpu", 1), ("cpu", 9)]
    for row in found["rows"]:
        assert row["ratio"] > 0 and row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["ratio_best_dense"] > 0 and row["fraction_of_bound"] > 0
    assert "| 9 | " in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(little, monkeypatch):
    right = module.moe_ffn
    monkeypatch.setattr(module, "moe_ffn", lambda *args, **settings: (right(*args, **settings)[0] * 1.01, None))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench("minilm", tokens=[1], rounds=1, progress=False)


def test_the_bound():
    """One token reads the selected rows and the router once; many tokens of all experts are bound by arithmetic."""
    shape, limits = PRESETS["t5-base"], {"bytes_per_second": 1.0, "flops_per_second": 1e12}
    assert least_seconds(shape, 32, 19, 1, limits) == pytest.approx(4 * 768 * (2 * 19 * 32 + 96))
    limits = {"bytes_per_second": 1e12, "flops_per_second": 1.0}
    assert least_seconds(shape, 32, 96, 10, limits) == pytest.approx(2 * 10 * 768 * (2 * 3072 + 96))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "t6"], "unknown preset 't6'; choose from minilm, t5-base"),
        (["--expert-size", "7"], "experts of 7 neurons do not divide the 3072 of t5-base"),
        (["--share", "1.5"], r"share must lie in \(0, 1\]"),
        (["--tokens", "0"], "tokens and threads be positive"),
        (["--json", "no/such/file.json"], "there is no folder for no/such/file.json"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
