"""The models of a recipe's stages as they will be built, and their parameters. All of it goes inside `pretending`."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lit_llmers.backbones import CollaborativeBackbone, CountingBackbone
from lit_llmers.building import RECORDS, build_backbone, build_callbacks, build_fusions, references
from lit_llmers.callbacks.distillation import Distillation
from lit_llmers.conf.encoding import ContrastConfig, EncodeStage
from lit_llmers.conf.instruction import TuneStage
from lit_llmers.conf.stages import FitStage, RecordStage
from lit_llmers.conf.typed import build
from lit_llmers.data.histories import Histories
from lit_llmers.data.loader import Batch
from lit_llmers.planning.bases import on_paper
from lit_llmers.planning.data import Known
from lit_llmers.planning.sharing import dtype_of
from lit_llmers.serving.served import weights_of
from lit_llmers.stages import Stage
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.counting import CountingRecommender
from lit_llmers.students.negatives import UnmetDraw
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender
from lit_llmers.teachers.base import DTYPES, BaseConfig, _architecture, _attention, checkpoint_activations
from lit_llmers.teachers.grounding import GroundedRecommender
from lit_llmers.teachers.lora import LoraConfig, with_lora
from lit_llmers.teachers.wording import INSTRUCTION, title_tokenizer


@dataclass
class Paper:
    """A stage's model on paper.

    Attributes:
        model: what serves: a `Recommender`, or a language model; its tensors are on the meta device.
        added: the callbacks that put loss terms into it.
        table: the item table that it leaves to others, `[n+1, d]`: its width d.
    """

    model: Any
    added: list[Distillation] = field(default_factory=list)
    table: int = 0


class FakeStates:
    """Stands for a teacher's states, recorded or said."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.empty(batch["target"].numel(), *self.shape, dtype=self.dtype)


class FakeLists:
    """Stands for a teacher's recorded lists."""

    def __init__(self, k: int) -> None:
        self.k = k

    def read(self, batch: dict[str, Tensor], drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        targets = batch["target"].numel() if drawn is None else len(drawn)
        return torch.ones(targets, self.k, dtype=torch.long), torch.empty(targets, self.k)


class FakeGrounded(GroundedRecommender):
    """Stands for a tuned language model whose items all have titles, no two alike."""

    def __init__(self, items: int, width: int, dtype: torch.dtype) -> None:
        Recommender.__init__(self, nn.Identity())
        self.titles = [(item,) for item in range(items)]
        self.wording: Any = SimpleNamespace(titles=[None, *self.titles])
        self.empty = partial(torch.empty, items, width, dtype=dtype)

    def embed(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        self.states = self.empty()  # remembered
        return self.empty().double()


class FakeHistories(Histories):
    """Everybody's history is full, and whose pairs a batch holds has met as much as such a user has on average."""

    def inputs(self, users: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        items = torch.ones(len(users), length or self.length, dtype=torch.long)
        return items, items > 0

    def seen(self, users: Tensor) -> Batch:
        met = self.stop - self.dataset.offsets[:-1]
        pairs = round(len(users) * float((met**2).sum() / max(1, met.sum())))
        return dict.fromkeys(("seen_row", "seen_item"), torch.ones(pairs, dtype=torch.long))


class Papers:
    """Builds each stage's model once.

    Args:
        known: the data.
    """

    def __init__(self, known: Known) -> None:
        self.known, self.dataset = known, known.dataset
        self.built: dict[str, Paper] = {}

    def of(self, stage: Stage) -> Paper:
        """The model of a fit, tune or encode stage.

        Raises:
            Missing: the sizes of a language model are not known.
        """
        if stage.name not in self.built:
            make = {"fit": self._fit, "tune": self._tune, "encode": self._encode}[stage.verb]
            self.built[stage.name] = make(stage)
        return self.built[stage.name]

    def width(self, stage: Stage) -> int:
        """Width of the item table that a stage leaves to others."""
        return self.of(stage).table

    # ---- fit ---------------------------------------------------------------------------------------------------------------

    def _fit(self, stage: Stage) -> Paper:
        config: FitStage = stage.config
        if "base" in config.model:
            config = replace(config, model={**config.model, "base": on_paper(BaseConfig.of(config.model["base"]))})
        offered = self._offers(stage)
        sources = {reference.argument: self._source(stage, reference) for reference in references(config) if reference.argument}
        sources = {name: make() for name, make in sources.items()}
        backbone: Any = build_backbone(config, stage.seed, offered)
        if "base" in config.model:
            _keeps_states(backbone.base)
        of_fusions = {name: value for name, value in sources.items() if name.startswith("fusion.")}
        if config.fusion:
            backbone = build_fusions(config, backbone, of_fusions, offered)
        model = self._recommender(config, backbone)
        of_callbacks = {name: value for name, value in sources.items() if name.startswith("callbacks.")}
        added = build_callbacks(config, of_callbacks, offered)
        for callback in added:
            callback.setup(None, model, "fit")  # type: ignore[arg-type]
            model.weights[callback.name] = callback.weight
        table = model.item_table()
        return Paper(model, added, 0 if table is None else table.shape[1])

    def _recommender(self, config: FitStage, backbone: Any) -> Recommender:
        if isinstance(backbone, CountingBackbone):
            return CountingRecommender(backbone)
        if isinstance(backbone, CollaborativeBackbone):
            return CollaborativeRecommender(backbone, config.optimizer, config.loss)
        popularity = torch.ones(self.dataset.n_items + 1) if config.loss.kind == "sampled_softmax" else None
        unmet = None
        if config.loss.unmet:
            pairs, users = (
                torch.ones(size, dtype=torch.long) for size in (len(self.dataset.training_pairs), self.dataset.n_users)
            )
            unmet = UnmetDraw(pairs, pairs.int(), users, self.dataset.n_items)
        return SequentialRecommender(backbone, config.optimizer, config.loss, 1.0, popularity, unmet)

    def _offers(self, stage: Stage) -> dict[str, Any]:
        data, length = self.dataset, stage.config.sequences.max_length
        widths = [self.width(stage.need(name)) for name in stage.config.items]
        return {
            "n_items": data.n_items,
            "n_users": data.n_users,
            "max_length": length,
            "item_table": lambda: torch.ones(data.n_items + 1, sum(widths)),
            "training_pairs": lambda: data.training_pairs,
            "popularity": lambda: torch.from_numpy(data.popularity()),
            "histories": lambda: FakeHistories(data, length),
        }

    def _source(self, stage: Stage, reference: Any) -> Any:
        """Makes what a callback or a fusion reads from another stage."""
        source, rows = stage.need(reference.stage), self.dataset.n_items + 1
        if reference.kind == "model":
            backbone = self.of(source).model.backbone
            return lambda: backbone
        if reference.kind in RECORDS:
            asked: RecordStage = source.config
            if asked.record == "ranking":
                return lambda: FakeLists(asked.k)
            teacher = self.of(source.need(asked.of)).model
            dtype = dtype_of(teacher) if asked.online else DTYPES[asked.signals.dtype]
            return lambda: FakeStates((asked.blocks, teacher.backbone.width), dtype)
        width = self.width(source)
        return lambda: torch.ones(self.dataset.n_users if reference.kind == "users" else rows, width)

    # ---- language models ----------------------------------------------------------------------------------------------------

    def _tune(self, stage: Stage) -> Paper:
        config: TuneStage = stage.config
        base = BaseConfig.of(config.base)
        vocabulary = self._vocabulary(base, config.fields, config.vocabulary, config.instruction or INSTRUCTION)
        return Paper(causal(base, vocabulary, base.lora))

    def _vocabulary(self, base: BaseConfig, *settings: Any) -> int:
        """Size of the tokenizer that is trained on the titles where the base has none; at most what it may be."""
        if base.path or not self.known.exact:
            return int(settings[1])
        with unset_fake_temporarily():
            return len(title_tokenizer(self.dataset, *settings))

    def _encode(self, stage: Stage) -> Paper:
        from lit_llmers.text.transformer import base_of

        config: EncodeStage = stage.config
        if config.encode == "tfidf":
            return Paper(None, table=config.dim)
        base = base_of(config)
        if config.encode == "said":
            vocabulary = self._vocabulary(base, config.fields, config.vocabulary)
            model = causal(base, vocabulary, base.lora if config.train_base else None)
            if not config.train_base:
                model.requires_grad_(False)
            return Paper(said_learner(model, self.dataset.n_items, config.dim), table=config.dim)
        model = encoder(base, config.contrast, f"{stage.name}.contrast.lora")
        return Paper(model, table=config.reduce if isinstance(config.reduce, int) else model.config.hidden_size)


class _Enough(Exception):
    """What was to happen before the first layer has happened."""


def _keeps_states(base: Any) -> None:
    """Have every layer give its states away: transformers sees to it at the first call, when layers may be cut off."""

    def stop(*_: Any) -> None:
        raise _Enough

    hook = base.layers[0].register_forward_pre_hook(stop)
    with suppress(_Enough):
        base(inputs_embeds=torch.ones(1, 1, base.config.hidden_size, dtype=base.dtype), output_hidden_states=True)
    hook.remove()


def causal(base: BaseConfig, vocabulary: int, lora: LoraConfig | None) -> Any:
    """A causal language model of shapes alone, with adapters if asked; one from scratch gets the vocabulary."""
    from transformers import AutoModelForCausalLM

    known = on_paper(base)
    sizes = _architecture(known) if base.path else _architecture(known, vocab_size=vocabulary)
    model: Any = AutoModelForCausalLM.from_config(sizes, dtype=DTYPES[base.dtype], **_attention(base))
    if base.gradient_checkpointing:
        checkpoint_activations(model)
    return with_lora(model, lora) if lora else model


def encoder(base: BaseConfig, contrast: ContrastConfig | None, where: str) -> Any:
    """A text encoder of shapes alone, as it is tuned; `where` its adapters' settings stand is for messages."""
    from transformers import AutoModel

    known = on_paper(base)
    model: Any = AutoModel.from_config(_architecture(known), dtype=DTYPES[base.dtype], **_attention(base))
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.requires_grad_(contrast is not None and contrast.lora is None)
    if contrast is not None and contrast.gradient_checkpointing:
        checkpoint_activations(model)
    lora = contrast.lora if contrast else None
    return with_lora(model, build(LoraConfig, lora, where), task=None) if lora else model


def said_learner(model: Any, n_items: int, dim: int) -> nn.Module:
    """What SAID trains: see `lit_llmers.text.said.SoftTokens`."""
    from lit_llmers.backbones.items import item_embedding

    width = model.get_input_embeddings().weight.shape[1]
    learner = nn.Module()
    learner.model, learner.items = model, item_embedding(n_items, dim, 0.01)
    learner.projector = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))
    return learner


def exported(model: Recommender, formats: Sequence[str]) -> int:
    """Bytes of an export's weights: in their own types, or in float32 in a graph. Adapters are merged into their base."""
    held: Any = weights_of(model)
    if isinstance(model, CollaborativeRecommender):
        held = dict(zip(("users", "items"), model.backbone(), strict=True))
    tensors = [tensor for name, tensor in held.items() if ".lora_" not in name]
    sizes = {"safetensors": [tensor.element_size() for tensor in tensors]}
    sizes["onnx"] = [4 if tensor.is_floating_point() else tensor.element_size() for tensor in tensors]
    return sum(tensor.numel() * size for each in formats for tensor, size in zip(tensors, sizes[each], strict=True))


def parameters(paper: Paper) -> dict[str, int] | None:
    """Parameters of the model that serves, those trained, and those of the item table; None where nothing has any."""
    if paper.model is None:
        return None
    if isinstance(paper.model, Recommender):
        from lit_llmers.models import count_parameters

        table = paper.model.item_table()
        return count_parameters(paper.model) | {"item_table": 0 if table is None else table.numel()}
    own = list(paper.model.parameters())
    table = getattr(paper.model, "items", None)
    return {
        "total": sum(each.numel() for each in own),
        "trainable": sum(each.numel() for each in own if each.requires_grad),
        "item_table": 0 if table is None else table.weight.numel(),
    }
