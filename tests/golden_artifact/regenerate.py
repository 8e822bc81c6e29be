"""Write the golden artifacts: ``python tests/golden_artifact/regenerate.py [--replace VERSION]``.

A version of the format that has none gets its artifact; one that exists is left alone unless ``--replace`` says that
the format changed knowingly: then its version goes up with it. No test ever runs this.

``version_N/artifact`` is a Llama of one layer whose weights have different codecs, in several weight files;
``version_N/expected.safetensors`` holds every tensor as it must be read: compressed ones decoded to FP32, dense ones as
they are.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

OVERRIDES = {
    1: (
        "*.q_proj=int3:g9",
        "*.k_proj=nf4:g16",
        "*.v_proj=nf3:g8:learned",
        "*.o_proj=int4:g16+int2:g8:sym",
        "*.gate_proj=int6:row:search",
        "*.up_proj=bf16",
        "lm_head=nf2:row",
    ),
    # Two recipes, each with a codebook of its own, one of them for tensors of different shapes.
    2: (
        "*.q_proj=vq4x16:shared",
        "*.[vo]_proj=vq4x16:shared",
        "*.k_proj=int4:g16",
        "*.gate_proj=vq8x16:shared",
        "*.up_proj=vq8x16:shared",
        "*.down_proj=trellis:0.05:datafree",
        "lm_head=vq8x16",
    ),
}


def main(replace: int | None) -> None:
    """Compress models made here, and record what they decode to."""
    for version in OVERRIDES:
        folder = HERE / f"version_{version}"
        if replace == version or not folder.exists():
            write(version, folder)


def write(version: int, folder: Path) -> None:
    from families import make_tiny

    import tenpak

    artifact = folder / "artifact"
    with tempfile.TemporaryDirectory() as scratch:
        model, made = Path(scratch) / "tiny", Path(scratch) / "artifact"
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
        make_tiny("llama", model, dtype=torch.bfloat16, **sizes)
        (model / "tokenizer.json").write_text('{"just": "a file"}\n')
        tenpak.compress(model, made, overrides=OVERRIDES[version], seed=3, max_shard_bytes=1500)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, artifact, ignore=shutil.ignore_patterns("report.json", "README.md"))
    opened = tenpak.open_artifact(artifact)
    if opened.manifest.format_version != version:
        sys.exit(f"{folder} is of format version {opened.manifest.format_version}")
    expected = {name: opened.decode(name).contiguous() for name in opened.manifest.weights}
    expected |= {name: opened.read_dense(name) for name in opened.manifest.dense}
    save_file(expected, folder / "expected.safetensors")
    print(f"wrote {len(expected)} tensors; has FORMAT_VERSION gone up?")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and (len(arguments) != 2 or arguments[0] != "--replace" or not arguments[1].isdigit()):
        sys.exit(__doc__)
    main(int(arguments[1]) if arguments else None)
