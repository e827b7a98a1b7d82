"""vLLM as the generator of a training: the check of its server, greedy completions, and its errors as messages."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rec_r1.config import UserError, refuse
from rec_r1.console import blamed_on
from rec_r1.generation import Sampling, generation_config
from rec_r1.generation.decoding import Completion, Ends
from rec_r1.prompts import ANSWER_END
from rec_r1.runs import processes

logger = logging.getLogger(__name__)
_MODULES = ("vllm.", "trl.generation.vllm_")  # An exception that passes through one of these modules is vLLM's.
_RETRY = 2.0  # seconds between two attempts to reach the server
_ANSWER = 10.0  # seconds after which an attempt to reach the server has failed


def serve_command(model: str, tokens: int) -> str:
    """The command that starts a vLLM server for a training: the one that TRL 1.16 names in place of `trl vllm-serve`.

    model: the recipe's `model.name`.
    tokens: the largest number of tokens of a prompt and its completion.
    """
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} --max-model-len {tokens} "
        """--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs"""
    )


def is_colocated(args: Any) -> bool:
    """Whether vLLM runs inside the processes of a training, on the same GPUs. args: the `trl.GRPOConfig`."""
    return bool(args.use_vllm and args.vllm_mode == "colocate")


def server_url(args: Any) -> str:
    """The address at which TRL looks for the vLLM server. args: the `trl.GRPOConfig`."""
    return str(args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}").rstrip("/")


def check_server(args: Any, model: str, tokens: int, patience: float = 0.0) -> None:
    """Check that the vLLM server of a training runs, and that it can take the policy's weights.

    Nothing is checked unless the recipe uses a server (`grpo.vllm_mode: server`). The trainer would find the same
    problems only after loading the weights. A server does not report the shapes of its weights, so a model with another
    name only causes a warning. If the shapes differ, the server itself refuses the first weights that it gets.

    args: the `trl.GRPOConfig`.
    model: the recipe's `model.name`.
    tokens: the largest number of tokens of a prompt and its completion.
    patience: how many seconds to wait for a server that is not up yet.

    Raises UserError with all problems: of the server, and of this machine if it has no CUDA device.
    """
    if not (args.use_vllm and args.vllm_mode == "server"):
        return
    device = []
    if args.device.type != "cuda":
        patience = 0.0  # The training cannot begin in any case.
        device.append(
            f"grpo.vllm_mode: server: TRL sends the weights to the server by NCCL, which needs a CUDA device, and this "
            f"training runs on {args.device.type}: set grpo.vllm_mode=colocate, or grpo.use_vllm=false"
        )
    try:
        _await_server(server_url(args), patience, serve_command(model, tokens))
        found = _server_problems(args, model, tokens)
    except UserError as error:
        found = [str(error)]
    refuse([*found, *device])


def _await_server(url: str, patience: float, command: str) -> None:
    """Wait until the server at ``url`` says that it is healthy. Raises UserError after ``patience`` seconds.

    Without this check, TRL would wait forever for a server that answers, but is no vLLM server.
    """
    import requests

    until = time.monotonic() + patience
    while True:
        try:
            status = requests.get(f"{url}/health", timeout=_ANSWER).status_code
            problem = f"answers {status} to {url}/health, so it is no vLLM server, or not up yet"
        except requests.RequestException as error:
            status, problem = 0, f"cannot be reached ({type(error).__name__})"
        if status == 200:
            return
        if time.monotonic() >= until:
            waited = f", even after {patience:g} seconds" if patience else ""
            raise UserError(
                f"grpo.vllm_mode: server: the server at {url} {problem}{waited}: start it with "
                f"{command}, or set grpo.vllm_server_base_url, or grpo.vllm_mode=colocate"
            )
        time.sleep(min(_RETRY, max(0.0, until - time.monotonic())))


def _server_problems(args: Any, model: str, tokens: int) -> list[str]:
    """One line for each property of a running server that does not fit the training."""
    from trl.generation.vllm_client import VLLMClient

    url, command = server_url(args), serve_command(model, tokens)
    where = f"grpo.vllm_mode: server: the server at {url}"
    with blamed_on(where):  # TRL's client raises errors of many types, and they name the flag that is missing.
        info = VLLMClient(base_url=url).get_server_info()
        served = info["model_config"]
        length, mode, transfer = int(served["max_model_len"]), served["logprobs_mode"], info["weight_transfer_config"]
    if Path(served["model"]).name.lower() != Path(model).name.lower():
        logger.warning(
            "the server at %s has the model %s, and the recipe trains %s: restart it if these are different models: %s",
            url, served["model"], model, command,
        )  # fmt: skip
    found = []
    if transfer is None:
        found.append(f"{where} has no weight-transfer engine: restart it: {command}")
    if length < tokens:
        found.append(
            f"{where} takes {length} tokens, and the longest prompt with its completion has {tokens}: restart it: "
            f"{command}"
        )
    if mode != "processed_logprobs" and args.vllm_importance_sampling_correction:
        found.append(
            f"{where} has --logprobs-mode {mode}, so its probabilities are those before the temperature, and "
            f"grpo.vllm_importance_sampling_correction would weight completions wrongly: restart it: {command}"
        )
    return found


@contextlib.contextmanager
def blaming_vllm(args: Any) -> Iterator[None]:
    """Turn the exceptions that vLLM, or TRL's connection to it, raises in the body into a UserError of one line.

    All other exceptions pass, and so do those of a lost connection to another process of the training.

    args: the `trl.GRPOConfig`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # TRL's modules for vLLM also connect the processes, and a process that has ended is not vLLM's error.
        if not args.use_vllm or not _passed_vllm(error) or processes.is_lost(error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"grpo.vllm_mode: {args.vllm_mode}: {type(error).__name__}: {text}: {_fix(args)}") from error


def _passed_vllm(error: BaseException) -> bool:
    names = (str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f"{name}.".startswith(_MODULES) for name in names)


def _fix(args: Any) -> str:
    if args.vllm_mode == "server":
        return (
            f"look into the output of the server at {server_url(args)}, restart it, and continue with --resume if a "
            "checkpoint was saved"
        )
    return (
        "if the GPU's memory is full, change grpo.vllm_gpu_memory_utilization or set grpo.vllm_enable_sleep_mode=true; "
        "if a port is in use, set MASTER_PORT to a free one; grpo.use_vllm=false generates without vLLM"
    )


def complete_greedily(trainer: Any, asked: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
    """Greedy completions by the vLLM of a training, colocated or on a server, with the policy's present weights.

    Every process must call it with equally many prompts, because TRL hands each process an equal share of the
    completions. In float32 the completions are those of `decoding.decode`. In bfloat16 the two may differ where two
    tokens have nearly the same probability.

    trainer: a `trl.GRPOTrainer` with `use_vllm`.
    asked: P lists of token ids, none of them empty. P is equal on all processes.
    sampling: how completions are generated: greedily.

    Returns the completions in the order of the prompts.
    """
    engine, tokenizer = trainer.vllm_generation, trainer.processing_class
    how = generation_config(sampling, tokenizer, trainer.model.generation_config.eos_token_id)
    engine.sync_weights()
    of_rollouts = engine.generation_kwargs
    engine.generation_kwargs = greedy_options(how, sampling.end)  # These override all other options of the engine.
    try:
        _, found, _, _ = engine.generate([list(ids) for ids in asked], None, 1)
    finally:
        engine.generation_kwargs = of_rollouts
    # The engine cannot stop at every end that `prompts.ENDS` knows, so what it wrote after the end is cut off.
    ends = Ends(tokenizer, how.eos_token_id, sampling.end, how.stop_strings or ())
    return [ends.completion(list(ids)) for ids in found]


def greedy_options(how: Any, end: str | None) -> dict[str, Any]:
    """The sampling parameters of vLLM for greedy decoding.

    how: a `transformers.GenerationConfig`, from `generation_config`.
    end: a key of `prompts.ENDS`, which ends a completion. vLLM stops at the end "tag" only.
    """
    options: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": how.repetition_penalty or 1.0,
        "max_tokens": how.max_new_tokens,
        "min_tokens": how.min_new_tokens or 0,
        "stop_token_ids": list(dict.fromkeys(how.eos_token_id)),
    }
    stop = [*(how.stop_strings or ()), *([ANSWER_END] if end == "tag" else [])]
    return options | ({"stop": stop, "include_stop_str_in_output": True} if stop else {})
