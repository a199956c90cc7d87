"""Scored files: any order of their rows gives the same result, and rows that answer something else are refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evaluation import test_flatten
from tests.evaluation.test_complexbench import question, row
from tests.evaluation.test_evaluation import PROMPTS, RESPONSES, prompt, write
from trl_miso.cli.eval import main
from trl_miso.evaluation.complexbench.instances import load_answers, load_instances
from trl_miso.evaluation.complexbench.judge import judge_tasks, read_verdicts
from trl_miso.evaluation.flatten import flatten_rows, load_bases
from trl_miso.evaluation.responses import Questions, load_responses, note_of

TEXTS = [f"Question {number}: {word}?" for number, word in enumerate(("sea", "sky", "ship", "salt", "sand", "wind"))]
KEYS = [10, 11, 12, 13, 14, 15]
QUESTIONS = Questions(TEXTS, KEYS)
ANSWERS = [{"prompt": text, "key": key, "response": f"answer {key}"} for text, key in zip(TEXTS, KEYS, strict=True)]


def keeping(rows, *columns):
    return [{name: each[name] for name in (*columns, "response")} for each in rows]


def counts(tmp_path, *line):
    """What the command counts."""
    file = tmp_path / "counts.json"
    main([*map(str, line), "--json", str(file)])
    return json.loads(file.read_text())


several_orders = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


# Any order


@pytest.mark.parametrize("columns", [("prompt",), ("key",), ("prompt", "key")])
@several_orders
@given(random=st.randoms(use_true_random=False))
def test_rows_with_a_prompt_or_key_may_have_any_order(columns, random, tmp_path):
    rows = keeping(ANSWERS, *columns)
    random.shuffle(rows)
    expected = [each["response"] for each in ANSWERS]
    assert load_responses(write(tmp_path / "r.jsonl", rows), QUESTIONS) == expected


@pytest.mark.parametrize("columns", [("prompt",), ("key",)])
@several_orders
@given(random=st.randoms(use_true_random=False))
def test_ifeval_scores_any_order_alike(punkt, columns, random, tmp_path):
    rows = [
        {"prompt": asked["prompt"], "key": asked["key"], "response": text}
        for asked, text in zip(PROMPTS, RESPONSES, strict=True)
    ]
    rows = keeping(rows, *columns)
    random.shuffle(rows)
    data = write(tmp_path / "data.jsonl", PROMPTS)
    responses = write(tmp_path / "r.jsonl", rows)
    assert list(counts(tmp_path, "ifeval", "--data", data, "--responses", responses).values()) == [1, 3, 2, 4, 4, 6]


@several_orders
@given(random=st.randoms(use_true_random=False))
def test_ifeval_flatten_scores_any_order_alike(punkt, random, tmp_path):
    """Of the responses, and of the bases. Two rows of the data are the same, as in IFEval's own (key 30)."""
    prompts = [test_flatten.PROMPTS[0], prompt(11, *[(test_flatten.COMMA, {})] * 2)]
    rows = [
        {"prompt": each["prompt"], "response": text}
        for each, text in zip(flatten_rows(prompts, test_flatten.BASES), ["a", "b", "c, d", "e"], strict=True)
    ]
    bases = [{"key": key, "model_output": base} for key, base in test_flatten.BASES.items()]
    random.shuffle(rows)
    random.shuffle(bases)
    files = ["--data", write(tmp_path / "data.jsonl", prompts), "--bases", write(tmp_path / "bases.jsonl", bases)]
    found = counts(tmp_path, "ifeval_flatten", *files, "--responses", write(tmp_path / "r.jsonl", rows))
    assert list(found.values()) == [2, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("columns", ["prompt", "main_id", "generated"])
@several_orders
@given(random=st.randoms(use_true_random=False))
def test_complexbench_scores_any_order_alike(columns, random, tmp_path):
    """Of the responses, and of the verdicts on them."""
    data = [row(at, instruction=f"做{at}。", questions=[question(), question(1)]) for at in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    instances = load_instances(tmp_path / "data.json", "zh")
    texts = [f"answer {at}" for at in range(4)]
    tasks = judge_tasks(instances, texts, "zh")
    verdicts = [
        {
            "judge": "j",
            "main_id": task.key[0],
            "point_id": task.key[1],
            "fingerprint": task.fingerprint("j"),
            "verdict": task.key != (2, 1),
        }
        for task in tasks
    ]
    rows = [{"prompt": f"做{at}。", "main_id": at, "response": text} for at, text in enumerate(texts)]
    if columns == "generated":
        rows = [{"main_id": each["main_id"], "generated": each["response"]} for each in rows]
    else:
        rows = keeping(rows, columns)
    random.shuffle(rows)
    random.shuffle(verdicts)
    responses, judged = write(tmp_path / "r.jsonl", rows), write(tmp_path / "v.jsonl", verdicts)
    assert load_answers(responses, instances) == texts
    passed = read_verdicts(tmp_path / "v.jsonl", tasks, None).passed
    assert passed == {task.key: task.key != (2, 1) for task in tasks}
    line = ["complexbench", "--data", tmp_path / "data.json", "--responses", responses, "--verdicts", judged]
    assert counts(tmp_path, *line)["counts"]["All Avg."] == {"passed": 7, "unjudged": 0, "questions": 8}


def test_rows_with_neither_are_joined_by_number(tmp_path):
    rows = keeping(ANSWERS[::-1])
    assert load_responses(write(tmp_path / "r.jsonl", rows), QUESTIONS) == [each["response"] for each in rows]


def test_the_key_tells_equal_prompts_apart(tmp_path):
    questions = Questions([TEXTS[0]] * 6, KEYS)
    rows = [each | {"prompt": TEXTS[0]} for each in ANSWERS]
    expected = [each["response"] for each in rows]
    assert load_responses(write(tmp_path / "r.jsonl", rows[::-1]), questions) == expected
    reversed_rows = keeping(rows[::-1], "prompt")
    assert load_responses(write(tmp_path / "r.jsonl", reversed_rows), questions) == expected[::-1]


# Rows that answer something else


def changed(at, **columns):
    return [each | columns if number == at else each for number, each in enumerate(ANSWERS)]


BAD = {
    "unknown prompt": (
        changed(2, prompt="What is rain?"),
        "Got line 3 of .* with prompt 'What is rain.', which the data do not have.",
    ),
    "unknown prompts": (
        [each | {"prompt": each["prompt"] * 2} for each in ANSWERS],
        "Got line 1 of .*, which the data do not have, and 5 others",
    ),
    "two editions": (
        [each | {"prompt": each["prompt"] + " " * (at < 2)} for at, each in enumerate(ANSWERS)],
        "Got line 1 of .*, which the data do not have, and 1 others",
    ),
    "twice": (
        changed(4, prompt=TEXTS[1]),
        "Got line 5 of .* with prompt 'Question 1: sky.', which an earlier line has",
    ),
    "missing": (
        ANSWERS[:1] + ANSWERS[3:],
        r"Got 4 responses in .* to 6 prompts, and none to prompt 'Question 1: sky.' \(row 2 of the data\), and 1 others",
    ),
    "more": ([*ANSWERS, ANSWERS[5]], "Got line 7 of .* which an earlier line has"),
    "no prompt in a line": (changed(3, prompt=None), "Got line 4 of .* without prompt, which other lines have"),
    "messages": (changed(3, prompt=[{"role": "user", "content": TEXTS[3]}]), "Got line 4 of .* with prompt "),
    "unknown key": (keeping(changed(2, key=99), "key"), "Got line 3 of .* with key '99', which the data do not have"),
    "key twice": (keeping(changed(2, key=10), "key"), "Got line 3 of .* with key '10', which an earlier line has"),
    "no key in a line": (keeping(changed(0, key=None), "key"), "Got line 1 of .* without key, which other lines have"),
}


@pytest.mark.parametrize(("rows", "message"), BAD.values(), ids=BAD)
def test_rows_that_answer_something_else_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*xpected .*Fix: "):
        load_responses(write(tmp_path / "r.jsonl", rows), QUESTIONS)


def test_keys_that_several_prompts_have_need_the_order_of_the_data(tmp_path):
    """As in IFEval-Flatten."""
    questions = Questions(TEXTS, [10, 10, 11, 11, 12, 12])
    rows = [each | {"key": key} for each, key in zip(ANSWERS, questions.keys, strict=True)]
    in_order = keeping(rows, "key")
    assert load_responses(write(tmp_path / "r.jsonl", in_order), questions) == [each["response"] for each in rows]
    with pytest.raises(
        ValueError, match="Got responses .* whose key are not .* row by row, expected .*Fix: give each row its prompt"
    ):
        load_responses(write(tmp_path / "r.jsonl", in_order[::-1]), questions)


@several_orders
@given(random=st.randoms(use_true_random=False))
def test_one_edited_prompt_is_joined_and_told(random, tmp_path, caplog):
    """As key 2785 of IFEval was edited after GPT-4's published responses."""
    caplog.clear()
    rows = changed(2, prompt="Question 2: a ship?")
    random.shuffle(rows)
    file = write(tmp_path / "r.jsonl", rows)
    assert load_responses(file, QUESTIONS) == [each["response"] for each in ANSWERS]
    (record,) = caplog.records
    at = [each["key"] for each in rows].index(12) + 1
    assert (
        f"1 response was given to another edition of its prompt than the data have. Row {at} (from 1)"
        in record.getMessage()
    )
    assert note_of(file, QUESTIONS) == " 1 response was given to another edition of its prompt than the data have."
    assert note_of(write(tmp_path / "r.jsonl", ANSWERS), QUESTIONS) == ""


def test_two_bases_of_one_key_are_refused(tmp_path):
    rows = [{"key": 10, "model_output": "a"}, {"key": 11, "model_output": "b"}, {"key": 10, "model_output": "c"}]
    with pytest.raises(ValueError, match="Got line 3 of .* with key 10, which an earlier line has. Expected .*Fix: "):
        load_bases(write(tmp_path / "bases.jsonl", rows))
