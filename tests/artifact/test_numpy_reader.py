"""docs/format.md is enough: a reader in plain numpy gives, bit for bit, what tenpak decodes."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import WEIGHTS, add_tensors, blank_manifest, flip
from families import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy_reader import NORMAL_LEVELS, Reader

import tenpak
from tenpak.artifact.reader import open_artifact
from tenpak.artifact.writer import ArtifactWriter
from tenpak.codecs import registry
from tenpak.recipes import parse

PATTERN = '{"id":"pattern/1","size":%d,"learned":%d,"terms":%d,"scales":%s}'
SPARSE = '{"id":"sparse24/1","values":%s}'
_LOW = '"id":"lowrank/1","factor":'
_INT8 = '{"id":"uniform/1","bits":8,"group":null,"symmetric":true,"search":false}'
_INT3 = '{"id":"uniform/1","bits":3,"group":8,"symmetric":false,"search":false}'

RECIPES = (
    *(f"int{bits}:g32" for bits in range(2, 9)),
    *(f"int{bits}:row:sym" for bits in (2, 3, 5, 8)),
    *(f"int{bits}:g8:sym" for bits in (3, 4)),
    *("int3:g9:asym", "int4:g256", "int4:g16:search", "int7:row:asym"),
    *(f"nf{bits}:g64" for bits in (2, 3, 4)),
    *(f"nf{bits}:g8:learned" for bits in (2, 3, 4)),
    *("nf3:row", "fp32", "bf16", "fp16", "int4:g16+int2:g16", "int2:g8+nf3:row:learned+int3:g16:sym", "nf2:g8+bf16"),
    *("awq-int4:g16", "awq-nf3:g8:learned:exp=1.0", "spin-int3:g32", "spin-int8:row:seed=5"),
    *("awq-spin-gptq-int4:g32:exp=0.3", "spin-awq-int2:g8:exp=0.5+spin-int2:g8:seed=4294967295"),
    *("trellis:0.3:datafree", "trellis:0.02:datafree:states=8", "trellis:1e-4:datafree", "trellis:3e-6:datafree"),
    *("ec-int4:g32", "ec-int8:row:sym", "ec-nf3:g8:learned", "ec-int2:g8+nf3:row:learned", "ec-awq-spin-int5:g8"),
    *("ec-fp32", "ec-bf16", "ec-fp16", "ec-int7:row:asym", "ec-int6:g9"),
    *("ec-sparse24-int4:g8+vq4x16:row~1", "ec-plain-lowrank3:int4+pattern4x9:terms=2:scales=int8"),
    *("ec-plain-lowrank:bpw=9.0:fp16", "ec-aq2x4x16:datafree", "ec-pattern3x0:base=5", "ec-vq8x16+sparse24-bf16"),
    *("sparse5%-int8:row", "sparse25%-wanda-int4:g8", "sparse50%-nf3:g8:learned", "sparse0.0001%-fp16"),
    *("ec-vq4x16+sparse10%-int8:row", "ec-sparse3%-bf16", '{"id":"sparse/1","share":0.3,"values":{"id":"vector/1"}}'),
    '{"id":"vector/1"}',
    '{"id":"vector/1","dimension":8,"entries":1024,"scaled":true,"weighting":"magnitude"}',
    '{"id":"vector/1","dimension":2,"entries":16,"weighting":"calibrated"}',
    *("vq4x16:shared", "gptq-vq8x64:shared:rounds=1"),
    '{"id":"additive/1","calibrated":false,"entries":512}',
    '{"id":"additive/1","books":3,"dimension":4,"entries":32,"beam":2,"rounds":1}',
    *("trellis:0.01:datafree:states=1", "trellis:0.005", "trellis:0.02:states=8:rate=0.0", "trellis:1e-4:states=1"),
    *(SPARSE % '{"id":"uniform/1","bits":4}', SPARSE % '{"id":"dense/1","dtype":"float16"}'),
    *(PATTERN % (4, 9, 2, '{"id":"uniform/1","bits":4}'), PATTERN % (3, 0, 8, '{"id":"dense/1","dtype":"float16"}')),
    *(f'{{{_LOW}{_INT3},"rank":3,"kind":"plain"}}', f'{{{_LOW}{_INT8},"energy":0.7}}'),
    f'{{"id":"residual/1","base":{{{_LOW}{_INT8},"bpw":4.0,"kind":"activation"}},"rest":{_INT3},"iterations":2}}',
    f'{{{_LOW}{{"id":"trellis/1","step":0.05}},"error":0.5,"kind":"magnitude"}}',
)
ODD = ((1, 1), (1, 8), (3, 7), (5, 33), (7, 64), (2, 257), (40, 96))


def compare(folder: Path) -> int:
    """Compare every tensor; returns how many there were, apart from shared ones."""
    artifact, reader = open_artifact(folder), Reader(folder)
    assert set(reader.manifest["weights"]) == set(artifact.manifest.weights)
    for name in artifact.manifest.weights:
        ours, theirs = artifact.decode(name), reader.decode(name)
        assert theirs.dtype == np.float32
        assert theirs.shape == tuple(ours.shape)
        assert ours.contiguous().numpy().tobytes() == np.ascontiguousarray(theirs).tobytes(), name
    for name in artifact.manifest.dense:
        ours = artifact.read_dense(name)
        ours = ours.float() if ours.dtype == torch.bfloat16 else ours
        assert np.array_equal(ours.numpy(), reader.dense(name))
    return len(artifact.tensors) - len(artifact.manifest.shared)


def write(folder: Path, weights: dict[str, tuple[tuple[int, ...], str]], **options: int) -> Path:
    with ArtifactWriter(folder, **options) as writer:  # type: ignore[arg-type]
        add_tensors(writer, weights)
        return writer.publish(blank_manifest(), {})


@pytest.mark.parametrize("file", ["numpy_reader.py", "numpy_trellis.py", "numpy_entropycoded.py"])
def test_reader_is_independent(file: str) -> None:
    source = (Path(__file__).parent / file).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    standard = {"__future__", "functools", "hashlib", "io", "json", "math", "pathlib", "struct", "typing"}
    assert modules <= {*standard, "numpy", "numpy_trellis", "numpy_entropycoded"}


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_every_codec_on_odd_shapes(shape: tuple[int, int], tmp_path: Path) -> None:
    weights = {f"{recipe}.weight": (shape, recipe) for recipe in RECIPES}
    assert compare(write(tmp_path / "artifact", weights)) == len(RECIPES) + 2


def test_the_list_names_every_codec() -> None:
    codecs = [codec for codec in map(parse, RECIPES) if codec is not None]
    assert {codec.id for codec in codecs} == set(registry.ids())


def test_stacked_and_sharded(tmp_path: Path) -> None:
    weights = {f"{recipe}.experts": ((3, 5, 33), recipe) for recipe in RECIPES}
    compare(write(tmp_path / "artifact", weights, max_shard_bytes=1000))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.none() | st.integers(8, 80),
    symmetric=st.booleans(),
    data=st.data(),
)
def test_any_payload_bytes_decode_alike(
    rows: int, columns: int, bits: int, group: int | None, symmetric: bool, data: st.DataObject, tmp_path: Path
) -> None:
    """Not only what the encoder writes: any bytes, infinite and denormal scales included."""
    from tenpak.codecs.base import Payload
    from tenpak.codecs.normalfloat import NormalFloat
    from tenpak.codecs.uniform import Uniform

    codec = Uniform(bits, group, symmetric) if bits > 4 or symmetric else NormalFloat(bits, group, "learned")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    tensors = {}
    for field in codec.fields((rows, columns)):
        raw = torch.randint(0, 256, (field.nbytes,), dtype=torch.uint8, generator=generator)
        tensors[field.name] = raw.view(field.dtype).reshape(field.shape).nan_to_num(nan=1.0)
        if field.dtype == torch.uint8:
            tensors[field.name] = raw.reshape(field.shape)
    shutil.rmtree(tmp_path / "artifact", ignore_errors=True)
    payload = Payload(codec.to_json(), (rows, columns), torch.float32, tensors)
    with ArtifactWriter(tmp_path / "artifact") as writer:
        writer.add_weight("w", [payload], shape=(rows, columns), dtype="F32", transposed=False)
        writer.publish(blank_manifest(), {})
    with np.errstate(all="ignore"):
        ours, theirs = (
            open_artifact(tmp_path / "artifact").decode("w").numpy(),
            Reader(tmp_path / "artifact").decode("w"),
        )
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *(("gpt2", "int3:g16"), ("mixtral", "int4:g32+nf2:g8"), ("gpt_oss", "nf4:g16:learned")),
        *(("llama", "int5:g24:sym"), ("gpt2", "vq8x32:shared"), ("mixtral", "vq4x16:shared")),
        ("gpt_oss", "vq16x64:shared"),
    ],
)
def test_models(family: str, recipe: str, tmp_path: Path) -> None:
    """Transposed (GPT-2), experts of their own tensors (Mixtral), stacked and transposed (GPT-OSS)."""
    make_tiny(family, tmp_path / "model", num_hidden_layers=1, **({"n_layer": 1} if family == "gpt2" else {}))
    tenpak.compress(tmp_path / "model", tmp_path / "artifact", recipe=recipe)
    manifest = open_artifact(tmp_path / "artifact").manifest
    assert any(entry.transposed for entry in manifest.weights.values()) == (family in ("gpt2", "gpt_oss"))
    assert any(len(entry.shape) == 3 for entry in manifest.weights.values()) == (family == "gpt_oss")
    compare(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("family", "recipe"), [("gpt2", "trellis:0.02:datafree:states=8"), ("gpt_oss", "trellis:0.3:datafree")]
)
def test_models_of_one_codec(family: str, recipe: str, tmp_path: Path) -> None:
    """Embeddings too."""
    changes = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    make_tiny(family, tmp_path / "model", vocab_size=128, **changes)
    tenpak.compress(tmp_path / "model", tmp_path / "artifact", recipe=recipe, overrides=[f"*={recipe}"])
    manifest = open_artifact(tmp_path / "artifact").manifest
    assert any(entry.shape[0] == 128 for entry in manifest.weights.values())
    compare(tmp_path / "artifact")


def test_it_finds_damage_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "artifact", dict(WEIGHTS))
    flip(folder / "model.safetensors", 8 * (folder / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ValueError, match="was changed"):
        compare_all(folder)
    flip(folder / "model.safetensors", 8 * (folder / "model.safetensors").stat().st_size - 1)
    compare_all(folder)
    flip(folder / "manifest.json", 1000)
    with pytest.raises(ValueError, match="manifest was changed"):
        Reader(folder)
    flip(folder / "manifest.json", 1000)


def compare_all(folder: Path) -> None:
    reader = Reader(folder)
    for name in reader.manifest["weights"]:
        reader.decode(name)
    for name in reader.manifest["dense"]:
        reader.dense(name)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def test_documentation_names_every_field_and_codec() -> None:
    from tenpak.artifact import schema

    for model in (
        schema.Manifest,
        schema.WeightEntry,
        schema.DenseEntry,
        schema.Layout,
        schema.FieldSpec,
        schema.Source,
        schema.SharedEntry,
    ):
        for field in model.model_fields:
            assert f"`{field}`" in PAGE, f"{model.__name__}.{field}"
    assert all(f"`{codec_id}`" in PAGE for codec_id in registry.ids())
    assert f"format version {schema.FORMAT_VERSION}, or {schema.SHARING_VERSION}" in PAGE.lower()
    for levels in NORMAL_LEVELS.values():
        assert levels.replace(" ", ", ") in PAGE
