"""TRL's GRPOTrainer, extended through its hooks: the order of prompts, the rollouts, and the rows of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from rec_r1.config import Recipe
from rec_r1.generation.rollouts import rollout_function
from rec_r1.pages import cards
from rec_r1.scoring import Scorer
from rec_r1.training.callbacks import Progress
from rec_r1.training.live_rows import add_nothing, is_live, live_rows
from rec_r1.training.positions import give_positions
from rec_r1.training.prompt_order import PromptOrder
from rec_r1.training.prompt_record import PromptRecord
from rec_r1.training.shared_prompts import SharedPrompts


def as_evaluated(scorer: Scorer, tokenizer: Any) -> Callable[..., list[float | None]]:
    """The reward function that scores the whole text of a completion, as evaluation, `ask` and baselines do.

    Where a tokenizer has a `response_template`, TRL hands out the parsed message of a chat completion, without what the
    model thought or whatever else the template takes for no content. Then the texts are decoded from the tokens.

    scorer: the reward function.
    tokenizer: the policy's tokenizer.
    """
    if tokenizer.response_template is None:
        return scorer

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **given: Any
    ) -> list[float | None]:
        return scorer(prompts, tokenizer.batch_decode(completion_ids, skip_special_tokens=True), **given)

    return reward


class Trainer(GRPOTrainer):
    """GRPOTrainer that asks prompts in an order that a resumed run repeats, and leaves out work without effect.

    recipe: the recipe. Its `speed` section says what is left out.
    scorer: the only reward function.
    given: further arguments of GRPOTrainer. `train_dataset` must come from `tasks.to_dataset`.
    """

    def __init__(self, recipe: Recipe, scorer: Scorer, **given: Any) -> None:
        with warnings.catch_warnings():  # TRL warns that rollout_func is experimental. pyproject.toml bounds TRL.
            warnings.filterwarnings("ignore", ".*rollout_func.*", UserWarning)
            rollouts: Any = rollout_function(recipe)
            reward = as_evaluated(scorer, given["processing_class"])
            super().__init__(reward_funcs=reward, rollout_func=rollouts, **given)
        for model in (self.model, self.ref_model):
            if model is not None:
                give_positions(model)
        for printing in (PrinterCallback, ProgressCallback):  # Both print all metrics of every step.
            self.remove_callback(printing)
        if not self.args.disable_tqdm:
            self.add_callback(Progress())
        self.recipe = recipe
        self.record = PromptRecord(scorer)
        self.add_callback(self.record)
        self.explore = recipe.speed.explore
        self.skips_dead_rows = recipe.speed.live_rows and add_nothing(self.args, self.aux_loss_enabled)
        one_process = self.accelerator.distributed_type == DistributedType.NO
        can_share = one_process and not self.args.gradient_checkpointing and not self.aux_loss_enabled
        self.shares_prompts = recipe.speed.share_prompts and can_share
        self._rows: list[tuple[int, int]] = []  # For each loss since the last log: rows it was computed from, all rows.

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the toolkit's card of the run in place of TRL's template, whenever a checkpoint is saved."""
        if self.is_world_process_zero():
            cards.write_run(Path(self.recipe.output_dir), self.recipe)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as the trainer does, with the toolkit's card in place of PEFT's template."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.recipe.output_dir)
        if self.is_world_process_zero() and folder.is_dir():
            cards.write_checkpoint(folder, self.recipe, self.state.global_step)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # The epoch comes from the trainer's state, where it is a fraction, because a checkpoint holds this state. The
        # dataloader's set_epoch does not reach a sampler through every wrapper of accelerate.
        data: Any = self.train_dataset
        ids = list(data["query_id"])

        def dead(epoch: int) -> list[int]:
            known = self.record.when_began(epoch)
            return [known.get(query, 0) for query in ids]

        repeated = super()._get_train_sampler(dataset)
        return PromptOrder(repeated, self.args.seed, lambda: int(self.state.epoch or 0), dead, self.explore)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """GRPOTrainer's loss, computed as the recipe's `speed` section says.

        `live_rows` leaves out the rows of advantage 0, and `share_prompts` processes each prompt once. Neither changes
        the gradient.
        """
        factor: Any = 1.0
        if self.skips_dead_rows and model.training:
            all_rows = len(inputs["advantages"])
            # TRL gathers a number per row of the loss, so all processes must keep equally many rows.
            most = int(self.accelerator.gather(is_live(inputs).sum()).max())
            inputs, factor = live_rows(inputs, self.loss_type, most)
            self._rows.append((len(inputs["advantages"]), all_rows))
        if self.shares_prompts:
            model = SharedPrompts(model, inputs["prompt_ids"].shape[1])
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch) * factor
        if isinstance(model, SharedPrompts):
            self.shares_prompts = model.works
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's log with two additions.

        `speed/live_rows` is the share of this process's completions from which the loss was computed. `groups/…` are
        the shares of live groups, and of dead groups by cause, in the last generation.
        """
        if "loss" in logs:
            logs = {**logs, **self.record.last}
            if self._rows:
                computed, all_rows = map(sum, zip(*self._rows, strict=True))
                logs["speed/live_rows"] = computed / all_rows
                self._rows.clear()
        super().log(logs, start_time)
