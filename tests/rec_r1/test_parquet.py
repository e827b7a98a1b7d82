"""Parquet: bytes that are texts are read as texts, at any depth, and other bytes are left out."""

import pyarrow as pa
import pyarrow.parquet as pq

from rec_r1.tasks import parquet


def test_bytes_are_texts(tmp_path, caplog):
    texts = [b"shoe", "caf\u00e9".encode(), None]
    columns = {
        "binary": pa.array(texts, pa.binary()),
        "large": pa.array(texts, pa.large_binary()),
        "dictionary": pa.array(texts, pa.binary()).dictionary_encode(),
        "list": pa.array([texts, [], None], pa.list_(pa.binary())),
        "struct": pa.array([{"name": text, "number": 1} for text in texts]),
        "fixed": pa.array([b"ab12", b"cd34", None], pa.binary(4)),
        "text": pa.array(["shoe", "caf\u00e9", None]),
        "number": pa.array([1, 2, 3]),
        "picture": pa.array([b"text", b"\x89PNG", None], pa.binary()),
    }
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    rows = [row for row, _ in parquet.records(tmp_path / "table.parquet", (), ())]
    wanted = ["shoe", "caf\u00e9", None]
    for name in ("binary", "large", "dictionary", "text"):
        assert [row[name] for row in rows] == wanted, name
    assert [row["struct"]["name"] for row in rows] == wanted
    assert [row["list"] for row in rows] == [wanted, [], None]
    assert [row["fixed"] for row in rows] == ["ab12", "cd34", None]
    assert [row["number"] for row in rows] == [1, 2, 3] and not any("picture" in row for row in rows)
    assert "column 'picture' holds bytes that are no text in UTF-8, and is not read" in caplog.text
