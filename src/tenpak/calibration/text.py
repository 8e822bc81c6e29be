"""Text for calibration and evaluation: loading, tokens, windows, and sampling from the model itself.

A text is one long string, whatever it came from; what separates documents is a blank line, or the tokenizer's own
start-of-document token where the text spells it out (``<|endoftext|>``). A model reads it through *windows*: window k
takes the tokens [kS, kS + L) as inputs and so predicts the tokens [kS + 1, kS + L + 1); of these it *scores* those that
no earlier window has scored. Every token but the first is scored exactly once, with at least L-S and at most L
tokens of context (fewer only where the text begins). S = L gives disjoint windows, S < L buys context with compute.

Sampling: text drawn from a model at temperature 1 is by construction in the distribution that the model has learned,
needs no licence and no download, and makes KL and perplexity measure exactly what compression has changed. (Data-free
calibration from the model's own samples: Liu et al., LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tenpak.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Window", "context_length", "load_text", "sample_text", "tokenize", "windows"]

_SUFFIXES = frozenset({".txt", ".text", ".md", ".raw", ".jsonl"})
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[^:/]*)(:(?P<column>[^:/]+))?)?")
# A byte-level model at temperature 1 now and then draws NUL, an escape code or half a character (U+FFFD).
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")
_CONTEXT_CAP = 4096
# Configurations without a limit (ALiBi, as in BLOOM) say nothing; 2048 is what such models were trained on.
_CONTEXT_FALLBACK = 2048
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


# Loading -------------------------------------------------------------------------------------------------------------


def load_text(source: str | Path) -> str:
    """The text at ``source``.

    Args:
        source: a file (UTF-8 text; ``.jsonl`` with a string field ``text`` per line; either compressed as ``.gz``,
            ``.xz`` or ``.bz2``), a folder (its ``.txt``, ``.text``, ``.md``, ``.raw`` and ``.jsonl`` files, sorted by
            name and joined by blank lines), or a Hugging Face dataset ``org/name[/config][:split[:column]]``. The
            split is ``test`` where there is one, else ``train``; the column is ``text``, else the only column of
            strings.

    Returns:
        The text, not empty; line ends of Windows become line feeds.

    Raises:
        CalibrationError: there is nothing there, or it is empty, not text, damaged, or cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        text = _read_folder(path)
    elif path.exists():
        text = _read_file(path)
    elif isinstance(source, str) and (match := _DATASET.fullmatch(source)) and not _is_text_name(source):
        text = _read_dataset(match["id"], match["config"], match["split"] or None, match["column"])
    else:
        raise CalibrationError(
            f"there is no text at {str(source)!r}",
            hint="give a text file, a folder of them, or a Hugging Face dataset as org/name:split:column",
        )
    if not text.strip():
        raise CalibrationError(f"the text at {str(source)!r} is empty", hint="give a text of at least a few sentences")
    return text


def _is_text_name(name: str) -> bool:
    suffixes = Path(name.lower()).suffixes
    if suffixes and suffixes[-1] in _DECOMPRESS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in _SUFFIXES


def _read_folder(folder: Path) -> str:
    files = sorted(
        (p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and _is_text_name(p.name)),
        key=lambda p: p.name,
    )
    if not files:
        raise CalibrationError(
            f"the folder {str(folder)!r} holds no text file",
            hint=f"its texts must be named *{', *'.join(sorted(_SUFFIXES))} (and may be .gz, .xz or .bz2)",
        )
    return "\n\n".join(_read_file(path) for path in files)


def _read_file(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        data = path.read_bytes()
        if suffixes and suffixes[-1] in _DECOMPRESS:
            data = _DECOMPRESS[suffixes.pop()](data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CalibrationError(f"the text {str(path)!r} cannot be read: {error}", hint="check the file") from error
    try:
        # Valid UTF-8 may still be a binary file; no text holds NUL.
        text = data.decode("utf-8-sig") if b"\0" not in data else None
    except UnicodeDecodeError:
        text = None
    if text is None:
        raise CalibrationError(
            f"the file {str(path)!r} is not UTF-8 text", hint="give a text file; convert other encodings to UTF-8 first"
        )
    text = text.replace("\r\n", "\n")
    return _join_jsonl(path, text) if suffixes and suffixes[-1] == ".jsonl" else text


def _join_jsonl(path: Path, text: str) -> str:
    documents = []
    # Only \n ends a JSON line: splitlines() would also cut at U+2028 and the like inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            documents.append(None)
        if not isinstance(documents[-1], str):
            raise CalibrationError(
                f"line {number} of {str(path)!r} is not a JSON object with a string field 'text'",
                hint='write one object per line, such as {"text": "Once upon a time"}',
            )
    return "\n\n".join(documents)


def _read_dataset(name: str, config: str | None, split: str | None, column: str | None) -> str:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"there is no file {name!r}, and reading a Hugging Face dataset needs the package 'datasets'",
            hint="pip install tenpak[datasets], or give a file",
        ) from error
    try:
        if split is None:
            names = datasets.get_dataset_split_names(name, config)
            split = "test" if "test" in names else "train"
        rows: Any = datasets.load_dataset(name, config, split=split)
        columns = list(rows.column_names)
        if column is None:
            strings = [c for c in columns if getattr(rows.features[c], "dtype", None) == "string"]
            column = "text" if "text" in columns else strings[0] if len(strings) == 1 else None
        values = list(rows[column]) if column in columns else None
    except Exception as error:  # the package raises what its many back ends raise; all mean that it cannot be had
        raise CalibrationError(
            f"the dataset {name!r} cannot be loaded: {error}",
            hint="check its name, configuration and split (org/name/config:split:column) and the network",
        ) from error
    if values is None or not all(isinstance(value, str) for value in values):
        raise CalibrationError(
            f"the dataset {name!r} has no column of text {column or ''!r}; its columns are {', '.join(columns)}",
            hint=f"name a column of strings: {name}:{split}:COLUMN",
        )
    return "\n\n".join(values)


# Tokens and windows --------------------------------------------------------------------------------------------------


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, vocab_size: int | None = None) -> Tensor:
    """The token ids of ``text``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: any length; special tokens that it spells out become those tokens.
        vocab_size: rows of the model's embedding, to check that the tokenizer fits.

    Returns:
        int64 ``[tokens]``.

    Raises:
        CalibrationError: the tokenizer fails, the text gives no token, or an id is not below ``vocab_size``.
    """
    try:
        # verbose=False: the text is meant to be longer than the context, so the tokenizer's warning would mislead.
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # One BOS for the whole text exactly where the tokenizer adds one by itself, never an EOS: this is what
        # perplexity loops (Hugging Face's guide, GPTQ's) get by encoding the raw text once, so numbers compare.
        probe = list(tokenizer("a", verbose=False)["input_ids"])
    except Exception as error:  # tokenizers raise plain Exception from Rust
        raise CalibrationError(f"the tokenizer fails on the text: {error}", hint="check the tokenizer files") from error
    bos = tokenizer.bos_token_id
    if ids and bos is not None and probe[:1] == [bos] and ids[0] != bos:
        ids.insert(0, bos)
    if not ids:
        raise CalibrationError("the text gives no tokens", hint="give a text of at least a few sentences")
    if vocab_size is not None and max(ids) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer does not fit the model: it gives token {max(ids)}, the model knows {vocab_size}",
            hint="use the tokenizer that came with the model",
        )
    return torch.tensor(ids, dtype=torch.int64)


@dataclass(frozen=True)
class Window:
    """One pass of a model over part of a text.

    Attributes:
        start: first input token.
        stop: one past the last input token; the targets are the tokens [start + 1, stop + 1).
        scored: how many of the targets, counted from the end, no earlier window has scored.
    """

    start: int
    stop: int
    scored: int


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows over a text of ``tokens`` tokens that score every token but the first exactly once.

    All have ``length`` inputs and score ``stride`` targets, except the first, which scores all its targets, and the
    last, which is as long as what remains.

    Args:
        tokens: number of tokens of the text, at least 2.
        length: number of inputs of a window, the most context a token gets.
        stride: distance between windows, 1 … ``length``; equal to ``length`` for disjoint windows.

    Raises:
        CalibrationError: the text is too short, or length and stride do not fit each other.
    """
    if tokens < 2:
        raise CalibrationError(f"a text of {tokens} tokens predicts nothing", hint="give a longer text")
    if not 1 <= stride <= length:
        raise CalibrationError(
            f"window {length} and stride {stride} do not fit: stride must lie in 1 … window",
            hint="give a stride of at least 1 and at most the window, or neither",
        )
    return _windows(tokens - 1, length, stride)


def _windows(targets: int, length: int, stride: int) -> Iterator[Window]:
    start, scored_to = 0, 0
    while scored_to < targets:
        stop = min(start + length, targets)
        yield Window(start, stop, stop - scored_to)
        start, scored_to = start + stride, stop


def context_length(config: Any) -> int:
    """The longest input that a model of this Hugging Face configuration takes, at most 4096 tokens."""
    config = config.get_text_config()
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min(value, _CONTEXT_CAP)
    return _CONTEXT_FALLBACK


# Sampling ------------------------------------------------------------------------------------------------------------


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Text sampled from the model itself.

    Rows of ``window`` tokens are drawn independently, in batches with the KV cache, each from the start-of-document
    token (BOS, else EOS; a random token where the tokenizer has neither). A row goes on after its document ends, so it
    may hold several. Documents are separated by the start-of-document token, where the tokenizer reads it back from
    text, else by a blank line; other special tokens and control characters are left out.

    Args:
        model: a causal language model; its dtype and device are kept.
        tokenizer: the model's.
        tokens: number of tokens to draw; encoding the text again may give a few more or fewer.
        seed: of a generator of its own; the global one is neither read nor moved.
        temperature: divides the logits; above 0.
        window: tokens per row, by default the model's context.
        progress: called with the tokens drawn so far and ``tokens``.

    Returns:
        The text: the same for the same arguments on the same machine.

    Raises:
        CalibrationError: an argument is out of range, or the model gives NaN or infinite logits.
    """
    window = context_length(model.config) if window is None else window
    if tokens < 1 or window < 1 or not (temperature > 0 and math.isfinite(temperature)):
        raise CalibrationError(
            f"cannot sample {tokens} tokens in windows of {window} at temperature {temperature}",
            hint="all three must be above 0",
        )
    generator = torch.Generator(device=model.device).manual_seed(seed)
    rows = -(-tokens // window)
    batch = max(1, min(64, 65536 // window))  # bounds the KV cache
    samples: list[list[int]] = []
    training = model.training
    model.train(False)
    try:
        for begin in range(0, rows, batch):
            drawn = _sample_rows(model, tokenizer, min(batch, rows - begin), window, temperature, generator)
            samples += drawn.tolist()
            if progress:
                progress(min(tokens, len(samples) * window), tokens)
    finally:
        model.train(training)
    samples[-1] = samples[-1][: 1 + tokens - (rows - 1) * window]  # one more: the start token was not drawn
    return _join_samples(tokenizer, samples)


def _sample_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    window: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """``rows`` samples, int64 ``[rows, 1 + window]`` with the token that each started from."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)  # embeddings may be padded beyond it
    first = bos if bos is not None else eos
    shape, device = (rows, 1), model.device
    if first is None:
        token = torch.randint(known, shape, generator=generator, device=device)
    else:
        token = torch.full(shape, first, dtype=torch.int64, device=device)
    drawn, cache = [token], None
    with torch.inference_mode():
        for _ in range(window):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1, :known].float() / temperature
            if cache is None or not torch.isfinite(logits.amax(dim=-1)).all():
                what = "keeps no KV cache" if cache is None else "gives NaN or infinite logits"
                raise CalibrationError(f"cannot sample text: the model {what}", hint="give a text instead")
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            if first is not None and eos is not None and first != eos:
                token = torch.where(drawn[-1] == eos, first, token)  # a document opens with BOS, as in training
            drawn.append(token)
    return torch.cat(drawn, dim=1).cpu()


def _join_samples(tokenizer: PreTrainedTokenizerBase, samples: list[list[int]]) -> str:
    starts = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    separator = "\n\n"
    if starts:
        spelled = str(tokenizer.convert_ids_to_tokens(starts[0]))
        if list(tokenizer(spelled, add_special_tokens=False)["input_ids"]) == [starts[0]]:
            separator = spelled
    documents: list[str] = []
    for row in samples:
        ids: list[int] = []
        for token in [*row, None]:
            if token is not None and token not in starts:
                ids.append(token)
            elif ids:
                documents.append(_NOT_TEXT.sub("", str(tokenizer.decode(ids, skip_special_tokens=True))))
                ids = []
    return separator.join(document for document in documents if document.strip())
