"""Rows of several answers on a model: loss and gradients are those of one row per answer and context."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.support.conversations import TEMPLATES, assistant, tokenizer_for, user
from tests.support.models import tiny_model
from tests.support.rows_oracle import parts_of, trainer_by_rows
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.segments import decode

TOLERANCE = 512 * torch.finfo(torch.float32).eps
THINGS = ["the sea", "the sky", "a ship", "the harbour", "an old sailor"]


def turns(start, count, thinking=True):
    messages = []
    for i in range(start, start + count):
        thing = THINGS[i % len(THINGS)]
        thought = f"<think>\nIs {thing} blue?\n</think>\n\n" if thinking else ""
        messages += [user(f"Tell me of {thing}, please."), assistant(f"{thought}I see {thing}.")]
    return messages


CONVERSATIONS = [{"messages": turns(i, 1 + i % 3)} for i in range(6)]
DEMONSTRATIONS = [
    {
        "prompt": [*turns(i, i % 3), user("Describe the sea.")],
        "constraints": ["Rhyme!", "Use no commas.", "Be brief."][: i % 4],
        "completion": [assistant("Blue and free.")],
    }
    for i in range(6)
]
COMPLETIONS = [
    {
        "prompt": [user(f"Describe {thing}.")],
        "constraints": ["Rhyme!", "Be brief."],
        "completions": [[assistant("Blue and free.")], [assistant(f"It is {thing}.")], [assistant("Blue.")]],
    }
    for thing in THINGS
]
ROWS = {"conversations": CONVERSATIONS, "demonstrations": DEMONSTRATIONS, "completions": COMPLETIONS}


@pytest.fixture(scope="module")
def qwen3():
    """Qwen 3's template, which strips the thinking of earlier turns."""
    return tokenizer_for(TEMPLATES["qwen3"])


def make_trainer(rows, tokenizer, make_config, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    model = tiny_model("llama", **sizes)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1  # makes attention far from uniform
    args = make_config(max_length=400, shuffle_dataset=False, **options)
    return MISOSFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("conversations", {"chunk_probs": [1.0]}),
        ("conversations", {"chunk_probs": [0.4, 0.3, 0.3]}),
        ("conversations", {"chunk_probs": [0.4, 0.3, 0.3], "packing": True, "context_weighting": "fid"}),
        ("conversations", {"chunk_probs": [0.0, 1.0], "share_prefixes": False, "gradient_checkpointing": True}),
        ("demonstrations", {"train_turns": "all"}),
        ("demonstrations", {"train_turns": "all", "packing": True, "full_context_weight": 0.7}),
        ("demonstrations", {"train_turns": "all", "share_prefixes": False, "context_weighting": "vanilla"}),
        ("demonstrations", {"train_turns": "all", "context_mode": "succ", "chunk_probs": [0.5, 0.5]}),
        ("completions", {}),
        ("completions", {"output_positions": "after_longest", "gradient_checkpointing": True}),
        ("completions", {"context_mode": "succ", "chunk_probs": [0.3, 0.7]}),
    ],
)
@pytest.mark.parametrize("batches", [1, 2])
def test_loss_and_gradients_are_those_of_one_row_per_answer_and_context(batches, kind, options, qwen3, make_config):
    trainer = make_trainer(ROWS[kind], qwen3, make_config, **options)
    rows = list(trainer.train_dataset)
    loss, gradients, mixed = trainer_by_rows(trainer, rows)
    examples = [example for row in rows for example in decode(row["miso_layout"])]
    assert any(len(example.outputs) > 1 for example in examples) or "demonstrations" in kind or not mixed
    assert bool(mixed) == (options.get("chunk_probs") != [1.0])

    batches = [trainer.data_collator(rows[i::batches]) for i in range(min(batches, len(rows)))]
    total = sum((batch["labels"] != -100).sum() for batch in batches)
    trainer.model.zero_grad()
    trainer.model.train()
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=total) for batch in batches]
    for one in losses:
        one.backward()
    assert sum(one.item() for one in losses) == pytest.approx(loss, rel=TOLERANCE)
    for name, parameter in trainer.model.named_parameters():
        worst = (parameter.grad - gradients[name]).abs().max().item()
        assert worst <= TOLERANCE * gradients[name].abs().max().item(), name


def labelled(dataset):
    return sum(sum(label != -100 for label in labels) for labels in dataset["labels"])


def test_a_script_of_sft_that_swaps_the_trainer_trains_as_many_tokens(tmp_path, caplog):
    """Conversations, LoRA, assistant_only_loss, packing and evaluation, as users of TRL write them."""
    tokenizer = tokenizer_for(TEMPLATES["qwen3"])
    conversations = [{"messages": turns(i, 1 + i % 3, thinking=False)} for i in range(24)]
    found = {}
    for trainer_class, config_class in ((SFTTrainer, SFTConfig), (MISOSFTTrainer, MISOSFTConfig)):
        args = config_class(
            output_dir=str(tmp_path / trainer_class.__name__),
            assistant_only_loss=True,
            packing=True,
            eval_packing=False,
            max_length=256,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=2,
            per_device_train_batch_size=1,
            learning_rate=1e-4,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = trainer_class(
            tiny_model("llama", vocab_size=len(tokenizer)),
            args,
            train_dataset=Dataset.from_list(conversations[:20]),
            eval_dataset=Dataset.from_list(conversations[20:]),
            processing_class=deepcopy(tokenizer),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        found[trainer_class] = labelled(trainer.train_dataset), labelled(trainer.eval_dataset)
        trainer.train()
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert found[MISOSFTTrainer] == found[SFTTrainer]
    assert found[SFTTrainer][0] > 200


def test_turns_that_do_not_fit_are_counted_and_the_others_trained(qwen3, make_config, caplog):
    options = {"chunk_probs": [1.0]}
    whole = make_trainer([{"messages": turns(0, 3)}], qwen3, make_config, **options).train_dataset[0]
    path = max(map(len, (parts.output for parts in parts_of(whole))))
    args = make_config(max_length=path - 25, **options)
    model = tiny_model("llama", vocab_size=len(qwen3))
    caplog.clear()
    trainer = MISOSFTTrainer(
        model, args, train_dataset=Dataset.from_list([{"messages": turns(0, 3)}]), processing_class=qwen3
    )
    (row,) = trainer.train_dataset
    assert 0 < labelled(trainer.train_dataset) < sum(label != -100 for label in whole["labels"])
    assert max(len(parts.output) for parts in parts_of(row)) <= path - 25
    assert "Cut" in caplog.text and "1 of 1 rows of the train dataset" in caplog.text
