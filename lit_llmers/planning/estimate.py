"""From a planned stage to figures: memory of each process, work, time and disk. All of it goes inside `pretending`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.backbones import CollaborativeBackbone, CountingBackbone
from lit_llmers.building import RECORDS, find, references
from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.conf.instruction import VALIDATING, GenerationConfig, TuneStage
from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.conf.stages import EvaluateStage, FitStage, RecordStage
from lit_llmers.data.pairs import PairRows
from lit_llmers.data.sequences import EvaluationRows, TrainingRows
from lit_llmers.losses.alignment import soft_clip
from lit_llmers.planning import steps, texts
from lit_llmers.planning.bases import Missing, prompt_tokens
from lit_llmers.planning.cards import KERNEL, Card
from lit_llmers.planning.data import Known
from lit_llmers.planning.models import Paper, Papers, exported, parameters
from lit_llmers.planning.rehearsal import Rehearsal
from lit_llmers.planning.sharing import checkpoints, held_by, inference_memory, sizes_of, training_memory
from lit_llmers.planning.steps import Online, Training
from lit_llmers.planning.texts import Lengths
from lit_llmers.stages import Stage
from lit_llmers.teachers.base import DTYPES, BaseConfig
from lit_llmers.teachers.grounding import EMBEDDED

Question = Callable[[Any, int, int], Rehearsal]  # of a model, rows and their length
Parts = list[tuple[Rehearsal, float, int]]  # steps, how much of its longest row each has on average, how many a process takes
UNKNOWN_TEXTS = "texts are taken to be as long as max_tokens: they are not known"


@dataclass
class Estimate:
    """What one stage takes, for one seed; None is what cannot be said, and `notes` say why.

    Attributes:
        parameters: total, trainable and item_table.
        memory: bytes of each process by what they are for, see `lit_llmers.planning.sharing`; where layers can be recomputed
            also `activations_checkpointed`, `activations_plain` and `peak_otherwise`, the peak with the other choice.
        disk: bytes that are `kept`, and the last `checkpoint`, which is there while it trains.
        rows, steps, epochs: rows of an epoch, steps of it, epochs at most.
        flops: of all processes together.
        seconds: of each process.
        training: what is trained, where something is.
    """

    parameters: dict[str, int] | None = None
    memory: dict[str, int] | None = None
    disk: dict[str, int] | None = None
    rows: int | None = None
    steps: int | None = None
    epochs: int | None = None
    flops: float | None = None
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    training: Training | None = None


class Estimator:
    """Estimates the stages of one recipe.

    Args:
        known: the data.
        card: which GPU each process has.
        utilisation: share of the card's peak that a large model reaches.
    """

    def __init__(self, known: Known, card: Card, utilisation: float) -> None:
        self.known, self.data, self.card, self.utilisation = known, known.dataset, card, utilisation
        self.papers = Papers(known)

    def __call__(self, stage: Stage) -> Estimate:
        """The estimate of one stage; what is not known is None there, with a note."""
        out = Estimate()
        try:
            getattr(self, f"_{stage.verb}")(stage, out)
        except Missing as missing:
            out.notes.append(f"unknown: {missing}")
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
            # its code asks fake tensors for what they do not have: what was found until here stands
            reason = str(error).strip().partition("\n")[0][:120]
            out.notes.append(f"no step could be rehearsed ({type(error).__name__}: {reason})")
        return out

    # ---- what has no model of its own ------------------------------------------------------------------------------------

    def _prepare(self, stage: Stage, out: Estimate) -> None:
        written = self.data.catalogue.memory_usage(deep=True).sum() if self.known.exact else 0
        out.rows = len(self.data.items)
        out.disk = _disk(5 * len(self.data.items) + 8 * (self.data.n_users + 1) + int(written))

    def _export(self, stage: Stage, out: Estimate) -> None:
        paper = self.papers.of(next(need for need in stage.needs if need.verb == "fit"))
        out.parameters, out.disk = parameters(paper), _disk(exported(paper.model, stage.config.export))

    # ---- what trains -----------------------------------------------------------------------------------------------------

    def _fit(self, stage: Stage, out: Estimate) -> None:
        config: FitStage = stage.config
        backbone, trainer = find("backbones", config.fit), config.trainer
        paper = self.papers.of(stage)
        out.parameters = parameters(paper)
        out.disk = _disk((self.data.n_items + 1) * paper.table * 4)
        if issubclass(backbone, CountingBackbone):
            out.notes.append("counted, not trained")
            return
        in_pairs = issubclass(backbone, CollaborativeBackbone)
        rows: Any = PairRows(self.data) if in_pairs else TrainingRows(self.data, config.sequences)
        longest, share = (1, 1.0) if in_pairs else self._lengths(stage, rows)
        self._epochs(out, len(rows), trainer)
        local = _local(min(trainer.batch_size, len(rows)), trainer)
        every = not in_pairs and rows.every_position
        batch = steps.pairs(local, config.loss.negatives) if in_pairs else steps.histories(local, longest, every)
        model = paper.model

        def loss() -> Tensor:
            at_hand, model.writes_log = dict(batch), False
            for callback in paper.added:
                callback.on_train_batch_start(None, model, at_hand, 0)  # type: ignore[arg-type]
            value: Tensor = model.training_step(at_hand, 0)
            return value

        training = steps.training_step(model, loss, trainer, share)
        held_out = len(EvaluationRows(self.data, "valid", config.sequences.max_length, config.validation_users))
        size = min(held_out, 512 if in_pairs else max(trainer.batch_size, 256))
        ranking = steps.ranking_step(model, _local(size, trainer), longest, trainer)
        training.teacher = None if in_pairs else self._beside(stage, rows, local)
        best, last = checkpoints(training.sizes, trainer.strategy)
        out.disk = _disk(out.disk["kept"] + best, last)
        self._trained(out, training, trainer, ranking)
        validations = (out.epochs or 0) // trainer.validate_every
        number = -(-held_out // size) * validations * trainer.processes
        self._add(out, ranking, share, number, training.precision, trainer.processes)

    def _tune(self, stage: Stage, out: Estimate) -> None:
        config: TuneStage = stage.config
        paper, trainer = self.papers.of(stage), config.trainer
        out.parameters = parameters(paper)
        rows = TrainingRows(self.data, config.sequences).targets
        self._epochs(out, rows if config.samples is None else min(rows, config.samples), trainer)
        if texts.example_lengths(self.known, config) is None:
            out.notes.append(UNKNOWN_TEXTS)
        lengths = self._examples(config)
        local, longest = _local(trainer.batch_size, trainer), lengths.longest

        def loss(read: int) -> Tensor:
            logits = steps.logits(paper.model, local, longest, read)
            learnt = torch.ones(local, read, dtype=torch.bool)
            labels = torch.ones(local * read, dtype=torch.long)
            return F.cross_entropy(logits[learnt].float(), labels, reduction="none").mean()

        learnt = longest - 1 if config.on_prompt else lengths.said
        training = steps.training_step(paper.model, lambda: loss(learnt), trainer, lengths.mean / longest)
        best, last = checkpoints(training.sizes, trainer.strategy)
        saved = training.own.base_trained if config.base.get("path") else training.own.base  # with adapters, beside them
        out.disk = _disk(best + saved, last)
        users = len(EvaluationRows(self.data, "valid", 1, config.validation_users))
        if config.validate == "ranking":
            held_out, parts = self._validation_by_titles(paper.model, config, users)
        else:
            held_out = steps.reading_step(paper.model, lambda: loss(lengths.said), trainer)
            parts = [(held_out, lengths.mean / longest, -(-users // trainer.batch_size))]
        self._trained(out, training, trainer, held_out)
        validations = (out.epochs or 0) // trainer.validate_every
        for part, share, number in parts:
            self._add(out, part, share, number * validations * trainer.processes, training.precision, trainer.processes)

    def _encode(self, stage: Stage, out: Estimate) -> None:
        config: EncodeStage = stage.config
        paper = self.papers.of(stage)
        vectors = self.data.n_items + (self.data.n_users if config.users else 0)
        out.disk = _disk(4 * (vectors + 1) * paper.table)
        if config.encode == "tfidf":
            out.notes.append("counted on the CPU, in minutes at most")
            return
        out.parameters, out.rows = parameters(paper), vectors
        lengths = texts.item_lengths(self.known, config.fields, config.max_tokens)
        if lengths is None:
            out.notes.append(UNKNOWN_TEXTS)
            lengths = Lengths(config.max_tokens, config.max_tokens)
        share, longest = lengths.mean / lengths.longest, lengths.longest
        if config.trainer is not None and config.trains:
            self._epochs(out, self.data.n_items, config.trainer)
            local = _local(config.trainer.batch_size, config.trainer)
            loss = _saying(paper, local, longest) if config.encode == "said" else _views(paper, local, longest)
            training = steps.training_step(paper.model, loss, config.trainer, share)
            saved = training.own.base_trained if config.contrast else 0
            out.disk = _disk(out.disk["kept"] + saved, checkpoints(training.sizes, config.trainer.strategy)[1])
            self._trained(out, training, config.trainer)
        if config.encode == "transformer":
            reading = steps.reading_step(paper.model, lambda: steps.states(paper.model, config.batch_size, longest))
            out.memory = _larger(out.memory, inference_memory(sizes_of(paper.model).weights, reading.peak))
            self._add(out, reading, share, -(-vectors // config.batch_size), steps.precision(paper.model), stage.processes)
            if config.users in ("history", "profile"):
                out.notes.append("texts of users are taken to be as long as those of items")

    # ---- what asks trained models ------------------------------------------------------------------------------------------

    def _record(self, stage: Stage, out: Estimate) -> None:
        config: RecordStage = stage.config
        teacher = stage.need(config.of)
        targets = TrainingRows(self.data, teacher.config.sequences) if config.of_targets else None
        out.rows = self.data.n_users if targets is None else targets.targets
        if config.online:
            out.notes.append("nothing is recorded: the teacher runs beside the student (signals.online)")
            return
        if config.record == "ranking":
            row = 8 * config.k  # an item and its score
        else:
            row = config.blocks * self.papers.of(teacher).model.backbone.width * DTYPES[config.signals.dtype].itemsize
        out.disk = _disk(out.rows * row)

        def question(model: Any, rows: int, longest: int) -> Rehearsal:
            batch = steps.histories(rows, longest, targets is not None and targets.every_position)
            if config.record == "block_states":
                return steps.states_step(model, batch, config.blocks)
            return steps.lists_step(model, batch, config.k, config.of_targets, self._met(targets))

        asked = self.data.n_users if targets is None else len(targets)
        self._ask(teacher, asked, config.batch_size, stage.processes, out, question)

    def _evaluate(self, stage: Stage, out: Estimate) -> None:
        config: EvaluateStage = stage.config
        out.rows = len(EvaluationRows(self.data, "test", 1, config.evaluation.users))
        models = [need for need in stage.needs if need.verb in ("fit", "tune")]
        out.disk = _disk(4 * out.rows * len(models))
        listed = config.evaluation.candidates is None and config.evaluation.protocol == "full"  # a second pass, for coverage
        for name in dict.fromkeys(model.name for model in models):
            same = [model for model in models if model.name == name]
            one = Estimate()
            self._ask(same[0], out.rows * (2 if listed else 1), config.evaluation.batch_size, 1, one)
            out.memory = _larger(out.memory, one.memory)
            out.flops = (out.flops or 0) + len(same) * (one.flops or 0)
            out.seconds = (out.seconds or 0) + len(same) * (one.seconds or 0)
            out.notes += [note for note in one.notes if note not in out.notes]
        if out.memory is None:
            out.flops = out.seconds = None

    def _ask(
        self, stage: Stage, rows: int, size: int, processes: int, out: Estimate, question: Question = steps.ranking_step
    ) -> None:
        """A trained model about rows, so many at a time on each process; `question` rehearses one batch."""
        paper = self.papers.of(stage)
        if stage.verb == "tune":
            self._generate(stage, out)
            return
        if issubclass(find("backbones", stage.config.fit), CountingBackbone):
            out.notes.append(f"{stage.name} is counted, which takes no time to speak of")
            return
        in_pairs = issubclass(find("backbones", stage.config.fit), CollaborativeBackbone)
        longest, share = (1, 1.0) if in_pairs else self._lengths(stage, TrainingRows(self.data, stage.config.sequences))
        asked = question(paper.model, min(size, rows), longest)
        out.memory = inference_memory(sizes_of(paper.model).weights, asked.peak)
        self._add(out, asked, share, -(-rows // min(size, rows)), steps.precision(paper.model), processes)

    def _beside(self, stage: Stage, rows: TrainingRows, local: int) -> Online | None:
        """The teacher that a student asks while it trains, about its own batches; None where it reads what is recorded."""
        recorded = [stage.need(each.stage) for each in references(stage.config) if each.kind in RECORDS]
        online = next((record for record in recorded if record.config.online), None)
        if online is None:
            return None
        teacher = online.need(online.config.of)
        model, (longest, share) = self.papers.of(teacher).model, self._lengths(teacher, rows)
        batch = steps.histories(local, longest, rows.every_position)
        asked = steps.states_step(model, batch, online.config.blocks, recorded=False)
        return Online(sizes_of(model).weights, asked, share, steps.precision(model))

    def _generate(self, stage: Stage, out: Estimate) -> None:
        """A tuned model says titles by beam search: its cache of keys and values counts, its time is unknown.

        Beside it stand the vectors of all titles, and its base where that embeds them and cannot be had of it.
        """
        model, config = self.papers.of(stage).model, stage.config
        prompts, titles = self._saying(model, config, config.generation)
        bases = 1 + (config.generation.embedder == "base" and BaseConfig.of(config.base).lora is None)
        buffers = max(prompts.peak, titles.peak - titles.kept)
        out.memory = inference_memory(bases * sizes_of(model).weights + titles.kept, buffers)
        out.notes.append(f"how long {stage.name} takes to say titles is not estimated")

    def _saying(
        self, model: Any, config: TuneStage, asked: GenerationConfig, trainer: TrainerConfig | None = None
    ) -> tuple[Rehearsal, Rehearsal]:
        """A batch of prompts, with the cache of keys and values of all that is read and said, and the vectors of all titles."""
        lengths, rows, own = self._examples(config), asked.batch_size, model.config
        prompts = steps.reading_step(model, lambda: steps.logits(model, rows, lengths.longest, 1), trainer)
        tokens = lengths.longest + (asked.max_new_tokens or lengths.said)
        width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        cache = 2 * own.num_hidden_layers * heads * width * tokens * rows * asked.num_beams * model.dtype.itemsize
        titles = steps.titles_step(self.data.n_items, own.hidden_size, model.dtype)
        return replace(prompts, forward=prompts.forward + cache), titles

    def _validation_by_titles(self, model: Any, config: TuneStage, users: int) -> tuple[Rehearsal, Parts]:
        """The most that a validation by ranking takes, and its parts.

        Its prompts are read, after each as many tokens said as the longest title has, and all titles read for their vectors.
        """
        trainer, lengths = config.trainer, self._examples(config)
        prompts, titles = self._saying(model, config, VALIDATING, trainer)
        token = steps.reading_step(model, lambda: steps.logits(model, VALIDATING.batch_size, 1, 1), trainer)
        title = steps.reading_step(model, lambda: steps.logits(model, EMBEDDED, lengths.said, 1), trainer)
        mean = getattr(texts.item_lengths(self.known, ["title"], lengths.said), "mean", lengths.said)
        batches = -(-_local(users, trainer) // VALIDATING.batch_size)
        parts = [(prompts, lengths.mean / lengths.longest, batches), (token, 1.0, batches * lengths.said)]
        parts.append((title, mean / lengths.said, -(-self.data.n_items // EMBEDDED)))
        return replace(prompts, forward=titles.kept + max(prompts.peak, titles.peak - titles.kept)), parts

    def _examples(self, config: TuneStage) -> Lengths:
        """How long a tune stage's prompts are with their responses; as long as may be where texts are not known."""
        known = texts.example_lengths(self.known, config)
        return known or Lengths(config.max_tokens, config.max_tokens, config.max_tokens // 4)

    # ---- figures -----------------------------------------------------------------------------------------------------------

    def _lengths(self, stage: Stage, rows: TrainingRows) -> tuple[int, float]:
        """Positions of the longest row, its prompt included, and how much of that a row has on average."""
        config: FitStage = stage.config
        prompt = prompt_tokens(BaseConfig.of(config.model["base"])) if "base" in config.model else 0
        longest = int(rows.lengths.max()) + prompt
        return longest, (float(rows.lengths.mean()) + prompt) / longest

    def _met(self, targets: TrainingRows | None) -> int:
        """Items that a user has met before a target, or before all that is held out: the mean."""
        if targets is None:
            return len(self.data.training_pairs) // self.data.n_users
        user, at = targets.places(np.arange(targets.targets))
        return round(float((at - self.data.offsets[user]).mean()))

    @staticmethod
    def _epochs(out: Estimate, rows: int, trainer: TrainerConfig) -> None:
        out.rows, out.epochs, out.steps = rows, trainer.max_epochs, -(-rows // trainer.batch_size)
        if trainer.limit_train_batches is not None:
            out.steps = min(out.steps, trainer.limit_train_batches)

    def _trained(self, out: Estimate, training: Training, trainer: TrainerConfig, ranking: Rehearsal | None = None) -> None:
        """Memory of each process while it trains, and its time."""
        out.training = training
        held, teacher = held_by(training.sizes, trainer), training.teacher
        beside = (training.beside, None if teacher is None else teacher.step)
        out.memory = training_memory(held, training.step, ranking, *beside)
        if training.other is not None:
            checkpointed, plain = sorted((training.step.kept, training.other.kept))
            out.memory |= {"activations_checkpointed": checkpointed, "activations_plain": plain}
            out.memory["peak_otherwise"] = training_memory(held, training.other, ranking, *beside)["peak"]
        number = (out.steps or 0) * (out.epochs or 0) * trainer.processes
        self._add(out, training.step, training.share, number, training.precision, trainer.processes)
        if teacher is not None:
            self._add(out, teacher.step, teacher.share, number, teacher.precision, trainer.processes)

    def _add(self, out: Estimate, step: Rehearsal, share: float, number: int, precision: str, processes: int = 1) -> None:
        """The work and the time of so many steps, divided among processes.

        A step takes as long as its products at the card's peak and utilisation, and at least as long as its operations take
        to start.
        """
        computing = step.flops * share / (self.card.peak(precision) * self.utilisation)
        out.flops = (out.flops or 0.0) + step.flops * share * number
        out.seconds = (out.seconds or 0.0) + max(computing, step.kernels * KERNEL) * math.ceil(number / processes)


def _local(rows: int, trainer: TrainerConfig) -> int:
    """A batch's rows on each process."""
    return max(1, -(-rows // trainer.processes))


def _disk(kept: int, checkpoint: int = 0) -> dict[str, int]:
    return {"kept": kept, "checkpoint": checkpoint}


def _larger(one: dict[str, int] | None, other: dict[str, int] | None) -> dict[str, int] | None:
    if one is None or other is None:
        return one or other
    return max(one, other, key=lambda memory: memory["peak"])


def _views(paper: Paper, rows: int, length: int) -> Any:
    """The loss of `lit_llmers.text.contrast`."""

    def loss() -> Tensor:
        x, y = steps.states(paper.model, 2 * rows, length).mean(1).chunk(2)
        return soft_clip(x, y, temperature=1.0).mean()

    return loss


def _saying(paper: Paper, rows: int, length: int) -> Any:
    """The loss of `lit_llmers.text.said`."""
    learner: Any = paper.model

    def loss() -> Tensor:
        said = learner.model.get_input_embeddings()(torch.ones(rows, length, dtype=torch.long))
        soft = learner.projector(learner.items(torch.ones(rows, dtype=torch.long)))[:, None].to(said.dtype)
        x = torch.cat([soft, said], 1)
        out = learner.model(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), use_cache=False)
        labels = torch.ones(rows * length, dtype=torch.long)
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels)

    return loss
