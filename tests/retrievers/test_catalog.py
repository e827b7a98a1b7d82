import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    with pytest.raises(KeyError, match=r"4 of 5 ids are not in the catalogue, first: 'p', 'q', 'r'$"):
        catalog.rows(["p", "q", "a", "r", "s"])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "empty"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "'a' occurs twice"),
        ([{"id": "a"}], "document 0 has no 'id' or no 'text'"),
        ([{"id": "a", "text": "x"}, {"text": "y", "title": "z"}], r"document 1 has no 'id' .* \['text', 'title'\]"),
        ([{"id": 1, "text": "x"}, {"id": "1", "text": "y"}], "'1' occurs twice"),
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
    assert [path.name for path in tmp_path.iterdir()] == ["catalog"]  # No temporary folder remains.


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


PAIRS = st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=1, max_size=4, unique_by=lambda p: p[0])


def of_pairs(pairs) -> Catalog:
    return Catalog.from_records({"id": i, "text": t} for i, t in pairs)


@given(PAIRS, PAIRS)
def test_fingerprints_are_equal_exactly_where_the_documents_are(one, other):
    assert of_pairs(one).fingerprint == of_pairs(list(one)).fingerprint
    assert (of_pairs(one).fingerprint == of_pairs(other).fingerprint) == (one == other)
    if len(one) > 1:
        assert of_pairs(one[::-1]).fingerprint != of_pairs(one).fingerprint


@given(PAIRS)
def test_rows_are_the_positions(pairs):
    catalog = of_pairs(pairs)
    assert catalog.rows(catalog.ids).tolist() == list(range(len(pairs)))
    assert catalog.rows([i for i, _ in pairs[::-1]]).tolist() == list(range(len(pairs)))[::-1]
    assert [(catalog.ids[row], catalog.texts[row]) for row in range(len(catalog))] == pairs


def test_rows_of_nothing_and_of_numbers():
    catalog = Catalog.from_records({"id": i, "text": "x"} for i in (7, 8))
    assert catalog.rows([8, "7"]).tolist() == [1, 0]
    assert 8 in catalog and "7" in catalog and 9 not in catalog
    none = catalog.rows([])
    assert none.shape == (0,) and none.dtype == np.int32


def test_every_field_survives_saving(tmp_path):
    catalog = Catalog.from_records(RECORDS)
    loaded = Catalog.load(str(catalog.save(str(tmp_path / "deep" / "catalog")).folder))
    assert loaded.fields == catalog.fields and len(loaded) == len(catalog)
    for field in catalog.fields:
        assert list(loaded._table[field]) == list(catalog._table[field])
    assert list(loaded._table["brand"]) == ["x", "", ""]
    assert loaded.rows(["c", "a"]).tolist() == [2, 0]


@pytest.mark.parametrize("damage", ["no json", "half json", "a list", "no fingerprint", "no table", "a file"])
def test_a_damaged_catalogue_is_refused_by_name(tmp_path, damage):
    folder = Catalog.from_records(RECORDS).save(tmp_path / "catalog").folder
    meta = folder / "catalog.json"
    if damage == "no json":
        meta.unlink()
    elif damage == "half json":
        meta.write_text(meta.read_text()[:-5])
    elif damage == "a list":
        meta.write_text("[1]")
    elif damage == "no fingerprint":
        meta.write_text(json.dumps({"documents": 3}))
    elif damage == "no table":
        shutil.rmtree(folder / "table")
    else:
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    for start in (lambda: Catalog.load(folder), lambda: Catalog.from_records(RECORDS).save(folder)):
        with pytest.raises(RetrieverError) as error:
            start()
        message = str(error.value)
        assert message.startswith(f"catalogue {folder} does not open (") and "delete the folder" in message


def test_saving_over_other_titles_never_returns_the_old_ones(tmp_path):
    Catalog.from_records([{"id": "a", "text": "x", "title": "old"}]).save(tmp_path / "catalog")
    try:
        saved = Catalog.from_records([{"id": "a", "text": "x", "title": "new"}]).save(tmp_path / "catalog")
    except RetrieverError:
        return  # A refusal is correct, too.
    assert list(saved.titles) == ["new"]


@pytest.mark.parametrize("field", ["title", "brand"])
def test_half_a_character_in_another_field_is_refused_by_name_too(field):
    try:
        Catalog.from_records([{"id": "d7", "text": "x", field: "smile \ud83d"}])
    except UnicodeEncodeError:
        raise  # It is a ValueError, too, but it does not name the document.
    except ValueError as error:
        assert "document 'd7' holds half a character" in str(error)
    else:
        pytest.fail("accepted")


def test_an_unpickled_catalogue_is_the_one_that_was_pickled(tmp_path):
    pickled = pickle.dumps(Catalog.from_records(RECORDS).save(tmp_path / "catalog"))
    shutil.rmtree(tmp_path / "catalog")
    Catalog.from_records(RECORDS[::-1]).save(tmp_path / "catalog")
    with pytest.raises(RetrieverError):
        pickle.loads(pickled)
