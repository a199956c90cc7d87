"""The package on real weights: SmolLM2-135M-Instruct, float32, real text. Exactness, training, generation, and section 4.3."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.real_models import real_model, why_missing
from benchmarks.common.requests import multi_constraint_rows, one_constraint_contexts
from benchmarks.dilution import samples_of
from tests.generation.test_generation import assert_greedy, packed_logits, rows_logits
from tests.support.conversations import assistant, user
from tests.support.rows_oracle import trainer_by_rows
from trl_miso import MISOSFTTrainer
from trl_miso.generation import miso_generate
from trl_miso.report.dilution import WEIGHTINGS, equation_6, masses
from trl_miso.report.measure import Mixture
from trl_miso.report.meters import measuring

pytestmark = pytest.mark.skipif(why_missing("smollm2") is not None, reason=f"SmolLM2 {why_missing('smollm2')}")

EPS = torch.finfo(torch.float32).eps
# Relative to the largest gradient of a parameter. Rounding passes 30 layers in either direction: the worst found was 405 eps, in a
# norm's weight, and 2 eps for the loss. Sibling tests on two layers allow 512.
TOLERANCE = 2048 * EPS
CONVERSATION = [
    user("My bread never rises. What am I doing wrong?"),
    assistant("The water may be too hot: above fifty degrees it kills the yeast."),
    user("It was only warm. Anything else?"),
    assistant("Then give it more time. In a cold kitchen dough can take three hours."),
]


@pytest.fixture(scope="module")
def folder():
    return real_model("smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def model(loaded):
    """The model, left as it was loaded; nothing here may change its weights."""
    implementation = loaded.config._attn_implementation
    yield loaded.eval()
    loaded.set_attn_implementation(implementation)
    loaded.zero_grad()


def test_verification_passes(model, tokenizer, make_config):
    rows = multi_constraint_rows(constraints=1).select([2, 3])
    trainer = MISOSFTTrainer(model, make_config(), train_dataset=rows, processing_class=tokenizer)
    checks = trainer.verify(2)
    assert {check.name: (check.measured, check.budget) for check in checks if check.status != "passed"} == {}
    assert len(checks) == 9


ROWS = {
    "para": (multi_constraint_rows(constraints=2).select([2]), {}),
    "succ": (
        Dataset.from_list([{"messages": [*CONVERSATION[:2]]}]),
        {"chunk_probs": [0.0, 0.0, 1.0], "context_weighting": "fid"},
    ),
    "conversation": (
        Dataset.from_list([{"messages": CONVERSATION}]),
        {"chunk_probs": [0.0, 1.0], "train_turns": "all"},
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_loss_and_gradients_are_those_of_one_row_per_context(kind, model, tokenizer, make_config):
    rows, options = ROWS[kind]
    trainer = MISOSFTTrainer(model, make_config(**options), train_dataset=rows, processing_class=tokenizer)
    prepared = list(trainer.train_dataset)
    loss, gradients, mixed = trainer_by_rows(trainer, prepared)
    assert mixed == (2 if kind == "conversation" else 1)
    batch = trainer.data_collator(prepared)
    model.zero_grad()
    found = trainer.compute_loss(model, batch, num_items_in_batch=(batch["labels"] != -100).sum())
    found.backward()
    assert found.item() == pytest.approx(loss, rel=16 * EPS)
    for name, parameter in model.named_parameters():
        worst = (parameter.grad - gradients[name]).abs().max().item()
        assert worst <= TOLERANCE * gradients[name].abs().max().item(), name


def test_a_few_steps_lower_the_loss_and_the_saved_model_needs_no_package(folder, tokenizer, make_config, tmp_path):
    rows = multi_constraint_rows(constraints=2).select([2, 10])
    config = make_config(max_steps=3, per_device_train_batch_size=2, learning_rate=5e-5, lr_scheduler_type="constant")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = MISOSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3

    trainer.save_model(tmp_path / "saved")
    request = [user("Name a dish for a cold evening.")]
    answer = plain_answer(model, tokenizer, request, 8)
    assert len(answer.split()) > 2
    code = f"""
import sys
sys.modules["trl_miso"] = None  # importing it raises
from transformers import pipeline
writer = pipeline("text-generation", {str(tmp_path / "saved")!r}, device="cpu", dtype="float32")
print(writer({request!r}, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"], end="")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer


def plain_answer(model, tokenizer, messages, tokens):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.set_attn_implementation("sdpa")
    out = model.eval().generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generation_from_one_context_is_plain_generation(model, tokenizer):
    (context, *_) = one_constraint_contexts()[3]["contexts"]
    expected = plain_answer(model, tokenizer, context, 8)
    assert len(expected.split()) > 3
    for weighting in WEIGHTINGS:
        out = miso_generate(model, tokenizer, [context], weighting=weighting, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(out[0], skip_special_tokens=True) == expected


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_generation_from_several_contexts_equals_recomputation(weighting, model, tokenizer):
    """Each token is the likeliest after those before it: by a forward without a cache, and by one row per context."""
    row, sample = one_constraint_contexts()[3], samples_of(tokenizer, 4)[3]
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = miso_generate(model, tokenizer, row["contexts"][:3], weighting=weighting, **options)
    contexts, atol = sample.contexts[:3], 1e-3  # of logits up to 31; found: 5e-5
    assert_greedy(out, sample.head, lambda output: rows_logits(model, contexts, output, weighting), atol)
    assert_greedy(out, sample.head, lambda output: packed_logits(model, contexts, output, weighting), atol)


def test_the_outputs_share_of_attention(model, tokenizer):
    """Section 4.3: contexts that are added leave the output's share as it is under uniform and fid, and lower it under vanilla.

    Margins leave room around one row's figures, in per cent for 1, 2, 4 and 8 contexts: uniform 39.5, 39.9, 40.5, 40.6; fid the
    same to 0.1; vanilla 39.5, 33.5, 28.3, 23.2; eq. 6 39.5, 29.6, 21.2, 14.3. Eq. 6 is exact where the masses are vanilla's own:
    in the first layer, whose input no weighting has changed. Later layers of the vanilla mixture attend to the output a little more.
    """
    sample = samples_of(tokenizer, 2)[1]
    with measuring(model, sample.longest) as support:
        mixture = Mixture(model, support, "successive")
        (alone,) = (1 - mixture.shares(sample, [1.0], "uniform")).mean((0, 1, 2))
        assert 0.2 < alone < 0.6
        before = alone
        for n in (2, 4, 8):
            share = {weighting: mixture.shares(sample, [1 / n] * n, weighting) for weighting in WEIGHTINGS}
            left = {weighting: 1 - share[weighting].sum(-1) for weighting in WEIGHTINGS}
            by_equation_6 = equation_6(masses(share["uniform"], np.full(n, 1 / n), "uniform"))
            assert left["uniform"].mean() == pytest.approx(alone, abs=0.03)
            assert left["fid"].mean() == pytest.approx(alone, abs=0.03)
            assert left["vanilla"].mean() < before - 0.03
            assert 0 < left["vanilla"].mean() - by_equation_6.mean() < 0.15
            np.testing.assert_allclose(left["vanilla"][0], by_equation_6[0], atol=1e-5)
            before = left["vanilla"].mean()
