"""The two renderings of a preview: the page, its data and its behaviour in a browser (if one is installed), and the terminal."""

import io
import json
import re
import shutil

import pytest
from rich.cells import cell_len
from rich.console import Console

from trl_miso.cli.preview_terminal import print_preview
from trl_miso.pages.page import render_page
from trl_miso.preview.answers import answers_of
from trl_miso.segments import Answer, lay_out, parallel, single, successive

HOSTILE = (
    "</script><script>throw 1</script>",
    "</ScRiPt ><img src=x onerror='throw 2'>",
    "<!--<script>",
    "]]>",
    "[bold]no[/bold] [/]",
    "\x1b[2J\x1b]0;title\x07\x9b31m\r",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "line\u2028paragraph\u2029",
    "\ufffd",
    "\ud83d",  # half an emoji, as a byte-level vocabulary may decode it
    "",
    "\n\n\t ",
    "x" * 5000,
    "__PREVIEW__ {{ x }} ${x} \\u003c &lt;",
)


def prepared(example, texts, labelled, index, mode="para", cut=()):
    """A row of a preview; the id of a token is 1000 + its place."""
    ids = [1000 + i for i in range(example.num_tokens)]
    labels = [i if place >= len(ids) - labelled else -100 for place, i in enumerate(ids)]
    return described(example, ids, texts, labels, index, mode, cut)


def described(example, ids, texts, labels, index, mode="para", cut=(), names=(), notes=()):
    """A row of a preview; `cut` are the texts cut from its last answer."""
    segments = [segment._asdict() for segment in example.segments]
    answers = answers_of(example, labels, names or [f"context {i + 1}" for i in range(len(example.branches))])
    answers[-1]["cut"] = list(cut)
    row = {
        "index": index,
        "mode": mode,
        "status": "split",
        "dropped": "",
        "raw": "",
        "cut": len(cut),
        "notes": list(notes),
    }
    row["saved"] = example.num_unshared_tokens - example.num_tokens
    return row | {"ids": ids, "texts": texts, "labels": labels, "segments": segments, "answers": answers}


def several_answers():
    """A demonstration `12 -> 34`, then two completions, each of contexts 123 4 5 6, 123 4 5 and 123 4 6; one turn is a leaf."""
    mixed = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    answers = [
        Answer([[1, 2]], [3, 4], [-100, 4]),
        Answer([[1, 2]], [3, 9, 4], [-100, 9, 4]),
        Answer(mixed, [7, 8], [-100, 8], [0.5, 0.25, 0.25]),
        Answer(mixed, [7, 9, 9], [-100, 9, 9], [0.5, 0.25, 0.25]),
    ]
    ids, labels, example = lay_out(answers)
    names, texts = ("full", "constraint 1", "bare"), [f" u{token}" for token in ids]
    ids = [1000 + i for i in range(len(ids))]
    return described(example, ids, texts, labels, 40, cut=[" lost"], names=names, notes=["the reasoning is long"])


def worked_example():
    """The example of `trl_miso.segments`: contexts 1234, 123, 125, then output 89; only token 9 has loss."""
    tokens, example = parallel([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], 2, [1 / 3] * 3, "successive")
    return prepared(example, [f" t{token}" for token in [*tokens, 8, 9]], 1, index=12, cut=[" gone", "\n"])


def many_contexts():
    tokens, example = parallel(
        [[*range(40), *range(100 * c, 101 * c)] for c in range(1, 31)], 3, [1 / 30] * 30, "successive"
    )
    return prepared(example, [f" w{token}" for token in [*tokens, 1, 2, 3]], 2, index=30)


def long_row():
    tokens, example = parallel(
        [[*range(2500), 7], [*range(2500), 8], [*range(2400)]], 500, [0.5, 0.25, 0.25], "successive"
    )
    return prepared(example, [" long"] * example.num_tokens, 499, index=3)


def hostile_row():
    tokens, example = parallel([range(len(HOSTILE)), range(3)], len(HOSTILE), [0.5, 0.5], "after_longest")
    return prepared(example, [*HOSTILE, *HOSTILE], 4, index=99, cut=HOSTILE)


def preview():
    chunks = prepared(successive([2, 3], 2), [" a", " b", " c", " d", "e", " out", " put"], 1, index=5, mode="succ")
    run = prepared(single(6), [" p", " q", "\n", "r", "s", "t"], 3, index=6, mode="single")
    dropped = dict.fromkeys(["ids", "texts", "labels", "segments", "answers", "notes"], []) | {"cut": 0, "saved": 0}
    raw = "".join(HOSTILE).replace("\ud83d", "")  # the browser's driver cannot return half an emoji
    dropped |= {"index": 17, "mode": "para", "status": HOSTILE[5], "dropped": HOSTILE[1], "raw": raw}
    rows = [worked_example(), many_contexts(), chunks, run, dropped, hostile_row(), long_row(), several_answers()]
    lengths = {"percentiles": [0, 50, 100], "unique_tokens": [7, 93, 3001], "longest_context": [4, 70, 2501]}
    lengths["longest_path"] = [6, 73, 3001]
    statistics = {
        "dataset": HOSTILE[0] + HOSTILE[5],
        "model": "meta-llama/Meta-Llama-3-8B",
        "mode": "para",
        "rows": 500,
        "complete": False,
        "examples": 498,
        "modes": {"para": 430, "single": 68},
        "statuses": {"split": 440, HOSTILE[1]: 60},
        "dropped": {HOSTILE[4]: {"rows": 2, "first_row": 1017}},
        "cut": {"rows": 3, "tokens": 220},
        "notes": {HOSTILE[1]: {"rows": 5, "first_row": 2017}},
        "train_turns": "auto: every assistant turn is trained",
        "warnings": ["the tokenizer is a toy" + HOSTILE[5]],
        "answers": 600,
        "answers_per_example": {"1": 400, "2": 94, "3": 4},
        "contexts_per_answer": {"1": 68, "7": 202, "8": 330},
        "tokens": {"unique": 100000, "unshared": 250000, "saved": 0.6, "labelled": 30000},
        "lengths": lengths | {"output": [2, 3, 500]},
        "bins": {"max_length": 4096, "bins": 120, "filled": 0.98, "examples_per_bin": 4.1},
        "cost": {"tokens": 1.12, "score_pairs": 1.5, "flops": 1.17, "model": "Llama-3-8B shape"},
    }
    return {"statistics": statistics, "rows": rows}


def empty_preview():
    """A preview without examples, bins or cost."""
    full = preview()
    nothing = {"examples": 0, "modes": {}, "statuses": {}, "dropped": {}, "notes": {}, "bins": None, "warnings": []}
    nothing |= {"answers": 0, "answers_per_example": {}, "contexts_per_answer": {}}
    nothing |= {
        "tokens": dict.fromkeys(full["statistics"]["tokens"], 0),
        "cost": None,
        "cut": {"rows": 0, "tokens": 0},
    }
    nothing |= {"lengths": dict.fromkeys(full["statistics"]["lengths"], []), "complete": True}
    return {"statistics": full["statistics"] | nothing, "rows": []}


# The page

DATA = re.compile(r'<script type="application/json" id="preview">(.*?)</script>', re.DOTALL | re.IGNORECASE)


@pytest.mark.parametrize("make", [preview, empty_preview])
def test_the_page_holds_the_preview(make):
    (data,) = DATA.findall(render_page("preview", make()))
    assert json.loads(data) == make()


def test_no_text_of_a_row_leaves_the_script_element():
    (data,) = DATA.findall(render_page("preview", preview()))
    assert not re.search(r"[<\u2028\u2029]", data)
    assert data.isascii()
    page, plain = render_page("preview", preview()), render_page("preview", empty_preview() | {"rows": []})
    assert page.count("</script") == plain.count("</script") == 2
    page.encode()


def test_the_page_refers_to_nothing_outside_of_it():
    page = render_page("preview", empty_preview())
    assert not re.search(
        r"https?:|//\w|@import|url\(|\bsrc=|fetch\(|XMLHttpRequest|import\(", page.split("</style>")[0]
    )
    assert not re.search(
        r"https?:|@import|url\(|<script src|<link(?! rel=\"icon\" href=\"data:,\")|fetch\(|import\(", page
    )
    assert "default-src 'none'" in page


def test_numbers_that_json_lacks_are_refused():
    broken = preview()
    broken["statistics"]["tokens"]["saved"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        render_page("preview", broken)


# The terminal


def printed(preview, width=100, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    print_preview(preview, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("make", [preview, empty_preview])
def test_the_terminal_gets_no_control_character_and_no_line_too_long(make, width):
    out = printed(make(), width)
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]", out)
    assert max(map(cell_len, out.split("\n"))) <= width


def test_styled_output_holds_no_sequence_of_the_data():
    out = printed(preview(), force_terminal=True, color_system="truecolor")
    assert "\x1b[" in out
    assert not re.search(r"[\x07\x9b\r]|\x1b(?!\[[\d;]*m)|\x1b\[31mred", out)
    assert "[bold]no[/bold] [/]" in re.sub(r"\x1b\[[\d;]*m", "", out)


def test_an_ascii_terminal_gets_ascii():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_preview(preview(), Console(file=file, width=80))
    file.seek(0)
    assert "underlined" not in (text := file.read())
    assert "context 2 - weight 0.333 - 3 tokens" in text


def test_the_terminal_shows_statistics_and_rows():
    out = printed(preview(), 250)
    for text in (
        "only the first 500 rows read",
        "250,000",
        "60.0%",
        "1017",
        "2017",
        "of 2 answers",
        "train_turns auto: every assistant turn is trained",
        "Warning: the tokenizer is a toy␛[2J",
        "estimated cost, plain SFT = 1",
        "row 12 · para · split · 3 contexts · 7 unique tokens · 5 repeated tokens saved · 1 with loss · 2 tokens cut",
        "context 1 · weight 0.333 · 4 tokens · positions 0-3 · output from 4",
        "context 2 · weight 0.333 · 3 tokens · positions 0-2 · output from 3 (offset -1)",
        "[0][1] t1 t2 t3 (shared with context 1: 3 tokens)",
        "[0] t1 t2 (shared with context 1: 2 tokens) [3] t5",
        "[4] t8[loss] t9[/loss][cut] gone↵",
        "[2 tokens cut at max_length]",
        "context 2 · weight 0.5 · 3 tokens · positions 2-4 · output from 5",
        "(shared with context 1: 2,500 tokens)",
        "row 40 · para · split · 4 answers · 6 contexts",
        "Note: the reasoning is long",
        "answer 1 · 2 with loss · sees 3 tokens · positions 3-4",
        "answer 2 · 1 with loss · sees 3 tokens · positions 3-3",
        "[0] u1 u2[1] u3[loss] u9 u4[/loss]",
        "[0] u1 u2 (shared with answer 1: 2 tokens) [2] u3[loss] u4[/loss]",
        "[0][2] u1 u2 u3 u4 (shared with answer 2: 4 tokens) [3] u5[4] u6",
        "answer 3, constraint 1 · weight 0.25 · 5 tokens · positions 0-4 · output from 5 (offset -1)",
        "answer 3 · 2 tokens · 1 with loss · positions 6-7",
        "(shared with answer 3, full: 6 tokens)",
        "[loss] u9 u9[/loss][cut] lost[/cut] [1 token cut at max_length]",
        "dropped: </ScRiPt ><img src=x onerror='throw 2'>",
        "␛[2J␛]0;title␇<9B>31m␍",
        "<202E>right to left",
    ):
        assert text in out, text
    assert out.count(" long") < 2000


# The browser

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1000,900"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chrome = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chrome and driver):
        pytest.skip("no Chromium with its driver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    """A function that opens a page at a width; the browser may log no error, whatever the test does."""

    def open_page(preview, width=1000):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        (tmp_path / "page.html").write_text(render_page("preview", preview), encoding="utf-8")
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield open_page
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def shown(browser, index):
    """A row of the page, open and filled."""
    from selenium.webdriver.support.ui import WebDriverWait

    row = browser.find_element("xpath", f"//summary[b = 'Row {index}']/..")
    browser.execute_script("arguments[0].open = true; arguments[0].scrollIntoView()", row)
    WebDriverWait(browser, 10).until(lambda _: row.find_elements("css selector", ".body > *"))
    return row


def hover(browser, token):
    """The tooltip of a token under the pointer."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(browser).move_to_element(token).perform()
    return tooltip(browser)


def tooltip(browser):
    return browser.execute_script(
        "const tip = document.getElementById('tip');"
        "return tip.hidden ? null : Object.fromEntries([...tip.querySelectorAll('dd')].map((d) => [d.dataset.name, d.textContent]))"
    )


def part(row, name, place):
    """The tokens of one of a row's parts: `name` is "context" or "output", `place` its index."""
    return row.find_elements("css selector", f".{name}")[place].find_elements("css selector", ".t")


def lit(row):
    """The highlighted segments in each part of a row."""
    parts = row.find_elements("css selector", ".part")
    return [[s.get_attribute("data-s") for s in p.find_elements("css selector", ".glow")] for p in parts]


def test_the_tooltip_shows_the_data(page):
    browser = page(preview())
    row = shown(browser, 12)
    # the third token of context 2: segment 1, below segment 0, at position 2, also in context 1
    token = part(row, "context", 1)[2]
    expected = {"token": '" t3"', "id": "1002", "segment": "1, after segment 0", "position": "2", "label": "no loss"}
    assert hover(browser, token) == expected | {"seen in": "contexts 1–2 (2 of 3)"}
    assert lit(row) == [["1"], ["1"], [], []]
    assert "shared" in token.find_element("xpath", "..").get_attribute("class")
    # the common beginning of all contexts
    token = part(row, "context", 2)[0]
    expected |= {"token": '" t1"', "id": "1000", "segment": "0, begins its path", "position": "0"}
    assert hover(browser, token) == expected | {"seen in": "all 3 contexts"}
    assert lit(row) == [["0"], ["0"], ["0"], []]
    # the output: its labelled token at its stored position, moved by the offset of two branches
    token = part(row, "output", 0)[1]
    expected = {"token": '" t9"', "id": "1006", "segment": "4, the output", "position": "5 (4 in contexts 2–3)"}
    assert hover(browser, token) == expected | {"label": "loss", "follows": "all 3 contexts"}
    assert lit(row) == [[], [], [], ["4"]]
    assert [t.get_attribute("class").split()[:2] for t in part(row, "output", 0)] == [
        ["t"],
        ["t", "loss"],
        ["t", "cut"],
        ["t", "cut"],
    ]
    assert hover(browser, part(row, "output", 0)[2]) == {"token": '" gone"', "label": "no loss: cut at max_length"}


def test_positions_in_many_contexts_stay_readable(page):
    browser = page(preview())
    position = hover(browser, part(shown(browser, 30), "output", 0)[0])["position"]
    assert (
        position == "70 (69 in context 29; 68 in context 28; 67 in context 27; 66 in context 26; 41 to 65 in 25 others)"
    )


def test_other_layouts_are_shown(page):
    browser = page(preview())
    assert hover(browser, part(shown(browser, 5), "context", 1)[0])["position"] == "2"
    assert hover(browser, part(shown(browser, 5), "output", 0)[0])["position"] == "5 in every context"
    row = shown(browser, 40)
    assert [part.text for part in row.find_elements("css selector", "h3")] == [
        *("Answer 1", "Answer 2"),
        *(f"Answer {k}{name}" for k in (3, 4) for name in (", full", ", constraint 1", ", bare", "")),
    ]
    # later contexts hold the second answer, not the first
    expected = {"token": '" u4"', "id": "1006", "segment": "2, after segment 0", "position": "3", "label": "loss"}
    assert hover(browser, part(row, "output", 1)[3]) == expected | {"seen by": "answers 2–4"}
    assert hover(browser, part(row, "output", 0)[3])["seen by"] == "answer 1"
    assert hover(browser, part(row, "context", 4)[4])["seen by"] == (
        "full, constraint 1 (2 of 3) of answer 3; full, constraint 1 (2 of 3) of answer 4"
    )
    facts = hover(browser, shown(browser, 6).find_elements("css selector", ".t")[4])
    assert facts == {"token": '"s"', "id": "1004", "segment": "0", "position": "4", "label": "loss"}
    assert preview()["rows"][4]["dropped"] in shown(browser, 17).text


def test_tokens_are_walked_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    browser = page(preview())
    row = shown(browser, 12)
    row.find_element("css selector", ".tokens").send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert tooltip(browser)["id"] == "1001"
    assert browser.switch_to.active_element.get_attribute("aria-describedby") == "tip"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert tooltip(browser) is None


def test_hostile_text_is_text(page):
    browser = page(preview())
    tokens = part(shown(browser, 99), "context", 0)
    assert len(tokens) == len(HOSTILE)
    for text, token in zip(HOSTILE[:5], tokens[:5], strict=True):
        assert token.get_attribute("textContent") == text
    assert tokens[5].get_attribute("textContent").startswith("⟨1B⟩[2J⟨1B⟩]0;title⟨07⟩⟨9B⟩31m⟨0D⟩")
    assert hover(browser, tokens[6])["token"].startswith('"\\u{202e}right to left')
    assert browser.find_elements("css selector", "main img, main script") == []


def test_long_rows_are_folded_and_unfold(page):
    row = shown(page(preview()), 3)
    assert len(part(row, "context", 0)) < 1500
    for button in row.find_elements("css selector", ".context:first-child .fold"):
        button.parent.execute_script("arguments[0].click()", button)
    ids = [int(t.get_attribute("data-i")) for t in part(row, "context", 0)[::500]]
    assert ids == [0, 500, 1000, 1500, 2000, 2500]
    assert "computed once" in row.find_elements("css selector", ".context .fold")[0].text


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("make", [preview, empty_preview])
def test_the_page_fits_its_window(page, make, width):
    browser = page(make(), width)
    for row in make()["rows"]:
        shown(browser, row["index"])
    inner, outer = browser.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert inner <= outer <= width
