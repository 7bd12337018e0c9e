"""What recipes say of their terms: what lists and distances teach, what a term weighs beside the task, whose settings hold."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_compose import SCALED, TEXT, scales
from tiny import by_name

from lit_llmers import recipes
from lit_llmers.callbacks.embedding_distillation import EmbeddingDistillation
from lit_llmers.callbacks.ranking_distillation import RankingDistillation
from lit_llmers.callbacks.response_distillation import ResponseDistillation
from lit_llmers.composing.resolving import resolve
from lit_llmers.losses import sampled
from lit_llmers.students.output import StudentOutput

RANKED = ["bigrec", "dcd", "dllm2rec", "rd", "rrd", "soft-top-k", "unkd"]  # whose student learns the order of lists
GROUNDED = [("bigrec", "scale=laptop"), ("cd", "scale=paper"), *((name, "scale=paper") for name in RANKED)]  # by distance


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_whose_lists_and_whose_distances_are_tested_below(name, scale, no_files):
    planned = resolve(recipes.compose(name, ["data=ml-1m", *([] if scale == "scale=laptop" else [scale])]))
    ranked = any(part == "ranking_distillation" for stage in planned if stage.verb == "fit" for part, _ in stage.config.terms)
    assert ranked == (name in RANKED)
    teachers = [stage.need(stage.config.of) for stage in planned if stage.verb == "record" and stage.config.record == "ranking"]
    assert any(teacher.verb == "tune" for teacher in teachers) == ((name, scale) in GROUNDED)
    assert bool(teachers) == (name in (*RANKED, "cd"))


@pytest.mark.parametrize("name", RANKED)
def test_no_list_is_met_by_a_shift_of_all_scores_that_the_students_softmax_does_not_see(name, no_files):
    torch.manual_seed(0)
    items = torch.rand(40, 120).argsort(1)[:, :100] + 1
    batch = {"target": items[:, 3], "teacher_items": items, "teacher_scores": -torch.rand(40, 100).cumsum(1)}
    batch["items"] = torch.zeros(40, 1, dtype=torch.int64)  # nothing came before
    user, table = torch.randn(40, 9), torch.randn(121, 9)
    user[:, -1], table[:, -1] = 1, 0
    higher = table + torch.eye(9)[-1] * 20  # every item's score
    student, compared = SimpleNamespace(reduce=lambda values, batch: values.mean()), 0
    for stage in resolve(recipes.compose(name, ["data=ml-1m", *TEXT.get(name, [])])):
        for part, settings in stage.config.terms if stage.verb == "fit" else []:
            if part != "ranking_distillation" or stage.config.loss.kind not in ("cross_entropy", "sampled_softmax"):
                continue
            term = RankingDistillation(
                SimpleNamespace(k=100), torch.arange(121), **{key: value for key, value in settings.items() if key != "from"}
            ).build(student)
            losses = []
            for scores in (table, higher):
                torch.manual_seed(1)
                losses.append(term(StudentOutput(user, scores), batch).item())
            assert losses[1] > 0.99 * losses[0]
            compared += 1
    assert compared == 1


@pytest.mark.parametrize(("name", "scale"), GROUNDED)
def test_lists_of_distances_teach_the_same_in_any_unit_and_their_best_item_is_pushed_up(name, scale, no_files):
    """A teacher that is grounded by distance has scores that are no logits: neither their size nor their sign says a thing."""
    items = torch.arange(1, 101).expand(20, -1)
    distances = torch.linspace(60, 75, 100).expand(20, -1)
    parts = {
        "ranking_distillation": ("teacher", RankingDistillation),
        "response_distillation": ("response", ResponseDistillation),
    }
    student = SimpleNamespace(reduce=lambda values, batch: values.mean())
    planned = resolve(recipes.compose(name, ["data=ml-1m", *([] if scale == "scale=laptop" else [scale])]))
    ((part, settings),) = by_name(planned)["student"].config.terms
    prefix, make = parts[part]
    given = {key: value for key, value in settings.items() if key not in ("from", "share")}
    popularity = {"popularity": torch.arange(121)} if make is RankingDistillation else {}
    term = make(SimpleNamespace(k=100), **popularity, **given).build(student)
    losses = []
    for scores in (-distances, -1000 - 7 * distances):
        batch = {"target": items[:, 3], f"{prefix}_items": items, f"{prefix}_scores": scores}
        batch["items"] = torch.zeros(20, 1, dtype=torch.int64)  # nothing came before
        torch.manual_seed(1)
        table = (torch.randn(121, 4) / 20).requires_grad_()
        losses.append(term(StudentOutput(torch.ones(20, 4), table), batch))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(losses[1], table)[0][1].sum() < 0, "its score is to rise"


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name in ("dllm2rec", "bigrec") for scale in scales(name)])
def test_what_the_student_agrees_with_weighs_as_much_as_in_dllm2rec_however_long_the_list(name, scale, no_files):
    """There 10 items of .1; beside them position and confidence have .8 together, whatever K is."""
    config = recipes.compose(name, ["data=ml-1m", *([] if scale == "laptop" else [f"scale={scale}"])])
    (ranking,) = (entry["ranking_distillation"] for entry in config["stages"]["student"]["callbacks"])
    assert ranking["k"] * ranking["weights"]["consistency"] == pytest.approx(1)


def test_dllm2recs_dros_weighs_the_target_as_its_total_does(no_files):
    config = recipes.compose("dllm2rec", ["data=ml-1m", "scale=paper"])
    (ranking,) = (entry["ranking_distillation"] for entry in config["stages"]["student"]["callbacks"])
    assert ranking["weight"] * ranking["dros_target"] == pytest.approx(ranking["dros"]), "alpha, which is 1 there"


@pytest.mark.parametrize(
    ("name", "stage", "official"),
    [
        ("llm-esr", "student", 0.1),
        ("llmemb", "student", 0.01),
        ("pad", "aligned", 0.2),
        ("rd", "student", 1.0),
    ],
)
def test_a_weight_beside_a_sum_over_positive_and_negatives_is_divided_where_ours_is_their_mean(name, stage, official, no_files):
    """LLM-ESR, LLMEmb, PAD and RD add a term of `official` weight to `-log sigmoid(s+) - log(1 - sigmoid(s-))`."""
    config = by_name(resolve(recipes.compose(name, ["data=ml-1m", "scale=paper"])))[stage].config
    assert (config.loss.kind, config.loss.negatives) == ("bce", 1)
    ((_, settings),) = config.terms
    ours, theirs = sampled.binary(torch.zeros(1), torch.zeros(1, 1)), 2 * torch.tensor([math.log(2)])
    torch.testing.assert_close(settings["weight"] / ours, official / theirs)


def test_sasrec_at_paper_scale_keeps_nothing_that_was_tuned_here(no_files):
    config = by_name(resolve(recipes.compose("student", ["data=ml-1m", "scale=paper"])))["student"].config
    assert (config.model["init_std"], config.optimizer.lr, config.trainer.gradient_clip_val) == (0.02, 1e-3, None)


def test_slmrecs_item_embeddings_at_paper_scale_train_as_a_small_model_and_not_as_the_llm(no_files):
    planned = by_name(resolve(recipes.compose("slmrec", ["data=ml-1m", "scale=paper"])))
    (config, llm) = (planned[name].config for name in ("item_embeddings", "teacher"))
    assert (config.model["heads"], config.model["dim"]) == (1, 128)
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_steps) == (1e-4, "constant", 0)
    assert (config.trainer.max_epochs, config.trainer.patience, config.trainer.precision) == (50, 0, "32-true")
    assert (llm.optimizer.schedule, llm.optimizer.warmup_steps, llm.trainer.precision) == ("cosine", 100, "bf16-mixed")


def test_bigrec_is_tuned_alike_whatever_its_lists_teach(no_files):
    teachers = [
        by_name(resolve(recipes.compose(name, ["data=ml-1m", "scale=paper"])))["teacher"].config
        for name in ("bigrec", "dllm2rec", "soft-top-k")
    ]
    assert teachers[0].optimizer.schedule == "linear"
    assert all((each.optimizer, each.trainer) == (teachers[0].optimizer, teachers[0].trainer) for each in teachers)


def test_llmemb_at_paper_scale_aligns_all_targets_of_a_batch(no_files):
    config = by_name(resolve(recipes.compose("llmemb", ["data=ml-1m", "scale=paper"])))["student"].config
    assert dict(config.terms)["alignment"]["share"] == 1


def test_llmemb_at_paper_scale_encodes_the_vectors_that_it_tunes(no_files):
    text = by_name(resolve(recipes.compose("llmemb", ["data=ml-1m", "scale=paper"])))["text"].config
    assert text.contrast is not None, "of pooled vectors that are not normalised"
    assert not text.normalise


@pytest.mark.parametrize("name", ["sasrec", "cl4srec", "caser", "srgnn", "bpr-mf", "lightgcn", "sgl", "simgcl", "mixgcf"])
def test_students_whose_codes_do_not_clip_gradients_do_not(name, no_files):
    assert by_name(resolve(recipes.compose("student", [f"student={name}"])))["student"].config.trainer.gradient_clip_val is None


@pytest.mark.parametrize("name", ["hint", "htd"])
def test_a_wide_teacher_of_text_does_not_drown_the_task(name, no_files):
    """LLaMA's vectors as an encode stage gives them, most of which they share: squares of mean 1, 4,096 of them."""
    torch.manual_seed(0)
    config = by_name(resolve(recipes.compose(name, ["data=ml-1m", "scale=paper"])))["student"].config
    ((_, settings),) = config.terms
    text = torch.nn.functional.normalize(torch.randn(301, 4096) + 1.3 * torch.randn(4096)) * 64
    text[0] = 0
    given = {key: value for key, value in settings.items() if key != "from"}
    if name == "htd":
        given["experts"] = 3  # for the memory's sake
    student = SimpleNamespace(backbone=SimpleNamespace(dim=64), reduce=lambda values, batch: values.mean())
    callback = EmbeddingDistillation(text, **given)
    vectors = torch.randn(301, 64) / 10
    value = callback.build(student)(StudentOutput(vectors, vectors), {"target": torch.arange(1, 301)}).item()
    assert config.loss.kind == "bce"
    assert 0.1 < callback.weight * value < math.log(2)


@pytest.mark.parametrize("text", ["tfidf", "minilm"])
def test_llmemb_s_adapter_reads_principal_components_as_the_official_one_does(text, no_files):
    assert by_name(resolve(recipes.compose("llmemb", [f"text={text}"])))["text"].config.reduce == "all"
