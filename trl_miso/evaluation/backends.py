"""What a model is asked with: transformers, vLLM, or an OpenAI-compatible server.

Each is a generator: of the prompts whose numbers are `missing` it yields (number, response) as they come, or why one is refused. Responses are greedy, to one
user turn in the model's chat template, without special tokens; a model's own penalties (generation_config.json) hold in the first
two, and in a server as it has been started.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_peft_available

from trl_miso.evaluation.endpoint import Endpoint, Refused

Answers = Iterator[tuple[int, str | Refused]]


def _hf(model: str, prompts: Sequence[str], missing: Sequence[int], max_new_tokens: int, *, batch_size: int) -> Answers:
    tokenizer, loaded = _load(model)
    asked = [_conversation(prompt) for prompt in prompts]
    tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    check_length(loaded.config, max(map(len, tokens)), max_new_tokens)
    for batch in _batches(len(prompts), missing, batch_size):
        responses = _generate(tokenizer, loaded, [prompts[number] for number in batch], max_new_tokens)
        yield from zip(batch, responses, strict=True)


def _vllm(
    model: str, prompts: Sequence[str], missing: Sequence[int], max_new_tokens: int, *, batch_size: int
) -> Answers:
    """As `_hf`, since SamplingParams leaves out special tokens, and takes a penalty only when it is given."""
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f"Got no vLLM that can be imported ({error}), expected it for --backend vllm. Fix: install it as its documentation says, "
            "in an environment of its own if its torch differs, serve the model from there with `vllm serve` and use --backend openai "
            "with --base_url; or use --backend hf."
        ) from error
    loaded = vllm.LLM(model)
    penalty = loaded.get_default_sampling_params().repetition_penalty
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_new_tokens, repetition_penalty=penalty)
    for batch in _batches(len(prompts), missing, batch_size):
        outputs = loaded.chat([_conversation(prompts[number]) for number in batch], sampling, use_tqdm=False)
        yield from zip(batch, (output.outputs[0].text for output in outputs), strict=True)


def _openai(
    model: str,
    prompts: Sequence[str],
    missing: Sequence[int],
    max_new_tokens: int,
    *,
    base_url: str | None,
    concurrency: int,
) -> Answers:
    """A prompt that stays without answer is an error when all the others that were asked have come; one that is refused is yielded."""
    endpoint = Endpoint(model, base_url, max_tokens=max_new_tokens, concurrency=concurrency)
    failure: tuple[int, ValueError] | None = None
    for at, answer in endpoint.ask_all(_conversation(prompts[number]) for number in missing):
        if isinstance(answer, ValueError) and not isinstance(answer, Refused):
            failure = failure or (missing[at], answer)
        else:
            yield missing[at], answer
    if failure:
        number, error = failure
        raise ValueError(
            f"{error} This was prompt {number + 1}; what came is kept, and the same command goes on there."
        ) from error


BACKENDS: dict[str, Callable[..., Answers]] = {"hf": _hf, "vllm": _vllm, "openai": _openai}


def check_length(config: Any, longest: int, max_new_tokens: int) -> None:
    """Refuse more tokens, of the longest prompt and its response, than a model of this config has positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        lower = f"set max_new_tokens to {limit - longest} or less, or " if limit > longest else ""
        raise ValueError(
            f"Got max_new_tokens={max_new_tokens} with a prompt of {longest} tokens, expected at most {limit} together: the model has no more "
            f"positions. Fix: {lower}leave long prompts out."
        )


def stops(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What `generate` needs to stop where a model's generation_config says so by text."""
    return {"tokenizer": tokenizer} if model.generation_config.stop_strings else {}


def _batches(prompts: int, missing: Sequence[int], size: int) -> Iterator[list[int]]:
    """The missing ones in the batches of an unbroken run, each whole, since a batch decides how its numbers are rounded."""
    wanted = set(missing)
    for first in range(0, prompts, size):
        batch = list(range(first, min(first + size, prompts)))
        if wanted.intersection(batch):
            yield batch


def _conversation(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _load(model: str) -> tuple[Any, Any]:
    """The tokenizer and the model, on the accelerator if there is one, in the dtype it is stored in."""
    if (Path(model) / "adapter_config.json").exists() and not is_peft_available():
        raise ValueError(
            f"Got {model}, which holds adapters, without peft. Expected it. Fix: pip install 'trl-miso[peft]'."
        )
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if not tokenizer.chat_template:
        raise ValueError(
            f"Got {model}, whose tokenizer has no chat template. Expected a model for chats. Fix: save it with the template that it "
            "was trained with, or score responses of your own without --model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return tokenizer, AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()


def _generate(tokenizer: Any, model: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy responses, padded on the left so that all begin at the same place."""
    inputs = tokenizer.apply_chat_template(
        [_conversation(prompt) for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **stops(model, tokenizer),
        )
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
