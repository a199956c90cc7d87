"""Generation from several input contexts at once: `miso_generate`.

The contexts are read first, each by itself, with common prefixes once. Then transformers' own `generate` continues the output,
which begins with the common end of all contexts (the chat template's generation prompt). Only the attention of the output's
tokens differs: a weighted mix of their attention to each context followed by the output (`decoding.py`).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_miso.attention.mixture import check_window
from trl_miso.attention.rotation import Rotation, rotation_of, set_rotation
from trl_miso.attention.state import restore_attention
from trl_miso.attention.support import (
    ModelSupport,
    base_of,
    check_adapters,
    check_relative,
    inspect_model,
    limit_to_length,
)
from trl_miso.attention.transformers_attention import (
    base_implementation,
    set_implementation,
    skip_logits,
)
from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import parallel_row
from trl_miso.data.schema import Prompt, RowDropped, template_kwargs
from trl_miso.data.tokenization import RowTokenizer
from trl_miso.generation.decoding import ContextCache, register_decoding
from trl_miso.segments import Example, parallel, unshare
from trl_miso.segments.packed import WEIGHTINGS, pack

# Arguments of `generate` that miso_generate makes from the contexts.
_RESERVED = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache"}
_RESERVED |= {"cache", "past_key_values", "custom_generate", "prefill_chunk_size"}
# Options, also of a generation config, that need another cache. Speculative decoding takes tokens back, which the cache cannot do.
_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "cache_implementation")


@torch.no_grad()
def miso_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[Prompt] | list[list[Prompt]],
    *,
    weighting: str = "uniform",
    weights: list[float] | list[list[float]] | None = None,
    output_positions: str = "successive",
    response_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Continue one output that attends to several contexts, each processed by itself (paper, eqs. 3, 4 and 7).

    With one context, equals the continuation of `model.generate` on its prompt. With n contexts, equals generation from n rows,
    each a context followed by a copy of the output, where in every layer the attention outputs of the copies of a token are
    replaced by their weighted mean. The model runs in evaluation mode, and its mode and attention are restored afterwards.

    Args:
        model: A causal language model that training would accept, also with adapters (docs/kernels.md lists them).
        tokenizer: The model's tokenizer, with a chat template if contexts are messages.
        contexts: Strings, or lists of messages, to which the chat template adds its generation prompt. For several requests at
            once, a list of such lists.
        weighting: `"uniform"` (1/n, or `weights`), `"fid"` (by attention mass, eq. 7) or `"vanilla"` (one softmax, eq. 4).
        weights: Positive weights of the contexts, scaled to sum to 1. For several requests, a list of weights per request.
        output_positions: `"successive"`: the output follows every context. `"after_longest"`: it follows the longest.
        response_template: Text with which the output begins, for strings that would otherwise end in different tokens.
        chat_template_kwargs: Arguments of the chat template, such as `enable_thinking`.
        generate_kwargs: Arguments of transformers' `generate`. `max_new_tokens` also bounds the length of a row, on which
            sliding windows and some rotary embeddings depend. Logits processors, stopping criteria and streamers see the
            request's contexts, with common prefixes once, and then the output; `max_length` counts both.

    Returns:
        What `generate` returns, for the continuation alone: token ids of shape (requests x num_return_sequences, new tokens), or
        with `return_dict_in_generate` the output object with these ids as `sequences`.

    Raises:
        ValueError: For contexts without a common end, settings without effect, speculative decoding (an assistant, prompt
            lookup), and models that MISO does not support.

    Example:
        >>> out = miso_generate(model, tokenizer, ["Paris is in France. Answer:", "Rome is in Italy. Answer:"], max_new_tokens=8)
        >>> tokenizer.decode(out[0], skip_special_tokens=True)
    """
    _check_objects(model, tokenizer, contexts)
    check_adapters(model)
    model = base_of(model)
    _check(model, weighting, weights, output_positions, generate_kwargs)
    prompts, prompt_weights = cast(Any, contexts), cast(Any, weights)
    if not _several_requests(contexts):
        prompts, prompt_weights = [contexts], None if weights is None else [weights]
    requests = _tokenize(tokenizer, prompts, prompt_weights, response_template, chat_template_kwargs)
    if generate_kwargs.get("stop_strings") is not None:
        generate_kwargs.setdefault("tokenizer", tokenizer)
    longest = max(len(context) for request in requests for context in request.contexts) + len(requests[0].head)
    with _generating(model, _longest_row(model, longest, generate_kwargs)) as support:
        lengths_differ = any(len({len(context) for context in request.contexts}) > 1 for request in requests)
        if output_positions == "successive" and lengths_differ:
            check_relative(model.config.model_type, support)
        layouts = [_layout(request, output_positions, support) for request in requests]
        _check_window(model, [example for _, example in layouts], weighting, support)
        return _continue(model, requests, layouts, weighting, support, generate_kwargs)


@dataclass(frozen=True)
class _Request:
    """Token ids of n >= 1 contexts and of the output's head, with which all of their prompts end; weights of the contexts."""

    contexts: list[list[int]]
    head: list[int]
    weights: list[float]


@dataclass(frozen=True)
class _Inspection:
    """The result of `inspect_model` for a config and modules, and the rotation of each module."""

    config: dict[str, Any]
    modules: list[ref[nn.Module]]
    rotations: list[Rotation | None]
    support: ModelSupport


_INSPECTIONS: WeakKeyDictionary[PreTrainedModel, _Inspection] = WeakKeyDictionary()


def _several_requests(contexts: Any) -> bool:
    """Whether `contexts` is a list of requests: its first entry is a list that is not one prompt of messages."""
    if not contexts or not isinstance(contexts[0], list):
        return False
    return not contexts[0] or not isinstance(contexts[0][0], dict)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    requests: list[list[Prompt]],
    weights: list[list[float]] | None,
    response_template: str | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> list[_Request]:
    """Tokenize requests as training tokenizes rows, with a placeholder as the completion, which is dropped."""
    if weights is not None and len(weights) != len(requests):
        raise ValueError(
            f"Got weights for {len(weights)} requests beside {len(requests)}, expected a list per request. Fix: give one weight per "
            "context."
        )
    kwargs = template_kwargs({"chat_template_kwargs": chat_template_kwargs})
    rows = []
    for i, contexts in enumerate(requests):
        is_text = bool(contexts) and isinstance(contexts[0], str)
        if contexts and not is_text and not tokenizer.chat_template:
            raise ValueError(
                "Got messages as contexts and a tokenizer without a chat template, expected one. Fix: set tokenizer.chat_template, "
                "or give the contexts as strings."
            )
        completion = tokenizer.eos_token or "." if is_text else [{"role": "assistant", "content": "."}]
        columns = {"contexts": contexts, "completion": completion, "context_weights": weights and weights[i]}
        try:
            rows.append(parallel_row(columns, "contexts"))
        except RowDropped as reason:
            raise _empty(reason) from reason

    tokenized_requests = []
    tokenized_rows = RowTokenizer(tokenizer, response_template=response_template)(rows, [kwargs] * len(rows))
    for row, tokens in zip(rows, tokenized_rows, strict=True):
        if isinstance(tokens, RowDropped):
            raise _empty(tokens)
        # The head: what the ids of the whole prompt have beyond those of the context.
        prompt = row.contexts[0]
        is_text = isinstance(prompt, str)
        text = prompt
        if not is_text:
            text = ChatRenderer(tokenizer)([cast(list, prompt)], kwargs, add_generation_prompt=True)[0]
        ids = tokenizer(text, add_special_tokens=is_text)["input_ids"]
        head = ids[len(tokens.contexts[0]) :]
        n = len(tokens.contexts)
        tokenized_requests.append(_Request(tokens.contexts, head, row.weights or [1 / n] * n))

    head_lengths = {len(request.head) for request in tokenized_requests}
    if len(head_lengths) > 1:
        raise ValueError(
            f"Got requests whose outputs begin with {sorted(head_lengths)} tokens common to their contexts, expected the same number in "
            "each: they are continued together. Fix: set response_template, or call miso_generate per request."
        )
    if not all(context for request in tokenized_requests for context in request.contexts):
        raise _empty("an empty context")
    return tokenized_requests


def _layout(request: _Request, output_positions: str, support: ModelSupport) -> tuple[list[int], Example]:
    """Lay out a request: its context tokens, and the example with an output of one token."""
    tokens, example = parallel(request.contexts, 1, request.weights, output_positions)
    if support.shares or not any(branch.offset for branch in example.branches):
        return tokens, example
    example, (copies,) = unshare(example, [[*tokens, 0]])
    return copies[:-1], example


def _continue(
    model: PreTrainedModel,
    requests: list[_Request],
    layouts: list[tuple[list[int], Example]],
    weighting: str,
    support: ModelSupport,
    generate_kwargs: dict[str, Any],
) -> Any:
    """Read the contexts into a cache, then let `generate` continue the heads of all requests."""
    width, head = max(len(tokens) for tokens, _ in layouts), len(requests[0].head)
    examples = [example for _, example in layouts]
    cache = ContextCache(examples, weighting, width, support.layers, bool(support.window))
    _read(model, layouts, cache)
    # Pad each row on the left with its own first token, so that processors that count tokens see no other token.
    rows = []
    for request, (tokens, _) in zip(requests, layouts, strict=True):
        padding = [tokens[0]] * (width - len(tokens))
        rows.append(padding + tokens + request.head)
    ids = torch.tensor(rows, device=model.device)
    # The head begins at the output's start position, whatever stands before it in the row.
    starts = torch.tensor([[example.segments[-1].start] for _, example in layouts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=(starts + torch.arange(-width, head, device=model.device)).clamp(min=0),
        use_cache=True,
        **{cache_argument(model): cache},
        **generate_kwargs,
    )
    cache.check_attended()
    if isinstance(out, torch.Tensor):
        return out[:, ids.shape[1] :]
    out.sequences = out.sequences[:, ids.shape[1] :]
    return out


def _read(model: PreTrainedModel, layouts: list[tuple[list[int], Example]], cache: ContextCache) -> None:
    """Run one forward over the contexts of all requests, in which the cache keeps the keys and values that outputs attend to."""
    contexts = [Example(example.segments[:-1]) for _, example in layouts]
    order, positions, packed = pack(contexts, WEIGHTINGS[0])
    batch = {
        "input_ids": torch.tensor([token for tokens, _ in layouts for token in tokens])[order][None],
        "position_ids": torch.from_numpy(positions)[None],
        **packed.to_batch(),
    }
    batch = send_to_device(batch, model.device)
    model(**batch, use_cache=False, miso_cache=cache, **skip_logits(model))


@contextmanager
def _generating(model: PreTrainedModel, max_length: int | None) -> Iterator[ModelSupport]:
    """Switch the model to the attention of generation and to evaluation mode; restore both on exit."""
    name = register_decoding(base_implementation(model.config.get_text_config()._attn_implementation))
    hook = model.register_forward_pre_hook(_with_cache, with_kwargs=True)
    try:
        with restore_attention(model):
            support = limit_to_length(model, _inspect_once(model, name), max_length)
            model.eval()
            yield support
    finally:
        hook.remove()


def _inspect_once(model: PreTrainedModel, name: str) -> ModelSupport:
    """`inspect_model`, cached until the model's config or modules change: its forwards would take as long as several tokens."""
    set_implementation(model, name)
    config, modules = model.config.to_dict(), list(model.modules())
    inspection = _INSPECTIONS.get(model)
    if inspection is None or inspection.config != config or [module() for module in inspection.modules] != modules:
        support = inspect_model(model, name, None)
        rotations = [rotation_of(module) for module in modules]
        inspection = _Inspection(config, [ref(module) for module in modules], rotations, support)
        _INSPECTIONS[model] = inspection
    for module, rotation in zip(modules, inspection.rotations, strict=True):
        set_rotation(module, rotation)
    return inspection.support


def _with_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook that passes the cache on to attention: `generate` takes no arguments for attention."""
    for value in kwargs.values():
        if isinstance(value, ContextCache):
            return args, kwargs | {"miso_cache": value}
    return args, kwargs


def cache_argument(model: PreTrainedModel) -> str:
    """The argument that takes a model's cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _longest_row(model: PreTrainedModel, longest: int, generate_kwargs: dict[str, Any]) -> int | None:
    """Tokens of the longest context and its output; None if `max_new_tokens` is not set."""
    config = generate_kwargs.get("generation_config") or model.generation_config
    new = generate_kwargs.get("max_new_tokens") or config.max_new_tokens
    return longest + new if new else None


def _check_objects(model: Any, tokenizer: Any, contexts: Any) -> None:
    """Raise ValueError for a model or tokenizer that is not loaded, and for contexts of other types than the docstring says."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"Got {model!r} as model, expected a loaded model. Fix: give AutoModelForCausalLM.from_pretrained({model!r})."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"Got {type(tokenizer).__name__} as tokenizer, expected the model's. Fix: give AutoTokenizer.from_pretrained(...)."
        )
    expected = "expected a list of contexts (strings, or lists of messages), or a list of such lists"
    if not isinstance(contexts, list):
        raise ValueError(f"Got {type(contexts).__name__} as contexts, {expected}. Fix: give the texts in a list.")
    kinds = set()
    for request in contexts if _several_requests(contexts) else [contexts]:
        if not isinstance(request, list) or not request:
            raise ValueError(
                f"Got {request!r} as the contexts of a request, {expected}. Fix: give at least one context."
            )
        for context in request:
            is_messages = isinstance(context, list) and all(isinstance(message, dict) for message in context)
            if not isinstance(context, str) and not is_messages:
                raise ValueError(
                    f"Got {context!r} as a context, {expected}. Fix: give a string, or a list of messages."
                )
            kinds.add(type(context).__name__)
    if len(kinds) > 1:
        raise ValueError(
            f"Got strings and lists of messages as contexts, {expected}. Fix: convert one kind to the other."
        )


def _check(
    model: PreTrainedModel, weighting: str, weights: Any, output_positions: str, generate_kwargs: dict[str, Any]
) -> None:
    for name, value, choices in (
        ("weighting", weighting, WEIGHTINGS),
        ("output_positions", output_positions, ("successive", "after_longest")),
    ):
        if value not in choices:
            raise ValueError(f"Got {name}={value!r}, expected one of {list(choices)}. Fix: set {name} to one of these.")
    if weights is not None and weighting != "uniform":
        raise ValueError(
            f"Got weights with weighting={weighting!r}, expected weights with 'uniform' alone: they would have no effect. Fix: leave "
            "weights or weighting unset."
        )
    sources = [generate_kwargs]
    for config in (generate_kwargs.get("generation_config"), model.generation_config):
        if config:
            sources.append(vars(config))
    for option in _REFUSED:
        setting = next((source[option] for source in sources if source.get(option) is not None), None)
        # "hybrid" is a cache that transformers takes for its default.
        if setting and (option, setting) != ("cache_implementation", "hybrid"):
            raise ValueError(
                f"Got {option} for generate, from its arguments or a generation config, expected plain decoding with a cache that "
                f"miso_generate makes. Fix: leave {option} out, or set it to None in model.generation_config."
            )
    reserved = sorted(_RESERVED & set(generate_kwargs))
    if reserved:
        raise ValueError(
            f"Got {reserved} for generate, expected other arguments: miso_generate makes these from the contexts. Fix: leave "
            f"{'it' if len(reserved) == 1 else 'them'} out."
        )


def _check_window(model: PreTrainedModel, examples: list[Example], weighting: str, support: ModelSupport) -> None:
    """Raise ValueError for layouts and weightings that a sliding window cannot honour, as training does."""
    if not support.window or not any(len(example.branches) > 1 for example in examples):
        return
    check_window(
        f"a {model.config.model_type} model with a sliding window of {support.window} tokens, which a context with its output can "
        "exceed",
        bool(pack(examples, weighting)[2].gap),
        weighting,
        "set max_new_tokens, and lower",
    )


def _empty(reason: Any) -> ValueError:
    return ValueError(
        f"Got {reason}, expected contexts with text beside the beginning of the output. Fix: leave the context out."
    )
