"""The command and the class that ask an exported student: what they understand, and what they answer."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from pyarrow import concat_tables
from pyarrow.parquet import read_table, write_table
from tiny_export import DIM, FIRST, MAX_LENGTH, N_ITEMS, TITLES, dataset, export_stage, finish

from lit_llmers.errors import UserError
from lit_llmers.recommend import Recommender, Users, main, table


class Favourites:
    """Scores an item by its index and remembers what it was asked."""

    def __call__(self, asked: np.ndarray) -> np.ndarray:
        self.asked = asked
        scores = np.arange(N_ITEMS + 1, dtype=np.float32)[None].repeat(len(asked), 0)
        scores[:, 0] = -np.inf
        return scores


@pytest.fixture
def recommender() -> Recommender:
    ids = [f"i{index}" for index in range(1, N_ITEMS + 1)]
    return Recommender(ids, TITLES, ["Film"] * N_ITEMS, MAX_LENGTH, Favourites())


def test_best_first_without_the_history(recommender):
    got = recommender.recommend(["Film number 29", "Aladdin", "film number 30"], top=3)
    assert got == [("Film number 28", 28.0), ("Film number 27", 27.0), ("Film number 26", 26.0)]
    assert recommender.scorer.asked.tolist() == [[29, 4, 30]]
    assert recommender.scorer.asked.dtype == np.int64
    assert recommender.recommend("Aladdin", top=3) == recommender.recommend(["Aladdin"], top=3), "one title, not its letters"


def test_the_student_reads_the_latest_items_and_recommends_none_of_all(recommender):
    history = list(range(1, 20))
    ranked = recommender.rank(history, top=100)
    assert recommender.scorer.asked.tolist() == [history[-MAX_LENGTH:]]
    assert [index for index, _ in ranked] == list(range(N_ITEMS, 19, -1))  # and no more than there are
    assert recommender.rank(list(range(1, N_ITEMS + 1)), top=3) == []


@pytest.mark.parametrize(
    ("title", "item"),
    [
        ("Toy Story (1995)", 1),
        ("toy  story", 1),  # the whole title but for its year, although another begins so too
        ("TOY STORY 2", 2),
        ("The Matrix", 3),
        ("Matrix, The", 3),
        ("alad", 4),
        ("number 17", 17),
        ("Film number 7", 7),
    ],
)
def test_a_title_is_found(recommender, title, item):
    assert recommender.find(title) == item


@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("Toy", r"'Toy' could be: Toy Story \(1995\) \(id i1\); Toy Story 2 \(1999\) \(id i2\)\."),
        ("number 1", r"could be: Film number 10 \(id i10\).*and 2 more"),
        ("West Side Story", r"contains 'West Side Story'. Write a word of it"),  # which no title here resembles
        ("Aladin", r"contains 'Aladin'. Did you mean 'Aladdin \(1992\)'\?"),
        ("qqqq", r"contains 'qqqq'\. Write a word of it"),
        (" ", "A title of the history is empty"),
    ],
)
def test_a_title_that_is_unknown_or_could_be_several(recommender, title, message):
    with pytest.raises(UserError, match=message):
        recommender.recommend([title])


def test_equal_titles_are_told_apart_by_id():
    recommender = Recommender(["a", "b"], ["Same", "same"], ["", ""], MAX_LENGTH, Favourites())
    with pytest.raises(UserError, match=r"Same \(id a\); same \(id b\).*history_ids"):
        recommender.find("SAME")
    assert recommender.find_id("b") == 2


def test_an_item_without_a_title_goes_by_its_id():
    recommender = Recommender(["a", "b", "c"], ["", "x", " "], ["", "", ""], MAX_LENGTH, Favourites())
    assert (recommender.find("a"), recommender.find("c")) == (1, 3)


def test_a_title_of_several_lines_is_a_row_of_the_table():
    recommender = Recommender(["a", "b"], ["A\nB\tC", "x"], ["", ""], MAX_LENGTH, Favourites())
    head, _, _, row = table(recommender, [1], [(1, 0.5)]).splitlines()
    assert (head, row) == ("After: A B C", "1  0.500  A B C")


def test_semicolons_inside_a_title(recommender):
    assert recommender.split(f"Toy Story;{FIRST[4]}; Aladdin ;") == ["Toy Story", FIRST[4], "Aladdin"]
    assert recommender.split("Salt &amp; Pepper; Aladdin") == ["Salt &amp", "Pepper", "Aladdin"]


def test_commas_inside_an_id():
    recommender = Recommender(["a", "b", "a,b", "b, a"], ["x"] * 4, [""] * 4, MAX_LENGTH, Favourites())
    assert recommender.split_ids("a,b; b ;b,a; b, a ;") == ["a,b", "b", "b", "a", "b, a"]
    assert recommender.split_ids("a, b,c") == ["a", "b", "c"]


def test_semicolons_inside_an_id():
    recommender = Recommender(["a", "b", "a;b", "a; b,c"], ["x"] * 4, [""] * 4, MAX_LENGTH, Favourites())
    assert recommender.split_ids("a;b; b; a ; a; b,c;") == ["a;b", "b", "a", "a; b,c"]


def test_empty_history_and_top(recommender):
    with pytest.raises(UserError, match="history is empty"):
        recommender.recommend([])
    with pytest.raises(UserError, match="top is 0"):
        recommender.recommend(["Aladdin"], top=0)
    with pytest.raises(UserError, match=r"no item with the id 'i99'.*Did you mean 'i"):
        recommender.find_id("i99")


def test_a_known_user_without_what_it_met_and_without_the_history(recommender):
    met = {0: [1, 2], 1: [30, 29, 30]}
    recommender.users = Users(["ann", "bob"], met.__getitem__)
    assert recommender.recommend([], top=2, user="bob") == [("Film number 28", 28.0), ("Film number 27", 27.0)]
    assert (recommender.scorer.asked.tolist(), recommender.scorer.asked.dtype) == ([1], np.int64)
    assert recommender.recommend(["Film number 28"], top=1, user="bob") == [("Film number 27", 27.0)]
    assert len(recommender.rank([], top=100, user="bob")) == N_ITEMS - 2
    assert recommender.rank([], top=1, user="ann") == [(30, 30.0)]


def test_with_repeats_the_history_comes_again(recommender):
    recommender.repeats = True
    assert recommender.recommend(["Film number 29"], top=2) == [("Film number 30", 30.0), ("Film number 29", 29.0)]
    assert [index for index, _ in recommender.rank([1, 30], top=100)] == list(range(N_ITEMS, 0, -1))  # but no padding
    recommender.users = Users(["ann"], lambda row: [30])
    assert recommender.rank([28], top=3, user="ann") == [(30, 30.0), (29, 29.0), (28, 28.0)]


# ---- the command, on a real export ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    stage = export_stage(tmp_path_factory.mktemp("run") / "tiny", "sasrec", {"dim": DIM, "layers": 1}, ["safetensors", "onnx"])
    finish(stage)
    return stage.run.folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    stage = export_stage(tmp_path_factory.mktemp("tables") / "tiny", "lightgcn", {"dim": DIM}, ["safetensors", "onnx"])
    finish(stage)
    return shutil.copytree(stage.folder, tmp_path_factory.mktemp("alone") / "export")


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_table(run, capsys):
    status, out, _ = command(capsys, f"run={run}", "history=toy story; The Matrix", "history_ids=i4, i9", "top=3")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "After: Toy Story (1995); Matrix, The (1999); Aladdin (1992); Film number 9"
    assert lines[2].split() == ["score", "title", "categories"]
    expected = Recommender.load(run).rank([1, 3, 4, 9], 3)
    for place, (line, (index, score)) in enumerate(zip(lines[3:], expected, strict=True), 1):
        assert line.split() == [str(place), f"{score:.3f}", *TITLES[index - 1].split(), "Film"]


def test_both_runtimes_and_an_export_folder_answer_alike(run, capsys):
    export = next(run.glob("export-*"))
    answers = [
        command(capsys, f"run={folder}", "history=Aladdin", f"as={runtime}")
        for folder in (run, export)
        for runtime in ("onnx", "torch")
    ]
    assert len(set(answers)) == 1
    assert answers[0][0] == 0


def test_what_was_met_comes_again_where_the_student_was_evaluated_so(tmp_path, capsys):
    def top(*arguments):
        out = command(capsys, f"run={alone}", "history_ids=i4,i9", f"top={N_ITEMS}", *arguments)[1]
        return len(out.splitlines()) - 3

    for mask_history, expected in ((True, N_ITEMS - 2), (False, N_ITEMS)):
        stage = export_stage(tmp_path / str(mask_history), "popularity", {}, ["safetensors"], mask_history)
        finish(stage)
        alone = stage.folder
        assert (top(), top("repeats=true"), top("repeats=false")) == (expected, N_ITEMS, N_ITEMS - 2)
    config = json.loads((alone / "config.json").read_text())
    del config["mask_history"]  # as in older exports
    (alone / "config.json").write_text(json.dumps(config))
    assert top() == N_ITEMS - 2


def test_onnx_needs_neither_torch_nor_the_run(run, tmp_path):
    alone = shutil.copytree(next(run.glob("export-*")), tmp_path / "alone")
    code = (
        "import sys; from lit_llmers.recommend import main\n"
        f"status = main(['run={alone}', 'history=Aladdin'])\n"
        "assert status == 0 and not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_table_of_a_known_user(tables, capsys):
    answers = [command(capsys, f"run={tables}", "user=u12", "top=4", f"as={runtime}") for runtime in ("onnx", "torch")]
    assert answers[0] == answers[1]
    status, out, _ = answers[0]
    assert status == 0
    data = dataset()
    met = data.items[data.offsets[12] : data.offsets[13]]
    lines = out.splitlines()
    assert lines[0] == f"For user u12, who met {len(met)} items, at last: " + "; ".join(TITLES[item - 1] for item in met[-3:])
    scores = Recommender.load(tables).scorer(np.array([12]))[0]
    scores[met] = -np.inf
    assert [line.split()[1] for line in lines[3:]] == [f"{score:.3f}" for score in np.sort(scores)[::-1][:4]]
    out = command(capsys, f"run={tables}", "user=u12", "history=Aladdin", "top=2")[1]
    assert out.splitlines()[1] == "After: Aladdin (1992)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["history=Aladdin"], "knows users and reads no histories. Give user=ID"),
        ([], "knows users and reads no histories. Give user=ID"),
        (["user=u99"], "no user with the id 'u99'. Did you mean 'u9'? It knows the 20 users"),
        (["user="], "no user with the id ''."),
    ],
)
def test_a_wrong_command_to_a_student_that_knows_users(tables, capsys, arguments, message):
    status, out, err = command(capsys, f"run={tables}", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_damaged_users(tables, tmp_path, capsys):
    alone = shutil.copytree(tables, tmp_path / "alone")
    (alone / "users.parquet").unlink()
    assert "users.parquet cannot be read" in command(capsys, f"run={alone}", "user=u1")[2]


def test_an_export_that_does_not_name_its_inputs_reads_histories(run, tmp_path, capsys):
    alone = shutil.copytree(next(run.glob("export-*")), tmp_path / "alone")
    config = json.loads((alone / "config.json").read_text())
    for key in ("inputs", "n_users"):
        del config[key]
    (alone / "config.json").write_text(json.dumps(config))
    for runtime in ("onnx", "torch"):
        assert command(capsys, f"run={alone}", "history=Aladdin", f"as={runtime}")[0] == 0


def test_without_a_graph_torch_answers(run, tmp_path, capsys):
    alone = shutil.copytree(next(run.glob("export-*")), tmp_path / "alone")
    (alone / "model.onnx").unlink()
    assert command(capsys, f"run={alone}", "history=Aladdin")[0] == 0
    status, _, err = command(capsys, f"run={alone}", "history=Aladdin", "as=onnx")
    assert status == 2
    assert "There is no" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["history=Aladdin"], "No run given"),
        (["run={run}"], "The history is empty"),
        (["run={run}", "history=;"], "The history is empty"),
        (["run={run}", "history=Aladdin", "top=many"], "top=many must be a whole number, at least 1"),
        (["run={run}", "history=Aladdin", "top=-1"], "top=-1 must be a whole number, at least 1"),
        (["run={run}", "history=Aladdin", "as=onx"], "Did you mean 'onnx'"),
        (["run={run}", "history=Aladdin", "repeats=yes"], "Unknown value of repeats 'yes'. There is: false, true."),
        (["run={run}", "histroy=Aladdin"], "Unknown key 'histroy'. Did you mean 'history'"),
        (["run={run}", "history=Toy", "Story"], "'Story' is not key=value. Put titles in quotes"),
        (["run={run}", "history=Aladdin", "user=u1"], "reads histories and knows no users"),
        (["run={run}", "user=u1"], "reads histories and knows no users. Give history="),
        (["run={run}/nowhere", "history=Aladdin"], "There is no folder"),
        (["run={run}/..", "history=Aladdin"], "It holds the runs tiny"),
    ],
)
def test_a_wrong_command(run, capsys, arguments, message):
    status, out, err = command(capsys, *(argument.format(run=run) for argument in arguments))
    assert (status, out) == (2, "")
    assert err.startswith("\nerror: ")
    assert message in err


def test_the_export_is_the_one_that_the_run_lists_as_done(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    export = next(copy.glob("export-*"))
    newer = shutil.copytree(export, copy / "export-ffffffffffff")  # of other settings; newest, but not listed
    (newer / "config.json").write_text("{}")
    assert command(capsys, f"run={copy}", "history=Aladdin")[0] == 0
    (export / "DONE").unlink()
    status, _, err = command(capsys, f"run={copy}", "history=Aladdin")
    assert status == 2
    assert f"no finished export of its last command; of earlier ones, give one as run=: {newer}. Finish the run: python" in err
    shutil.rmtree(newer)
    _, _, err = command(capsys, f"run={copy}", "history=Aladdin")
    assert "no finished export. Finish the run: python -m lit_llmers.fit recipe=tiny seed=1" in err
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"stages": []}))
    _, _, err = command(capsys, f"run={copy}", "history=Aladdin")
    assert "no finished export. Its recipe has no export stage: give it one" in err
    again = "python -m lit_llmers.fit recipe=student '~stages.export' 'data.path=/my data'"
    (copy / "run.json").write_text(json.dumps(record | {"stages": [], "command": again}))
    _, _, err = command(capsys, f"run={copy}", "history=Aladdin")
    assert err.endswith("Run it with its export stage: python -m lit_llmers.fit recipe=student 'data.path=/my data'\n")


def test_a_damaged_catalogue(run, tmp_path, capsys):
    alone = shutil.copytree(next(run.glob("export-*")), tmp_path / "alone")
    (alone / "items.parquet").write_bytes(b"PAR1")
    assert "items.parquet cannot be read" in command(capsys, f"run={alone}", "history=Aladdin")[2]


@pytest.mark.parametrize(("name", "rows"), [("items.parquet", N_ITEMS), ("users.parquet", 20)])
@pytest.mark.parametrize("change", [1, -1])
def test_a_table_of_another_export(tables, tmp_path, capsys, name, rows, change):
    alone = shutil.copytree(tables, tmp_path / "alone")
    table = read_table(alone / name)
    write_table(concat_tables([table, table[:1]]) if change > 0 else table[:change], alone / name)
    status, out, err = command(capsys, f"run={alone}", "user=u1")
    assert (status, out) == (2, "")
    assert f"{name} is not of the model in config.json: it has {rows + change} rows, and the model {rows} {name[:5]}" in err


def test_help(capsys):
    for arguments in ([], ["--help"], ["run=x", "-h"]):
        status, out, _ = command(capsys, *arguments)
        assert status == 0
        assert out.startswith("usage: python -m lit_llmers.recommend run=FOLDER")
