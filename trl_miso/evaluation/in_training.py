"""Standard inference with a model under training: prompts are shared among processes, and training continues bit for bit."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers.utils.logging import tqdm

from trl_miso.attention.support import base_of
from trl_miso.evaluation.greedy import greedy_responses

T = TypeVar("T")


def respond_in_training(
    trainer: Any, prompts: Sequence[list[int]], batch_size: int, max_new_tokens: int, judge: Callable[[int, str], T]
) -> list[T]:
    """Generate greedy responses to prompts (token ids) with the trainer's current model, and judge each in the process that generated it.

    The responses equal, for any number of processes, `model.generate` on the prompts in batches of `batch_size`, padded on the left,
    with the model's ordinary attention and without dropout. The model's mode and all random states are restored.

    Args:
        judge: Function of a prompt's number (from 0) and its response. Its result has to be picklable.

    Returns:
        The results of `judge`, one per prompt, the same on every process.

    Raises:
        RuntimeError: On every process, if one process fails. Under FSDP and DeepSpeed, whose forwards need all processes, the error
            of the failing process is raised there, unchanged.
    """
    processes = trainer.accelerator.num_processes
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    batches = [range(len(prompts))[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    own_batches = batches[trainer.accelerator.process_index :: processes]
    turns = range(ceil(len(batches) / processes))
    results: dict[int, T] = {}
    failure: Exception | None = None
    show_progress = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    with _inference(trainer) as model:
        for turn in tqdm(turns, "Responding", leave=False, disable=not show_progress):
            has_batch = turn < len(own_batches) and failure is None
            # A sharded forward needs all processes: one that has no batch left repeats the last one.
            batch = own_batches[turn] if has_batch else batches[-1]
            try:
                if has_batch or sharded:
                    texts = _generate(trainer, model, [prompts[number] for number in batch], max_new_tokens, sharded)
                    if has_batch:
                        results |= {number: judge(number, text) for number, text in zip(batch, texts, strict=True)}
            except Exception as error:
                if sharded:
                    raise
                failure = error
            trainer.leave_if_told()
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    all_results: dict[int, T] = {}
    for process_results, process_failure in gather_object([(results, message)]):
        if process_failure is not None:
            raise RuntimeError(
                f"Got {process_failure} while the model responded to held-out prompts, expected responses. Fix: lower batch_size or "
                "max_new_tokens of MISOEvalCallback if memory ran out, and train again with resume_from_checkpoint=True."
            ) from failure
        all_results |= process_results
    return [all_results[number] for number in range(len(prompts))]


def _generate(trainer: Any, model: Any, prompts: list[list[int]], max_new_tokens: int, sharded: bool) -> list[str]:
    tokenizer, device = trainer._tokenizer, trainer.accelerator.device
    responses = greedy_responses(
        model, tokenizer, prompts, max_new_tokens, device=device, use_cache=True, synced_gpus=sharded
    )
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


@contextmanager
def _inference(trainer: Any) -> Iterator[Any]:
    """Yield the transformers model, without adapters' wrapper, in evaluation mode and in training's precision.

    Evaluation mode also turns gradient checkpointing off.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    base, training = base_of(model), model.training
    model.eval()
    try:
        with torch.no_grad(), preserve_rng(), nullcontext() if base is model else _as_wrapped(trainer, model):
            yield base
    finally:
        model.train(training)


@contextmanager
def _as_wrapped(trainer: Any, model: Any) -> Iterator[None]:
    """Do for the base model what a forward of its adapters' wrapper does: autocast, and gather the wrapper's FSDP2 weights."""
    sharded = isinstance(model, FSDPModule)
    with trainer.accelerator.autocast():
        if sharded:
            model(input_ids=torch.tensor([[trainer._tokenizer.pad_token_id]], device=trainer.accelerator.device))
            model.unshard()
        try:
            yield
        finally:
            if sharded:
                model.reshard()


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (CPU and CUDA) on exit."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
