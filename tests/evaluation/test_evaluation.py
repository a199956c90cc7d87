"""IFEval: joining responses, lm-eval's verdicts, counts, and the command."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.common.real_models import add_punkt_tab
from tests.support.chat_server import chat_server
from trl_miso.cli import eval_ifeval as ifeval_command
from trl_miso.cli.eval import main
from trl_miso.cli.main import main as console_command
from trl_miso.evaluation import ifeval
from trl_miso.evaluation.ifeval import Counts, Verdict, load_prompts, load_scorer, without
from trl_miso.evaluation.responses import Questions, load_responses
from trl_miso.evaluation.table import PAPER

REAL = Path(__file__).parents[3] / "shared/data/ifeval"
GPT4 = REAL / "input_response_data_gpt4_20231107_145030.jsonl"

COMMA, SENTENCES, CAPITALS = (
    "punctuation:no_comma",
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
)


def prompt(key, *instructions):
    names, options = zip(*instructions, strict=True)
    return {"key": key, "prompt": f"Question {key}.", "instruction_id_list": list(names), "kwargs": list(options)}


def three(n):
    return SENTENCES, {"relation": "at least", "num_sentences": n}


PROMPTS = [
    prompt(10, (COMMA, {})),
    prompt(11, (COMMA, {}), three(2)),
    prompt(12, ("detectable_format:title", {}), (COMMA, {})),
    prompt(13, (CAPITALS, {"capital_relation": "at least", "capital_frequency": 2})),
]
# Followed strictly: yes; no and yes (the comma is in the first line, which a loose variant drops); title only; no.
RESPONSES = ["No commas here.", "Well, then:\nOne. Two.", "<<Title>> a, b, c", "only ONE"]
VERDICTS = [
    Verdict((True,), (True,)),
    Verdict((False, True), (True, True)),
    Verdict((True, False), (True, False)),
    Verdict((False,), (False,)),
]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def files(tmp_path):
    """Files of the data and of responses to them."""
    rows = [{"prompt": asked["prompt"], "response": text} for asked, text in zip(PROMPTS, RESPONSES, strict=True)]
    return write(tmp_path / "data.jsonl", PROMPTS), write(tmp_path / "responses.jsonl", rows)


# The scorer


def test_verdicts_equal_those_by_hand(punkt):
    score = load_scorer()
    assert [score(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)] == VERDICTS
    assert score(PROMPTS[1], " \n") == Verdict((False, False), (False, False))


def test_the_hubs_form_of_the_data_is_scored_alike(punkt, files, tmp_path, monkeypatch):
    """In the Hub's data set every instruction has the options of all others, as null."""
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub/train.jsonl", PROMPTS)
    monkeypatch.setattr(ifeval, "DATASET", str(tmp_path / "hub"))
    prompts = load_prompts(None)
    assert [asked["prompt"] for asked in prompts] == [asked["prompt"] for asked in PROMPTS]
    score = load_scorer()
    assert [score(*pair) for pair in zip(prompts, RESPONSES, strict=True)] == VERDICTS


def test_a_random_letter_is_reproducible(punkt):
    """The published checker replaces '#' by a random letter: the same one in every order and from any random state."""
    score = load_scorer()
    text = "".join(letter * count for count, letter in enumerate("abcdefghijklmnopqrstuvwxyz"))
    options = {"let_relation": "at least", "letter": "#", "let_frequency": 13}
    asked = [prompt(key, ("keywords:letter_frequency", options)) for key in range(30)]
    verdicts = [score(each, text) for each in asked]
    assert {verdict.strict for verdict in verdicts} == {(True,), (False,)}
    random.seed(5)
    before = random.getstate()
    assert [score(each, text) for each in reversed(asked)] == verdicts[::-1]
    assert random.getstate() == before


def test_an_unknown_instruction_is_refused(punkt):
    with pytest.raises(ValueError, match=r"Got instructions \['punctuation:no_dash'\] \(key 7\).*Fix: "):
        load_scorer()(prompt(7, ("punctuation:no_dash", {})), "-")


def test_without_punkt_nothing_is_scored_or_downloaded(punkt, monkeypatch, tmp_path):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("a download was tried"))
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="Got no NLTK.*Fix: run `python -m nltk.downloader punkt_tab`.*NLTK_DATA"):
        load_scorer()
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "punkt_tab.zip").write_bytes(b"half of a download")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="Got unreadable .*not a zip file.*Fix: run `python -m nltk.downloader"):
        load_scorer()


@pytest.mark.parametrize("package", ["langdetect", "lm_eval", "nltk"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"Got no package '\w+'.*Fix: pip install 'trl-miso\[eval\]'"):
        load_scorer()


# Counts


def test_counts():
    assert Counts.of(VERDICTS) == Counts(1, 3, 2, 4, 4, 6)
    assert Counts.of(VERDICTS).percentages() == (25, 50, 50, pytest.approx(400 / 6))


def test_the_papers_rows_have_its_averages():
    """Four figures and their mean, printed with one decimal, differ by 0.1 at most. The paper's Mistral SFT differs by more."""
    off = [(method, base) for method, base, accuracies, average in PAPER if abs(fmean(accuracies) - average) > 0.1]
    assert off == [("SFT", "Mistral-7B")]
    assert [average for *_, average in PAPER[6:]] == [48.1, 52.1, 51.4, 45.5, 50.2, 50.4]


# The command


def test_what_the_command_prints_and_writes(punkt, files, tmp_path, capsys, wide_terminal):
    data, responses = files
    line = ["ifeval", "--responses", responses, "--data", data]
    main([*line, "--json", str(tmp_path / "counts.json"), "--samples", str(tmp_path / "samples.jsonl")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "responses.jsonl 25.0 50.0 50.0 66.7 47.9" in printed
    assert "MISO-para Llama3-8B 44.5 54.7 49.5 59.5 52.1" in printed
    assert "4 of 4 prompts, 6 instructions" in printed and "chance" not in printed
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert list(counts.values()) == [1, 3, 2, 4, 4, 6]
    samples = [json.loads(sample) for sample in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["response"] for sample in samples] == RESPONSES
    assert [(*sample["strict_instruction"], *sample["loose_instruction"]) for sample in samples] == [
        verdict.strict + verdict.loose for verdict in VERDICTS
    ]
    assert (
        sum(sample["strict_prompt"] for sample in samples) == 1
        and sum(sample["loose_prompt"] for sample in samples) == 2
    )

    main([*line, "--exclude_keys", "13", "11", "--json", str(tmp_path / "counts.json")])
    assert list(json.loads((tmp_path / "counts.json").read_text()).values()) == [1, 2, 1, 2, 2, 3]
    assert "2 of 4 prompts, 3 instructions" in " ".join(capsys.readouterr().out.split())


def test_the_note_names_keys_that_are_scored_by_chance(punkt, tmp_path, capsys, wide_terminal):
    data = write(tmp_path / "data.jsonl", [PROMPTS[0] | {"key": 1129}, PROMPTS[1]])
    responses = write(
        tmp_path / "responses.jsonl",
        [{"response": "a", "prompt": "Question 10."}, {"response": "a", "prompt": "Question: 11."}],
    )
    main(["ifeval", "--responses", responses, "--data", data])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Keys 1129 are scored by chance" in printed
    assert "1 response was given to another edition of its prompt" in printed


@pytest.mark.parametrize("option", ["--json", "--samples"])
def test_an_output_file_without_a_folder_is_refused_before_a_model_is_asked(option, tmp_path, capsys):
    for file in (tmp_path / "no/such/file", tmp_path):
        with pytest.raises(SystemExit):
            main(["ifeval", "--responses", "no file", option, str(file)])
        assert f"argument {option}: got '{file}', expected a file in a folder that exists" in capsys.readouterr().err


def test_ctrl_c_exits_with_status_130_and_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ifeval_command, "load_prompts", interrupted)
    monkeypatch.setattr(sys, "argv", ["trl-miso", "eval", "ifeval", "--responses", "r"])
    with pytest.raises(SystemExit) as ended:
        console_command()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\nThe same command continues with the responses that are kept.\n"


BAD = {
    "too few": ([{"response": "a"}] * 3, "Got 3 responses in .* to 4 prompts"),
    "too many": ([{"response": "a"}] * 5, "Got 5 responses in .* to 4 prompts"),
    "no response": ([{"response": "a"}, {"output": "b"}], "Got line 2 of .* with response=None"),
    "no text": ([{"response": ["a"]}], r"Got line 1 of .* with response=\['a'\]"),
    "no object": ([{"response": "a"}, ["b"]], "Got line 2 of .* with a list"),
}


@pytest.mark.parametrize(("rows", "message"), BAD.values(), ids=BAD)
def test_responses_that_cannot_be_joined_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}.*xpected .*Fix: "):
        load_responses(write(tmp_path / "responses.jsonl", rows), Questions(["a"] * 4, range(4)))


def test_data_that_are_not_ifevals_are_refused(tmp_path):
    file = tmp_path / "data.jsonl"
    for text, message in (
        (b"", "no prompts in .*data.jsonl"),
        (b'{"key": 1', "line 1 of .* is not JSON"),
        (b"\xff\n", "line 1 of .* is not JSON"),
        (b'{"key": "1", "prompt": "", "instruction_id_list": [], "kwargs": []}', "line 1 of .* with key='1'"),
        (
            b'{"key": 1, "prompt": "", "instruction_id_list": ["a"], "kwargs": []}',
            "row 1 .*key 1. with 1 instr.* and 0",
        ),
        (b'{"key": 1, "prompt": "", "instruction_id_list": [], "kwargs": []}', "row 1 .*key 1. with 0 instructions"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=f"Got {message}.*[Ee]xpected .*Fix: "):
            load_prompts(file)


def test_an_unreachable_hub_is_reported(monkeypatch):
    monkeypatch.setattr(ifeval, "DATASET", "nobody/nothing")
    with pytest.raises(ValueError, match="Got no data set nobody/nothing from the Hub: .*Fix: .*--data"):
        load_prompts(None)


def test_keys_are_left_out_or_refused():
    assert without(PROMPTS, [11, 11]) == [0, 2, 3]
    for keys, message in (([9, 10, 8], r"keys \[8, 9\] to leave out"), ([10, 11, 12, 13], "all keys to leave out")):
        with pytest.raises(ValueError, match=f"Got {message}.*Fix: "):
            without(PROMPTS, keys)


def gpt4_counts(folder, environment=None, order=1):
    """Run the command on GPT-4's responses in a process of its own, and return the counts it writes."""
    if not GPT4.exists():
        pytest.skip("needs IFEval's data and GPT-4's responses to it")
    files = [folder / "input_data.jsonl", folder / GPT4.name]
    for file in files:
        file.write_text("\n".join((REAL / file.name).read_text().splitlines()[::order]) + "\n")
    line = ["ifeval", "--data", str(files[0]), "--responses", str(files[1]), "--json", str(folder / "counts.json")]
    code = "import sys; from trl_miso.cli.eval import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *line, "--exclude_keys", "1122", "1129"]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))
    return list(json.loads((folder / "counts.json").read_text()).values())


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_gpt4s_responses_have_the_published_checkers_counts(order, tmp_path):
    """Strictly 415/539 and 694/830, loosely 429/539 and 710/830: in either order of the rows, in a new process."""
    nltk = pytest.importorskip("nltk", reason="needs pip install 'trl-miso[eval]'")
    try:
        add_punkt_tab()
    except ImportError as reason:
        pytest.skip(str(reason))
    folders = {"NLTK_DATA": os.pathsep.join(nltk.data.path)}
    assert gpt4_counts(tmp_path, folders, order=order) == [415, 694, 429, 710, 539, 830]


def test_gpt4s_responses_without_knowledge_of_abbreviations(punkt, tmp_path):
    """As above, except for one response: a loose variant of it counts one sentence more."""
    assert gpt4_counts(tmp_path, {"NLTK_DATA": str(punkt)}) == [415, 694, 429, 711, 539, 830]


def test_the_command_asks_a_model_and_scores_it(punkt, files, tmp_path, capsys, wide_terminal, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    right = {asked["prompt"]: response for asked, response in zip(PROMPTS, RESPONSES, strict=True)}
    with chat_server(lambda body: right[body["messages"][-1]["content"]]) as server:
        line = ["--model", "some/llama", "--backend", "openai", "--base_url", server.url]
        main(["ifeval", "--responses", str(tmp_path / "new.jsonl"), "--data", files[0], *line])
        monkeypatch.chdir(tmp_path)
        line[1] = "."
        main(["ifeval", "--data", files[0], *line])
    printed = " ".join(capsys.readouterr().out.split())
    assert "llama 25.0 50.0 50.0 66.7 47.9" in printed and f"{tmp_path.name} 25.0 50.0 50.0 66.7 47.9" in printed
