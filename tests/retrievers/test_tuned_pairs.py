"""What an encoder is tuned on: pairs of a query and a relevant document, and their negatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_data import dense as weights_of
from tuned_data import JUDGMENTS, TEXTS, N, make_catalog, make_interactions

import retrievers
from retrievers import Interactions, Judgments
from retrievers.interactions import raw_query
from retrievers.text.tuning import negatives
from retrievers.text.tuning.job_folder import equal_batches
from retrievers.text.tuning.pairs import from_interactions, from_judgments


@given(st.integers(1, 4), st.none() | st.integers(1, 7), st.integers(0, 99), st.integers(1, 3))
def test_pairs_are_next_items_and_the_raw_queries_of_what_came_before(epochs, positives, seed, raw_titles):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, N, rng.integers(0, 8)).tolist() for _ in range(6)]
    given_ = Interactions.from_sequences(N, sequences, raw_titles=raw_titles)
    pairs = from_interactions(given_, TEXTS, epochs, positives, seed)
    size = len(pairs) // epochs
    # Every first occurrence after the first item is a candidate.
    possible = {
        (user, place): (raw_query(TEXTS, s[:place], raw_titles), s[place], tuple(s[:place]))
        for user, s in enumerate(sequences)
        for place in range(1, len(s))
        if s[place] not in s[:place]
    }
    users = sorted({user for user, _ in possible})
    most = {u: sum(user == u for user, _ in possible) for u in users}
    assert size == sum(count if positives is None else min(positives, count) for count in most.values())
    drawn: dict[tuple, int] = {}
    for x in range(len(pairs)):
        found = (pairs.texts[pairs.query[x]], int(pairs.row[x]), pairs.histories[x])
        assert (users[pairs.group[x]], *found) in {(user, *value) for (user, _), value in possible.items()}
        assert pairs.known_of(x).tolist() == sorted(set(sequences[users[pairs.group[x]]]))
        drawn[(users[pairs.group[x]], *found)] = drawn.get((users[pairs.group[x]], *found), 0) + 1
    for user in users:  # No pair is drawn again before all pairs of the user were drawn.
        counts = [drawn.get((user, *value), 0) for (own, _), value in possible.items() if own == user]
        assert max(counts) - min(counts) <= 1


def test_pairs_of_judgments():
    pairs = from_judgments(JUDGMENTS, 2, 2, seed=0)
    assert len(pairs) == 2 * 6 and pairs.histories == ()
    for x in range(len(pairs)):
        relevant = JUDGMENTS.rows[JUDGMENTS.queries.index(pairs.texts[pairs.query[x]])]
        assert pairs.row[x] in relevant and pairs.known_of(x).tolist() == list(relevant)
    assert pairs.held_out.texts == ["seat"] and pairs.held_out.rows == [(16, 17)]
    assert np.array_equal(pairs.row, from_judgments(JUDGMENTS, 2, 2, seed=0).row)
    assert not np.array_equal(pairs.row, from_judgments(JUDGMENTS, 2, 2, seed=1).row)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((["a"], [(1,), (2,)]), "1 queries with 2 lists of rows"),
        ((["a"], [()]), "no relevant document"),
        ((["a"], [(N,)]), f"rows must lie in 0 to {N - 1}"),
        ((["a"], [(0,)], ["b"], [(-1,)]), "rows must lie in 0"),
    ],
)
def test_wrong_judgments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Judgments(N, *wrong)


def test_the_fingerprint_of_judgments_follows_their_content():
    others = [
        Judgments(N, ["wet"], [(0,)]), Judgments(N, ["wet"], [(0, 1)]), Judgments(N, ["web"], [(0,)]),
        Judgments(N, ["wet"], [(0,)], ["wet"], [(0,)]), Judgments(N + 1, ["wet"], [(0,)]),
        Judgments(N, ["wet", "wet"], [(0,), (0,)]),
    ]  # fmt: skip
    assert len({one.fingerprint for one in others}) == len(others)
    assert Judgments(N, ("wet",), [(np.int32(0),)]).fingerprint == others[0].fingerprint


def test_interactions_keep_their_fingerprint_and_how_histories_are_written(tmp_path):
    two = make_interactions(raw_titles=2)
    assert two.fingerprint != make_interactions().fingerprint
    two.save(tmp_path)
    assert Interactions.load(tmp_path).raw_titles == 2 and Interactions.load(tmp_path).fingerprint == two.fingerprint


# ---- Negatives


def test_anti_affinity_finds_the_items_with_the_most_negative_weights(monkeypatch):
    monkeypatch.setattr(negatives, "POOL", 3)
    given_ = make_interactions(40)
    ease = retrievers.open("ease", make_catalog(), None, given_, regularization=1.0)
    pairs = from_interactions(given_, TEXTS, 1, None, 0)
    found = negatives.anti_affinity(pairs, ease, N, 2, seed=0)
    b = weights_of(ease)
    assert found.shape == (len(pairs), 2) and (found >= 0).any()
    for x in range(len(pairs)):
        total = b[list(pairs.histories[x])].sum(0)
        ordered = [row for row in np.argsort(total, kind="stable") if total[row] < 0 and row not in pairs.known_of(x)]
        real = found[x][found[x] >= 0].tolist()
        assert set(real) <= set(ordered[:3]) and len(set(real)) == len(real) == min(2, len(ordered))


def test_hard_negatives_are_text_neighbours_that_are_not_relevant(monkeypatch):
    from retrievers.text.exact_search import Exact

    monkeypatch.setattr(negatives, "POOL", 4)
    pairs = from_judgments(JUDGMENTS, 1, None, 0)
    rng = np.random.default_rng(0)
    documents, queries = rng.normal(size=(N, 8)).astype(np.float16), rng.normal(size=(3, 8)).astype(np.float32)
    found = negatives.text_neighbours(pairs, queries, Exact(documents, "cpu"), 5, seed=0)
    for x in range(len(pairs)):
        scores = documents.astype(np.float32) @ queries[pairs.query[x]]
        ordered = [row for row in np.argsort(-scores) if row not in pairs.known_of(x)]
        assert sorted(found[x].tolist()) == sorted([-1, *ordered[:4]])  # There are four candidates for five places.


@given(st.integers(2, 5000), st.integers(2, 200))
def test_batches_are_equal_and_leave_out_as_few_pairs_as_they_can(pairs, most):
    steps, size = equal_batches(pairs, most)
    assert 1 <= size <= most and 0 <= (left := pairs - steps * size) < most
    fewest = -(-pairs // most)
    assert left <= pairs - fewest * (pairs // fewest) and (pairs < most or left <= pairs % most)


@pytest.mark.parametrize("data", [JUDGMENTS, make_interactions(6)])
def test_a_limit_of_all_pairs_keeps_the_first_of_each_epoch(data):
    def drawn(most):
        judged = data is JUDGMENTS
        how = 2, None, 0, most
        return from_judgments(data, *how) if judged else from_interactions(data, TEXTS, *how)

    whole, few = drawn(None), drawn(3)
    size = len(whole) // 2
    kept = np.concatenate([np.arange(3), size + np.arange(3)])
    assert few.row.tolist() == whole.row[kept].tolist()
    assert [few.texts[q] for q in few.query] == [whole.texts[q] for q in whole.query[kept]]
    assert drawn(10**6).row.tolist() == whole.row.tolist()
