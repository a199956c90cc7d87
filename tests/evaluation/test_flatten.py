"""IFEval-Flatten: composed rows, base instructions free of constraints, equal scores by the command and by lm-eval."""

import json
import random
import re
import sys
from importlib.resources import files

import pytest

import trl_miso.evaluation.tasks
from tests.evaluation.test_evaluation import COMMA, GPT4, REAL, prompt, three, write
from tests.support.chat_server import chat_server
from trl_miso.cli.eval import main
from trl_miso.evaluation.flatten import flatten_rows, load_bases
from trl_miso.evaluation.ifeval import load_prompts, load_scorer
from trl_miso.evaluation.table import FLATTEN_PAPER
from trl_miso.sources.synthetic import build_model

REPEAT = "combination:repeat_prompt"
PROMPTS = [
    prompt(10, (COMMA, {}), three(2)),
    prompt(11, (REPEAT, {"prompt_to_repeat": "Question 11. Without commas."}), (COMMA, {})),
]
BASES = {10: " Write about rain.\n", 11: "Write about wind."}
NO_COMMAS = "In your entire response, refrain from the use of any commas."
SENTENCES = "Your response should contain at least 2 sentences."
RESPONSES = ["Rain falls.", "Rain falls.", "Write about wind. Well, it blows.", "Well, then:\nIt blows."]
MENDS = json.loads(files("trl_miso.evaluation").joinpath("bases.json").read_text(encoding="utf-8"))["mends"]


@pytest.fixture
def sources(tmp_path):
    """The two files that the command reads."""
    bases = [{"key": key, "model_output": base} for key, base in BASES.items()]
    return ["--data", write(tmp_path / "data.jsonl", PROMPTS), "--bases", write(tmp_path / "bases.jsonl", bases)]


@pytest.fixture(scope="module")
def real():
    """IFEval's prompts, and Microsoft's bases by their keys."""
    if not GPT4.exists():
        pytest.skip("needs IFEval's data and its bases")
    return load_prompts(REAL / "input_data.jsonl"), load_bases(REAL / "ifeval_wo_instructions.jsonl")


# Rows


def test_a_row_is_the_base_and_one_instruction(punkt):
    rows = flatten_rows(PROMPTS, BASES)
    assert [row["prompt"] for row in rows[:2]] == [f"Write about rain. {NO_COMMAS}", f"Write about rain. {SENTENCES}"]
    assert rows[2]["prompt"].startswith("Write about wind. First repeat the request word for word without change")
    assert [row["key"] for row in rows] == [10, 10, 11, 11]
    assert [row["instruction_id_list"] for row in rows] == [[COMMA], [three(2)[0]], [REPEAT], [COMMA]]
    assert [row["kwargs"] for row in rows] == [[{}], [three(2)[1]], [{"prompt_to_repeat": "Write about wind."}], [{}]]
    verdicts = [load_scorer()(row, response) for row, response in zip(rows, RESPONSES, strict=True)]
    assert [verdict.strict for verdict in verdicts] == [(True,), (False,), (True,), (False,)]
    assert [verdict.loose for verdict in verdicts] == [(True,), (False,), (True,), (True,)]


def test_the_hubs_form_of_the_prompts_gives_the_same_rows(punkt):
    """In the Hub's data set every instruction has the options of all others, as null."""
    wide = [
        asked | {"kwargs": [{"num_words": None, "prompt_to_repeat": None, **given} for given in asked["kwargs"]]}
        for asked in PROMPTS
    ]
    assert flatten_rows(wide, BASES) == flatten_rows(PROMPTS, BASES)


@pytest.mark.parametrize(
    ("letter", "words", "followed", "broken"),
    [
        ("#", "Include at least 3 hashtags, starting with '#'.", "#a #b #c", "abc #b #c"),
        ("!", 'Contain 3 or more exclamation marks "!" in your response.', "So! Many! Of them!", "So! Few!"),
    ],
)
def test_a_letter_that_is_a_punctuation_mark_is_counted(punkt, letter, words, followed, broken):
    options = {"let_relation": "at least", "letter": letter, "let_frequency": 3}
    (row,) = flatten_rows([prompt(10, ("keywords:letter_frequency", options))], BASES)
    assert row["prompt"] == f"Write about rain. {words}"
    score = load_scorer()
    assert score(row, followed).strict == (True,) and score(row, broken).strict == (False,)


def test_options_that_would_be_drawn_are_refused(punkt):
    random.seed(5)
    state = random.getstate()
    with pytest.raises(
        ValueError, match=r"number_sentences' \(key 10\) with the options .* leave something to chance.*Fix: "
    ):
        flatten_rows([prompt(10, (three(2)[0], {"relation": "at least"}))], BASES)
    assert random.getstate() == state


def test_prompts_that_cannot_be_flattened_are_refused(punkt):
    with pytest.raises(ValueError, match="Got no base instruction for key 11.*Fix: "):
        flatten_rows(PROMPTS, {10: "a"})
    with pytest.raises(ValueError, match=r"Got instructions \['punctuation:no_dash'\] \(key 10\).*Fix: "):
        flatten_rows([prompt(10, ("punctuation:no_dash", {}))], BASES)


# Bases


def base_of(key, base, full="a"):
    (row,) = flatten_rows([prompt(key, (COMMA, {})) | {"prompt": full}], {key: base})
    return row["prompt"].removesuffix(f" {NO_COMMAS}")


def test_mends(punkt):
    """A correction applies where its words occur; a base instruction that was corrected at its source stays."""
    wrong, right = MENDS["1021"]
    assert base_of(1021, f"Write a{wrong} critique.") == f"Write a{right} critique."
    assert base_of(1022, f"Write a{wrong} critique.") == f"Write a{wrong} critique."
    for key in ("286", "1834"):  # corrections that add words add them once
        wrong, right = MENDS[key]
        assert wrong in right
        assert base_of(int(key), wrong) == base_of(int(key), right) == right


def test_line_breaks_that_a_base_lost_are_put_back(punkt):
    full = "Summarize this, in capitals.\n\nThe rain falls.\n* One day\nIt ends."
    assert base_of(1, "Summarize this.The rain falls.* One dayIt ends.", full) == (
        "Summarize this.\n\nThe rain falls.\n* One day\nIt ends."
    )
    assert base_of(1, "Summarize this. The rain falls.", full) == "Summarize this. The rain falls."


# Words by which a base instruction betrays a constraint that should have been removed, and options that it must not contain.
TRACES = {
    "change_case": r"capital|caps\b|[ul]\w+er ?case|\benglish\b",
    "combination:repeat_prompt": r"repeat|word for word",
    "combination:two_responses": r"\btwo (?!people)|\*{6}",
    "detectable_content:number_placeholders": r"placeholder|bracket|\[",
    "detectable_content:postscript": r"postscript|\bp\. ?s\b|p\.p\.s",
    "detectable_format:constrained_response": r"my answer is|phrases?:",
    "detectable_format:json_format": r"json|```",
    "detectable_format:multiple_sections": r"sections?\b|\d paragraph",
    "detectable_format:number_bullet": r"bullet|^\* ",
    "detectable_format:number_highlight": r"highlight|italic|markdown|\*",
    "detectable_format:title": r"title|<<|bracket",
    "keywords:letter_frequency": r"letter . |hashtag|exclamation",
    "language:response_language": r"language|in (only )?[A-Z][a-z]+(ese|ish|ic|ian|di|il)\b|hindi",
    "length_constraints:nth_paragraph": r"paragraph|new lines",
    "length_constraints:number_paragraphs": r"paragraph|\*{3}",
    "length_constraints:number_sentences": r"each line should|\d\W+sentence",
    "length_constraints:number_words": r"\d\W+words|limit the",
    "punctuation:no_comma": r"comma",
    "startend:end_checker": r"\bend\b.*with|finish",
    "startend:quotation": r"double quot",
}
OPTIONS = ("keywords", "end_phrase")
# Checked by reading: here a keyword is part of the text's topic, or the base instruction needs it.
CONTENT = {1237, 1348, 1379, 2602, 3439, 1843}


def test_bases_are_free_of_the_instructions(real, punkt):
    """A search for these words finds only content, and finds the base instructions that `bases.json` corrects."""
    prompts, given = real

    def betrayed(bases):
        keys = set()
        for asked in prompts:
            base = bases[asked["key"]]
            for name, options in zip(asked["instruction_id_list"], asked["kwargs"], strict=True):
                patterns = [pattern for kind, pattern in TRACES.items() if name.startswith(kind)]
                for option in OPTIONS:
                    values = options.get(option, [])
                    patterns += [
                        rf"\b{re.escape(value)}\b" for value in ([values] if isinstance(values, str) else values)
                    ]
                if any(re.search(pattern, base, re.IGNORECASE | re.MULTILINE) for pattern in patterns):
                    keys.add(asked["key"])
        return keys

    commas = [asked | {"instruction_id_list": [COMMA], "kwargs": [{}]} for asked in prompts]
    mended = {row["key"]: row["prompt"].removesuffix(f" {NO_COMMAS}") for row in flatten_rows(commas, given)}
    assert betrayed(mended) == CONTENT
    # All corrected base instructions but two betray a constraint (two responses, sections, a language); the two had lost their topic.
    assert {int(key) for key in MENDS} - betrayed(given) == {286, 1834}
    assert all(wrong in given[int(key)] for key, (wrong, _) in MENDS.items())
    lost = {key for key, base in mended.items() if str(key) not in MENDS and base != given[key].strip()}
    assert lost == {1147, 1592, 1999, 2859, 2905, 3191, 3748}


def test_real_rows_have_ifevals_own_verdicts(real, punkt):
    """On GPT-4's responses to every sixth prompt, per instruction as in the full prompt; repeat_prompt differs, since its text does."""
    prompts, bases = real
    assert len(flatten_rows(prompts, bases)) == 834
    responses = [json.loads(line)["response"] for line in GPT4.read_text().splitlines()]
    score, kinds, compared = load_scorer(), set(), 0
    for asked, response in list(zip(prompts, responses, strict=True))[::6]:
        full = score(asked, response)
        for row, strict, loose in zip(flatten_rows([asked], bases), full.strict, full.loose, strict=True):
            alone = score(row, response)
            kinds.update(row["instruction_id_list"])
            if row["instruction_id_list"] != [REPEAT]:
                compared += 1
                assert (alone.strict, alone.loose) == ((strict,), (loose,))
    assert len(kinds) == 25 and compared > 120


# The command


def test_the_papers_rows_have_its_averages():
    assert all(abs(sum(accuracies) / 2 - average) < 0.1 for *_, accuracies, average in FLATTEN_PAPER)
    assert [average for *_, average in FLATTEN_PAPER] == [54.5, 60.3, 56.9, 56.0, 59.4, 58.6]


def test_what_the_command_prints_and_writes(punkt, sources, tmp_path, capsys, wide_terminal):
    rows, counts, samples = (tmp_path / name for name in ("rows.jsonl", "counts.json", "samples.jsonl"))
    main(["ifeval_flatten", *sources, "--write_rows", str(rows)])
    assert not capsys.readouterr().out
    assert [json.loads(line) for line in rows.read_text().splitlines()] == flatten_rows(PROMPTS, BASES)
    responses = write(tmp_path / "responses.jsonl", [{"response": response} for response in RESPONSES])
    line = ["--responses", responses, "--json", str(counts), "--samples", str(samples)]
    main(["ifeval_flatten", *sources, *line])
    printed = " ".join(capsys.readouterr().out.split())
    assert "responses.jsonl 50.0 75.0 62.5" in printed and "MISO-para Llama3-8B 58.4 62.1 60.3" in printed
    assert "4 instructions" in printed and "Not the paper's IFEval-Flatten" in printed
    assert list(json.loads(counts.read_text()).values()) == [2, 2, 3, 3, 4, 4]
    verdicts = [json.loads(sample)["strict_instruction"] for sample in samples.read_text().splitlines()]
    assert verdicts == [[True], [False], [True], [False]]


def test_the_command_asks_a_model(punkt, sources, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server() as server:
        line = ["--model", "m", "--backend", "openai", "--base_url", server.url]
        main(["ifeval_flatten", *sources, "--responses", str(tmp_path / "new.jsonl"), *line])
    assert sorted(request.text for request in server.requests) == sorted(
        row["prompt"] for row in flatten_rows(PROMPTS, BASES)
    )


@pytest.mark.parametrize("line", [[], ["--json", "a", "--write_rows", "a"]])
def test_scores_need_responses(line, sources):
    with pytest.raises(ValueError, match="Got neither --responses nor --model"):
        main(["ifeval_flatten", *sources, *line])


# lm-eval's task


@pytest.fixture
def task_manager(punkt, sources, tmp_path, capsys):
    from lm_eval.tasks import TaskManager

    main(["ifeval_flatten", *sources, "--write_rows", str(tmp_path / "rows.jsonl")])
    (folder,) = trl_miso.evaluation.tasks.__path__

    def make(**metadata):
        return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)

    return make


def test_lm_eval_gives_the_commands_score(task_manager, tokenizer, tmp_path, monkeypatch):
    """On the responses of a random model, then on those of this file."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "tasks": ["ifeval_flatten"],
        "task_manager": task_manager(rows=str(tmp_path / "rows.jsonl")),
        "gen_kwargs": "max_gen_toks=16",
        "apply_chat_template": True,
        "bootstrap_iters": 0,
    }
    model = HFLM(str(tmp_path / "model"), device="cpu", batch_size=2)
    scores = []
    for ours in (False, True):
        if ours:
            monkeypatch.setattr(
                model, "generate_until", lambda requests, **_: [RESPONSES[one.doc_id] for one in requests]
            )
        results = lm_eval.simple_evaluate(model, **settings)
        samples = sorted(results["samples"]["ifeval_flatten"], key=lambda sample: sample["doc_id"])
        responses = write(tmp_path / "r.jsonl", [{"response": sample["resps"][0][0]} for sample in samples])
        line = ["--responses", responses, "--json", str(tmp_path / "counts.json")]
        main(
            ["ifeval_flatten", "--data", str(tmp_path / "data.jsonl"), "--bases", str(tmp_path / "bases.jsonl"), *line]
        )
        counts = json.loads((tmp_path / "counts.json").read_text())
        result = results["results"]["ifeval_flatten"]
        scores.append([result[f"inst_level_{kind}_acc,none"] for kind in ("strict", "loose")])
        assert scores[-1] == [counts["strict_instruction"] / 4, counts["loose_instruction"] / 4]
    assert scores[1] == [0.5, 0.75]


def test_lm_eval_reports_missing_rows_and_data(task_manager, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Got no rows for ifeval_flatten.*Fix: add `--metadata rows=FILE`"):
        task_manager().load(["ifeval_flatten"])
    nltk = sys.modules["nltk"]
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match="'punkt_tab'.*Fix: "):
        task_manager(rows=str(tmp_path / "rows.jsonl")).load(["ifeval_flatten"])
