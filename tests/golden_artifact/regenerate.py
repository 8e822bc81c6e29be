"""Write the golden artifact anew: ``python tests/golden_artifact/regenerate.py --replace``.

Only when the format changes knowingly: then its version goes up with it. No test ever runs this.

``artifact`` is a Llama of one layer whose weights have different codecs, in two weight files; ``expected.safetensors``
holds every tensor as it must be read: compressed ones decoded to FP32, dense ones as they are.
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

OVERRIDES = (
    "*.q_proj=int3:g9",
    "*.k_proj=nf4:g16",
    "*.v_proj=nf3:g8:learned",
    "*.o_proj=int4:g16+int2:g8:sym",
    "*.gate_proj=int6:row:search",
    "*.up_proj=bf16",
    "lm_head=nf2:row",
)


def main() -> None:
    """Compress a model made here, and record what it decodes to."""
    from families import make_tiny

    import tenpak

    artifact = HERE / "artifact"
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
        make_tiny("llama", Path(folder) / "tiny", dtype=torch.bfloat16, **sizes)
        (Path(folder) / "tiny" / "tokenizer.json").write_text('{"just": "a file"}\n')
        tenpak.compress(
            Path(folder) / "tiny", Path(folder) / "artifact", overrides=OVERRIDES, seed=3, max_shard_bytes=1500
        )
        shutil.rmtree(artifact, ignore_errors=True)
        shutil.copytree(Path(folder) / "artifact", artifact, ignore=shutil.ignore_patterns("report.json", "README.md"))
    opened = tenpak.open_artifact(artifact)
    expected = {name: opened.decode(name).contiguous() for name in opened.manifest.weights}
    expected |= {name: opened.read_dense(name) for name in opened.manifest.dense}
    save_file(expected, HERE / "expected.safetensors")
    print(f"wrote {len(expected)} tensors; has FORMAT_VERSION gone up?")


if __name__ == "__main__":
    if sys.argv[1:] != ["--replace"]:
        sys.exit(__doc__)
    main()
