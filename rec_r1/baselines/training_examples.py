"""Training examples for SFT, reward-weighted SFT and DPO, from scored completions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rec_r1.prompts import Prompt

logger = logging.getLogger(__name__)


class Group(NamedTuple):
    """A training prompt with its completions.

    prompt: the prompt.
    answers: G completions.
    rewards: (G,) their rewards.
    raw: the reward of the raw query. NaN = not known.
    """

    prompt: Prompt
    answers: Sequence[str]
    rewards: np.ndarray
    raw: float


def best_answers(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Training examples for SFT by rejection sampling.

    An example is the best completion of a group that has one that earns more than the raw query.
    """
    rows = []
    for group in groups:
        best = int(np.argmax(group.rewards))
        if group.rewards[best] > group.raw:
            rows.append({"prompt": group.prompt, "completion": as_written(group.prompt, group.answers[best])})
    logger.info("%d of %d prompts have a completion that beats the raw query", len(rows), len(groups))
    return rows


def pairs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Training examples for DPO: the best and the worst completion of each group that is not dead."""
    rows = []
    for group in groups:
        best, worst = int(np.argmax(group.rewards)), int(np.argmin(group.rewards))
        if group.rewards[best] > group.rewards[worst]:
            chosen, rejected = (as_written(group.prompt, group.answers[i]) for i in (best, worst))
            rows.append({"prompt": group.prompt, "chosen": chosen, "rejected": rejected})
    logger.info("%d of %d prompts have completions with different rewards", len(rows), len(groups))
    return rows


def weights(rewards: np.ndarray, temperature: float) -> np.ndarray:
    """The weights of the G completions of a prompt: exp((reward - mean) / temperature), divided by their sum.

    This is reward-weighted regression (Peters and Schaal 2007, "Reinforcement learning by reward-weighted regression
    for operational space control") within a group. Exponential reward-weighted SFT (arXiv 2603.10279) has the same
    weights without the division, so that prompts with high rewards count more.

    rewards: (G,) the rewards.
    temperature: a difference in reward of so much makes a weight e times as large.

    Returns (G,) float64 weights with the sum 1.
    """
    # Every number that is subtracted gives the same weights. With the maximum nothing overflows.
    raised = np.exp((rewards.astype(np.float64) - rewards.max()) / temperature)
    return raised / raised.sum()


def resampled(groups: Sequence[Group], temperature: float, seed: int) -> list[dict[str, Any]]:
    """Training examples for SFT: as many as there are completions, drawn in proportion to their weights.

    A group of G completions has G examples. They are drawn by systematic resampling (Kitagawa 1996), with G equally
    spaced points and one random shift: a completion of weight w is drawn G * w times, rounded up or down, and its mean
    number over all shifts is exactly G * w. Dead groups are left out, because their completions say nothing about what
    is better; RL learns nothing from them either.

    groups: the completions with their rewards.
    temperature: see :func:`weights`.
    seed: the seed of the shifts.
    """
    rng, rows, live = np.random.default_rng(seed), [], 0
    for group in groups:
        if group.rewards.min() == group.rewards.max():
            continue
        live += 1
        count = len(group.answers)
        points = (np.arange(count) + rng.random()) / count
        ends = np.cumsum(weights(group.rewards, temperature))
        places = np.searchsorted(ends, points, side="right")
        for place in np.minimum(places, count - 1).tolist():  # The last end may be a little less than 1.
            completion = as_written(group.prompt, group.answers[place])
            rows.append({"prompt": group.prompt, "completion": completion})
    logger.info("%d of %d prompts have completions with different rewards", live, len(groups))
    return rows


def as_written(prompt: Prompt, text: str) -> Prompt:
    """A completion in the form of its prompt: a string, or a chat message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
