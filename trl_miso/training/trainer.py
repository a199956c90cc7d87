"""MISOSFTTrainer."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from trl_miso.attention.shares import Shares
from trl_miso.attention.support import base_of, check_probe, prepare_model, why_not_share
from trl_miso.attention.transformers_attention import Probe, base_implementation, register_miso_attention
from trl_miso.config import MISOSFTConfig
from trl_miso.data import preparation
from trl_miso.data.collator import ROWS, MISODataCollator
from trl_miso.data.contexts import resolve_mode, row_format
from trl_miso.data.dropped import STATUS, AnyDataset, Dropped, count_statuses, report_mixture, report_statuses
from trl_miso.data.mapping import WholeStream, same_columns
from trl_miso.data.preparation import RowPreparation
from trl_miso.data.sft_rows import SFTRows, prepare_sft_rows
from trl_miso.data.tokenization import Layout, RowTokenizer
from trl_miso.evaluation.callback import ScoredEvaluations
from trl_miso.segments.packed import PackedSegments
from trl_miso.training import guards
from trl_miso.training.checkpoints import AtomicCheckpoints, resumable
from trl_miso.training.hub import HubPushes
from trl_miso.training.interruption import NonFiniteError, TrainingGuard
from trl_miso.training.verified import Verified, VerifyFirst

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = get_logger(__name__)

_BIBTEX = """\
@article{lu2025enhancing,
    title        = {{Enhancing Complex Instruction Following for Large Language Models with Mixture-of-Contexts Fine-tuning}},
    author       = {Yuheng Lu and ZiMeng Bai and Caixia Yuan and Huixing Jiang and Xiaojie Wang},
    year         = 2025,
    eprint       = {arXiv:2505.11922},
}"""


class MISOSFTTrainer(AtomicCheckpoints, HubPushes, Verified, ScoredEvaluations, SFTTrainer):
    """[`~trl.SFTTrainer`] that trains on several input contexts per output (MISO, arXiv 2505.11922).

    The only changes: rows become contexts (`_prepare_dataset`), batches are flat and carry segment metadata (the
    collator), and attention mixes the contexts (a registered attention implementation). Loss, metrics, checkpoints, PEFT
    and the Hub are SFTTrainer's. The saved model is an ordinary one, loaded and used without this package.

    Args:
        model: As for SFTTrainer. `flash_attention_2` restricts MISO to FlashAttention-2 kernels.
        args ([`MISOSFTConfig`], [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`], *optional*): The latter two are
            converted, with MISO's defaults.
        train_dataset: In any row format of `trl_miso.data.contexts`.
        data_collator: Must be None: the batch layout is part of the method.

        The other arguments are SFTTrainer's.

    Attributes:
        training_mode: What the training rows are prepared as: `"para"`, `"succ"`, `"single"` or `"augment"`.
        verification: The checks that `train` made before its first step, or `verify`.
        dropped_rows: For each prepared data set the reasons for which rows were dropped, with the rows' numbers (of a
            stream, among the rows that were counted).

    Raises:
        ValueError: Before training, for models, settings or rows that would be trained wrongly.
    """

    _tag_names = ["trl", "sft", "miso"]
    _name = "MISO"
    _paper = {
        "title": "Enhancing Complex Instruction Following for Large Language Models with Mixture-of-Contexts Fine-tuning",
        "id": "2505.11922",
        "citation": _BIBTEX,
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: MISOSFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        args = _miso_config(args, model)
        config = guards.check_request(args, model, data_collator, processing_class, peft_config)
        # Multi-process data loading must not concatenate flat batches.
        if args.accelerator_config.dispatch_batches:
            logger.warning(
                "`dispatch_batches=True` is forced to False: flat batches of several ranks cannot be concatenated."
            )
        args.accelerator_config.dispatch_batches = False
        guards.check_first_row(train_dataset, args)
        self.training_mode: str | None = None
        self._probed: set[str] = set()
        self.dropped_rows: dict[str, Dropped] = {}
        # TRL resizes embeddings for the tokens of a template that it clones, also those of a model that it loads itself.
        self._vocabulary = None if isinstance(model, str) and args.chat_template_path else config.get_text_config()
        # What bins are measured by, before TRL has made the model; the model may still turn sharing off below.
        known = model if isinstance(model, torch.nn.Module) else None
        noise = why_not_share(known, config, args.neftune_noise_alpha)
        self._packs_shared = args.share_prefixes and not noise and not getattr(peft_config, "lora_dropout", 0)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        self._install(args)
        self._watch = TrainingGuard(self.accelerator)
        self.add_callback(self._watch)
        self.add_callback(VerifyFirst(self))

    def _install(self, args: MISOSFTConfig) -> None:
        """Switch the model's attention and the collator over, now that TRL has made the model and wrapped it."""
        base_model = base_of(self.model)
        guards.check_parallelism(self.accelerator.parallelism_config)
        base = base_implementation(base_model.config.get_text_config()._attn_implementation)
        self._support = prepare_model(base_model, register_miso_attention(base, args.attention_kernel), args.max_length)
        mode = self.training_mode or "para"  # the user prepared the rows, and may have made contexts
        guards.check_kernel(args, base_model, base, self.accelerator.device)
        guards.check_positions(args, mode, base_model.config.model_type, self._support)
        share = args.share_prefixes
        if share and mode in ("para", "succ"):
            rotates = mode == "para" and args.output_positions == "successive"
            reason = why_not_share(self.model, self.model.config, args.neftune_noise_alpha)
            if rotates and not self._support.shares:
                reason = reason or self._support.reason
            if reason:
                larger = (
                    " Bins were planned with shared prefixes and can exceed max_length." if self._packs_shared else ""
                )
                logger.warning(
                    f"share_prefixes is turned off: {reason}. Every context gets its own copy of its tokens."
                    f"{larger if args.packing else ''}"
                )
                share = False
        self.data_collator = MISODataCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            weighting=args.context_weighting,
            share_prefixes=share,
            window=self._support.window,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: MISOSFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> AnyDataset:
        guards.check_dataset(dataset, args, packing, dataset_name)
        dataset = dataset.with_format(None) if isinstance(dataset, Dataset) else same_columns(dataset)
        names = [args.dataset_text_field] if formatting_func is not None else get_dataset_column_names(dataset)
        training = self.training_mode is None  # TRL prepares the training set first
        if "miso_layout" in names:  # prepared before
            self.training_mode = self.training_mode or "para"
            preparation.check_prepared(dataset, args.max_length, dataset_name)
            return self._pack(dataset, args) if packing else dataset
        kind = row_format(names, args.dataset_text_field)
        if not training and args.eval_contexts == "standard":
            mode = "single"
            as_trl = kind in ("text", "tokenized") or self.training_mode in ("single", "augment")
        else:
            mode = resolve_mode(args.context_mode, kind)
            guards.check_settings(args, mode, kind, names)
            as_trl = mode in ("single", "augment")
        if training:
            self.training_mode = mode
        if STATUS in names:
            report_statuses(count_statuses(dataset), dataset_name, isinstance(dataset, IterableDataset))
        if as_trl:
            dataset, dropped = self._prepare_as_trl(
                dataset, kind, mode, processing_class, args, formatting_func, dataset_name
            )
        else:
            dataset, dropped = self._prepare_contexts(dataset, kind, mode, args, dataset_name)
        self.dropped_rows[dataset_name] = dropped
        report_mixture(dataset, dataset_name)
        if packing:
            dataset = self._pack(dataset, args)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _pack(self, dataset: AnyDataset, args: MISOSFTConfig) -> AnyDataset:
        if args.shuffle_dataset:  # bins are planned over neighbouring rows
            dataset = dataset.shuffle(seed=args.seed)
        return preparation.pack_rows(dataset, args.max_length, self._packs_shared, args.dataset_num_proc)

    def _prepare_contexts(
        self, dataset: AnyDataset, kind: str, mode: str, args: MISOSFTConfig, name: str
    ) -> tuple[AnyDataset, Dropped]:
        if args.completion_only_loss is False:
            raise ValueError(
                f"Got completion_only_loss=False with context_mode={args.context_mode!r}, expected None or True: with several contexts "
                "only their common output has a loss. Fix: leave it unset, or set context_mode='single'."
            )
        tokenizer = self._row_tokenizer(dataset, kind, args)
        rows = RowPreparation(
            kind, mode, args.include_full, args.include_bare, tokenizer, _layout(args), self._vocab_size
        )
        return preparation.prepare_rows(dataset, rows, name, args.dataset_num_proc)

    def _prepare_as_trl(
        self,
        dataset: AnyDataset,
        kind: str,
        mode: str,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: MISOSFTConfig,
        formatting_func: Callable[[dict], str] | None,
        name: str,
    ) -> tuple[AnyDataset, Dropped]:
        """TRL tokenizes and labels; rows of our formats become TRL's before, and are cut to `max_length` after it."""
        dataset, dropped = self._as_prompts(dataset, kind, mode, args, formatting_func, name)
        uncut = copy(args)
        uncut.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, False, None, name)
        fit = args.max_length, args.truncation_mode, name, args.dataset_num_proc, self._vocab_size
        dataset, cut = preparation.fit_rows(dataset, *fit)
        return dataset, dropped | cut

    def _as_prompts(
        self,
        dataset: AnyDataset,
        kind: str,
        mode: str,
        args: MISOSFTConfig,
        formatting_func: Callable[[dict], str] | None,
        name: str,
    ) -> tuple[AnyDataset, Dropped]:
        """Rows of our formats as rows that TRL prepares; with a completion, the loss is on it by default."""
        if kind not in ("messages", "text", "tokenized") and args.completion_only_loss is None:
            self.completion_only_loss = True
        rows = SFTRows(
            kind=kind,
            response_template=args.response_template,
            augment=mode == "augment",
            include_full=args.include_full,
            include_bare=args.include_bare,
            tokenizer=self._row_tokenizer(dataset, kind, args),
            text_field=args.dataset_text_field,
            formatting_func=formatting_func,
        )
        return prepare_sft_rows(dataset, rows, name, args.dataset_num_proc)

    @property
    def _vocab_size(self) -> int | None:
        return getattr(self._vocabulary, "vocab_size", None)

    def _row_tokenizer(self, dataset: AnyDataset, kind: str, args: MISOSFTConfig) -> RowTokenizer:
        chat = preparation.is_chat(dataset, kind)
        return RowTokenizer(self._tokenizer, self.chat_template, args.response_template, args.assistant_only_loss, chat)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(preparation.COLUMNS)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        shared = self.accelerator.num_processes > 1 and isinstance(dataset, IterableDataset)
        return super()._get_dataloader(WholeStream(dataset) if shared else dataset, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As SFTTrainer's, except:

        - It resumes from whole checkpoints only; `True` is the newest whole one in `output_dir`.
        - After SIGTERM the step under way is finished, a checkpoint saved, and SystemExit(143) raised; unless the script has
          a handler of its own, or trains in another thread than the main one.

        Raises:
            ValueError: If there is no whole checkpoint to resume from.
            NonFiniteError: For a NaN or infinite loss or gradient, with the numbers of the rows it comes from, before the
                weights change. They are saved as a checkpoint first (not under FSDP and DeepSpeed).
        """
        checkpoint = resumable(resume_from_checkpoint, self.args.output_dir)
        self._saved_step = 0
        with nullcontext() if self.args.enable_jit_checkpoint else self._watch.signals():
            try:
                output = super().train(checkpoint, *args, **kwargs)
            except NonFiniteError as error:
                error.add_note(self._save_before_failing())
                raise
        if self._watch.terminated:
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if (
            self._watch.terminated
        ):  # save_total_limit=1 would remove the checkpoint just saved where another is the best
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args, **kwargs)

    def _save_before_failing(self) -> str:
        """Save the weights as they are between two steps; says what was saved."""
        step, plain = self.state.global_step, (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self._saved_step == step or self.accelerator.distributed_type not in plain:
            last = f"the last checkpoint is that of step {self._saved_step}" if self._saved_step else "none were saved"
            return f"Training had done {step} steps; {last}."
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            return f"After {step} steps some weights are not finite: nothing was saved."
        self._save_checkpoint(self.model, trial=None)
        return f"Saved checkpoint-{step}, the weights as they were before."

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        before = self.state.global_step
        if (
            before >= self.state.max_steps
        ):  # resumed from the last step's checkpoint: transformers would make one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self.state.global_step > before or self.control.should_training_stop or self.control.should_epoch_stop:
            return
        if not kwargs["resume_from_checkpoint"] or kwargs["epoch"] > kwargs["epochs_trained"]:
            raise ValueError(
                f"Got fewer batches in the training data than gradient_accumulation_steps={self.args.gradient_accumulation_steps}, "
                "expected at least as many: no step would ever be made. Fix: lower gradient_accumulation_steps."
            )
        logger.warning(f"The checkpoint of step {before} is from beyond the stream's end: its rows begin anew.")

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.mixed_precision != "fp16":  # whose loss scaling skips the steps that overflow
            self._watch.check_gradients(norm)
        return norm

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mode = "train" if self.model.training else "eval"
        rows = inputs.pop(ROWS, None)
        counts = inputs.get("miso_num_mixed", 0), inputs.get("miso_num_examples", 1)
        self._metrics[mode]["multi_context_share"].append(counts[0] / counts[1])
        probe = None if mode in self._probed else Probe()
        # The first batch shows, with the model as it was wrapped for training, that every layer receives the metadata.
        probed = inputs if probe is None else inputs | {"miso_probe": probe}
        shares, packed = Shares(), PackedSegments.from_batch(inputs)
        if self.args.log_shares and packed is not None and packed.num_mixed:
            probed = probed | {"miso_shares": shares}
        loss = super().compute_loss(model, probed, *args, **kwargs)
        for name, value in shares.means(packed).items():
            self._metrics[mode][name].append(value)
        if probe is not None:
            check_probe(probe, self._support.layers, self.accelerator.unwrap_model(self.model))
            self._probed.add(mode)
        if mode == "train":
            self._watch.see(loss[0] if isinstance(loss, tuple) else loss, rows)
        return loss


def _layout(args: MISOSFTConfig) -> Layout:
    return Layout(
        max_length=args.max_length,
        seed=args.seed if args.data_seed is None else args.data_seed,
        chunk_probs=tuple(args.chunk_probs),
        para_prob=args.para_prob,
        full_context_weight=args.full_context_weight,
        output_positions=args.output_positions,
    )


def _miso_config(args: TrainingArguments | None, model: Any) -> MISOSFTConfig:
    """The user's arguments as a MISOSFTConfig, as TRL converts TrainingArguments."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return MISOSFTConfig(f"{name.split('/')[-1]}-MISO")
    if isinstance(args, MISOSFTConfig):
        return args
    values = args.to_dict()
    unknown = sorted(set(values) - set(MISOSFTConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"Got args of type {type(args).__name__} with {unknown}, expected fields of MISOSFTConfig. Fix: derive "
            f"{type(args).__name__} from MISOSFTConfig."
        )
    hidden = [name for name in values if name.endswith("_token")]  # to_dict replaces hub_token, eos_token, ...
    return MISOSFTConfig(**values | {name: getattr(args, name) for name in hidden})
