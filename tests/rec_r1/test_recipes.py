"""Every recipe that comes with the toolkit: loaded and counted, and two steps of it with a tiny model."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets_ import amazon_2023, movielens, plain_folder
from test_amazon_c4 import write as amazon_c4
from test_esci import EXAMPLES, official

from rec_r1 import Policy, cli, config, train
from rec_r1.config import Recipe

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.curves
# Two products in three are found by every query, so that re-ranking has something to order.
FOUND = [{**example, "query": f"acme title of {example['query']}"} for example in EXAMPLES]


def esci(folder: Path, beir_folder: Path) -> Path:
    return official(folder, FOUND)


FOLDERS = {
    "quickstart": None,
    "beir_bm25": lambda folder, beir_folder: beir_folder,
    "esci_bm25": esci,
    "esci_dense": esci,
    "rerank": esci,
    "amazon_c4_bm25": lambda folder, _: amazon_c4(folder / "c4"),
    "amazon_c4_dense": lambda folder, _: amazon_c4(folder / "c4"),
    "amazon_beauty_sequential": lambda folder, _: amazon_2023(folder),
    "movielens_sequential": lambda folder, _: movielens(folder, "ml-1m"),
    "item_generation": lambda folder, _: movielens(folder, "ml-1m"),
    "propagate": lambda folder, _: movielens(folder, "ml-1m"),
    "history_edit": lambda folder, _: movielens(folder, "ml-1m"),
    "cpu/search": lambda folder, beir_folder: beir_folder,
    "cpu/sequential": lambda folder, _: plain_folder(folder),
}
TINY = [
    "model.dtype=float32", "evaluation.validation_limit=3", "evaluation.test_limit=20",
    "evaluation.every_steps=2", "grpo.max_steps=2",
    "grpo.save_steps=2", "prompts_per_step=2",
    "grpo.num_generations=2", "grpo.max_completion_length=4", "grpo.bf16=false", "grpo.use_vllm=false",
]  # fmt: skip


def test_every_recipe_loads():
    assert set(config.shipped()) == set(FOLDERS) and len(FOLDERS) == 14
    for name in FOLDERS:
        recipe = config.load(name)
        assert isinstance(recipe, Recipe) and recipe.output_dir == f"runs/{name.replace('/', '_')}"
        text = config.find(name).read_text(encoding="utf-8")
        assert text.startswith("# ")  # what `rec-r1 recipes` prints
        assert f"recipes/{name}.yaml" in text  # its launch line


def test_the_paper_s_settings():
    for name in set(FOLDERS) - {"quickstart", "cpu/search", "cpu/sequential"}:
        grpo = config.load(name).grpo
        assert config.load(name).prompts_per_step == 32
        assert (grpo["num_generations"], grpo["temperature"], grpo["beta"]) == (12, 0.6, 0.001)
        assert grpo["top_p"] == 1  # The paper has 0.95; rec_r1/checks/grpo_rules.py says why not here.
        assert grpo["learning_rate"] == (1e-5 if name == "beir_bm25" else 1e-6)
        assert config.load(name).model.name == "Qwen/Qwen2.5-3B-Instruct"


def test_every_accelerate_config_is_one():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
    assert [path.stem for path in files] == ["fsdp2", "nodes", "one_gpu", "zero3"]
    for path in files:
        loaded = load_config_from_file(str(path))  # refuses keys that accelerate does not know
        tree = yaml.safe_load(path.read_text())
        assert loaded.num_processes == tree["num_processes"] and loaded.mixed_precision == "bf16"
        for recipe in re.findall(r"recipes/(\w+)\.yaml", path.read_text()):
            assert config.find(recipe).is_file()


def through_accelerate(recipe: str, settings: list[str]) -> None:
    """Train as the launch line of the recipe does, in a new process.

    accelerate's launcher is called in this process, because a new one would import torch for the launcher, too.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch_command(launch_command_parser().parse_args([*launch, "-m", "rec_r1.train", recipe, *settings]))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_two_steps(name, tiny_model, beir_folder, tmp_path, monkeypatch, capfd):
    """The quickstart as its launch line says, the others in this process: importing TRL in a new one takes long."""
    monkeypatch.chdir(ROOT)
    out, make = tmp_path / "run", FOLDERS[name]
    settings = [f"model.name={tiny_model}", f"output_dir={out}", *TINY]
    if make is not None:
        settings.append(f"task.path={make(tmp_path, beir_folder)}")
    if config.load(name).lora is not None:
        settings.append("lora={r: 4, target_modules: [q_proj]}")
    if config.load(name).retriever.kind == "dense":
        settings.append("retriever.params={model: all-minilm-l6-v2}")
    if name == "cpu/search":
        # BM25 answers the queries of these few lines, and four examples would leave too few of them.
        settings += ["task.train_filter.raw_ndcg_below=1.01", "format.examples=1"]
    if name == "quickstart":
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        through_accelerate(f"recipes/{name}.yaml", settings)
    else:
        assert train.main([f"recipes/{name}.yaml", *settings]) == 0
    printed = capfd.readouterr().out
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "reward" in row] == [1, 2]
    comparison = json.loads((out / "evaluation/test/comparison.json").read_text())
    assert set(comparison["systems"]) == {"raw query", "untrained", "trained"}
    assert comparison["metrics"] == config.load(name).evaluation.metrics
    assert "trained - raw query" in printed
    asks_as_it_was_trained(out)


def asks_as_it_was_trained(run: Path) -> None:
    """The policy of a run writes from the prompts of its rollouts, and gives the answers of its held-out evaluation."""
    policy = Policy.load(run)
    task = policy.env.task

    def asked(split):
        ids = task.catalog.ids
        return split.queries, [[ids[row] for row in rows] for rows in split.histories] if split.histories else None

    made = {json.dumps(prompt) for prompt in policy.prompts(*asked(task.train))}
    rollouts = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts and all(json.dumps(row["prompt"]) in made for row in rollouts)
    kept = [json.loads(line) for line in (run / "evaluation/test/trained.jsonl").read_text().splitlines()]
    assert policy.complete(*asked(task.test)) == [row["completion"] for row in kept]
    answers = policy.search(*asked(task.test), k=3)
    assert [answer.malformed for answer in answers] == [row["malformed"] for row in kept]
    for answer, row in zip(answers, kept, strict=True):
        if not answer.malformed:
            assert answer.sent == row["action"]
            assert [hit.id for hit in answer.hits] == [hit["id"] for hit in row["hits"][:3]]
    asks_by_the_command(run, *asked(task.test), kept)
    if task.test.histories:  # the query is made of the history where it is left out
        assert policy.prompts(None, asked(task.test)[1]) == policy.prompts(*asked(task.test))


def asks_by_the_command(run: Path, queries: list[str], histories: list[list[str]] | None, kept: list[dict]) -> None:
    """`rec-r1 ask` writes what the held-out evaluation wrote, and finds what it found."""
    file, output = run / "questions.jsonl", run / "answers.jsonl"
    rows = [{"query": query} for query in queries]
    if histories is not None:
        rows = [row | {"history": history} for row, history in zip(rows, histories, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cli.main(["ask", str(run), "--file", str(file), "-o", str(output), "--k", "3"]) == 0
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [answer["query"] for answer in answers] == list(queries)
    assert [answer["completion"] for answer in answers] == [row["completion"] for row in kept]
    for answer, row in zip(answers, kept, strict=True):
        if not answer["malformed"]:
            assert [hit["id"] for hit in answer["hits"]] == [hit["id"] for hit in row["hits"][:3]]
