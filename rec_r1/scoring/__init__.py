"""The Scorer: the function that turns completions into rewards. TRL calls it, and it logs statistics of each batch."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1.prompts import Action
from rec_r1.runs import rollouts
from rec_r1.scoring.batch_summary import summary
from rec_r1.scoring.earned import Earned, earned, exact_in_groups
from rec_r1.scoring.grounding import edited, ground, ground_titles, list_ranks, reorder, without
from rec_r1.scoring.scored import Scored
from rec_r1.scoring.transcript import rows_of
from rec_r1.tasks.types import Split, pad, ranks_in_parts
from retrievers import Cache, Catalog, Query, Retriever, RetrieverError, UnavailableError
from retrievers.core.outage import outages
from retrievers.core.progress import hidden
from retrievers.text.analysis import words
from rewards import Outcome, WeightedSum

__all__ = ["Completion", "Scored", "Scorer", "completion_text", "summary"]
logger = logging.getLogger(__name__)

Completion = str | list[dict[str, Any]]  # TRL passes chat completions as messages.
RECENT_CALLS = 100  # The percentiles of the retriever's times are over so many last calls.
GROUNDING_FAILED = "failed"  # Takes the place of a query where the retriever failed to ground the titles of an edit.
MAX_TRANSCRIPT_QUERIES = 64  # The transcript shows hits for so many distinct queries of a step, because searches cost.


class Scorer:
    """Turns completions into rewards: parse them, rank the distinct queries with one call, and compute the rewards.

    TRL calls it as a reward function:

        scorer = Scorer(format.parse, retriever, rewards.from_spec({"ndcg@10": 1.0}))
        GRPOTrainer(model, reward_funcs=scorer, train_dataset=dataset, …)

    parse: takes (completion, query), and returns an Action, or None where the completion is malformed.
    retriever: ranks the catalogue. It must not change during the run.
    rewards: the rewards to train on.
    metrics: further rewards, which are computed and logged, but not trained on.
    transcript: a JSONL file that gets one row per completion (see `runs/rollouts.py`). None = no transcript.
    catalog: names the transcript's hits by id and title. None = the hits are named by row.
    hits: how many hits a row of the transcript shows.
    max_error_rate, error_steps: the retriever's failures after which a run should stop, see ``outage``.
    floor: a title whose best hit scores at most this is not grounded.
    grounder: the retriever that titles are grounded by. None = ``retriever``.
    exclude_history: whether lists of titles leave out the history's items, as ``retriever`` must do in rankings.
    causes: takes a malformed completion, and says why it is one (`Format.cause`), for structured queries. None = it is
        not asked.

    Every row is scored on its own, because a group may be split across processes. A malformed completion has rank 0 for
    every target. A failure of the retriever is never a score: the rewards of its rows are None, so that TRL leaves them
    out of their groups. If the failures last, ``outage`` says so, and the run stops. A broken or exchanged index raises
    RetrieverError, and bad arguments raise ValueError. When TRL calls, both count as an outage that stops the run after
    one batch, so that the run ends with a checkpoint.
    """

    __name__ = "reward"  # TRL logs the weighted sum under this name.

    def __init__(
        self,
        parse: Callable[[str, str], Action | None],
        retriever: Retriever,
        rewards: WeightedSum,
        metrics: WeightedSum | None = None,
        transcript: Path | None = None,
        catalog: Catalog | None = None,
        hits: int = 3,
        max_error_rate: float = 0.1,
        error_steps: int = 5,
        floor: float = 0.0,
        grounder: Retriever | None = None,
        exclude_history: bool = False,
        causes: Callable[[str], str | None] | None = None,
    ) -> None:
        self.parse = parse
        self.retriever = retriever
        self.rewards = rewards
        self.metrics = metrics
        self.transcript = transcript
        self.catalog = catalog
        self.hits = hits
        self.max_error_rate = max_error_rate
        self.error_steps = error_steps
        self.floor = floor
        self.grounder = grounder
        self.exclude_history = exclude_history
        self.causes = causes
        self._seconds: deque[float] = deque(maxlen=RECENT_CALLS)
        self._error_rates: deque[float] = deque(maxlen=error_steps)
        self._last_error = ""
        self.keeps_earned = False  # Callers of `take_earned` set it to True.
        self._earned: list[Earned] = []
        self.training = False  # True during a call by TRL.
        self.fatal: str | None = None  # Why the run must stop, after an error that will not pass.

    @property
    def outage(self) -> str | None:
        """Why the run should stop, or None: after an error that will not pass, or when the retriever failed for more
        than ``max_error_rate`` of the completions in each of the last ``error_steps`` batches."""
        if self.fatal is not None:
            return self.fatal
        rates = self._error_rates
        if len(rates) < self.error_steps or min(rates) <= self.max_error_rate:
            return None
        return (
            f"the retriever failed for {np.mean(rates):.0%} of the completions in the last {len(rates)} batches, more "
            f"than retriever.max_error_rate={self.max_error_rate:g} in each ({self._last_error})"
        )

    def score(
        self,
        completions: Sequence[str],
        queries: Sequence[str],
        target_rows: Sequence[Sequence[int]],
        target_grades: Sequence[Sequence[float]],
        candidates: Sequence[Sequence[int]] = (),
        histories: Sequence[Sequence[int]] = (),
    ) -> Scored:
        """Score B completions against the targets of their queries.

        completions: B texts.
        queries: B raw queries.
        target_rows, target_grades: B lists of the targets' rows, and of their grades.
        candidates: B lists of rows, for rankings.
        histories: B lists of rows, oldest first, for retrievers that read them.

        Raises RetrieverError and ValueError as described for the class.
        """
        actions = [self.parse(c, q) for c, q in zip(completions, queries, strict=True)]
        targets, grades = pad(target_rows, target_grades)
        histories = histories or [()] * len(actions)
        ranks, lists, seen = self._list_ranks(actions, candidates, histories, targets)
        asked, more = self._queries(actions, histories)
        query_ranks, also = self._query_ranks(asked, targets)
        ranks = np.where(query_ranks != 0, query_ranks, ranks)
        failed = np.asarray((ranks < 0).any(axis=1))
        ranks = np.maximum(ranks, 0)
        raw_ranks = None
        if self.rewards.reads_raw or (self.metrics is not None and self.metrics.reads_raw):
            raw = [Query(query, tuple(map(int, history))) for query, history in zip(queries, histories, strict=True)]
            raw_ranks, _ = self._query_ranks(raw, targets)
            failed |= (raw_ranks < 0).any(axis=1)
            raw_ranks = np.maximum(raw_ranks, 0)
        written = ["" if action is None else action.written for action in actions]
        outcome = Outcome(completions, actions, ranks, grades, words, raw_ranks, queries, written)
        components = self.rewards.components(outcome)
        total = self.rewards.combine(components)
        if self.metrics is not None:
            components |= self.metrics.components(outcome)
        well_formed = [b for b, action in enumerate(actions) if action is not None]
        retrieval = {**seen, **more, **also}
        retrieval["retrieval/distinct"] = retrieval["retrieval/queries"] / max(1, len(well_formed))
        if well_formed:  # A malformed completion sends no query, so the retriever cannot fail for it.
            retrieval["retrieval/error_rate"] = float(failed[well_formed].mean())
        for values in (total, *components.values()):
            values[failed] = np.nan
        sent = [query if isinstance(query, Query) else None for query in asked]
        causes: Sequence[str | None] = ()
        if self.causes is not None:
            causes = [self.causes(c) if a is None else None for c, a in zip(completions, actions, strict=True)]
        return Scored(outcome, actions, components, total, failed, lists, sent, retrieval, causes)

    def score_split(self, completions: Sequence[str], split: Split) -> Scored:
        """Score one completion for each query of a split, as :meth:`score` does."""
        return self.score(completions, split.queries, split.rows, split.grades, split.candidates, split.histories)

    def _queries(
        self, actions: Sequence[Action | None], histories: Sequence[Sequence[int]]
    ) -> tuple[list[Query | str | None], dict[str, float]]:
        """The retriever's query for each action (a text with the history, or an edited history), and how the grounding
        went. None for lists and malformed completions, GROUNDING_FAILED where an edit could not be grounded."""
        asked: list[Query | str | None] = [None] * len(actions)
        edits = [b for b, action in enumerate(actions) if action is not None and action.weights]
        seen: dict[str, float] = {}
        row_of: dict[str, int] | None = {}
        if edits:
            titles = [title for b in edits if (a := actions[b]) is not None for title in a.items]
            row_of, seen = self._call(lambda: ground_titles(self.grounder or self.retriever, titles, self.floor))
            if row_of is not None:
                seen["scorer/ungrounded"] = sum(title not in row_of for title in titles) / len(titles)
        for b, action in enumerate(actions):
            if action is None or action.order or (action.items and not action.weights):
                continue
            if not action.weights:
                asked[b] = Query(action.text, tuple(map(int, histories[b])), structured=action.structured)
            elif row_of is None:
                asked[b] = GROUNDING_FAILED
            else:
                asked[b] = edited(histories[b], action.items, action.weights, row_of)
        return asked, seen

    def _query_ranks(
        self, queries: Sequence[Query | str | None], targets: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """(B, T) ranks of the targets: 0 where there is no query or no hit, -1 where the retriever failed. Each
        distinct pair of a query and its targets is ranked once, because a group often sends the same query."""
        ranks = np.zeros(targets.shape, np.int32)
        asked: dict[tuple[Query, bytes], list[int]] = {}
        for b, query in enumerate(queries):
            if isinstance(query, Query):
                asked.setdefault((query, targets[b].tobytes()), []).append(b)
            elif query == GROUNDING_FAILED:
                ranks[b] = -1
        if not asked:
            return ranks, {}
        distinct, firsts = [query for query, _ in asked], targets[[rows[0] for rows in asked.values()]]
        found, seen = self._call(lambda: ranks_in_parts(self.retriever.ranks, distinct, firsts))
        for q, rows in enumerate(asked.values()):
            ranks[rows] = -1 if found is None else found[q]
        return ranks, {**seen, "retrieval/queries": float(len(asked))}

    def _list_ranks(
        self,
        actions: list[Action | None],
        candidates: Sequence[Sequence[int]],
        histories: Sequence[Sequence[int]],
        targets: np.ndarray,
    ) -> tuple[np.ndarray, list[list[int] | None], dict[str, float]]:
        """(B, T) ranks in the actions that are lists, as in `_query_ranks`, the B lists of rows, and how the grounding
        went. An order of candidates without a known number is malformed: ``actions`` gets None for it."""
        ranks = np.zeros(targets.shape, np.int32)
        lists: list[list[int] | None] = [None] * len(actions)
        seen = {"retrieval/queries": 0.0}
        for b, action in enumerate(actions):
            if action is not None and action.order:
                lists[b] = reorder(action.order, candidates[b])
                if lists[b] is None:
                    actions[b] = None
        listed = [(b, a.items) for b, a in enumerate(actions) if a is not None and a.items and not a.weights]
        if listed:
            found, more = self._call(
                lambda: ground(self.grounder or self.retriever, [items for _, items in listed], self.floor)
            )
            seen = {**more, "retrieval/queries": float(len({item for _, items in listed for item in items}))}
            if found is None:
                ranks[[b for b, _ in listed]] = -1
            else:
                seen["scorer/ungrounded"] = found[1]
                for (b, _), rows in zip(listed, found[0], strict=True):
                    lists[b] = without(rows, histories[b]) if self.exclude_history else rows
        for b, own in enumerate(lists):
            if own is not None:
                ranks[b] = list_ranks(own, targets[b])
        return ranks, lists, seen

    def _call(self, ask: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """The result of a call of the retriever, None during an outage, and how the call went."""
        if isinstance(self.retriever, Cache):
            self.retriever.counts()  # Reset the counts, to which the transcript's searches have added.
        started = time.perf_counter()
        try:
            with outages():
                answer = ask()
        except (RetrieverError, ValueError) as error:
            if not self.training:
                raise
            self._fail(error)
            answer = None
        except UnavailableError as error:
            self._last_error = str(error)
            logger.warning("the retriever failed: %s", self._last_error)
            answer = None
        self._seconds.append(time.perf_counter() - started)
        seen = {
            "retrieval/seconds/p50": float(np.percentile(self._seconds, 50)),
            "retrieval/seconds/p95": float(np.percentile(self._seconds, 95)),
        }
        if isinstance(self.retriever, Cache):
            total, known = self.retriever.counts()
            seen["retrieval/cache_hits"] = known / max(1, total)
        return answer, seen

    def _fail(self, error: Exception) -> None:
        """Remember the error because of which the run must stop."""
        self.fatal = f"the retriever failed for good ({' '.join(str(error).split())[:500]})"
        logger.warning("%s: stopping after this step", self.fatal)

    @hidden()  # The training has a progress bar of its own.
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        query: Sequence[str],
        target_rows: Sequence[Sequence[int]],
        target_grades: Sequence[Sequence[float]],
        candidates: Sequence[Sequence[int]] = (),
        histories: Sequence[Sequence[int]] = (),
        query_id: Sequence[str] = (),
        log_metric: Callable[[str, float], None] | None = None,
        trainer_state: Any = None,
        **_: Any,
    ) -> list[float | None]:
        """TRL's reward function. It returns B rewards. None = no reward applies, and TRL leaves out the row."""
        started = time.perf_counter()
        texts = [completion_text(c) for c in completions]
        self.training = True
        try:
            scored = self.score(texts, query, target_rows, target_grades, candidates, histories)
        finally:
            self.training = False
        if "retrieval/error_rate" in scored.retrieval:
            self._error_rates.append(scored.retrieval["retrieval/error_rate"])
        if self.transcript is not None:
            step = int(trainer_state.global_step) if trainer_state is not None else 0
            shown = self._shown(scored)
            rollouts.append(self.transcript, rows_of(step, prompts, query, query_id, scored, shown, self.catalog))
        if log_metric is not None:
            for name, value in summary(scored, query).items():
                if not np.isnan(value):  # TRL averages over the processes that log a value. A NaN would spoil the mean.
                    log_metric(name, value)
            log_metric("scorer/seconds", time.perf_counter() - started)
        if self.keeps_earned:
            malformed = [action is None for action in scored.actions]
            self._earned += earned(self.rewards, scored.components, scored.rewards, malformed, query_id)
        return [None if np.isnan(r) else float(r) for r in exact_in_groups(scored.rewards)]

    def _shown(self, scored: Scored) -> list[list[int] | None]:
        """The rows of the first hits that a user would see for each of B completions: those of a list, or of a query.
        None = they are not known."""
        queries = list(dict.fromkeys(query for query in scored.asked if query is not None))[:MAX_TRANSCRIPT_QUERIES]
        found: dict[Query, list[int]] = {}
        if queries and self.hits:
            try:
                with outages():
                    rows = self.retriever.search(queries, self.hits).rows
                found = {q: [int(r) for r in line if r >= 0] for q, line in zip(queries, rows, strict=True)}
            except (RetrieverError, ValueError) as error:
                self._fail(error)
            except UnavailableError as error:  # The rows have their rewards, so training continues without the hits.
                logger.warning("the transcript lacks the hits of this step: %s", error)
        return [
            listed[: self.hits] if listed is not None else None if query is None else found.get(query)
            for query, listed in zip(scored.asked, scored.lists, strict=True)
        ]

    def take_earned(self) -> list[Earned]:
        """What each completion earned since the last call."""
        kept, self._earned = self._earned, []
        return kept


def completion_text(completion: Completion) -> str:
    """The text of a completion that is a string or a list of chat messages."""
    return completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)
