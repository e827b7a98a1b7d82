"""Use a trained policy: it writes completions, and the retriever ranks the catalogue for them, as in its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rec_r1 import config, runs, tasks
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, open_environment
from rec_r1.evaluation.evaluate import metric_scorer, score_raw
from rec_r1.evaluation.records import ranked_rows
from rec_r1.generation.endpoint import Endpoint
from rec_r1.policy.completions import Write, by_endpoint, load_model
from rec_r1.prompts import Action, Prompt, sent
from rec_r1.tasks import Split
from rec_r1.tasks.sequential import settings
from retrievers import CatalogError
from retrievers.interactions import raw_query


@dataclass(frozen=True)
class Hit:
    """A document of a ranking.

    id, title: its id and title in the catalogue.
    row: its row in the catalogue, from 0.
    """

    id: str
    title: str
    row: int


@dataclass(frozen=True)
class Answer:
    """The result of a policy for one query.

    query: the raw query.
    completion: what the model wrote, up to the end of the action.
    sent: the query that was sent to the retriever, a structured one as JSON, or a list of items or an order of
        candidates as the model wrote it. It is the raw query where the completion is malformed.
    malformed: whether the completion is malformed, so that the raw query was sent in its place. (In training it earns
        what the rewards give to a malformed completion.)
    hits: the ranking, best first. It is empty where no ranking was made.
    """

    query: str
    completion: str
    sent: str
    malformed: bool
    hits: tuple[Hit, ...] = ()


class Policy:
    """A policy with the task, format and retriever of its run. :meth:`load` opens one.

        policy = Policy.load("runs/quickstart")
        policy.rewrite(["lecturer"])                          # the text that is sent to the retriever
        [hit.title for hit in policy.search(["lecturer"], k=5)[0].hits]

    Where the run's task has histories, give them as lists of catalogue ids, oldest first. The queries may then be left
    out: the task makes them from the last titles of each history.

        policy = Policy.load("runs/sequential")
        policy.search(histories=[["B00BF9HMS8", "B01N6EUXJP"]])

    recipe: the run's recipe, with `output_dir` set to the run's present folder.
    env: the task, the retriever and the format. The retriever leaves out a history's items if it did so in training.
    write: writes the completions of prompts, see `policy.completions`.
    """

    def __init__(self, recipe: Recipe, env: Environment, write: Write) -> None:
        self.recipe = recipe
        self.env = env
        self.write = write

    @classmethod
    def load(cls, run: str | Path, trained: bool = True, endpoint: Endpoint | None = None) -> Policy:
        """Load the policy and the retriever of a run.

        run: the run's folder (its output_dir).
        trained: True loads the best policy by validation, or the last checkpoint where there is no best one. False
            loads the model as it was before training.
        endpoint: an OpenAI-compatible server that holds the weights, from `policy.completions.endpoint_of`. It writes
            the completions, and no weights are loaded here. None = the weights in the run's folder.

        Raises UserError where the folder is no run or holds no trained policy, and where the task's data is missing.
        Raises RetrieverError for an index that is broken or cannot be reached.
        """
        recipe = recipe_of(run)
        if endpoint is not None:
            return cls(recipe, open_environment(recipe), by_endpoint(recipe, endpoint))
        folder = Path(run)
        weights = runs.best_policy(folder) if trained else None
        env = open_environment(recipe)
        return cls(recipe, env, load_model(recipe, runs.model_source(folder, recipe), weights))

    def prompts(
        self, queries: Sequence[str] | None = None, histories: Sequence[Sequence[str]] | None = None
    ) -> list[Prompt]:
        """The prompts that :meth:`complete` gives to the model: one string or one list of chat messages per query.

        Arguments and errors are those of :meth:`complete`.
        """
        return self.prompts_of(self.split(queries, histories))

    def complete(
        self,
        queries: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        progress: str | None = None,
    ) -> list[str]:
        """The Q completions that the model writes for Q queries, greedily, as in a held-out evaluation.

        queries: Q texts. None = they are made from the histories.
        histories: Q lists of catalogue ids, oldest first. They are needed for tasks with histories, and for no others.
        progress: the label of a progress bar. None = no bar.

        Raises UserError where histories are missing or not allowed, where there are not as many as queries, and for a
        prompt that is too long for the model. Raises CatalogError for ids that the catalogue lacks.
        """
        return self._complete(self.split(queries, histories), progress)

    def rewrite(
        self,
        queries: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        progress: str | None = None,
    ) -> list[str]:
        """The text to send to the retriever for each query. It is the raw query where the completion is malformed.

        Arguments and errors are those of :meth:`complete`.
        """
        split = self.split(queries, histories)
        return [answer.sent for answer in self.rewrites(split, self._complete(split, progress))]

    def search(
        self,
        queries: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        k: int = 10,
        progress: str | None = None,
    ) -> list[Answer]:
        """Generate completions, and rank the catalogue for them.

        k: the largest number of hits.

        Returns one :class:`Answer` per query. Where a completion is malformed, the answer says so, and its hits are
        those of the raw query. Other arguments and errors are those of :meth:`complete`. Raises also ValueError for
        k < 1, and RetrieverError where the retriever fails.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        split = self.split(queries, histories)
        return self.answers(split, self._complete(split, progress), k)

    def rewrites(self, split: Split, completions: Sequence[str]) -> list[Answer]:
        """The answers to Q completions, without hits. split: the queries, from :meth:`split`."""
        answers = []
        for completion, query in zip(completions, split.queries, strict=True):
            action = self.env.format.parse(completion, query)
            answers.append(Answer(query, completion, _sent(action, query), action is None))
        return answers

    def answers(self, split: Split, completions: Sequence[str], k: int) -> list[Answer]:
        """The answers to Q completions. split: the queries, from :meth:`split`. k: the largest number of hits.

        Raises RetrieverError where the retriever fails.
        """
        scorer = metric_scorer(self.env.scorer, self.recipe.evaluation.metrics)
        scored = scorer.score_split(completions, split).whole()
        rankings = ranked_rows(self.env, scored, k)
        malformed = [q for q, action in enumerate(scored.actions) if action is None]
        if malformed:
            raw = ranked_rows(self.env, score_raw(split.take(malformed), scorer), k)
            for q, rows in zip(malformed, raw, strict=True):
                rankings[q] = rows
        answers = []
        for q, action in enumerate(scored.actions):
            query, hits = split.queries[q], self._hits(rankings[q])
            answers.append(Answer(query, completions[q], _sent(action, query), action is None, hits))
        return answers

    def prompts_of(self, split: Split) -> list[Prompt]:
        """The prompts of the queries of a :meth:`split`."""
        return tasks.prompts(split, self.env.task.catalog, self.env.format)

    def _complete(self, split: Split, progress: str | None) -> list[str]:
        return self.write(self.prompts_of(split), [named(query) for query in split.queries], progress)

    def split(self, queries: Sequence[str] | None = None, histories: Sequence[Sequence[str]] | None = None) -> Split:
        """The queries as a split for the evaluation's functions. Each has one target, which is only padding.

        Arguments and errors are those of :meth:`complete`. Where prompts show candidates, they are retrieved here.
        """
        if isinstance(queries, str):
            raise UserError(f"queries must be a list of texts, got the text {queries!r}: write [{queries!r}]")
        task = self.env.task
        rows = self._histories(histories, None if queries is None else len(queries))
        if queries is None:
            if not rows:
                raise UserError(f"task {task.name} has no histories: give queries, a list of texts")
            titles = settings(self.recipe.task).raw_titles
            queries = [raw_query(task.catalog.titles, history, titles) for history in rows]
        for number, query in enumerate(queries, 1):
            _check_whole(query, number)
        count = len(queries)
        split = Split(list(map(str, range(count))), list(queries), [(-1,)] * count, [(0.0,)] * count, histories=rows)
        if self.recipe.task.candidates and count:
            split = tasks.add_candidates(split, self.env.retriever, self.recipe.task.candidates)
        return split

    def _histories(self, given: Sequence[Sequence[str]] | None, count: int | None) -> list[tuple[int, ...]]:
        """The catalogue rows of each history, cut to the latest items as the task's own histories are."""
        task = self.env.task
        has_histories = any(split.histories for split in task.splits.values())
        if given is None or not has_histories:
            if has_histories:
                raise UserError(
                    f"task {task.name} needs histories: give histories, a list of ids for each query (rec-r1 ask: "
                    "--history ID,ID,…)"
                )
            if given is not None:
                raise UserError(f"task {task.name} has no histories: leave histories out")
            return []
        if count is not None and count != len(given):
            raise UserError(f"{count} queries and {len(given)} histories: give one history for each query")
        longest = settings(self.recipe.task).history
        try:
            return [tuple(int(row) for row in task.catalog.rows(ids))[-longest:] for ids in given]
        except CatalogError as error:
            raise CatalogError(f"history: {error.args[0]}: give ids such as {task.catalog.ids[0]!r}") from error

    def _hits(self, rows: Sequence[int]) -> tuple[Hit, ...]:
        catalog = self.env.task.catalog
        return tuple(Hit(catalog.ids[row], catalog.titles[row], row) for row in rows)


def recipe_of(run: str | Path) -> Recipe:
    """The recipe of a run, with `output_dir` set to the run's present folder. Raises UserError where it is no run."""
    folder = runs.check_run(Path(run))
    return dataclasses.replace(config.load(folder / config.RUN_FILE), output_dir=str(folder))


def named(query: str) -> str:
    """A query as messages name it."""
    return f"query {query[:60]!r}"


def _check_whole(query: object, number: int) -> None:
    """Raise UserError for a query that no tokenizer takes. number: its number from 1, for the message."""
    if not isinstance(query, str):
        raise UserError(f"query {number}: {query!r} is no text: give a list of texts")
    try:
        query.encode()
    except ValueError as error:
        raise UserError(f"query {number}: {query[:60]!a} is no valid text ({error}): write it in UTF-8") from error


def _sent(action: Action | None, query: str) -> str:
    return query if action is None else sent(action)
