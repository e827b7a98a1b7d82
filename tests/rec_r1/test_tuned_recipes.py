"""`dense` with `tuned` in a recipe: what it is fitted on, what is refused, and a training with it as the reward."""

import dataclasses
import json
from pathlib import Path

import pytest
from datasets_ import few_emoji, plain_folder
from tiny_models import cross_encoder

import retrievers
from rec_r1 import baselines, cli, config, environment, tasks
from rec_r1.config import UserError
from rec_r1.environment import cached_index, check_trainable, fit_data, open_environment
from rec_r1.similarity_gap.systems import open_systems, wanted_systems
from rec_r1.tasks.build_emoji import stem
from retrievers import Judgments
from retrievers.text.tuning import job, train

SMALL = "epochs: 1, batch_size: 128, learning_rate: 0.001"  # Few steps of many pairs are the fastest.


@pytest.fixture(scope="module")
def in_this_process():
    """Encoders are tuned in the process of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_run", lambda folder, device: train.run(folder))
        yield


@pytest.fixture(scope="module")
def tuned(tiny_encoder, in_this_process) -> str:
    """`retriever.params` of a tiny encoder, which is tuned in the process of the test."""
    return f"retriever.params={{model: {tiny_encoder}, device: cpu, tuned: {{{SMALL}}}}}"


@pytest.fixture
def fewer_queries(tmp_path):
    with few_emoji(tmp_path / "emoji"):
        yield


@pytest.fixture(scope="module")
def tuned_on(tuned, tmp_path_factory) -> dict[float, Path]:
    """Two tuned encoders, by the share of the quickstart's training queries that each was tuned on. 0 = all.

    They are in the cache, so that tests of `dense` with these settings open them.
    """
    found = {}
    with few_emoji(tmp_path_factory.mktemp("emoji")):
        for share in (0, 0.5):
            recipe = config.load("quickstart", ["retriever.kind=dense", tuned, f"task.params.fit_share={share}"])
            task = tasks.load(recipe.task)
            environment.open_backend(recipe, task)
            found[share] = environment.index_folder(recipe, task) / "encoder"
    return found


def sequential(tmp_path, *more) -> list[str]:
    return [f"task.path={plain_folder(tmp_path / 'shop')}", f"output_dir={tmp_path / 'out'}", *more]


# ---- What search tasks set apart


def test_emoji_with_equal_stems_are_set_apart_together():
    whole = tasks.load(config.load("quickstart").task)
    assert (
        not whole.set_apart
        and whole.judgments.fingerprint
        == Judgments(
            1854, whole.train.queries, whole.train.rows, whole.validation.queries, whole.validation.rows
        ).fingerprint
    )
    apart = tasks.load(config.load("quickstart", ["task.params.fit_share=0.5"]).task)
    assert apart.set_apart and apart.interactions is None
    assert {*apart.train.queries, *apart.judgments.queries} == set(whole.train.queries)
    assert len(apart.train) + len(apart.judgments) == len(whole.train) and 100 < len(apart.train) < 236
    assert not {stem(q) for q in apart.train.queries} & {stem(q) for q in apart.judgments.queries}
    targets = dict(zip(whole.train.queries, whole.train.rows, strict=True))
    assert [targets[q] for q in apart.judgments.queries] == list(apart.judgments.rows)
    assert apart.validation == whole.validation and apart.test == whole.test


def test_other_search_tasks_set_apart_before_limits_and_keep_it_in_the_cache(shared_beir_folder):
    settings = ["task.name=beir", f"task.path={shared_beir_folder}"]
    whole = tasks.load(config.load("quickstart", settings).task)
    for more in ([], ["task.params.limits={train: 1}"]):
        recipe = config.load("quickstart", [*settings, "task.params.fit_share=0.5", *more])
        first, again = tasks.load(recipe.task), tasks.load(recipe.task)
        assert first.set_apart and 0 < len(first.judgments) < len(whole.train)
        assert not set(first.train.queries) & set(first.judgments.queries)
        assert len(first.train) == (1 if more else len(whole.train) - len(first.judgments))
        assert again.folder is not None and again.judgments.fingerprint == first.judgments.fingerprint
    assert len(whole.judgments) == len(whole.train) and not whole.set_apart


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("1.0", "task.params.fit_share: 1.0: must be at least 0 and below 1, 0.5 is usual"),
        ("0.0001", "task.params.fit_share: 0.0001 of the 336 training queries leaves nothing to fit a retriever on"),
        ("0.9999", "task.params.fit_share: 0.9999 of the 336 training queries leaves no prompts"),
    ],
)
def test_a_share_that_leaves_nothing_is_refused(share, message):
    with pytest.raises(UserError, match=message):
        tasks.load(config.load("quickstart", [f"task.params.fit_share={share}"]).task)


def test_an_index_is_named_by_what_its_encoder_was_tuned_on(tmp_path):
    halves = [tasks.load(config.load("quickstart", [f"task.params.fit_share={s}"]).task) for s in (0.0, 0.5)]
    frozen, tuned = {}, {"tuned": {"epochs": 1}}
    assert len({cached_index(task, "dense", frozen) for task in halves}) == 1
    assert len({cached_index(task, "dense", tuned) for task in halves}) == 2
    assert cached_index(halves[0], "dense", tuned) != cached_index(halves[0], "dense", frozen)
    one = tasks.load(config.load("cpu/sequential", sequential(tmp_path)).task)
    two = tasks.load(config.load("cpu/sequential", sequential(tmp_path, "task.params.raw_titles=2")).task)
    assert list(fit_data(one)) == ["interactions"] and one.interactions.fingerprint != two.interactions.fingerprint
    assert cached_index(one, "dense", tuned) != cached_index(two, "dense", tuned)


# ---- What is refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "hybrid", "rerank"])
def test_an_encoder_that_knows_the_prompts_targets_is_no_reward(
    tuned, fewer_queries, tiny_model, capsys, monkeypatch, kind, tmp_path
):
    params = {
        "dense": tuned,
        "hybrid": f"retriever.params={{retrievers: [{{kind: dense, params: {tuned.partition('=')[2]}}}]}}",
        "rerank": f"retriever.params={{model: {cross_encoder(tmp_path / 'cross')}, m: 2, tuned: {{epochs: 1}}}}",
    }
    settings = [f"retriever.kind={kind}", params[kind], f"model.name={tiny_model}", "lora=null"]
    settings += [f"output_dir={tmp_path / 'run'}", "prompts_per_step=2"]
    for verb in ("check", "train", "preflight"):
        with monkeypatch.context() as patch:
            patch.setattr(job, "_run", lambda *_: pytest.fail("tuned before it was refused"))
            assert cli.main([verb, "quickstart", *settings]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error == (
            f"rec-r1: task.params.fit_share: 0: {kind} was fitted on the targets of the training prompts: set "
            "task.params.fit_share=0.5, so that it is fitted on queries that no prompt has"
        )
    assert cli.main(["check", "quickstart", *settings, "task.params.fit_share=0.5"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "late", "hybrid", "rerank"])
def test_the_folder_of_an_encoder_that_knows_the_prompts_targets_is_no_reward(
    tuned_on, fewer_queries, tiny_model, tmp_path, capsys, monkeypatch, kind
):
    common = [f"retriever.kind={kind}", f"model.name={tiny_model}", "lora=null", "evaluation.test_limit=20"]
    common += [f"output_dir={tmp_path / 'run'}", "prompts_per_step=2"]
    cross = cross_encoder(tmp_path / "cross")

    def said(fitted_share, share, verb):
        """The last message of a verb for a recipe with the encoder that was tuned on ``fitted_share``."""
        model = f"{{model: {tuned_on[fitted_share]}}}"
        inner = f"{{kind: dense, params: {model}}}"
        given = {
            "hybrid": f"{{retrievers: [{{kind: bm25}}, {inner}]}}",
            "rerank": f"{{retriever: {inner}, m: 1, model: {cross}}}",
        }.get(kind, model)
        settings = [*common, f"retriever.params={given}", f"task.params.fit_share={share}"]
        with monkeypatch.context() as patch:
            if fitted_share == 0:
                patch.setattr(environment, "open_backend", lambda *_: pytest.fail("opened before it was refused"))
            assert cli.main([verb, "quickstart", *settings]) == (0 if fitted_share and share else 2)
        return capsys.readouterr().err.strip().splitlines()[-1:]

    for verb in ("check", "train", "preflight"):
        assert f"fit_share: 0: {kind} was fitted on the targets of the training prompts" in said(0, 0, verb)[0]
        (error,) = said(0, 0.5, verb)
        assert f"{kind!r} was fitted on other judgments than those of this recipe's task: start rec-r1 serve" in error
        assert "with the same task settings, including fit_share" in error
    said(0.5, 0.5, "check")


@pytest.mark.slow
def test_what_a_tuned_encoder_cannot_do_is_refused(tuned, tmp_path):
    apart = ["retriever.kind=dense", tuned, "task.params.fit_share=0.5"]
    recipe = config.load("cpu/sequential", sequential(tmp_path, *apart))
    env = open_environment(recipe)
    assert env.fitted_on == {env.task.interactions.fingerprint} and env.reads_text
    check_trainable(recipe, env)
    with pytest.raises(UserError, match="'dense' reads texts and no histories, so it would find nothing"):
        baselines.run(recipe, "history", "test")
    with pytest.raises(UserError, match="was fitted on other interactions than those of this recipe's task"):
        check_trainable(recipe, dataclasses.replace(env, fitted_on={"another"}))
    listed = config.load("cpu/sequential", sequential(tmp_path, *apart, "format.action=items", "format.prompt=null"))
    with pytest.raises(UserError, match=r"grounding\.kind: not set, and dense does not look titles up"):
        open_environment(listed)
    listed.grounding.kind, listed.grounding.params = "dense", recipe.retriever.params
    with pytest.raises(UserError, match=r"grounding\.kind: dense is fitted on .*: set bm25"):
        open_environment(listed)


def test_the_role_of_a_tuned_encoder_is_not_text_alone():
    recipe = config.load("cpu/sequential")
    found, _ = wanted_systems(recipe, ["dense {tuned: {epochs: 1}}", "dense {pooling: cls}"], ["all-minilm-l6-v2"])
    assert [system.role for system in found] == ["encoder", "both", "encoder"]
    with pytest.raises(UserError, match=r"tuned\.epoch: unknown key"):
        wanted_systems(recipe, ["dense {tuned: {epoch: 1}}"], [])


@pytest.mark.parametrize(
    ("spec", "role"),
    [
        ("milvus", "words"), ("milvus {mode: text}", "words"), ("milvus {mode: dense}", "encoder"),
        ("postgres {url: postgresql://h/d}", "words"), ("postgres {url: postgresql://h/d, mode: vector}", "encoder"),
        ("postgres {url: postgresql://h/d, mode: hybrid}", "other"), ("late", "encoder"), ("tantivy", "words"),
        ("rerank", "other"),
    ],
)  # fmt: skip
def test_the_role_of_a_retriever_with_modes_is_that_of_its_mode(spec, role):
    found, _ = wanted_systems(config.load("cpu/sequential"), [spec], [])
    assert [system.role for system in found] == [role]


@pytest.mark.slow
def test_an_encoder_in_a_folder_that_was_tuned_on_choices_is_no_text_encoder(tuned, tmp_path):
    recipe = config.load("cpu/sequential", sequential(tmp_path))
    task = tasks.load(recipe.task)
    params = config.load("quickstart", [tuned]).retriever.params
    retrievers.open("dense", task.catalog, tmp_path / "index", task.interactions, **params)
    folder = str(tmp_path / "index" / "encoder")
    opened = open_systems(recipe, task, [f"dense {{model: {folder}}}"], [str(params["model"])])
    assert [system.role for system in opened.systems] == ["encoder", "both"]
    with pytest.raises(
        UserError, match=r"no text encoder opens \(those that open were tuned on choices\): name another"
    ):
        open_systems(recipe, task, ["popularity"], [folder])


@pytest.mark.parametrize(("kind", "key"), [("dense", "anti_affinity"), ("rerank", "negatives")])
def test_options_list_the_keys_of_tuned(capsys, kind, key):
    assert cli.main(["options", f"retriever.{kind}"]) == 0
    assert f"retriever.params.tuned.{key}" in capsys.readouterr().out


# ---- What works


@pytest.mark.slow
def test_fit_prints_what_the_encoder_was_tuned_on_and_trains_a_policy(
    tuned, fewer_queries, tiny_model, tmp_path, capsys
):
    common = ["retriever.kind=dense", tuned, "task.params.fit_share=0.5"]
    assert cli.main(["fit", "quickstart", *common]) == 0
    out = capsys.readouterr().out
    assert "28 training queries with " in out and "set apart from the training prompts" in out
    report = json.loads(next(line for line in out.splitlines() if line.startswith("dense ")).partition(" ")[2])
    assert report["on"] == "judgments" and report["ran"] == 1 and 0 <= report["before"] <= 1
    out_dir = tmp_path / "run"
    small = [
        f"output_dir={out_dir}", f"model.name={tiny_model}", "lora=null", "model.dtype=float32", "grpo.max_steps=2",
        "evaluation.validation_limit=4", "evaluation.test_limit=20", "evaluation.every_steps=0", "prompts_per_step=2",
        "grpo.max_completion_length=4", "grpo.num_generations=4", "grpo.logging_steps=1",
    ]  # fmt: skip
    assert cli.main(["train", "quickstart", *common, *small]) == 0
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "retrieval/queries" in row] == [1, 2]
    assert all(row["retrieval/error_rate"] == 0 for row in rows if "retrieval/queries" in row)
    asked = {json.loads(line)["query"] for line in (out_dir / "rollouts.jsonl").read_text().splitlines()}
    fitted = tasks.load(config.load("quickstart", common).task).judgments
    assert asked and not asked & set(fitted.queries)


@pytest.mark.slow
def test_fit_tunes_a_cross_encoder_inside_a_hybrid_and_it_is_opened_again(
    fewer_queries, tiny_model, tmp_path, capsys, monkeypatch
):
    fits = []
    monkeypatch.setattr(job, "_run", lambda folder, device: fits.append(folder) or train.run(folder))
    params = f"{{model: {cross_encoder(tmp_path / 'cross')}, m: 3, device: cpu, tuned: {{epochs: 1, positives: 1}}}}"
    common = ["retriever.kind=rerank", f"retriever.params={params}", "task.params.fit_share=0.5"]
    assert cli.main(["fit", "quickstart", *common]) == 0
    out = capsys.readouterr().out
    assert "28 training queries with " in out and "set apart from the training prompts" in out
    report = json.loads(next(line for line in out.splitlines() if line.startswith("rerank ")).partition(" ")[2])
    assert report["on"] == "judgments" and report["ran"] == 1 and len(fits) == 1
    parts = f"{{retrievers: [{{kind: bm25}}, {{kind: rerank, params: {params}}}], depth: 20}}"
    nested = ["retriever.kind=hybrid", f"retriever.params={parts}", "task.params.fit_share=0.5"]
    small = [f"model.name={tiny_model}", "lora=null", "evaluation.test_limit=20", "prompts_per_step=2"]
    assert cli.main(["check", "quickstart", *nested, *small]) == 0 and len(fits) == 1
    env = open_environment(config.load("quickstart", nested))
    assert env.fitted_on == {env.task.judgments.fingerprint} and len(fits) == 1


@pytest.mark.slow
def test_a_task_of_a_user_s_own_is_judged_by_its_training_queries(tuned, tuned_on, fewer_queries, monkeypatch):
    import sys
    import types

    from rec_r1.tasks import Split, Task

    whole = tasks.load(config.load("quickstart").task)
    splits = {name: Split(s.ids, s.queries, s.rows, s.grades) for name, s in whole.splits.items()}
    module = types.ModuleType("own.task")
    module.load = lambda _: Task("own", whole.catalog, **splits)
    monkeypatch.setitem(sys.modules, "own.task", module)
    recipe = config.load("quickstart", ["task.name=own.task", "retriever.kind=dense", tuned])
    task = tasks.load(recipe.task)
    assert task.judgments.fingerprint == whole.judgments.fingerprint
    # The data are equal, so the encoder that was tuned on the quickstart's is taken, and nothing is fitted again.
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("tuned again"))
    made = environment.open_backend(recipe, task)
    assert retrievers.fitted_on(made) == {task.judgments.fingerprint}
    assert Path(made.encoder.settings["model"]).name == "encoder"
