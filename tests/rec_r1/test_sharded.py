"""Trainings whose weights are sharded over two processes, by FSDP2 or by ZeRO-3, on CPUs.

For each of the two, one launch makes all runs that the tests look at.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from forks import FORKS_OF_A_LAUNCHER, Fork, finish

import rec_r1
from rec_r1 import cli, config, runs
from rec_r1.environment import open_environment
from rec_r1.runs import checkpoints

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'rec-r1[zero]'; see tests/README.md",
)
SETTINGS = [
    "model.dtype=float32", "evaluation.every_steps=1", "evaluation.validation_limit=9", "evaluation.batch_size=4",
    "evaluation.test_limit=6", "evaluation.metrics=[ndcg@10, sharded_on_cpu.written]",
    "prompts_per_step=null", "grpo.per_device_train_batch_size=4", "grpo.num_generations=4",
    "grpo.max_completion_length=6", "grpo.save_steps=1", "grpo.max_steps=2", "grpo.learning_rate=1e-2",
    "grpo.lr_scheduler_type=constant", "grpo.disable_tqdm=true", "retriever.kind=dense",
]  # fmt: skip
# With all weights, the loss also reads a reference model, as in the paper.
KINDS = {
    "full": ["lora=null", "grpo.beta=0.001"],
    "lora": ["lora={r: 4, target_modules: [q_proj, v_proj, down_proj]}", "grpo.learning_rate=0.5"],
}


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def trained(request, tiny_model, tiny_encoder, tmp_path_factory) -> Path:
    """A folder with the runs `full` and `lora` of two steps, `full_cut` and `lora_cut`, which end after the first step
    and are resumed, and `ends`, in which completions end at random tokens. `printed` is what the launch printed."""
    folder = tmp_path_factory.mktemp(request.param)
    trainings = []

    def add(name: str, kind: str, *more: str) -> None:
        where = [
            f"model.name={tiny_model}",
            f"output_dir={folder / name}",
            f"retriever.params={{model: {tiny_encoder}}}",
        ]
        trainings.append(["quickstart", *where, *SETTINGS, *KINDS[kind], *more])

    for kind in KINDS:
        add(kind, kind)
        add(f"{kind}_cut", kind, "grpo.max_steps=1")
        add(f"{kind}_cut", kind, "--resume")
    # The token 1 ends a completion, and each next token is this one with a probability of about one half.
    add("ends", "lora", "grpo.generation_kwargs={sequence_bias: [[[1], 6.0]]}", "grpo.max_completion_length=16")
    launch = ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
    launch += [f"--config_file={ROOT / 'recipes' / 'accelerate' / f'{request.param}.yaml'}"]
    command = [*launch, str(Path(__file__).parent / "sharded_on_cpu.py"), json.dumps(trainings)]
    launcher = Fork("accelerate.commands.launch", command, folder / "printed", ROOT, **FORKS_OF_A_LAUNCHER)
    (printed,) = finish([launcher], 900)
    assert launcher.code == 0, printed[-6000:]
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def both_processes(run: Path) -> list[dict]:
    return [row for name in ("rollouts.jsonl", "rollouts.rank1.jsonl") for row in rows(run / name)]


def held_out(run: Path) -> dict[int, float]:
    """The mean of `written` over the held-out completions, by step."""
    return {row["step"]: row["eval/written"] for row in rows(run / "metrics.jsonl") if "eval/written" in row}


def test_every_training_ends_with_its_table(trained):
    output = (trained / "printed").read_text()
    assert output.count("policy, curves and transcripts") == 7 and "Traceback" not in output
    for kind in KINDS:
        tables = json.loads((trained / kind / "evaluation" / "test" / "comparison.json").read_text())["tables"]
        assert {row["system"] for row in tables[0]["rows"]} == {"raw query", "untrained", "trained"}


@pytest.mark.parametrize("kind", KINDS)
def test_best_opens_unsharded_and_answers_as_inside_training(trained, kind, capsys):
    run = trained / kind
    best, inside = runs.best_record(run), held_out(run)
    assert checkpoints.weights_problem(run / "best") is None
    assert (run / "best" / "adapter_config.json").is_file() == (kind == "lora")
    assert {path.suffix for path in (run / "best").iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    policy = rec_r1.Policy.load(run)
    queries = policy.env.task.validation.queries[:9]
    answers = policy.complete(queries)
    assert np.mean([written_of(answer) for answer in answers]) == pytest.approx(inside[best["step"]], abs=1e-6)
    assert inside[best["step"]] != pytest.approx(inside[0], abs=1e-3)  # Training changed what is written.
    assert cli.main(["ask", str(run), queries[0], "--k", "3"]) == 0
    assert queries[0] in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(trained, kind):
    from safetensors.numpy import load_file

    whole, cut = trained / kind, trained / f"{kind}_cut"
    said = [[(row["step"], row["completion"], row["reward"]) for row in both_processes(run)] for run in (whole, cut)]
    assert said[0] == said[1] and {step for step, *_ in said[0]} == {0, 1}
    assert held_out(whole) == held_out(cut)
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    expected, found = (load_file(run / "checkpoint-2" / name) for run in (whole, cut))
    assert expected.keys() == found.keys()
    for weight in expected:
        np.testing.assert_array_equal(expected[weight], found[weight], err_msg=weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_whole_in_every_process(trained, kind):
    """The rewards of both processes are those of a process that shards nothing."""
    env = open_environment(config.load(trained / kind / config.RUN_FILE))
    train = env.task.train
    place = {query: i for i, query in enumerate(train.queries)}
    found = both_processes(trained / kind)
    asked = train.take([place[row["query"]] for row in found])
    scored = env.scorer.score_split([row["completion"] for row in found], asked)
    assert len({row["reward"] for row in found}) > 1
    np.testing.assert_allclose(scored.rewards, [row["reward"] for row in found], rtol=0, atol=1e-6)


def test_processes_whose_completions_end_at_different_tokens(trained):
    lengths = {}
    for rank, name in enumerate(("rollouts.jsonl", "rollouts.rank1.jsonl")):
        lengths[rank] = [len(row["completion"]) for row in rows(trained / "ends" / name)]
    assert len(lengths[0]) == len(lengths[1]) == 8 and max(lengths[0][:4]) != max(lengths[1][:4])


def written_of(completion: str) -> float:
    from sharded_on_cpu import written

    from rewards import Outcome

    none = np.zeros((1, 1), np.float32)
    return float(written(Outcome([completion], [None], none.astype(np.int32), none))[0])
