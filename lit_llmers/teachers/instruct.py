"""Instruction tuning on titles: a causal language model learns to say which item a user chooses next.

BIGRec: "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems", Bao et al., arXiv 2308.08434, its
first step: cross-entropy of the next item's title after a prompt with the titles before it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_llmers.conf.stages import TuneStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.metrics import RankingMetrics
from lit_llmers.optimizer import adamw
from lit_llmers.stages import Stage
from lit_llmers.teachers.base import BaseConfig, load_causal, load_tokenizer, without_load_report
from lit_llmers.teachers.instructions import IGNORED
from lit_llmers.teachers.lora import with_lora
from lit_llmers.teachers.wording import Wording, title_tokenizer

if TYPE_CHECKING:
    from lit_llmers.teachers.grounding import GroundedRecommender

TOKENIZER = "tokenizer"  # folder of the stage


def read(model: Any, tokens: Tensor, mask: Tensor, **also: Any) -> Any:
    """Run the model on left-padded tokens; padding is masked and not counted in positions."""
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask.long(), position_ids=position, use_cache=False, **also)


def base_of(stage: Stage) -> BaseConfig:
    """The stage's base; one from scratch draws its weights from the stage's seed plus its own."""
    base = BaseConfig.of(stage.config.base)
    return replace(base, seed=base.seed + stage.seed)


def load_wording(stage: Stage, dataset: Dataset) -> Wording:
    """The base's tokenizer, or the one that is kept with the stage, trained on the titles the first time.

    All titles of the catalogue shape that tokenizer; who chose them does not.
    """
    config: TuneStage = stage.config
    tokenizer, folder = load_tokenizer(base_of(stage)), stage.folder / TOKENIZER
    if tokenizer is None and (folder / "DONE").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif tokenizer is None:
        tokenizer = title_tokenizer(dataset, config)
        tokenizer.save_pretrained(folder)
        (folder / "DONE").touch()
    return Wording(tokenizer, dataset, config)


def build_language_model(stage: Stage, wording: Wording) -> Any:
    """The language model before its training, with adapters where the base has `lora`.

    Raises:
        UserError: the base cannot be had, or has too few positions for the stage's prompts.
    """
    config, base = stage.config, base_of(stage)
    model = load_causal(base, wording.tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise UserError(
            f"The base '{base.name}' has {positions} positions, but max_tokens of stage '{stage.name}' is {config.max_tokens}. "
            f"Choose {positions} or less."
        )
    return with_lora(model, base.lora) if base.lora else model


def save_language_model(stage: Stage, model: Any, wording: Wording, folder: Path) -> None:
    """Write what PEFT and transformers load by themselves: the weights, or with LoRA the adapter, and the tokenizer.

    An adapter is of no use without its base, so that of one from scratch is written beside it, as `base`.
    """
    base = base_of(stage)
    with without_load_report():
        if base.lora and not base.path:
            load_causal(base, wording.tokenizer).save_pretrained(folder / "base")
            model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder)
    wording.tokenizer.save_pretrained(folder)


class InstructedModel(L.LightningModule):
    """Trains a causal language model to answer a prompt with a title: cross-entropy, mean over the tokens of a batch.

    Args:
        model: of Hugging Face, or PEFT's wrapper around one.
        config: of the stage.
        ranker: ranks the validation items, for `validate: ranking`.
    """

    def __init__(self, model: Any, config: TuneStage, ranker: "GroundedRecommender | None" = None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.ranker = (ranker,)  # it holds this model: no submodule of it
        self.mean_loss, self.ranking = MeanMetric(), RankingMetrics((5, 10, 20))
        self.tables: Any = None  # during a validation pass

    def token_losses(self, batch: Batch) -> Tensor:
        """The loss of every token to be said, `[T]` float32; only positions from which one is said go through the head."""
        labels = batch["labels"]  # [B, R], of the last R tokens
        logits = read(self.model, batch["tokens"], batch["mask"], logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        learnt = labels != IGNORED
        return F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.token_losses(batch).mean()
        written = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if (written or loss.device.type == "cpu") and not math.isfinite(loss.item()):
            raise UserError(
                f"The loss is not finite at step {self.global_step}. Lower optimizer.lr, or use trainer.precision=32-true."
            )
        if written:
            self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return adamw(self, self.config.optimizer)

    # ---- validation ------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.ranker[0] is not None:
            self.ranker[0].forget()
            self.tables = self.ranker[0].tables()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.ranker[0] is not None:
            self.ranking.update(self.ranker[0].ranks(batch, self.tables))
        else:
            self.mean_loss.update(self.token_losses(batch))

    def on_validation_epoch_end(self) -> None:
        if self.ranker[0] is not None:
            self.log_dict({f"val/{name}": value for name, value in self.ranking.compute().items()})
            self.ranking.reset()
            self.tables = None
        else:
            loss = self.mean_loss.compute()
            self.log_dict({"val/loss": loss, "val/log_likelihood": -loss})
            self.mean_loss.reset()

    # ---- checkpoints: what is frozen is loaded from the base ----------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                checkpoint["state_dict"].pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]


def load_tuned(model: Any, path: Path) -> None:
    """Put the weights of a checkpoint into a language model as `build_language_model` makes it."""
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    saved = {name.removeprefix("model."): value for name, value in saved.items()}
    model.load_state_dict(model.state_dict() | saved)
