"""Small files in the formats that public datasets have, for tests of loaders and recipes."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rec_r1.tasks import emoji

GENRES = ("Drama", "Comedy", "Action", "Romance", "Sci-Fi")


def write_lines(path: Path, lines, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(encoding)))
    else:
        path.write_text(text, encoding=encoding)
    return path


def write_jsonl(path: Path, records) -> Path:
    return write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def interactions(users: int = 12, items: int = 30, each: int = 6) -> list[tuple[str, str, int]]:
    """(user, item, time): user u chooses items u, u+2, … one after the other; nobody twice; times interleave."""
    return [(f"u{u}", f"i{(u + 2 * n) % items}", 1_000 * n + u) for u in range(users) for n in range(each)]


def plain_folder(folder: Path) -> Path:
    """The generic layout: items.jsonl and interactions.csv."""
    write_jsonl(folder / "items.jsonl", ({"id": f"i{n}", "title": f"title {n} {GENRES[n % 5]}"} for n in range(30)))
    write_lines(folder / "interactions.csv", ["user,item,timestamp", *(f"{u},{i},{t}" for u, i, t in interactions())])
    return folder


def sessions_folder(folder: Path) -> Path:
    """user, history, next; gzipped, as in shared/data/amazon_office."""
    write_jsonl(folder / "items.jsonl.gz", ({"id": str(n), "title": f"thing {n}", "brand": "b"} for n in range(30)))
    lines = [
        {"user": f"A{u}", "history": [str(u % 30), str((u + 3) % 30)], "next": str((u + 7 * k + 5) % 30)}
        for u in range(40)
        for k in range(2)
    ]
    write_jsonl(folder / "interactions.jsonl.gz", lines)
    return folder


def amazon_2023(folder: Path, category: str = "All_Beauty") -> Path:
    """benchmark/5core/rating_only and raw/meta_categories, as on the hub."""
    rows = [f"{u},B{i},5.0,{1_500_000_000_000 + t}" for u, i, t in interactions()]
    write_lines(folder / f"benchmark/5core/rating_only/{category}.csv", ["user_id,parent_asin,rating,timestamp", *rows])
    meta = (
        {
            "main_category": category.replace("_", " "),
            "title": f"Serum {n} &amp; cream" if n else "",
            "average_rating": 4.8,
            "features": ["<b>vegan</b>", "30 ml"],
            "description": [],
            "store": None,
            "details": {"Brand": "Acme"},
            "parent_asin": f"Bi{n}",
        }
        for n in range(30)
    )
    write_jsonl(folder / f"raw/meta_categories/meta_{category}.jsonl", meta)
    return folder


def movielens(folder: Path, layout: str) -> Path:
    """ml-100k, ml-1m, ml-latest or recbole, each with its separators, headers and encoding."""
    rows = [(u[1:], i[1:], 3, t) for u, i, t in interactions()]
    titles = [f"Amélie {n}, The (19{n + 60})" for n in range(30)]
    genre = [GENRES[n % 5] for n in range(30)]
    if layout == "ml-100k":
        write_lines(folder / "u.data", ("\t".join(map(str, row)) for row in rows))
        flags = "|".join("0" * 19)
        write_lines(folder / "u.item", (f"{n}|{t}|01-Jan-1995||url|{flags}" for n, t in enumerate(titles)), "latin-1")
    elif layout == "ml-1m":
        write_lines(folder / "ratings.dat", ("::".join(map(str, row)) for row in rows))
        write_lines(folder / "movies.dat", (f"{n}::{t}::{genre[n]}" for n, t in enumerate(titles)), "latin-1")
    elif layout == "ml-latest":
        write_lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *(",".join(map(str, r)) for r in rows)])
        write_lines(
            folder / "movies.csv", ["movieId,title,genres", *(f'{n},"{t}",{genre[n]}' for n, t in enumerate(titles))]
        )
    else:
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        write_lines(folder / "ml-100k.inter", [header, *("\t".join(map(str, row)) for row in rows)])
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        write_lines(folder / "ml-100k.item", [header, *(f"{n}\t{t}\t1995\t{genre[n]}" for n, t in enumerate(titles))])
    return folder


@contextmanager
def few_emoji(folder: Path) -> Iterator[None]:
    """Give the task of the quickstart every sixth of its queries, and the documents that are relevant to one of these.

    The block has 56 train, 21 validation and 31 test queries, and 377 documents: checks, encoders and evaluations do
    the same as with all of them, and take a fifth of the time.
    """
    data = json.loads(gzip.decompress(emoji.DATA.read_bytes()))
    kept = data["queries"][::6]
    rows = sorted({row for *_, relevant in kept for row in relevant})
    place = {row: new for new, row in enumerate(rows)}
    data["items"] = [data["items"][row] for row in rows]
    data["queries"] = [(text, split, [place[row] for row in relevant]) for text, split, relevant in kept]
    path = write_lines(folder / emoji.DATA.name, [json.dumps(data)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "DATA", path)
        yield
