"""`trl-miso report`: its files and messages, its figures, and its page in a browser."""

import json
import re
import sys
import warnings

import numpy as np
import pytest
import torch

from tests.preview import test_preview_page
from tests.preview.test_preview_page import HOSTILE, hover, tooltip
from tests.support.models import tiny_model
from trl_miso import MISOSFTConfig
from trl_miso.cli.report import main
from trl_miso.data.options import DataOptions
from trl_miso.pages.report import render_report
from trl_miso.report import Sampler, measure, plots
from trl_miso.report.plots import draw
from trl_miso.report.row_detail import row_detail
from trl_miso.report.summary import Summary, compare_summaries
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

pytest.importorskip("matplotlib", reason="needs pip install 'trl-miso[plots]'")

browser = test_preview_page.browser
FIGURES = {"row.png", "constraints.png", "kinds.png", "layers.png", "relation.png", "dilution.png", "compare.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with two models, each saved with its tokenizer."""
    tokenizer = build_tokenizer(synthetic_rows(40), vocab_size=400)
    folder = tmp_path_factory.mktemp("models")
    for name, scale in (("before", 1.0), ("after", 1.5)):
        model = tiny_model("llama", num_hidden_layers=2, vocab_size=len(tokenizer), eos_token_id=1)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models, monkeypatch, tmp_path):
    """A function that runs the command in an empty folder and returns the report that it wrote to `out`."""
    monkeypatch.chdir(tmp_path)

    def report(*arguments):
        main([*arguments, "--output_dir", "out", "--use_cpu"])
        return json.loads((tmp_path / "out/report.json").read_text())

    return report


def folders(models, *names):
    return [
        part
        for option, name in zip(("--model", "--compare"), names, strict=False)
        for part in (option, str(models / name))
    ]


# The command


def test_the_command_compares_two_models(run, models, tmp_path, capsys, wide_terminal):
    report = run(*folders(models, "before", "after"), "--num_rows", "3", "--row", "1")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == FIGURES | {"report.html", "report.json", "masses.npz"}
    assert report["rows"]["measured"] + sum(s["rows"] for s in report["rows"]["skipped"].values()) == 3
    arrays = np.load(tmp_path / "out/masses.npz")
    for at, model in enumerate(report["models"]):
        assert sum(model["kinds"].values()) == pytest.approx(1, abs=1e-5)
        for row in model["rows"]:
            assert sum(part["mass"] for part in row["parts"]) == pytest.approx(1, abs=1e-5)
            assert arrays[f"model_{at}/row_{row['row']}"].shape == (2, 4, len(row["parts"]))
        followed = [p["followed"] for row in model["rows"] for p in row["parts"] if p["kind"] == "constraint"]
        assert followed and all(followed)  # the rows' constraints were read from their answers
        assert model["relation"]["mass"]["auc"] is None
        assert [line["contexts"] for line in model["dilution"]][:3] == [1, 2, 4]
    first, second = ([row["parts"][0]["mass"] for row in model["rows"]] for model in report["models"])
    assert report["compared"]["output"]["mean"] == pytest.approx(np.mean(second) - np.mean(first))
    shown, layers, heads = report["shown"], *arrays["model_0/answer"].shape[:2]
    assert (shown["row"], layers, heads) == (1, 2, 4)
    assert (
        len(shown["models"][0]["prompt"]) == len(shown["models"][0]["owners"]) == len(shown["models"][0]["layers"][2])
    )
    printed = capsys.readouterr().out
    for text in ("Where attention goes", "followed", "too few", "eq. 6", "Wrote out/report.html"):
        assert text in printed, text


def test_models_generate_their_own_answers(run, models, tmp_path, capsys):
    """For rows without answers too, whose constraints stay unchecked."""
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "Tell me.", "constraints": ["Be kind.", "Be brief."]}) + "\n"
    )
    report = run("rows.jsonl", *folders(models, "before"), "--generate", "--max_new_tokens", "5")
    (row,) = report["models"][0]["rows"]
    assert report["answers"] == "generated"
    assert 1 <= len(report["shown"]["models"][0]["answer"]) <= 5
    assert [part["followed"] for part in row["parts"]] == [None] * len(row["parts"])
    assert not (tmp_path / "out/relation.png").exists()
    assert report["compared"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model"),
        (["--model", "M", "--compare", "M"], "another one to --compare"),
        (["--model", "M", "--max_new_tokens", "3"], "without --generate"),
        (["--model", "M", "--row", "5"], "row 5 to show, which is not measured: no constraints"),
        (["--model", "M", "--row", "60"], "8 rows were read"),
        (["--model", "M", "--max_length", "20"], "none of which can be measured.*max_length"),
        (["plain.jsonl", "--model", "M"], "in the 'prompt' format, expected a constraints or a contexts column"),
    ],
)
def test_errors_name_what_cannot_be_reported(arguments, message, run, models, tmp_path):
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "Tell me.", "completion": "No."}) + "\n")
    with pytest.raises(ValueError, match=message):
        run(*(str(models / "before") if a == "M" else a for a in arguments), "--num_rows", "8")


def test_both_models_need_the_same_prompts(run, models, tmp_path):
    other = tmp_path / "other"
    tokenizer = build_tokenizer(synthetic_rows(3), vocab_size=300)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="tokenizers that differ"):
        run(*folders(models, "before"), "--compare", str(other))
    tokenizer = build_tokenizer(synthetic_rows(40), vocab_size=400)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(other / "bare")
    with pytest.raises(ValueError, match="chat templates that differ.*--chat_template_path"):
        run(*folders(models, "before"), "--compare", str(other / "bare"))


def test_a_missing_matplotlib_is_an_import_error(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Fix: pip install 'trl-miso\[plots\]'"):
        run("--model", "nothing")


# The page

NAMES = ["change " + HOSTILE[0], "after " + HOSTILE[4]]
TEXTS = [text for text in HOSTILE if text != "\ud83d" and text.strip() and len(text) < 1000]
TEXTS += ["\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", "👩\u200d🚀 to the 🌙", "$x_1$ and \\frac{a}{b}"]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The report of a hostile row with 8 constraints and more than 1,000 tokens, for two models; its folder and figures."""
    constraints = [f"{i}. " + " / ".join(TEXTS[i::8]) + " and so on" * 22 for i in range(8)]
    base = "Write \n\n\t about " + "<b>it</b> & all " * 40
    completion = [{"role": "assistant", "content": "\n".join(TEXTS) + " or not " * 60}]
    row = {"prompt": [{"role": "user", "content": base}], "constraints": constraints, "completion": completion}
    folder = tmp_path_factory.mktemp("report")
    tokenizer = build_tokenizer([{"messages": [*row["prompt"], {"content": " ".join(constraints)}]}], vocab_size=420)
    args = MISOSFTConfig(str(folder), max_length=None, bf16=False, use_cpu=True, report_to=[])
    sample = Sampler(tokenizer, DataOptions.of(args), "constraints")(row, 3)
    assert len(sample.prompted.ids) > 1000
    summaries, details = [], []
    for name in NAMES:
        model = tiny_model("llama", num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=8192)
        model.model.embed_tokens.weight.data[len(name) :: 2] *= -2
        summaries.append(Summary(name))
        (measured,) = measure(model, [sample], detailed=3)
        summaries[-1].add(measured, [True, False, None, True, False, True, True, True])
        details.append(row_detail(measured, tokenizer))
    parts = [{"kind": part.kind, "text": part.text} for part in sample.prompted.parts]
    report = {
        "rows": {"dataset": HOSTILE[1], "read": 4, "measured": 1, "skipped": {HOSTILE[2]: {"rows": 3, "first_row": 0}}},
        "answers": "given",
        "models": [summary.report() for summary in summaries],
        "compared": compare_summaries(*summaries),
        "shown": {"row": 3, "parts": parts, "models": details},
    }
    with warnings.catch_warnings(action="error"):
        figures = draw(report, folder)
    (folder / "page.html").write_text(render_report(report, figures, folder), encoding="utf-8")
    return report, folder, {figure["file"] for figure in figures}


def test_figures_are_drawn_of_hostile_text(reported):
    """No glyph is missing (the warning would be an error here), and no text is read as a formula."""
    _, folder, files = reported
    assert files == {file.name for file in folder.glob("*.png")} == FIGURES
    assert (folder / "row.png").stat().st_size > 20_000


def test_lines_of_the_heat_map_are_the_prompt(reported):
    texts = reported[0]["shown"]["models"][0]["prompt"]
    placed, lines = plots.wrap_tokens(texts)
    written = "".join(text for pieces in placed for _, _, text in pieces).replace("↵", "\n")
    assert written == "".join(texts)
    spots = [(line, column + i) for pieces in placed for line, column, text in pieces for i in range(len(text))]
    assert len(spots) == len(set(spots))
    assert max(column for _, column in spots) <= plots.COLUMNS
    assert max(line for line, _ in spots) == lines - 1


def test_no_text_leaves_the_data_and_nothing_is_fetched(reported):
    page = (reported[1] / "page.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert not re.search(r"[<\u2028\u2029]", data)
    assert page.count("</script") == 2
    outside = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(
        r"https?:|@import|url\(|<script src|<link(?! rel=\"icon\" href=\"data:,\")|fetch\(|import\(", outside
    )
    assert "default-src 'none'" in page


@pytest.fixture
def page(browser, reported):
    """A function that opens the page at a width; the browser may log no error, whatever the test does."""

    def open_page(width=1300):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get((reported[1] / "page.html").as_uri())
        return browser

    yield open_page
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def tokens(browser, where):
    return browser.find_elements("css selector", f'.t[data-where="{where}"]')


def percent(text):
    return float(text.replace("\u202f%", "").replace("−", "-")) / 100


def test_the_tooltip_describes_the_right_token(page, reported):
    report, browser = reported[0], page()
    details, prompt = report["shown"]["models"], tokens(browser, "prompt")
    assert len(prompt) == len(details[0]["prompt"])
    numbers = [i for i, part in enumerate(report["shown"]["parts"]) if part["kind"] == "constraint"]
    for i in (0, details[0]["owners"].index(numbers[4]) + 5, len(prompt) // 2):
        facts = hover(browser, prompt[i])
        assert (
            json.loads(re.sub(r"\\u\{(.*?)\}", lambda m: chr(int(m[1], 16)), facts["token"]), strict=False)
            == details[0]["prompt"][i]
        )
        owner = details[0]["owners"][i]
        kind = report["shown"]["parts"][owner]["kind"]
        assert facts["part"].startswith({"rest": "markup", "base": "base"}.get(kind, kind))
        if owner in numbers:
            assert facts["part"] == f"constraint {numbers.index(owner) + 1}"
        for name, model in zip(NAMES, details, strict=True):
            assert percent(facts[name]) == pytest.approx(model["layers"][0][i], rel=0.06, abs=1e-6)
    browser.find_element("css selector", "select").send_keys("2")
    assert percent(hover(browser, prompt[1])[NAMES[1]]) == pytest.approx(details[1]["layers"][2][1], rel=0.06)
    looks = hover(browser, tokens(browser, "answer")[7])
    assert json.loads(looks["token"]) == details[0]["answer"][7]
    assert percent(looks["the output itself"]) == pytest.approx(details[0]["looks"][7][0], rel=0.06)
    assert percent(looks["constraint 5"]) == pytest.approx(details[0]["looks"][7][numbers[4]], rel=0.06)


def test_the_difference_of_models_is_shown_and_walked_by_keyboard(page, reported):
    from selenium.webdriver.common.keys import Keys

    details, browser = reported[0]["shown"]["models"], page()
    buttons = browser.find_elements("css selector", ".controls button")
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["true", "false", "false"]
    buttons[2].click()
    group = browser.find_element("css selector", ".tokens")
    group.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    change = details[1]["layers"][0][1] - details[0]["layers"][0][1]
    assert percent(tooltip(browser)["change"]) == pytest.approx(change, rel=0.06)
    fills = browser.execute_script(
        "return [...document.querySelectorAll('[data-where=prompt]')].map((t) => t.style.cssText)"
    )
    changes = [b - a for a, b in zip(details[0]["layers"][0], details[1]["layers"][0], strict=True)]
    assert ["--less" in fill for fill in fills] == [change < 0 for change in changes]
    buttons[1].click()
    assert HOSTILE[4] in browser.find_element("css selector", ".reading").text


@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_fits_its_window_and_hostile_text_is_text(page, reported, width):
    browser = page(width)
    inner, outer = browser.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert inner <= outer <= width
    marked = browser.execute_script("return [...document.querySelectorAll('.s[data-s]')].map((e) => e.dataset.s)")
    assert [mark for mark in marked if mark.isdecimal()] == [str(i) for i in range(1, 9)]
    assert len(browser.find_elements("css selector", ".parts tbody tr")) == len(reported[0]["shown"]["parts"])
    assert len(browser.find_elements("css selector", ".figures img")) == len(FIGURES) - 2
    assert browser.execute_script("return [...document.images].every((i) => i.complete && i.naturalWidth > 100)")
    assert browser.find_elements("css selector", "main script, main img[src='x'], main b b") == []
    assert HOSTILE[1] in browser.find_element("css selector", "header").text
    assert [e.text for e in browser.find_elements("css selector", ".followed, .broken")] == list("✓✗✓✗✓✓✓")
