"""Asking a model for constraints: it can only quote, and whatever a server does, nothing is lost, invented or counted twice."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decompose.test_decompose import words
from tests.support.chat_server import Fault, chat_server, completion
from tests.support.models import tiny_model
from trl_miso.cli.main import run
from trl_miso.decompose.asking import question, read_quotes
from trl_miso.decompose.rows import split_by_quotes
from trl_miso.evaluation.asking import ATTEMPTS

TEXT = "In a warm tone, write a letter to my landlord about the heating, and mention the Tenancy Act. Thank you."


@pytest.mark.parametrize(
    ("quotes", "base", "constraints", "not_found"),
    [
        (["In a warm tone", "mention the Tenancy Act"], "write a letter to my landlord about the heating. Thank you.", 2, 0),
        (["mention  the\ntenancy act", "In a warm tone"], "write a letter to my landlord about the heating. Thank you.", 2, 0),
        (["to my landlord"], "In a warm tone, write a letter about the heating, and mention the Tenancy Act. Thank you.", 1, 0),
        (["a warm tone", "warm tone, write", "in French", "", "..."], None, 1, 4),
        (["be brief"], TEXT, 0, 1),
        ([TEXT], TEXT, 0, 0),
        ([], TEXT, 0, 0),
    ],
)  # fmt: skip
def test_only_quotations_split(quotes, base, constraints, not_found):
    split, left = split_by_quotes(TEXT, quotes)
    assert len(split.constraints) == constraints and len(left) == not_found
    assert base is None or split.base == base


SOURCE = "Write a poem. In French, please! It has 3 lines; no rhymes, (e.g. sun) and a title.\n- Use rain\n- Be kind. Thanks."
SPANS = st.tuples(st.integers(0, len(SOURCE)), st.integers(0, len(SOURCE))).map(sorted)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        SPANS.map(lambda span: SOURCE[slice(*span)]) | st.sampled_from(["sun and rain", "be", " ", "\u201cx"]),
        max_size=5,
    )
)
def test_any_quotations_keep_every_word_once(quotes):
    """Whatever a model quotes, also from the middle of words: each constraint stands in the text, and no character is lost or added."""
    split, not_found = split_by_quotes(SOURCE, quotes)
    for constraint in split.constraints:
        assert SOURCE[constraint.begin : constraint.end] == constraint.text
    characters = Counter(re.sub(r"\W", "", split.base))
    for part in (*split.texts, *split.left_out):
        characters += Counter(re.sub(r"\W", "", part))
    assert characters == Counter(re.sub(r"\W", "", SOURCE))
    assert set(not_found) <= set(quotes)


@pytest.mark.parametrize(
    ("answer", "quotes"),
    [
        ('{"constraints": ["a", "b"]}', ["a", "b"]),
        ('Here it is:\n```json\n{"constraints": []}\n```', []),
        ('{"constraints": "a"}', None),
        ('{"constraints": [1]}', None),
        ('{"constraints": ["a"', None),
        ('{"others": []}', None),
        ("[]", None),
        ("", None),
    ],
)
def test_answers_are_read(answer, quotes):
    assert read_quotes(answer) == quotes


INSTRUCTIONS = [f"Tell tale {number}, kindly, and mention the sea." for number in range(12)]


def quoting(body) -> str:
    """A right answer, with one invented constraint."""
    text = re.search(r"<instruction>\n(.*)\n</instruction>", body["messages"][-1]["content"])[1]
    assert body["response_format"]["json_schema"]["strict"] and body["temperature"] == 0
    return json.dumps({"constraints": ["kindly", "mention the sea" if "mention" in text else "sea", "rhyme"]})


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai", reason="needs pip install 'trl-miso[eval]'")
    monkeypatch.setenv("OPENAI_API_KEY", "key-1")
    with chat_server(quoting) as running:
        yield running


@pytest.fixture
def command(tmp_path, monkeypatch, server, wide_terminal):
    """The command, on plain instructions, one of them twice, and one that the rules split."""
    monkeypatch.chdir(tmp_path)
    texts = [*INSTRUCTIONS, INSTRUCTIONS[0], "Name a river. Use at most 5 words."]
    rows = [{"prompt": text, "completion": "A tale."} for text in texts]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["rows.jsonl", "out.jsonl", "--model", "m", "--backend", "openai", "--base_url", server.url]


def rows_out() -> list[dict]:
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_the_rest_is_asked_once_each(command, server, capsys):
    run("decompose", command)
    assert len(server.requests) == len(INSTRUCTIONS)
    rows = rows_out()
    assert [row["miso_status"] for row in rows] == ["split"] * 14
    assert rows[0]["constraints"] == ["kindly", "mention the sea"] and rows[0]["constraint_rules"] == ["model"] * 2
    assert rows[0]["prompt"][-1]["content"] == "Tell tale 0." and rows[0]["not_found"] == ["rhyme"]
    assert rows[-1]["constraint_rules"] == ["clause"] and rows[-1]["not_found"] == []
    for row in rows:
        total = words(row["prompt"][-1]["content"])
        for part in (*row["constraints"], *row["left_out"]):
            total += words(part)
        assert total == words(row["full_prompt"][-1]["content"])
    assert "13 quotations of the model do not stand in their instruction" in capsys.readouterr().out
    run("decompose", command)
    assert len(server.requests) == len(INSTRUCTIONS) and rows_out() == rows
    run("decompose", [*command, "--ask", "all"])
    assert len(server.requests) == len(INSTRUCTIONS) + 1 and rows_out()[-1]["miso_status"] == "no_constraints"


def test_a_misbehaving_server_loses_and_doubles_nothing(command, server):
    """429 and 503, a lost connection's empty body, broken JSON, JSON of another form, a refusal: what can be had is had, once."""
    pause = {"Retry-After": "0.01"}
    broken = completion('{"constraints": ["kin')
    server.faults = {
        "tale 1,": [Fault(429, {}, pause), Fault(503, {}, pause)],
        "tale 2,": [Fault(200, broken), Fault(200, completion("no constraints here"))],
        "tale 3,": [Fault(200, b"{")],
        "tale 4,": [Fault(200, completion('{"constraints": {"a": 1}}'))] * ATTEMPTS,
        "tale 5,": [Fault(400, {"error": {"message": "content filter"}})] * ATTEMPTS,
        "tale 6,": [Fault(200, completion(json.dumps({"constraints": ["kindly", "kindly", "KINDLY"]})))],
    }
    with pytest.raises(SystemExit, match=r"(?s)no readable answer about 2 instructions.*repeat the command"):
        run("decompose", command)
    rows = rows_out()
    assert [row["full_prompt"][-1]["content"] for row in rows] == [
        *INSTRUCTIONS,
        INSTRUCTIONS[0],
        "Name a river. Use at most 5 words.",
    ]
    unanswered = [number for number, row in enumerate(rows) if row["miso_status"] == "no_answer"]
    assert unanswered == [4, 5] and all(rows[number]["prompt"] == rows[number]["full_prompt"] for number in unanswered)
    assert rows[6]["constraints"] == ["kindly"] and rows[6]["not_found"] == ["kindly", "KINDLY"]
    kept = Path("out.jsonl.answers.jsonl").read_text().splitlines()
    assert len(kept) == len(set(kept)) == len(INSTRUCTIONS) - 2
    before = len(server.requests)
    run("decompose", command)  # the server has no faults left: these two alone are asked about
    assert len(server.requests) == before + 2
    assert all(
        row["constraints"] == ["kindly", "mention the sea"] for number, row in enumerate(rows_out()[:13]) if number != 6
    )


def test_a_slow_server_is_waited_for_or_given_up(command, server, monkeypatch):
    from trl_miso.evaluation import endpoint

    class Impatient(endpoint.Endpoint):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings, timeout=0.4, max_retries=1)

    monkeypatch.setattr("trl_miso.cli.decompose.Endpoint", Impatient)
    server.faults = {"tale 7,": [Fault(delay=2)], "tale 8,": [Fault(delay=2)] * 2 * ATTEMPTS}
    with pytest.raises(SystemExit, match=r"no readable answer about 1 instructions.*APITimeoutError"):
        run("decompose", [*command, "--concurrency", "4"])
    assert [row["miso_status"] for row in rows_out()].count("split") == 13


def test_a_killed_run_resumes(command, server):
    """The file of answers as a kill leaves it, after each of its bytes: only what is missing is asked about."""
    run("decompose", command)
    rows, answers = rows_out(), Path("out.jsonl.answers.jsonl")
    whole = answers.read_bytes()
    for size in (1, 9, 40, len(whole) // 2, len(whole) - 1):
        answers.write_bytes(whole[:size])
        kept, before = whole[:size].count(b"\n"), len(server.requests)
        run("decompose", command)
        assert len(server.requests) - before == len(INSTRUCTIONS) - kept and rows_out() == rows
    for text in ("a poem", '{"model": "m"}\n', '{"model": "other", "instruction": "0", "constraints": []}\n'):
        answers.write_text(text)
        with pytest.raises(SystemExit, match=r"Got line 1 of out.jsonl.answers.jsonl, .*Expected .*Fix"):
            run("decompose", command)
        assert answers.read_text() == text


def test_the_cost_is_said_before(command, server, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    run("decompose", [*command, "--dry_run", "--prices", "1000", "2000", "--max_new_tokens", "100"])
    tokens = sum(len(question(text)) for text in INSTRUCTIONS) // 4
    said = capsys.readouterr().out
    assert f"12 of 12 instructions to ask m about: about {tokens:,} tokens in" in said and "at most 1,200 out" in said
    assert f"about {tokens / 1000:.2f} plus" in said and not server.requests and not Path("out.jsonl").exists()


def test_a_local_model_is_asked_too(tmp_path, monkeypatch, tokenizer, wide_terminal):
    """A random model's answers cannot be read: its rows stay whole, the others are split, and each is asked about once."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tokenizer.save_pretrained("model")
    texts = [*INSTRUCTIONS[:3], "Name a river. Use at most 5 words."]
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": text, "completion": "A."}) + "\n" for text in texts))
    with pytest.raises(SystemExit, match="no readable answer about 3 instructions"):
        run("decompose", ["rows.jsonl", "out.jsonl", "--model", "model", "--max_new_tokens", "4"])
    assert [row["miso_status"] for row in rows_out()] == ["no_answer"] * 3 + ["split"]
    monkeypatch.setattr(
        "trl_miso.evaluation.backends.greedy_responses", lambda model, tok, ids, limit: [[0]] * len(ids)
    )
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *_, **__: ['{"constraints": ["kindly"]}'] * 3)
    run("decompose", ["rows.jsonl", "out.jsonl", "--model", "model", "--max_new_tokens", "4"])
    assert [row["constraints"] for row in rows_out()] == [["kindly"]] * 3 + [["Use at most 5 words."]]
    # Other weights in the same folder are another model: its answers are asked for anew.
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *_, **__: ['{"constraints": ["the sea"]}'] * 3)
    run("decompose", ["rows.jsonl", "out.jsonl", "--model", "model", "--max_new_tokens", "4"])
    assert [row["constraints"] for row in rows_out()][:3] == [["kindly"]] * 3
    tiny_model("qwen3").save_pretrained("model")
    run("decompose", ["rows.jsonl", "out.jsonl", "--model", "model", "--max_new_tokens", "4"])
    assert [row["constraints"] for row in rows_out()][:3] == [["the sea"]] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["out.jsonl", "--dry_run"], "--dry_run without --model"),
        (["out.jsonl", "--answers", "a.jsonl"], "--answers without --model"),
        (["--model", "m", "--backend", "openai", "--base_url", "http://a"], "--model without OUT"),
        (["out.jsonl", "--backend", "openai"], "--backend without --model"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SystemExit, match=f"{message}.*Fix"):
        run("decompose", ["rows.jsonl", *options])


def test_answers_that_break_a_constraint_are_flagged(tmp_path, monkeypatch, capsys, punkt, wide_terminal):
    monkeypatch.chdir(tmp_path)
    text = "Describe the sea. Use at most 5 words. Do not use any commas. Write it for a child, in a kind tone."
    rows = [
        {"prompt": text, "completion": answer}
        for answer in ("Blue and wide.", "Blue, wide.", "One two three four five six.")
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("decompose", ["rows.jsonl", "out.jsonl", "--preview"])
    said = capsys.readouterr().out
    assert (
        "2 rows have an answer that breaks one of its constraints" in said and said.count("the answer breaks it") == 2
    )
    assert [row["answer_follows"][:2] for row in rows_out()] == [[True, True], [True, False], [False, True]]
    monkeypatch.setattr("nltk.data.path", [])
    run("decompose", ["rows.jsonl", "out.jsonl"])
    assert "The answers were not checked" in capsys.readouterr().out
    assert rows_out()[0]["answer_follows"][:2] == [None, None] and rows_out()[0]["instruction_id_list"][0] is not None
