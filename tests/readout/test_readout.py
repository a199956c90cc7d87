"""`trl-miso readout`: losses equal the trainer's, answers equal generation by hand, intervals are paired, the command says what it read."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer, miso_generate
from trl_miso.cli.readout import main
from trl_miso.readout.answers import generate_answers, verdicts_on
from trl_miso.readout.losses import READINGS, STANDARD, read_answers
from trl_miso.readout.rows import prepare_rows, sample_rows
from trl_miso.readout.summary import compare, in_words, summarize
from trl_miso.report.constraint_checks import ifeval_check, synthetic_check
from trl_miso.report.samples import prompt_ids
from trl_miso.segments.packed import WEIGHTINGS
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

CHECKED = {"instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": "[{}, {}]"}


def uneven(model):
    """The model with larger weights: contexts that make a difference."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


@pytest.fixture
def prepare(tokenizer, make_config, para_dataset):
    """A function that samples and prepares rows; returns both and the config."""

    def prepared(dataset=para_dataset, count=6, **settings):
        args = make_config(**settings)
        sampled = sample_rows(dataset, args, count)
        return sampled, prepare_rows(sampled, tokenizer, args, 512), args

    return prepared


def pooled(losses):
    tokens = sum(row.tokens for row in losses)
    return sum(row.nll for row in losses) / tokens, sum(row.correct for row in losses) / tokens


def evaluated(model, tokenizer, rows, make_config, **settings):
    """`eval_loss` and token accuracy of the trainer, all rows in one batch."""
    args = make_config(per_device_eval_batch_size=len(rows), **settings)
    trainer = MISOSFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    metrics = trainer.evaluate()
    return metrics["eval_loss"], metrics["eval_mean_token_accuracy"]


def settings_of(reading):
    settings = {"eval_contexts": "miso", "context_weighting": reading.weighting}
    if reading.full_context_weight is not None:
        settings["full_context_weight"] = reading.full_context_weight
    return settings


# Losses


@pytest.mark.parametrize(
    ("name", "settings", "compared"),
    [
        ("llama", {}, READINGS),
        ("llama", {"max_length": 120, "output_positions": "after_longest", "include_bare": False}, READINGS[1:2]),
        ("gemma3", {"max_length": 128}, READINGS[-1:]),
    ],
)
def test_losses_equal_the_trainers(name, settings, compared, prepare, tokenizer, make_config):
    sampled, rows, args = prepare(count=4, **settings)
    model = uneven(tiny_model(name, max_position_embeddings=1024)).train()
    before = model.config._attn_implementation
    losses, refused = read_answers(
        model, rows, max_length=args.max_length, output_positions=args.output_positions, share_prefixes=True
    )
    assert model.training and model.config._attn_implementation == before
    assert refused == {} and list(losses) == [STANDARD, *(reading.name for reading in READINGS)]
    raw = sampled.dataset.select([row.number for row in rows])
    assert pooled(losses[STANDARD]) == pytest.approx(
        evaluated(model, tokenizer, raw, make_config, **settings), rel=1e-5
    )
    for reading in compared:
        expected = evaluated(model, tokenizer, raw, make_config, **settings | settings_of(reading))
        assert pooled(losses[reading.name]) == pytest.approx(expected, rel=1e-5), reading.name
    assert len({round(pooled(of_rows)[0], 4) for of_rows in losses.values()}) > 3  # the weightings differ


def test_every_weighting_is_read():
    assert {reading.weighting for reading in READINGS} == set(WEIGHTINGS)


def test_own_weights_of_rows_are_read(prepare, tokenizer, make_config):
    rows = Dataset.from_list(
        [{"contexts": ["One. Say:", "Two, three. Say:"], "context_weights": [0.2, 0.8], "completion": " Yes, yes."}] * 2
    )
    _, prepared, _ = prepare(rows, response_template=" Say:")
    model = uneven(tiny_model("llama"))
    losses, refused = read_answers(model, prepared)
    assert set(refused) == {"full 1/2", "full 3/4"} and "context_weights" in refused["full 1/2"]
    settings = {"eval_contexts": "miso", "response_template": " Say:"}
    expected = evaluated(model, tokenizer, rows, make_config, **settings)
    assert pooled(losses["uniform"]) == pytest.approx(expected, rel=1e-5)


def test_equal_contexts_are_standard_inference(prepare):
    """Except under vanilla, whose one softmax counts both copies."""
    row = {"prompt": "One. Say:", "contexts": ["One. Say:"] * 2, "completion": " Yes, yes."}
    _, rows, _ = prepare(Dataset.from_list([row]), response_template=" Say:")
    losses, _ = read_answers(uneven(tiny_model("llama")), rows)
    (standard,) = losses.pop(STANDARD)
    (vanilla,) = losses.pop("vanilla")
    assert [of_rows[0].nll for of_rows in losses.values()] == pytest.approx([standard.nll] * 4, rel=1e-6)
    assert abs(vanilla.nll - standard.nll) > 1e-4


def test_a_window_refuses_vanilla_alone(prepare):
    _, rows, _ = prepare(count=3, max_length=512)
    model = tiny_model("gemma3", sliding_window=24, max_position_embeddings=1024)
    losses, refused = read_answers(model, rows, max_length=512)
    assert set(refused) == {"vanilla"} and set(losses) == {STANDARD, "uniform", "full 1/2", "full 3/4", "fid"}
    assert "3 of 3 rows exceed" in refused["vanilla"] and "--max_length 24" in refused["vanilla"]
    with pytest.raises(ValueError, match="after_longest"):
        read_answers(model, rows, max_length=512, output_positions="after_longest")


# Rows


def test_the_sample_depends_on_the_seed_and_has_several_contexts(para_dataset, make_config):
    first, again, other = (sample_rows(para_dataset, make_config(seed=seed), 8, 5) for seed in (1, 1, 2))
    assert first.numbers == again.numbers != other.numbers
    assert len(set(first.numbers)) == 8 and first.read == 8 + sum(map(len, first.left_out.values()))
    assert all(len(contexts.contexts) >= 5 for _, contexts in first.contexts)
    everything = sample_rows(para_dataset, make_config(), 1000)
    assert everything.read == len(para_dataset)
    assert sorted(everything.numbers + everything.left_out["fewer than 2 contexts"]) == list(range(len(para_dataset)))


def test_rows_with_other_labels_are_left_out(make_config, tokenizer):
    """Cut at `max_length` earlier with several contexts than with the full context alone."""
    rows = Dataset.from_list(
        [
            {"prompt": "One. Say:", "contexts": [context, "Two. Say:"], "completion": " Yes, yes, and yes."}
            for context in ("One. Say:", "One and two and three and four. Say:")
        ]
    )
    args = make_config(max_length=24, response_template=" Say:")
    lengths = [len(tokenizer(row["contexts"][0] + row["completion"])["input_ids"]) + 1 for row in rows]
    assert lengths[0] <= 24 < lengths[1]
    sampled = sample_rows(rows, args, 2)
    (kept,) = prepare_rows(sampled, tokenizer, args)
    assert kept.number == 0
    assert list(sampled.left_out.values()) == [[1]] and "labels" in next(iter(sampled.left_out))


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "Tell me.", "completion": "No."}, {}, "in the 'prompt' format"),
        ({"prompt": "Tell me.", "constraints": [], "completion": "No."}, {}, "none of which.*fewer than 2 contexts"),
        (
            {"prompt": "Tell me.", "constraints": ["Be kind."], "completion": "No."},
            {"context_mode": "succ"},
            "context_mode",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused(row, settings, message, make_config):
    with pytest.raises(ValueError, match=message):
        sample_rows(Dataset.from_list([row]), make_config(**settings), 4)


def test_rows_without_a_checker_are_refused(make_config, punkt):
    row = {"prompt": "Tell me.", "constraints": ["No commas.", "In lowercase."], "completion": "No."}
    rows = Dataset.from_list([row | CHECKED])
    assert sample_rows(rows, make_config(), 4, check=ifeval_check()).numbers == [0]
    for other in (row, row | CHECKED | {"constraints": ["No commas."]}):
        with pytest.raises(ValueError, match="Row 0: Got constraints without a checker.*leave --generate out"):
            sample_rows(Dataset.from_list([other]), make_config(), 4, check=ifeval_check())


# Answers


def test_answers_and_verdicts_equal_those_by_hand(prepare, tokenizer, punkt):
    prompts = ["Write about it.", "Tell me more about the sea.", "Why?"]
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "constraints": ["No commas.", "In lowercase."],
            "completion": [{"role": "assistant", "content": "It is, so."}],
        }
        | CHECKED
        for prompt in prompts
    ]
    sampled, prepared, _ = prepare(Dataset.from_list(rows))
    model = uneven(tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)).train()
    answers, refused = generate_answers(model, tokenizer, prepared, max_new_tokens=4, batch_size=2)
    assert model.training and refused == {} and set(answers) == {STANDARD, *(reading.name for reading in READINGS)}
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": tokenizer.pad_token_id}
    check = ifeval_check()
    for place, row in enumerate(prepared):
        ids = torch.tensor([prompt_ids(tokenizer, row.full.contexts[0], {})])
        plain = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        assert answers[STANDARD][place] == tokenizer.decode(plain, skip_special_tokens=True)
        n = len(row.parallel.contexts)
        for reading in READINGS:
            w = reading.full_context_weight
            weights = None if w is None else [w] + [(1 - w) / (n - 1)] * (n - 1)
            (out,) = miso_generate(
                model, tokenizer, row.parallel.contexts, weighting=reading.weighting, weights=weights, **options
            )
            text = tokenizer.decode(out, skip_special_tokens=True)
            assert answers[reading.name][place] == text
            verdicts = verdicts_on(check, row.row, text)
            assert verdicts == ["," not in text and bool(text.strip()), text == text.lower() and verdicts[1]]
    losses, _ = read_answers(model, prepared)
    verdicts = {
        name: [verdicts_on(check, row.row, text) for row, text in zip(prepared, texts, strict=True)]
        for name, texts in answers.items()
    }
    data = summarize(sampled, prepared, losses, {}, verdicts)
    for name, of_rows in verdicts.items():
        assert data["followed"][name]["value"] * data["constraints"] == pytest.approx(sum(map(sum, of_rows)))


def test_a_window_refuses_answers_under_vanilla_alone(prepare, tokenizer):
    _, rows, _ = prepare(count=2, max_length=512)
    model = tiny_model("gemma3", sliding_window=24, max_position_embeddings=1024)
    answers, refused = generate_answers(model, tokenizer, rows, max_new_tokens=2)
    assert set(refused) == {"vanilla"} and "one softmax" in refused["vanilla"] and "fid" in answers


# Intervals and words


def test_intervals_are_paired_and_over_rows():
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 400, 64)
    standard = tokens * rng.normal(2, 0.8, 64)
    values = {
        STANDARD: standard,
        "same": standard,
        "less": standard - 0.05 * tokens,
        "noisy": rng.permutation(standard),
    }
    compared = compare(values, tokens)
    assert compared["same"]["interval"] == [0, 0] and compared["same"]["difference"] == 0
    assert compared["less"]["difference"] == pytest.approx(-0.05)
    assert compared["less"]["interval"] == pytest.approx([-0.05, -0.05])  # as narrow as only pairs make it
    low, high = compared["noisy"]["interval"]
    assert low < 0 < high
    draws = np.random.default_rng(5).integers(64, size=(4000, 64))
    change = (values["noisy"] - standard)[draws].sum(1) / tokens[draws].sum(1)
    assert [low, high] == pytest.approx(np.quantile(change, [0.025, 0.975]), abs=0.2 * (high - low))
    assert compare(values, tokens) == compared
    few = compare({name: of_rows[:9] for name, of_rows in values.items()}, tokens[:9])
    assert few["less"]["interval"] is None and few["less"]["difference"] == pytest.approx(-0.05)


def test_words_claim_no_more_than_the_intervals():
    def lines(**intervals):
        return {"standard": {"interval": None}} | {name: {"interval": interval} for name, interval in intervals.items()}

    data = {"rows": {"read": 64}, "loss": lines(uniform=[-2, -1], fid=[-1, 1], vanilla=[0, 1]), "followed": None}
    assert in_words(data).endswith(
        "the loss of the rows' answers is lower under uniform and not clearly different under fid and vanilla."
    )
    data["followed"] = lines(uniform=[1, 2], fid=[-3, -1])
    assert in_words(data).endswith(
        "; the number of constraints that the model's own answers follow is lower under fid and higher under uniform."
    )
    data["rows"]["read"] = 9
    assert "no difference" in in_words(data) and "uniform" not in in_words(data)


# The command


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(synthetic_rows(40), vocab_size=400)
    model = tiny_model(
        "llama", num_hidden_layers=2, vocab_size=len(tokenizer), eos_token_id=1, max_position_embeddings=1024
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command_reads_generated_rows(model_folder, tmp_path, monkeypatch, capsys, wide_terminal):
    monkeypatch.chdir(tmp_path)
    arguments = ["--num_rows", "10", "--generate", "--max_new_tokens", "2", "--json", "readout.json", "--use_cpu"]
    main(["--model", model_folder, *arguments])
    data = json.loads((tmp_path / "readout.json").read_text())
    assert data["rows"]["read"] == 10 and data["dataset"] == "generated rows"
    names = [STANDARD, *(reading.name for reading in READINGS)]
    for measure in ("loss", "accuracy", "followed"):
        assert list(data[measure]) == names and data[measure]["fid"]["interval"]
    by_row = data["by_row"]
    assert data["tokens"] == sum(by_row["tokens"])
    assert data["loss"]["fid"]["value"] == pytest.approx(sum(by_row["nll"]["fid"]) / data["tokens"])
    printed = capsys.readouterr().out
    for text in (
        "10 rows of generated rows",
        "full 1/2",
        "vanilla",
        "Constraints that the model's own answers",
        data["in_words"],
    ):
        assert text in printed, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Got no model, expected --model"),
        (["--model", "M", "--max_new_tokens", "3"], "without --generate"),
        (["--model", "M", "--max_length", "20"], "none of which can be trained on.*max_length"),
        (["--model", "M", "--min_contexts", "50"], "fewer than 50 contexts"),
    ],
)
def test_errors_name_what_cannot_be_read(arguments, message, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main([*(model_folder if a == "M" else a for a in arguments), "--num_rows", "4", "--use_cpu"])


def test_rows_of_the_generator_are_checked(para_dataset, make_config):
    sampled = sample_rows(para_dataset, make_config(), 4, check=synthetic_check)
    row = para_dataset[sampled.numbers[0]]
    assert all(verdicts_on(synthetic_check, row, row["completion"][-1]["content"]))
