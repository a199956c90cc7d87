"""Multi-IF: a model sees its own responses, interrupted runs resume, and scores of English conversations equal those by hand."""

import csv
import json
import shutil
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.support.chat_server import chat_server
from trl_miso.cli.eval import main
from trl_miso.evaluation import multi_if
from trl_miso.evaluation.inference import ModelRequest
from trl_miso.evaluation.multi_if import answer_turns, load_conversations

COMMA, TITLE = ("punctuation:no_comma", {}), ("detectable_format:title", {})
TWO = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2})


def conversation(key, *turns, language="English"):
    """A row as the Hub has it: (text, instruction, ...) per turn, and "None" for turns that are missing."""
    row = {"turns": "", "responses": "", "key": key, "turn_index": "0", "language": language}
    for turn in (1, 2, 3):
        text, *instructions = turns[turn - 1] if turn <= len(turns) else (None,)
        values = {
            "prompt": {"role": "user", "content": text},
            "instruction_id_list": [name for name, _ in instructions],
            "kwargs": [json.dumps(options) for _, options in instructions],
        }
        row |= {f"turn_{turn}_{name}": json.dumps(value) if text else "None" for name, value in values.items()}
    return row


ROWS = [
    conversation("1:en", ("Write about the river.", COMMA), ("Longer.", COMMA, TWO), ("A title.", COMMA, TWO, TITLE)),
    conversation("2:fr", ("Le jardin.", COMMA), ("Encore.", COMMA, TWO), language="French"),
    conversation("3:en", ("Hello", COMMA), ("Why, and\n“when”?", COMMA, TITLE)),
    conversation("4:en", ("Hello", COMMA, TITLE), ("Tell me more.", COMMA, TITLE), ("Go on.", COMMA, TITLE, TWO)),
]
ENGLISH = [ROWS[0], ROWS[2], ROWS[3]]
# Verdicts below by hand. A comma in the first line is loosely dropped.
RESPONSES = [
    ["No commas here.", "a, b", "Well, then:\n<<Title>> no comma"],
    ["One. Two.", "<<Title>>", "a, <<Title>>"],
    ["<<Title>> One. Two.", "<<Title>> a, b."],
]
# [S]P, [S]I, [L]P, [L]I of turns 1, 2, 3 (1: yes; no; loosely no-comma and yes. 2: yes, yes; yes, yes; no, yes. 3: all; no, yes, no).
SCORES = [
    [1 / 3, 2 / 4, 2 / 3, 3 / 4],
    [2 / 3, 5 / 6, 2 / 3, 5 / 6],
    [1 / 2, 4 / 6, 1 / 2, 4 / 6],
]


@pytest.fixture
def data(tmp_path):
    """The data as csv, as the Hub has them."""
    return write_csv(tmp_path / "data.csv", ROWS)


@pytest.fixture(scope="module")
def model(model):
    """The model with weights scaled up so that its responses depend on all it reads."""
    loud = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weights in loud.parameters():
            weights.mul_(6 if weights.dim() > 1 else 1)
    loud.save_pretrained(model)
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of data sets for each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_csv(file, rows):
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def files(file):
    return [file, file.with_name(file.name + ".turn2"), file.with_name(file.name + ".turn3")]


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_responses(file):
    """Responses by key, in reverse order."""
    keys = [["1:en", "3:en", "4:en"]] * 2 + [["1:en", "4:en"]]
    for name, turn_keys, responses in zip(files(file), keys, RESPONSES, strict=True):
        rows = [{"key": key, "response": text} for key, text in zip(turn_keys, responses, strict=True)]
        name.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    return str(file)


# The data


def test_all_kinds_of_file_and_the_hub_give_the_same_conversations(data, tmp_path, monkeypatch):
    expected = load_conversations(data)
    turns = [[prompt["prompt"] for prompt in turns] for turns in expected[0]]
    assert turns[1:] == [["Hello", "Why, and\n“when”?"], ["Hello", "Tell me more.", "Go on."]]
    assert expected[0][0][2] == {
        "key": "1:en",
        "prompt": "A title.",
        "instruction_id_list": [COMMA[0], TWO[0], TITLE[0]],
        "kwargs": [{}, TWO[1], {}],
    }
    assert expected[1] == {"French": 1}
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data.parquet")
    Dataset.from_list(ROWS).to_json(tmp_path / "data.jsonl")
    for suffix in ("parquet", "jsonl"):
        assert load_conversations(tmp_path / f"data.{suffix}") == expected
    hub = {(multi_if.DATASET, "train"): Dataset.from_list(ROWS)}
    monkeypatch.setattr(multi_if, "load_dataset", lambda name, split: hub[name, split])
    assert load_conversations(None) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"language": "French"}, r"no conversation in .*data.csv whose language is 'English'"),
        ({"turn_1_prompt": "None"}, r"turn 1 in row 1 of the data \(key 1:en\)"),
        ({"turn_2_prompt": "None"}, r"turn 3 in row 1 .*not a user's next message"),
        ({"turn_2_prompt": '{"role": "assistant", "content": "Hi"}'}, r"turn 2 in row 1 .*not a user's next message"),
        ({"turn_2_kwargs": '["{}"]'}, r"turn 2 in row 1 .*it has 2 instructions and 1 kwargs"),
        ({"turn_2_kwargs": "{"}, r"turn 2 in row 1 "),
        ({"turn_1_instruction_id_list": '["no:such"]'}, r"instructions \['no:such'\] \(key 1:en\)"),
    ],
)
def test_wrong_data_are_refused_before_a_model_is_asked(changed, message, punkt, model, tmp_path, monkeypatch):
    monkeypatch.setattr(multi_if, "respond", lambda *_: pytest.fail("a model was asked"))
    data = write_csv(tmp_path / "data.csv", [ROWS[0] | changed])
    with pytest.raises(ValueError, match=f"Got {message}.*[Ee]xpected .*Fix: "):
        main(["multi_if", "--data", data, "--model", model])


def test_files_of_another_form_are_refused(tmp_path, monkeypatch):
    (tmp_path / "data.txt").touch()
    (tmp_path / "empty.csv").touch()
    write_csv(tmp_path / "other.csv", [{"key": "1", "language": "English"}])
    for name, message in (
        ("data.txt", "data.txt"),
        ("empty.csv", "empty.csv"),
        ("other.csv", ".* without the columns"),
    ):
        with pytest.raises(ValueError, match=f"Got .*{message}.*[Ee]xpected .*Fix: "):
            load_conversations(tmp_path / name)
    with pytest.raises(OSError, match="missing.csv"):
        load_conversations(tmp_path / "missing.csv")
    monkeypatch.setattr(multi_if, "DATASET", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="Got no data set .*Expected the Hub or its cache. Fix: "):
        load_conversations(None)


# Asking


def ask(data, file, **settings):
    return answer_turns(load_conversations(data)[0], file, ModelRequest(**settings))[0]


def test_a_model_answers_each_turn_after_its_own_responses(model, tokenizer, data, tmp_path):
    """As `generate` on the rendered conversation, one at a time; and not as without its responses."""
    file = tmp_path / "r.jsonl"
    answered = ask(data, file, model=model, batch_size=2, max_new_tokens=6)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    render = tokenizer.apply_chat_template

    def generate(messages):
        ids = render(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = loaded.generate(**ids, do_sample=False, max_new_tokens=6)
        return tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    by_turn = [[], [], []]
    for row in ENGLISH:
        messages = []
        for turn in (1, 2, 3):
            if row[f"turn_{turn}_prompt"] != "None":
                messages = [*messages, json.loads(row[f"turn_{turn}_prompt"])]
                response = generate(messages)
                by_turn[turn - 1].append((messages, response))
                messages = [*messages, {"role": "assistant", "content": response}]
    assert [len(turn) for turn in by_turn] == [3, 3, 2]
    assert [[response for _, response in turn] for turn in answered] == [[text for _, text in turn] for turn in by_turn]
    assert [[(row["prompt"], row["response"]) for row in rows_of(name)] for name in files(file)] == by_turn
    blank = [
        generate([*messages[:-2], {"role": "assistant", "content": ""}, messages[-1]]) for messages, _ in by_turn[1]
    ]
    assert blank != [response for _, response in by_turn[1]]


def test_a_run_killed_in_or_between_turns_resumes_to_the_same_files(model, data, tmp_path):
    file = tmp_path / "r.jsonl"
    settings = {"model": model, "batch_size": 2, "max_new_tokens": 4}
    answered = ask(data, file, **settings)
    whole = [name.read_bytes() for name in files(file)]
    for turn, cut in ((1, 300), (2, 0), (3, len(whole[2]) - 3)):
        for name in files(file)[turn:]:
            name.unlink()
        files(file)[turn - 1].write_bytes(whole[turn - 1][:cut])
        assert ask(data, file, **settings) == answered
        assert [name.read_bytes() for name in files(file)] == whole


def test_responses_that_follow_others_are_refused(model, data, tmp_path):
    """Both by a run that would resume, and when they are scored without the model."""
    file = tmp_path / "r.jsonl"
    settings = {"model": model, "max_new_tokens": 4}
    ask(data, file, **settings)
    rows = rows_of(file)
    for row in rows:
        row["response"] += " and something else that is long enough not to pass as an edition of the same conversation"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for request in (ModelRequest(**settings), None):
        with pytest.raises(ValueError, match=r"Got line 1 of .*r.jsonl.turn2.*Fix: "):
            answer_turns(load_conversations(data)[0], file, request)


def test_a_server_gets_whole_conversations(data, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="needs pip install 'trl-miso[eval]'")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def reply(body):
        return " / ".join(f"{message['role']}: {message['content']}" for message in body["messages"])

    with chat_server(reply) as server:
        answered = ask(data, tmp_path / "r.jsonl", model="sea", backend="openai", base_url=server.url)
    assert answered[1][1][1] == "user: Hello / assistant: user: Hello / user: Why, and\n“when”?"
    assert answered[2][1][1].endswith(" / user: Go on.")


# The score


def test_what_the_command_prints_and_writes(punkt, data, tmp_path, capsys, wide_terminal):
    """The mean of the four accuracies per turn, over the conversations that reach the turn; French is counted and not scored."""
    line = ["multi_if", "--data", data, "--responses", write_responses(tmp_path / "r.jsonl")]
    main([*line, "--json", str(tmp_path / "counts.json"), "--samples", str(tmp_path / "samples.jsonl")])
    printed = " ".join(capsys.readouterr().out.split())
    for turn, scores in enumerate(SCORES, start=1):
        assert " ".join(["r.jsonl", str(turn), *(f"{100 * x:.1f}" for x in (*scores, fmean(scores)))]) in printed
    assert "By turn 3, 3, 2 of 4 conversations. Left out, since the checkers are made for English: 1 French." in printed
    written = json.loads((tmp_path / "counts.json").read_text())
    assert written["left_out"] == {"French": 1}
    assert list(written["turn_3"].values()) == [1, 4, 1, 4, 2, 6]
    samples = rows_of(tmp_path / "samples.jsonl")
    turns = [(1, "1:en"), (1, "3:en"), (1, "4:en"), (2, "1:en"), (2, "3:en"), (2, "4:en"), (3, "1:en"), (3, "4:en")]
    assert [(sample["turn"], sample["key"]) for sample in samples] == turns
    assert [sample["response"] for sample in samples] == sum(RESPONSES, [])


def test_missing_responses_are_named(punkt, data, tmp_path):
    file = write_responses(tmp_path / "r.jsonl")
    shutil.copy(f"{file}.turn2", f"{file}.turn3")  # with key 3, whose conversation has two turns
    with pytest.raises(ValueError, match=r"r.jsonl.turn3 with key '3:en', which the data do not have.*Fix: "):
        main(["multi_if", "--data", data, "--responses", file])
    (tmp_path / "r.jsonl.turn2").unlink()
    with pytest.raises(OSError, match="r.jsonl.turn2"):
        main(["multi_if", "--data", data, "--responses", file])
