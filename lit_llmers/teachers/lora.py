"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685), through PEFT."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_llmers.errors import UserError

if TYPE_CHECKING:
    import peft
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraConfig:
    """Adapters `W + alpha / rank * B A`. The defaults are E4SRec's and SLMRec's.

    Attributes:
        rank: rows of A and columns of B.
        alpha: scale of the adapters, before the division by `rank`.
        dropout: probability, on what enters A.
        targets: names of the linear layers to adapt.
    """

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        for name, value in {"rank": self.rank, "alpha": self.alpha}.items():
            if value < 1:
                raise UserError(f"lora.{name} is {value}. It must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}. It must be 0 or more and less than 1.")


def add_lora(model: "PreTrainedModel", config: LoraConfig) -> None:
    """Freeze `model` and put trainable float32 adapters into it, in place. B is zero, so its outputs do not change.

    Raises:
        UserError: a target is not the name of a layer of the model.
    """
    import peft

    peft.inject_adapter_in_model(_settings(model, config), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def with_lora(model: "PreTrainedModel", config: LoraConfig, task: str | None = "CAUSAL_LM") -> "PeftModel":
    """A language model inside PEFT's own wrapper, which saves adapters by themselves and can turn them off.

    Args:
        task: PEFT's name for what the model does; None for one without a head.

    Raises:
        UserError: a target is not the name of a layer of the model.
    """
    import peft

    settings = _settings(model, config)
    settings.task_type = task
    return peft.get_peft_model(model, settings)


def _settings(model: "PreTrainedModel", config: LoraConfig) -> "peft.LoraConfig":
    import peft

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "in_features")}
    missing = [target for target in config.targets if target not in names]
    if missing or not config.targets:
        raise UserError(
            f"lora.targets={list(config.targets)} does not fit this base: {missing or 'nothing'} is not a linear layer "
            f"of it. It has: {', '.join(sorted(names))}."
        )
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        bias="none",
    )
