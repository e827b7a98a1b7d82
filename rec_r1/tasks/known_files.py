"""Which task and layout the files of a folder belong to, for the message where another one was named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# Patterns of files that all have to be in a folder -> the settings that read them; the first that fits is taken.
KNOWN = (
    (("corpus.jsonl*", "queries.jsonl*", "qrels/*.tsv*"), "task.name=beir"),
    (("corpus*", "topics*", "qrels*"), "task.name=trec"),
    (("shopping_queries_dataset_*.parquet",), "task.name=esci"),
    (("sampled_item_metadata_1M.jsonl*",), "task.name=amazon_c4"),
    (("*.inter*",), "task.name=sequential task.params.layout=recbole"),
    (("u.data*",), "task.name=sequential task.params.layout=ml-100k"),
    (("ratings.dat*",), "task.name=sequential task.params.layout=ml-1m"),
    (("ratings.csv*", "movies.csv*"), "task.name=sequential task.params.layout=ml-latest"),
    (("meta_*.jsonl*",), "task.name=sequential task.params.layout=amazon2023 task.params.category=CATEGORY"),
    (("raw/meta_categories/meta_*.jsonl*",), "task.name=sequential task.params.layout=amazon2023 "
     "task.params.category=CATEGORY"),
    (("sessions.jsonl*",), "task.name=sequential task.params.layout=sessions"),
    (("interactions.*", "items.*"), "task.name=sequential"),
)  # fmt: skip


def hint(folder: Path, wanted: Sequence[str] = ()) -> str:
    """What to set for the files of ``folder``, as the end of a message; "" where nothing is known about them.

    folder: the folder that a recipe names. Its subfolders are looked at, too, if its own files fit nothing.
    wanted: the patterns of the files that were looked for. What has one of them is what the user named already, so
        it is no hint.
    """
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for patterns, settings in KNOWN:
            own = {pattern.rstrip("*") for pattern in patterns} & {pattern.rstrip("*") for pattern in wanted}
            if not own and all(any(place.glob(pattern)) for pattern in patterns):
                path = "" if place == folder else f"task.path={place} "
                return f", which fits {path}{settings}"
    return ""
