"""The sections of a recipe and their keys.

The comment beside a field, or in the lines above it, is the key's text in `rec-r1 options` and in the tables of
`rec_r1/README.md`; :mod:`rec_r1.config.described` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """The model that is trained."""

    name: str = "smollm2-135m"  # A hub id, a local folder, or a name in `models.BUNDLED`.
    dtype: str = "auto"  # auto takes bfloat16 where the processor computes it fast, and float32 elsewhere.
    attn_implementation: str | None = None  # None leaves the choice to transformers, which prefers sdpa.
    trust_remote_code: bool = False  # True runs the Python code in the model's folder (auto_map).


@dataclass
class TrainFilter:
    """Which training prompts are kept, by the nDCG@k of their raw query."""

    raw_ndcg_below: float = 1.01  # Prompts whose raw query scores less than this are kept. 1.01 keeps all prompts.
    k: int = 10  # The depth of the nDCG.


@dataclass
class TaskConfig:
    """The task: its catalogue, its queries and their targets."""

    # A task (`rec-r1 options task`), or the path of your own module that has `load(config) -> Task`.
    name: str = "emoji"
    path: str | None = None  # The folder with the task's files, or `hub:OWNER/NAME` for a dataset of the hub.
    # The task's parameters: `rec-r1 options task.NAME` lists them.
    params: dict[str, Any] = field(default_factory=dict)
    # For beir: the file `qrels/NAME.tsv` of each split. Validation or test is taken out of train if it has no entry.
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "validation": "dev", "test": "test"})
    train_filter: TrainFilter = field(default_factory=TrainFilter)
    candidates: int = 0  # How many first hits of the raw query the prompt shows in place of `{candidates}`.


@dataclass
class FormatConfig:
    """What the prompt asks for, and how a completion becomes an action."""

    answer: str = "line"  # How a completion is written: `line`, `json` or `think_json`. See `rec_r1/prompts`.
    # A name in `prompts.PROMPTS`, or a text with `{query}`, `{history}`, `{history_line}` or `{candidates}`. `{answer}`
    # is replaced by the instruction that says how to write the completion. None takes the prompt of the action.
    prompt: str | None = None
    system: str | None = None  # The system message. None keeps the one of the chat template.
    chat: bool = True  # False sends the prompt as plain text, without a chat template.
    # What a completion means. `replace`: it is the query. `expand`: it is appended to the query. `items`: it is a list
    # of titles, which are grounded to the catalogue. `ranking`: it is a new order of the candidates' numbers. `edit`:
    # it names titles to add to the history, each wished for or unwanted. `structured`: it is a query in parts, as JSON,
    # for a retriever that has `structured` among its parameters.
    action: str = "replace"
    repeat: int = 1  # For `expand`: how often the query itself is repeated before the completion.
    keep_query: bool = False  # For `replace` and `expand`: True sends the raw query when a completion is empty.
    max_items: int = 10  # For `items` and `edit`: only the first so many titles count.
    floor: float = 0.0  # For `items` and `edit`: a title whose best hit scores at most this is unknown.
    titles: int = 10  # **The length of the history in a prompt**: how many of its last titles are shown.
    title_words: int | None = None  # Titles in a prompt are cut to so many words. None shows them whole.
    # How many training queries a prompt shows as examples, each with a relevant title, or with words (`example_words`).
    examples: int = 0
    # How many words each example has: words that the query's relevant documents share. 0 shows a title instead.
    example_words: int = 0


@dataclass
class CacheConfig:
    """Where results of the retriever are kept for later queries."""

    memory_mb: int = 64  # How much memory each process uses for results, in MB. 0 keeps none in memory.
    disk: str | None = None  # A folder of results that processes and runs share. None keeps none on disk.
    disk_mb: int = 1024  # The largest size of that folder, in MB.


@dataclass
class RetrieverConfig:
    """The retriever that ranks the catalogue."""

    kind: str = "bm25"  # A retriever (`rec-r1 options retriever`), or the path of your own module.
    index: str | None = None  # The folder of the index. None takes a folder in the cache, named by its content.
    # The parameters of this kind: `rec-r1 options retriever.KIND` lists them.
    params: dict[str, Any] = field(default_factory=dict)
    exclude_history: bool | None = None  # Whether rankings leave out the history's items. None: the task decides.
    cache: CacheConfig = field(default_factory=CacheConfig)
    # The run stops when the retriever fails for more than this share of the completions in each of the last
    # `error_steps` batches.
    max_error_rate: float = 0.1
    error_steps: int = 5  # How many batches in a row must fail before the run stops.


@dataclass
class GroundingConfig:
    """The retriever that finds the item of a written title, for the actions items and edit."""

    kind: str | None = None  # None takes the recipe's retriever, which must read text.
    params: dict[str, Any] = field(default_factory=dict)  # The parameters of this kind of retriever.


@dataclass
class EvaluationConfig:
    """When and how held-out queries are evaluated."""

    every_steps: int = 25  # Validation runs after so many steps. 0 validates only before and after training.
    # What is measured. The first metric picks the best checkpoint.
    metrics: list[str] = field(default_factory=lambda: ["ndcg@10", "recall@100"])
    mismatch_below: float = 0.2  # The mismatch slice: queries whose raw query scores less in the first metric.
    validation_limit: int | None = None  # Training validates on the first so many queries. None takes all.
    test_limit: int | None = None  # Only the first so many test queries are read, to try a recipe out quickly.
    # The repetition penalty of held-out completions, and of those of `ask` and `serve`. 1 is none, and more makes the
    # tokens of the prompt and of the completion so far less likely. None takes that of the rollouts,
    # `grpo.repetition_penalty`.
    repetition_penalty: float | None = None
    batch_size: int = 64  # How many completions are generated at once.
    transcript_hits: int = 3  # How many hits each row of `rollouts.jsonl` shows.


@dataclass
class SpeedConfig:
    """Work that a training leaves out, because nothing reads its result or because it does not change the policy."""

    end_at_answer: bool = True  # Generation stops where the action is complete, not at `grpo.max_completion_length`.
    share_prompts: bool = True  # The completions of one prompt share its key-value cache, as they always do in vLLM.
    live_rows: bool = True  # Completions of advantage 0 are left out of the loss, unless it has a KL or entropy term.
    # From the second epoch on, a prompt whose last n groups were dead is asked again with probability `explore`^n, or
    # 0.1 if that is larger. Prompts with live groups are asked twice in its place. 1 asks all prompts equally often.
    explore: float = 0.5


@dataclass
class WarmStartConfig:
    """Supervised fine-tuning before GRPO, on the best samples of the untrained policy, as in the baseline `sft`."""

    samples: int = 0  # How many completions of each training prompt are sampled for it. 0: no warm start.
    # Options of TRL's `SFTConfig`: `rec-r1 options warm_start.sft`. With LoRA `learning_rate` is 2e-4 by default.
    sft: dict[str, Any] = field(default_factory=dict)


@dataclass
class EndpointConfig:
    """The server that the baseline `endpoint` asks for completions."""

    url: str = "http://localhost:8000/v1"  # Any OpenAI-compatible server: vLLM, Ollama, or a vendor's.
    model: str | None = None  # The name under which the server knows the model.
    key_variable: str = "OPENAI_API_KEY"  # If this environment variable is set, its value is sent as the key.
    # The prices of a million prompt tokens and of a million completion tokens: `[0.15, 0.6]`. None: not known.
    dollars_per_million: list[float] | None = None
    concurrency: int = 8  # How many requests are sent at the same time.
    extra: dict[str, Any] = field(default_factory=dict)  # Further fields of the request.


@dataclass
class BaselinesConfig:
    """The settings of `rec-r1 baseline` alone."""

    # How many training queries a prompt shows as examples beside the recipe's own, each with a relevant title, or,
    # where words are added to the query, with words that its relevant documents share.
    few_shot: int = 3
    # How many completions the untrained policy writes for each prompt: for training prompts in `sft` and `dpo`, for
    # held-out prompts in `best_of`. None: in `sft` and `dpo` so many that their total is that of the recipe's training,
    # and in `best_of` `grpo.num_generations`.
    samples: int | None = None
    # For `sft` and `dpo`: the folder of a run, whose recorded completions are used instead, or a file of completions
    # with rewards, such as the `rollouts.jsonl` of one process.
    rollouts: str | None = None
    outputs: str | None = None  # For `sft`: a JSONL file with `query` and `completion`, which is used instead.
    # Options of TRL's `SFTConfig`: `rec-r1 options baselines.sft`. With LoRA `learning_rate` is by default ten times
    # TRL's own, which is for all weights: 2e-4, and 1e-5 in `dpo`.
    sft: dict[str, Any] = field(default_factory=dict)
    # For `reward_weighted_sft`: a completion that earns so much more than another one weighs e times as much.
    reward_temperature: float = 0.1
    # Options of TRL's `SFTConfig`: `rec-r1 options baselines.reward_weighted_sft`.
    reward_weighted_sft: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)  # Options of TRL's `DPOConfig`: `rec-r1 options baselines.dpo`.
    # For `rloo`: options of TRL's `GRPOConfig` that differ from those of `grpo`: `rec-r1 options baselines.rloo`.
    rloo: dict[str, Any] = field(default_factory=dict)
    # For `prompt_search`: how many completions for training prompts are scored. None: as many as in the recipe's
    # training.
    search_rollouts: int | None = None
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class Recipe:
    """All settings of a run."""

    output_dir: str = "runs/run"  # The run's folder.
    seed: int = 0  # The seed of a training: of LoRA's first weights, samples, and the order of prompts.
    model: ModelConfig = field(default_factory=ModelConfig)
    # Options of PEFT's `LoraConfig`: `rec-r1 options lora`. None trains all weights. `layers_to_transform` may be a
    # range: `15-29`.
    lora: dict[str, Any] | None = None
    task: TaskConfig = field(default_factory=TaskConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    rewards: dict[str, Any] = field(
        default_factory=lambda: {"ndcg@10": 1.0}
    )  # Rewards and their weights: `rec-r1 options rewards`.
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    # How many prompts a step has, on any number of processes. Each has `grpo.num_generations` completions. The batch
    # sizes follow, and `grpo.per_device_train_batch_size` only bounds how many completions a process takes at once.
    # None: the batch sizes of `grpo` count for each process, as in TRL.
    prompts_per_step: int | None = None
    grpo: dict[str, Any] = field(default_factory=dict)  # Options of TRL's `GRPOConfig`: `rec-r1 options grpo`.
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
