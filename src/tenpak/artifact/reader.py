"""Opening an artifact: everything is checked against everything else before memory is taken for any weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenpak.artifact.schema import (
    CODES_SUFFIX,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    SHARING_VERSION,
    DenseEntry,
    Manifest,
    SharedEntry,
    WeightEntry,
    encode_index,
    load_manifest,
    shard_names,
)
from tenpak.checkpoint.header import DTYPE_BYTES, TensorInfo, encode_header, read_header, read_whole, weight_bytes
from tenpak.errors import ArtifactError, CheckpointError, CodecError, CorruptArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from tenpak.codecs.base import Payload

__all__ = ["Artifact", "open_artifact"]


@dataclass(frozen=True)
class Artifact:
    """An opened artifact; opening reads headers and the manifest, no weights.

    Attributes:
        folder: where it is.
        config: its ``config.json``.
        manifest: its manifest, validated.
        tensors: stored name (``<name>_codes`` for compressed ones) → dtype, shape and place.
        files: its weight files.
    """

    folder: Path
    config: Mapping[str, Any]
    manifest: Manifest
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk, headers included."""
        return weight_bytes(self.files)

    def read_blob(self, name: str, *, verify: bool = True) -> Tensor:
        """The payload bytes of compressed tensor ``name``, uint8 ``[n]``.

        Raises:
            CorruptArtifactError: the bytes are not those that were written (unless ``verify`` is False).
        """
        return self._read(name + CODES_SUFFIX, self.manifest.weights[name].sha256, verify)

    def read_dense(self, name: str, *, verify: bool = True) -> Tensor:
        """A tensor that is stored as it was. Raises as ``read_blob`` does."""
        return self._read(name, self.manifest.dense[name].sha256, verify)

    def read_shared(self, name: str, *, verify: bool = True) -> Tensor:
        """A tensor that several weights share, by its stored name. Raises as ``read_blob`` does."""
        return self._read(name, self.manifest.shared[name].sha256, verify)

    def payloads(self, name: str, *, verify: bool = True) -> list[Payload]:
        """The payloads of compressed tensor ``name``, one per matrix. Raises as ``read_blob`` does."""
        from tenpak.artifact.blob import split

        entry = self.manifest.weights[name]
        shared = {field: self.read_shared(stored, verify=verify) for field, stored in entry.shared.items()}
        return split(self.read_blob(name, verify=verify), entry, shared)

    def decode(self, name: str, *, verify: bool = True) -> Tensor:
        """Compressed tensor ``name`` decoded: FP32, in the shape and orientation of the source checkpoint."""
        import torch

        from tenpak.codecs import registry

        entry = self.manifest.weights[name]
        codec = registry.from_json(entry.codec)
        matrices = [codec.decode(payload) for payload in self.payloads(name, verify=verify)]
        if entry.transposed:
            matrices = [matrix.T for matrix in matrices]
        return torch.stack(matrices).reshape(entry.shape)

    def _read(self, stored: str, sha256: str, verify: bool) -> Tensor:
        from tenpak.checkpoint.source import read_tensor, tensor_sha256

        try:
            tensor = read_tensor(self.tensors[stored])
        except CheckpointError as error:
            raise CorruptArtifactError(str(error), hint=error.hint) from error
        if verify and tensor_sha256(tensor) != sha256:
            raise CorruptArtifactError(
                f"the bytes of {stored!r} in {self.folder.name} are not those that were written",
                hint="obtain the artifact again",
            )
        return tensor


def open_artifact(folder: str | Path) -> Artifact:
    """Open an artifact folder for reading.

    Raises:
        ArtifactError: there is no artifact.
        FormatVersionError: another version of the format.
        CorruptArtifactError: manifest, headers and files contradict each other or themselves.
        UnknownCodecError: a codec that is not installed.
    """
    from tenpak.checkpoint.source import check_depth, is_artifact, read_config  # imported late: they bring torch

    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder", hint="give the folder that `tenpak compress -o` wrote")
    if not is_artifact(folder):
        raise ArtifactError(f"{folder} is not a tenpak artifact", hint="make one with `tenpak compress MODEL -o OUT`")
    config = read_config(folder)
    manifest = load_manifest(folder / MANIFEST_NAME)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files or [file.name for file in files] != shard_names(len(files)):
        raise CorruptArtifactError(f"{folder} does not hold exactly its weight files", hint="obtain it again")
    tensors = _read_headers(files)
    _check_index(folder, files, tensors)
    _check(manifest, tensors)
    try:
        check_depth(config, len(tensors))
    except CheckpointError as error:
        raise CorruptArtifactError(str(error), hint=error.hint) from error
    return Artifact(folder, config, manifest, tensors, files)


def _read_headers(files: Sequence[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            header = read_header(file)
        except CheckpointError as error:
            raise CorruptArtifactError(str(error), hint=error.hint) from error
        if tensors.keys() & header.keys():
            raise CorruptArtifactError(f"{file.name} repeats a tensor of another weight file")
        # Hashes protect the data; this protects what is around it, down to the padding.
        expected = encode_header((name, info.dtype, info.shape, info.nbytes) for name, info in header.items())
        with file.open("rb") as stream:
            if stream.read(len(expected)) != expected:
                raise CorruptArtifactError(f"the header of {file.name} was changed", hint="obtain it again")
        tensors |= header
    return tensors


def _check_index(folder: Path, files: Sequence[Path], tensors: Mapping[str, TensorInfo]) -> None:
    """Dense tensors are found by the index: a false one would have transformers initialise some at random."""
    path = folder / INDEX_NAME
    if len(files) == 1 and not path.exists():
        return
    expected = encode_index(tensors)
    try:
        found = read_whole(path, len(expected))
    except OSError as error:
        raise CorruptArtifactError(f"{path.name}: {error.strerror}", hint="obtain the artifact again") from error
    if found != expected:
        raise CorruptArtifactError(f"{path.name} does not list what the weight files hold", hint="obtain it again")


def _check(manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    from tenpak.checkpoint.source import is_plain_name

    expected = manifest.hashes.keys()
    if expected != tensors.keys():
        missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        what = f"lacks {missing[0]!r}" if missing else f"holds {extra[0]!r}, which the manifest does not list"
        raise CorruptArtifactError(f"the artifact {what}", hint="obtain it again: all weight files belong together")
    if len(expected) != len(manifest.weights) + len(manifest.shared) + len(manifest.dense):
        raise CorruptArtifactError("the manifest lists a tensor twice")
    plain: dict[str, DenseEntry | SharedEntry] = {**manifest.dense, **manifest.shared}
    for name, listed in plain.items():
        info = tensors[name]
        if (info.dtype, info.shape) != (listed.dtype, listed.shape):
            raise CorruptArtifactError(f"tensor {name!r} is stored as {info.dtype} {list(info.shape)}, not as listed")
    for name, entry in manifest.weights.items():
        _check_weight(name, entry, tensors[name + CODES_SUFFIX], manifest)
    if not all(manifest.sharers.values()):
        raise CorruptArtifactError("the manifest lists a shared tensor that no weight names")
    if manifest.format_version != (SHARING_VERSION if manifest.shared else FORMAT_VERSION):
        raise CorruptArtifactError(f"format version {manifest.format_version} is not that of what the manifest lists")
    stored = manifest.weights.keys() | manifest.dense.keys()
    for name, source in manifest.tied.items():
        if name in stored or source not in stored:
            raise CorruptArtifactError(f"{name!r} is tied to {source!r}, but not exactly the second is stored")
    for name in manifest.files:
        if not is_plain_name(name) or name in (MANIFEST_NAME, INDEX_NAME) or name.endswith(".safetensors"):
            raise CorruptArtifactError(f"the manifest lists {name[:99]!r}, which is no such file")


def _check_weight(name: str, entry: WeightEntry, info: TensorInfo, manifest: Manifest) -> None:
    from tenpak.artifact.blob import field_bytes, matrix_shape
    from tenpak.checkpoint.source import dtype_name
    from tenpak.codecs import registry

    def wrong(why: str) -> CorruptArtifactError:
        return CorruptArtifactError(f"weight {name!r}: {why}", hint="obtain the artifact again")

    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise wrong(f"shape {list(entry.shape)} is not that of matrices")
    if entry.dtype not in ("F64", "F32", "F16", "BF16"):
        raise wrong(f"dtype {entry.dtype!r} is not a floating-point dtype")
    if any(spec.dtype not in DTYPE_BYTES for layout in entry.payloads for spec in layout.fields):
        raise wrong("a payload field has an unknown dtype")
    nbytes = sum(layout.count * sum(map(field_bytes, layout.fields)) for layout in entry.payloads)
    if info.dtype != "U8" or info.shape != (nbytes,) or 8 * nbytes != entry.bits:
        raise wrong(f"its payloads take {nbytes} bytes, the file stores {info.dtype} {list(info.shape)}")
    matrices = entry.shape[0] if len(entry.shape) == 3 else 1
    if sum(layout.count for layout in entry.payloads) != matrices:
        raise wrong(f"it needs {matrices} payloads")
    try:
        codec = registry.from_json(entry.codec)
        fields = codec.fields(matrix_shape(entry))
    except CodecError as error:
        if isinstance(error, LookupError):
            raise
        raise wrong(str(error)) from error
    if fields is not None:
        implied = [(field.name, dtype_name(field.dtype), field.shape) for field in fields]
        for layout in entry.payloads:
            if implied != [(spec.name, spec.dtype, spec.shape) for spec in layout.fields]:
                raise wrong(f"its fields are not those that {codec.id} writes for {list(entry.shape)}")
    missing = sorted(set(entry.shared.values()) - manifest.shared.keys())
    if missing:
        raise wrong(f"it shares {missing[0][:99]!r}, which the manifest does not list")
    found = {name: (manifest.shared[s].dtype, manifest.shared[s].shape) for name, s in entry.shared.items()}
    if found != {field.name: (dtype_name(field.dtype), field.shape) for field in codec.shared_fields}:
        raise wrong(f"what it shares is not what weights of {codec.id} share")
