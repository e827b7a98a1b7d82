"""The command `rec-r1 options`, what it reads, and the other verbs that a person starts with."""

import dataclasses
import errno
import shutil
import subprocess
import sys

import pytest
import yaml

import retrievers
import rewards
from rec_r1 import cli, config, tasks
from rec_r1.cli import options
from rec_r1.config import described
from retrievers import registry


@dataclasses.dataclass
class Below:
    depth: int = 3  # How deep. None is no depth.


@dataclasses.dataclass
class Base:
    first: int = 1  # Of the base.


@dataclasses.dataclass
class Example(Base):
    """An example."""

    # Two lines above
    # the field.
    second: str | None = None
    third: list[str] = dataclasses.field(  # Beside the first line.
        default_factory=lambda: ["a", "b"]
    )
    without: bool = True
    for_linters: float = 0.1  # type: ignore
    below: Below = dataclasses.field(default_factory=Below)


def test_the_comment_of_a_field_is_its_text():
    assert described.keys(Example, "x.") == [
        ("x.first", "int", "1", "Of the base."),
        ("x.second", "str or null", "null", "Two lines above the field."),
        ("x.third", "list of str", "[a, b]", "Beside the first line."),
        ("x.without", "bool", "true", ""),
        ("x.for_linters", "float", "0.1", ""),
        ("x.below.depth", "int", "3", "How deep. null is no depth."),
    ]


def test_a_class_without_source_has_no_texts():
    made = dataclasses.make_dataclass("Made", [("one", int, 1)])
    assert described.keys(made) == [("one", "int", "1", "")]


def test_defaults_are_written_as_yaml_reads_them():
    for key in described.keys(config.Recipe):
        assert "\n" not in key.default
        yaml.safe_load(key.default)
    assert described.as_yaml(({"kind": "bm25"},)) == "[{kind: bm25}]"


def every_key() -> list[described.Key]:
    found = described.keys(config.Recipe)
    for name in tasks.TASKS:
        found += options.sections(f"task.{name}")[0].keys
    for kind in retrievers.BACKENDS:
        found += options.sections(f"retriever.{kind}")[0].keys
    for name in rewards.REWARDS:
        found += options.sections(f"rewards.{name}")[0].keys
    return found


@pytest.mark.slow
def test_every_key_says_in_a_sentence_what_it_sets():
    found = every_key()
    assert len(found) > 200
    for key in found:
        assert key.text.endswith((".", "`.")) and len(key.text) > 10, key


@pytest.mark.slow
def test_the_parameters_are_those_that_a_backend_takes():
    for kind in retrievers.BACKENDS:
        names = [key.name.removeprefix("retriever.params.") for key in options.sections(f"retriever.{kind}")[0].keys]
        assert names == list(registry.parameters(kind))


@pytest.mark.slow
def test_a_reward_can_be_built_with_each_parameter_that_is_listed():
    for name in rewards.REWARDS:
        (section,) = options.sections(f"rewards.{name}")
        given = {key.name: yaml.safe_load(key.default) for key in section.keys}
        assert "weight" in given and not {"k", "losses_only"} & set(given)
        depth = "@10" if name not in ("rec_r1", "format", "length", "repetition", "stuffing") else ""
        rewards.from_spec({name + depth: given})
        (example,) = [line for line in section.more if "example:" in line]
        rewards.from_spec(yaml.safe_load(example.partition("example: ")[2])["rewards"])


def test_the_options_of_trl_are_those_of_the_class():
    from trl import GRPOConfig

    (section,) = options.sections("grpo")
    shown = {key.name.removeprefix("grpo."): key for key in section.keys}
    fields = {field.name: field for field in dataclasses.fields(GRPOConfig) if field.init}
    assert {"output_dir", "seed", "eval_steps"} & set(shown) == set()
    hidden = set(fields) - set(shown)
    assert hidden and all(name in " ".join(section.more) for name in hidden)
    for name, key in shown.items():
        first = key.text.rstrip(".!?")
        assert first and first[:40] in " ".join(fields[name].metadata["help"].split()), name
    assert shown["logging_steps"].default == "1" and GRPOConfig.__dataclass_fields__["logging_steps"].default != 1
    assert shown["report_to"].default == "[]"
    assert shown["learning_rate"].default == described.as_yaml(GRPOConfig.__dataclass_fields__["learning_rate"].default)


@pytest.mark.parametrize("section", ["lora", "baselines.sft", "baselines.reward_weighted_sft", "baselines.dpo"])
def test_the_other_classes_are_listed_too(section):
    (found,) = options.sections(section)
    assert len(found.keys) > 20 and all(key.name.startswith(f"{section}.") for key in found.keys)
    assert f"{section}.seed" not in {key.name for key in found.keys}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("formt", "'format'"), ("bm25", "'retriever.bm25'"), ("sequential", "'task.sequential'"),
        ("format.title", "'format.titles'"), ("rewards.ndgc", "'rewards.ndcg'"), ("retriever.bm26", "'bm25'"),
        ("task.sequentail", "'sequential'"),
    ],
)  # fmt: skip
def test_an_unknown_section_names_the_nearest(capsys, given, nearest):
    assert cli.main(["options", given]) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_one_line_for_each_key(capsys):
    assert cli.main(["options", "format"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("format: ")
    assert [line.split()[0] for line in lines] == [f"format.{f.name}" for f in dataclasses.fields(config.FormatConfig)]
    assert cli.main(["options", "format.titles"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:4] == ["format.titles", "int", "=", "10"] and "**" not in line
    assert cli.main(["options"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {key.name} " in printed for key in described.keys(config.Recipe))


def test_parameters_of_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_backend.py").write_text(
        '"""Ranks nothing."""\n\ndef build(catalog, folder=None, depth: int = 3, *, name: str):\n    ...\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    (section,) = options.sections("retriever.my_backend")
    assert section.title == "retriever.kind=my_backend: Ranks nothing."
    assert section.keys == [
        ("retriever.params.depth", "int", "3", ""),
        ("retriever.params.name", "str", "", ""),
    ]


# ---- The other verbs at the start


def test_the_help_lists_every_verb_once_and_in_groups(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    (verbs,) = [action for action in cli.parser()._actions if action.dest == "==SUPPRESS=="]
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()]
    assert listed == list(verbs.choices)
    assert [line for line in text.splitlines() if line.endswith(":")] == [f"{group.TITLE}:" for group in cli.GROUPS]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("rec-r1 ")


@pytest.mark.slow
@pytest.mark.parametrize("name", config.shipped())
def test_a_copied_recipe_is_the_recipe(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "--copy", name, "mine.yaml"]) == 0
    assert capsys.readouterr().out == "mine.yaml\n"
    assert config.load(tmp_path / "mine.yaml") == config.load(name)


def test_a_copy_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    class Full(type(tmp_path)):
        def read_text(self, *args, **options):  # The system names no file where a write fails.
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(config, "find", Full)
    assert cli.main(["recipes", "--copy", "quickstart", str(tmp_path / "mine.yaml")]) == 2
    assert f"{tmp_path}/mine.yaml: No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["check", "train", "ask", "baseline"])
def test_what_may_be_left_out_is_not_called_required(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb])
    assert "required: " in (said := capsys.readouterr().err)
    assert "key=value" not in said.rpartition("required: ")[2] and "QUERY" not in said.rpartition("required: ")[2]


def test_a_copy_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "--copy", "cpu/sequential"]) == 0
    copied = (tmp_path / "sequential.yaml").read_text()
    (tmp_path / "sequential.yaml").write_text(copied + "# mine\n")
    assert cli.main(["recipes", "--copy", "cpu/sequential"]) == 2
    assert (tmp_path / "sequential.yaml").read_text() == copied + "# mine\n"
    assert "it exists and is not overwritten" in capsys.readouterr().err
    for words, said in [
        (["--copy", "quikstart"], "did you mean 'quickstart'?"),
        (["mine.yaml"], "--copy quickstart mine.yaml"),
        (["--copy", "quickstart", "mine.txt"], "name it mine.yaml"),
    ]:
        assert cli.main(["recipes", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_base_beside_a_recipe_comes_first(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "paper.yaml").write_text("seed: 7\n")
    (tmp_path / "mine.yaml").write_text("base: base/paper.yaml\noutput_dir: runs/mine\n")
    assert config.load(tmp_path / "mine.yaml").seed == 7
    (tmp_path / "mine.yaml").write_text("base: base/papr.yaml\noutput_dir: runs/mine\n")
    with pytest.raises(config.UserError, match=r"base: 'base/papr\.yaml': no such file"):
        config.load(tmp_path / "mine.yaml")


COMPLETE = """
source {script}
complete -p rec-r1 >/dev/null || exit 3
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
$(complete -p rec-r1 | sed 's/.*-F \\([^ ]*\\).*/\\1/') rec-r1
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_recipes_sections_and_keys(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    for words, expected in [
        ("rec-r1 che", {"check"}),
        ("rec-r1 check quick", {"quickstart"}),
        ("rec-r1 check quickstart format.title", {"format.titles=", "format.title_words="}),
        ("rec-r1 options rewards.ha", {"rewards.harm"}),
        ("rec-r1 train quickstart --res", {"--resume"}),
    ]:
        command = COMPLETE.format(script=script, words=words)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected, words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    assert "similarity-gap" in capsys.readouterr().out


@pytest.mark.slow
def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "rec_r1.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rec-r1 ")
