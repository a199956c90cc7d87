"""The study on real models: signals equal their definitions, constraints hold, rows stay apart, a killed grid resumes.

Accuracies are not tested.
"""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.common.real_models import add_punkt_tab
from benchmarks.real_study import __main__ as real_study
from benchmarks.real_study import grid
from benchmarks.real_study import rows as study_rows
from benchmarks.real_study.decoding import decode
from benchmarks.real_study.evaluate import repeats
from benchmarks.real_study.sets import evenly, published_sets, scorers
from benchmarks.real_study.signals import (
    BothTrainer,
    DistillTrainer,
    LabelledTrainer,
    annealed,
    weighted_by_misses,
    with_standard,
)
from benchmarks.real_study.study import METHODS, QUICK
from tests.support.conversations import TEMPLATES, assistant, tokenizer_for, user
from tests.support.models import tiny_model
from tests.support.rows_oracle import parts_of, rows_logits
from trl_miso import MISOSFTTrainer
from trl_miso.evaluation.greedy import greedy_responses
from trl_miso.segments import decode as decode_layout

TOLERANCE = 512 * torch.finfo(torch.float32).eps
CONSTRAINTS = ["Rhyme.", "Use no commas.", "Be brief.", "Name a ship."]
ROWS = [
    {
        "prompt": [user(f"Describe {thing}.")],
        "constraints": CONSTRAINTS[: 1 + i % 4],
        "completion": [assistant(f"I see {thing}, blue and free.")],
    }
    for i, thing in enumerate(["the sea", "the sky", "a ship", "the harbour", "an old sailor"])
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(TEMPLATES["qwen3"])


def make_trainer(trainer_class, tokenizer, make_config, mode="para", **options):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    model = tiny_model("llama", **sizes)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1  # makes attention far from uniform
    if mode in ("para", "succ"):
        options["log_shares"] = False
    args = make_config(max_length=400, context_mode=mode, **options)
    return trainer_class(model, args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)


def losses_by_definition(trainer):
    """Summed losses of the mixed and of the standard output, and KL(mixed || standard), from separate dense forwards."""
    mixed_loss = standard_loss = divergence = torch.zeros((), dtype=torch.float64)
    labelled = 0
    for row in trainer.train_dataset:
        mixed, standard = sorted(parts_of(row), key=lambda parts: -len(parts.contexts))
        assert len(mixed.contexts) > 1 and standard.contexts == [[]]
        places = torch.tensor(mixed.labels[1:]) != -100
        targets = torch.tensor(mixed.labels[1:])[places]
        logits = rows_logits(trainer.model, mixed.contexts, mixed.output, mixed.weights, trainer.args.context_weighting)
        teacher = log_softmax(logits[places].double(), -1)
        trainer.model.set_attn_implementation("eager")
        whole = mixed.contexts[0] + mixed.output
        assert standard.output == whole
        logits = trainer.model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
        student = log_softmax(logits[len(mixed.contexts[0]) : -1][places].double(), -1)
        mixed_loss = mixed_loss - teacher.gather(1, targets[:, None]).sum()
        standard_loss = standard_loss + cross_entropy(student, targets, reduction="sum")
        divergence = divergence + kl_div(student, teacher.detach(), log_target=True, reduction="sum")
        labelled += len(targets)
    return mixed_loss / labelled, standard_loss / labelled, divergence / labelled


@pytest.mark.parametrize(
    "options", [{}, {"context_weighting": "fid"}, {"full_context_weight": 0.75, "share_prefixes": False}]
)
@pytest.mark.parametrize("trainer_class", [BothTrainer, DistillTrainer])
def test_both_and_distill_equal_their_definition(trainer_class, options, tokenizer, make_config):
    trainer = make_trainer(trainer_class, tokenizer, make_config, **options)
    model, implementation = trainer.model, trainer.model.config._attn_implementation
    mixed, standard, divergence = losses_by_definition(trainer)
    expected = (mixed + standard) / 2 if trainer_class is BothTrainer else standard + divergence
    assert divergence > 1e-3
    model.zero_grad()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.set_attn_implementation(implementation)
    batch = trainer.data_collator(list(trainer.train_dataset))
    model.zero_grad()
    model.train()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=(batch["labels"] != -100).sum())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    for name, parameter in model.named_parameters():
        worst = (parameter.grad - gradients[name]).abs().max().item()
        assert worst <= TOLERANCE * gradients[name].abs().max().item(), name


@pytest.mark.parametrize("mode", ["single", "para", "succ", "augment"])
def test_logits_of_labelled_tokens_give_the_loss_of_the_trainer(mode, tokenizer, make_config):
    found = []
    for trainer_class in (MISOSFTTrainer, LabelledTrainer):
        trainer = make_trainer(trainer_class, tokenizer, make_config, mode=mode)
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"] != -100).sum())
        loss.backward()
        found.append((loss.item(), {name: parameter.grad for name, parameter in trainer.model.named_parameters()}))
    (expected, gradients), (loss, ours) = found
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name


def test_the_standard_output_costs_its_own_tokens(tokenizer, make_config):
    for row in make_trainer(MISOSFTTrainer, tokenizer, make_config).train_dataset:
        (example,) = decode_layout(row["miso_layout"])
        (output,) = example.outputs
        assert len(with_standard(row)["input_ids"]) == len(row["input_ids"]) + example.segments[output.segment].length


def test_distill_refuses_rows_that_are_not_mixed(tokenizer, make_config):
    trainer = make_trainer(DistillTrainer, tokenizer, make_config)
    rows = [with_standard(row) for row in trainer.train_dataset]
    rows[0]["labels"] = [-100] * (len(rows[0]["labels"]) - 5) + rows[0]["labels"][-5:]
    with pytest.raises(ValueError, match="rows that are not mixed"):
        trainer.compute_loss(trainer.model, trainer.data_collator(rows[:1]))


def test_a_broken_constraint_weighs_twice():
    row = weighted_by_misses(ROWS[3], [True, False, True, False])
    assert len(row["contexts"]) == 6  # full, four constraints, bare
    assert row["context_weights"] == pytest.approx([1 / 8, 1 / 8, 2 / 8, 1 / 8, 2 / 8, 1 / 8])


def test_annealed_rows_are_mixed_first_and_plain_last():
    rows = annealed(ROWS * 40, seed=0)
    plain = [not row["constraints"] for row in rows]
    quarters = [sum(plain[i : i + 50]) for i in range(0, 200, 50)]
    assert quarters == sorted(quarters) and quarters[0] < 15 and quarters[-1] > 35
    for row, original in zip(rows, ROWS * 40, strict=True):
        if not row["constraints"]:
            assert all(constraint in row["prompt"][0]["content"] for constraint in original["constraints"])


IFEVAL = {"key": 1, "prompt": "Sing. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ANSWER = (
    "The harbour of Genoa is one of the largest in Italy. Its lighthouse, the Lanterna, stands above the harbour.\n\n"
    "Sailors from many countries have visited Genoa for a thousand years, and they still do. The lighthouse has guided them."
)


def punkt_tab():
    """Skip the test without lm-eval or NLTK's punkt_tab."""
    pytest.importorskip("lm_eval")
    try:
        add_punkt_tab()
    except ImportError as reason:
        pytest.skip(str(reason))


def test_constraints_hold_on_their_answer():
    punkt_tab()
    from benchmarks.real_study.constraints import back_translate, restyle
    from trl_miso.evaluation.ifeval import load_scorer

    score = load_scorer()
    seen = set()
    for seed in range(150):
        rng = random.Random(seed)
        answer, style = restyle(ANSWER, rng)
        constraints = back_translate(answer, rng.randint(2, 6), style, rng)
        assert constraints is not None
        names = [constraint.name for constraint in constraints]
        assert len(set(names)) == len(names) and (style is None or style in names)
        seen.update(names)
        prompt = {
            "key": seed,
            "prompt": "Describe Genoa.",
            "instruction_id_list": names,
            "kwargs": [constraint.kwargs for constraint in constraints],
        }
        assert all(score(prompt, answer).strict), (names, answer)
        assert not all(score(prompt, "No.").strict) or len(names) <= 3
    assert len(seen) >= 14, seen


def test_prompts_of_an_evaluation_are_left_out(tmp_path):
    prompts = ["Describe the sea!", "Describe the sky.", "describe  the sky", "Describe " + "very " * 20 + "much."]
    (tmp_path / "prompts").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    found = study_rows.read_prompts(str(tmp_path / "prompts"), ["describe the sea"], count=10, max_words=20)
    assert [study_rows.normalized(row["prompt"]) for row in found] == ["describe the sky"]


def test_answers_end_with_a_sentence():
    text = "One two three four five six seven eight. Nine ten eleven twelve thirteen fourteen fifteen sixteen! And then"
    assert study_rows.whole_sentences(text) == text.removesuffix(" And then")
    assert study_rows.whole_sentences("Too short. And then") is None
    assert study_rows.whole_sentences("no end") is None


def test_every_response_to_ifbench_has_a_verdict(tmp_path):
    pytest.importorskip("ifbench")
    punkt_tab()
    (tmp_path / "ifeval").write_text(json.dumps(IFEVAL) + "\n")
    sets = published_sets(str(tmp_path / "ifeval"), None, {"IFEval": None, "IFBench": None})
    score = scorers(sets)["IFBench"]
    followed = 0
    for prompt in sets["IFBench"]:
        for response in ("", "No.", "1", "?", '"', ANSWER):  # the package's own checkers fail on short ones
            verdict = score(prompt, response)
            assert len(verdict.strict) == len(verdict.loose) == len(prompt["instruction_id_list"])
            assert response or not any(verdict.strict + verdict.loose)
            followed += sum(verdict.strict)
    assert len(sets["IFBench"]) > 250 and followed > 20


def test_loops_are_found_and_prose_is_not():
    assert repeats("a dog is a part of every family and " * 6)
    assert not repeats(ANSWER)
    assert evenly(list(range(10)), 4) == [0, 2, 5, 7] and evenly([1, 2], None) == [1, 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_that_ended_leave_the_batch(architecture, tokenizer):
    model = tiny_model(architecture, vocab_size=len(tokenizer)).eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    prompts = [
        tokenizer(text)["input_ids"] for text in ["Describe the sea.", "A ship", "Sing of the old sailor and his ship."]
    ]
    free = greedy_responses(model, tokenizer, prompts, 12)
    ending = free[0][4]  # a token that ends one answer early and not all of them
    tokenizer = SimpleNamespace(eos_token_id=ending, pad_token_id=0)
    model.generation_config.eos_token_id = ending
    expected = greedy_responses(model, tokenizer, prompts, 12)
    lengths = set()
    for found, padded in zip(decode(model, tokenizer, prompts, 12), expected, strict=True):
        assert found == padded[: len(found)]
        assert len(found) == 12 or (found[-1] == ending and set(padded[len(found) :]) <= {0})
        lengths.add(len(found))
    assert len(lengths) > 1


def test_every_method_is_a_setting_of_the_trainer(make_config):
    for method in METHODS.values():
        make_config(**method.options)
        assert method.matches is None or method.matches in METHODS


PROMPTS = [
    f"Tell me {how} of {thing}."
    for how in ("all", "briefly")
    for thing in ("the sea", "a ship", "Genoa", "the sky", "it")
]
SMOKE = replace(
    QUICK, pool=10, rows=2, batch=2, dev=2, dense=2, ifeval=1, flat=1, ifbench=1, attention=1, answer_tokens=6
)


@pytest.fixture
def study(tmp_path, monkeypatch, tokenizer):
    """Arguments of a study on a tiny model with given answers, and a function that runs it and returns its tables."""
    punkt_tab()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = {
        "prompts": [{"prompt": prompt, "answer": ANSWER} for prompt in PROMPTS],
        "ifeval": [IFEVAL],
        "bases": [{"key": 1, "model_output": "Sing."}],
    }
    arguments = ["--model", str(tmp_path / "model"), "--answers", "given", "--quick", "--workers", "1"]
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += [f"--{name}", str(tmp_path / name)]
    monkeypatch.setattr(real_study, "QUICK", SMOKE)

    def run(folder, *more):
        file = tmp_path / "tables.md"
        real_study.main([*arguments, "--folder", str(tmp_path / folder), "--markdown", str(file), *more])
        return file.read_text().partition("\n\n")[2]

    return run


def test_a_grid_is_complete_resumes_and_repeats(study, tmp_path, monkeypatch):
    methods = [
        "--methods",
        "SFT",
        "para",
        "both",
        "distill",
        "SFT, equal tokens",
        "misses",
        "anneal",
        "succ",
        "no MISO",
    ]
    first = study("a", *methods)
    assert "Not finished: none" in first
    for method in methods[1:]:
        assert f"\n| {method} | 0.0001 |" in first, first
    assert "Difference to SFT, equal tokens" in first and "| IFEval [S]I |" in first and "Flat [S]I" in first

    (tmp_path / "a" / "para.jsonl").unlink()  # a study that was killed before this method
    with (tmp_path / "a" / "sft.jsonl").open("a") as file:
        file.write('{"key": "half a reco')
    trained = []
    finetune = grid.finetune
    monkeypatch.setattr(
        grid,
        "finetune",
        lambda base, tokenizer, run, *rest: trained.append(run) or finetune(base, tokenizer, run, *rest),
    )
    assert study("a", *methods) == first
    assert [run.method for run in trained] == ["para"]
    assert study("b", "--methods", "SFT", "para") == study("a", "--methods", "SFT", "para")
    assert "Not finished: fid" in study("a", "--methods", "SFT", "fid", "--report")


def test_a_model_without_a_chat_template_is_refused(study, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="without a chat template"):
        study("a", "--methods", "SFT")
