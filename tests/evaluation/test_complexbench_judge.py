"""ComplexBench's judge: a real server on loopback, which answers by the prompt's content, and has faults."""

import json
import re
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pytest
from rich.console import Console

from tests.evaluation.test_complexbench import EXAMPLE, question, row, write, write_lines
from tests.support.chat_server import Fault, chat_server, completion
from trl_miso.cli.eval import main
from trl_miso.evaluation.asking import ATTEMPTS, GIVE_UP, Estimate
from trl_miso.evaluation.complexbench.instances import load_instances
from trl_miso.evaluation.complexbench.judge import (
    ask_judge,
    judge_tasks,
    read_verdicts,
)
from trl_miso.evaluation.complexbench.rules import parse_rule
from trl_miso.evaluation.complexbench.scores import COLUMNS, Count, complexbench_table
from trl_miso.evaluation.endpoint import Endpoint
from trl_miso.evaluation.file_lock import exclusive_lock

pytest.importorskip("openai", reason="needs pip install 'trl-miso[eval]'")

JUDGE = "judge-1"


def shown(body):
    """Return the response and the question in a prompt."""
    text = body["messages"][-1]["content"]
    return [re.search(rf"<{tag}>\n(.*)\n</{tag}>", text, re.DOTALL)[1] for tag in ("response", "question")]


# The benchmark's example, judged by content

ARTICLE = "1. 本国遭遇自然灾害。\n2. 申请提款。\n"
GOOD = {
    "A": "国家A有特别提款权。",
    "article": "申请书：" + ARTICLE + "理" * (300 - len(ARTICLE)) + "。完",
    "B": "国家B没有特别提款权。",
    "reason": "解释：" + "储" * 100 + "。完",
}
# Verdict on a response, per question, which a word of it identifies.
JUDGED = {
    "正确判断国家A": lambda text: "国家A有" in text,
    "正确判断国家B": lambda text: "国家B没有" in text,
    "生成申请提款的文章": lambda text: "申请书：" in text,
    "文章是否逻辑合理": lambda text: "虚构" not in text,
    "分点明确": lambda text: "1. " in text,
    "生成国家B没有特别提款权的解释": lambda text: "解释：" in text,
    "解释是否逻辑合理": lambda text: "储" in text,
}
EXTRACTED = {"300字以上": r"申请书：(.*?)。完", "不超过100字": r"解释：(.*?)。完"}


def by_content(body):
    response, asked = shown(body)
    for word, pattern in EXTRACTED.items():
        if word in asked:
            match = re.search(pattern, response, re.DOTALL)
            return f"要检查的部分如下。<extract>\n{match[1] if match else 'None'}\n</extract>"
    (holds,) = (holds for word, holds in JUDGED.items() if word in asked)
    return f"理由。\n<answer>{'是' if holds(response) else '否'}</answer>"


VARIANTS = {
    "everything": ({}, []),
    "a branch not taken": ({"A": "国家A没有特别提款权。"}, [0, 2, 3, 4, 5]),
    "another branch not taken": ({"B": "国家B也有特别提款权。"}, [1, 6, 7, 8]),
    "an article a character short": ({"article": GOOD["article"].replace("理", "", 1)}, [4]),
    "no article": ({"article": "1. 无"}, [2, 4]),
    "no points": ({"article": GOOD["article"].replace("1. ", "一、 ")}, [5]),
    "no facts": ({"article": GOOD["article"].replace("理" * 4, "虚构的事")}, [3]),
    "a reason a character long": ({"reason": GOOD["reason"].replace("储", "储储", 1)}, [8]),
    "another reason": ({"reason": "解释：因为。完"}, [7]),
    "no reason": ({"reason": ""}, [6, 7, 8]),
    "nothing": (dict.fromkeys(GOOD, ""), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
}


def test_scores_of_the_benchmarks_example(tmp_path, capsys, wide_terminal):
    """Each of its nine questions fails for some response, with its dependants; lengths of 300 and 100 count to the character."""
    if not EXAMPLE.exists():
        pytest.skip("needs ComplexBench's example instance")
    (example,) = json.loads(EXAMPLE.read_text())
    data = write(tmp_path / "data.json", [example | {"main_id": number} for number in range(len(VARIANTS))])
    texts = ["\n".join((GOOD | changed).values()) for changed, _ in VARIANTS.values()]
    responses = write_lines(tmp_path / "responses.jsonl", [{"response": text} for text in texts])
    with chat_server(by_content) as server:
        main(command(data, responses, server))
    (instance, *_), lines = load_instances(data, "zh"), read_lines(tmp_path / "verdicts.jsonl")
    assert len(lines) == 9 * len(VARIANTS)
    passed = {(line["main_id"], line["point_id"]): line["verdict"] for line in lines}
    for number, (name, (_, failed)) in enumerate(VARIANTS.items()):
        verdicts = [passed[number, at] for at in range(9)]
        not_passed = [
            at
            for at, question_of in enumerate(instance.questions)
            if not (verdicts[at] and all(verdicts[on] for on in question_of.dependencies))
        ]
        assert not_passed == failed, name
    failures = sum(len(failed) for _, failed in VARIANTS.values())
    share = f"{100 - 100 * failures / len(lines):.1f}"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"responses.jsonl - - - - - {share} - {share} - - {share}" in printed
    assert "MISO-succ 64.5 39.3 42.9 42.1 37.3 39.2 38.1 36.5 42.0 24.4 48.2" in printed


# Faults of the server

BAD_JSON = b'{"id": "1", "choices": [{"message": '


def numbered(body):
    """Answer yes to every second question."""
    number = int(re.search(r"\d+", shown(body)[1])[0])
    return f"<answer>{'yes' if number % 2 else 'no'}</answer>"


def expected(count):
    return {(number // 5, number % 5): bool(number % 2) for number in range(count)}


@pytest.fixture
def server():
    with chat_server(numbered) as server:
        yield server


@pytest.fixture
def make_tasks(tmp_path):
    """Make tasks of five questions per instance; a question's text is its number."""

    def make(count, response="answer", language="zh"):
        rows = [
            row(main_id, questions=[question(at, text=f"No. {5 * main_id + at}.") for at in range(5)])
            for main_id in range(count // 5)
        ]
        data = write(tmp_path / "data.json", rows)
        instances = load_instances(data, language)
        return judge_tasks(instances, [f"{response} {each.main_id}" for each in instances], language)

    return make


def command(data, responses, server, *options):
    folder = Path(data).parent
    line = [
        "complexbench",
        "--data",
        str(data),
        "--responses",
        str(responses),
        "--verdicts",
        str(folder / "verdicts.jsonl"),
    ]
    return [*line, "--judge", JUDGE, "--judge_base_url", server.url, *options]


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def judge(tasks, server, file, **settings):
    endpoint = Endpoint(JUDGE, server.url, **({"max_tokens": 9, "max_retries": 2, "timeout": 5} | settings))
    return ask_judge(tasks, JUDGE, endpoint.ask_all, file)


def assert_judged(file, tasks, wanted):
    """Check that the file has every verdict once, and that they are read so."""
    lines = [(each["main_id"], each["point_id"]) for each in read_lines(file)]
    assert sorted(lines) == sorted(wanted)
    assert read_verdicts(file, tasks, JUDGE).passed == wanted


def test_every_question_is_judged_or_reported(server, make_tasks, tmp_path):
    tasks, file = make_tasks(40), tmp_path / "v.jsonl"
    soon = {"Retry-After": "0.01"}
    server.faults = {
        "No. 1.": [Fault(429, {"error": {"message": "slow down"}}, soon)] * 2,
        "No. 2.": [Fault(500, b"<html>", soon), Fault(503, b"", soon)],
        "No. 3.": [Fault(delay=2)],
        "No. 4.": [Fault(200, BAD_JSON)],
        "No. 5.": [Fault(200, completion("I would say so."))] * (ATTEMPTS - 1),
        "No. 6.": [Fault(200, completion("<answer>yes</answer> or <answer>no</answer>")), Fault(200, {"choices": []})],
        "No. 7.": [Fault(200, completion(None, "length"))],
        "No. 8.": [Fault(200, BAD_JSON, {"Content-Length": "1000", "Connection": "close"})],
        "No. 11.": [Fault(200, completion("Who knows?"))] * 99,
        "No. 12.": [Fault(400, {"error": {"message": "content filter"}})] * 99,
        "No. 13.": [Fault(429, {"error": {"message": "slow down"}}, soon)] * 99,
    }
    unjudged = judge(tasks, server, file, concurrency=4, timeout=0.3)
    assert unjudged.keys() == {(2, 1), (2, 2), (2, 3)}
    assert "'Who knows?', expected an <answer>" in unjudged[2, 1]
    assert (
        "content filter" in unjudged[2, 2] and "slow down" in unjudged[2, 3] and "--judge_concurrency" in unjudged[2, 3]
    )
    wanted = {key: verdict for key, verdict in expected(40).items() if key not in unjudged}
    assert_judged(file, tasks, wanted)
    asked = [shown(request.body)[1] for request in server.requests]
    assert asked.count("No. 11.") == asked.count("No. 12.") == ATTEMPTS and asked.count("No. 13.") == 3 * ATTEMPTS
    assert [asked.count(f"No. {number}.") for number in range(14, 40)] == [1] * 26
    assert 2 <= server.most_at_once <= 4 and all(request.body["temperature"] == 0 for request in server.requests)

    server.faults.clear()
    assert judge(tasks, server, file) == {}
    assert_judged(file, tasks, expected(40))
    assert len(server.requests) == len(asked) + 3


def test_after_the_server_shuts_down_verdicts_are_kept(make_tasks, tmp_path):
    """Connections are refused after the tenth answer: the other questions are reported, and few of them are tried."""
    tasks, file = make_tasks(100), tmp_path / "v.jsonl"
    with ExitStack() as stack:
        server = stack.enter_context(chat_server(numbered))
        server.faults["No. "] = [Fault(headers={"Connection": "close"})] * 100
        endpoint = Endpoint(JUDGE, server.url, max_tokens=9, max_retries=0, concurrency=3)

        def ask_all(prompts):
            for count, answered in enumerate(endpoint.ask_all(prompts), start=1):
                yield answered
                if count == 10:
                    stack.close()

        unjudged = ask_judge(tasks, JUDGE, ask_all, file)
    came = read_verdicts(file, tasks, JUDGE).passed
    assert 10 <= len(came) <= 13 and unjudged.keys() == expected(100).keys() - came.keys()
    refused = [
        reason for reason in unjudged.values() if "APIConnectionError" in reason and "--judge_base_url" in reason
    ]
    assert GIVE_UP <= len(refused) < GIVE_UP + 6  # requests under way are awaited, at the beginning and at the end
    assert sum(reason.startswith("not asked, after 2") for reason in unjudged.values()) == len(unjudged) - len(refused)
    with chat_server(numbered) as server:
        assert judge(tasks, server, file) == {}
    assert_judged(file, tasks, expected(100))


def test_a_judge_that_never_answers_yes_or_no_is_given_up(server, make_tasks, tmp_path):
    server.reply = lambda body: "Hm."
    unjudged = judge(make_tasks(100), server, tmp_path / "v.jsonl", concurrency=4)
    assert len(unjudged) == 100 and GIVE_UP <= len(server.requests) < GIVE_UP + 4


def test_failures_between_verdicts_stop_nothing(server, make_tasks, tmp_path):
    tasks, file = make_tasks(50), tmp_path / "v.jsonl"
    server.faults = {f"No. {number}.": [Fault(200, completion("Hm."))] for number in range(0, 50, 2)}
    assert judge(tasks, server, file, concurrency=2) == {}
    assert_judged(file, tasks, expected(50))
    assert len(server.requests) == 50 + 25 > 50 + GIVE_UP


def test_a_killed_run_resumes(server, make_tasks, tmp_path, capsys, wide_terminal):
    """After SIGKILL only the questions without a verdict are asked again."""
    tasks, file = make_tasks(40), tmp_path / "verdicts.jsonl"
    responses = write_lines(tmp_path / "r.jsonl", [{"response": f"answer {main_id}"} for main_id in range(8)])
    line = command(tmp_path / "data.json", responses, server, "--judge_concurrency", "3")
    server.faults["No. "] = [Fault(delay=0.05)] * 999
    process = get_context("fork").Process(target=main, args=(line,))
    process.start()
    while process.is_alive() and len(server.requests) < 20:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    had = file.read_bytes().count(b"\n")
    assert 10 <= had < 40
    before = len(server.requests)
    server.faults.clear()
    main(line)
    assert len(server.requests) == before + 40 - had
    assert_judged(file, tasks, expected(40))
    assert "50.0" in capsys.readouterr().out


def test_a_file_truncated_at_any_byte_is_completed(make_tasks, tmp_path):
    tasks, file = make_tasks(5), tmp_path / "v.jsonl"
    asked = []

    def ask_all(prompts):
        for number, (message,) in enumerate(prompts):
            asked.append(message["content"])
            yield number, numbered({"messages": [message]})

    assert ask_judge(tasks, JUDGE, ask_all, file) == {}
    whole = file.read_bytes()
    end = whole.index(b"\n") + 1
    for cut in (0, 1, 5, *range(12, end + 12, 7), end - 1, end, len(whole) - 1, len(whole)):
        file.write_bytes(whole[:cut])
        assert read_verdicts(file, tasks, None).passed.keys() == set(list(expected(5))[: whole[:cut].count(b"\n")])
        asked.clear()
        assert ask_judge(tasks, JUDGE, ask_all, file) == {}
        assert file.read_bytes() == whole and len(asked) == 5 - whole[:cut].count(b"\n")


def test_a_verdict_is_on_disk_before_the_next_is_awaited(make_tasks, tmp_path):
    tasks, file = make_tasks(5), tmp_path / "v.jsonl"

    def ask_all(prompts):
        for number, (message,) in enumerate(prompts):
            assert file.read_bytes().count(b"\n") == number
            yield number, numbered({"messages": [message]})

    assert ask_judge(tasks, JUDGE, ask_all, file) == {}


def test_a_second_run_on_the_same_verdicts_is_refused(server, make_tasks, tmp_path):
    tasks, file = make_tasks(5), tmp_path / "verdicts.jsonl"
    with (
        exclusive_lock(file),
        pytest.raises(ValueError, match="verdicts.jsonl, which another run is writing.*Fix: wait"),
    ):
        judge(tasks, server, file)
    assert not server.requests and not file.exists()


def test_of_two_verdicts_on_a_question_the_first_counts(server, make_tasks, tmp_path):
    """As written by two runs at once."""
    tasks, file = make_tasks(5), tmp_path / "v.jsonl"
    judge(tasks, server, file)
    lines = read_lines(file)
    write_lines(file, [*lines, *({**line, "verdict": not line["verdict"]} for line in lines)])
    assert read_verdicts(file, tasks, JUDGE).passed == expected(5)


def test_verdicts_of_another_run_are_refused_and_kept(server, make_tasks, tmp_path):
    tasks, file = make_tasks(10), tmp_path / "v.jsonl"
    judge(tasks, server, file)
    whole, rows = file.read_bytes(), read_lines(file)
    ruled = [replace(task, question=replace(task.question, rule=parse_rule("length:[1,2]"))) for task in tasks]
    for content, tasks_of_run, judge_of_run, message in (
        (whole, tasks, "judge-2", "line 1 of .* a verdict of 'judge-1', not of 'judge-2'"),
        (whole, make_tasks(10, response="another"), JUDGE, r"line 1 of .* on another question \d of main_id \d"),
        (whole, make_tasks(10, response="another"), None, "line 1 of .* on another question"),
        (whole, make_tasks(10, language="en"), JUDGE, "line 1 of .* on another question"),
        (whole, make_tasks(5), JUDGE, r"line \d+ of .* on another question \d of main_id 1, or on another response"),
        (whole, ruled, JUDGE, "line 1 of .* on another question"),
        (
            lines_of(rows[0], {**rows[1], "judge": "judge-2"}),
            tasks,
            None,
            "line 2 of .* of 'judge-2', not of 'judge-1'",
        ),
        (lines_of({**rows[0], "main_id": [0]}), tasks, JUDGE, "line 1 of .*, which is not a verdict"),
        (lines_of({**rows[0], "verdict": "yes"}), tasks, JUDGE, "line 1 of .*, which is not a verdict"),
        (b'{"judge": \n' + whole, tasks, JUDGE, "line 1 of .*, which is not a verdict"),
        (lines_of({"response": "a"}), tasks, JUDGE, "line 1 of .*, which is not a verdict"),
        (lines_of(["a"]), tasks, JUDGE, "line 1 of .*, which is not a verdict"),
        (b'{"response": "without end"}', tasks, JUDGE, "line 1 of .*, which is not a verdict"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"Got {message}.*Expected .*Fix: "):
            if judge_of_run:
                ask_judge(tasks_of_run, judge_of_run, lambda _: pytest.fail("the judge was asked"), file)
            else:
                read_verdicts(file, tasks_of_run, None)
        assert file.read_bytes() == content


def lines_of(*rows):
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


# The command


@pytest.fixture
def files(tmp_path):
    """Files of two instances, which count in different columns, and of responses to them."""
    rows = [
        row(0, "Chain_1", [question(0, text="No. 1."), question(1, text="No. 2.", dep=[0])]),
        row(
            1,
            "Selection_and_Chain_2",
            [question(0, text="No. 3."), question(1, text="No. 4."), question(2, text="No. 5.", dep=[1])],
        ),
    ]
    responses = write_lines(tmp_path / "responses.jsonl", [{"response": "a"}, {"response": "b"}])
    return write(tmp_path / "data.json", rows), responses


def test_unjudged_questions_make_bounds_and_exit_status_1(files, server, tmp_path, capsys, wide_terminal):
    server.faults["No. 4."] = [Fault(400, {"error": {"message": "content filter"}})] * ATTEMPTS
    line = [*command(*files, server), "--json", str(tmp_path / "counts.json")]
    with pytest.raises(SystemExit, match="(?s)no verdict on 1 of 5 questions.*main_id 1, question 1: .*content filter"):
        main(line)
    printed = " ".join(capsys.readouterr().out.split())
    assert "responses.jsonl, at least - 50.0 - 50.0 - - - 33.3 33.3 - 40.0" in printed
    assert "responses.jsonl, at most - 50.0 - 50.0 - - - 100.0 100.0 - 80.0" in printed
    written = json.loads((tmp_path / "counts.json").read_text())
    assert written["counts"]["All Avg."] == {"passed": 2, "unjudged": 2, "questions": 5}
    assert list(written["counts"]) == list(COLUMNS) and written["judge"] == JUDGE
    (unjudged,) = written["unjudged"]
    assert (unjudged["main_id"], unjudged["point_id"]) == (1, 1) and "content filter" in unjudged["reason"]

    asked = len(server.requests)
    main(line)  # asks for the missing verdict: number 4 fails, and number 5, which depends on it
    assert len(server.requests) == asked + 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "responses.jsonl - 50.0 - 50.0 - - - 33.3 33.3 - 40.0" in printed and "at least" not in printed
    assert "2 of the benchmark's 1,150 instructions (zh), 5 of its 5,306 questions, judge judge-1" in printed


def test_no_figure_is_cut_in_80_columns(monkeypatch):
    monkeypatch.setattr(Console, "_environ", {"COLUMNS": "80", "TERM": "xterm"})
    console = Console(file=StringIO())
    sure = Count(3, 0, 3)
    console.print(complexbench_table("a-model-with-a-long-name", dict.fromkeys(COLUMNS, sure), ""))
    printed = console.file.getvalue()
    assert (
        printed.count("100.0") == len(COLUMNS)
        and "…" not in printed
        and printed.count("48.2") == 1
        and "MISO-succ" in printed
    )


def test_kept_verdicts_are_scored_again_at_no_cost(files, server, capsys, wide_terminal):
    line = command(*files, server)
    alone = line[: line.index("--judge")]
    with pytest.raises(ValueError, match="Got no file .*verdicts.jsonl.*Fix: .*--judge"):
        main(alone)
    capsys.readouterr()
    main(line)
    first = capsys.readouterr().out.split("ComplexBench (%)")[1]
    asked = len(server.requests)
    main(alone)
    assert capsys.readouterr().out.split("ComplexBench (%)")[1] == first and len(server.requests) == asked == 5
    verdicts = Path(line[line.index("--verdicts") + 1])
    verdicts.write_bytes(verdicts.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"(?s)no verdict on 1 of 5 questions.*no verdict in the file"):
        main(alone)


def test_the_cost_is_estimated_before_it_is_spent(files, server, tmp_path, capsys, wide_terminal, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    line = [*command(*files, server), "--dry_run", "--judge_prices", "1000", "2000", "--judge_max_tokens", "100"]
    tasks = judge_tasks(load_instances(files[0], "zh"), ["a", "b"], "zh")
    tokens = Estimate.of([task.prompt for task in tasks], 100).input_tokens
    main([each for each in line if each != server.url and each != "--judge_base_url"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"5 of 5 questions to ask judge-1: about {tokens:,} tokens in" in printed and "at most 500 out" in printed
    assert f"about {tokens / 1000:.2f} plus the cost of the answers, at most {tokens / 1000 + 1:.2f}" in printed
    assert not server.requests and not (tmp_path / "verdicts.jsonl").exists()
    main(command(*files, server))
    lines = (tmp_path / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "verdicts.jsonl").write_text("".join(lines[:3]))
    capsys.readouterr()
    main(command(*files, server, "--dry_run"))
    assert "2 of 5 questions to ask" in capsys.readouterr().out and len(server.requests) == 5


def test_tokens_are_estimated_from_characters():
    prompt = "汉字，" * 100 + "word" * 50
    assert Estimate.of([prompt, prompt], 7) == Estimate(2, 2 * (300 + 50), 14)
    assert Estimate(1, 500_000, 1_000_000).cost(2, 3) == (1, 4)


def test_an_unknown_rule_is_refused_before_anything_is_spent(files, server, tmp_path):
    data = write(tmp_path / "data.json", [row(), row(1, questions=[question(rule="model_rhymes:[1,2]")])])
    generate = ["--model", "m", "--backend", "openai", "--base_url", server.url]
    with pytest.raises(ValueError, match=r"question 0 of main_id 1: Got rule 'model_rhymes:\[1,2\]'"):
        main([*command(data, tmp_path / "new.jsonl", server), *generate])
    assert not server.requests and not (tmp_path / "new.jsonl").exists()


def test_a_judge_without_a_key_is_refused_before_the_model_is_asked(files, server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    line = command(files[0], tmp_path / "new.jsonl", server)
    line[line.index("--judge_base_url") :] = ["--model", "m", "--backend", "openai", "--base_url", server.url]
    with pytest.raises(ValueError, match="Got no OPENAI_API_KEY"):
        main(line)
    assert not server.requests


def test_options_of_a_judge_need_a_judge(files, server):
    line = command(*files, server)
    alone = line[: line.index("--judge")]
    for option in (
        ["--dry_run"],
        ["--judge_prices", "1", "2"],
        ["--judge_concurrency", "3"],
        ["--judge_base_url", "u"],
    ):
        with pytest.raises(ValueError, match=f"Got {option[0]} without --judge.*Fix: "):
            main([*alone, *option])


def test_a_model_is_asked_and_judged_in_one_run(files, server, tmp_path, capsys, wide_terminal):
    """The model and the judge each have a name, server and token limit of their own."""
    line = command(files[0], tmp_path / "new.jsonl", server, "--language", "en", "--judge_max_tokens", "55")
    with chat_server(lambda body: f"Done: {body['messages'][-1]['content']}") as model:
        main([*line, "--model", "model-1", "--backend", "openai", "--base_url", model.url])
        assert {request.text for request in model.requests} == {"做。en"} and len(model.requests) == 2
        assert {(request.body["model"], request.body["max_tokens"]) for request in model.requests} == {
            ("model-1", 4096)
        }
    assert {(request.body["model"], request.body["max_tokens"]) for request in server.requests} == {(JUDGE, 55)}
    assert {tuple(shown(request.body)) for request in server.requests} == {
        ("Done: 做。en", f"No. {at}.en") for at in range(1, 6)
    }
    assert "model-1" in capsys.readouterr().out
