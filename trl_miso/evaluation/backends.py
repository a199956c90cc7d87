"""Backends that answer prompts: transformers, vLLM, or an OpenAI-compatible server.

A backend is a generator. It takes all prompts and the numbers of the prompts that still need a response. It yields
(number, response, batch size) as responses come, with None for the batch size of a server; and Refused in place of a response if a server
refuses the prompt.

A prompt is the text of one user turn, or a conversation that ends with a user turn. A response is decoded greedily, to the prompt in the
model's chat template, without special tokens. A model's own penalties
(`generation_config.json`) hold in transformers and vLLM; a server applies those it was started with.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_peft_available

from trl_miso.evaluation.batch_size import default_batch_size
from trl_miso.evaluation.endpoint import Conversation, Endpoint, Refused
from trl_miso.evaluation.greedy import greedy_responses

logger = logging.getLogger(__name__)

Prompt = str | Conversation
Answers = Iterator[tuple[int, str | Refused, int | None]]


def _transformers(
    model: str, prompts: Sequence[Prompt], missing: Sequence[int], max_new_tokens: int, *, batch_size: int | None
) -> Answers:
    """Answer the longest prompts first: if memory is too small, the first batch shows it, and the time left is not underestimated.

    When memory runs out, the batch is halved and so are all that follow.
    """
    tokenizer, loaded = _load(model)
    conversations = [_conversation(prompt) for prompt in prompts]
    ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]), reverse=True)
    longest = len(ids[order[0]])
    check_length(loaded.config, longest, max_new_tokens)
    size = batch_size or default_batch_size(loaded, longest, max_new_tokens)
    waiting = set(missing)
    while waiting:
        batch = next(_batches(order, waiting, size))
        tokens = _tokens(loaded, tokenizer, [ids[number] for number in batch], max_new_tokens)
        if tokens is None:
            release_memory()
            while size >= len(batch):
                size //= 2
            logger.warning("Memory ran out with %d prompts in a batch. Continuing with %d.", len(batch), size)
            continue
        for number, response in zip(batch, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            yield number, response, size
        waiting.difference_update(batch)


def _tokens(model: Any, tokenizer: Any, prompts_ids: list[list[int]], max_new_tokens: int) -> list[list[int]] | None:
    """Return the responses to a batch; None if memory ran out, so that the error no longer keeps the batch's tensors alive."""
    try:
        with torch.inference_mode():
            return greedy_responses(model, tokenizer, prompts_ids, max_new_tokens)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(prompts_ids) == 1:
            raise ValueError(
                f"Got too little memory on {model.device} for one prompt of {len(prompts_ids[0])} tokens, expected enough for "
                f"max_new_tokens={max_new_tokens} more. Fix: lower max_new_tokens, or free memory on the device."
            ) from error
        return None


def _vllm(
    model: str, prompts: Sequence[Prompt], missing: Sequence[int], max_new_tokens: int, *, batch_size: int
) -> Answers:
    """Give the responses of `_transformers`: SamplingParams leaves out special tokens by default, but needs the model's penalty."""
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise ImportError(
            f"Got no vLLM that can be imported ({error}), expected it for --backend vllm. Fix: install it as its documentation says. If "
            "it needs another torch, install it in an environment of its own, serve the model from there with `vllm serve`, and use "
            "--backend openai with --base_url; or use --backend transformers."
        ) from error
    loaded = vllm.LLM(model)
    penalty = loaded.get_default_sampling_params().repetition_penalty
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_new_tokens, repetition_penalty=penalty)
    for batch in _batches(range(len(prompts)), missing, batch_size):
        outputs = loaded.chat([_conversation(prompts[number]) for number in batch], sampling, use_tqdm=False)
        for number, output in zip(batch, outputs, strict=True):
            yield number, output.outputs[0].text, batch_size


def _openai(
    model: str,
    prompts: Sequence[Prompt],
    missing: Sequence[int],
    max_new_tokens: int,
    *,
    base_url: str | None,
    concurrency: int,
) -> Answers:
    """Yield answers and refusals; raise the first other error after all requests under way have been answered."""
    endpoint = Endpoint(model, base_url, max_tokens=max_new_tokens, concurrency=concurrency)
    failure: tuple[int, ValueError] | None = None
    for index, answer in endpoint.ask_all(_conversation(prompts[number]) for number in missing):
        if isinstance(answer, ValueError) and not isinstance(answer, Refused):
            failure = failure or (missing[index], answer)
        else:
            yield missing[index], answer, None
    if failure:
        number, error = failure
        raise ValueError(
            f"{error} This was prompt {number + 1}. The responses that came are kept, and the same command resumes from there."
        ) from error


BACKENDS: dict[str, Callable[..., Answers]] = {"transformers": _transformers, "vllm": _vllm, "openai": _openai}


def check_length(config: Any, longest: int, max_new_tokens: int) -> None:
    """Raise ValueError if the longest prompt (in tokens) and its response need more positions than a model of this config has."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        lower = f"set max_new_tokens to {limit - longest} or less, or " if limit > longest else ""
        raise ValueError(
            f"Got max_new_tokens={max_new_tokens} with a prompt of {longest} tokens, expected at most {limit} together: the model has no more "
            f"positions. Fix: {lower}leave long prompts out."
        )


def _batches(order: Sequence[int], missing: Collection[int], size: int) -> Iterator[list[int]]:
    """Yield the batches of an uninterrupted run, which answers all prompts in this order, that hold a missing prompt.

    A batch is answered again as a whole, since its shape decides how logits are rounded.
    """
    for first in range(0, len(order), size):
        batch = list(order[first : first + size])
        if not set(missing).isdisjoint(batch):
            yield batch


def _conversation(prompt: Prompt) -> Conversation:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _load(model: str) -> tuple[Any, Any]:
    """Load the tokenizer and the model: in the dtype of its files, on the accelerator if there is one."""
    if (Path(model) / "adapter_config.json").exists() and not is_peft_available():
        raise ImportError(
            f"Got {model}, which holds adapters, without peft. Expected peft to be installed. Fix: pip install 'trl-miso[peft]'."
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template:
        raise ValueError(
            f"Got {model}, whose tokenizer has no chat template. Expected a model for chats. Fix: save the tokenizer with the template of "
            "its training, or score responses of your own without --model."
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return tokenizer, AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
