"""The importance ratio of vLLM's completions: what TRL logs of it, and whether it is what it should be.

TRL multiplies the loss of a completion by its probability in the trainer divided by its probability in vLLM, because
the two compute slightly different probabilities. If vLLM reports the probabilities from which it samples, the mean of
this ratio over its completions is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

_KEY = "sampling/importance_sampling_ratio"  # TRL 1.16 logs it with vLLM and vllm_importance_sampling_correction.
MEAN, LEAST, MOST = f"{_KEY}/mean", f"{_KEY}/min", f"{_KEY}/max"
LOW, HIGH = 0.9, 1.1  # A mean outside this range counts as far from 1.
WIDTH = 10  # The mean of so many logged values is judged, because few completions have a noisy mean.


def far_from_one(values: Sequence[float]) -> str | None:
    """What is wrong where the mean of the last `WIDTH` logged values is far from 1. None = nothing.

    values: the logged means, oldest first.
    """
    last = values[-WIDTH:]
    if not last or LOW <= (mean := sum(last) / len(last)) <= HIGH:
        return None
    return (
        f"the importance ratio of vLLM's completions is {mean:.2g} on average over the last {len(last)} logged values, "
        "and should be near 1: TRL multiplies the loss of each completion by it, so the policy learns too little or "
        "the wrong thing: set grpo.top_p=1, grpo.top_k=0, grpo.min_p=0 and grpo.repetition_penalty=1; if they have "
        "these values, vLLM computes other probabilities than the trainer: set model.dtype to the numeric type of "
        "vLLM, or grpo.vllm_importance_sampling_correction=false"
    )


def described(values: Sequence[float]) -> str:
    """The logged means in a few words, for a report.

    values: the logged means, at least one.
    """
    mean = sum(values) / len(values)
    expected = "as it should be" if LOW <= mean <= HIGH else f"but should be near 1 ({LOW} to {HIGH})"
    return f"{mean:.3f} on average, {expected}; from {min(values):.3f} to {max(values):.3f} in single steps"
