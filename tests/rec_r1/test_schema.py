"""The schema that editors check a recipe by agrees with what a recipe is refused for."""

import pytest

from rec_r1 import config
from rec_r1.config import UserError, described
from rec_r1.config.yaml_text import parse

jsonschema = pytest.importorskip("jsonschema")
VALIDATOR = jsonschema.Draft202012Validator(config.json_schema())


def test_it_is_a_schema_and_every_recipe_of_ours_matches_it():
    jsonschema.Draft202012Validator.check_schema(config.json_schema())
    for name in config.shipped():
        tree = parse(config.find(name).read_text(encoding="utf-8"))
        assert [error.message for error in VALIDATOR.iter_errors(tree)] == [], name


@pytest.mark.parametrize(
    "recipe",
    [
        "sede: 1",
        "task: {nmae: emoji}",
        "task: {train_filter: {kk: 3}}",
        "retriever: {cache: {memory: 3}}",
        "seed: one",
        "seed: true",
        "model: smollm2",
        "evaluation: {metrics: ndcg@10}",
        "evaluation: {test_limit: few}",
        "lora: 8",
    ],
)
def test_it_refuses_what_load_refuses(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(UserError):
        config.load(path)
    assert not VALIDATOR.is_valid(parse(recipe))


@pytest.mark.parametrize(
    "recipe",
    ["retriever: {max_error_rate: 1}", "lora: null", "evaluation: {test_limit: null}", "base: quickstart.yaml"],
)
def test_it_accepts_what_load_accepts(recipe, tmp_path):
    (tmp_path / "quickstart.yaml").write_text("seed: 1")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    config.load(path)
    assert VALIDATOR.is_valid(parse(recipe))


def test_every_section_shows_its_keys_with_their_defaults():
    sections = config.json_schema()["$defs"]
    assert sections["RetrieverConfig"]["properties"]["kind"]["default"] == "bm25"
    assert sections["SpeedConfig"]["description"].startswith("Work that a training leaves out")


def test_every_key_has_its_description():
    schema = config.json_schema()
    for key in described.keys(config.Recipe):
        *sections, leaf = key.name.split(".")
        node = schema
        for section in sections:
            node = schema["$defs"][node["properties"][section]["$ref"].rpartition("/")[2]]
        assert node["properties"][leaf]["description"] == key.text and key.text
