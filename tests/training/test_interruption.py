"""NaN losses and gradients, SIGTERM, and ranks that differ: every rank stops in the same step, or goes on."""

import ast
import os
import signal
import socket

import pytest
import torch
from datasets import Dataset

from tests.support import rank_runs
from tests.support.models import tiny_model
from tests.support.processes import PROCESSES
from trl_miso import MISOSFTTrainer
from trl_miso.training.interruption import NonFiniteError

POISON = 500  # a token id that occurs in no text


@pytest.fixture
def rows(para_dataset, tokenizer):
    return para_dataset.select(range(12))


@pytest.mark.parametrize("packing", [False, True])
def test_nan_loss(rows, tokenizer, make_config, packing, tmp_path):
    """A token of row 7 has a NaN embedding: the error names the rows of its batch, and training stops before that step."""
    config = make_config(
        per_device_train_batch_size=1 if packing else 2,
        packing=packing,
        max_length=400,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_steps=-1,
        save_strategy="steps",
        save_steps=100,
        train_sampling_strategy="sequential",
    )
    trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=rows, processing_class=tokenizer)

    def poisoned(row):
        return row | {"input_ids": [*row["input_ids"][:-1], POISON]} if 7 in row["miso_row"] else row

    trainer.train_dataset = trainer.train_dataset.map(poisoned)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[POISON] = torch.nan
    trainer.model.lm_head.weight = torch.nn.Parameter(trainer.model.lm_head.weight.detach().nan_to_num())
    batches = list(trainer.get_train_dataloader())
    (nan_batch,) = [i for i, batch in enumerate(batches) if 7 in batch["miso_rows"].tolist()]
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert f"from rows {sorted(set(batches[nan_batch]['miso_rows'].tolist()))} of the training data" in str(
        caught.value
    )
    assert trainer.state.global_step == nan_batch // 2
    assert len(caught.value.__notes__) == 1


def test_nan_gradient(rows, tokenizer, make_config, tmp_path):
    """The error names the step's rows. The weights of the step before are saved, and training resumes from them."""
    config = make_config(max_steps=3, save_strategy="steps", save_steps=100, output_dir=str(tmp_path / "out"))
    trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=rows, processing_class=tokenizer)
    at_step = []
    weight = trainer.model.lm_head.weight

    def spoil(gradient):
        at_step.append(trainer.state.global_step)
        return gradient * torch.nan if trainer.state.global_step == 1 else gradient

    hook = weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"gradients of norm nan from rows \[\d+, \d+, \d+, \d+\]") as caught:
        trainer.train()
    assert caught.value.__notes__ == ["Saved checkpoint-1, the weights before the error."]
    assert at_step == [0, 1] and all(p.isfinite().all() for p in trainer.model.parameters())
    hook.remove()
    again = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=rows, processing_class=tokenizer)
    again.train(resume_from_checkpoint=True)
    uninterrupted = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=rows, processing_class=tokenizer)
    uninterrupted.train()
    for p, q in zip(again.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_row_numbers_are_those_of_the_raw_rows(rows, tokenizer, make_config):
    """Dropped rows and packing do not shift them."""
    empty = rows[0] | {"completion": [{"role": "assistant", "content": ""}]}
    dataset = Dataset.from_list([empty, *rows, empty])
    for packing in (False, True):
        config = make_config(packing=packing, max_length=400)
        trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=dataset, processing_class=tokenizer)
        seen = [n for batch in trainer.get_train_dataloader() for n in batch["miso_rows"].tolist()]
        assert sorted(seen) == list(range(1, 13))


def two_ranks(scenario, folder):
    """Run a scenario of rank_runs.py on two ranks; return the result of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=rank_runs.start, args=(rank, port, scenario, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, "a rank hangs" if process.exitcode is None else "a rank failed"
    return [ast.literal_eval((folder / str(rank)).read_text()) for rank in (0, 1)]


def test_nan_loss_on_one_rank(tmp_path):
    """Both ranks stop in the same step, name that rank's rows and save the weights of the step before."""
    ranks = two_ranks("nan", tmp_path)
    assert "Got a non-finite loss from rows [6, 7] of the training data" in ranks[0][0]
    assert "Got a loss of nan from rows [6, 7] of the training data" in ranks[1][0]
    for _, notes, step, saved in ranks:
        assert (notes, step, saved) == (["Saved checkpoint-1, the weights before the error."], 1, ["checkpoint-1"])


def test_sigterm_on_one_rank(tmp_path):
    assert two_ranks("sigterm", tmp_path) == [(143, 2, ["checkpoint-2"])] * 2


def test_streams_give_all_ranks_the_same_number_of_batches(tmp_path):
    (batches, steps), (other_batches, other_steps) = two_ranks("stream", tmp_path)
    assert len(batches) == len(other_batches) == 6 and steps == other_steps == 9
    rows = [row for batch in (*batches, *other_batches) for row in batch]
    assert set(rows) == set(range(23)) and len(rows) == 24  # one is repeated, to fill the last batch


def test_verification_under_ddp(tmp_path):
    first, second = two_ranks("verify", tmp_path)
    assert first == second and {status for _, status, _ in first} == {"passed"}


def test_verification_of_a_sharded_model(tmp_path):
    first, second = two_ranks("sharded", tmp_path)
    assert first == second and first[1].startswith("FSDP")
    assert {status for _, status in first[0]} == {"passed"}


def test_rows_without_labels_or_numbers(tokenizer, make_config):
    """Rows that the user tokenized train without row numbers, and the checks use rows that have labels."""
    rows = [{"input_ids": list(range(5, 15)), "labels": [-100] * 10}] * 2 + [{"input_ids": list(range(5, 15))}] * 4
    dataset = Dataset.from_list([{"labels": row["input_ids"]} | row for row in rows])
    config = make_config(
        dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="steps", save_steps=1, verify=True
    )
    trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert {check.status for check in trainer.verification} == {"passed", "skipped"}


def test_the_script_s_own_sigterm_handler_stays(rows, tokenizer, make_config):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer = MISOSFTTrainer(tiny_model("llama"), make_config(), train_dataset=rows, processing_class=tokenizer)
        trainer.add_callback(rank_runs.AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1] and trainer.state.global_step == 2
