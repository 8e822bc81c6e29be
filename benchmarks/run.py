"""`make bench`: run the benchmarks (all, or those named) and write ``benchmarks/results/<name>.json``.

    python benchmarks/run.py [speed] [footprint] [large] [codecs] [quality] [feedback] [ablation] [trellis] [anatomy]
                             [budgets] [rivals] [policies] [mixtures] [ingredients] [families] [pixel] [seeds]
    python benchmarks/run.py peers | frontier   by name only: they install another library
    python benchmarks/run.py budgets --case ref-8m
                             only the cases whose names hold these words; the others keep the figures they have
    python benchmarks/run.py budgets --case ref-8m --row "web text"
                             and of these only such rows; with mixtures: such parts, as sizes or limits

Then ``python benchmarks/render.py`` renders the tables that README and docs show.
"""

from __future__ import annotations

import argparse
import sys

import ablation
import anatomy
import budgets
import families
import feedback
import footprint
import frontier
import large
import mixtures
import peers
import pixel
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
    "anatomy": anatomy.run,
    "budgets": budgets.run,
    "rivals": budgets.run_rivals,
    "policies": policies.run,
    "mixtures": mixtures.run,
    "ingredients": frontier.run_ingredients,
    "families": families.run,
    "pixel": pixel.run,
    "seeds": seeds.run,
}
BY_NAME_ONLY = {"peers": peers.run, "frontier": frontier.run}
WITH_CASES = ("quality", "feedback", "budgets", "rivals", "mixtures", "seeds")
WITH_ROWS = ("budgets", "mixtures", "seeds")


def main() -> None:
    known = {**BENCHMARKS, **BY_NAME_ONLY}
    parser = argparse.ArgumentParser(description="Run benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--case", help=f"only cases whose names hold this, of {', '.join(WITH_CASES)}")
    parser.add_argument("--row", help=f"with --case and {', '.join(WITH_ROWS)}: only rows whose names hold this")
    options = parser.parse_args()
    for name in options.names:
        if name not in known:
            sys.exit(f"no benchmark {name!r}; there are {', '.join(known)}")
    if options.row is not None and (options.case is None or not {*options.names} <= {*WITH_ROWS}):
        sys.exit(f"--row goes with --case and {', '.join(WITH_ROWS)}")
    if options.case is not None:
        quality.only(options.case, options.row)
        if not quality.cases() or not {*options.names} <= {*WITH_CASES}:
            sys.exit(
                f"no case {options.case!r}, or one of a benchmark that has none; {', '.join(WITH_CASES)} have cases"
            )
    for name in options.names or (BENCHMARKS if options.case is None else WITH_CASES):
        print(f"{name} …", file=sys.stderr)
        result = known[name]()
        for part in [result] if isinstance(result, dict) else result:
            print(write(name, part, part=options.case is not None, row=options.row))


if __name__ == "__main__":
    main()
