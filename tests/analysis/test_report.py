"""The report, in a real browser where there is one."""

import csv
import json
import re

import pytest
from browser import chromium
from planted import CLASS, EXPERT, LAYER, TOKEN, number_tokenizer, planted_model, write_texts

from moefy_hf.analysis import TextStream, analyze, write_report
from moefy_hf.analysis.report import as_csv, embedded
from moefy_hf.data import TextSource

pytest.importorskip("plotly", reason="needs plotly: pip install 'moefy-hf[report]'")

SWEEP = {
    "facts": {"quality": "accuracy"},
    "rows": [
        {"router": "dense", "experts": 1.0, "ffn_flops": 1.0, "accuracy": 0.9},
        {"router": "own", "allocation": "uniform", "experts": 0.2, "ffn_flops": 0.21, "accuracy": 0.88},
        {"router": "random", "allocation": "uniform", "experts": 0.2, "ffn_flops": 0.21, "accuracy": 0.7},
    ],
}
REMOVAL = {"title": "Without it", "rows": [{"experts off": 0, "a": 0.9, "random: a": 0.9}]}
REMOVAL["rows"].append({"experts off": 4, "a": 0.1, "random: a": 0.8})
PARTITIONS = [{"name": "layer", "matched_cosine": 1.0, "agreement": 0.5, "random": 0.0}]


def stream_of(path: str, model) -> TextStream:
    return TextStream(TextSource(path).open().rows(model, labels=True), number_tokenizer())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    model = planted_model()
    path = write_texts(tmp_path_factory.mktemp("texts") / "</script>.csv".replace("/", "_"), 600)
    return analyze(model, number_tokenizer(), stream_of(path, model), progress=False)


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, found, sweep=SWEEP, partitions=PARTITIONS, removal=REMOVAL)


def test_it_needs_nothing_else(page):
    text = page.read_text()
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.S)  # without plotly itself
    assert len(own) < 200_000 and not re.findall(r"(?:src|href)=[\"']?(?!$)[\w/]", own)
    assert not re.findall(r"https?://", own)


def test_numbers_are_beside_it(page, found):
    rows = list(csv.DictReader((page.parent / "experts.csv").open()))
    assert len(rows) == 12 and float(rows[EXPERT]["load"]) == found.layers[LAYER]["experts"][EXPERT]["load"]
    findings = list(csv.DictReader((page.parent / "findings.csv").open()))
    assert {"layer": "0", "expert": str(EXPERT), "responds to": "class", "name": f"LABEL_{CLASS}"}.items() <= next(
        row.items() for row in findings if row["responds to"] == "class" and row["expert"] == str(EXPERT)
    )
    assert json.loads((page.parent / "analysis.json").read_text()) == found.to_dict()
    assert {path.stem for path in page.parent.glob("*.csv")} == {
        *("specialisation", "layers", "experts", "findings", "sweep", "partitions", "removal")
    }


def test_no_text_ends_the_script():
    text = embedded({"name": "</script><script>alert(1)</script>"})
    assert "<" not in text and json.loads(text)["name"].startswith("</script>")
    assert as_csv([]) == ""


def points(browser, figure: str) -> list:
    return browser.execute_script(f"return document.getElementById('{figure}').data[0].z")


def choose(browser, control: str, value: str) -> None:
    browser.execute_script(
        f"const e = document.getElementById('{control}'); e.value = '{value}'; e.dispatchEvent(new Event('change'))"
    )


@pytest.mark.parametrize("width", [1280, 390], ids=["screen", "phone"])
def test_it_works_in_a_browser(page, found, width, tmp_path):
    with chromium(width) as browser:
        browser.get(page.as_uri())
        assert browser.get_log("browser") == []  # no error, and nothing asked of the network
        figures = ("load", "classes", "pairs", "sweep", "removal")
        drawn = [browser.execute_script(f"return !!document.querySelector('#{each} svg')") for each in figures]
        assert all(drawn)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert points(browser, "load")[LAYER][EXPERT] == found.layers[LAYER]["experts"][EXPERT]["load"]
        choose(browser, "loadsort", "load")
        rows = points(browser, "load")
        assert all(row == sorted(row, reverse=True) for row in rows)
        check_classes(browser, found)
        check_cards(browser)
        check_themes_and_downloads(browser)
        assert browser.get_log("browser") == []
        assert browser.get_screenshot_as_png()[:4] == b"\x89PNG"


def check_classes(browser, found) -> None:
    choose(browser, "classlayer", str(LAYER))
    shown = sum(value is not None for row in points(browser, "classes") for value in row)
    assert shown == sum(map(sum, found.layers[LAYER]["class_found"])) > 0  # what could be chance is blank
    browser.execute_script("document.getElementById('classall').click()")
    assert all(value is not None for row in points(browser, "classes") for value in row)


def check_cards(browser) -> None:
    choose(browser, "cardlayer", "1")
    titles = browser.execute_script("return [...document.querySelectorAll('.expert h3')].map(e => e.textContent)")
    assert len(titles) == 6 and all(title.startswith("Layer 1, expert") for title in titles)
    search = "const e = document.getElementById('search'); e.value = '%s'; e.dispatchEvent(new Event('input'))"
    browser.execute_script(search % f"label_{CLASS}")
    cards = browser.execute_script("return [...document.querySelectorAll('.expert')].map(e => e.textContent)")
    assert cards and all(f"LABEL_{CLASS}" in card for card in cards)
    marked = browser.execute_script(
        "return [...document.querySelectorAll('.expert mark')].map(e => e.textContent.trim())"
    )
    assert str(TOKEN) in marked
    browser.execute_script(search % "")


def check_themes_and_downloads(browser) -> None:
    def background() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    browser.execute_script("document.getElementById('theme').click()")
    assert background() != before
    names = browser.execute_script(
        "return [...document.querySelectorAll('#downloads button')].map(e => e.textContent)"
    )
    assert "experts.csv" in names and len(names) == 7
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.documentElement.dataset.theme") == "light"


def test_texts_without_classes(tmp_path):
    model = planted_model()
    (tmp_path / "texts.txt").write_text("\n".join(["5 6 7 42 8"] * 30))
    stream = stream_of(str(tmp_path / "texts.txt"), model)
    page = write_report(tmp_path / "report", analyze(model, number_tokenizer(), stream, progress=False))
    with chromium() as browser:
        browser.get(page.as_uri())
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.getElementById('classes')") is None
        assert browser.execute_script("return document.querySelectorAll('.expert').length") == 6
