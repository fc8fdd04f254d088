"""Text -> Megatron's ``.bin``/``.idx`` pair, kept in a cache folder named by what went into it.

The pair is written in two passes: documents are tokenised in file order, then copied in the order
that ``data.seed`` draws, so that Megatron's split into contiguous runs is a random split of
documents. Memory holds a batch of texts, never the corpus.
"""

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO

import numpy as np

from nemo_minitron.checkpoint.manifest import hash_file
from nemo_minitron.checkpoint.tokenizer import AS_READ, TOKENIZER_CONFIG, tokenizer_json
from nemo_minitron.checkpoint.tokenizer_read import has_as_read, load_tokenizer
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.cache import build_for_all
from nemo_minitron.data.formats import suffix_of
from nemo_minitron.data.long_texts import PIECE, encode_long
from nemo_minitron.data.shuffle import copy_documents, document_order
from nemo_minitron.data.splits import check_documents, check_tokens
from nemo_minitron.data.text import Source, no_documents, read_documents, unique_documents
from nemo_minitron.documents import read_json_object
from nemo_minitron.runtime.console import progress

logger = logging.getLogger(__name__)

_FORMAT = 1  # part of every cache key: raise it when the content of a cache folder changes
_PREFIX = "tokens"
_BATCH_CHARACTERS = 1 << 20
HASH_CONTENT_UP_TO = 1 << 30


class TextTokenizer:
    """The checkpoint's tokenizer as plain text -> ids, no special tokens added by itself."""

    def __init__(self, folder: Path) -> None:
        """Read what import kept, or the files of a result of an earlier version.

        Args:
            folder: ``checkpoint/tokenizer`` of a result.

        Raises:
            ValueError: there is no usable tokenizer, or it names no end-of-sequence token.
        """
        from tokenizers import Tokenizer

        if has_as_read(folder):  # which takes no transformers
            self._tokenizer = Tokenizer.from_file(str(tokenizer_json(folder)))
            config = read_json_object(folder / AS_READ / TOKENIZER_CONFIG)
            whole, token = not config.get("split_special_tokens"), config.get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
        else:
            loaded = load_tokenizer(folder)
            self._tokenizer = loaded.backend_tokenizer
            whole, token = not loaded.split_special_tokens, loaded.eos_token
        self._tokenizer.encode_special_tokens = not whole
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eod = None if token is None else self._tokenizer.token_to_id(token)
        if eod is None:
            raise ValueError(
                f"the tokenizer in {folder} names no end-of-sequence token of its vocabulary "
                f"(eos_token={token!r}); set eos_token in its tokenizer_config.json and import the "
                "model again"
            )
        self.eod: int = eod
        """Id of the token that ends every document."""
        text = f"{eod} {whole} {self._tokenizer.to_str()}"
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def text(self, token: int) -> str:
        """Return the text of a token id; empty for special tokens and for unknown ids."""
        found: str = self._tokenizer.decode([token], skip_special_tokens=True)
        return found

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, the end-of-document id appended. int32, ``[tokens + 1]`` each."""
        if max(map(len, texts), default=0) > PIECE:
            return [np.append(encode_long(text, self._ids), np.int32(self.eod)) for text in texts]
        return [np.array([*ids, self.eod], dtype=np.int32) for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def check_text(
    source: Source,
    data: DataConfig,
    splits: Sequence[str] | None,
    tokenizer: TextTokenizer | None,
) -> np.ndarray | None:
    """Read a text source whole and refuse what is empty, broken or too short.

    Args:
        source: a source of kind ``text``, small enough to be read now.
        data: the data keys.
        splits: as ``splits.wanted_splits`` takes them.
        tokenizer: counts tokens; None when only documents are to be counted.

    Returns:
        Tokens of each document in split order; None without a tokenizer.

    Raises:
        ValueError: see ``text.read_documents``, ``splits.check_documents``, ``check_tokens``.
    """
    texts = unique_documents(read_documents(source, data), Counter())
    found: list[int] = []
    while batch := _next_batch(texts):
        found += [0] * len(batch) if tokenizer is None else map(len, tokenizer.encode(batch))
    if not found:
        raise no_documents(source)
    check_documents(data, len(found), splits)
    if tokenizer is None:
        return None
    lengths = np.array(found)[document_order(len(found), data.seed)]
    check_tokens(data, lengths, splits)
    return lengths


def build_indexed(
    source: Source,
    data: DataConfig,
    tokenizer: TextTokenizer,
    vocab_size: int,
    cache: Path,
) -> Path:
    """Tokenise a text source into a ``.bin``/``.idx`` pair, or find the one made before.

    Every rank calls this; rank 0 builds while the others wait (see ``cache.build_once``).

    Args:
        source: a source of kind ``text``.
        data: the data keys; path, seed, separator and text key decide what is stored.
        tokenizer: the checkpoint's.
        vocab_size: true vocabulary of the model; every id must lie below it.
        cache: folder shared by all ranks and runs.

    Returns:
        The prefix of the pair.

    Raises:
        ValueError: no documents, or ids outside the vocabulary.
    """
    folder = cache / _cache_key(source, data, tokenizer, vocab_size)
    build_for_all(folder, lambda into: _build(into, source, data, tokenizer, vocab_size))
    return folder / _PREFIX


def _cache_key(source: Source, data: DataConfig, tokenizer: TextTokenizer, vocab_size: int) -> str:
    whole = source.size <= HASH_CONTENT_UP_TO
    parts: dict[str, object] = {
        "format": _FORMAT,
        "files": [file_identity(file, whole) for file in source.files],
        "single": source.path == source.files[0],
        "separator": data.document_separator,
        "text_key": data.text_key,
        "seed": data.seed,
        "tokenizer": tokenizer.digest,
        "vocab_size": vocab_size,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def file_identity(file: Path, whole: bool) -> list[object]:
    """Name and content hash; of corpora too large to hash on every rank, name, size and times.

    An edit that puts the time of modification back still changes the time of the inode.
    """
    if not whole:
        status = file.stat()
        times = [status.st_mtime_ns, status.st_ctime_ns]
        return [str(file.resolve()), status.st_size, *times]
    return [suffix_of(file), hash_file(file).sha256]


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return Megatron's rule (``DType.optimal_dtype``)."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _build(
    folder: Path, source: Source, data: DataConfig, tokenizer: TextTokenizer, vocab_size: int
) -> None:
    dropped: Counter[str] = Counter()
    texts = unique_documents(read_documents(source, data), dropped)
    unordered = folder / "unordered"
    lengths = _tokenise(unordered, texts, source, tokenizer, vocab_size)
    order = document_order(len(lengths), data.seed)
    ids = Path(f"{unordered}.bin")
    copy_documents([ids], [lengths], order, folder / _PREFIX, token_dtype(vocab_size))
    ids.unlink()
    logger.info("%s: %d documents, %d tokens", source.path, len(lengths), lengths.sum())
    if dropped["duplicates"]:
        logger.warning(
            "%s: left out %d exact repeats of documents, so that no text is in two splits",
            source.path,
            dropped["duplicates"],
        )


def _tokenise(
    prefix: Path, texts: Iterator[str], source: Source, tokenizer: TextTokenizer, vocab_size: int
) -> np.ndarray:
    """Return the documents' lengths in tokens, from a first pass in reading order."""
    where = f"the tokenizer gives data.path={source.path}"
    lengths = array("q")
    total, done = -(-source.size // 1024), 0
    with (
        Path(f"{prefix}.bin").open("wb") as file,
        progress("Tokenising (kB of text)", total) as advance,
        closing(read_ahead(texts)) as batches,
    ):
        for batch in batches:
            lengths.extend(write_ids(file, batch, tokenizer, vocab_size, where))
            read = min(sum(map(len, batch)) // 1024, total - done)
            done += read
            advance(read)
        if done < total:
            advance(total - done)  # blanks, separators and repeats that no document holds
    if not lengths:
        raise no_documents(source)
    return np.array(lengths, dtype=np.int64)


def write_ids(
    file: IO[bytes], batch: list[str], tokenizer: TextTokenizer, vocab_size: int, where: str
) -> Iterator[int]:
    """Write the ids of some texts one after another; yields how many each has.

    Raises:
        ValueError: the model has not all of them; the message begins with ``where``.
    """
    for ids in tokenizer.encode(batch):
        check_ids(int(ids.max()), vocab_size, where)
        file.write(ids.astype(token_dtype(vocab_size)).data)
        yield len(ids)


def read_ahead(texts: Iterator[str]) -> Generator[list[str], None, None]:
    """Batches of texts; while one is tokenised, which holds no lock of Python, the next is read."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(_next_batch, texts)
        while batch := following.result():
            following = reader.submit(_next_batch, texts)
            yield batch


def _next_batch(texts: Iterator[str]) -> list[str]:
    """Texts of about a million characters: enough to keep every core of the tokenizer busy."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            break
    return batch


def check_ids(largest: int, vocab_size: int, where: str, smallest: int = 0) -> None:
    """Refuse token ids the model does not have.

    Raises:
        ValueError: an id is negative or at least ``vocab_size``.
    """
    bad = largest if largest >= vocab_size else smallest
    if not 0 <= bad < vocab_size:
        raise ValueError(
            f"{where} token id {bad} but the model's vocab_size is {vocab_size}; use the tokenizer "
            "of this checkpoint, or set data.path to data made with it"
        )
