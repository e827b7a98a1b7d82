import re
import shlex
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import cli, config
from rec_r1.config import Recipe, UserError, overrides, values


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


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "No", "OFF"])
def test_the_booleans_of_yaml_1_1_are_text_in_files_and_overrides(tmp_path, word):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: quickstart.yaml\ntask: {{name: catalog, params: {{grades: {{{word}: 1}}}}}}\n")
    path.write_text(path.read_text() + f"grpo: {{save_strategy: {word}, use_vllm: false, log_completions: True}}\n")
    recipe = config.load(path)
    assert recipe.grpo["save_strategy"] == word and recipe.task.params["grades"] == {word: 1}
    assert recipe.grpo["use_vllm"] is False and recipe.grpo["log_completions"] is True
    written = tmp_path / "config.yaml"
    written.write_text(config.dump(recipe))
    assert config.load(written) == recipe
    assert yaml.safe_load(written.read_text())["grpo"]["save_strategy"] == word  # Other readers get the text, too.
    assert config.load("quickstart", [f"grpo.save_strategy={word}"]).grpo["save_strategy"] == word


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
        ("seed=one", r"seed must be an integer, got 'one'"),
        ("seed=true", r"seed must be an integer, got true"),
        ("model.name=3", r"model\.name must be a text, got 3"),
        ("evaluation.metrics=ndcg@10", r"evaluation\.metrics must be a list"),
        ("model=smollm2", r"model must be a section"),
        ("grpo.output_dir=x", r"grpo\.output_dir is set by output_dir"),
        ("grpo.seed=1", r"grpo\.seed is set by seed"),
        ("format.action=append", r"format\.action: 'append': choose from replace"),
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
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("lora: 3", "lora must be a mapping or null, got 3"),
    ],
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


def test_a_dotted_reward_override_sets_the_value():
    assert config.load("quickstart", ["rewards.mrr@10=0.25"]).rewards == {
        "ndcg@100": 0.5,
        "ndcg@10": 0.5,
        "mrr@10": 0.25,
    }


def test_an_override_opens_a_section_that_was_null():
    assert config.load("quickstart", ["lora=null", "lora.r=4"]).lora == {"r": 4}


@pytest.mark.parametrize("key", sorted(values.SET_ELSEWHERE))
def test_what_the_recipe_says_elsewhere_is_refused_in_grpo(key):
    with pytest.raises(UserError, match=rf"grpo\.{key} is set by .*: remove it"):
        config.load("quickstart", [f"grpo.{key}=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("xyzzy=1", r"unknown key xyzzy: choose from output_dir, seed, model"),
        ("task.train_filter.kk=1", r"unknown key task\.train_filter\.kk: did you mean 'k'"),
        ("rewards={ndgc@10: 1}", r"rewards: unknown reward 'ndgc': did you mean 'ndcg'"),
        ("rewards.ndcg@10=much", r"rewards: weight of reward 'ndcg@10' must be a finite number, got 'much'"),
        ("evaluation.metrics=[]", r"evaluation\.metrics: \[\]: name at least one metric"),
        ("task.train_filter.k=0", r"task\.train_filter\.k must be at least 1, got 0"),
        ("evaluation.every_steps=-1", r"evaluation\.every_steps must be at least 0, got -1"),
        ("evaluation.batch_size=0", r"evaluation\.batch_size must be at least 1, got 0"),
        ("evaluation.transcript_hits=-1", r"evaluation\.transcript_hits must be at least 0, got -1"),
        ("evaluation.mismatch_below=true", r"evaluation\.mismatch_below must be a number, got true"),
        ("evaluation.validation_limit=1.5", r"validation_limit must be an integer or null, got 1\.5"),
        ("seed=null", r"seed must be an integer, got null"),
        ("seed=1.0", r"seed must be an integer, got 1\.0"),
        ("format.chat=1", r"format\.chat must be true or false, got 1$"),
        ("format.chat=off", r"format\.chat must be true or false, got 'off': write false"),
        ("format.chat=maybe", r"format\.chat must be true or false, got 'maybe'$"),
        ("task=null", r"task must be a section"),
        ("=1", r"override '=1': write key=value"),
    ],
)
def test_more_mistakes(override, message):
    with pytest.raises(UserError, match=message):
        config.load("quickstart", [override])


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "null\n", "---\n", "{}", " \n\n", "~"])
def test_an_empty_file_is_no_recipe(tmp_path, text, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml: the file is empty"):
        config.load(path)
    other = tmp_path / "other.yaml"
    other.write_text("base: mine.yaml\nseed: 1\n")
    with pytest.raises(UserError, match=r"mine\.yaml: the file is empty"):
        config.load(other)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(text)  # emptied: the default recipe's numbers would be taken for the run's
    assert cli.main(["eval", str(run)]) == 2
    assert "config.yaml: the file is empty" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"line 2, column 1: seed is written twice"),
        ("grpo: {max_steps: 1, beta: 0, max_steps: 2}", r"max_steps is written twice"),
        ("seed: 1\n---\nseed: 2\n", r"expected a single document"),
        ("task: &t {params: *t}", r"its aliases expand to more than"),
        (f"task: {{params: {{}}}}\n{BOMB}", r"its aliases expand to more than"),
        ("[" * 5000, r"nested too deep|not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", r"could not determine a constructor"),
        ("task: {params: {when: !!timestamp 2024-13-01}}", r"month must be"),
    ],
)
def test_yaml_that_says_something_else_than_it_seems(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_anchors_and_merges_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("grpo: &g {beta: 0.1, max_steps: 1}\nbaselines: {sft: {<<: *g, max_steps: 2}, dpo: *g}\n")
    recipe = config.load(path)
    assert recipe.baselines.sft == {"beta": 0.1, "max_steps": 2} and recipe.baselines.dpo == recipe.grpo


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["format.prompt=question: {query}"],
            r"""must be a text or null, got .*: write 'format\.prompt="question: \{query\}"'""",
        ),
        (["format.prompt={query}"], r"""write 'format\.prompt="\{query\}"'"""),
        (
            ["format.prompt={query} it"],
            r"""not valid YAML: write text in quotes, such as 'format\.prompt="\{query\} it"'""",
        ),
        (["format.prompt=it's: {query}"], r"write 'format\.prompt=\"it'\"'\"'s: \{query\}\"'"),
        (["output_dir=3"], r"""write 'output_dir="3"'"""),
        (["output_dir="], r"got null: write a value after the =, or leave the override out"),
        (["rewards={ndcg@10:", "1}"], r"single quotes around the whole, such as 'rewards=\{ndcg@10: 1\.0\}'"),
        (["seed=abc", "output_dir=x"], r"override 'seed=abc': seed must be an integer"),
        (["modle.name=x"], r"override 'modle\.name=x': unknown key modle: did you mean 'model'"),
        (
            ["task.train_filter={k: 0}"],
            r"override 'task\.train_filter=\{k: 0\}': task\.train_filter\.k must be at least 1",
        ),
        (["grpo=5"], r"override 'grpo=5': grpo must be a mapping, got 5"),
        (["grpo={a: 1, a: 2}"], r"override 'grpo=\{a: 1, a: 2\}': the value is not valid YAML"),
        (["format.action=ranking"], r"override 'format\.action=ranking': task\.candidates: 0"),
    ],
)
def test_what_an_override_has_wrong_is_not_blamed_on_the_file(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        config.load("quickstart", overrides)
    assert "quickstart" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [("nowhere.yaml", "'nowhere.yaml': no such file"), ("mine.yaml", "it has a base itself"), (".", "folder")],
)
def test_a_wrong_base_is_blamed_on_the_file_that_names_it(tmp_path, base, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {base}\nseed: 1\n")
    with pytest.raises(UserError, match=message) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}: base: ")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(UserError, match=f"recipe '{tmp_path}': is a folder"):
        config.load(tmp_path)
    with pytest.raises(UserError, match="recipe '': no such file"):
        config.load("")


def test_what_the_file_has_wrong_is_not_blamed_on_an_override(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: abc\n")
    with pytest.raises(UserError, match=r"mine\.yaml: seed must be an integer"):
        config.load(path, ["output_dir=x"])
    assert config.load(path, ["seed=1"]).seed == 1  # as before, an override may put it right


@pytest.mark.slow
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))
def test_the_quoted_override_in_the_message_means_the_text(text):
    (word,) = shlex.split(overrides.in_quotes("format.prompt", text))
    assert config.load("quickstart", [word]).format.prompt == text


@pytest.mark.parametrize("text", ['!!int ""', '!!float ""', "!!bool x", "!!timestamp x"])
def test_a_tag_that_does_not_fit(text):
    with pytest.raises(UserError, match="the value is not valid YAML"):
        config.load("quickstart", [f"seed={text}"])


@pytest.mark.parametrize(
    "text", ["2026-05-01", "2026-05-01 10:30:00", "2026-05-01T10:30:00Z", "12:30", "1:30.5", "007", "-012", "no", "on"]
)
def test_dates_times_and_codes_are_texts(text, tmp_path):
    """YAML 1.1 has dates, booleans, and numbers of other bases here."""
    recipe = config.load("quickstart", [f"task.params.when={text}"])
    assert recipe.task.params["when"] == text
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    assert config.load(tmp_path / "config.yaml").task.params["when"] == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-12", -12), ("+3", 3), ("1_000", 1000), ("0x1f", 31), ("1.", 1.0), (".5", 0.5), ("00.5", 0.5)],
)
def test_numbers_are_numbers(text, value):
    found = config.load("quickstart", [f"task.params.n={text}"]).task.params["n"]
    assert found == value and type(found) is type(value)


def test_a_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(UserError, match=r"mine\.yaml: not valid YAML"):
        config.load(path)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "[1, .nan]", "{a: {b: .inf}}"])
@pytest.mark.parametrize("field", ["seed", "lora", "task.params", "retriever.params", "rewards", "grpo.beta"])
def test_no_number_is_nan_or_infinite(field, value):
    with pytest.raises(UserError, match=rf"^override .*: {field}\S* is NaN or infinite"):
        config.load("quickstart", [f"{field}={value}"])


def test_every_mistake_of_one_level_is_named():
    with pytest.raises(UserError) as caught:
        config.load("quickstart", ["seed=-1", "format.repeat=0", "model.dtype=foo"])
    lines = f"rec-r1: {caught.value}".splitlines()
    assert len(lines) == 3 and all(line.startswith("rec-r1: override ") for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4294967296", r"seed must be at least 0 and at most 2147483647, got 4294967296"),
        ("task.splits={train: 1}", r"task\.splits must be a mapping to texts, got"),
        ("baselines.endpoint.dollars_per_million=[1]", r"dollars_per_million: \[1\]: two prices"),
        ("evaluation.mismatch_below=1" + "0" * 400, r"evaluation\.mismatch_below must be a number"),
        ("model.dtype=int8", r"model\.dtype: 'int8': choose from auto"),
        ("output_dir=''", r"output_dir: empty"),
        ("seed=&a [*a]", r"not valid YAML"),
        ("task.name=!!timestamp 2024-01-01", r"task\.name must be a text"),
    ],
)
def test_values_that_no_field_takes(override, message):
    with pytest.raises(UserError, match=message):
        config.load("quickstart", [override])


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("REC_R1_CACHE", str(tmp_path))
    assert config.cache_folder() == tmp_path
    monkeypatch.delenv("REC_R1_CACHE")
    assert config.cache_folder() == Path.home() / ".cache" / "rec-r1"


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))).filter(lambda s: not EXPONENT.fullmatch(s))

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.slow
@given(TEXT.filter(str.strip), TEXT, FINITE, st.integers(), st.none() | st.dictionaries(TEXT, st.booleans()))
def test_any_recipe_comes_back_from_its_dump(folder, prompt, rate, steps, lora):
    recipe = Recipe(output_dir=folder, lora=lora, grpo={"learning_rate": rate, "max_steps": steps})
    recipe.format.prompt = prompt
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_text(config.dump(recipe), encoding="utf-8")
        assert config.load(path) == recipe


@pytest.mark.parametrize("text", ["1e-4", "5.e3", "a\x85b"])
def test_strings_that_look_like_something_else_come_back_from_a_dump(tmp_path, text):
    recipe = Recipe(output_dir=text)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(recipe), encoding="utf-8")
    assert config.load(path) == recipe


@pytest.mark.parametrize("metrics", ["[[ndcg@10]]", "[{ndcg@10: 1}]"])
def test_a_metric_that_is_no_name(metrics):
    with pytest.raises(UserError, match=r"evaluation\.metrics"):
        config.load("quickstart", [f"evaluation.metrics={metrics}"])
