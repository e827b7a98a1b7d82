"""Rebuild the bundled emoji-search data from the Unicode CLDR English annotations.

    npm pack cldr-annotations-full@48.2.0 && tar xzf cldr-annotations-full-48.2.0.tgz
    python -m rec_r1.tasks.build_emoji package/annotations/en/annotations.json

The file is written beside this module. It has the same bytes on every machine, because all random choices (which
keywords become queries, and the split of each query) are hashes of the keywords.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

SOURCE = "Unicode CLDR 48.2.0, annotations/en (npm cldr-annotations-full), Unicode-3.0"
OUTPUT = Path(__file__).parent / "data" / "emoji_search.json.gz"
FIRST_SYMBOL = 0x2190  # Smaller code points are punctuation, digits and currency signs, which are left out.
MIN_ITEMS, MAX_ITEMS = 2, 25  # A keyword of so many items may become a query.
QUERY_SHARE = 0.4  # The share of these keywords that become queries, and are removed from the documents.
TRAIN, VALIDATION = 0.5, 0.15  # The shares of the queries. The rest is the test split.
# Of the four salts that were tried, this one makes the scores of raw BM25 in the three splits most alike
# (0.387 / 0.386 / 0.389). It was chosen before any model was run.
SPLIT_SALT = "split-2:"


def unit(text: str, salt: str) -> float:
    """Map ``text`` to a fixed number in [0, 1): the first 8 bytes of sha256(salt + text)."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big") / 2**64


def stem(keyword: str) -> str:
    """The stems of the words of a keyword. Keywords with the same stems have nearly the same targets."""
    import Stemmer

    return " ".join(Stemmer.Stemmer("english").stemWords(keyword.lower().split()))


def build(annotations: dict[str, dict[str, list[str]]]) -> dict:
    """Make documents and queries from CLDR annotations.

    A keyword of 2 to 25 symbols becomes a query with probability 0.4. The targets of the query are these symbols. A
    document has its symbol's name, and the keywords that did not become queries. The split of a query depends on the
    stem of its keyword, so that "dance" and "dancing" are in the same split.

    annotations: {symbol: {"tts": [name], "default": [keyword, …]}}.

    Returns the content of OUTPUT: its source, a list [symbol, name, keywords] for each document, and a list [keyword,
    split, rows of the targets] for each query.
    """
    symbols = {s: a for s, a in annotations.items() if ord(s[0]) >= FIRST_SYMBOL and "tts" in a}
    carriers = Counter(k for a in symbols.values() for k in a.get("default", []))

    held_out = {k for k, n in carriers.items() if MIN_ITEMS <= n <= MAX_ITEMS and unit(k, "hold-out:") < QUERY_SHARE}
    items: list[list[Any]] = []
    relevant: dict[str, list[int]] = {k: [] for k in held_out}
    for row, (symbol, annotation) in enumerate(symbols.items()):
        keywords = annotation.get("default", [])
        items.append([symbol, annotation["tts"][0], [k for k in keywords if k not in held_out]])
        for keyword in held_out.intersection(keywords):
            relevant[keyword].append(row)
    queries = []
    for keyword in sorted(held_out):
        u = unit(stem(keyword), SPLIT_SALT)
        split = "train" if u < TRAIN else "validation" if u < TRAIN + VALIDATION else "test"
        queries.append([keyword, split, relevant[keyword]])
    return {"source": SOURCE, "items": items, "queries": queries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("annotations", type=Path, help="annotations/en/annotations.json of cldr-annotations-full")
    annotations = json.loads(parser.parse_args().annotations.read_text(encoding="utf-8"))
    data = build(annotations["annotations"]["annotations"])
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # A time or a file name in the header would make the bytes differ between runs.
    OUTPUT.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts = dict(Counter(split for _, split, _ in data["queries"]))
    logging.getLogger(__name__).info(
        "%s: %d items, %d queries %s, %d bytes",
        OUTPUT,
        len(data["items"]),
        len(data["queries"]),
        counts,
        OUTPUT.stat().st_size,
    )


if __name__ == "__main__":
    main()
