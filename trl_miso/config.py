"""`MISOSFTConfig`: the settings, their defaults and the values that they can have."""

import warnings
from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from trl_miso.attention.kernels import KERNELS
from trl_miso.data.contexts import MODES
from trl_miso.data.turns import TRAIN_TURNS
from trl_miso.segments.packed import WEIGHTINGS


@dataclass
class MISOSFTConfig(SFTConfig):
    r"""
    Configuration of [`MISOSFTTrainer`]: [`~trl.SFTConfig`] with settings for making and mixing contexts.

    The defaults are those of the paper (Enhancing Complex Instruction Following for Large Language Models with
    Mixture-of-Contexts Fine-tuning, arXiv 2505.11922).

    Parameters:
        > Parameters that control the contexts

        context_mode (`str`, *optional*, defaults to `"auto"`):
            How a row becomes input contexts: `"para"` (the full instruction, each constraint alone and the bare
            request; or the row's `contexts`), `"succ"` (successive chunks of the input), `"single"` (plain SFT),
            `"augment"` (each context as an SFT example of its own), or `"auto"` (single for plain text and token ids,
            para where the row's columns allow it, else succ).
        include_full (`bool`, *optional*, defaults to `True`):
            Whether the full instruction is one of the contexts in para and augment.
        include_bare (`bool`, *optional*, defaults to `True`):
            Whether the instruction without constraints is one of the contexts in para and augment.
        para_prob (`float`, *optional*, defaults to `1.0`):
            Probability of presenting a row that allows para as several contexts. Otherwise only its full context is
            used, as in plain SFT.
        chunk_probs (`list[float]`, *optional*, defaults to `[0.55, 0.15, 0.15, 0.15]`):
            Probabilities of splitting the input into 1, 2, 3, ... chunks in succ (paper, Appendix C). The number is
            drawn per row from the seed.
        train_turns (`str`, *optional*, defaults to `"auto"`):
            Which answers of a row are trained: `"last"` (the last answer, or the completion), `"all"` (the earlier assistant
            turns of conversations, prompts and demonstrations too, each seeing what inference would show before it), or
            `"auto"` (all of a conversation, the completion alone of a row with a prompt, unless the row's column
            `train_turns` says otherwise).
        response_template (`str`, *optional*):
            Text that begins the output of plain-text rows. Needed where the contexts of a row end differently. Chat
            templates bring their own.
        eval_contexts (`str`, *optional*, defaults to `"standard"`):
            Contexts of evaluation rows: `"standard"` (the full context alone, as in standard inference) or `"miso"` (as
            in training).

        > Parameters that control the mixture

        context_weighting (`str`, *optional*, defaults to `"uniform"`):
            Weights of the contexts: `"uniform"` (1/n, or the row's `context_weights`; eq. 3), `"fid"` (by attention
            mass; eq. 7) or `"vanilla"` (one softmax over all contexts; eq. 4, the baseline under which the output's share
            of attention falls as contexts are added).
        full_context_weight (`float`, *optional*):
            Fixed weight of the full context, strictly between 0 and 1. The other contexts divide the rest evenly.
            Requires `context_weighting="uniform"` and `include_full=True`. If not set, all contexts have the same
            weight.
        output_positions (`str`, *optional*, defaults to `"successive"`):
            Positions of the output: `"successive"` (directly after every context; paper, section 4.1) or
            `"after_longest"` (after the longest context, for all of them).

        > Parameters that control the computation

        share_prefixes (`bool`, *optional*, defaults to `True`):
            Whether to compute the common prefixes of a row's contexts only once. Exact. Turned off, with a warning,
            where noise (NEFTune, dropout) gives equal tokens different hidden states, or where the model's positions do
            not allow it.
        attention_kernel (`str`, *optional*, defaults to `"auto"`):
            Attention kernel: `"flash_attn"` (the flash-attn package), `"hub_flash"`
            (`kernels-community/flash-attn2`), `"torch_flash"` (FlashAttention-2 built into torch), `"cpu"`, `"reference"` (dense and slow), or
            `"auto"`, the first of these that can run. `"auto"` takes the Hub's only for a model loaded with it.
        log_shares (`bool`, *optional*, defaults to `True`):
            Whether to log how the outputs' attention is divided: the share of the output itself (`output_share`), the
            mean share of a context (`context_share`) and the smallest share of a context (`min_context_share`).
            Computed from the same forward pass.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to check before the first step that MISO is exact on this model and two short ones of the first rows, and
            to refuse to train if not. Costs some 15 forward passes of these two, and the log says how long they took.
    """

    context_mode: str = field(
        default="auto",
        metadata={
            "help": "How a row becomes input contexts: 'para' (the full instruction, each constraint alone and the bare "
            "request; or the row's `contexts`), 'succ' (successive chunks of the input), 'single' (plain SFT), "
            "'augment' (each context as an SFT example of its own), or 'auto' (single for plain text and token ids, "
            "para where the row's columns allow it, else succ).",
            "choices": list(MODES),
        },
    )
    include_full: bool = field(
        default=True, metadata={"help": "Whether the full instruction is one of the contexts in para and augment."}
    )
    include_bare: bool = field(
        default=True,
        metadata={"help": "Whether the instruction without constraints is one of the contexts in para and augment."},
    )
    para_prob: float = field(
        default=1.0,
        metadata={
            "help": "Probability of presenting a row that allows para as several contexts. Otherwise only its full "
            "context is used, as in plain SFT."
        },
    )
    chunk_probs: list[float] = field(
        default_factory=lambda: [0.55, 0.15, 0.15, 0.15],
        metadata={
            "help": "Probabilities of splitting the input into 1, 2, 3, ... chunks in succ (paper, Appendix C). The "
            "number is drawn per row from the seed."
        },
    )
    train_turns: str = field(
        default="auto",
        metadata={
            "help": "Which answers of a row are trained: 'last' (the last answer, or the completion), 'all' (the earlier "
            "assistant turns of conversations, prompts and demonstrations too, each seeing what inference would show before "
            "it), or 'auto' (all of a conversation, the completion alone of a row with a prompt, unless the row's column "
            "`train_turns` says otherwise).",
            "choices": list(TRAIN_TURNS),
        },
    )
    response_template: str | None = field(
        default=None,
        metadata={
            "help": "Text that begins the output of plain-text rows. Needed where the contexts of a row end differently. "
            "Chat templates bring their own."
        },
    )
    eval_contexts: str = field(
        default="standard",
        metadata={
            "help": "Contexts of evaluation rows: 'standard' (the full context alone, as in standard inference) or 'miso' "
            "(as in training).",
            "choices": ["standard", "miso"],
        },
    )
    context_weighting: str = field(
        default="uniform",
        metadata={
            "help": "Weights of the contexts: 'uniform' (1/n, or the row's `context_weights`; eq. 3), 'fid' (by attention "
            "mass; eq. 7) or 'vanilla' (one softmax over all contexts; eq. 4, the baseline under which the output's share of "
            "attention falls as contexts are added).",
            "choices": list(WEIGHTINGS),
        },
    )
    full_context_weight: float | None = field(
        default=None,
        metadata={
            "help": "Fixed weight of the full context, strictly between 0 and 1. The other contexts divide the rest "
            "evenly. Requires context_weighting='uniform' and include_full=True. If not set, all contexts have "
            "the same weight."
        },
    )
    output_positions: str = field(
        default="successive",
        metadata={
            "help": "Positions of the output: 'successive' (directly after every context; paper, section 4.1) or "
            "'after_longest' (after the longest context, for all of them).",
            "choices": ["successive", "after_longest"],
        },
    )
    share_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Whether to compute the common prefixes of a row's contexts only once. Exact. Turned off, with a "
            "warning, where noise (NEFTune, dropout) gives equal tokens different hidden states, or where the "
            "model's positions do not allow it."
        },
    )
    attention_kernel: str = field(
        default="auto",
        metadata={
            "help": "Attention kernel: 'flash_attn' (the flash-attn package), 'hub_flash' (kernels-community/flash-attn2), "
            "'torch_flash' (FlashAttention-2 built into torch), 'cpu', 'reference' (dense and slow), or 'auto', the first of "
            "these that can run.",
            "choices": ["auto", *KERNELS],
        },
    )
    log_shares: bool = field(
        default=True,
        metadata={
            "help": "Whether to log how the outputs' attention is divided: the share of the output itself "
            "(`output_share`), the mean share of a context (`context_share`) and the smallest share of a context "
            "(`min_context_share`). Computed from the same forward pass."
        },
    )
    verify: bool = field(
        default=True,
        metadata={
            "help": "Whether to check before the first step that MISO is exact on this model and two short ones of the "
            "first rows, and to refuse to train if not. Costs some 15 forward passes of these two, and the log says how long "
            "they took."
        },
    )

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            # TRL sets `gradient_checkpointing` by default, which transformers deprecates.
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            super().__post_init__()
        for name in MISOSFTConfig.__annotations__:
            choices = type(self).__dataclass_fields__[name].metadata.get("choices")
            if choices and getattr(self, name) not in choices:
                raise _wrong_value(name, getattr(self, name), f"one of {choices}")
        if not 0 <= self.para_prob <= 1:
            raise _wrong_value("para_prob", self.para_prob, "a probability in [0, 1]")
        probs = self.chunk_probs
        if not (probs and all(p >= 0 for p in probs) and abs(sum(probs) - 1) < 1e-6):
            expected = "non-negative probabilities of 1, 2, ... chunks that sum to 1"
            raise _wrong_value("chunk_probs", probs, expected)
        if self.full_context_weight is not None:
            self._check_full_context_weight(self.full_context_weight)
        if self.packing and self.packing_strategy != "bfd":
            expected = "'bfd': other strategies cut examples, and with them contexts"
            raise _wrong_value("packing_strategy", self.packing_strategy, expected)

        if self.truncation_mode != "keep_start" and self.context_mode != "single":
            expected = "'keep_start' unless context_mode='single': only the end of an output can be cut, not a context"
            raise _wrong_value("truncation_mode", self.truncation_mode, expected)

    def _check_full_context_weight(self, weight: float) -> None:
        if not 0 < weight < 1:
            raise _wrong_value("full_context_weight", weight, "a weight strictly between 0 and 1, or None")
        if self.context_weighting != "uniform" or not self.include_full:
            expected = "None unless context_weighting='uniform' and include_full=True"
            raise _wrong_value("full_context_weight", weight, expected)

    def compute_dtype(self, weights: torch.dtype) -> torch.dtype:
        """The dtype that a model computes in: that of mixed precision where it is on, else that of its weights."""
        if self.bf16:
            return torch.bfloat16
        if self.fp16:
            return torch.float16
        return weights


def _wrong_value(name: str, got: object, expected: str) -> ValueError:
    return ValueError(f"Got {name}={got!r}, expected {expected}. Fix: correct {name}.")
