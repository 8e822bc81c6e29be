"""`make bench`: run the benchmarks (all, or those named) and write ``benchmarks/results/<name>.json``.

    python benchmarks/run.py [speed] [footprint] [large] [codecs] [quality] [feedback] [ablation] [trellis] [budgets]
                             [rivals] [policies] [mixtures] [ingredients] [seeds]
    python benchmarks/run.py peers | frontier   by name only: they install another library

Then ``python benchmarks/render.py`` renders the tables that README and docs show.
"""

from __future__ import annotations

import sys

import ablation
import budgets
import feedback
import footprint
import frontier
import large
import mixtures
import peers
import policies
import quality
import seeds
import speed
import trellis
from environment import write

BENCHMARKS = {
    "speed": speed.run,
    "footprint": footprint.run,
    "large": large.run,
    "codecs": large.run_codecs,
    "quality": quality.run,
    "feedback": feedback.run,
    "ablation": ablation.run,
    "trellis": trellis.run,
    "budgets": budgets.run,
    "rivals": budgets.run_rivals,
    "policies": policies.run,
    "mixtures": mixtures.run,
    "ingredients": frontier.run_ingredients,
    "seeds": seeds.run,
}
BY_NAME_ONLY = {"peers": peers.run, "frontier": frontier.run}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    known = {**BENCHMARKS, **BY_NAME_ONLY}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    for name in names:
        print(f"{name} …", file=sys.stderr)
        result = known[name]()
        for part in [result] if isinstance(result, dict) else result:
            print(write(name, part))


if __name__ == "__main__":
    main()
