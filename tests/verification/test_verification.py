"""Verification: exact models pass, each fault fails its check, and training stays the same bit for bit."""

import sys
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.attention import kernels, rotation, transformers_attention
from trl_miso.cli.main import main
from trl_miso.data import collator
from trl_miso.segments import decode
from trl_miso.verification import checks
from trl_miso.verification.rows import choose, example_of

NAMES = [
    "loss matches the model's logits",
    "one context matches plain attention",
    "packing changes nothing",
    "prefix sharing changes nothing",
    "kernel matches the definition",
    "context order changes nothing",
    "examples do not see each other",
    "no loss across boundaries",
    "every token carries gradient",
]

BF16 = {"dtype": torch.bfloat16}


@pytest.fixture
def make_trainer(para_dataset, tokenizer, make_config):
    def make(model="llama", dtype=torch.float32, peft_config=None, **options):
        options = {"context_mode": "para"} | options
        if options["context_mode"] == "succ":
            options["chunk_probs"] = [0.2, 0.4, 0.4]
        return MISOSFTTrainer(
            tiny_model(model, dtype) if isinstance(model, str) else model,
            make_config(**options),
            train_dataset=para_dataset.select(range(16)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def statuses(trainer):
    return {check.name: check.status for check in trainer.verification}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {}),
        ("llama", BF16),
        ("mixtral", BF16),
        ("gemma2", BF16 | {"max_length": 256}),  # whose window binds
        ("llama", {"context_weighting": "fid"}),
        ("llama", {"context_weighting": "vanilla"}),
        ("llama", {"full_context_weight": 0.5, "packing": True}),
        ("llama", {"output_positions": "after_longest"}),
        ("llama", {"context_mode": "succ"}),
        ("qwen3", {"pad_to_multiple_of": 64}),
        ("smollm3", {}),
        ("phi", {}),
    ],
)
def test_exact_models_pass(make_trainer, model, options):
    trainer = make_trainer(model, **options)
    checked = trainer.verify(6)
    assert [check.name for check in checked] == NAMES
    if model == "gemma2":
        window = trainer.model.config.sliding_window
        assert max(example_of(row).num_positions for row in choose(trainer.train_dataset, 6)) > window
    assert {check.name: (check.measured, check.budget) for check in checked if check.status != "passed"} == {}


def answer(text):
    return {"role": "assistant", "content": text}


TURNS = [("sea", "blue"), ("sky", "grey"), ("ship", "old")]
CONVERSATIONS = [
    [m for x, y in TURNS[: 1 + i % 3] for m in ({"role": "user", "content": f"The {x} of {i}?"}, answer(f"It is {y}."))]
    for i in range(8)
]
# Earlier turns lose a part, as thinking is stripped.
STRIPS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[6:] }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (None, {"chunk_probs": [0.5, 0.5]}),
        (STRIPS, {"chunk_probs": [1.0]}),
        (STRIPS, {"chunk_probs": [0.4, 0.3, 0.3], "packing": True, "max_length": 128}),
        (STRIPS, {"chunk_probs": [0.4, 0.3, 0.3], "share_prefixes": False}),
    ],
)
def test_conversations_pass(template, options, tokenizer, make_config):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    rows = Dataset.from_list([{"messages": messages} for messages in CONVERSATIONS])
    trainer = MISOSFTTrainer(
        tiny_model("llama"), make_config(**options), train_dataset=rows, processing_class=tokenizer
    )
    examples = [example for row in trainer.train_dataset for example in decode(row["miso_layout"])]
    assert max(len(example.segments) for example in examples) > 2
    checked = trainer.verify(6)
    assert {
        check.name: check.note or (check.measured, check.budget) for check in checked if check.status != "passed"
    } in (
        {},
        {"prefix sharing changes nothing": "share_prefixes is off"},
        {
            "context order changes nothing": "no row has several contexts",
            "prefix sharing changes nothing": "no row has several contexts",
        },
    )


@pytest.mark.parametrize("mode", ["single", "augment"])
def test_checks_that_do_not_apply_are_skipped(make_trainer, mode):
    trainer = make_trainer(context_mode=mode)
    trainer.verify()
    skipped = {"prefix sharing changes nothing", "context order changes nothing"}
    assert statuses(trainer) == {name: "skipped" if name in skipped else "passed" for name in NAMES}
    trainer = make_trainer(share_prefixes=False)
    trainer.verify()
    assert statuses(trainer) == {
        name: "skipped" if name == "prefix sharing changes nothing" else "passed" for name in NAMES
    }


def test_adapters_pass(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(r=2, target_modules="all-linear"))
    trainer.verify()
    assert set(statuses(trainer).values()) == {"passed"}


def _scaled_scores(monkeypatch):
    real = kernels.Cpu.forward

    def forward(self, q, k, v, call, options):
        return real(self, q * 1.1, k, v, call, options)

    monkeypatch.setattr(kernels.Cpu, "forward", forward)


def _no_rotation(monkeypatch):
    monkeypatch.setattr(rotation.ModelRotation, "__call__", lambda self, x, *args, **kwargs: x)


def _one_sequence(monkeypatch):
    """Let causal runs see the rows packed before them."""
    real = transformers_attention.miso_attention

    def attention(q, k, v, packed, *args):
        if not packed.num_mixed:
            packed.cu_seqlens_q = packed.cu_seqlens_k = packed.cu_seqlens_q[[0, -1]]
            packed.max_seqlen_q = packed.max_seqlen_k = len(q)
        return real(q, k, v, packed, *args)

    monkeypatch.setattr(transformers_attention, "miso_attention", attention)


def _labels_everywhere(monkeypatch):
    real = collator.MISODataCollator.__call__

    def call(self, rows):
        batch = real(self, rows)
        return batch | {"labels": batch["input_ids"]}

    monkeypatch.setattr(collator.MISODataCollator, "__call__", call)


def _uneven_weights(monkeypatch):
    """Weigh the contexts of every row by their places."""
    real = collator.MISODataCollator.__call__

    def call(self, rows):
        batch = real(self, rows)
        if "miso_branch_weight" in batch:
            weights = batch["miso_branch_weight"].view(torch.float64)
            weights *= 2.0 ** (torch.arange(len(weights)) % 3)
        return batch

    monkeypatch.setattr(collator.MISODataCollator, "__call__", call)


def _no_gradient_of_keys(monkeypatch):
    real = transformers_attention.miso_attention
    monkeypatch.setattr(
        transformers_attention, "miso_attention", lambda q, k, v, *args: real(q, k.detach(), v.detach(), *args)
    )


@pytest.mark.parametrize(
    ("break_it", "options", "failed"),
    [
        (_scaled_scores, {}, "kernel matches the definition"),
        (_scaled_scores, {"context_mode": "single"}, "one context matches plain attention"),
        (_no_rotation, {}, "prefix sharing changes nothing"),
        (_one_sequence, {"context_mode": "single"}, "packing changes nothing"),
        (_one_sequence, {"context_mode": "single"}, "examples do not see each other"),
        (_uneven_weights, {}, "context order changes nothing"),
        (_labels_everywhere, {}, "no loss across boundaries"),
        (_no_gradient_of_keys, {}, "every token carries gradient"),
        (_scaled_scores, BF16, "kernel matches the definition"),
        (_no_rotation, BF16, "prefix sharing changes nothing"),
        (_uneven_weights, BF16, "context order changes nothing"),
    ],
)
def test_a_fault_fails_its_check(make_trainer, monkeypatch, break_it, options, failed):
    trainer = make_trainer(**options)
    break_it(monkeypatch)
    with pytest.raises(ValueError, match="Nothing was trained"):
        trainer.verify()
    assert statuses(trainer)[failed] == "failed"


def test_a_head_with_more_than_a_projection_fails(make_trainer):
    """SFTTrainer computes its loss from hidden states and the output embeddings alone. This model's head has more layers."""
    trainer = make_trainer("modernbert-decoder")
    with pytest.raises(ValueError, match="Nothing was trained"):
        trainer.verify(2)
    assert {name for name, status in statuses(trainer).items() if status == "failed"} == {NAMES[0]}


def test_a_failed_check_refuses_training(make_trainer, monkeypatch):
    trainer = make_trainer(verify=True)
    before = [p.clone() for p in trainer.model.parameters()]
    _no_rotation(monkeypatch)
    with pytest.raises(ValueError, match=r"prefix sharing changes nothing +failed"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
    trainer.args.verify = False
    trainer.train()


def test_verification_does_not_change_training(make_trainer):
    """The weights after training are the same bit for bit, with random numbers in every step."""
    weights = []
    for verify in (False, True):
        torch.manual_seed(1)
        trainer = make_trainer(verify=verify, neftune_noise_alpha=5.0, max_steps=3)
        trainer.train()
        assert bool(trainer.verification) == verify
        weights.append([p.detach() for p in trainer.model.parameters()])
        assert trainer.model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_long_rows_skip_checks_that_need_much_memory(make_trainer, monkeypatch):
    """Dense scores and unshared prefixes would take far more memory than training."""
    monkeypatch.setattr(checks, "LONGEST", 20)
    trainer = make_trainer()
    trainer.verify(2)
    skipped = {"kernel matches the definition", "prefix sharing changes nothing", "context order changes nothing"}
    assert statuses(trainer) == {name: "skipped" if name in skipped else "passed" for name in NAMES}


def test_command(monkeypatch, capsys, tmp_path):
    """Prints a table of the checks on a recipe's own model and rows, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl-miso", "verify", "-n", "3", "--context_mode", "para"])
    main()
    output = capsys.readouterr().out
    assert all(name in output for name in NAMES) and "failed" not in output
    assert list(tmp_path.iterdir()) == []
    _scaled_scores(monkeypatch)
    with pytest.raises(SystemExit, match="trl-miso verify: Got a model on which MISO is not exact"):
        main()
