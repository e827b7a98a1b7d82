import pytest

from rec_r1 import config
from rec_r1.config import Recipe, UserError

SHIPPED = {"quickstart", "beir_bm25"}


def test_every_recipe_loads():
    assert {path.stem for path in config.recipes_folder().glob("*.yaml")} == SHIPPED
    for name in SHIPPED:
        assert isinstance(config.load(name), Recipe)
        first, *_ = config.find(name).read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ")  # what `rec-r1 recipes` prints


def test_dump_and_load_round_trip(tmp_path):
    recipe = config.load("quickstart", ["grpo.learning_rate=1e-6", "rewards.ndcg@10=0.5"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(recipe), encoding="utf-8")
    assert config.load(path) == recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("grpo.learning_rate=1e-6", 1e-6),
        ("grpo.learning_rate=1.5E+3", 1500.0),
        ("grpo.learning_rate=2", 2),
        ("grpo.learning_rate=on-demand", "on-demand"),
        ("grpo.learning_rate=null", None),
    ],
)
def test_overrides_are_yaml_with_exponents(override, value):
    got = config.load("quickstart", [override]).grpo["learning_rate"]
    assert got == value and type(got) is type(value)


def test_overrides_reach_everywhere_and_the_last_wins():
    recipe = config.load(
        "quickstart", ["lora=null", "seed=1", "seed=2", "task.train_filter.raw_ndcg_below=1", "rewards={hit@5: 2}"]
    )
    assert recipe.lora is None and recipe.seed == 2 and recipe.rewards == {"hit@5": 2}
    assert recipe.task.train_filter.raw_ndcg_below == 1.0
    assert isinstance(recipe.task.train_filter.raw_ndcg_below, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", r"unknown key sede: did you mean 'seed'"),
        ("task.nmae=x", r"unknown key task\.nmae: did you mean 'name'"),
        ("seed=one", r"seed must be int, got 'one'"),
        ("seed=true", r"seed must be int, got True"),
        ("model.name=3", r"model\.name must be str, got 3"),
        ("evaluation.metrics=ndcg@10", r"evaluation\.metrics must be list"),
        ("model=smollm2", r"model must be a section"),
        ("grpo.output_dir=x", r"grpo\.output_dir is set by output_dir"),
        ("grpo.seed=1", r"grpo\.seed is set by seed"),
        ("format.action=append", r"format\.action: 'append': choose replace or expand"),
        ("format.repeat=0", r"format\.repeat must be at least 1, got 0"),
        ("rewards={}", r"rewards: rewards must map at least one name"),
        ("evaluation.metrics=[ndgc@10]", r"evaluation\.metrics: unknown reward 'ndgc': did you mean 'ndcg'"),
        ("seed", r"override 'seed': write key=value"),
        ("output_dir.x=1", r"'output_dir' is not a section"),
        ("seed=[1", r"not valid YAML"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(UserError, match=message):
        config.load("quickstart", [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "a recipe is a mapping"), ("lora: 3", "lora must be dict or null, got 3")],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        config.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_recipe_names_those_there():
    with pytest.raises(UserError, match="quickstart"):
        config.load("quickstrat")
