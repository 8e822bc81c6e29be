"""Source checkpoints: a local folder or a hub id, opened lazily, read one tensor at a time.

Weights come from safetensors (one file or shards) or, failing that, from ``pytorch_model.bin`` through torch's
weights-only loader, which runs no code. Only headers are read when a checkpoint is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenpak.checkpoint.header import TensorInfo, read_header, read_into, read_whole, weight_bytes
from tenpak.errors import (
    CheckpointError,
    MissingTensorError,
    TenpakError,
    UnsafeCheckpointError,
    UnsupportedDtypeError,
)

__all__ = [
    "TORCH_DTYPES",
    "Checkpoint",
    "dtype_name",
    "fingerprint",
    "is_artifact",
    "locate",
    "open_checkpoint",
    "read_config",
    "read_tensor",
    "source_sha256",
    "tensor_bytes",
    "tensor_sha256",
]

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# What a model folder may need besides weights; nothing else is fetched from a hub.
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README.md", "*.safetensors"]

_MAX_JSON_BYTES = 100_000_000  # of config.json or an index of shards; real ones stay far below

# Settings that make transformers build as many modules, which hold tensors each. A thousand are always affordable.
_COUNT = re.compile(r"(layers?|experts)$")
_FEW = 1024


@dataclass(frozen=True)
class Checkpoint:
    """An opened source model.

    Attributes:
        folder: where its files are.
        name: how to call it in reports: the hub id, or the folder's own name.
        config: ``config.json`` as it is.
        tensors: name → dtype, shape and place of every tensor; for pickled files the place is symbolic.
        files: the weight files.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    _pickled: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return weight_bytes(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype and shape, read from disk now and held by nobody else."""
        if name not in self.tensors:
            raise MissingTensorError(f"{self.name} has no tensor {name!r}")
        if name in self._pickled:
            return self._pickled[name]
        return read_tensor(self.tensors[name])


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor of a safetensors file into fresh memory.

    Raises:
        CheckpointError: the file is gone or ends early.
    """
    # On the CPU whatever the default: transformers builds models under a meta-device context.
    data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
    if info.nbytes:
        try:
            with info.file.open("rb", buffering=0) as file:
                read_into(file, info, memoryview(data.numpy()))  # type: ignore[arg-type]
        except OSError as error:
            raise CheckpointError(f"cannot read {info.file.name}: {error.strerror}") from error
    return data.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of ``tensor_bytes``, in hexadecimal."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def source_sha256(checkpoint: Checkpoint, hashes: Mapping[str, str] | None = None) -> str:
    """Hash of a checkpoint: of the lines ``name dtype shape sha256-of-bytes`` of all its tensors, sorted by name.

    Args:
        checkpoint: the source.
        hashes: tensor → hash of its bytes, where they are known; else every tensor is read.
    """
    known = (
        hashes if hashes is not None else {name: tensor_sha256(checkpoint.read(name)) for name in checkpoint.tensors}
    )
    tensors = checkpoint.tensors
    lines = (f"{n} {tensors[n].dtype} {list(tensors[n].shape)} {known[n]}\n" for n in sorted(known))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What changes when a checkpoint's files do, without reading them: sizes and times, and the configuration."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files}
    config = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    return {"folder": str(checkpoint.folder.resolve()), "files": files, "config": config}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype, e.g. ``"BF16"``.

    Raises:
        UnsupportedDtypeError: tenpak does not store this dtype.
    """
    if dtype not in _NAMES:
        raise UnsupportedDtypeError(
            f"dtype {dtype} is not supported", hint="convert the checkpoint to float32, float16 or bfloat16"
        )
    return _NAMES[dtype]


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or the hub snapshot of an id (from the cache when offline).

    Raises:
        CheckpointError: neither a folder nor an id that the hub or its cache knows.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.exists() or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text} is not a folder", hint="give a model folder or a Hugging Face id")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(text, revision=revision, allow_patterns=_HUB_FILES)
        if not any(Path(found).glob("*.safetensors")):
            found = snapshot_download(text, revision=revision, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin*"])
    except Exception as error:  # the hub client raises many kinds, and none of them is ours
        raise CheckpointError(
            f"{text} is neither a folder nor a model that the hub or its local cache has: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="check the spelling; offline, only models already in the cache can be opened",
        ) from error
    return Path(found)


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a model folder or hub id for reading.

    Raises:
        CheckpointError: no model there, a broken file, or an already quantized model.
        MissingTensorError: the index names a tensor that its file does not hold.
        UnsafeCheckpointError: only pickled weights are there and they hold more than tensors.
        UnsupportedDtypeError: a tensor's dtype is unknown.
    """
    folder = locate(source, revision=revision)
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder.name} is already quantized ({method})", hint="compress the original, unquantized checkpoint"
        )
    name = folder.resolve().name if Path(source).is_dir() else str(source)
    files = _weight_files(folder)
    if files[0].suffix == ".bin":
        pickled = _load_pickled(files)
        tensors = {key: _pickled_info(key, value, files[0]) for key, value in pickled.items()}
        check_depth(config, len(tensors))
        return Checkpoint(folder, name, config, tensors, files, pickled)
    tensors = {}
    for file in files:
        for key, info in read_header(file).items():
            if key in tensors:
                raise CheckpointError(f"tensor {key!r} is in {tensors[key].file.name} and in {file.name}")
            tensors[key] = info
    check_depth(config, len(tensors))
    return Checkpoint(folder, name, config, tensors, files)


def check_depth(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse a configuration of far more layers or experts than there are tensors: building it would take for ever.

    Raises:
        CheckpointError: names the setting.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]  # e.g. text_config
    for key, value in (item for part in parts for item in part.items()):
        # Models with stacked experts have more experts than tensors; they are only counted, never built one by one.
        if _COUNT.search(key) and isinstance(value, int | float) and value > max(_FEW, tensors):
            raise CheckpointError(
                f"config.json says {key} = {value!r}, but there are {tensors} tensors",
                hint="config.json and weights belong to different models",
            )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(read_whole(path, _MAX_JSON_BYTES).decode())
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no readable config.json", hint="give the folder that holds config.json and the weights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON", hint="obtain the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object", hint="obtain the file again")
    return config


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for stem in ("model.safetensors", "pytorch_model.bin"):  # in the order in which transformers looks
        if (folder / stem).is_file():
            return (folder / stem,)
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _indexed_files(index)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return (loose[0],)
    raise CheckpointError(
        f"{folder} holds no model.safetensors, pytorch_model.bin or index of shards",
        hint="give the folder that holds config.json and the weights",
    )


def _indexed_files(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(read_whole(index, _MAX_JSON_BYTES).decode())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a valid index of shards", hint="obtain the file again") from error
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise CheckpointError(f"{index.name} names a shard outside its folder: {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"shard {name} is missing", hint=f"put it into {index.parent}")
    files = tuple(index.parent / name for name in names)
    if not files:
        raise CheckpointError(f"{index} lists no shards", hint="obtain the file again")
    if files[0].suffix == ".safetensors":
        held = {name: file.name for file in files for name in read_header(file)}
        for tensor, name in weight_map.items():
            if held.get(tensor) != name:
                raise MissingTensorError(f"{name} does not hold tensor {tensor!r} that {index.name} promises")
    return files


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can only be a file directly in a folder: no path, nothing that a file system chokes on."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) < 256 and name not in (".", "..") and not any(c in "/\\" or c < " " for c in name)


def _load_pickled(files: tuple[Path, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about reading old formats; the result is the same
                try:
                    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files of torch < 1.6 cannot be mapped
                    loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(
                f"{file.name} holds more than tensors (or is damaged); reading it could run code",
                hint="convert it to safetensors in an environment that you trust",
            ) from error
        except Exception as error:  # the unpickler fails in any number of ways on a damaged file
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"cannot read {file.name}: {why}", hint="obtain the file again") from error
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{file.name} is not a dictionary of tensors")
        tensors.update({str(key): value for key, value in loaded.items() if isinstance(value, Tensor)})
    return tensors


def _pickled_info(name: str, tensor: Tensor, file: Path) -> TensorInfo:
    nbytes = tensor.numel() * tensor.itemsize
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"tensor {name!r} in {file.name} is not a plain array", hint="convert it to safetensors")
    with contextlib.suppress(UnsupportedDtypeError):
        return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), file, 0, nbytes)
    raise UnsupportedDtypeError(f"tensor {name!r} in {file.name} has dtype {tensor.dtype}, which tenpak does not read")


def is_artifact(folder: Path) -> bool:
    """Whether a folder's ``config.json`` says that tenpak wrote it."""
    try:
        quantization = read_config(folder).get("quantization_config")
    except TenpakError:
        return False
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "tenpak"
