"""The Modelfile with which Ollama completes the prompts of a run as its policy does."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rec_r1.config import Recipe
from rec_r1.generation import sampling_of

logger = logging.getLogger(__name__)
LONGEST_CONTEXT = 8192  # Ollama reserves memory for all of it, and its own default may be shorter than a prompt.
_SYSTEM, _USER, _ANSWER, _NEXT = "xqsystemqx", "xquserqx", "xqanswerqx", "xqnextqx"


@dataclass(frozen=True)
class ChatParts:
    """The fixed texts of a chat template, between which the contents of messages stand.

    default: what a conversation without a system message begins with.
    system, user, assistant: the texts before and after the content of such a message.
    end: what follows the last message, where the answer begins.
    """

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    end: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation, whose system message comes first if there is one."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        told = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = around[message["role"]]
            told += before + message["content"] + after
        return told + self.end

    def ollama(self) -> str:
        """The conversation as a template of Ollama, which is one of Go's text/template."""
        (s0, s1), (u0, u1), (a0, a1) = (tuple(map(_literal, pair)) for pair in (self.system, self.user, self.assistant))
        return (
            f"{{{{ if .System }}}}{s0}{{{{ .System }}}}{s1}{{{{ else }}}}{_literal(self.default)}{{{{ end }}}}"
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{u0}{{{{ .Content }}}}{u1}'
            f'{{{{ else if eq .Role "assistant" }}}}{a0}{{{{ .Content }}}}{a1}{{{{ end }}}}{{{{ end }}}}'
            f"{_literal(self.end)}"
        )


def chat_parts(tokenizer: Any, chat: Mapping[str, Any]) -> ChatParts | None:
    """The fixed texts of a tokenizer's chat template. None where the
    template does more than write fixed texts around the contents.

    chat: arguments of the chat template.
    """

    def rendered(messages: Sequence[Mapping[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chat))

    user, system, answer, following = (
        {"role": role, "content": content}
        for role, content in (("user", _USER), ("system", _SYSTEM), ("assistant", _ANSWER), ("user", _NEXT))
    )
    try:
        first, last = rendered([user]).split(_USER)
        before, after_system = rendered([system, user]).split(_USER)[0].split(_SYSTEM)
        after_user, rest = rendered([user, answer, following]).split(_USER)[1].split(_ANSWER)
        after_answer = rest.split(_NEXT)[0]
    except Exception as error:  # A template may raise whatever it likes, for example for a system message.
        logger.warning("the chat template takes no system message or no example (%s)", " ".join(str(error).split()))
        return None
    # Texts between two contents are cut anywhere that serves all conversations.
    head = _common_end([first, after_system, after_answer])
    tail = _common_start([after_user, last])
    parts = ChatParts(
        default=first.removesuffix(head),
        system=(before, after_system.removesuffix(head)),
        user=(head, tail),
        assistant=(after_user.removeprefix(tail), after_answer.removesuffix(head)),
        end=last.removeprefix(tail),
    )
    told = ([user], [system, user], [user, answer, following], [system, user, answer, following])
    return parts if all(parts.render(messages) == rendered(messages) for messages in told) else None


def text(recipe: Recipe, tokenizer: Any, ends: int | Sequence[int] | None, source: str, context: int | None) -> str:
    """The Modelfile's text.

    recipe: the recipe of the run.
    tokenizer: the policy's tokenizer.
    ends: the ids of the tokens that end a completion.
    source: what Ollama reads the weights from: a GGUF file, or "." for the safetensors beside the Modelfile.
    context: the longest context of the model, in tokens. None = not known.
    """
    options = sampling_of(recipe).options
    stops = [tokenizer.decode([end]) for end in ([ends] if isinstance(ends, int) else ends or [])]
    lines = [f"FROM {source}", "PARAMETER temperature 0"]
    lines.append(f"PARAMETER repeat_penalty {float(options.get('repetition_penalty') or 1.0):g}")  # Ollama's own is 1.1
    lines.append(f"PARAMETER num_predict {options['max_new_tokens']}")
    if context is not None:
        lines.append(f"PARAMETER num_ctx {min(context, LONGEST_CONTEXT)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    template = _template(recipe, tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"


def _template(recipe: Recipe, tokenizer: Any) -> str | None:
    """The template. None where Ollama has to find it by itself, with a warning."""
    if not recipe.format.chat:
        return "{{ .Prompt }}"
    parts = chat_parts(tokenizer, sampling_of(recipe).chat)
    if parts is None or '"""' in parts.ollama():
        logger.warning("Modelfile: the chat template cannot be written as Ollama's: compare its prompts with the run's")
        return None
    begin = tokenizer.bos_token
    if begin and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:  # Ollama adds it again.
        system = (parts.system[0].removeprefix(begin), parts.system[1])
        parts = ChatParts(parts.default.removeprefix(begin), system, parts.user, parts.assistant, parts.end)
    return parts.ollama()


def _literal(fixed: str) -> str:
    """A text that Go's templates print as it is."""
    return fixed.replace("{{", '{{ "{{" }}')


def _common_start(texts: Sequence[str]) -> str:
    places = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in places)


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]
