"""Records of supervised fine-tuning (SFT): token ids, and which of them are the answer's.

A record has ``messages``, rendered by the chat template of the tokenizer, or ``prompt`` and
``completion``. Training counts its loss on the answers alone. ``docs/stages.md`` has examples.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nemo_minitron.data.records import check_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MESSAGES, PROMPT, COMPLETION, TOOLS = "messages", "prompt", "completion", "tools"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ANSWERS = "assistant"
# Where a template marks what the assistant said, as transformers reads it.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# How a template asks for the date, and the one that it gets: what Llama 3 writes when nobody says.
_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
_DAY = date(2024, 7, 26)


class Encoded(NamedTuple):
    """A record as tokens, both arrays ``[tokens]``."""

    ids: np.ndarray
    """int32."""
    answer: np.ndarray
    """bool: true for the tokens that are learnt."""


def is_sft(keys: set[str]) -> bool:
    """Whether keys of a record, or columns of a table, are those of SFT."""
    return MESSAGES in keys or {PROMPT, COMPLETION} <= keys


def read_keys(keys: set[str]) -> tuple[str, ...]:
    """Return columns that are read of a table that has chat records."""
    wanted = (MESSAGES, TOOLS) if MESSAGES in keys else (PROMPT, COMPLETION)
    return tuple(key for key in wanted if key in keys) or (MESSAGES,)


def check_record(record: object, where: str) -> dict[str, Any]:
    """Refuse a record that has no answer to learn.

    Args:
        record: a JSON value, or a row of a table as an object.
        where: begins the messages: key, file and line.

    Returns:
        The record.

    Raises:
        ValueError: names what is missing or unknown.
    """
    if not isinstance(record, dict) or not is_sft(set(record)):
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where}: an SFT record has the key '{MESSAGES}', or '{PROMPT}' and '{COMPLETION}'; "
            f"this one has {has}; set data.records=text for records of plain text"
        )
    if MESSAGES in record:
        _check_messages(record[MESSAGES], where)
        return record
    for key in (PROMPT, COMPLETION):
        if not isinstance(record[key], str):
            raise ValueError(
                f"{where}: '{key}' holds {type(record[key]).__name__}, not text; write "
                f"conversations as '{MESSAGES}'"
            )
        check_characters(record[key], where)
    if not record[COMPLETION].strip():
        raise ValueError(f"{where}: '{COMPLETION}' is empty: there is no answer to learn")
    return record


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: '{MESSAGES}' must be a list of messages, not {messages!r:.40}")
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"{where}, message {number}")
    last = messages[-1]
    if last["role"] != _ANSWERS:
        raise ValueError(
            f"{where}: the last message is of role '{last['role']}', which needs an answer; end "
            f"the messages with one of role '{_ANSWERS}'"
        )


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"{where}: a message is an object with 'role' and 'content'")
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if role not in _ROLES:
        raise ValueError(f"{where}: role {role!r} is unknown; known are {', '.join(_ROLES)}")
    if not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"{where}: 'content' holds {type(content).__name__}, not text")
    if content:
        check_characters(content, where)
    if role == _ANSWERS and not calls and not str(content).strip():
        raise ValueError(f"{where}: the answer is empty: there is nothing to learn")


def encode(record: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", where: str) -> Encoded:
    """Return tokens of a record that ``check_record`` has passed.

    Args:
        record: with messages, or prompt and completion.
        tokenizer: the checkpoint's.
        where: begins the messages.

    Raises:
        ValueError: there is no chat template, or it refuses or leaves out messages.
    """
    if MESSAGES not in record:
        return _completed(record[PROMPT], record[COMPLETION], tokenizer, where)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: the record has messages, and the tokenizer of the checkpoint has no chat "
            "template; import the model from a source with one, or write prompt and completion"
        )
    # Some tools write what a message has not as null.
    messages = [{k: v for k, v in m.items() if v is not None} for m in record[MESSAGES]]
    tools = record.get(TOOLS) or None
    with refusals_of_template(where):
        template = template_on_one_day(tokenizer, tools)
        writes = partial(tokenizer.apply_chat_template, tools=tools, chat_template=template)
        if _MARK.search(template):
            return _marked(messages, writes)
        return _by_prefixes(messages, writes, tokenizer, where)


@contextmanager
def refusals_of_template(where: str) -> Iterator[None]:
    """Let what a chat template raises about messages say where they are, as a ``ValueError``."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # jinja's, of which a template may raise its own
        raise ValueError(f"{where}: the chat template refuses the messages ({error})") from error


def _completed(
    prompt: str, completion: str, tokenizer: "PreTrainedTokenizerFast", where: str
) -> Encoded:
    """Prompt, completion and the token that ends a text.

    A token of both belongs to the answer: with the prompt alone the model has not seen it.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{where}: the tokenizer of the checkpoint names no eos_token")
    alone = tokenizer.encode(prompt) if prompt else []
    ids = [*tokenizer.encode(prompt + completion), tokenizer.eos_token_id]
    if ids[-2] == tokenizer.eos_token_id:  # of a tokenizer that ends texts by itself
        del ids[-1]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids, strict=False)))
    answer = np.arange(len(ids)) >= same
    return Encoded(np.array(ids, np.int32), answer)


def template_on_one_day(tokenizer: "PreTrainedTokenizerFast", tools: Any = None) -> str:
    """Return the chat template, with a fixed date where it asks for that of today.

    The same messages must give the same tokens tomorrow, in another cache and after a restart.
    """
    template = tokenizer.get_chat_template(tools=tools)
    return _TODAY.sub(lambda asked: json.dumps(_DAY.strftime(asked[2])), template)


def _marked(messages: list[Any], writes: Callable[..., Any]) -> Encoded:
    """Encode messages; the answer is what the chat template marks (transformers does it all)."""
    out = writes(messages, return_dict=True, return_assistant_tokens_mask=True)
    return Encoded(np.array(out["input_ids"], np.int32), np.array(out["assistant_masks"], bool))


def _by_prefixes(
    messages: list[Any],
    writes: Callable[..., Any],
    tokenizer: "PreTrainedTokenizerFast",
    where: str,
) -> Encoded:
    """What the assistant's message adds to the text before it, asked to answer, is the answer."""

    def rendered(count: int, ask: bool) -> str:
        return str(writes(messages[:count], tokenize=False, add_generation_prompt=ask))

    text = rendered(len(messages), False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != _ANSWERS:
            _check_rendered(message, text, where)
            continue
        before, after = rendered(number, True) if number else "", rendered(number + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{where}: the chat template writes message {number + 1} otherwise at the end of a "
                "conversation than inside this one, so that its tokens cannot be told; put "
                "{% generation %} marks into the template, or split the record into one for each "
                "answer"
            )
        spans.append((len(before), len(after)))
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(out["offset_mapping"], np.int64).reshape(-1, 2).T
    answer = np.zeros(len(starts), bool)
    for begin, end in spans:  # every token that overlaps a span, as in transformers
        answer |= (ends > begin) & (starts < end)
    return Encoded(np.array(out["input_ids"], np.int32), answer)


def _check_rendered(message: dict[str, Any], text: str, where: str) -> None:
    """Refuse a message that the template leaves out, such as one of a role it does not know."""
    content = str(message.get("content") or "").strip()
    as_json = json.dumps(content, ensure_ascii=False)[1:-1]  # so Llama 3 writes what a tool gave
    if content not in text and as_json not in text:
        raise ValueError(
            f"{where}: the chat template leaves out the message of role '{message['role']}'; take "
            "it out of the record, or give the tokenizer a template that knows the role"
        )
