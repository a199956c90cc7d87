"""MISOSFTTrainer: the method, that is rows, collator, attention and loss. Reliability, the Hub and scores are mixins."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    AutoProcessor,
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
from trl.trainer.utils import get_config_model_id

from trl_miso.attention.shares import Shares
from trl_miso.attention.state import AttentionState
from trl_miso.attention.support import base_of, check_probe, prepare_model, why_not_share
from trl_miso.attention.transformers_attention import Probe, base_implementation, register_miso_attention
from trl_miso.config import MISOSFTConfig
from trl_miso.data.bins import ROW_LENGTHS
from trl_miso.data.collator import ROWS, MISODataCollator
from trl_miso.data.dropped import AnyDataset, Dropped
from trl_miso.data.pipeline import Pipeline, check_first_row, first_row
from trl_miso.data.preparation import COLUMNS
from trl_miso.data.sft_settings import check_rows
from trl_miso.evaluation.callback import ScoredEvaluations
from trl_miso.log import show_log
from trl_miso.segments.packed import PackedSegments
from trl_miso.training import guards
from trl_miso.training.forwards import Forwards, own_forwards
from trl_miso.training.hub import HubPushes
from trl_miso.training.kept_settings import settings_of
from trl_miso.training.neftune import noisy_embeddings
from trl_miso.training.predictions import RowPredictions
from trl_miso.training.quantized import keep_unpacked
from trl_miso.training.reliability import ReliableTrainer
from trl_miso.training.verified import Verified, VerifyFirst
from trl_miso.verification.run import Cost

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = get_logger(__name__)

# Settings of MISO on which the weights do not depend, except by rounding.
_WITHOUT_EFFECT = {"attention_kernel", "eval_contexts", "log_shares", "share_prefixes", "verify"}

_BIBTEX = """\
@article{lu2025enhancing,
    title        = {{Enhancing Complex Instruction Following for Large Language Models with Mixture-of-Contexts Fine-tuning}},
    author       = {Yuheng Lu and ZiMeng Bai and Caixia Yuan and Huixing Jiang and Xiaojie Wang},
    year         = 2025,
    eprint       = {arXiv:2505.11922},
}"""


# The order of the mixins is part of their contract (tests/training/test_reliability.py): ReliableTrainer completes a
# checkpoint before HubPushes uploads it, and after SIGTERM ends training before ScoredEvaluations would score it.
class MISOSFTTrainer(ReliableTrainer, HubPushes, Verified, ScoredEvaluations, RowPredictions, SFTTrainer):
    """[`~trl.SFTTrainer`] that trains on several input contexts per output (MISO, arXiv 2505.11922).

    The only changes: rows become contexts (`_prepare_dataset`), batches are flat and carry segment metadata (the
    collator), and attention mixes the contexts (a registered attention implementation). Loss, metrics with a line per row,
    the format of checkpoints, PEFT and the Hub are SFTTrainer's. The saved model is an ordinary one, used without this
    package.

    Args:
        model: As for SFTTrainer. `attn_implementation="flash_attention_2"` restricts MISO to FlashAttention-2 kernels.
        args ([`MISOSFTConfig`], [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`], *optional*): The latter two are
            converted, with MISO's defaults.
        train_dataset: Rows in any format of `trl_miso.data.schema`.
        data_collator: Must be None: the batch layout is part of the method.

        The other arguments are SFTTrainer's.

    Attributes:
        training_mode: The mode of the training rows: `"para"`, `"succ"`, `"single"` or `"augment"`.
        verification: The results of the last checks, by `train` before its first step or by `verify`.
        model_support: What the model allows, such as shared prefixes and windows; see `attention.support.ModelSupport`.
        dropped_rows: For each prepared dataset the numbers of its dropped rows, by reason (of a stream, among the rows that
            were counted).

    Raises:
        ValueError: Before training, for models, settings or rows that would be trained wrongly.
    """

    row_numbers_key = ROWS
    _is_mixing = False
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
        show_log()
        args = _miso_config(args, model)
        config = guards.check_request(args, model, data_collator, processing_class, peft_config, quantization_config)
        if processing_class is None:  # as SFTTrainer, but now
            revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
            options = {"revision": revision, "trust_remote_code": args.trust_remote_code}
            processing_class = AutoProcessor.from_pretrained(get_config_model_id(config), **options)
        check_first_row(train_dataset, args.assistant_only_loss)
        if train_dataset is not None:
            check_rows(args, first_row(train_dataset, "train"))
            if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
                # Before the weights of a model are loaded.
                is_processor = isinstance(processing_class, ProcessorMixin)
                tokenizer = processing_class.tokenizer if is_processor else processing_class
                Pipeline.of(args, tokenizer).check(train_dataset, formatting_func)
        if args.accelerator_config.dispatch_batches:
            logger.warning(
                "`dispatch_batches=True` is forced to False: flat batches of several ranks cannot be concatenated."
            )
        args.accelerator_config.dispatch_batches = False
        self.training_mode: str | None = None
        self.dropped_rows: dict[str, Dropped] = {}
        self._probed: set[str] = set()
        # Not known before TRL resizes the embeddings: it adds a cloned template's tokens also to a model that it loads.
        self._vocabulary = None if isinstance(model, str) and args.chat_template_path else config.get_text_config()
        ordinary_forwards = own_forwards(model)
        # Bins are planned before TRL has made the model, which may still turn sharing off in `_install`.
        loaded_model = model if isinstance(model, torch.nn.Module) else None
        dropout = getattr(peft_config, "lora_dropout", 0)
        obstacle = why_not_share(loaded_model, config, args.neftune_noise_alpha, dropout)
        self._bins_share_prefixes = args.share_prefixes and not obstacle
        removed = {  # by TRL 2.0: hand on only what was given
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
            **{name: value for name, value in removed.items() if value is not None},
        )
        self.neftune_noise_alpha = None  # `_noise` adds it
        self._forwards = Forwards(self.model, ordinary_forwards)
        self._install(args)
        self.guard_training()
        self.add_callback(VerifyFirst(self))

    def _install(self, args: MISOSFTConfig) -> None:
        """Replace the model's attention and the collator, once TRL has made and wrapped the model."""
        base_model = base_of(self.model)
        guards.check_parallelism(self.accelerator.parallelism_config)
        keep_unpacked(base_model)
        implementation = base_implementation(base_model.config.get_text_config()._attn_implementation)
        registered = register_miso_attention(implementation, args.attention_kernel)
        self.model_support = prepare_model(base_model, registered, args.max_length)
        self._attention = AttentionState.of(base_model)
        mode = self.training_mode or "para"  # rows that the user prepared may have several contexts
        guards.check_checkpointing(args, base_model)
        guards.check_kernel(args, base_model.config, base_model.dtype, implementation, self.accelerator.device)
        guards.check_positions(args, mode, base_model.config.model_type, self.model_support)
        self.data_collator = MISODataCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            weighting=args.context_weighting,
            share_prefixes=self._share_prefixes(args, mode),
            window=self.model_support.window,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _share_prefixes(self, args: MISOSFTConfig, mode: str) -> bool:
        """Whether common prefixes are computed once; logs why not if the config asks for it."""
        if not args.share_prefixes or mode not in ("para", "succ"):
            return args.share_prefixes
        obstacle = why_not_share(self.model, self.model.config, args.neftune_noise_alpha)
        rotates_keys = mode == "para" and args.output_positions == "successive"
        if rotates_keys and not self.model_support.shares:
            obstacle = obstacle or self.model_support.reason
        if not obstacle:
            return True
        consequence = "Every context gets its own copy of its tokens."
        if args.packing and self._bins_share_prefixes:
            consequence += " Bins were planned with shared prefixes and can exceed max_length."
        logger.warning(f"share_prefixes is turned off: {obstacle}. {consequence}")
        return False

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: MISOSFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> AnyDataset:
        """Rows become contexts (`data.pipeline`). TRL calls this for the training set first."""
        uncut = copy(args)
        uncut.max_length = None  # the pipeline cuts rows, and counts the rows without a label left

        def prepare_as_sft(
            rows: AnyDataset, tokenizer: PreTrainedTokenizerBase, name: str, completions_only: bool
        ) -> AnyDataset:
            if completions_only:
                self.completion_only_loss = True
            return super(MISOSFTTrainer, self)._prepare_dataset(rows, tokenizer, uncut, False, None, name)

        pipeline = Pipeline.of(
            args,
            self._tokenizer,
            prepare_as_sft,
            chat_template=self.chat_template,
            vocab_size=getattr(self._vocabulary, "vocab_size", None),
            shares_prefixes=self._bins_share_prefixes,
        )
        prepared = pipeline(dataset, dataset_name, self.training_mode, formatting_func, packing)
        if self.training_mode is None:
            self.training_mode = prepared.mode
        if prepared.dropped is not None:
            self.dropped_rows[dataset_name] = prepared.dropped
        return prepared.rows

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, ROW_LENGTHS]

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as SFTTrainer does, and reliably (`ReliableTrainer.train`). Afterwards the model has its own attention again.

        MISO attention is in force from the trainer's construction to the end of training, and later within the trainer's own
        methods: trainers that share a model each train with their own settings.
        """
        try:
            with self._mixing():
                return super().train(*args, **kwargs)
        finally:
            self._attention.ordinary.set()
            self._forwards.set_ordinary()

    def result_settings(self) -> dict[str, Any]:
        own = settings_of(self.args, [name for name in MISOSFTConfig.__annotations__ if name not in _WITHOUT_EFFECT])
        return own | {"training_mode": self.training_mode} | super().result_settings()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._mixing():
            return super().evaluation_loop(*args, **kwargs)

    def run_checks(self, *args: Any, **kwargs: Any) -> Cost | None:
        with self._mixing():
            return super().run_checks(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._mixing():  # also in backward, where checkpointing runs layers again
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _mixing(self) -> Iterator[None]:
        """This trainer's attention and forward on the model, and on exit those that the model had."""
        if self._is_mixing:
            yield
            return
        before = self._attention.now()
        self._attention.set()
        self._is_mixing = True
        try:
            with self._forwards.in_force():
                yield
        finally:
            self._is_mixing = False
            before.set()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """SFTTrainer's loss of a MISO batch; logs how the batch was mixed."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        metrics["multi_context_share"].append(inputs.get("miso_num_mixed", 0) / inputs.get("miso_num_examples", 1))
        # The first batch shows, on the model as it is wrapped for training, that every layer receives the metadata.
        probe = None if mode in self._probed else Probe()
        if probe is not None:
            inputs = inputs | {"miso_probe": probe}
        packed = PackedSegments.from_batch(inputs)
        shares = Shares(packed if self.args.log_shares else None)
        if self.args.log_shares and packed is not None and packed.num_mixed:
            inputs = inputs | {"miso_shares": shares}
        # A probed forward runs as it is: compiled, it would be compiled for one batch.
        stance = nullcontext() if probe is None else torch.compiler.set_stance("force_eager")
        with stance, self._mixing(), self._noise(packed, inputs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        for name, value in shares.means().items():
            metrics[name].append(value)
        if probe is not None:
            check_probe(probe, self.model_support.layers, self.accelerator.unwrap_model(self.model))
            self._probed.add(mode)
        return loss

    def _noise(self, packed: PackedSegments | None, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """NEFTune's noise on a training batch."""
        alpha = self.args.neftune_noise_alpha
        if not alpha or not self.model.training or packed is None:
            return nullcontext()
        embeddings = base_of(self.accelerator.unwrap_model(self.model)).get_input_embeddings()
        return noisy_embeddings(embeddings, alpha, packed, inputs["input_ids"].shape[1])


def _miso_config(args: TrainingArguments | None, model: Any) -> MISOSFTConfig:
    """Convert the user's arguments to a MISOSFTConfig, as TRL converts TrainingArguments to an SFTConfig."""
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
    for name in values:
        if name.endswith("_token"):  # `to_dict` masks hub_token, eos_token, ...
            values[name] = getattr(args, name)
    return MISOSFTConfig(**values)
