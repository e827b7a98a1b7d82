"""Rec-R1 Toolkit: fine-tune a language model by GRPO on the metric of a frozen retriever's ranking.

    import rec_r1

    recipe = rec_r1.load_recipe("quickstart", ["output_dir=runs/try", "grpo.max_steps=10"])
    rec_r1.train(recipe)                              # what `rec-r1 train` does
    rec_r1.evaluate("runs/try")                       # what `rec-r1 eval` does: a comparison with intervals
    policy = rec_r1.Policy.load("runs/try")
    policy.search(["lecturer"], k=5)

Importing this package loads neither torch nor an index library: each of these names is imported when it is first used.

The packages `rewards` and `retrievers` beside this one have common names, so Python may find another package of the
same name first. A training would then use the wrong rewards without any message. Importing `rec_r1` therefore checks
where the two packages come from, and raises ImportError if it is the wrong place.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rec_r1.config import UserError
    from rec_r1.config import load as load_recipe
    from rec_r1.environment import open_environment
    from rec_r1.evaluation.evaluate import evaluate
    from rec_r1.policy import Policy
    from rec_r1.train import train

__version__ = "0.1.0"


def _refuse_shadows(root: Path) -> None:
    """Raise ImportError, which names the wrong package, unless `rewards` and `retrievers` are in ``root``."""
    for name in ("rewards", "retrievers"):
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parent != root / name:
            raise ImportError(
                f"rec_r1 needs its own package {name!r} in {root / name}, but Python finds "
                f"{origin or 'none (a folder without __init__.py)'}: rename or uninstall that one, or run from "
                "another folder"
            )


_refuse_shadows(Path(__file__).resolve().parent.parent)

__all__ = ["Policy", "UserError", "__version__", "evaluate", "load_recipe", "open_environment", "train"]
_MODULE_AND_NAME = {
    "Policy": ("rec_r1.policy", "Policy"),
    "UserError": ("rec_r1.config", "UserError"),
    "evaluate": ("rec_r1.evaluation.evaluate", "evaluate"),
    "load_recipe": ("rec_r1.config", "load"),
    "open_environment": ("rec_r1.environment", "open_environment"),
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("rec_r1.train")  # The module itself is callable: see its last lines.
    if name not in _MODULE_AND_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _MODULE_AND_NAME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
