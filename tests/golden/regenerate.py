"""Write the golden files: ``python tests/golden/regenerate.py [--replace]``.

A new codec or case writes its file; files that exist are left alone unless ``--replace`` says that the format changed
knowingly (then its codec's id changes too). No test ever runs this.

Each file holds ``weight``, ``expected`` (the decoded weight), ``payload.<name>`` and, where weights share something,
``shared.<name>``; the metadata holds the codec's JSON configuration, the shape and the order of the payload's tensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "contract"))

from cases import CASES, golden_weight  # noqa: E402


def main(replace: bool) -> None:
    """Write what is missing, or everything."""
    for codec_id, cases in CASES.items():
        folder = HERE / codec_id.replace("/", "_")
        folder.mkdir(exist_ok=True)
        for case in cases:
            path = folder / f"{case.name}.safetensors"
            if path.exists() and not replace:
                continue
            weight, codec = golden_weight(), case.codec
            payload = case.encode(weight)
            tensors = {f"payload.{name}": tensor.clone() for name, tensor in payload.tensors.items()}
            metadata = {
                "codec": json.dumps(case.config),
                "shape": json.dumps(payload.shape),
                "order": json.dumps(list(payload.tensors)),
            }
            if payload.shared:
                tensors |= {f"shared.{name}": tensor.clone() for name, tensor in payload.shared.items()}
                metadata["shared"] = json.dumps(list(payload.shared))
            save_file({**tensors, "weight": weight, "expected": codec.decode(payload).clone()}, path, metadata)
            print(f"wrote {path.relative_to(HERE)}")


if __name__ == "__main__":
    main(replace="--replace" in sys.argv[1:])
