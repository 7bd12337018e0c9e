"""What an export says of itself, for a server that has nothing of this project: its `README.md`, and the words in the graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llmers.serving.exported import CONFIG, GRAPH, ITEMS, USERS, WEIGHTS

if TYPE_CHECKING:
    from onnx_ir import Model

FACTS = ("n_items", "n_users", "max_length", "mask_history")  # of config.json, which the graph names too

BEFORE = """\
import numpy as np
import onnxruntime
from pyarrow.parquet import read_table

catalogue = read_table("items.parquet").to_pydict()
session = onnxruntime.InferenceSession("model.onnx")
"""
HISTORY = """\
met = [1, 2]  # items that one user met, the oldest first
items = np.array([met], np.int64)
scores = session.run(["scores"], {"items": items, "mask": items > 0})[0][0]
"""
USER = """\
user = 0  # the first row of users.parquet
scores = session.run(["scores"], {"user": np.array([user], np.int64)})[0][0]
"""
MET = 'met = read_table("users.parquet")["items"][user].as_py()\n'
LEAVE_OUT = "scores[met] = -np.inf\n"
AFTER = """\
for item in np.argsort(-scores, kind="stable")[:10]:
    print(catalogue["item_id"][item - 1], catalogue["title"][item - 1], scores[item])
"""


def tensors(description: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """The inputs and the output of a graph by name: type, shape, and what it means.

    Args:
        description: what `config.json` holds.
    """
    n_items, n_users, length = (description[key] for key in ("n_items", "n_users", "max_length"))
    if description["mask_history"]:
        met = "Items that a user has met are scored too: leave them out, as was done when the model was evaluated."
    else:
        met = "Items that a user has met compete with the others, as they did when the model was evaluated."
    every = {
        "items": (
            "int64",
            "[batch, length]",
            f"What each user met, items 1 to {n_items}, the oldest first and the latest last, at least one; shorter rows are "
            f"padded with 0 on the left. Rows may be of any length; of more than max_length = {length} items the latest are "
            "read.",
        ),
        "mask": ("bool", "[batch, length]", "True where `items` has an item and false where it has padding: `items > 0`."),
        "user": ("int64", "[batch]", f"Users 0 to {n_users - 1}: rows of `{USERS}`, counted from 0."),
        "scores": (
            "float32",
            f"[batch, {n_items + 1}]",
            f"Of all items, the higher the better: column i is item i. Column 0 is padding and always -inf. {met}",
        ),
    }
    return {name: every[name] for name in (*description["inputs"], "scores")}


def tables(description: Mapping[str, Any]) -> dict[str, str]:
    """What the rows of the tables beside the graph are, by file."""
    n_items, n_users = description["n_items"], description["n_users"]
    items = f"The {n_items} items, by `item_id`, `title` and `categories`: item i is the i-th row, from 1 on, as in `index`."
    users = f"The {n_users} users, by `user_id`: user i is the i-th row, from 0 on. `items` are those met, the oldest first."
    return {ITEMS: items} | ({USERS: users} if "user" in description["inputs"] else {})


def explain(graph: "Model", description: Mapping[str, Any]) -> None:
    """Write into the graph, in place, what its inputs and its output mean."""
    lines = tensors(description)
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.doc_string = lines[str(value.name)][2]
    said = [f"{name} {shape} {kind}: {meaning}" for name, (kind, shape, meaning) in lines.items()]
    graph.graph.doc_string = "\n".join([*said, *(f"{name}: {meaning}" for name, meaning in tables(description).items())])
    graph.metadata_props.update({key: str(description[key]) for key in FACTS})


def readme(description: Mapping[str, Any], folder: Path) -> str:
    """The `README.md` of an export.

    Args:
        description: what `config.json` is to hold.
        folder: where the other files are by now.
    """
    trained, knows_users = description["trained"], "user" in description["inputs"]
    of = f"stage `{trained['stage']}` of the recipe `{trained['recipe']}`, run `{trained['run']}`, seed {trained['seed']}"
    parts = [f"# {description['backbone']['name']}", f"A trained recommender: {of}."]
    if (folder / GRAPH).is_file():
        rows = [f"| `{name}` | {kind} `{shape}` | {said} |" for name, (kind, shape, said) in tensors(description).items()]
        asked = USER if knows_users else HISTORY
        if description["mask_history"]:
            asked += MET + LEAVE_OUT if knows_users else LEAVE_OUT
        beside = f" Its weights are in `{GRAPH}.data`, which belongs beside it." if (folder / f"{GRAPH}.data").is_file() else ""
        parts += [
            f"## {GRAPH}",
            f"The whole model as one graph.{beside} Its inputs, and its output `scores`:",
            "\n".join(["| tensor | type | meaning |", "|---|---|---|", *rows]),
            f"```python\n{BEFORE}{asked}{AFTER}```",
        ]
    files = tables(description) | {CONFIG: "How the model is built, and where it comes from."}
    if (folder / WEIGHTS).is_file():
        files[WEIGHTS] = "The weights, for PyTorch: `lit_llmers.serving.load_exported(FOLDER)`."
    question = "user=ID" if knows_users else 'history="TITLE; TITLE"'
    parts += [
        "## The other files",
        "\n".join(f"- `{name}`: {said}" for name, said in files.items()),
        f"Where lit_llmers is installed: `python -m lit_llmers.recommend run=FOLDER {question}`.",
    ]
    return "\n\n".join(parts) + "\n"
