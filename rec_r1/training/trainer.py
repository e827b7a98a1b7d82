"""TRL's GRPOTrainer through its hooks: the order of prompts, rollouts, and a loss without rows that teach nothing."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate import DistributedType
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from rec_r1.config import Recipe
from rec_r1.generation.rollouts import rollout_function
from rec_r1.scoring import Scorer
from rec_r1.training.callbacks import Progress
from rec_r1.training.live_rows import add_nothing, is_live, live_rows
from rec_r1.training.prompt_order import PromptOrder
from rec_r1.training.prompt_record import PromptRecord
from rec_r1.training.shared_prompts import SharedPrompts


class Trainer(GRPOTrainer):
    """GRPOTrainer with prompts in an order that a resumed run finds again, and without work that changes nothing.

    recipe: its `speed` section says what is left out. scorer: the one reward function. given: arguments of GRPOTrainer;
    its dataset is one of `tasks.to_dataset`.
    """

    def __init__(self, recipe: Recipe, scorer: Scorer, **given: Any) -> None:
        with warnings.catch_warnings():  # TRL calls rollout_func experimental; its release is bounded in pyproject
            warnings.filterwarnings("ignore", ".*rollout_func.*", UserWarning)
            rollouts: Any = rollout_function(recipe)
            super().__init__(reward_funcs=scorer, rollout_func=rollouts, **given)
        for shown in (PrinterCallback, ProgressCallback):  # both print every metric of every step
            self.remove_callback(shown)
        if not self.args.disable_tqdm:
            self.add_callback(Progress())
        self.record = PromptRecord(scorer)
        self.add_callback(self.record)
        self.explore = recipe.speed.explore
        self.skips_dead_rows = recipe.speed.live_rows and add_nothing(self.args, self.aux_loss_enabled)
        alone = self.accelerator.distributed_type == DistributedType.NO
        whole = alone and not self.args.gradient_checkpointing and not self.aux_loss_enabled
        self.shares_prompts = recipe.speed.share_prompts and whole
        self._rows: list[tuple[int, int]] = []  # of the loss since the last log: rows that taught something, all rows

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # The state is what a checkpoint keeps; its epoch counts in fractions. The dataloader's own set_epoch does not
        # pass through every wrapper that accelerate puts around a sampler.
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
        """GRPOTrainer's loss; where `speed.live_rows` holds, of the rows whose advantage is not 0, and where
        `speed.share_prompts` does, with every prompt read once."""
        factor: Any = 1.0
        if self.skips_dead_rows and model.training:
            all_rows = len(inputs["advantages"])
            # TRL gathers a number for each row of the loss: every process keeps as many rows as that with the most.
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
        """The trainer's log, with `speed/live_rows`, the share of this process's completions that the loss was made of,
        and `groups/…`, the share of the last generation's groups that taught something, or why they did not."""
        if "loss" in logs:
            logs = {**logs, **self.record.last}
            if self._rows:
                computed, all_rows = map(sum, zip(*self._rows, strict=True))
                logs["speed/live_rows"] = computed / all_rows
                self._rows.clear()
        super().log(logs, start_time)
