import pickle

import pytest

from retrievers import Catalog, RetrieverError

RECORDS = [
    {"id": "a", "text": "party popper", "title": "🎉", "brand": "x"},
    {"id": "b", "text": "sad face"},
    {"id": "c", "text": ""},
]


def test_columns_titles_and_fields():
    catalog = Catalog.from_records(RECORDS)
    assert len(catalog) == 3
    assert list(catalog.ids) == ["a", "b", "c"] and list(catalog.texts) == ["party popper", "sad face", ""]
    assert list(catalog.titles) == ["🎉", "sad face", ""]
    assert set(catalog.fields) == {"id", "text", "title", "brand"}


def test_rows_and_unknown_ids():
    catalog = Catalog.from_records(RECORDS)
    assert catalog.rows(["c", "a", "c"]).tolist() == [2, 0, 2]
    assert str(catalog.rows(["a"]).dtype) == "int32"
    with pytest.raises(KeyError, match="4 of 5 ids are not in the catalogue, first: 'p', 'q', 'r'"):
        catalog.rows(["p", "q", "a", "r", "s"])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "empty"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "'a' stands twice"),
        ([{"id": "a"}], "document 0 has no 'id' or no 'text'"),
    ],
)
def test_bad_records(records, message):
    with pytest.raises(ValueError, match=message):
        Catalog.from_records(records)


def test_save_load_pickle(tmp_path):
    catalog = Catalog.from_records(RECORDS)
    saved = catalog.save(tmp_path / "catalog")
    for other in (saved, Catalog.load(tmp_path / "catalog"), pickle.loads(pickle.dumps(saved))):
        assert other.fingerprint == catalog.fingerprint
        assert list(other.titles) == list(catalog.titles)
        assert other.folder == tmp_path / "catalog"
    assert list(pickle.loads(pickle.dumps(catalog)).ids) == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["catalog"]  # no temporary folder stays


def test_a_broken_folder(tmp_path):
    Catalog.from_records(RECORDS).save(tmp_path / "catalog")
    (tmp_path / "catalog" / "catalog.json").unlink()
    for folder in (tmp_path / "catalog", tmp_path / "nowhere"):
        with pytest.raises(RetrieverError, match="delete the folder"):
            Catalog.load(folder)


def test_fingerprint_follows_ids_texts_and_order():
    def of(*pairs: tuple[str, str]) -> str:
        return Catalog.from_records({"id": i, "text": t} for i, t in pairs).fingerprint

    assert of(("a", "x"), ("b", "y")) == of(("a", "x"), ("b", "y"))
    different = [
        of(("a", "x"), ("b", "y")),
        of(("b", "y"), ("a", "x")),
        of(("ab", "c")),
        of(("a", "bc")),
        of(("a", "x")),
    ]
    assert len(set(different)) == 5
