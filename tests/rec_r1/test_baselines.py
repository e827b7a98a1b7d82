"""Baselines through the harness: lists, few-shot prompts, RM3, an endpoint; SFT and DPO of a tiny model."""

import json
from pathlib import Path

import pytest
from datasets_ import plain_folder, write_jsonl
from test_endpoint import running, server  # noqa: F401

from rec_r1 import baselines, cli, config
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.tasks import examples, popularity, prompts


def run(name, out, *settings, recipe="quickstart", part="test"):
    return baselines.run(config.load(recipe, [f"output_dir={out}", *settings]), name, part)


def rows(out, name, part="test"):
    return [json.loads(line) for line in (out / "evaluation" / part / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def shop(tmp_path) -> list[str]:
    return [f"task.path={plain_folder(tmp_path / 'shop')}", "evaluation.metrics=[ndcg@10,recall@100]"]


@pytest.mark.slow
def test_popularity_ranks_by_training_and_leaves_the_history_out(shop, tmp_path):
    result = run("popularity", tmp_path / "out", *shop, recipe="cpu/sequential")
    env = open_environment(config.load("cpu/sequential", shop))
    counts = popularity(env.task)
    for row, history in zip(rows(tmp_path / "out", "popularity"), env.task.test.histories, strict=True):
        best = [int(h["id"][1:]) for h in row["hits"]]
        left = [i for i in range(30) if i not in history]
        assert best == sorted(left, key=lambda i: (-counts[i], i))[:3]
    names = {r["system"] for r in result["tables"][0]["rows"]}
    assert names == {"raw query", "popularity"} and result["best_baseline"] is None


@pytest.mark.slow
def test_titles_of_the_history(shop, tmp_path):
    out = tmp_path / "out"
    run("last_title", out, *shop, recipe="cpu/sequential")
    result = run("last_three", out, *shop, recipe="cpu/sequential")
    assert {r["system"] for r in result["tables"][0]["rows"]} == {"raw query", "last title", "last three"}
    assert [r["metrics"] for r in rows(out, "last-title")] == [r["metrics"] for r in rows(out, "raw-query")]
    first = rows(out, "last-three")[0]
    assert first["action"] == "title 4 Sci-Fi title 6 Comedy title 8 Romance"
    with pytest.raises(UserError, match="no histories"):
        run("last_title", tmp_path / "other")


@pytest.mark.slow
def test_lists_are_as_deep_as_the_deepest_metric(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "LIST_DEPTH", 3)
    for k, everywhere in ((30, True), (4, False)):
        out = tmp_path / str(k)
        run("popularity", out, *shop, f"evaluation.metrics=[ndcg@2,recall@{k}]", recipe="cpu/sequential")
        assert all(row["metrics"][f"recall@{k}"] == 1.0 for row in rows(out, "popularity")) is everywhere
    monkeypatch.undo()
    recipe = config.load("quickstart", ["rewards={recall@1500: 1.0, rec_r1: 0.5}", "evaluation.metrics=[ndcg@1200]"])
    assert baselines._depth(recipe) == 1500 and baselines._depth(config.load("quickstart")) == 1000


@pytest.mark.slow
def test_history_alone_is_refused_where_no_history_is_read(shop, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"retriever\.kind: 'bm25' reads texts and no histories"):
        run("history", out, *shop, recipe="cpu/sequential")
    assert not list(out.glob("evaluation/test/*"))
    both = "retriever={kind: propagate, params: {backend: {kind: popularity}}}"  # reads texts and histories
    for name, setting in (("popular", "retriever.kind=popularity"), ("both", both)):
        run("history", tmp_path / name, *shop, setting, recipe="cpu/sequential")
        assert len(rows(tmp_path / name, "history")) > 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("popularity", ["retriever.params.k1=2.0"], r"retriever\.params\.k1: 2\.0, but the run in .* has None"),
        ("popularity", ["evaluation.metrics=[mrr@10]"], r"evaluation\.metrics: \['mrr@10'\], but the run in .* has \["),
        ("popularity", ["format.repeat=2"], r"format\.repeat: 2, but"),
        ("popularity", ["grounding.kind=bm25"], r"grounding\.kind: 'bm25', but .* has None"),
        ("untrained", ["evaluation.repetition_penalty=1"], r"evaluation\.repetition_penalty: 1\.0, but .* has 1\.2"),
        ("untrained", ["model.dtype=float32"], r"model\.dtype: 'float32', but .* has 'auto'"),
        ("best_of", ["model.dtype=float32"], r"model\.dtype: 'float32', but .* has 'auto'"),
        ("best_of", ["rewards={ndcg@100: 0.5, ndcg@10: 1}"], r"rewards\.ndcg@10: 1, but .* has 0\.5"),
        ("reward_weighted_sft", ["grpo.max_completion_length=4"], r"completion_length: 4, but .* has 16"),
        ("sft", ["rewards={ndcg@100: 0.5, ndcg@10: 1}"], r"rewards\.ndcg@10: 1, but .* has 0\.5"),
        ("dpo", ["lora.r=8"], r"lora\.r: 8, but .* has 16"),
        ("sft", ["seed=1"], r"seed: 1, but .* has 0"),
        ("rloo", ["grpo.max_steps=13"], r"grpo\.max_steps: 13, but .* has 39"),
        ("rloo", ["grpo.learning_rate=1.0e-4"], r"grpo\.learning_rate: 0\.0001, but .* has 0\.0003"),
        ("dpo", ["prompts_per_step=6"], r"prompts_per_step: 6, but .* has 12"),
    ],
)
def test_a_run_is_not_written_over_by_another_recipe(tmp_path, name, settings, message):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(config.dump(config.load("quickstart", [f"output_dir={out}"])))
    with pytest.raises(UserError, match=message):
        run(name, out, *settings)
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


@pytest.mark.slow
def test_a_list_may_stand_beside_any_model_and_other_training(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(config.dump(config.load("quickstart", [f"output_dir={out}"])))
    free = ["evaluation.batch_size=3", "retriever.cache.memory_mb=1"]  # change no score
    run("popularity", out, "model.dtype=float32", "grpo.max_steps=3", "baselines.few_shot=1", *free)
    assert rows(out, "popularity") and rows(out, "raw-query")


def test_a_baseline_that_fails_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"endpoint\.model: not set"):
        run("endpoint", out)
    assert not [path for path in out.rglob("*") if path.is_file()]
    blocked = tmp_path / "file"
    blocked.write_text("")
    for folder in (blocked, Path("/proc/x")):
        with pytest.raises(UserError, match=f"output_dir: cannot write into {folder}"):
            run("popularity", folder)


@pytest.mark.slow
def test_random_is_the_same_each_time_and_near_chance(tmp_path):
    first = run("random", tmp_path / "a", part="validation")
    again = run("random", tmp_path / "b", part="validation")
    assert [r["metrics"] for r in rows(tmp_path / "a", "random", "validation")] == [
        r["metrics"] for r in rows(tmp_path / "b", "random", "validation")
    ]
    (mean,) = [r["mean"] for r in first["tables"][0]["rows"] if r["system"] == "random"]
    assert mean < 0.03 and first["tables"] == again["tables"]


@pytest.mark.slow
def test_rm3_ranks_with_its_own_retriever(tmp_path):
    run("rm3", tmp_path, part="validation")
    raw, rm3 = rows(tmp_path, "raw-query", "validation"), rows(tmp_path, "rm3", "validation")
    changed = sum(a["hits"] != b["hits"] for a, b in zip(raw, rm3, strict=True))
    assert changed > 10 and [r["query_id"] for r in raw] == [r["query_id"] for r in rm3]
    for row in rm3:  # the hits shown are those that were scored
        if any(hit["grade"] for hit in row["hits"][:1]):
            assert row["metrics"]["ndcg@10"] > 0.2


def shown(env, count):
    """The first test query's prompt with examples."""
    _, format_ = examples(env.task.train, env.task.catalog, env.format, count)
    return prompts(env.task.test.take([0]), env.task.catalog, format_)


@pytest.mark.parametrize(
    ("settings", "language"),
    [
        ([], "en"),
        (["retriever.params={language: german, k1: 0.9}"], "de"),
        (["retriever.kind=propagate", "retriever.params={text: {kind: bm25, params: {language: fr}}}"], "fr"),
        (["retriever.kind=ease", "retriever.params={}"], "en"),
        (["retriever.kind=lucene", "retriever.params={whitespace: true, language: null}"], None),
    ],
)
def test_rm3_has_the_recipe_s_language(settings, language):
    recipe = config.load("quickstart", settings)
    params = baselines._rm3_params(recipe)
    assert params["language"] == language and params["rm3"] is True
    assert params.get("k1") == recipe.retriever.params.get("k1")


@pytest.mark.parametrize("code", ["thai", "null"])
def test_rm3_is_refused_in_a_language_without_an_analyzer(code):
    with pytest.raises(UserError, match="baseline rm3: Lucene has no analyzer for"):
        baselines._rm3_params(config.load("quickstart", [f"retriever.params={{language: {code}}}"]))


def test_a_format_s_examples_head_every_prompt_and_are_not_trained_on(shop):
    env = open_environment(config.load("cpu/sequential", [*shop, "format.examples=2"]))
    bare = open_environment(config.load("cpu/sequential", [*shop, "format.examples=0"]))
    assert len(env.task.train) == len(bare.task.train) - 2
    left_out = set(bare.task.train.ids) - set(env.task.train.ids)
    (head,) = {
        asked[: asked.rindex("Bought: ")] for asked in prompts(env.task.validation, env.task.catalog, env.format)
    }
    for identifier in left_out:
        place = bare.task.train.ids.index(identifier)
        assert env.task.catalog.titles[bare.task.train.rows[place][0]] in head
    assert head.count("Bought: ") == 2
    with pytest.raises(UserError, match="leave none to train on"):
        open_environment(config.load("cpu/sequential", [*shop, "format.examples=9999"]))


@pytest.mark.slow
def test_examples_come_from_training_and_in_the_format_asked_for():
    env = open_environment(config.load("quickstart"))
    (first,) = shown(env, 2)
    shots = [line for line in first.splitlines() if line.startswith(tuple(f"{q}: " for q in env.task.train.queries))]
    assert len(shots) == 2 and first.endswith(f"{env.task.test.queries[0]}:")
    assert first.count("happy: smile, joy, laugh") == 1  # The instruction is not repeated for each example.
    own = open_environment(config.load("quickstart", ["format.examples=2", "format.example_words=4"]))
    (_, with_words), (_, both) = own.format.examples[0], examples(own.task.train, own.task.catalog, own.format, 3, 4)
    assert both.examples[:2] == own.format.examples and len({asked for asked, _ in both.examples}) == 5
    assert with_words.count(",") == 3
    chat = open_environment(config.load("quickstart", ["format={answer: think_json, action: replace}"]))
    (messages,) = shown(chat, 2)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
    for message in messages[1::2]:
        assert chat.format.parse(message["content"], "") is not None


@pytest.mark.slow
def test_an_endpoint_answers_the_held_out_queries(server, tmp_path):  # noqa: F811
    settings = f"baselines.endpoint={{url: '{server.url}', model: m/1, dollars_per_million: [1.0, 2.0]}}"
    result = run("endpoint", tmp_path, settings, part="validation")
    assert {r["system"] for r in result["tables"][0]["rows"]} == {"raw query", "m/1"} and len(server.seen) == 89
    row = rows(tmp_path, "m-1", "validation")[0]
    assert row["completion"].startswith("HAPPY: SMILE")  # this server answers a prompt with its capitals
    kept = json.loads((tmp_path / "evaluation/validation/comparison.json").read_text())["systems"]["m/1"]
    assert kept["kind"] == "endpoint" and kept["cost"]["requests"] == 89
    assert kept["cost"]["dollars"] == pytest.approx(89 * (10 * 1.0 + 3 * 2.0) / 1e6)
    run("endpoint", tmp_path, settings, part="validation")
    assert len(server.seen) == 89  # nothing is paid for twice


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bm52", [], "choose from raw, last_title"),
        ("endpoint", [], "endpoint.model: not set"),
        ("endpoint", ["baselines.endpoint={model: m, dollars_per_million: [1.0]}"], "two prices"),
        ("sft", ["baselines.sft.lerning_rate=1"], r"baselines\.sft\.lerning_rate: SFTConfig has no such option"),
        ("dpo", ["baselines.rollouts=none.jsonl"], "none.jsonl: no such file"),
        ("dpo", ["baselines.rollouts=."], r"baselines\.rollouts: .* has no rollouts\.jsonl: give the folder of a run"),
        ("sft", ["baselines.outputs=none.jsonl"], "none.jsonl: no such file"),
    ],
)
@pytest.mark.slow
def test_mistakes(tmp_path, name, settings, message):
    with pytest.raises(UserError, match=message):
        run(name, tmp_path / "out", *settings)
    assert not (tmp_path / "out" / "baselines").exists()


def tiny(tiny_model: Path, out: Path) -> list[str]:
    return [
        f"model.name={tiny_model}", "model.dtype=float32", "lora.layers_to_transform=0-1", f"output_dir={out}",
        "grpo.max_completion_length=6", "prompts_per_step=1", "baselines.samples=2",
        "baselines.sft={max_steps: 2, learning_rate: 1.0e-2}", "baselines.dpo={max_steps: 2, learning_rate: 1.0e-2}",
        "evaluation.metrics=[ndcg@10]", "evaluation.test_limit=20", "evaluation.validation_limit=4",
        "grpo.disable_tqdm=true",
    ]  # fmt: skip


def test_several_processes_train_no_baseline(tmp_path, monkeypatch):
    """Each would save a policy of its own in the same place."""
    from rec_r1.baselines import sft_dpo

    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = config.load("quickstart", [f"output_dir={tmp_path}"])
    with pytest.raises(UserError, match="baseline sft: one process trains it, and several were started"):
        sft_dpo._trained(recipe, None, "sft", "SFT", list)


@pytest.mark.parametrize(("kind", "own"), [("sft", 2e-5), ("reward_weighted_sft", 2e-5), ("dpo", 1e-6)])
def test_lora_has_ten_times_the_rate_of_all_weights(tmp_path, kind, own):
    from rec_r1.baselines.post_training import _config

    def rate(*more):
        return _config(config.load("cpu/search", [f"output_dir={tmp_path}", *more]), kind).learning_rate

    assert rate(f"baselines.{kind}={{}}") == pytest.approx(10 * own)
    assert rate(f"baselines.{kind}={{}}", "lora=null") == pytest.approx(own)
    assert rate(f"baselines.{kind}={{learning_rate: 3.0e-3}}") == 3e-3


WORDS = ["red", "blue heart", "cat", "a dog that barks", "sun", "rain and snow"]


def post_trained(kind, tiny_model, folder, count, *more):
    """A trained policy's training, and its weights. count: the number of examples."""
    from safetensors.torch import load_file

    from rec_r1.baselines.post_training import Training

    rows = [{"prompt": f"{WORDS[n % 6]}:", "completion": f" {WORDS[n % 6]} x"} for n in range(count)]
    if kind == "dpo":
        rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    settings = [*tiny(tiny_model, folder), "prompts_per_step=3", "grpo.num_generations=8", "model.dtype=float32"]
    recipe = config.load("quickstart", [*settings, f"output_dir={folder}", *more])
    training = Training(recipe, open_environment(recipe), kind)
    training.train(rows, folder)
    return training, load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_examples_read_in_parts_give_the_same_policy(tiny_model, tmp_path, kind):
    import torch

    given = {"num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    made = {}
    for name, more in (
        ("parts", {}),
        ("whole", {"per_device_train_batch_size": 24}),
        ("untrained", {"learning_rate": 1e-30}),
    ):
        options = f"baselines.{kind}={json.dumps(given | more)}"
        steps = ["grpo.max_steps=2", "evaluation.every_steps=0"]
        training, made[name] = post_trained(kind, tiny_model, tmp_path / name, 48, options, *steps)
        args = training.config
        sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps
        assert sizes == ((24, 1) if name == "whole" else (12, 2))
    for name, weight in made["parts"].items():
        assert torch.allclose(weight, made["whole"][name], atol=2e-6), name
    moved = [float((weight - made["untrained"][name]).abs().max()) for name, weight in made["parts"].items()]
    assert max(moved) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "updates"), [("sft", 6), ("reward_weighted_sft", 6), ("dpo", 6)])
def test_there_are_as_many_updates_as_in_the_training_and_validation_chooses(
    tiny_model, tmp_path, monkeypatch, kind, updates
):
    from types import SimpleNamespace

    import torch

    from rec_r1.baselines import callbacks

    values = iter([0.1, 0.5, 0.5])
    scored = SimpleNamespace(whole=lambda: SimpleNamespace(rewards=[next(values)]))
    scorer = SimpleNamespace(score_split=lambda *_: scored)
    monkeypatch.setattr(callbacks, "metric_scorer", lambda *_: scorer)
    seen = []

    def generate(model, *_):
        assert not model.training
        seen.append({k: v.clone() for k, v in model.state_dict().items() if "lora_B" in k})
        return []

    monkeypatch.setattr(callbacks, "generate", generate)
    more = ["grpo.max_steps=6", "evaluation.every_steps=2", "evaluation.validation_limit=4"]
    options = f"baselines.{kind}={{num_train_epochs: 2, learning_rate: 1.0e-2}}"
    training, saved = post_trained(kind, tiny_model, tmp_path, 12, options, *more)
    assert training.config.per_device_train_batch_size == 4 and len(seen) == 3
    chosen = {name.replace(".default", ""): weight for name, weight in seen[1].items()}
    assert chosen and all(torch.equal(saved[name], weight) for name, weight in chosen.items())
    assert not all(torch.equal(seen[2][name], weight) for name, weight in seen[1].items())


@pytest.mark.slow
def test_sft_and_dpo_stand_in_one_table(tiny_model, tmp_path, capsys):
    out = tmp_path / "run"
    env = open_environment(config.load("quickstart"))
    given = write_jsonl(
        tmp_path / "given.jsonl", ({"query": q, "completion": " smile, face"} for q in env.task.train.queries[:8])
    )
    settings = tiny(tiny_model, out)
    assert cli.main(["baseline", "quickstart", "sft", *settings, f"baselines.outputs={given}"]) == 0
    rollouts = write_jsonl(
        tmp_path / "rollouts.jsonl",
        (
            {"query": q, "completion": c, "reward": r}
            for q in env.task.train.queries[:40]
            for c, r in ((" red", 0.1), (" blue", 0.9))
        ),
    )
    dpo = ["baseline", "quickstart", "dpo", *settings, f"baselines.rollouts={rollouts}"]
    assert cli.main(dpo) == 0
    shown = capsys.readouterr().out
    assert "sft - raw query" in shown and "dpo - raw query" in shown
    assert (out / "baselines/sft/adapter_model.safetensors").is_file()
    assert not list(out.glob("baselines/*/README.md"))
    stamp = (out / "baselines/dpo/adapter_model.safetensors").stat().st_mtime_ns
    assert cli.main([*dpo, "--split", "validation"]) == 0  # trained once, evaluated on another part
    assert (out / "baselines/dpo/adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert cli.main([*dpo, "baselines.dpo.beta=0.5"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert cli.main(["baseline", "quickstart", "few_shot", *settings]) == 0
    assert (
        cli.main(
            [
                "train",
                "quickstart",
                *settings,
                "grpo.max_steps=2",
                "grpo.num_generations=4",
                "prompts_per_step=2",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    for name in ("raw query", "untrained", "few shot", "sft", "dpo"):
        assert f"trained - {name}" in shown
