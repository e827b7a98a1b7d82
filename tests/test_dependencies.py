"""What pyproject.toml promises about other packages, and what a built wheel holds."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from oldest import bounds
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, up to the first part that is none: "2.13.0+cpu" -> (2, 13, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def test_every_dependency_is_bounded_on_both_sides():
    found = bounds()
    assert {"torch", "transformers", "trl", "peft", "numpy", "pyserini", "pytest"} <= found.keys()
    for name, (lowest, beyond) in found.items():
        assert release(lowest) < release(beyond), name


def test_this_run_is_within_the_bounds():
    checked = 0
    for name, (lowest, beyond) in bounds().items():
        try:
            installed = release(version(name))
        except PackageNotFoundError:  # an extra that is not here
            continue
        assert release(lowest) <= installed < release(beyond), f"{name} {installed}"
        checked += 1
    assert checked > 20


def test_every_package_is_listed():
    """setuptools finds none by itself here, so that a package that is not listed is missing in the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    for top in ("rec_r1", "rewards", "retrievers"):
        for init in (ROOT / top).rglob("__init__.py"):
            assert ".".join(init.parent.relative_to(ROOT).parts) in listed


# Several commands and a policy that is asked, in one process, because importing TRL takes longer than each of them.
# A line that begins with RESULT holds, as JSON, what each has printed: libraries print, too. What there is after a
# command is left out of garbage collections, as in conftest.py: a training searches all modules five times.
IN_ONE_PROCESS = """
import contextlib, gc, io, json, sys
gc.disable()
import rec_r1, retrievers, rewards
from rec_r1 import Policy, cli
print("RESULT", json.dumps([module.__file__ for module in (rec_r1, retrievers, rewards)]))
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(words) == 0, words
    gc.freeze()
    print("RESULT", json.dumps(printed.getvalue()))
print("RESULT", len(Policy.load("runs/quickstart").search(["cat"], k=3)[0].hits))
"""


def build_wheel(folder: Path) -> Path:
    """The wheel, built in a process that imports the standard library and `build-system.requires`, and nothing else.

    That is the environment of `pip wheel`, made of links to what is installed here: pip would download it.
    """
    packages = folder / "build_packages"
    packages.mkdir()
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]:
        requirement = Requirement(line)
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version), f"{found.version} is installed: {requirement}"
        for name in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            (packages / name).symlink_to(found.locate_file(name))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": str(packages)}
    command = [sys.executable, "-S", "-c", build, str(folder)]  # -S leaves the packages of this environment out.
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(tmp_path, beir_folder, tiny_model):
    """Not the editable installation: what a package index would hand out, with its recipes, templates and data."""
    wheel = build_wheel(tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        ran = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert "cpu/sequential" in run("-m", "rec_r1.cli", "recipes")
    policy = [f"model.name={tiny_model}", "lora={target_modules: [q_proj, v_proj]}"]  # quicker than the bundled one
    few = ["grpo.max_steps=2", "grpo.save_steps=2", "prompts_per_step=2", "grpo.num_generations=2"]
    short = ["grpo.max_completion_length=4", "evaluation.every_steps=0", "evaluation.validation_limit=4"]
    commands = [
        ["check", "quickstart"],
        ["options", "task.catalog"],
        ["init", str(beir_folder), "--dry-run", "--no-gpu"],
        ["train", "quickstart", *policy, *few, *short, "evaluation.test_limit=4"],
    ]
    lines = run("-c", IN_ONE_PROCESS, json.dumps(commands)).splitlines()
    results = (json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT "))
    where, check, options, init, _, asked = results
    assert all(Path(file).is_relative_to(site) for file in where)
    assert "1,854 documents" in check
    assert "task.params.limits" in options  # The comments of the sources are its texts.
    assert "task.name=beir" in init
    assert asked == 3
