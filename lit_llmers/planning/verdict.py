"""Whether a stage fits its card, and what would make it fit: each cure with the memory that it leads to."""

from dataclasses import replace

from lit_llmers.planning.cards import Card
from lit_llmers.planning.estimate import Estimate
from lit_llmers.planning.sharing import held_by
from lit_llmers.planning.steps import Training
from lit_llmers.stages import Stage

GIB = 2**30
LARGEST = 64  # processes that are proposed at most


def fits(estimate: Estimate, card: Card) -> bool | None:
    """Whether a process fits the card; None where its memory is not known."""
    return None if estimate.memory is None else estimate.memory["peak"] <= card.usable


def verdict(stage: Stage, estimate: Estimate, card: Card, name: str) -> str | None:
    """A line for a stage that does not fit; None for one that does, or where nothing is known."""
    if estimate.memory is None or fits(estimate, card):
        return None
    peak, usable = estimate.memory["peak"] / GIB, card.usable / GIB
    found = _cures(stage, estimate, card)
    cure = (
        "Cure: " + ", or ".join(found) if found else "No single cure is enough: take several, a larger card or a smaller model"
    )
    return f"{stage.name} does not fit {name}: {peak:.1f} GiB in each process, of {usable:.1f} usable. {cure}."


def _cures(stage: Stage, estimate: Estimate, card: Card) -> list[str]:
    memory, training, trainer = estimate.memory, estimate.training, getattr(stage.config, "trainer", None)
    assert memory is not None
    if training is None or trainer is None:
        size = getattr(stage.config, "batch_size", None) or getattr(
            getattr(stage.config, "evaluation", None), "batch_size", None
        )
        room = card.usable - memory["weights"]
        if size is None or room <= 0 or int(size * room / memory["buffers"]) < 1:
            return []
        return [f"a batch_size of {int(size * room / memory['buffers'])} instead of {size}"]
    sizes, out = training.sizes, []
    beside = training.beside
    beyond = memory["peak"] - beside - held_by(sizes, trainer).total
    copied = "mixed" in trainer.precision and training.own.base < sizes.base
    copies = training.own.base if copied else 0  # in half, which mixed precision makes of float32 weights that train
    states, validation = memory["activations"] + memory["buffers"] - copies, memory["validation"] - copies
    otherwise = memory.get("peak_otherwise", memory["peak"])
    if beside and memory["peak"] - beside <= card.usable:
        out.append(f"signals.online=false ({(memory['peak'] - beside) / GIB:.1f} GiB)")
    if otherwise < memory["peak"] and otherwise <= card.usable:
        of = "contrast" if stage.verb == "encode" and stage.config.contrast else "base"
        out.append(f"gradient_checkpointing=true of its {of} ({otherwise / GIB:.1f} GiB)")
    if sizes.base_trained > 0.5 * sizes.base:
        adapters = replace(training.own, base_trained=0, trained=max(1, sizes.trained - _elements(training)))
        held = held_by(adapters, trainer)
        peak = held.total + beside + max(states, validation, held.step)
        if peak <= card.usable:
            out.append(f"LoRA adapters on its base ({peak / GIB:.1f} GiB)")
    if sizes.base and stage.verb != "encode":  # which trains on copies alone
        worlds = [2**power for power in range(1, 7) if 2**power > trainer.processes and trainer.batch_size % 2**power == 0]
        for world in worlds:
            held = held_by(training.own, trainer, "zero3", world)
            peak = held.total + beside + max(states * trainer.processes // world, validation, held.step)
            if peak <= card.usable:
                out.append(f"trainer=zero3 on {world} processes ({peak / GIB:.1f} GiB)")
                break
    room = card.usable - beside - held_by(sizes, trainer).total
    rows = int(trainer.batch_size * room / beyond) // trainer.processes * trainer.processes
    if rows >= trainer.processes and memory["validation"] <= room:
        out.append(f"trainer.batch_size={rows} instead of {trainer.batch_size}, with accumulate_grad_batches for the rest")
    return out


def _elements(training: Training) -> int:
    """Trained parameters of the base."""
    sizes = training.sizes
    return sizes.trained * sizes.base_trained // max(1, sizes.stepped)
