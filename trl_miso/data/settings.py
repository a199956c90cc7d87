"""Which settings can have an effect on which rows: a setting that cannot is refused, since it promises what does not happen."""

from collections.abc import Container, Iterable
from itertools import product

_MIXING = ("para", "succ")
# The modes and formats in which a setting that is not at its default can have an effect; None stands for all formats.
# `response_template` has an effect on plain text alone, `train_turns` on chat rows alone, besides. Settings that are not listed have one on all rows.
_EFFECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "include_full": (("para", "augment"), ("constraints",)),
    "include_bare": (("para", "augment"), ("constraints",)),
    "para_prob": (("para",), None),
    "chunk_probs": (("succ",), None),
    "full_context_weight": (("para",), None),
    "output_positions": (("para",), None),
    "context_weighting": (_MIXING, None),
    "eval_contexts": ((*_MIXING, "augment"), None),
    "share_prefixes": (_MIXING, None),
    "train_turns": (_MIXING, ("contexts", "constraints", "prompt", "messages")),
    "log_shares": (_MIXING, None),
}
_TEMPLATE_EFFECTS = {*product(_MIXING, ("contexts", "constraints", "prompt", "messages"))}
_TEMPLATE_EFFECTS |= {("single", "constraints"), ("augment", "constraints")}  # it decides where constraints stand


def has_effect(setting: str, mode: str, kind: str, is_chat: bool | None) -> bool:
    """Whether a setting can have an effect on rows of format `kind` in `mode`. `is_chat` is None where no row decides it."""
    if setting == "response_template":
        return not is_chat and (mode, kind) in _TEMPLATE_EFFECTS
    if setting == "train_turns" and is_chat is False:
        return False
    modes, kinds = _EFFECTS.get(setting, ((mode,), None))
    return mode in modes and (kinds is None or kind in kinds)


def check_effects(changed: Iterable[str], mode: str, kind: str, is_chat: bool | None) -> None:
    """Raise ValueError if one of the settings that are not at their defaults cannot have an effect."""
    for setting in changed:
        if not has_effect(setting, mode, kind, is_chat):
            rows = f"rows in the {kind!r} format"
            if setting in ("response_template", "train_turns"):
                rows = {True: "chat rows", False: "rows of plain text", None: rows}[is_chat]
            raise no_effect(setting, f"{rows}, trained in mode {mode!r}")


def check_weights(changed: Container[str], mode: str, kind: str) -> None:
    """Raise ValueError for settings that rows with `context_weights` override, and for weights of contexts that are made."""
    if mode != "para":
        return
    for setting in ("context_weighting", "full_context_weight"):
        if setting in changed:
            raise no_effect(setting, "rows that have context_weights")
    if kind == "constraints":
        raise ValueError(
            "Got column 'context_weights' beside 'constraints': it has no effect on contexts that are made from constraints. "
            "Expected it beside 'contexts'. Fix: give the contexts in column 'contexts', or remove 'context_weights'."
        )


def no_effect(setting: str, where: str) -> ValueError:
    """The error for a setting that the rows leave without effect."""
    return ValueError(
        f"Got {setting} set for {where}: it would have no effect. Expected its default. Fix: leave {setting} unset, or change "
        "the rows or context_mode."
    )
