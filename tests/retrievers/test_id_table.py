"""The id table against a dictionary of lists that does the same slowly."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrievers.recommenders.id_table import SHARED_ROW, IdTable


def zipf(rng, events, ids, power=1.1):
    """Power-law ids, spread over all of int64."""
    chance = np.arange(1, ids + 1) ** -power
    names = rng.integers(-(2**62), 2**62, ids)
    return names[rng.choice(ids, events, p=chance / chance.sum())]


def live(table):
    """id -> row of all ids with one of their own."""
    return {key: int(table._row[slot]) for key, slot in table._slots.items() if table._row[slot] != SHARED_ROW}


class Slow:
    """The rules of admission and expiry, one event at a time."""

    def __init__(self, admit_after, expire_after):
        self.admit_after, self.expire_after, self.seen = admit_after, expire_after, {}

    def see(self, ids, step):
        if self.expire_after is not None:
            self.seen = {k: (n, last) for k, (n, last) in self.seen.items() if step - last <= self.expire_after}
        for key in ids:
            self.seen[key] = (self.seen.get(key, (0, 0))[0] + 1, step)

    def admitted(self):
        return {key for key, (count, _) in self.seen.items() if count >= self.admit_after}


streams = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(-3, 12), max_size=8)), max_size=25)


@given(streams, st.integers(1, 3), st.none() | st.integers(1, 6), st.booleans())
def test_no_two_live_ids_share_a_row_and_the_rules_hold(stream, admit_after, expire_after, text):
    table, slow, step = IdTable(3, admit_after, expire_after), Slow(admit_after, expire_after), 0
    for wait, ids in stream:
        step += wait
        keys = [f"id\0{i}" for i in ids] if text else np.array(ids, np.int64)
        rows = table.see(keys, step)
        slow.see([f"id\0{i}" for i in ids] if text else ids, step)
        mine = live(table)
        assert set(mine) == slow.admitted() and len(table._slots) == len(slow.seen) and len(table) == len(mine)
        assert len(set(mine.values())) == len(mine) and max(mine.values(), default=0) < table.capacity
        assert rows.tolist() == [mine.get(key, SHARED_ROW) for key in (keys if text else ids)]
        assert table.find(keys).tolist() == rows.tolist()


def test_a_million_events():
    events = zipf(np.random.default_rng(0), 1_000_000, 400_000)
    table = IdTable(8, admit_after=2, expire_after=100)
    spent, most = 0.0, 0
    for step, batch in enumerate(np.split(events, 1000)):
        started = time.perf_counter()
        table.see(batch, step)
        spent += time.perf_counter() - started
        if step % 100 == 99:
            rows = list(live(table).values())
            assert len(rows) == len(set(rows)) == len(table) > 1000
        most = max(most, len(table))
    assert spent < 20  # about one
    assert table._admitted > 3 * most and table.capacity <= 2 * (most + 1)  # rows had several owners


def test_a_reused_row_starts_from_a_fresh_embedding_and_fresh_moments():
    table = IdTable(4, expire_after=5)
    old = table.see(np.array([7]), 0)
    start = table.weights[old].copy()
    for _ in range(10):
        table.update(old, np.ones((1, 4), np.float32), 0.1)
    assert table._updates[old] == 10 and (table._second[old] > 0).all()
    new = table.see(np.array([8]), 6)
    assert new == old and table.find(np.array([7])) == SHARED_ROW
    assert table._updates[new] == 0 and not table._first[new].any() and not table._second[new].any()
    assert not np.isclose(table.weights[new], start).any() and np.abs(table.weights[new]).max() < 0.2
    table.update(new, np.full((1, 4), -2, np.float32), 0.1)
    other = IdTable(4)
    fresh = other.see(np.array([1, 8]))[1:]
    before = other.weights[fresh].copy()
    other.update(fresh, np.full((1, 4), -2, np.float32), 0.1)
    assert np.allclose(other.weights[fresh] - before, 0.1, atol=1e-6)  # Adam's first step is the learning rate


def test_memory_is_bounded_by_admission_and_by_expiry():
    table = IdTable(2, admit_after=2, expire_after=10)
    for step in range(400):
        table.see(np.arange(step * 100, step * 100 + 100), step)  # a hundred new ids a step, none twice
    assert len(table) == 0 and table.capacity == 64 and len(table._slots) == 1100 and len(table._count) < 2 * 1200
    for step in range(400, 800):
        table.see(np.repeat(np.arange(step * 100, step * 100 + 100), 2), step)
    assert len(table) == 1100 and table.capacity <= 2 * 1200 and len(table._slots) == 1100


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(("bits", "ids"), [(8, 100), (10, 2000), (14, 5000), (17, 20_000)])
def test_collisions_of_hashing_follow_the_birthday_formula(bits, ids, text):
    m = 2**bits
    expected = ids - m * (1 - (1 - 1 / m) ** ids)
    # variance of the number of empty rows
    variance = m * (m - 1) * (1 - 2 / m) ** ids + m * (1 - 1 / m) ** ids - m**2 * (1 - 1 / m) ** (2 * ids)
    for seed in range(5):
        table = IdTable(1, hash_bits=bits, seed=seed)
        rows = table.see([f"item {i}" for i in range(ids)] if text else np.arange(ids))
        assert abs(ids - len(np.unique(rows)) - expected) <= 4 * np.sqrt(variance) + 1
    assert table.capacity == m and rows.max() < m


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


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("settings_", [{}, {"admit_after": 2, "expire_after": 4}, {"hash_bits": 4}])
def test_saved_and_loaded_it_goes_on_the_same(tmp_path, text, settings_):
    rng = np.random.default_rng(1)

    def go(table, steps, rng):
        for step in steps:
            ids = rng.integers(0, 40, 12)
            rows = table.see([f"ï\0{i}\ud800" for i in ids] if text else ids, step)
            table.update(rows, rng.normal(size=(12, 3)).astype(np.float32), 0.1)

    whole, half = IdTable(3, **settings_), IdTable(3, **settings_)
    go(whole, range(20), np.random.default_rng(2))
    go(whole, range(20, 40), np.random.default_rng(3))
    go(half, range(20), np.random.default_rng(2))
    np.savez(tmp_path / "table.npz", **half.state())
    loaded = IdTable(3, **settings_)
    with np.load(tmp_path / "table.npz", allow_pickle=False) as state:
        loaded.load_state(state)
    go(loaded, range(20, 40), np.random.default_rng(3))
    ours, theirs = loaded.state(), whole.state()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] == theirs[name]).all(), name
    ids = rng.integers(0, 60, 30)
    keys = [f"ï\0{i}\ud800" for i in ids] if text else ids
    assert (loaded.find(keys) == whole.find(keys)).all()


def test_what_does_not_fit_is_refused():
    table = IdTable(2)
    table.see(np.array([1, 2**63 - 1, -(2**63)]))
    assert len(table) == 3
    with pytest.raises(ValueError, match="holds integers"):
        table.see(["a"])
    with pytest.raises(ValueError, match="beyond 64-bit"):
        table.see(np.array([2**63], np.uint64))
    for ids in (np.array([0.5]), np.array([[1]]), np.array([True]), ["a", 1], [1, "a"], np.array([1, "a"], object)):
        with pytest.raises(ValueError, match="ids: "):
            table.find(ids)
    with pytest.raises(ValueError, match="not below the last one"):
        table.see(np.array([1]), 0)
    assert table.see(np.array([], np.int64)).shape == (0,) and table.find([]).shape == (0,)
    for bad, message in [
        ({"dim": 0}, ">= 1"),
        ({"admit_after": 0}, ">= 1"),
        ({"expire_after": 0}, ">= 1"),
        ({"hash_bits": 31}, "1 to 30"),
        ({"hash_bits": 4, "expire_after": 3}, "nothing|no rows of its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            IdTable(**{"dim": 2} | bad)
    with pytest.raises(ValueError, match="has dim 2, this one 3"):
        IdTable(3).load_state(table.state())
    with pytest.raises(ValueError, match="the saved weights have shape"):
        IdTable(2).load_state(table.state() | {"weights": np.zeros((1, 2), np.float32)})
    for name, value in (("ids", table.state()["ids"][:-1]), ("row", table.state()["row"] + 100)):
        with pytest.raises(ValueError, match="the saved table has"):
            IdTable(2).load_state(table.state() | {name: value})


def test_a_column_of_objects_is_what_its_objects_are():
    table = IdTable(2)
    rows = table.see(np.array([7, 9], object))
    assert (table.find(np.array([7, 9])) == rows).all() and len(table) == 2
    strings = IdTable(2)
    assert (strings.see(np.array(["b", "a"], object)) == strings.find(["b", "a"])).all()
