"""The id table against a few lines of Python that do the same slowly."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers.recommenders.id_table import SHARED_ROW, IdTable


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.integers(-3, 12), max_size=8), max_size=25), st.integers(1, 3))
def test_no_two_ids_share_a_row_and_an_id_is_admitted_once_seen_often_enough(batches, admit_after):
    table, seen = IdTable(3, admit_after), Counter()
    for ids in batches:
        rows = table.see(np.array(ids, np.int64))
        seen.update(ids)
        own = {key: int(table.find(np.array([key]))[0]) for key, count in seen.items() if count >= admit_after}
        assert sorted(own.values()) == list(range(1, len(own) + 1)) and len(table) == len(own)
        assert rows.tolist() == [own.get(key, SHARED_ROW) for key in ids]
        assert table.find(np.array([99])).tolist() == [SHARED_ROW]


@pytest.mark.parametrize(("bits", "ids"), [(8, 100), (10, 2000), (14, 5000), (17, 20_000)])
def test_collisions_of_hashing_follow_the_birthday_formula(bits, ids):
    m = 2**bits
    expected = ids - m * (1 - (1 - 1 / m) ** ids)
    # variance of the number of empty rows
    variance = m * (m - 1) * (1 - 2 / m) ** ids + m * (1 - 1 / m) ** ids - m**2 * (1 - 1 / m) ** (2 * ids)
    for seed in range(5):
        table = IdTable(1, hash_bits=bits, seed=seed)
        rows = table.see(np.arange(ids))
        assert abs(ids - len(np.unique(rows)) - expected) <= 4 * np.sqrt(variance) + 1
    assert len(table.weights) == m and rows.max() < m


def test_seeds_hash_differently_and_one_seed_alike():
    ids = np.arange(200)
    rows = [IdTable(1, hash_bits=12, seed=seed).find(ids) for seed in (0, 0, 1, -1)]
    assert (rows[0] == rows[1]).all() and (rows[0] != rows[2]).mean() > 0.9 and (rows[2] != rows[3]).mean() > 0.9


def test_adam_is_torch_s_where_every_row_gets_a_gradient():
    import torch

    rng = np.random.default_rng(0)
    table = IdTable(5)
    rows = table.see(np.arange(6))
    weights = torch.nn.Parameter(torch.from_numpy(table.weights[rows].copy()))
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(20):
        gradient = rng.normal(size=(6, 5)).astype(np.float32)
        weights.grad = torch.from_numpy(gradient)
        optimizer.step()
        halves = np.concatenate([gradient / 2, gradient / 2])  # repeated rows add up
        table.update(np.concatenate([rows, rows]), halves, 0.05)
    assert np.allclose(table.weights[rows], weights.detach().numpy(), atol=1e-5)


def test_a_fresh_embedding_is_even_and_does_not_depend_on_batches():
    one, many = IdTable(4, scale=0.5), IdTable(4, scale=0.5)
    one.see(np.arange(3000))
    for part in np.split(np.arange(3000), 30):
        many.see(part)
    drawn = one.weights[1:3001]
    assert (drawn == many.weights[1:3001]).all()
    assert abs(drawn.std() - 0.5) < 0.01 and abs(drawn.mean()) < 0.02
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.1


@pytest.mark.parametrize("settings_", [{}, {"admit_after": 2}, {"hash_bits": 4}])
def test_saved_and_loaded_it_continues_in_the_same_way(tmp_path, settings_):
    def go(table, steps, rng):
        for _ in range(steps):
            rows = table.see(rng.integers(0, 40, 12))
            table.update(rows, rng.normal(size=(12, 3)).astype(np.float32), 0.1)

    whole, half = IdTable(3, **settings_), IdTable(3, **settings_)
    go(whole, 20, np.random.default_rng(2))
    go(whole, 20, np.random.default_rng(3))
    go(half, 20, np.random.default_rng(2))
    np.savez(tmp_path / "table.npz", **half.state())
    loaded = IdTable(3, **settings_)
    with np.load(tmp_path / "table.npz", allow_pickle=False) as state:
        loaded.load_state(state)
    go(loaded, 20, np.random.default_rng(3))
    ours, theirs = loaded.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] == theirs[name]).all(), name
    ids = np.random.default_rng(1).integers(0, 60, 30)
    assert (loaded.find(ids) == whole.find(ids)).all()


OLD_STATE = {  # What the version that could also forget ids saved, of ids 5, 9, 9, -4, -4 and one update of row 1.
    "dim": 2, "admit_after": 2, "expire_after": -1, "hash_bits": -1, "scale": 0.1, "seed": 3, "ids": [-4, 5, 9],
    "clock": [0, 0, 2, 3, 0], "taken": [True, True, True], "free_slots": [], "free_rows": [],
    "weights": [[0.08269121497869492, -0.0171414352953434], [-0.22414810955524445, 0.02478037029504776],
                [0.008789025247097015, -0.1483146846294403]],
    "first": [[0.0, 0.0], [0.10000000149011612, -0.20000000298023224], [0.0, 0.0]],
    "second": [[0.0, 0.0], [0.0010000000474974513, 0.004000000189989805], [0.0, 0.0]],
    "updates": [0, 1, 0], "count": [2, 1, 2], "last": [0, 0, 0], "row": [1, 0, 2],
}  # fmt: skip


def test_a_table_that_an_older_version_saved_is_read_and_continues_in_the_same_way():
    single = {"weights", "first", "second"}
    old = {name: np.array(value, np.float32 if name in single else None) for name, value in OLD_STATE.items()}
    table, same = IdTable.saved(old), IdTable(2, admit_after=2, seed=3)
    same.see(np.array([5, 9, 9, -4, -4]))
    same.update(np.array([1]), np.array([[1.0, -2.0]], np.float32), 0.1)
    for one in (table, same):
        assert one.find(np.array([-4, 5, 9, 7])).tolist() == [1, 0, 2, 0]
        assert one.see(np.array([5])).tolist() == [3]  # seen twice now
    for name, value in same.state().items():
        assert (table.state()[name] == value).all(), name


def test_what_does_not_fit_is_refused():
    table = IdTable(2)
    table.see(np.array([1, 2**63 - 1, -(2**63)]))
    assert len(table) == 3
    with pytest.raises(ValueError, match="beyond 64-bit"):
        table.see(np.array([2**63], np.uint64))
    for ids in (np.array([0.5]), np.array([[1]]), np.array([True]), np.array(["a"])):
        with pytest.raises(ValueError, match="ids: "):
            table.find(ids)
    assert table.see(np.array([], np.int64)).shape == (0,) and table.find([]).shape == (0,)
    for bad, message in [
        ({"dim": 0}, ">= 1"),
        ({"admit_after": 0}, ">= 1"),
        ({"hash_bits": 31}, "1 to 30"),
        ({"hash_bits": 4, "admit_after": 2}, "no rows of its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            IdTable(**{"dim": 2} | bad)
    with pytest.raises(ValueError, match="has dim 2, this one 3"):
        IdTable(3).load_state(table.state())
    with pytest.raises(ValueError, match="the saved first have shape"):
        IdTable(2).load_state(table.state() | {"first": np.zeros((1, 2), np.float32)})
    for name, value in (("ids", table.state()["ids"][:-1]), ("row", table.state()["row"] + 100)):
        with pytest.raises(ValueError, match="the saved table has"):
            IdTable(2).load_state(table.state() | {name: value})
