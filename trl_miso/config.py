"""The one configuration class."""

from dataclasses import dataclass, field

from trl import SFTConfig

from trl_miso.attention.kernels import KERNELS
from trl_miso.data.contexts import MODES
from trl_miso.segments.packed import WEIGHTINGS


@dataclass
class MISOSFTConfig(SFTConfig):
    r"""
    Configuration of [`MISOSFTTrainer`]: everything of [`~trl.SFTConfig`], and how inputs become contexts and are mixed.

    The defaults are the paper's (Enhancing Complex Instruction Following for Large Language Models with
    Mixture-of-Contexts Fine-tuning, arXiv 2505.11922).

    Parameters:
        > Parameters that control the contexts

        context_mode (`str`, *optional*, defaults to `"auto"`):
            How a row becomes input contexts: `"para"` (full instruction, each constraint alone, bare request; or the
            row's `contexts`), `"succ"` (successive chunks of the input), `"single"` (plain SFT), `"augment"` (each context
            its own SFT example), or `"auto"` (para where the row's columns allow it, else succ, text as single).
        include_full (`bool`, *optional*, defaults to `True`):
            Whether para and augment include the full instruction as a context.
        include_bare (`bool`, *optional*, defaults to `True`):
            Whether para and augment include the instruction without constraints as a context.
        para_prob (`float`, *optional*, defaults to `1.0`):
            Probability with which a row that can be para is presented so; else its full context alone, as in plain SFT.
        chunk_probs (`list[float]`, *optional*, defaults to `[0.55, 0.15, 0.15, 0.15]`):
            Probabilities of 1, 2, 3, ... chunks in succ (paper, Appendix C), drawn per row from the seed.
        response_template (`str`, *optional*):
            Text with which the output of plain-text rows begins, needed where the contexts of a row end differently. Chat
            templates bring their own.
        eval_contexts (`str`, *optional*, defaults to `"standard"`):
            Contexts of evaluation rows: `"standard"` (the full context alone, as the model will be used) or `"miso"` (as
            in training).

        > Parameters that control the mixture

        context_weighting (`str`, *optional*, defaults to `"uniform"`):
            Weights of the contexts: `"uniform"` (1/n, or the row's `context_weights`; eq. 3), `"fid"` (by attention mass;
            eq. 7) or `"vanilla"` (one softmax over everything; eq. 4, the baseline that breaks generation).
        full_context_weight (`float`, *optional*):
            Fixed share of the full context, strictly between 0 and 1; the other contexts divide the rest evenly. Needs
            `context_weighting="uniform"` and `include_full=True`. If not set, all contexts weigh the same.
        output_positions (`str`, *optional*, defaults to `"successive"`):
            Positions of the output: `"successive"` to every context (paper, section 4.1), or `"after_longest"`, after the
            longest context for all of them.

        > Parameters that control the computation

        share_prefixes (`bool`, *optional*, defaults to `True`):
            Whether to compute the common prefixes of a row's contexts once. Exact; turned off, with a logged line, where
            noise makes equal tokens unequal (NEFTune, dropout) or the model's positions do not allow it.
        attention_kernel (`str`, *optional*, defaults to `"auto"`):
            Attention kernel: `"flash_attn"` (the package), `"torch_flash"` (FlashAttention-2 built into torch), `"cpu"`,
            `"reference"` (dense, slow), or `"auto"`, the first of these that can run.
        log_shares (`bool`, *optional*, defaults to `True`):
            Whether to log how much of the outputs' attention goes to the output itself (`output_share`), to a context
            (`context_share`, the mean) and to the context with the least (`min_context_share`). Taken from the forward pass as it is.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to check, before the first step, on the model and the first rows that MISO is exact, and refuse to
            train if not. Costs some 15 forward passes of two rows.
    """

    context_mode: str = field(
        default="auto",
        metadata={
            "help": "How a row becomes input contexts: 'para' (full instruction, each constraint alone, bare request; or the "
            "row's `contexts`), 'succ' (successive chunks of the input), 'single' (plain SFT), 'augment' (each context its "
            "own SFT example), or 'auto' (para where the row's columns allow it, else succ, text as single).",
            "choices": list(MODES),
        },
    )
    include_full: bool = field(
        default=True, metadata={"help": "Whether para and augment include the full instruction as a context."}
    )
    include_bare: bool = field(
        default=True,
        metadata={"help": "Whether para and augment include the instruction without constraints as a context."},
    )
    para_prob: float = field(
        default=1.0,
        metadata={
            "help": "Probability with which a row that can be para is presented so; else its full context alone, as in plain SFT."
        },
    )
    chunk_probs: list[float] = field(
        default_factory=lambda: [0.55, 0.15, 0.15, 0.15],
        metadata={
            "help": "Probabilities of 1, 2, 3, ... chunks in succ (paper, Appendix C), drawn per row from the seed."
        },
    )
    response_template: str | None = field(
        default=None,
        metadata={
            "help": "Text with which the output of plain-text rows begins, needed where the contexts of a row end differently. "
            "Chat templates bring their own."
        },
    )
    eval_contexts: str = field(
        default="standard",
        metadata={
            "help": "Contexts of evaluation rows: 'standard' (the full context alone, as the model will be used) or 'miso' (as "
            "in training).",
            "choices": ["standard", "miso"],
        },
    )
    context_weighting: str = field(
        default="uniform",
        metadata={
            "help": "Weights of the contexts: 'uniform' (1/n, or the row's `context_weights`; eq. 3), 'fid' (by attention mass; "
            "eq. 7) or 'vanilla' (one softmax over everything; eq. 4, the baseline that breaks generation).",
            "choices": list(WEIGHTINGS),
        },
    )
    full_context_weight: float | None = field(
        default=None,
        metadata={
            "help": "Fixed share of the full context, strictly between 0 and 1; the other contexts divide the rest evenly. Needs "
            "context_weighting='uniform' and include_full=True. If not set, all contexts weigh the same."
        },
    )
    output_positions: str = field(
        default="successive",
        metadata={
            "help": "Positions of the output: 'successive' to every context (paper, section 4.1), or 'after_longest', after the "
            "longest context for all of them.",
            "choices": ["successive", "after_longest"],
        },
    )
    share_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Whether to compute the common prefixes of a row's contexts once. Exact; turned off, with a logged line, "
            "where noise makes equal tokens unequal (NEFTune, dropout) or the model's positions do not allow it."
        },
    )
    attention_kernel: str = field(
        default="auto",
        metadata={
            "help": "Attention kernel: 'flash_attn' (the package), 'torch_flash' (FlashAttention-2 built into torch), 'cpu', "
            "'reference' (dense, slow), or 'auto', the first of these that can run.",
            "choices": ["auto", *KERNELS],
        },
    )
    log_shares: bool = field(
        default=True,
        metadata={
            "help": "Whether to log how much of the outputs' attention goes to the output itself (`output_share`), to a context "
            "(`context_share`, the mean) and to the context with the least (`min_context_share`). Taken from the forward pass as it is."
        },
    )
    verify: bool = field(
        default=True,
        metadata={
            "help": "Whether to check, before the first step, on the model and the first rows that MISO is exact, and refuse to "
            "train if not. Costs some 15 forward passes of two rows."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, definition in type(self).__dataclass_fields__.items():
            choices = definition.metadata.get("choices")
            if name in MISOSFTConfig.__annotations__ and choices and getattr(self, name) not in choices:
                raise ValueError(f"Got {name}={getattr(self, name)!r}, expected one of {choices}. Fix: correct {name}.")
        _check(0 <= self.para_prob <= 1, "para_prob", self.para_prob, "a probability in [0, 1]")
        probs = self.chunk_probs
        _check(
            bool(probs) and all(p >= 0 for p in probs) and abs(sum(probs) - 1) < 1e-6,
            "chunk_probs",
            probs,
            "non-negative probabilities of 1, 2, ... chunks that sum to 1",
        )
        weight = self.full_context_weight
        if weight is not None:
            _check(0 < weight < 1, "full_context_weight", weight, "a share strictly between 0 and 1, or None")
            fixed = self.context_weighting == "uniform" and self.include_full
            _check(
                fixed, "full_context_weight", weight, "None unless context_weighting='uniform' and include_full=True"
            )
        if self.packing and self.packing_strategy != "bfd":
            _check(
                False, "packing_strategy", self.packing_strategy, "'bfd': others cut examples, which would cut contexts"
            )


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"Got {name}={got!r}, expected {expected}. Fix: correct {name}.")
