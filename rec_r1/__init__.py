"""Rec-R1 Toolkit: fine-tune a language model by GRPO on the metric of a frozen retriever's ranking.

The packages `rewards` and `retrievers` beside this one have plain names, so another package of the same name
can stand before them on the path. Training against somebody else's `rewards` would be a silent disaster:
importing `rec_r1` checks where the two come from and refuses.
"""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


def _refuse_shadows(root: Path) -> None:
    """Raise ImportError, naming the intruder, unless `rewards` and `retrievers` lie in ``root``."""
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
