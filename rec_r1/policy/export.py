"""`rec-r1 export`: a trained policy as one model that transformers, vLLM and Ollama load."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from rec_r1 import models
from rec_r1.config import UserError
from rec_r1.generation.lengths import context_length
from rec_r1.pages import hub
from rec_r1.policy import modelfile, recipe_of
from retrievers.core.index_folder import new_folder

logger = logging.getLogger(__name__)
CONVERTER = "convert_hf_to_gguf.py"
GGUF_FILE = "policy.gguf"
_GGUF_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_HOW_TO_GET_IT = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp, then add --converter llama.cpp/convert_hf_to_gguf.py"
)


def export(
    run: Path, folder: Path, dtype: str = "float32", gguf: bool = False, converter: Path | None = None
) -> list[str]:
    """Write the best policy of a run as one model: safetensors, tokenizer, generation settings, card and Modelfile.

    run: the run's folder.
    folder: where the files go. It appears once all of them are written.
    dtype: the type of the weights: float32, bfloat16 or float16. In the two short ones small updates are rounded away.
    gguf: whether llama.cpp's converter also writes a GGUF file, from which the Modelfile is then made.
    converter: the path of that converter. None = the one on PATH.

    Returns lines that say what was written and how it is loaded. Raises UserError where `hub.check` does, and where
    the converter is missing or fails.
    """
    hub.check(run, folder)
    found = find_converter(converter) if gguf or converter is not None else None
    recipe = recipe_of(run)
    logger.info("merging the policy of %s in %s, into %s", run, dtype, folder)
    with new_folder(folder) as temporary:
        hub.export(run, temporary, merged=dtype)
        if found is not None:
            convert(found, temporary, temporary / GGUF_FILE, _GGUF_TYPES[dtype])
        tokenizer = models.load_tokenizer(str(temporary), recipe.model.trust_remote_code)
        context = context_length(models.load_config(str(temporary), recipe.model.trust_remote_code))
        source = f"./{GGUF_FILE}" if found is not None else "."
        text = modelfile.text(recipe, tokenizer, models.token_ids(str(temporary))["eos_token_id"], source, context)
        (temporary / "Modelfile").write_text(text, encoding="utf-8")
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    name = run.resolve().name
    ask = f"rec-r1 ask {run} QUERY --model {name} --endpoint"
    return [
        f"merged weights ({dtype}, {size / 1e6:,.0f} MB){' and ' + GGUF_FILE if found is not None else ''} in {folder}",
        f"vLLM:    vllm serve {folder} --served-model-name {name}    then {ask} http://localhost:8000/v1",
        f"Ollama:  ollama create {name} -f {folder / 'Modelfile'}    then {ask} http://localhost:11434/v1",
    ]


def find_converter(given: Path | None) -> Path:
    """llama.cpp's converter. given: its path; None = the one on PATH. Raises UserError where there is none."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"--converter {given}: no such file: {_HOW_TO_GET_IT}")
        return given
    on_path = shutil.which(CONVERTER)
    if on_path is None:
        raise UserError(f"--gguf: llama.cpp's {CONVERTER} is not on PATH: {_HOW_TO_GET_IT}")
    return Path(on_path)


def convert(converter: Path, folder: Path, output: Path, kind: str) -> None:
    """Write a GGUF file. kind: the type of its weights, such as f16. Raises UserError where the converter fails."""
    logger.info("converting into %s", output.name)
    command = [sys.executable, str(converter), str(folder), "--outfile", str(output), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not output.is_file():
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it says nothing")
        raise UserError(
            f"--converter {converter}: it fails ({said.strip()[:300]}): install llama.cpp's "
            "requirements/requirements-convert_hf_to_gguf.txt, or leave --gguf out"
        )
