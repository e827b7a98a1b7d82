"""What a recipe says about how held-out completions are written, and how that is described."""

import dataclasses

import pytest
from test_generation import recipe_for, written

from rec_r1.generation import sampling_of


@pytest.mark.slow
def test_held_out_completions_may_have_a_penalty_of_their_own(tiny_model):
    made = recipe_for(tiny_model, repetition_penalty=1.1)
    own = dataclasses.replace(made, evaluation=dataclasses.replace(made.evaluation, repetition_penalty=5.0))
    assert [sampling_of(one).options["repetition_penalty"] for one in (made, own)] == [1.1, 5.0]
    assert sampling_of(own, 2) == sampling_of(made, 2)  # Drawn as rollouts are, whose penalty is 1.1.
    assert written(tiny_model, sampling_of(own)) == written(tiny_model, repetition_penalty=5.0)
    assert written(tiny_model, sampling_of(own)) != written(tiny_model, sampling_of(made))


def test_a_description_says_how(tiny_model):
    made = recipe_for(tiny_model, temperature=0.7)
    assert sampling_of(made).description == "greedy"
    assert sampling_of(recipe_for(tiny_model, repetition_penalty=1.25)).description == "greedy, repetition penalty 1.25"
    assert sampling_of(made, 4).description == "mean of 4 samples at temperature 0.7"
    hotter = recipe_for(tiny_model, generation_kwargs={"temperature": 1.5, "num_beams": 2})
    assert sampling_of(hotter, 4).description == "mean of 4 samples at temperature 1.5"
    assert sampling_of(hotter).description == "beam search with 2 beams"
