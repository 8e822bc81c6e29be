"""The training data, made once from a corpus: a tokenizer, and two files of tokens that training maps into memory.

Documents that share a single window of 50 letters and digits with a held-out text (``windows.py``) are dropped whole,
and counted. What was written is then decoded and searched again: the claim is about the files that training reads. Of
the rest every 200th document is held out for validation, so that it is made of the same kinds of text as the training
data: they follow one another in the corpus, and its end is all of one kind.

The tokenizer is byte-level BPE over the words of GPT-2's pre-tokenizer, any text has tokens, and ``<|endoftext|>`` is
token 0. Tokens lie as little-endian uint16, each document after an ``<|endoftext|>``. The merges are learned from every
fourth document. Memory: one document, a batch of a few MB, and the words that the tokenizer counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from corpus import END, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from windows import Index, index, shared

from tenpak.errors import CalibrationError

__all__ = ["Data", "Tokens", "prepare", "tokens_of", "train_tokenizer"]

VALIDATION_EVERY = 200
MERGES_EVERY = 4
_BATCH = 4_000_000  # characters encoded at a time
Tokens = np.ndarray[Any, np.dtype[np.uint16]]


@dataclass(frozen=True)
class Data:
    """Prepared data in a folder.

    Attributes:
        folder: holds ``tokenizer.json``, ``train.bin`` and ``validation.bin``.
        facts: what a model card tells of it: ``corpus``, ``held_out`` (names), ``documents``, ``dropped``,
            ``dropped_characters``, ``train_tokens``, ``validation_tokens``, ``held_out_windows``, and how many of these
            occur in the corpus (``windows_in_corpus``), in ``train.bin`` (``windows_in_training``) and in
            ``validation.bin`` (``windows_in_validation``); the last two are 0.
    """

    folder: Path
    facts: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of both files."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))


def prepare(corpus: Path, held_out: Sequence[Path], cache: Path, vocabulary: int) -> Data:
    """The data of ``corpus``, made unless ``cache`` has it.

    Args:
        corpus: text with ``<|endoftext|>`` after each document, ``.xz`` or plain.
        held_out: texts that no model may have seen, such as WikiText-2's valid and test.
        cache: a folder; a subfolder per size of vocabulary is written.
        vocabulary: tokens, at most 65,536.

    Raises:
        CalibrationError: nothing is left to train on, or the written data holds a window of the held-out texts.
        OSError: a file cannot be read or written.
    """
    folder = cache / f"vocabulary-{vocabulary}"
    asked = {"corpus": corpus.name, "corpus_bytes": corpus.stat().st_size, "held_out": [path.name for path in held_out]}
    report = folder / "data.json"
    if report.is_file() and asked.items() <= (facts := json.loads(report.read_text())).items():
        return Data(folder, facts)
    folder.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)  # it is written last, and says that the rest is whole
    windows = index(path.read_text(encoding="utf-8") for path in held_out)
    tokenizer = train_tokenizer(islice(_kept(corpus, windows), 0, None, MERGES_EVERY), vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = asked | _write(corpus, windows, tokenizer, folder)
    if facts["windows_in_training"] or facts["windows_in_validation"]:
        raise CalibrationError(
            f"{str(folder)!r} holds windows of the held-out texts", hint="report this with data.json"
        )
    report.write_text(json.dumps(facts, indent=2) + "\n")
    return Data(folder, facts)


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of up to ``vocabulary`` tokens, fewer where ``texts`` have no more pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(path: Path) -> Tokens:
    """The tokens in a file, mapped, not read."""
    return np.memmap(path, dtype="<u2", mode="r")


def _kept(corpus: Path, windows: Index) -> Iterator[str]:
    """The documents that are trained on."""
    kept = (document for document in documents(corpus) if not len(shared(windows, document)))
    return (document for number, document in enumerate(kept) if not _validates(number))


def _validates(number: int) -> bool:
    return number % VALIDATION_EVERY == VALIDATION_EVERY - 1


def _write(corpus: Path, windows: Index, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write both files of tokens; what was kept, dropped and found."""
    counts = dict.fromkeys(("documents", "characters", "dropped", "dropped_characters"), 0)
    found = np.zeros(0, np.uint64)
    batches: dict[str, list[str]] = {"train": [], "validation": []}
    paths = {name: folder / f"{name}.bin" for name in batches}
    number = 0
    with paths["train"].open("wb") as train, paths["validation"].open("wb") as validation:
        files = {"train": train, "validation": validation}
        for document in documents(corpus):
            counts["documents"] += 1
            counts["characters"] += len(document)
            if len(seen := shared(windows, document)):
                counts["dropped"] += 1
                counts["dropped_characters"] += len(document)
                found = np.union1d(found, seen)
                continue
            name = "validation" if _validates(number) else "train"
            number += 1
            batches[name].append(document)
            if sum(map(len, batches[name])) > _BATCH:
                files[name].write(_encoded(tokenizer, batches[name]))
                batches[name].clear()
        for name, file in files.items():
            file.write(_encoded(tokenizer, batches[name]))
    tokens = {name: tokens_of(path) if path.stat().st_size else np.zeros(0, "<u2") for name, path in paths.items()}
    if not all(map(len, tokens.values())):
        raise CalibrationError(
            f"{corpus.name!r} has too few documents to train on and to validate with: {number} of "
            f"{counts['documents']} share nothing with the held-out texts, and {VALIDATION_EVERY} are needed",
            hint=f"end each document by {END} and give a corpus that is not the held-out text",
        )
    return {
        **counts,
        **{f"{name}_tokens": len(ids) for name, ids in tokens.items()},
        "held_out_windows": len(windows.hashes),
        "windows_in_corpus": len(found),
        "windows_in_training": _found(tokens["train"], tokenizer, windows),
        "windows_in_validation": _found(tokens["validation"], tokenizer, windows),
    }


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> bytes:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return b"".join(np.array([0, *item.ids], dtype="<u2").tobytes() for item in encoded)


def _found(tokens: Tokens, tokenizer: Tokenizer, windows: Index) -> int:
    """How many windows occur in the documents of a file, as it decodes."""
    starts = np.flatnonzero(tokens == 0)
    found = 0
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        found += len(shared(windows, tokenizer.decode(tokens[start + 1 : end].tolist(), skip_special_tokens=False)))
    return found
