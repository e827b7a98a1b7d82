"""Recognise the task and layout of a folder's files, for the message about a recipe that names another one."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

_AMAZON = "task.name=sequential task.params.layout=amazon2023 task.params.category=CATEGORY"


class Known(NamedTuple):
    """Data with known file names.

    files: patterns of files that all have to be there.
    others: patterns of further files of the same data.
    settings: the settings that read them.
    """

    files: tuple[str, ...]
    others: tuple[str, ...]
    settings: str


KNOWN = (
    Known(("corpus.jsonl*", "queries.jsonl*", "qrels/*.tsv*"), (), "task.name=beir"),
    Known(("corpus*", "topics*", "qrels*"), (), "task.name=trec"),
    Known(("shopping_queries_dataset_*.parquet",), (), "task.name=esci"),
    Known(("sampled_item_metadata_1M.jsonl*",), ("test.csv*",), "task.name=amazon_c4"),
    Known(("*.inter*",), ("*.item*",), "task.name=sequential task.params.layout=recbole"),
    Known(("u.data*",), ("u.item*",), "task.name=sequential task.params.layout=ml-100k"),
    Known(("ratings.dat*",), ("movies.dat*",), "task.name=sequential task.params.layout=ml-1m"),
    Known(("ratings.csv*", "movies.csv*"), (), "task.name=sequential task.params.layout=ml-latest"),
    Known(("meta_*.jsonl*",), ("*rating_only/*.csv*", "raw/*.jsonl*"), _AMAZON),
    Known(("raw/meta_categories/meta_*.jsonl*",), ("*rating_only/*.csv*", "raw/*.jsonl*"), _AMAZON),
    Known(("ubi_events*",), ("ubi_queries*", "items*"), "task.name=catalog task.params.layout=ubi"),
    Known(("products.*", "clicks.*"), (), "task.name=catalog"),
    Known(("items.*", "judgments.*"), (), "task.name=catalog"),
    Known(("sessions.jsonl*",), ("items.*",), "task.name=sequential task.params.layout=sessions"),
    Known(("interactions.*", "items.*"), (), "task.name=sequential task.params.layout=interactions"),
)


def hint(folder: Path, wanted: Sequence[str] = ()) -> str:
    """The settings that read the files of a folder, as a piece of a message; "" where the files are not known.

    folder: the folder that a recipe names. Its subfolders are looked at, too, if its own files are not known.
    wanted: the names or patterns of the files that were looked for. Layouts that have such files are not suggested.
    """
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for known in KNOWN:
            named = any(fnmatch(one, pattern) for one in wanted for pattern in (*known.files, *known.others))
            if not named and all(any(place.glob(pattern)) for pattern in known.files):
                path = "" if place == folder else f"task.path={place} "
                return f", which fits {path}{known.settings}"
    return ""
