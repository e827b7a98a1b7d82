"""The pages: their code runs, their commands parse, their keys are the recipe's, and what they point to is there."""

import argparse
import dataclasses
import re
import shlex
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml

import retrievers
import rewards
from rec_r1 import cli, config, tasks, train
from rec_r1.checks.check import check
from rec_r1.environment import open_environment

ROOT = Path(__file__).parents[2]
NAMES = [
    "README.md", "recipes/README.md", "retrievers/README.md", "rewards/README.md", "rec_r1/README.md",
    "tests/README.md", "tests/benchmarks/README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md",
]  # fmt: skip
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
each_page = pytest.mark.parametrize("name", PAGES)


def module(name: str) -> str:
    (block,) = [b for b in BLOCKS if b.startswith(f"# {name}.py")]
    return block


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next one of its level."""
    level = title.partition(" ")[0]
    return PAGES[page].partition(f"\n{title}\n")[2].partition(f"\n{level} ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads included."""
    lines = [line.strip()[1:-1].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def anchor(heading: str) -> str:
    """How GitHub names a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """The pages' own modules, importable."""
    for name in ("my_reward", "my_retriever", "my_task"):
        (tmp_path / f"{name}.py").write_text(module(name), encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_every_block_is_under_fifteen_lines():
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len([line for line in block.splitlines()[1:] if line.strip()]) < 15


def test_own_reward_retriever_and_task_work_together(extensions):
    settings = ["task.name=my_task", "retriever.kind=my_retriever", "rewards={ndcg@10: 1.0, my_reward.brevity: 0.1}"]
    env = open_environment(config.load("quickstart", settings))
    split = env.task.train
    scored = env.scorer.score(["running shoes", ""], [split.queries[0]] * 2, [split.rows[0]] * 2, [split.grades[0]] * 2)
    assert scored.components["ndcg@10"].tolist() == [1.0, 0.0]
    assert scored.rewards.tolist() == pytest.approx([1.0 + 0.1 / 2, 0.0])
    queries = [retrievers.Query("red shoes"), retrievers.Query("nothing")]
    hits = env.retriever.search(queries, len(env.task.catalog))
    ranks = env.retriever.ranks(queries, np.array([[0, 1], [0, 1]]))
    for q in range(2):
        for row in range(2):
            position = np.flatnonzero(hits.rows[q] == row)
            assert ranks[q, row] == (position[0] + 1 if len(position) else 0)


def test_own_metric_is_reported_under_its_name(extensions, tiny_model):
    settings = [f"model.name={tiny_model}", "lora=null", "evaluation.metrics=[my_reward.brevity, ndcg@10]"]
    lines = check(config.load("quickstart", settings))
    assert next(line for line in lines if line.startswith("raw query  test: ")).startswith("raw query  test: brevity ")


@pytest.mark.slow
def test_scorer_in_a_plain_trl_script(tiny_model, tmp_path, monkeypatch):
    (script,) = [b for b in BLOCKS if "GRPOTrainer(" in b]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in script
    monkeypatch.chdir(tmp_path)
    exec(compile(script.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)), "README", "exec"), {})
    assert list((tmp_path / "runs").glob("**/*"))


@pytest.mark.slow
def test_a_trained_policy_answers_a_query(tiny_model, tmp_path, monkeypatch, capsys):
    (script,) = [b for b in BLOCKS if "Policy.load(" in b]
    monkeypatch.chdir(tmp_path)
    sizes = ["prompts_per_step=1", "grpo.num_generations=4"]
    few = [*sizes, "grpo.max_steps=1", "evaluation.validation_limit=4", "evaluation.test_limit=20"]
    few.append("task.train_filter.raw_ndcg_below=1.01")
    assert train.main(["quickstart", f"model.name={tiny_model}", "model.dtype=float32", "lora=null", *few]) == 0
    capsys.readouterr()
    exec(compile(script, "README", "exec"), {})
    assert capsys.readouterr().out.strip()


# ---- What the pages point to


@each_page
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), target


@each_page
def test_files_that_a_page_names_exist(name):
    found = set(re.findall(r"(?<![\w/.])(?:rec_r1|retrievers|rewards|recipes|tests|\.github)/[\w/.-]*\w", PAGES[name]))
    for path in found:
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_main_one():
    for name in NAMES[1:]:
        assert f"]({name})" in PAGES["README.md"], name


@each_page
def test_pages_name_no_machine(name):
    assert not re.search(r"/work/|/home/|/tmp/|\.\./shared|HOUSE\.md|DESIGN\.md", PAGES[name])


# ---- Commands


def commands(page: str) -> list[list[str]]:
    """Every `rec-r1` and every training through accelerate in a page's shell blocks and code spans, as words. Spans
    such as `rec-r1 fit` and `rec-r1 eval --metrics` name a verb or an option and are not taken."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ").splitlines()
    spans = [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", page)]
    found = []
    for line in [*blocks, *(span for span in spans if not re.match(r"rec-r1( [\w-]+)?( --.*)?$", span))]:
        words = shlex.split(line.strip(), comments=True)
        if words[:1] == ["rec-r1"]:
            found.append(words[1:])
        elif "rec_r1.train" in words[1:]:
            found.append(["train", *words[words.index("rec_r1.train") + 1 :]])
    return found


@each_page
def test_commands_parse(name):
    of_train, of_all = train.parser(), cli.parser()
    places = {"RECIPE": "quickstart", "$NAME": "popularity", "my_shop.yaml": "quickstart", "bash|zsh|fish": "bash"}
    for words in commands(PAGES[name]):
        command = words[: words.index(">")] if ">" in words else words
        filled = [places.get(word, word) for word in command]
        if filled[0] == "train":
            args = of_train.parse_intermixed_args(filled[1:])
        else:
            args, extra = of_all.parse_known_args(filled)
            assert not [word for word in extra if word.startswith("-") or "=" not in word], words
            args.overrides = [*getattr(args, "overrides", []), *extra]
        if "recipe" in args and not ("policy" in args and args.policy):  # --policy names a run's folder
            config.load(ROOT / args.recipe if args.recipe.endswith(".yaml") else args.recipe, args.overrides)


def test_every_verb_is_listed():
    parser = cli.parser()
    (verbs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    shown = {words[0] for words in commands(section("rec_r1/README.md", "## Commands"))}
    shown |= {words[0] for words in commands(section("rec_r1/README.md", "## Baselines"))}
    assert shown == set(verbs.choices)


# ---- Tables that repeat the code


def leaves(cls: type, prefix: str = "") -> dict[str, object]:
    """Every key of a recipe's section, dotted, with its default."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            factory = field.default_factory
            found[prefix + field.name] = field.default if factory is dataclasses.MISSING else factory()
    return found


def test_every_key_of_a_recipe_is_listed():
    table = rows(section("rec_r1/README.md", "## Every key of a recipe"))
    listed = {
        row[0].strip("`"): yaml.safe_load(row[1].strip("`"))
        for row in table
        if row[0].startswith("`") and len(row) == 3
    }
    assert listed == leaves(config.Recipe)


def test_the_tables_of_keys_and_the_command_options_say_the_same(capsys):
    assert cli.main(["options", "--markdown"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    page = section("rec_r1/README.md", "## Every key of a recipe").splitlines()
    of_tasks = {f"| `{name}` |" for name in tasks.TASKS}
    shown = [line for line in page if line.startswith("| `") and " ".join(line.split()[:3]) not in of_tasks]
    assert sorted(shown) == sorted(printed)


def test_every_parameter_of_every_task_is_listed():
    page = section("rec_r1/README.md", "### `task`")
    listed = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows(page) if len(row) == 2}
    for name in tasks.TASKS:
        params = vars(tasks.find(config.TaskConfig(name=name))).get("Params")
        assert listed[name] == ([field.name for field in dataclasses.fields(params)] if params else []), name


def test_the_map_names_every_package():
    shown = {row[0].strip("`").rstrip("/") for row in rows(section("rec_r1/README.md", "## Map of the packages"))}
    there = {
        path.name for path in (ROOT / "rec_r1").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert there - {"__init__.py"} <= shown


def test_every_parameter_of_every_backend_is_listed():
    table = {row[0].strip("`"): row for row in rows(section("retrievers/README.md", "## Parameters"))[1:]}
    assert set(table) == set(retrievers.BACKENDS)
    for kind, (_, file, params) in table.items():
        path = "retrievers." + file.strip("`").removesuffix(".py").replace("/", ".")
        assert path == retrievers.BACKENDS[kind]
        assert set(re.findall(r"`(\w+)`", params)) == set(retrievers.registry.parameters(kind)), kind


def test_every_reward_is_listed():
    page = PAGES["rewards/README.md"]
    for name in rewards.REWARDS:
        assert re.search(rf"^(\| |- )`{name}(@k)?`", page, re.MULTILINE), name


def test_what_a_malformed_completion_earns():
    earns = dict(rows(section("rewards/README.md", "## What a malformed completion earns")))
    outcome = rewards.Outcome(
        ["<think>" + "word " * 99], [None], np.array([[0]], np.int32), np.array([[1]], np.float32), str.split,
        np.array([[1]], np.int32), ["word"], [""],
    )  # fmt: skip
    for name, said, value in [
        ("rec_r1@k", "−2", -2.0), ("format", "−1", -1.0), ("repetition", "0", 0.0), ("stuffing", "0", 0.0),
        ("lift@k", "minus what the raw query scores", -1.0), ("harm@k", "the same", -1.0),
        ("length", "by the length of the whole completion, from 0 to −1", -1.0),
    ]:  # fmt: skip
        assert earns[f"`{name}`"] == said
        assert rewards.from_spec({name.replace("@k", "@10"): 1.0})(outcome).tolist() == [value]
    for name in rewards.METRICS:
        assert rewards.from_spec({f"{name}@10": 1.0})(outcome).tolist() == [0.0]
    assert earns["a metric (`ndcg@k`, `recall@k`, …)"] == "0"


def test_every_recipe_is_listed_with_the_estimates_of_its_header():
    short, long = section("README.md", "## Recipes"), section("recipes/README.md", "## Which recipe")
    costs = rows(section("recipes/README.md", "## GPUs, memory and time"))
    for name in config.shipped():
        assert f"`{name}`" in short and f"`{name}`" in long, name
        (cost,) = [row for row in costs if f"`{name}`" in row[0]]
        if cost[1] == "GPU":
            header = config.find(name).read_text(encoding="utf-8").replace("\n# ", " ")
            with_lora, with_all = re.findall(r"(\d+) GiB", cost[2])
            (seconds,) = re.findall(r"(\d+) s a step", cost[3])
            assert f"{with_lora} GiB with LoRA, {with_all} GiB with all weights; {seconds} s a step" in header, name


def test_the_workflow_runs_the_tests_as_the_pages_say():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    runs = {}
    for name, job in workflow["jobs"].items():
        assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
        runs[name] = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == {"unit": ["bash tests/run.sh unit"], "everything": ["bash tests/run.sh"]}
    for words in ("bash tests/run.sh", "bash tests/run.sh unit"):
        assert words in PAGES["README.md"] and words in PAGES["tests/README.md"]
