"""The `evaluate` stage: rank the test items with every trained model, the same rows in the same order for all."""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("evaluate")  # before anything that takes time is imported

import logging
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_llmers.candidates import check_enough, load_candidates, make_candidates, read_candidates, save_candidates
from lit_llmers.conf.stages import EvaluateStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, EvaluationBatches, seen_before
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, read_json, readable, write_json
from lit_llmers.metrics import Coverage, ranking_metrics
from lit_llmers.models import load_dataset, load_model
from lit_llmers.preemption import stop_if_asked
from lit_llmers.processes import device_of
from lit_llmers.stages import Stage
from lit_llmers.students.recommender import Recommender
from lit_llmers.teachers.grounding import GroundedRecommender

HEAD_SHARE = 0.2  # of the catalogue, by training interactions
POPULARITY_BINS = (0, 5, 10, 20, 50, 100, 200, 500)

log = logging.getLogger(__name__)


def run(stage: Stage) -> dict[str, Any]:
    """Write `evaluation.json`, each model's ranks and the groups of the test rows.

    The file grows with each model, and what a language model says is kept beside it, so that a pass which was interrupted goes
    on with the model at hand, after what was said.
    """
    config: EvaluateStage = stage.config
    dataset, path = load_dataset(stage), stage.folder / "evaluation.json"
    candidates, candidates_hash = _candidates(stage, dataset)
    rows = EvaluationRows(dataset, "test", 1, config.evaluation.users)
    alone = _alone(config, rows)
    groups = row_groups(dataset, rows)
    with atomic_write(stage.folder / "groups.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **groups)  # type: ignore[arg-type]
    protocol = _protocol(stage, rows, candidates_hash)
    models: list[dict[str, Any]] = read_json(path)["models"] if path.is_file() else []
    before = {(model["name"], model["seed"]) for model in models}
    for fitted in (need for need in stage.needs if need.verb in ("fit", "tune")):
        if (fitted.name, fitted.seed) in before:
            log.info("%-24s evaluated before", fitted.label)
            continue
        models.append(_evaluate(fitted, stage, dataset, candidates, groups))
        write_json(path, {"protocol": protocol, "alone": alone, **_legend(config.evaluation.cutoffs), "models": models})
        figures = models[-1]["metrics"]["all"]
        log.info("%-24s test HR@10 %.4f  NDCG@10 %.4f", fitted.label, figures["HR@10"], figures["NDCG@10"])
    best = max(models, key=lambda model: model["metrics"]["all"]["NDCG@10"])
    return {"models": len(models), "best": best["name"], "NDCG@10": best["metrics"]["all"]["NDCG@10"]}


def check(stage: Stage) -> None:
    """Check that the stage can have its candidates, which is known once the data are prepared, before any training.

    Raises:
        UserError: the user's own file does not fit the data, the catalogue is too small for a sampled protocol, or no target
            has anything to compete with.
    """
    settings, dataset = stage.config.evaluation, load_dataset(stage)
    rows = EvaluationRows(dataset, "test", 1, settings.users)
    if settings.candidates:
        read_candidates(Path(settings.candidates), dataset, rows)
    elif settings.protocol != "full":
        check_enough(dataset, rows.user, _number(settings.protocol))
    else:
        _alone(stage.config, rows)


def _alone(config: EvaluateStage, rows: EvaluationRows) -> int:
    """Number of rows whose target is first whatever a model says.

    Raises:
        UserError: all are.
    """
    settings = config.evaluation
    if settings.candidates or settings.protocol != "full" or not settings.mask_history:
        return 0  # candidates are checked when they are read or drawn
    count = int(without_competitor(rows).sum())
    if count == len(rows):
        raise UserError(
            f"Nothing competes with any of the {count} test items: their users had met all other {rows.dataset.n_items - 1} "
            "items of the catalogue before, so every figure would be 1. Use evaluation.mask_history=false, or take more data."
        )
    return count


def without_competitor(rows: EvaluationRows) -> np.ndarray:
    """`[R]` bool: whether the user had met every item but the target before, so that with the history masked none competes."""
    found, n_items = np.zeros(len(rows), bool), rows.dataset.n_items
    enough = np.flatnonzero(rows.history_length >= n_items - 1)  # hardly ever a row: only for these are items looked at
    seen = seen_before(rows.dataset, rows.user[enough], rows.at[enough], rows.target[enough])
    met = np.zeros((len(enough), n_items + 1), bool)
    met[seen["seen_row"], seen["seen_item"]] = True
    found[enough] = met.sum(1) == n_items - 1
    return found


def _evaluate(
    fitted: Stage, stage: Stage, dataset: Dataset, candidates: np.ndarray | None, groups: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Write the ranks of one trained model; its entry in `evaluation.json`."""
    config: EvaluateStage = stage.config
    rows = EvaluationRows(dataset, "test", fitted.config.sequences.max_length, config.evaluation.users)
    model = load_model(fitted, dataset).to(device_of(fitted.config.trainer))
    name = f"{fitted.name}-seed{fitted.seed}"
    if isinstance(model, GroundedRecommender):
        model.keep(stage.folder / f"said-{name}.jsonl")
    begun, ranks_file = stage.folder / f"begun-{name}.npz", f"ranks-{name}.npy"
    ranks, seconds = rank_all(model, rows, config, candidates, begun)
    named = _named_groups(groups)
    shown = coverage(model, rows, config, named) if candidates is None else {}
    if isinstance(model, GroundedRecommender):
        model.work.warn(fitted.label)
    with atomic_write(stage.folder / ranks_file) as temporary, open(temporary, "wb") as file:
        np.save(file, ranks.astype(np.float32), allow_pickle=False)
    begun.unlink(missing_ok=True)
    ks = tuple(config.evaluation.cutoffs)
    metrics = {name: _metrics(ranks, inside, rows.user, ks) | shown.get(name, {}) for name, inside in named.items()}
    summary = fitted.summary
    return {
        "name": fitted.name,
        "seed": fitted.seed,
        "metrics": metrics,
        "popularity": _by_popularity(ranks, groups["popularity"], rows.user, ks),
        "parameters": summary["parameters"] | {"layers": summary["layers"], "width": summary["width"]},
        "training": {
            "seconds": summary["train_seconds"],
            "targets_per_second": summary.get("targets_per_second"),  # an older version did not count them
            "epochs": summary["epochs"],
        },
        "inference": {"seconds": seconds, "users_per_second": len(rows) / seconds},
        "ranks": ranks_file,
    }


@torch.inference_mode()
def rank_all(
    model: Recommender,
    rows: EvaluationRows,
    config: EvaluateStage,
    candidates: np.ndarray | None,
    begun: Path | None = None,
) -> tuple[np.ndarray, float]:
    """Rank the target of every row.

    Args:
        candidates: `[R, N]` items that compete with the target, or None for the whole catalogue.
        begun: file that an interrupted pass leaves its ranks in, and the next one goes on from.

    Returns:
        ranks `[R]`, 0 is best, ties count half; and the seconds that encoding and ranking took, in an interrupted
        pass too: those of whole batches, and of what a language model had said of the next.
    """
    device, tables = model.device, model.tables()
    batches = EvaluationBatches(rows, config.evaluation.batch_size, config.evaluation.mask_history and candidates is None)
    ranks, before = np.full(len(rows), np.nan), 0.0
    if begun is not None and begun.is_file():
        with readable(begun, begun.parent), np.load(begun, allow_pickle=False) as earlier:
            ranks, before = earlier["ranks"], float(earlier["seconds"])
    if not isinstance(model, GroundedRecommender):  # which remembers what it said
        model.ranks(_on(device, next(iter(batches))), tables)  # warm up
    started, seconds = time.perf_counter(), before
    try:
        for batch in batches:
            stop_if_asked()
            index = batch["row"].numpy()
            if np.isnan(ranks[index]).any():
                competing = None if candidates is None else torch.from_numpy(candidates[index]).long().to(device)
                ranks[index] = model.ranks(_on(device, batch), tables, competing).cpu().numpy()
            said_before = model.work.before if isinstance(model, GroundedRecommender) else 0.0
            seconds = before + said_before + time.perf_counter() - started
    finally:
        if begun is not None:
            with atomic_write(begun) as temporary, open(temporary, "wb") as file:
                np.savez(file, ranks=ranks, seconds=seconds)
    return ranks, seconds


@torch.inference_mode()
def coverage(
    model: Recommender, rows: EvaluationRows, config: EvaluateStage, groups: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """coverage@k over the lists that the rows are shown, whatever is held out: a second pass, for a rank needs no list.

    Args:
        groups: which rows `[R]` belong to each; one without any has no figure.

    Returns:
        `coverage@k` of each group.
    """
    device, tables, ks = model.device, model.tables(), tuple(config.evaluation.cutoffs)
    found = {name: Coverage(rows.dataset.n_items, ks) for name, inside in groups.items() if inside.any()}
    for batch in EvaluationBatches(rows, config.evaluation.batch_size, config.evaluation.mask_history, spare_target=False):
        stop_if_asked()
        lists, index = model.top_items(_on(device, batch), max(ks), tables)[0].cpu(), batch["row"].numpy()
        for name, own in found.items():
            own.update(lists[torch.from_numpy(groups[name][index])])
    return {name: own.compute() for name, own in found.items()}


def _on(device: torch.device, batch: Batch) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def row_groups(dataset: Dataset, rows: EvaluationRows) -> dict[str, np.ndarray]:
    """Which test rows have a popular target, by training counts only, and which a short history, of what came before them.

    Returns:
        `user` `[R]` int64; `head` `[R]` bool, `short` `[R]` bool, `popularity` `[R]` int8 index into `POPULARITY_BINS`.
    """
    count = dataset.popularity()
    order = np.argsort(-count[1:], kind="stable") + 1
    head = np.zeros(dataset.n_items + 1, bool)
    head[order[: max(1, round(HEAD_SHARE * dataset.n_items))]] = True
    return {
        "user": rows.user,
        "head": head[rows.target],
        "short": rows.history_length <= np.median(rows.history_length),
        "popularity": (np.digitize(count[rows.target], POPULARITY_BINS) - 1).astype(np.int8),
    }


def _named_groups(groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    head, short = groups["head"], groups["short"]
    return {"all": np.ones_like(head), "head": head, "tail": ~head, "short": short, "long": ~short}


def _metrics(ranks: np.ndarray, inside: np.ndarray, user: np.ndarray, ks: tuple[int, ...]) -> dict[str, Any]:
    count = {"users": int(np.count_nonzero(np.bincount(user[inside]))), "interactions": int(inside.sum())}
    if not count["users"]:
        return count
    return count | ranking_metrics(torch.from_numpy(ranks[inside]), ks, torch.from_numpy(user[inside]))


def _bin_names() -> list[str]:
    last = f"{POPULARITY_BINS[-1]}+"
    return [f"{low}-{high - 1}" for low, high in pairwise(POPULARITY_BINS)] + [last]


def _by_popularity(ranks: np.ndarray, group: np.ndarray, user: np.ndarray, ks: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"group": name, **_metrics(ranks, group == number, user, ks)} for number, name in enumerate(_bin_names())]


def _legend(cutoffs: list[int]) -> dict[str, Any]:
    share = f"{HEAD_SHARE:.0%} of the catalogue with the most training interactions"
    groups = {
        "head": f"targets among the {share}",
        "tail": "all other targets",
        "short": "targets with a history no longer than the median",
        "long": "all other targets",
    }
    return {"ks": cutoffs, "groups": groups}


def _candidates(stage: Stage, dataset: Dataset) -> tuple[np.ndarray | None, str | None]:
    """What the user's own file says, or the stored candidates of a sampled protocol, drawn when there are none; their hash."""
    settings = stage.config.evaluation
    rows = EvaluationRows(dataset, "test", 1, settings.users)
    if settings.candidates:
        return read_candidates(Path(settings.candidates), dataset, rows)
    if settings.protocol == "full":
        return None, None
    path = stage.folder / "candidates.npy"
    if not (path.is_file() and path.with_name(f"{path.name}.json").is_file()):
        number, seed = _number(settings.protocol), settings.candidate_seed
        check_enough(dataset, rows.user, number)
        drawn = make_candidates(dataset.items, dataset.offsets, dataset.n_items, rows.user, rows.target, number, seed)
        save_candidates(path, drawn, dataset.fingerprint)
    return load_candidates(path, dataset.fingerprint)


def _number(protocol: str) -> int:
    """Of the candidates of a sampled protocol."""
    return int(protocol.partition("-")[2])


def _protocol(stage: Stage, rows: EvaluationRows, candidates_hash: str | None) -> dict[str, Any]:
    settings, dataset = stage.config.evaluation, rows.dataset
    everybody = rows if settings.users is None else EvaluationRows(dataset, "test", 1)
    ranked, users = (len(np.unique(each.user)) for each in (rows, everybody))
    history = "masked" if settings.mask_history or candidates_hash else "kept"
    return {
        "name": Path(settings.candidates).name if settings.candidates else settings.protocol,
        "history": "as in the file" if settings.candidates else history,
        "split": dataset.info["split"],
        "split_hash": dataset.fingerprint,
        "users": users,
        "sample": ranked if ranked < users else None,
        "items": dataset.n_items,
        "interactions": len(rows),
        "candidates": candidates_hash,
    } | ({"selected_on": "test"} if settings.official_select_on_test else {})
