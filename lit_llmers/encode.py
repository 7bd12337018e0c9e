"""The `encode` stage: item text to item vectors, and on request users to vectors of the same space."""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("encode")  # before anything that takes time is imported


from pathlib import Path
from typing import Any

import numpy as np

from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.texts import leaking
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, digest
from lit_llmers.models import load_dataset
from lit_llmers.processes import Processes
from lit_llmers.processes.locks import RECORDS
from lit_llmers.stages import TABLE, USER_TABLE, Stage
from lit_llmers.text.contrast import tune_by_contrast
from lit_llmers.text.prompts import history_texts, item_texts
from lit_llmers.text.reduction import mean_of_histories
from lit_llmers.text.said import said_vectors
from lit_llmers.text.tables import has_vector
from lit_llmers.text.tfidf import tfidf_svd
from lit_llmers.text.transformer import TextEncoder
from lit_llmers.text.vectors import Projection, Recorder

NAMED = 3  # items or users in a message


def run(stage: Stage) -> dict[str, Any]:
    """Write `item_table.npy`, `[n+1, d]` float32, and with `users` also `user_table.npy`, `[U, d]` float32."""
    config: EncodeStage = stage.config
    dataset = load_dataset(stage)
    texts = item_texts(dataset.catalogue, config.fields, config.prompt)
    if any(texts):  # without any, each encoder says so
        check_items(stage, dataset, np.array([not text for text in texts]))
        check_differ(stage, [text for text in texts if text])
    users: np.ndarray | None = None
    summary: dict[str, Any] = {}
    if config.encode == "tfidf":
        table = tfidf_svd(texts, config.dim, stage.seed)
    elif config.encode == "said":
        table, summary = said_vectors(stage, dataset, texts)
    else:
        table, users, summary = _transformer(stage, dataset, texts)
    if not Processes.here().of(stage).first:
        return {}
    if config.encode != "transformer" and config.reduce is not None:
        table = Projection.fit(table[has_vector(table)], config.reduce, stage.seed, config.whiten)(table)
    if config.shuffle:
        random = np.random.default_rng(stage.seed)
        table[1:] = table[1:][random.permutation(len(texts))]
        users = None if users is None else users[random.permutation(len(users))]
    if config.users == "mean":
        users = mean_of_histories(table, dataset.training_pairs, dataset.n_users)
    check_items(stage, dataset, ~has_vector(table[1:]))  # a text may hold no word that counts
    if users is not None:
        check_users(stage, dataset, ~has_vector(users))
    _save(stage.folder / TABLE, table)
    summary = {"items": len(texts), "dim": table.shape[1], "without_text": int((~has_vector(table[1:])).sum())} | summary
    if users is not None:
        _save(stage.folder / USER_TABLE, users)
        summary |= {"users": len(users), "users_without_vector": int((~has_vector(users)).sum())}
    leaks = leaking(config.read, dataset.info.get("texts", {}))
    return summary | ({"leaking": leaks} if leaks else {})


def check_items(stage: Stage, dataset: Dataset, missing: np.ndarray) -> None:
    """Refuse items, true in `[n]`, that have nothing to encode, unless the stage says that they have no vector then.

    Raises:
        UserError: it names the first of them.
    """
    first = dataset.catalogue[missing][:NAMED]
    named = [f"'{item}' ({title or 'no title'})" for item, title in zip(first["item_id"], first["title"], strict=True)]
    lack = f"items have no text to encode in {', '.join(stage.config.fields)} (fields)"
    _check_missing(stage, missing, named, lack, f"Name a field that has text of them in stages.{stage.name}.fields")


def check_differ(stage: Stage, texts: list[str]) -> None:
    """Refuse texts of several items that are all the same: what their vectors would differ in is rounding.

    Raises:
        UserError: it quotes the text.
    """
    if len(texts) > 1 and len(set(texts)) == 1:
        raise UserError(
            f"Stage '{stage.name}': the {len(texts)} items with a text in {', '.join(stage.config.fields)} (fields) all have "
            f"the same, '{texts[0][:60]}', which tells none from another. Name a field that differs in "
            f"stages.{stage.name}.fields."
        )


def check_users(stage: Stage, dataset: Dataset, missing: np.ndarray) -> None:
    """The same of users, true in `[U]`."""
    named = [f"'{user}'" for user in dataset.users[missing][:NAMED]]
    lack = {
        "mean": "users have no training item with a vector",
        "history": "users have no training item with a title",
        "profile": f"users have no text to encode in {stage.config.profile} (profile)",
    }
    _check_missing(
        stage, missing, named, lack[stage.config.users], f"Encode users otherwise, as stages.{stage.name}.users=mean"
    )


def _check_missing(stage: Stage, missing: np.ndarray, named: list[str], lack: str, cure: str) -> None:
    if missing.any() and stage.config.missing == "refuse":
        raise UserError(
            f"Stage '{stage.name}': {int(missing.sum())} of {len(missing)} {lack}, first {', '.join(named)}. {cure}, or set "
            f"stages.{stage.name}.missing=zero: they have no vector then, and docs/methods.md says what that means."
        )


def _transformer(stage: Stage, dataset: Dataset, texts: list[str]) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """The tables of items and users, and what they cost."""
    config: EncodeStage = stage.config
    mine = Processes.here().of(stage)
    encoder = TextEncoder(config, mine.local_rank)
    of_users = _user_texts(stage, dataset, encoder)
    settings: list[Any] = [config.pooling, config.max_tokens, config.normalise]
    tuned = tune_by_contrast(stage, dataset, encoder) if config.contrast else {}
    identity = digest([encoder.base.name, encoder.revision, stage.content, *settings, *([stage.fingerprint] if tuned else [])])
    record = Recorder(encoder, identity, stage.run.folder / RECORDS, stage.label, mine, stage.folder)
    vectors = record(texts)
    filled = has_vector(vectors)
    if not filled.any():
        raise UserError(
            f"The {len(texts)} item texts hold no word. Name text columns in the stage's fields, or encode other data."
        )
    project = Projection.fit(vectors[filled], config.reduce, stage.seed, config.whiten)
    users = None if of_users is None else project(record(of_users))
    table = np.concatenate([np.zeros((1, vectors.shape[1]), np.float32), vectors])
    return project(table), users, {"model": encoder.base.name, "identity": identity, **record.cost(), **tuned}


def _user_texts(stage: Stage, dataset: Dataset, encoder: TextEncoder) -> list[str] | None:
    """U texts, where those of users are encoded."""
    config: EncodeStage = stage.config
    if config.users not in ("history", "profile"):
        return None
    if config.users == "history":
        texts = history_texts(dataset, encoder.lengths, config.max_tokens, config.user_prompt)
    else:
        assert dataset.user_texts is not None
        texts = dataset.user_texts[config.profile].tolist()
    check_users(stage, dataset, np.array([not text for text in texts]))
    return texts


def _save(path: Path, table: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, table, allow_pickle=False)
