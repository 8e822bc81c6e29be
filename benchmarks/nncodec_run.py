"""Run by ``frontier`` in an environment of nncodec that holds nothing of tenpak: code a model, decode it again."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Code the weights of ``job["model"]`` into ``job["out"]``; prints the size of the bitstream."""
    import importlib.abc
    import importlib.machinery
    from unittest.mock import MagicMock

    unused = {"torchvision", "pandas", "cv2", "ptflops", "torchmetrics", "sklearn", "h5py", "tensorflow", "flwr"}

    class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            found = name.split(".")[0] in unused
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

        def create_module(self, spec: Any) -> Any:
            return MagicMock(__path__=[], __name__=spec.name, __spec__=spec)

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.append(Empty())
    import torch
    from nncodec import nnc
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.float().numpy() for name, tensor in load_file(job["model"]).items()}
    path = job["out"] + ".nnc"
    stream = nnc.compress(dict(tensors), bitstream_path=path, qp=job["qp"], use_dq=True, return_bitstream=True)
    decoded = nnc.decompress(stream)
    save_file({name: torch.tensor(value) for name, value in decoded.items()}, job["out"])
    print(len(stream))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
