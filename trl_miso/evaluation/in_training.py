"""Standard inference with a model that is being trained: every process answers its part, then training goes on as if nothing had been."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers.utils.logging import tqdm

from trl_miso.attention.support import base_of
from trl_miso.evaluation.backends import stops

T = TypeVar("T")


def respond_in_training(
    trainer: Any, prompts: Sequence[list[int]], batch_size: int, max_new_tokens: int, judge: Callable[[int, str], T]
) -> list[T]:
    """Greedy responses of the trainer's model, as it is now, to prompts of token ids, judged where they are made.

    Equals, for any number of processes, `model.generate` on the prompts in batches of `batch_size`, padded on the left, with the
    model's ordinary attention and without dropout. The model's mode, the tokenizer and all random states are left as they were.

    Args:
        judge: Called with a prompt's number (from 0) and its response; what it returns has to be picklable.

    Returns:
        What `judge` returned for each prompt, on every process the same.

    Raises:
        RuntimeError: If a process fails, on every process (under FSDP and DeepSpeed, whose forwards are common to all, on that one).
    """
    processes = trainer.accelerator.num_processes
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    batches = [range(len(prompts))[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    own = batches[trainer.accelerator.process_index :: processes]
    # A forward that all processes share needs all of them: who has no batch left takes the last one along.
    idle = ceil(len(batches) / processes) - len(own) if sharded else 0
    made: dict[int, T] = {}
    failure: Exception | None = None
    shown = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    with _inference(trainer) as model, tqdm(own, "Responding", leave=False, disable=not shown) as bar:
        try:
            for turn, batch in enumerate(chain(bar, batches[-1:] * idle)):
                asked = [prompts[number] for number in batch]
                responses = _generate(trainer, model, asked, max_new_tokens, sharded)
                if turn < len(own):
                    made |= {number: judge(number, text) for number, text in zip(batch, responses, strict=True)}
        except Exception as error:
            if sharded:
                raise
            failure = error
    outcomes = gather_object([(made, None if failure is None else f"{type(failure).__name__}: {failure}")])
    for _, failed in outcomes:
        if failed is not None:
            raise RuntimeError(
                f"Got {failed} while the model responded to held-out prompts, expected responses. Fix: lower batch_size or "
                "max_new_tokens of MISOEvalCallback if memory ran out, and train again with resume_from_checkpoint=True."
            ) from failure
    everything = {number: judged for part, _ in outcomes for number, judged in part.items()}
    return [everything[number] for number in range(len(prompts))]


@contextmanager
def _inference(trainer: Any) -> Iterator[Any]:
    """The transformers model itself in evaluation mode, in which gradient checkpointing is off, and in training's precision."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    within, training = base_of(model), model.training
    model.eval()
    try:
        with torch.no_grad(), preserve_rng(), nullcontext() if within is model else _adapted(trainer, model):
            yield within
    finally:
        model.train(training)


@contextmanager
def _adapted(trainer: Any, model: Any) -> Iterator[None]:
    """What a forward of the adapters' wrapper does, of which generation calls the model within: casts, and FSDP2's own weights."""
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


def _generate(trainer: Any, model: Any, prompts: Sequence[list[int]], max_new_tokens: int, sharded: bool) -> list[str]:
    tokenizer, device = trainer._tokenizer, trainer.accelerator.device
    width = max(map(len, prompts))
    rows = [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    tokens = model.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        synced_gpus=sharded,
        **stops(model, tokenizer),
    )
    return tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """What is drawn within changes nothing after it: dropout and sampling of training go on as they would have."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
