"""An export scores as the trained model does, needs nothing but its own folder, and is whole or not there."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from pyarrow.parquet import read_table
from safetensors.torch import load_file, save_file
from tiny_export import DIM, MAX_LENGTH, N_ITEMS, TITLES, dataset, export_stage, finish

from lit_llmers import export
from lit_llmers.backbones.item_knn import ItemKNN
from lit_llmers.conf.stages import ExportStage
from lit_llmers.errors import UserError
from lit_llmers.models import load_model
from lit_llmers.recommend import Recommender
from lit_llmers.serving import OnnxScorer, TorchScorer, inputs_of, load_exported, onnx_graph, score_catalogue
from lit_llmers.students.counting import CountingRecommender

SIZES = {
    "vocab_size": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def llm(kind: str, **base) -> dict:
    return {"base": {"name": kind, "config": SIZES | {"model_type": kind}} | base, "layers": 2}


MODELS = {
    "sasrec": ("sasrec", {"dim": DIM, "layers": 2}),
    "gru4rec": ("gru4rec", {"dim": DIM, "layers": 2}),
    "llama": ("llm_decoder", llm("llama") | {"train_items": True}),
    "popularity": ("popularity", {}),
    "item-knn": ("item_knn", {"neighbours": 5, "shrink": 1.0}),
    "bpr-mf": ("bpr_mf", {"dim": DIM}),
    "lightgcn": ("lightgcn", {"dim": DIM, "layers": 2}),
    "simgcl": ("lightgcn", {"dim": DIM, "layers": 2, "with_input": False}),
    "mixgcf": ("mixgcf", {"dim": DIM, "layers": 2}),
    "sliding window": ("llm_decoder", llm("mistral", config=SIZES | {"model_type": "mistral", "sliding_window": 4})),
}


COLLABORATIVE = ("bpr-mf", "lightgcn", "simgcl", "mixgcf")


def users() -> list[np.ndarray]:
    """Other batches of users than any that the export saw."""
    every = np.arange(dataset().n_users)
    return [every[:1], every[-2:][::-1].copy(), every, every.repeat(3)]


def histories(random: np.random.Generator) -> list[np.ndarray]:
    """Left-padded batches of other shapes than any that the export saw."""
    made = []
    longer = [(3, MAX_LENGTH + 1), (3, MAX_LENGTH + 2), (3, 3 * MAX_LENGTH)]
    for rows, length in [(1, 1), (1, MAX_LENGTH), (7, 2), (3, MAX_LENGTH - 1), (2, MAX_LENGTH), *longer]:
        items = random.integers(1, N_ITEMS + 1, (rows, length))
        for row in range(1, rows):
            items[row, : random.integers(0, length)] = 0
        made.append(items)
    return made


def assert_same_scores(got: np.ndarray, expected: np.ndarray, atol: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == np.float32
    assert np.isneginf(got[:, 0]).all()
    np.testing.assert_allclose(got[:, 1:], expected[:, 1:], rtol=0, atol=atol)


def trained_scores(stage, asked: np.ndarray) -> np.ndarray:
    """Of the latest items, where there are more than it was trained to read."""
    model, asked = load_model(stage.need("student"), dataset()), asked[:, -MAX_LENGTH:] if asked.ndim > 1 else asked
    with torch.inference_mode():
        return score_catalogue(model, MAX_LENGTH, *map(torch.from_numpy, inputs_of(asked).values())).numpy()


def moved(stage, place):
    """The export alone, with the run that it comes from gone."""
    shutil.copytree(stage.folder, place)
    shutil.rmtree(stage.run.folder)
    return place


@pytest.mark.parametrize("name", MODELS)
def test_both_files_score_as_the_trained_model(name, tmp_path):
    stage = export_stage(tmp_path / "run", *MODELS[name], ["safetensors", "onnx"])
    summary = finish(stage)
    assert summary["max_difference"]["safetensors"] == 0.0
    assert summary["max_difference"]["onnx"] < 1e-4
    collaborative = ["users.parquet"] if name in COLLABORATIVE else []
    assert summary["files"] == ["config.json", "README.md", "items.parquet", *collaborative, "model.safetensors", "model.onnx"]
    assert all((stage.folder / file).stat().st_size == size for file, size in summary["bytes"].items())
    batches = users() if collaborative else histories(np.random.default_rng(0))
    expected = [trained_scores(stage, asked) for asked in batches]
    folder = moved(stage, tmp_path / "moved")
    scorers = TorchScorer(folder), OnnxScorer(folder / "model.onnx")
    inputs = [(value.name, value.shape) for value in scorers[1].session.get_inputs()]
    history = [("items", ["batch", "length"]), ("mask", ["batch", "length"])]
    assert inputs == ([("user", ["batch"])] if collaborative else history)
    assert json.loads((folder / "config.json").read_text())["inputs"] == [name for name, _ in inputs]
    for items, scores in zip(batches, expected, strict=True):
        assert_same_scores(scorers[0](items), scores, atol=0)
        assert_same_scores(scorers[1](items), scores, atol=1e-4)
    assert not any(name.startswith("distillation") for name in load_file(folder / "model.safetensors"))
    assert b"lit_llmers/" not in (folder / "model.onnx").read_bytes()  # no paths of the machine that exported


def printed_by_the_readme(folder) -> list[str]:
    """By its own example, run where the export lies."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("mask_history", [True, False])
@pytest.mark.parametrize("name", ["popularity", "bpr-mf"])
def test_an_export_explains_itself(name, mask_history, tmp_path):
    stage = export_stage(tmp_path / "run", *MODELS[name], ["safetensors", "onnx"], mask_history)
    finish(stage)
    folder = moved(stage, tmp_path / "moved")
    session = OnnxScorer(folder / "model.onnx").session
    readme, words = (folder / "README.md").read_text(), session.get_modelmeta()
    for value in (*session.get_inputs(), *session.get_outputs()):
        kind = value.type.removeprefix("tensor(").removesuffix(")").replace("float", "float32")
        shape = ", ".join(map(str, value.shape))
        assert f"| `{value.name}` | {kind} `[{shape}]` | " in readme
        assert f"{value.name} [{shape}] {kind}: " in words.graph_description
    facts = {"n_items": str(N_ITEMS), "n_users": "20", "max_length": str(MAX_LENGTH), "mask_history": str(mask_history)}
    assert words.custom_metadata_map == facts
    said = ["Column 0 is padding", "`items.parquet`", "leave them out" if mask_history else "compete with the others"]
    history = ["padded with 0 on the left", f"more than max_length = {MAX_LENGTH} items"]
    said += ["Users 0 to 19: rows of `users.parquet`"] if name == "bpr-mf" else history
    assert all(phrase in readme for phrase in said)
    assert ("users.parquet" in readme) == (folder / "users.parquet").is_file() == (name == "bpr-mf")

    met, question = ([1, 2], {}) if name == "popularity" else (dataset().items[: dataset().offsets[1]].tolist(), {"user": "u0"})
    ranked = Recommender.load(folder).rank([] if question else met, 10, **question)
    assert printed_by_the_readme(folder) == [f"i{item} {TITLES[item - 1]} {np.float32(score)!s}" for item, score in ranked]
    assert bool({item for item, _ in ranked} & set(met)) <= (not mask_history)


def test_the_scores_of_a_table_are_dot_products_and_those_of_neighbours_sums(tmp_path):
    stage = export_stage(tmp_path / "run", *MODELS["lightgcn"], ["safetensors"])
    assert finish(stage)["max_difference"] == {"tables": 0.0, "safetensors": 0.0}
    tables = load_file(stage.folder / "model.safetensors")
    assert {name: tuple(table.shape) for name, table in tables.items()} == {"users": (20, DIM), "items": (N_ITEMS + 1, DIM)}
    got = TorchScorer(stage.folder)(np.array([7, 0]))
    np.testing.assert_allclose(got[:, 1:], (tables["users"][[7, 0]] @ tables["items"].T)[:, 1:], rtol=1e-5, atol=1e-6)

    stage = export_stage(tmp_path / "knn", *MODELS["item-knn"], ["safetensors"])
    finish(stage)
    tables = load_file(stage.folder / "model.safetensors")
    expected = np.zeros(N_ITEMS + 1)
    for item in (3, 9, 3):
        np.add.at(expected, tables["nearest"][item], tables["weight"][item])
    np.testing.assert_allclose(TorchScorer(stage.folder)(np.array([[0, 3, 9, 3]]))[0, 1:], expected[1:], rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2])
def test_a_graph_that_reads_one_item_or_two_takes_any_history(length, tmp_path):
    counted = ItemKNN(N_ITEMS, 20, dataset().training_pairs, neighbours=5, shrink=1.0)
    program = onnx_graph.trace(CountingRecommender(counted), length)
    items = np.array([[0, 0, 3, 9, 3], [1, 4, 5, 2, 8]])

    def check(path):
        for rows in (items, items[:, -length:], items[:1]):
            got = OnnxScorer(path)(rows)
            assert_same_scores(got, expected[: len(got)], atol=1e-5)
        return 0.0

    latest = torch.from_numpy(items[:, -length:])
    expected = counted.scores(latest, latest > 0).index_fill(1, torch.tensor([0]), float("-inf")).numpy()
    onnx_graph.save_onnx(program, tmp_path, check)


def test_the_users_file_names_all_that_each_has_met(tmp_path):
    stage = export_stage(tmp_path / "run", *MODELS["bpr-mf"], ["onnx"])
    finish(stage)
    table, data = read_table(stage.folder / "users.parquet").to_pydict(), dataset()
    assert table["user_id"] == list(data.users)
    assert table["items"] == [part.tolist() for part in np.split(data.items, data.offsets[1:-1])]


@pytest.fixture
def base_folder(tmp_path):
    """A base on disk with a tokenizer, as a hub has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "#": 2, "user": 3, ":": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES | {"vocab_size": 5})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_prompted_base_with_adapters_is_merged_and_needs_no_hub(base_folder, tmp_path, dtype, tolerance):
    base = {"name": "hub", "path": str(base_folder), "prompt": "user :", "dtype": dtype, "lora": LORA}
    formats = ["safetensors", "onnx"] if dtype == "bfloat16" else ["safetensors"]
    stage = export_stage(tmp_path / "run", "llm_decoder", {"base": base, "layers": 3}, formats)
    difference = finish(stage)["max_difference"]
    batches = histories(np.random.default_rng(0))
    expected = [trained_scores(stage, items) for items in batches]
    shutil.rmtree(base_folder)
    folder = moved(stage, tmp_path / "moved")
    largest = max(np.abs(scores[:, 1:]).max() for scores in expected)
    assert difference["safetensors"] == 0.0
    assert difference["lora_merge"] <= tolerance * largest
    names = load_file(folder / "model.safetensors")
    assert not any("lora" in name for name in names)
    assert {"before", "after", "items"} < set(names)
    scorer = TorchScorer(folder)
    assert scorer.model.backbone.base.dtype == getattr(torch, dtype)
    assert scorer.model.backbone.layers == 3
    for items, scores in zip(batches, expected, strict=True):
        assert_same_scores(scorer(items), scores, atol=tolerance * largest)
    if "onnx" in formats:  # in float32: what it is compared with was compared by the stage
        assert difference["onnx"] < 1e-4 * largest
        for items, scores in zip(batches, expected, strict=True):
            assert_same_scores(OnnxScorer(folder / "model.onnx")(items), scores, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("float16", 1.1), ("bfloat16", 1.5), ("bfloat16", np.nan)])
def test_a_merge_that_scores_otherwise_is_not_exported(tmp_path, monkeypatch, dtype, factor):
    def merge_adapters(backbone):
        backbone.score.weight.data *= factor
        return merge(backbone)

    merge = export._merge_adapters
    stage = export_stage(tmp_path / "run", "llm_decoder", llm("llama", dtype=dtype, lora=LORA), ["safetensors"])
    with monkeypatch.context() as patch:
        patch.setattr(export, "_merge_adapters", merge_adapters)
        with pytest.raises(UserError, match=rf"merged into the base, in {dtype}, .* not exported\. Train it with"):
            export.run(stage)
    assert not list(stage.folder.iterdir())
    assert "lora_merge" in export.run(stage)["max_difference"]


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_model_that_trained_with_an_attention_of_gpus_alone_is_exported(tmp_path, monkeypatch, lora):
    from transformers import AttentionInterface

    def load_with_kernels(*arguments):
        model = load_model(*arguments)
        model.backbone.base.config._attn_implementation = "kernels"
        return model

    def kernels(*_, **__):
        raise RuntimeError("FlashAttention only supports GPUs")

    AttentionInterface.register("kernels", kernels)
    stage = export_stage(tmp_path / "run", "llm_decoder", llm("llama", lora=lora), ["safetensors"])
    items = histories(np.random.default_rng(0))[-1]
    expected = trained_scores(stage, items)
    monkeypatch.setattr(export, "load_model", load_with_kernels)
    finish(stage)
    assert json.loads((stage.folder / "config.json").read_text())["backbone"]["arguments"]["base"]["attention"] == "sdpa"
    assert_same_scores(TorchScorer(stage.folder)(items), expected, atol=1e-5)


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGE", 100)
    stage = export_stage(tmp_path / "run", *MODELS["sasrec"], ["onnx"])
    summary = finish(stage)
    assert summary["files"] == ["config.json", "README.md", "items.parquet", "model.onnx", "model.onnx.data"]
    items = histories(np.random.default_rng(0))[-1]
    expected = trained_scores(stage, items)
    folder = moved(stage, tmp_path / "moved")
    assert_same_scores(OnnxScorer(folder / "model.onnx")(items), expected, atol=1e-4)
    assert not list(folder.glob(".*"))


def test_an_onnx_file_that_scores_otherwise_is_not_kept(tmp_path, monkeypatch):
    class Wrong(OnnxScorer):
        def __call__(self, asked):
            return super().__call__(asked) + np.float32(0.5)

    monkeypatch.setattr(export, "OnnxScorer", Wrong)
    stage = export_stage(tmp_path / "run", *MODELS["sasrec"], ["onnx"])
    with pytest.raises(UserError, match=r"model.onnx scores up to 0.5 away from PyTorch.*not kept"):
        export.run(stage)
    assert [path.name for path in stage.folder.iterdir()] == ["items.parquet"]


def test_a_nan_is_not_a_small_difference():
    good = np.array([[-np.inf, 1.0, 2.0]])
    for bad in ([[-np.inf, np.nan, 2.0]], [[0.0, 1.0, 2.0]]):
        difference, relative = export.compare([np.array(bad)], [good])
        assert difference == relative == float("inf")
    assert export.compare([good + 1.0], [good]) == (1.0, 0.5)
    none = np.array([[-np.inf, 0.0, 0.0]])  # no neighbour is known
    assert export.compare([none], [none]) == (0.0, 0.0)


def test_unknown_format():
    with pytest.raises(UserError, match="Did you mean 'safetensors'"):
        ExportStage(export=["safetensor"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    stage = export_stage(tmp_path_factory.mktemp("whole") / "run", "llm_decoder", llm("llama"), ["safetensors"])
    finish(stage)
    return stage.folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "export")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("items"), "differ in 'items'"),
        (lambda weights: weights.pop("score.weight"), "differ in 'score.weight'"),
        (lambda weights: weights.update(other=torch.ones(1)), "differ in 'other'"),
        (lambda weights: weights.update({"score.weight": torch.ones(2, 2)}), "differ in 'score.weight'"),
    ],
)
def test_weights_of_another_model(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_exported(folder)


@pytest.mark.parametrize("name", ["bpr-mf", "item-knn"])
def test_tables_of_another_size(name, tmp_path):
    stage = export_stage(tmp_path / "run", *MODELS[name], ["safetensors"])
    finish(stage)
    weights = load_file(stage.folder / "model.safetensors")
    first = min(weights)
    save_file(weights | {first: weights[first][:-1].clone()}, stage.folder / "model.safetensors")
    with pytest.raises(UserError, match=f"differ in '{first}'"):
        load_exported(stage.folder)


def test_damaged_and_missing_files(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        load_exported(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"no .*model.safetensors"):
        load_exported(folder)
    with pytest.raises(UserError, match=r"no .*model.onnx"):
        OnnxScorer(folder / "model.onnx")
    for content in (b"not a graph", b""):
        (folder / "model.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"model.onnx is damaged"):
            OnnxScorer(folder / "model.onnx")


def test_another_format_version_and_an_unfinished_export(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="export format 99"):
        load_exported(folder)
    (folder / "config.json").write_text(json.dumps({"stage": "export", "settings": {}}))  # as the stage begins
    with pytest.raises(UserError, match="was not finished"):
        load_exported(folder)


def test_loading_leaves_the_random_numbers_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_exported(folder)
    assert torch.equal(torch.rand(3), expected)
