"""tenpak makes decoder-only language models about ten times smaller, and proves it on the file it wrote.

>>> import tenpak
>>> report = tenpak.compress("MODEL", "OUT", recipe="int4:g32")     # doctest: +SKIP
>>> model = tenpak.load("OUT")                                      # doctest: +SKIP
>>> tenpak.evaluate("OUT", against="MODEL", text="TEXT").kl         # doctest: +SKIP

After ``import tenpak``, ``transformers.AutoModelForCausalLM.from_pretrained`` loads artifacts too. Importing is cheap:
torch and transformers are imported by what needs them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tenpak._autoload import register_with_transformers
from tenpak.errors import TenpakError

if TYPE_CHECKING:
    from tenpak.artifact.reader import open_artifact
    from tenpak.artifact.verify import verify
    from tenpak.calibrating import calibrate
    from tenpak.evaluation.evaluate import evaluate
    from tenpak.nn.load import load
    from tenpak.pipeline import compress
    from tenpak.prediction import predict

__all__ = ["TenpakError", "calibrate", "compress", "evaluate", "load", "open_artifact", "predict", "verify"]
__version__ = version("tenpak")

_HOMES = {
    "calibrate": "tenpak.calibrating",
    "compress": "tenpak.pipeline",
    "evaluate": "tenpak.evaluation.evaluate",
    "load": "tenpak.nn.load",
    "open_artifact": "tenpak.artifact.reader",
    "predict": "tenpak.prediction",
    "verify": "tenpak.artifact.verify",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tenpak' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
