"""The notebook runs on comparisons as their command leaves them, and is stored with what it gave."""

import contextlib
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from test_compare import tiny

from lit_llmers import compare, fit, jobs
from lit_llmers.errors import UserError
from lit_llmers.evaluate import POPULARITY_BINS
from lit_llmers.reporting.comparison import Comparison, Contender
from lit_llmers.reporting.comparison_report import write_report

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "comparison.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
SETTING = 'FOLDER = "../runs/compare/amazon-beauty"'


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison of two students with two seeds each."""

    def start(given: list[str], *_: object) -> str | None:
        return "it failed" if fit.main(given) else None

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        patch.setattr(jobs, "start", start)
        assert compare.main(["students=[sasrec,bpr-mf]", "seeds=[0,1]", *tiny(folder), "evaluation.users=100"]) == 0
    return folder / "compare" / "demo"


@pytest.fixture(autouse=True)
def figures():
    """Draw without a screen, and close what was drawn."""
    matplotlib.use("Agg")
    with matplotlib.rc_context():
        yield
    pyplot.close("all")


def execute(folder: Path) -> dict:
    """Run all code cells on a comparison; return the names that they leave."""
    first, *others = ["".join(cell["source"]) for cell in CODE]
    assert first == SETTING
    names: dict = {"FOLDER": str(folder)}
    for source in others:
        exec(source, names)
    return names


def drawn() -> list[tuple[str, str]]:
    """The axes' labels of every figure."""
    axes = [figure.axes[0] for figure in map(pyplot.figure, pyplot.get_fignums())]
    return [(each.get_xlabel(), each.get_ylabel()) for each in axes]


def test_it_shows_what_lies_behind_the_table(finished):
    names = execute(finished)
    comparison, ((name, against),) = names["comparison"], names["pairs"]
    assert {name, against} == set(names["models"]) == {"sasrec", "bpr-mf"}
    assert len(drawn()) == 3
    assert all(x and y for x, y in drawn())
    gain, shown = comparison.gains[name, against], names["shown"]
    assert shown["gain %"][name] == pytest.approx(100 * gain["relative"], abs=0.06)
    assert shown["to %"][name] == pytest.approx(100 * gain["high"] / np.mean(comparison.per_row(against)), abs=0.06)
    popularity = comparison.runs[0].target_popularity
    assert (np.digitize(popularity, POPULARITY_BINS) - 1 == comparison.groups["popularity"]).all(), "row by row, of the sample"
    bounds = names["bounds"]
    assert bounds["size"].sum() == len(popularity) == 100
    weighed = names["levels"].mul(bounds["size"].to_numpy(), axis=0).sum() / 100
    assert weighed[name] - weighed[against] == pytest.approx(gain["difference"]), "the groups are all rows, each once"
    assert names["shares"][0, 1] == pytest.approx(100 * comparison.shared_hits(name, against))


def test_methods_with_controls_and_a_model_alone_are_shown_too(finished, tmp_path):
    runs = {name: finished / "student" / name for name in ("sasrec", "bpr-mf")}
    rows = [Contender("method", runs["sasrec"], "student"), Contender("control", runs["bpr-mf"], "student")]
    for number, (models, pairs) in enumerate(((rows, [("method", "control")]), (rows[:1], []))):
        root = tmp_path / str(number)
        root.mkdir()
        write_report(root, Comparison(models, pairs), [], {}, "")
        names = execute(root)
        assert (names["pairs"], names["models"]) == (pairs, [each.label for each in models])
        assert len(drawn()) == 3 * (number + 1)


def test_a_folder_that_is_no_comparison_is_named_with_the_cure(tmp_path):
    with pytest.raises(UserError, match=rf"There is no comparison in {tmp_path}: .* Give a folder that `python -m lit_llmers"):
        execute(tmp_path)


def test_it_is_stored_executed_on_the_default_folder():
    assert "".join(CODE[0]["source"]) == SETTING
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1)), "run once, from top to bottom"
    outputs = [output for cell in CODE[1:] for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CODE[1:])
    assert {output["output_type"] for output in outputs} == {"execute_result", "display_data"}, "no errors and no warnings"
    assert sum("image/png" in output["data"] for output in outputs) == 3
