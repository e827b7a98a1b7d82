"""Negatives that a language model wrote: the file that holds them, and which of its texts each pair gets.

The file is JSONL, with one object per pair of a query and a relevant document:

    {"query": "red shoes", "positive": "d1", "negatives": ["red shoe polish, 50 ml"]}

query: the text of a training query, or the raw query of a training history.
positive: the id of a document that is relevant to it.
negatives: texts that look like this document and are not relevant to the query. [] = the model wrote none.

Other keys are ignored. Only rows of the pairs that an encoder is tuned on are used, so a row of a held-out query
teaches nothing. `rec-r1 fit --write` writes such a file, and so may any other program.

Shapes: X pairs, n documents, m negatives per pair, W written texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrievers.text.analysis import words
from retrievers.text.tuning.pairs import Pairs

PARAMETER = "retriever.params.tuned.written_file"
HOW_TO_WRITE = "rec-r1 fit RECIPE --write policy"
Key = tuple[str, str]  # The text of a query, and the id of a document that is relevant to it.


@dataclass(frozen=True)
class Written:
    """The written negatives of X pairs.

    texts: W different texts.
    numbers: (X, m) int64 numbers of texts; -1 = there are no more.
    counts: how many texts are used, and how many are not, by reason; see :func:`of_pairs`.
    """

    texts: Sequence[str]
    numbers: np.ndarray
    counts: Mapping[str, int]


def keys_of(pairs: Pairs, ids: Sequence[str]) -> list[Key]:
    """The key of each of X pairs. ids: the n ids of the catalogue."""
    return [(pairs.texts[q], ids[row]) for q, row in zip(pairs.query.tolist(), pairs.row.tolist(), strict=True)]


def read(path: Path) -> dict[Key, list[str]]:
    """The texts of a file by the pair that they were written for. The texts of several rows of a pair are joined.

    Raises ValueError, which names the line and what to do, for a file that is missing or holds anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise ValueError(f"{PARAMETER}: {path} does not exist: `{HOW_TO_WRITE}` writes it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{PARAMETER}: {path} cannot be read ({error}): name a JSONL file in UTF-8") from error
    found: dict[Key, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            query, positive, negatives = _row(path, number, line)
            found.setdefault((query, positive), []).extend(negatives)
    return found


def _row(path: Path, number: int, line: str) -> tuple[str, str, list[str]]:
    """The query, the positive and the negatives of one line."""
    shape = 'write {"query": TEXT, "positive": ID, "negatives": [TEXT, …]} on each line'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{PARAMETER}: {path}: line {number} is no JSON ({error}): {shape}") from error
    given = row if isinstance(row, dict) else {}
    query, positive, negatives = (given.get(name) for name in ("query", "positive", "negatives"))
    if isinstance(query, str) and isinstance(positive, str) and isinstance(negatives, list):
        texts = [text for text in negatives if isinstance(text, str)]
        if len(texts) == len(negatives):
            return query, positive, texts
    raise ValueError(f"{PARAMETER}: {path}: line {number} has other keys or types: {shape}")


def fingerprint(path: Path) -> str:
    """The sha256 of the texts of a file, in hex, whatever the order of its rows. Raises what :func:`read` raises."""
    rows = sorted((*key, *texts) for key, texts in read(path).items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def of_pairs(
    pairs: Pairs,
    found: Mapping[Key, Sequence[str]],
    ids: Sequence[str],
    documents: Sequence[str],
    count: int,
    seed: int,
) -> Written:
    """The written negatives of each pair. Each pair gets up to m of the usable texts of its key, drawn at random.

    pairs: X pairs.
    found: the texts by the pair that they were written for, see :func:`read`.
    ids, documents: the n ids and texts of the catalogue.
    count: m.
    seed: the seed of the draw.

    A text is not used if it is `empty` (it has no word), equal to the `positive`, equal to another `relevant` document
    of the query or user, or one of the `duplicates` of the texts of its pair. Texts are equal if they have the same
    words. All of these are counted, and so are the different `pairs` of the fit, those `with_text`, the `texts` that
    are used, and the `other_pairs` of the file that the fit does not have.
    """
    keys = keys_of(pairs, ids)
    places: dict[Key, list[int]] = {}
    for x, key in enumerate(keys):
        places.setdefault(key, []).append(x)
    counts = dict.fromkeys(("empty", "positive", "relevant", "duplicates"), 0)
    rng, texts = np.random.default_rng(seed), dict[str, int]()
    numbers, with_text = np.full((len(pairs), count), -1, np.int64), 0
    for key, own in places.items():
        usable = _usable(found.get(key, ()), pairs, own, documents, counts)
        with_text += bool(usable)
        candidates = [texts.setdefault(text, len(texts)) for text in usable]
        for x in own:
            drawn = rng.permutation(candidates)[:count]
            numbers[x, : len(drawn)] = drawn
    known = {"pairs": len(places), "with_text": with_text, "texts": len(texts)}
    return Written(list(texts), numbers, known | counts | {"other_pairs": len(found.keys() - places.keys())})


def _usable(
    texts: Sequence[str], pairs: Pairs, own: Sequence[int], documents: Sequence[str], counts: dict[str, int]
) -> list[str]:
    """The texts of one key that can be negatives. The others are added to ``counts``. own: the pairs with this key."""
    if not texts:
        return []
    positive = words(documents[int(pairs.row[own[0]])])
    rows = np.unique(np.concatenate([pairs.known_of(x) for x in own]))
    relevant = [words(documents[row]) for row in rows.tolist()]
    usable: dict[tuple[str, ...], str] = {}
    for text in texts:
        said = words(text)
        reasons = {
            "empty": not said,
            "positive": said == positive,
            "relevant": said in relevant,
            "duplicates": tuple(said) in usable,
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason is None:
            usable[tuple(said)] = text
        else:
            counts[reason] += 1
    return list(usable.values())
