"""Generation from several input contexts at once: `miso_generate`.

The contexts are read first, each by itself, common prefixes once. Then transformers' own `generate` continues the output, which
begins with what all contexts end with (the chat template's generation prompt): all that differs is the attention of the output's
tokens, a weighted mix of their attention to each context followed by the output (`attention/decoding.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_miso.attention.mixture import Rotation
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
    restore_attention,
    rotation_of,
    set_implementation,
    set_rotation,
    skip_logits,
)
from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import Prompt, RowDropped, parallel_row, template_kwargs
from trl_miso.data.tokenization import RowTokenizer
from trl_miso.generation.decoding import ContextCache, register_decoding
from trl_miso.segments import Example, parallel, unshare
from trl_miso.segments.packed import WEIGHTINGS, pack

_OWN = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"}
_OWN |= {"custom_generate", "prefill_chunk_size"}
# What a generation config may ask for too. Speculative decoding takes tokens back, of which the contexts' cache knows nothing.
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

    Equals, with one context, the continuation of `model.generate` on its prompt; with several, generation from `n` rows that are
    each a context and a copy of the output, in which each layer's attention outputs of the copies of a token are replaced by
    their weighted mean. The model is in evaluation mode meanwhile, and is left as it was.

    Args:
        model: A causal language model, also with adapters, which training would accept (see the README).
        tokenizer: Its tokenizer, with a chat template if contexts are messages.
        contexts: Strings, or lists of messages, to which the chat template adds its generation prompt. Or several requests at
            once: a list of these lists.
        weighting: `"uniform"` (1/n, or `weights`), `"fid"` (by attention mass, eq. 7) or `"vanilla"` (one softmax, eq. 4).
        weights: Positive weights of the contexts, scaled to sum to 1; for several requests a list for each.
        output_positions: `"successive"`: the output follows every context, or `"after_longest"`.
        response_template: Text with which the output of strings begins, where they end in different tokens without it.
        chat_template_kwargs: Arguments of the chat template, such as `enable_thinking`.
        generate_kwargs: Of transformers' `generate`. `max_new_tokens` also tells how long a row gets, on which sliding windows and
            some rotary embeddings depend. Logits processors, stopping criteria and streamers see each request's
            contexts, common prefixes once, then the output; `max_length` counts these.

    Returns:
        As `generate`, the continuation alone: token ids of shape (requests x num_return_sequences, new tokens), or with
        `return_dict_in_generate` its output object with these as `sequences`.

    Raises:
        ValueError: For contexts without a common end, settings without effect, speculative decoding (an assistant, prompt
            lookup), and models that MISO does not support.

    Example:
        >>> out = miso_generate(model, tokenizer, ["Paris is in France. Answer:", "Rome is in Italy. Answer:"], max_new_tokens=8)
        >>> tokenizer.decode(out[0], skip_special_tokens=True)
    """
    check_adapters(model)
    model = base_of(model)
    _check(model, weighting, weights, output_positions, generate_kwargs)
    several = bool(contexts) and isinstance(contexts[0], list) and not isinstance((contexts[0] or [""])[0], dict)
    requests = _tokenize(
        tokenizer,
        cast(list, contexts if several else [contexts]),
        cast(list, weights if several or weights is None else [weights]),
        response_template,
        chat_template_kwargs,
    )
    if generate_kwargs.get("stop_strings") is not None:
        generate_kwargs.setdefault("tokenizer", tokenizer)
    longest = max(len(context) for request in requests for context in request.contexts) + len(requests[0].head)
    with _generating(model, _longest_row(model, longest, generate_kwargs)) as support:
        if output_positions == "successive" and any(len(set(map(len, r.contexts))) > 1 for r in requests):
            check_relative(model.config.model_type, support)
        layouts = [_layout(request, output_positions, support) for request in requests]
        _check_window(model, [example for _, example in layouts], weighting, support)
        return _continue(model, requests, layouts, weighting, support, generate_kwargs)


@dataclass(frozen=True)
class _Request:
    """Token ids of n >= 1 contexts and of the output's beginning, which all of their prompts end with; their weights."""

    contexts: list[list[int]]
    head: list[int]
    weights: list[float]


@dataclass(frozen=True)
class _Survey:
    """What `inspect_model` found, and of what: a config, modules, and the rotation that each of these was given."""

    config: dict[str, Any]
    modules: list[ref[nn.Module]]
    rotations: list[Rotation | None]
    support: ModelSupport


_SURVEYS: WeakKeyDictionary[PreTrainedModel, _Survey] = WeakKeyDictionary()


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    requests: list[list[Prompt]],
    weights: list[list[float]] | None,
    response_template: str | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> list[_Request]:
    """As rows of training are tokenized, with an answer in the completion's place of which nothing is kept."""
    if weights is not None and len(weights) != len(requests):
        raise ValueError(
            f"Got weights for {len(weights)} requests beside {len(requests)}, expected a list for each. Fix: give one weight a context."
        )
    kwargs = template_kwargs({"chat_template_kwargs": chat_template_kwargs})
    rows = []
    for i, contexts in enumerate(requests):
        said = bool(contexts) and isinstance(contexts[0], str)
        if contexts and not said and not tokenizer.chat_template:
            raise ValueError(
                "Got messages as contexts and a tokenizer without a chat template, expected one. Fix: set tokenizer.chat_template, "
                "or give the contexts as strings."
            )
        answer = tokenizer.eos_token or "." if said else [{"role": "assistant", "content": "."}]
        columns = {"contexts": contexts, "completion": answer, "context_weights": weights and weights[i]}
        try:
            rows.append(parallel_row(columns, "contexts", True, True))
        except RowDropped as reason:
            raise _empty(reason) from reason
    made = []
    tokenized = RowTokenizer(tokenizer, response_template=response_template)(rows, [kwargs] * len(rows))
    for row, tokens in zip(rows, tokenized, strict=True):
        if isinstance(tokens, RowDropped):
            raise _empty(tokens)
        prompt, chat = row.contexts[0], not isinstance(row.contexts[0], str)
        text = ChatRenderer(tokenizer)([cast(list, prompt)], kwargs, add_generation_prompt=True)[0] if chat else prompt
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        n = len(tokens.contexts)
        made.append(_Request(tokens.contexts, ids[len(tokens.contexts[0]) :], row.weights or [1 / n] * n))
    if len(heads := {len(request.head) for request in made}) > 1:
        raise ValueError(
            f"Got requests whose outputs begin with {sorted(heads)} tokens common to their contexts, expected as many in each: they are "
            "continued together. Fix: set response_template, or call miso_generate for each."
        )
    if not all(context for request in made for context in request.contexts):
        raise _empty("an empty context")
    return made


def _layout(request: _Request, output_positions: str, support: ModelSupport) -> tuple[list[int], Example]:
    """Context tokens and their segments, with an output of one token."""
    tokens, example = parallel(request.contexts, 1, request.weights, output_positions)
    if support.shares or not any(branch.offset for branch in example.branches):
        return tokens, example
    example, (own,) = unshare(example, [[*tokens, 0]])
    return own[:-1], example


def _continue(
    model: PreTrainedModel,
    requests: list[_Request],
    layouts: list[tuple[list[int], Example]],
    weighting: str,
    support: ModelSupport,
    generate_kwargs: dict[str, Any],
) -> Any:
    width, head = max(len(tokens) for tokens, _ in layouts), len(requests[0].head)
    examples = [example for _, example in layouts]
    cache = ContextCache(examples, weighting, width, support.layers, bool(support.window))
    _read(model, layouts, cache)
    # Rows are filled up to equal lengths with a token of their own: processors that count tokens see no other.
    filled = [[tokens[0]] * (width - len(tokens)) + tokens for tokens, _ in layouts]
    ids = torch.tensor([row + request.head for row, request in zip(filled, requests, strict=True)], device=model.device)
    starts = torch.tensor([[example.segments[-1].start] for _, example in layouts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=(starts + torch.arange(-width, head, device=model.device)).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        **generate_kwargs,
    )
    if isinstance(out, torch.Tensor):
        return out[:, ids.shape[1] :]
    out.sequences = out.sequences[:, ids.shape[1] :]
    return out


def _read(model: PreTrainedModel, layouts: list[tuple[list[int], Example]], cache: ContextCache) -> None:
    """One forward over the contexts of all requests, of which the cache keeps what outputs attend to."""
    contexts = [Example(example.segments[:-1]) for _, example in layouts]
    order, positions, packed = pack(contexts, WEIGHTINGS[0])
    batch = {
        "input_ids": torch.tensor([token for tokens, _ in layouts for token in tokens])[order][None],
        "position_ids": torch.from_numpy(positions)[None],
        **packed.to_batch(),
    }
    batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    model(**batch, use_cache=False, miso_cache=cache, **skip_logits(model))


@contextmanager
def _generating(model: PreTrainedModel, max_length: int | None) -> Iterator[ModelSupport]:
    """The model with the attention of generation, in evaluation mode; afterwards as it was."""
    name = register_decoding(base_implementation(model.config.get_text_config()._attn_implementation))
    hook = model.register_forward_pre_hook(_with_cache, with_kwargs=True)
    try:
        with restore_attention(model):
            support = limit_to_length(model, _surveyed(model, name), max_length)
            model.eval()
            yield support
    finally:
        hook.remove()


def _surveyed(model: PreTrainedModel, name: str) -> ModelSupport:
    """`inspect_model`, once for a model as it is: its forwards would take as long as several tokens of an answer."""
    set_implementation(model, name)
    config, modules = model.config.to_dict(), list(model.modules())
    known = _SURVEYS.get(model)
    if known is None or known.config != config or [module() for module in known.modules] != modules:
        support = inspect_model(model, name, None)
        rotations = [rotation_of(module) for module in modules]
        known = _Survey(config, [ref(module) for module in modules], rotations, support)
        _SURVEYS[model] = known
    for module, rotation in zip(modules, known.rotations, strict=True):
        set_rotation(module, rotation)
    return known.support


def _with_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """`generate` takes no arguments for attention: attention is handed the cache in which the contexts are."""
    cache = kwargs.get("past_key_values")
    return args, kwargs | {"miso_cache": cache} if isinstance(cache, ContextCache) else kwargs


def _longest_row(model: PreTrainedModel, longest: int, generate_kwargs: dict[str, Any]) -> int | None:
    """Tokens of the longest context and its output, if `max_new_tokens` says so."""
    config = generate_kwargs.get("generation_config") or model.generation_config
    new = generate_kwargs.get("max_new_tokens") or config.max_new_tokens
    return longest + new if new else None


def _check(
    model: PreTrainedModel, weighting: str, weights: Any, output_positions: str, generate_kwargs: dict[str, Any]
) -> None:
    for name, value, known in (
        ("weighting", weighting, WEIGHTINGS),
        ("output_positions", output_positions, ("successive", "after_longest")),
    ):
        if value not in known:
            raise ValueError(f"Got {name}={value!r}, expected one of {list(known)}. Fix: set {name} to one of these.")
    if weights is not None and weighting != "uniform":
        raise ValueError(
            f"Got weights with weighting={weighting!r}, expected them with 'uniform' alone: they would have no effect. Fix: leave "
            "weights or weighting unset."
        )
    configs = [vars(config) for config in (generate_kwargs.get("generation_config"), model.generation_config) if config]
    for refused in _REFUSED:
        given = (options[refused] for options in (generate_kwargs, *configs) if options.get(refused) is not None)
        if setting := next(given, None):
            if (refused, setting) == ("cache_implementation", "hybrid"):  # which transformers takes for its default
                continue
            raise ValueError(
                f"Got {refused} for generate, from its arguments or a generation config, expected plain decoding with a cache that "
                f"miso_generate makes. Fix: leave {refused} out, or set it to None in model.generation_config."
            )
    if own := sorted(_OWN & set(generate_kwargs)):
        raise ValueError(
            f"Got {own} for generate, expected arguments other than these: miso_generate makes them of the contexts. Fix: leave "
            f"{'it' if len(own) == 1 else 'them'} out."
        )


def _check_window(model: PreTrainedModel, examples: list[Example], weighting: str, support: ModelSupport) -> None:
    """Refuse what a window cannot honour, as training does."""
    gap = bool(pack(examples, weighting)[2].gap)
    mixes = any(len(example.branches) > 1 for example in examples)
    if support.window and mixes and (gap or weighting == "vanilla"):
        raise ValueError(
            f"Got a {model.config.model_type} model with a sliding window of {support.window} tokens, which a context with its output "
            f"can exceed, and {'contexts that do not end where the output begins' if gap else 'one softmax over all contexts'}, which "
            f"cannot honour it. Expected a context and max_new_tokens within the window. Fix: set max_new_tokens, and lower, or "
            "output_positions='successive' and weighting='uniform' or 'fid'."
        )


def _empty(reason: Any) -> ValueError:
    return ValueError(
        f"Got {reason}, expected contexts that say something beside the beginning of the output. Fix: leave the context out."
    )
