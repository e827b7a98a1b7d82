"""Find the secrets in settings and texts, and replace them.

A recipe in memory may hold a secret. No file, page, log or message may: `config.dump`, the pages, the model card and
the console all call :func:`redact` or :func:`redact_text`. A redacted setting counts as not set when it is read again.
The user gives it again on the command line, or writes `$NAME`, which refers to an environment variable.

The parameters in LITERAL are kept as they are, because their keys are names that the user chose, such as those of the
fields of an index, and say nothing about the values. `engine_queries.py` refuses secrets in them when a recipe is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MARK = "<redacted>"
# Kind of a retriever, or name of a task -> the parameters whose keys are names of the user's own.
LITERAL = {
    **dict.fromkeys(("bm25", "tantivy", "postgres"), ("fields",)),
    **dict.fromkeys(("opensearch", "elasticsearch"), ("fields", "template", "filter")),
    **dict.fromkeys(("catalog", "esci"), ("grades",)),
}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_NAMES = {
    "password", "passwd", "passphrase", "pwd", "secret", "credential", "authorization", "bearer", "apikey", "jwt",
    "authtoken", "accesstoken", "secretkey", "accesskey", "privatekey", "cookie", "signature",
}  # fmt: skip
_SECRET_WHOLE_NAMES = {"auth", "pass", "sig", "pat"}  # These are secrets only where one of them is the whole name.
# Words before "token" that make it a special token of a vocabulary, or a number of tokens, and not a secret.
_PLAIN_TOKENS = {
    "eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "vision", "start", "end", "stop",
    "special", "prefix", "suffix", "begin", "per", "max", "min", "new", "next", "first", "last", "think", "boi", "eoi",
    "decoder", "fim", "tool", "assistant", "system", "response",
}  # fmt: skip
_SECRET_TOKENS = {"auth", "access", "api", "hub", "bearer", "refresh", "session", "hf"}  # Words before "tokens".
_PLAIN_KEYS = {  # Words before "key" that make it an ordinary setting.
    "sort", "primary", "foreign", "cache", "label", "text", "id", "item", "user", "column", "group", "order", "index",
    "partition", "row", "dict", "json", "title", "query", "config", "public", "input", "output", "field", "name",
    "main", "target", "image", "metric", "join", "merge", "feature", "prompt", "doc", "document", "answer",
}  # fmt: skip
_REFERENCE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
# Every repetition below is bounded, or ends at a character that it excludes, so that matching takes linear time.
_VALUE = r"""(\\?"[^"\n]*"|'[^'\n]*'|\[[^\]\n]*\]|[^\s,;&"'{}\[\]\\]+)"""
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/?#@]+(?:@[^\s/?#@]+)*|[^\s/?#@:]*:[^\s@?#]+)@")
_SCHEME = re.compile(r"([A-Za-z][\w+.-]*)://$")
_WEB = ("http", "https", "ws", "wss")  # Also git+https and the like.
_ASSIGNED = re.compile(rf"(?<![\w.-])([\w.-]{{1,80}})(\s{{0,4}}=\s{{0,4}}){_VALUE}")
_OPTION = re.compile(rf"(?<![\w-])--([\w-]{{1,80}})(\s{{1,4}}){_VALUE}")
# This matches "api_key: abc123" in a message of a server or a library, but not "token: unknown parameter".
_AFTER_COLON = re.compile(
    r"(?<![\w.-])([\w-]{1,80})(:\s{1,4})((?=[^\s,;]{0,200}\d)[^\s,;{}\[\]\"']{4,}|[^\s,;{}\[\]\"']{16,})"
)
_QUOTED = re.compile(rf"""(?<=["'])([\w.-]{{1,80}})(["']\s{{0,4}}:\s{{0,4}}){_VALUE}""")
_MAPPED = re.compile(rf"(?:(?<=[{{,])|(?<=, ))([\w.-]{{1,80}})(\s?:\s){_VALUE}")
_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization\s{0,4}[:=]\s{0,4}|bearer\s{1,4}(?=\S{16}))[^\r\n\"',}]+")
_SHAPES = re.compile(
    r"(?<![\w/.-])(?:hf_[A-Za-z0-9]{16,}|sk-(?:[a-z0-9]{2,12}-){0,2}(?=[A-Za-z_]{0,200}\d)[A-Za-z0-9_]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)


def is_secret(name: str) -> bool:
    """Whether the value of a setting, header or query parameter is a secret, judged by its name.

    hub_token, apiKey and X-Api-Key are names of secrets. key_variable, eos_token and max_tokens are not.
    """
    words = [word.lower() for word in _WORDS.findall(name.rpartition(".")[2])]
    while words and words[-1] in ("value", "string", "header"):
        words.pop()
    if not words:
        return False
    *before, last = words
    previous = before[-1] if before else ""
    if last == "tokens":
        return previous in _SECRET_TOKENS
    last = last.removesuffix("s") if last not in _SECRET_NAMES and last != "pass" else last
    if last == "token":
        return previous not in _PLAIN_TOKENS
    if last == "key":
        return previous not in _PLAIN_KEYS
    return (
        last in _SECRET_NAMES
        or last.endswith(("password", "secret", "apikey"))
        or (last in _SECRET_WHOLE_NAMES and not before)
    )


@dataclass(frozen=True)
class _Taken:
    """The value of a literal parameter, which no other function looks into."""

    value: Any


def take_out(tree: Any) -> Any:
    """``tree`` with each literal parameter of a `{kind: …, params: …}` or `{name: …, params: …}` as one value, which
    compares as the parameter does."""
    if isinstance(tree, list | tuple):
        return [take_out(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    taken = {key: take_out(value) for key, value in tree.items()}
    kind, params = tree.get("kind", tree.get("name")), tree.get("params")
    if isinstance(kind, str) and isinstance(params, dict):
        taken["params"] |= {name: _Taken(params[name]) for name in LITERAL.get(kind, ()) if name in params}
    return taken


def put_back(tree: Any) -> Any:
    """The inverse of :func:`take_out`."""
    if isinstance(tree, _Taken):
        return tree.value
    if isinstance(tree, dict):
        return {key: put_back(value) for key, value in tree.items()}
    return [put_back(value) for value in tree] if isinstance(tree, list) else tree


def except_literals(change: Callable[[Any], Any], tree: Any) -> Any:
    """``change(tree)``, in which the literal parameters are what they are in ``tree``.

    change: a function of mappings, lists and values. It must return values that it does not know unchanged.
    """
    return put_back(change(take_out(tree)))


def literals(tree: Any) -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of each literal parameter in ``tree``."""
    return ((name, found.value) for name, found in leaves(take_out(tree)) if isinstance(found, _Taken))


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name of every value in nested mappings and lists, such as retriever.params.filter[0], and the value.

    name: that of ``tree``. "" = it has none.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from leaves(value, f"{name}[{place}]")
    else:
        yield name, tree


def redact(tree: Any) -> Any:
    """``tree`` (mappings, lists and values of a recipe) with every secret replaced by MARK.

    A reference to an environment variable is kept, because it is no secret. Prompts are kept, because each of their
    characters changes what a model writes. So are the literal parameters of a retriever or a task, where ``tree`` has
    its kind or name beside its `params`.
    """
    return except_literals(_redacted, tree)


def _redacted(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            key: MARK if _hidden(str(key), value) else value if _is_prompt(key, value) else _redacted(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_redacted(value) for value in tree]
    return redact_leaf(tree) if isinstance(tree, str) else tree


def _hidden(name: str, value: Any) -> bool:
    """Whether the whole value of this setting is a secret."""
    if value is None or isinstance(value, bool) or value in ("", MARK) or not is_secret(name):
        return False
    if "." in name:  # This is the path of a user's own reward or task, not the name of a setting.
        return False
    if isinstance(value, int | float):
        return name.lower().endswith(("password", "passwd", "pwd", "pass", "pin"))
    return not (isinstance(value, str) and (_REFERENCE.fullmatch(value) or _is_ordinary(name, value)))


def _is_prompt(name: Any, value: Any) -> bool:
    return name in ("prompt", "system") and isinstance(value, str)


def _is_ordinary(name: str, value: str) -> bool:
    """Whether the value of a setting called `key` is no secret, such as a column name: it is short or holds blanks."""
    return name.lower() in ("key", "keys") and (len(value) < 16 or bool(re.search(r"\s", value)))


def _is_secret_user(match: re.Match[str]) -> bool:
    """Whether the part of a URL before the @ is a secret. With a password it is. On the web it may be a token alone. In
    the address of a database a user alone is no secret, and a run's file needs it to name the same database."""
    scheme = _SCHEME.search(match.string[max(0, match.start() - 20) : match.start()])
    return ":" in match.group() or scheme is None or scheme[1].lower().endswith(_WEB)


def _hide_user(match: re.Match[str]) -> str:
    return f"{MARK}@" if _is_secret_user(match) else match.group()


def redact_leaf(text: str) -> str:
    """The text of any setting, with secrets redacted that show by a URL, by a header, or by their shape."""
    text = _SHAPES.sub(MARK, _HEADER.sub(rf"\1{MARK}", _USER_INFO.sub(_hide_user, text)))
    return _ASSIGNED.sub(_mark_value, text) if "://" in text and not re.search(r"\s", text) else text


def redact_text(text: str) -> str:
    """A message with every secret replaced by MARK.

    Secrets are the values of named ones (`hub_token=…`, `'api_key': …`), passwords in URLs, authorization headers, and
    keys of a known shape.
    """
    for pattern in (_ASSIGNED, _QUOTED, _MAPPED, _OPTION, _AFTER_COLON):
        text = pattern.sub(_mark_value, text)
    return _SHAPES.sub(MARK, _HEADER.sub(rf"\1{MARK}", _USER_INFO.sub(_hide_user, text)))


def _mark_value(match: re.Match[str]) -> str:
    value = match[3].strip("\"'\\")
    plain = not is_secret(match[1]) or _REFERENCE.fullmatch(value) or _is_ordinary(match[1], value)
    return match.group() if plain else f"{match.group()[: -len(match[3])]}{MARK}"


def secret_values(tree: Any, hidden: bool = False) -> Iterator[str]:
    """The secrets in ``tree`` as texts. hidden: whether all of ``tree`` is secret."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from secret_values(value, hidden or _hidden(str(key), value))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from secret_values(value, hidden)
    elif hidden and str(tree):
        yield str(tree)


def shown(name: str, value: Any) -> str:
    """The value of a setting for a message: its repr without secrets."""
    return repr(redact({name: value})[name])


def settled(tree: Any) -> Any:
    """``tree`` without its secrets, as it would be read back from a file. Two recipes are compared in this form."""
    return without_marks(redact(tree))


def without_marks(tree: Any) -> Any:
    """``tree`` without redacted settings, which count as not set."""
    return except_literals(_without_marks, tree)


def _without_marks(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_marks(value) for key, value in tree.items() if value != MARK}
    if isinstance(tree, list):
        return [_without_marks(value) for value in tree if value != MARK]
    return tree


def secret_urls(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings whose value is a URL that holds a user, a password or a key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from secret_urls(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from secret_urls(value, prefix)
    elif isinstance(tree, str) and "://" in tree and not re.search(r"\s", tree):
        user = _USER_INFO.search(tree)
        if (user and _is_secret_user(user)) or any(is_secret(m[1]) for m in _ASSIGNED.finditer(tree)):
            yield prefix


def from_environment(tree: Any, missing: Callable[[str], Exception], name: str = "") -> Any:
    """``tree`` with every secret such as `token: $MY_TOKEN` replaced by the value of its environment variable.

    tree: mappings, lists and values. Literal parameters stay as they are.
    missing: makes the exception that is raised, from its message, where a variable is not set.
    name: the dotted name of ``tree``, for that message.
    """
    return except_literals(lambda outside: _from_environment(outside, missing, name), tree)


def _from_environment(tree: Any, missing: Callable[[str], Exception], name: str) -> Any:
    if isinstance(tree, dict):
        return {
            key: _from_environment(value, missing, f"{name}.{key}" if name else str(key)) for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_from_environment(value, missing, name) for value in tree]
    match = _REFERENCE.fullmatch(tree) if isinstance(tree, str) and is_secret(name) else None
    if match is None:
        return tree
    variable = match[1] or match[2]
    if not os.environ.get(variable):
        raise missing(f"{name}: ${variable} is not set: export it, or give the value on the command line")
    return os.environ[variable]


_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)?")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` without terminal escapes, control characters, and marks that change the reading direction.

    Line feeds and tabs are kept.
    """
    return _CONTROL.sub("", _ESCAPES.sub("", text))
