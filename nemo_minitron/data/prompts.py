"""Prompts of ``generate``: read, put into a chat template, and checked against the context."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from nemo_minitron.checkpoint.hf_refusals import refuse_pointer
from nemo_minitron.config.inference import GenerateConfig
from nemo_minitron.data.chat import refusals_of_template, template_on_one_day
from nemo_minitron.data.formats import line_that_is_no_text
from nemo_minitron.data.records import check_characters, parse_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Chat = list[dict[str, str]]
"""Messages, each with its role and content."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        line: where it is in the file, counted from 1.
        text: what the model reads, chat template included.
        ids: the same as tokens.
    """

    line: int
    text: str
    ids: list[int]


def read_prompts(
    cfg: GenerateConfig, tokenizer: "PreTrainedTokenizerFast", context: int
) -> list[Prompt]:
    """Return every prompt of ``cfg.prompts``, empty lines left out.

    Args:
        cfg: the stage.
        tokenizer: of the model.
        context: tokens that the model has positions for.

    Raises:
        ValueError: the file is missing, empty, of an unknown form or not UTF-8; a record is no
            prompt; there is no chat template, or it refuses one; a prompt leaves no room in the
            context.
    """
    path = Path(cfg.prompts)
    if path.suffix.lower() not in (".txt", ".jsonl") or not path.is_file():
        why = "does not exist" if not path.exists() else "is not one"
        raise ValueError(
            f"prompts={path} must be a .txt file (one prompt per line) or a .jsonl file; it {why}"
        )
    refuse_pointer(path)
    if cfg.chat_template and not tokenizer.chat_template:
        raise ValueError(
            "chat_template=true, but the tokenizer of checkpoint="
            f"{cfg.checkpoint} has none; set chat_template=false, or import the model from a "
            "source with a chat template"
        )
    found = [
        _prompt(number, asked, cfg, tokenizer, context) for number, asked in _records(cfg, path)
    ]
    if not found:
        raise ValueError(f"prompts={path} holds no prompt: every line is empty")
    return found


def _records(cfg: GenerateConfig, path: Path) -> Iterator[tuple[int, str | Chat]]:
    """Line number and prompt: text or messages."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if text := line.strip():
                    where = f"prompts={path}, line {number}"
                    yield (
                        number,
                        _field(text, cfg, where) if path.suffix.lower() == ".jsonl" else text,
                    )
    except UnicodeDecodeError as error:
        where = f"prompts={path}{line_that_is_no_text(path)}"
        raise ValueError(
            f"{where} is not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error


def _field(line: str, cfg: GenerateConfig, where: str) -> str | Chat:
    record = parse_record(line, cfg.prompt_key, where)
    if not isinstance(record, dict) or cfg.prompt_key not in record:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where}: no key '{cfg.prompt_key}'; set prompt_key to the key that holds the prompt, "
            f"one of {keys}"
        )
    found = record[cfg.prompt_key]
    if isinstance(found, str) and found.strip():
        return found
    if _is_chat(found) and cfg.chat_template:
        return found
    hint = " (or set chat_template=true for messages)" if _is_chat(found) else ""
    raise ValueError(
        f"{where}: '{cfg.prompt_key}' holds {type(found).__name__}, not text{hint}; set prompt_key "
        "to the key that holds the prompt"
    )


def _is_chat(value: object) -> TypeGuard[Chat]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


def _prompt(
    line: int,
    asked: str | Chat,
    cfg: GenerateConfig,
    tokenizer: "PreTrainedTokenizerFast",
    context: int,
) -> Prompt:
    where = f"prompts={cfg.prompts}, line {line}"
    if cfg.chat_template:
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        with refusals_of_template(where):
            text = str(
                tokenizer.apply_chat_template(
                    messages,
                    chat_template=template_on_one_day(tokenizer),
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
    else:
        assert isinstance(asked, str)  # messages are refused where they are read
        text = asked
    check_characters(text, where)
    # A chat template brings the special tokens itself.
    ids = tokenizer.encode(text, add_special_tokens=not cfg.chat_template)
    new = cfg.sampling.max_new_tokens
    if len(ids) + new > context:
        raise ValueError(
            f"{where}: {len(ids)} tokens and sampling.max_new_tokens="
            f"{new} exceed the {context} positions of the model; shorten the prompt, or lower "
            f"sampling.max_new_tokens to {max(context - len(ids), 0)}"
        )
    return Prompt(line, text, list(ids))
