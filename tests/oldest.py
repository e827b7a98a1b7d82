"""The lowest releases that pyproject.toml admits, as constraints for pip: `numpy>=2.2,<2.5` becomes `numpy==2.2.*`."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+),<([0-9.]+)(?:;.*)?$")


def bounds() -> dict[str, tuple[str, str]]:
    """Package -> lower and upper bound, of all dependencies and extras. Raises ValueError for one without both."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found: dict[str, tuple[str, str]] = {}
    for requirement in [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]:
        if requirement.startswith("rec-r1["):
            continue
        match = _REQUIREMENT.match(requirement.replace(" ", ""))
        if match is None:
            raise ValueError(f"{requirement}: write NAME>=LOWEST,<HIGHEST, both as the tests were run")
        given = match[2], match[3]
        if found.setdefault(match[1], given) != given:
            raise ValueError(f"{match[1]} has two pairs of bounds, {found[match[1]]} and {given}: give it one")
    return found


if __name__ == "__main__":
    print(*(f"{name}=={lowest}.*" for name, (lowest, _) in bounds().items()), sep="\n")
