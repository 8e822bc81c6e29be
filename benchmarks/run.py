"""`make bench`: run the benchmarks (all, or those named) and write ``benchmarks/results/<name>.json``.

    python benchmarks/run.py [speed] [footprint] [large] [quality]

Then ``python benchmarks/render.py`` renders the tables that README and docs show.
"""

from __future__ import annotations

import sys

import footprint
import large
import quality
import speed
from environment import write

BENCHMARKS = {"speed": speed.run, "footprint": footprint.run, "large": large.run, "quality": quality.run}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"{name} …", file=sys.stderr)
        result = BENCHMARKS[name]()
        for part in [result] if isinstance(result, dict) else result:
            print(write(name, part))


if __name__ == "__main__":
    main()
