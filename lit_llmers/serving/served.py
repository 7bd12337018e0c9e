"""A trained model as an export holds it: from what a user is known by, a history or a row of a table, to all scores.

There are three kinds, as there are of backbones, and each says in one class what it reads and how it scores. Checks,
safetensors, ONNX and PyTorch then treat all alike.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lit_llmers.backbones import Backbone, CollaborativeBackbone, CountingBackbone
from lit_llmers.building import build_backbone, build_fusions, find
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.conf.stages import FitStage
from lit_llmers.errors import UserError
from lit_llmers.fusion import Fusion
from lit_llmers.fusion.text import TextTable
from lit_llmers.serving.exported import AGAIN, CONFIG, WEIGHTS
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.counting import CountingRecommender
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender


class Served(nn.Module):
    """A module from the tensors that `inputs` names to scores `[B, n+1]`; `-inf` for item 0, which is padding.

    Args:
        model: a recommender of the kind.
        max_length: items of a history that are read, the latest ones; those before are cut off, however many there are.

    Attributes:
        inputs: `items [B, L]` int64, left-padded with 0, and `mask [B, L]` bool; or `user [B]` int64, 0..U-1.
    """

    inputs: ClassVar[tuple[str, ...]] = ("items", "mask")

    def __init__(self, model: Any, max_length: int) -> None:
        super().__init__()
        self.model, self.max_length = model, max_length

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scores(*map(self._latest, inputs)).index_fill(1, inputs[0].new_zeros(1), float("-inf"))

    def _latest(self, value: Tensor) -> Tensor:
        """What is read of `[B, L]`, its last columns; users `[B]` as they are."""
        if value.dim() == 1:
            return value
        read = torch.sym_min(value.shape[1], self.max_length)  # a negative index says too little of the length to the exporter
        return value.narrow(1, value.shape[1] - read, read)

    def scores(self, *inputs: Tensor) -> Tensor:
        """Scores `[B, n+1]`, of item 0 too."""
        raise NotImplementedError

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of some rows."""
        items = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]])
        return items, items > 0


class ServedSequence(Served):
    """The user vector of a history scores the item table."""

    model: SequentialRecommender

    def scores(self, *inputs: Tensor) -> Tensor:
        return self.model.encode(*inputs) @ self.model.item_table().T


class ServedCounts(Served):
    """What was counted scores the items of a history."""

    model: CountingRecommender

    def scores(self, *inputs: Tensor) -> Tensor:
        return self.model.backbone.scores(*inputs)


class ServedTables(Served):
    """A row of the user table scores the item table."""

    inputs = ("user",)
    model: CollaborativeRecommender

    def scores(self, *inputs: Tensor) -> Tensor:
        users, items = self.model.backbone()
        return users[inputs[0]] @ items.T

    def example(self) -> tuple[Tensor, ...]:
        return (torch.zeros(5, dtype=torch.int64),)


KINDS = {SequentialRecommender: ServedSequence, CollaborativeRecommender: ServedTables, CountingRecommender: ServedCounts}


def served(model: Recommender, max_length: int) -> Served:
    """The model as an export serves it, with no more of a history than it was trained to read."""
    return next(kind(model, max_length) for trained, kind in KINDS.items() if isinstance(model, trained))


class FinalTables(CollaborativeBackbone):
    """What is left of a collaborative model when it is exported: users `[U, d]` and items `[n+1, d]`, without its graph."""

    users: Tensor
    items: Tensor

    def __init__(self, users: Tensor, items: Tensor) -> None:
        super().__init__()
        self.layers, self.width, self.dim = 0, users.shape[1], users.shape[1]
        self.register_buffer("users", users.detach().clone())
        self.register_buffer("items", items.detach().clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.users, self.items


def weights_of(model: Recommender) -> dict[str, Tensor]:
    """The backbone's weights, and what it holds beside them, such as a frozen item table or items' text vectors."""
    held = {name: module.get_buffer(own) for name, module, own in _held(model.backbone)}
    every = {name: value for name, value in held.items() if value.numel()} | model.backbone.state_dict()
    return {name: value.detach().cpu().contiguous() for name, value in every.items()}


def _held(backbone: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Names of the buffers of backbones and text tables, where they are, and their names there.

    What the modules of an LLM hold beside their weights is made by its config.
    """
    for prefix, module in backbone.named_modules():
        if isinstance(module, Backbone | CollaborativeBackbone | CountingBackbone | TextTable):
            for name, _ in module.named_buffers(recurse=False, remove_duplicate=False):
                yield (f"{prefix}.{name}" if prefix else name), module, name


def innermost(backbone: nn.Module) -> nn.Module:
    """The student's own backbone, without the fusions around it."""
    while isinstance(backbone, Fusion):
        backbone = backbone.inner
    return backbone


def rebuild(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Recommender:
    """Make the model that `config.json` describes and give it its weights.

    Raises:
        UserError: the weights are of another model.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights, which are replaced, are not to shift anyone's dice
        model = _without_weights(config)
    backbone = model.backbone
    own = backbone.state_dict()
    held = {name: (module, key) for name, module, key in _held(backbone) if name not in own}
    for name, (module, key) in held.items():  # copied into aligned memory: else the last bit of a score may differ
        if name in weights:
            setattr(module, key, weights[name].clone())
    expected = own.keys() | {name for name, (module, key) in held.items() if module.get_buffer(key).numel()}
    wrong = sorted(expected ^ weights.keys()) or sorted(name for name in own if own[name].shape != weights[name].shape)
    if wrong:
        raise UserError(f"{WEIGHTS} is not of the model in {CONFIG}: they differ in '{wrong[0]}'. {AGAIN}")
    backbone.load_state_dict({name: weights[name] for name in own})
    return model.eval()


def _without_weights(config: Mapping[str, Any]) -> Recommender:
    name, n_items, dim = config["backbone"]["name"], config["n_items"], config["dim"]
    cls = find("backbones", name)
    if issubclass(cls, CollaborativeBackbone):
        return CollaborativeRecommender(FinalTables(torch.zeros(config["n_users"], dim), torch.zeros(n_items + 1, dim)))
    own, around = config["backbone"], config.get("fusion", [])
    offered = {
        "n_items": n_items,
        "n_users": config.get("n_users"),
        "max_length": config["max_length"],
        "item_table": torch.zeros(n_items + 1, own.get("dim", dim)),
        "training_pairs": np.zeros((0, 2), np.int64),
        "popularity": torch.ones(n_items + 1, dtype=torch.int64),
    }
    stage = FitStage(
        name,
        own["arguments"],
        fusion=[{entry["name"]: entry["arguments"]} for entry in around],
        sequences=SequenceConfig(max_length=config["max_length"]),
    )
    backbone: Any = build_backbone(stage, 0, offered)
    if isinstance(backbone, CountingBackbone):
        return CountingRecommender(backbone)
    texts = {
        f"fusion.{entry['name']}.{argument}": torch.zeros(n_items + 1, width)
        for entry in around
        for argument, width in entry["text"].items()
    }
    return SequentialRecommender(build_fusions(stage, backbone, texts, offered))
