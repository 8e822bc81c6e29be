"""Fill the tables of README and docs from ``benchmarks/results``, and draw the pictures.

    python benchmarks/render.py            rewrite them
    python benchmarks/render.py --check    exit 1 if a table differs from the results

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import findings
import picture
from environment import environments
from quality import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md", "docs/measurements.md", "docs/calibration.md", "docs/trellis.md", "docs/policies.md",
    "docs/findings.md", "docs/allocation.md", "docs/codecs.md", "docs/pixel.md",
)  # fmt: skip
_BASE = "gptq, propagation original (the default)"
_SLOT = re.compile(r"(<!-- table: ([a-z]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> None:
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        rendered = _SLOT.sub(lambda slot: slot[1] + TABLES[slot[2]]() + slot[3], text)
        if rendered != text:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(rendered)
    for name, (draw, source) in PICTURES.items():
        drawing = ROOT / "docs" / f"{name}.svg"
        image = draw(load(source)) if (RESULTS / f"{source}.json").is_file() else None
        if image is not None and (not drawing.is_file() or drawing.read_text() != image):
            stale.append(f"docs/{name}.svg")
            if "--check" not in sys.argv:
                drawing.write_text(image)
    if "--check" in sys.argv and stale:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results; run python benchmarks/render.py")
    print(f"rewritten: {', '.join(stale) or 'nothing'}")


# Of the presets, those that README shows.
HEADLINE = (
    "int8", "int4-g8", "int4-opt", "int4-g32", "int4-g32, gptq", "int4-g32, gptq, search, sweeps", "nf4", "gptq-int4",
    "awq-int4", "int3-g32", "int3-g32, gptq", "int3-g32, gptq, search, sweeps", "gptq-int3", "vq-calibrated",
)  # fmt: skip


def headline() -> str:
    """The bundled model on its own text."""
    rows = load("quality")["cases"][BUNDLED]
    return quality_table({name: rows[name] for name in HEADLINE})


def feedback() -> str:
    """KL relative to rounding to nearest at the same bytes."""

    def rows() -> Iterator[tuple[str, ...]]:
        for case, found in load("feedback")["cases"].items():
            for bits in (4, 3):
                nearest = found[f"nearest, int{bits}"]
                yield (
                    case,
                    f"int{bits}:g32",
                    f"{nearest['kl']:.5f}",
                    *(
                        f"{r['kl']:.5f} ({r['kl'] / nearest['kl']:.2f})"
                        for r in (found[f"gptq, int{bits}"], found[f"gptq and propagation, int{bits}"])
                    ),
                )

    head = ("model, text", "grid", "KL of nearest", "gptq (of nearest's)", "gptq and propagation (of nearest's)")
    return table(head, rows())


def ablation() -> str:
    """One thing changed at a time."""
    models = load("ablation")["models"]
    base = {model: result["rows"][_BASE]["kl"] for model, result in models.items()}
    names = list(dict.fromkeys(row for result in models.values() for row in result["rows"]))

    def cells(row: str) -> Iterator[str]:
        yield row
        for model, result in models.items():
            found = result["rows"].get(row)
            yield "" if found is None else f"{found['kl']:.5f} ± {found['kl_se']:.5f}"
            yield "" if found is None else f"{found['kl'] / base[model]:.2f}"

    head = ["changed", *(cell for model in models for cell in (f"KL, {model}", "of the base"))]
    return table(tuple(head), (tuple(cells(row)) for row in names))


def quality() -> str:
    """Every case."""
    cases = load("quality")["cases"]
    return "\n".join(f"### {case}\n\n{quality_table(rows)}" for case, rows in cases.items()) + "\n"


def quality_table(rows: dict[str, Any]) -> str:
    head = ("preset", "recipe", "bits per weight", "× vs FP32", "perplexity", "KL", "same top token")
    body = sorted(rows.items(), key=lambda item: -item[1]["bpw"])
    return table(
        head,
        (
            (
                preset,
                _recipe(r),
                f"{r['bpw']:.2f}",
                f"{r['ratio_fp32']:.2f}",
                *loss(r),
                f"{r['top1']:.1%}",
            )
            for preset, r in body
        ),
    )


def loss(row: dict[str, Any]) -> tuple[str, str]:
    """Increase of perplexity and KL of an evaluation, with their standard errors."""
    return (
        f"{row['ppl_increase']:+.2%} ± {row['ppl_increase_se']:.2%}",
        f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
    )


def _recipe(row: dict[str, Any]) -> str:
    """A row's recipe, with what else was asked for."""
    return "`" + " ".join([row["recipe"], *row.get("options", ())]) + "`"


def speed() -> str:
    """Weights per second."""
    rows = load("speed")["recipes"]
    return table(
        ("recipe", "encode", "decode", "product with one input"),
        (
            (
                f"`{name}`",
                *(millions(r.get(f"{what}_weights_per_second")) for what in ("encode", "decode", "product")),
            )
            for name, r in rows.items()
        ),
    )


def millions(value: float | None) -> str:
    """Empty where it was not measured."""
    if value is None:
        return ""
    return f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def large() -> str:
    """The 1.1-billion-parameter model."""
    result = load("large")
    calibrated = result["calibrated"]
    reading = f"{calibrated['windows']} × {calibrated['window']} tokens"
    rows = {f"`tenpak {name}`": found for name, found in result["commands"].items()}
    rows[f"`tenpak compress --recipe {calibrated['recipe']}`, {reading}"] = calibrated["compress"]
    rows[f"`tenpak calibrate`, {calibrated['calibrate']['tokens']:,} tokens"] = calibrated["calibrate"]
    return table(
        ("command", "peak resident memory, MB", "wall time, s"),
        ((name, f"{r['peak_resident_bytes'] / 1e6:,.0f}", f"{r['wall_seconds']:,.1f}") for name, r in rows.items()),
    )


def codecs() -> str:
    """The flagship and a profile on the 1.1-billion-parameter model."""
    r = load("codecs")
    rows = [
        (f"compress, `{r['recipe']}`, {r['bpw']:.2f} bits per weight", r["compress"]),
        (f"profile, {len(r['candidates'])} candidates, statistics given", r["profile"]),
    ]
    lines = [(name, f"{f['wall_seconds']:,.0f} s", f"{f['peak_resident_bytes'] / 1e6:,.0f} MB") for name, f in rows]
    found = r["load"]
    lines.append(("from disk to the first logits, everything decoded", f"{found['first_logits_seconds']:.1f} s", ""))
    lines.append(("a forward pass of 16 tokens after that", f"{found['forward_seconds']:.2f} s", ""))
    return table(("1.1 B parameters, two cores", "time", "peak resident memory"), lines)


def footprint() -> str:
    """Overhead in the weight files."""
    result = load("footprint")
    rows = [
        ("payload bytes", f"{result['payload_bytes']:,}"),
        ("dense bytes (norms)", f"{result['dense_bytes']:,}"),
        ("everything else in the weight files", f"{result['overhead_bytes']:,}"),
        ("… per compressed tensor", f"{result['overhead_bytes_per_weight_tensor']:.1f}"),
    ]
    return table(("", ""), rows)


def resident() -> str:
    """What a loaded model adds to its process."""
    names = {"original": "original", "memory": 'artifact, `runtime="memory"`', "speed": 'artifact, `runtime="speed"`'}
    found = load("large")["resident"]
    return table(
        ("1.1 B parameters, FP32 arithmetic", "resident memory of the model in use, MB", "of the original's"),
        (
            (name, f"{found[key]['model'] / 1e6:,.0f}", f"{found[key]['model'] / found['original']['model']:.0%}")
            for key, name in names.items()
        ),
    )


def peers() -> str:
    """GPTQ here and in llm-compressor."""
    return table(
        ("model, group", "columns", "KL", "llm-compressor's KL", "ratio", "seconds", "llm-compressor's seconds"),
        (
            (
                case,
                way,
                *(f"{r[name]['kl']:.5f} ± {r[name]['kl_se']:.5f}" for name in ("tenpak", "llm-compressor")),
                f"{r['kl_ratio']:.3f} ± {r['kl_ratio_se']:.3f}",
                *(f"{r[name]['seconds']['inside']['median']:.1f}" for name in ("tenpak", "llm-compressor")),
            )
            for case, found in load("peers")["cases"].items()
            for way, r in found["ways"].items()
        ),
    )


def budgets() -> str:
    """The flagship codec at ratios."""
    head = ("model, text", "`--target`", "bytes", "bits per weight", "× vs FP32", "perplexity", "KL", "s")
    return table(
        head,
        (
            (
                case,
                name,
                f"{r['bytes']:,}",
                f"{r['bpw']:.2f}",
                f"{r['ratio_fp32']:.2f}",
                *loss(r),
                f"{r['seconds']:.0f}",
            )
            for case, found in load("budgets")["models"].items()
            for name, r in found.items()
        ),
    )


def rivals() -> str:
    """The flagship codec at the bytes of GPTQ."""

    def rows() -> Iterator[tuple[str, ...]]:
        for case, found in load("rivals")["models"].items():
            for rival, r in found.items():
                ours = r["trellis"]["kl"]
                yield (
                    case,
                    f"`{rival}`",
                    f"{r['propagation']['bytes']:,}",
                    f"{r['trellis']['bytes']:,}",
                    f"{ours:.5f} ± {r['trellis']['kl_se']:.5f}",
                    *(
                        f"{r[way]['kl']:.5f}: {ours / r[way]['kl']:.2f} of it"
                        for way in ("propagation", "no propagation")
                    ),
                )

    head = ("model, text", "rival", "its bytes", "bytes", "KL", "rival's KL", "rival's KL without propagation")
    return table(head, rows())


def ten() -> str:
    """Ten times smaller, in a line for each model."""
    rows = (
        (
            case,
            name,
            f"{r['ratio_fp32']:.2f}",
            f"{r['bpw']:.2f}",
            *loss(r),
        )
        for case, found in load("budgets")["models"].items()
        for name, r in found.items()
        if name in ("10x", "12x")
    )
    return table(("model, text", "`--target`", "× vs FP32", "bits per weight", "perplexity", "KL"), rows)


def ingredients() -> str:
    """The flagship codec with one thing left out at a time."""
    result = load("ingredients")
    base = next(iter(result["rows"].values()))["kl"]
    return table(
        (f"at {result['bytes']:,} bytes, {result['model']}", "KL", "of the base's"),
        ((name, f"{row['kl']:.5f}", f"{row['kl'] / base:.2f}") for name, row in result["rows"].items()),
    )


def anatomy() -> str:
    """Where bytes go."""
    result = load("anatomy")
    whole = result["where"]["together"]
    head = (f"{result['model']}, `--target {result['target']}`", "bytes", "share")
    return table(head, ((name, f"{size:,.0f}", f"{size / whole:.1%}") for name, size in result["where"].items()))


def contexts() -> str:
    """Bytes by what a table depends on."""
    rows = load("anatomy")["contexts"]
    base = next(iter(rows.values()))
    head = ("a level's table depends on", "bytes of all streams", "more")
    return table(head, ((name, f"{size:,.0f}", f"{size / base - 1:+.1%}") for name, size in rows.items()))


def steps() -> str:
    """KL by how finely steps are told."""
    found = load("anatomy")["steps"]
    rows, base = found["rows"], next(iter(found["rows"].values()))
    head = (f"steps to, at {found['bytes']:,} bytes", "KL", "of the base's")
    return table(head, ((name, f"{r['kl']:.5f}", f"{r['kl'] / base['kl']:.2f}") for name, r in rows.items()))


def frontier() -> str:
    """KL of every method, by size."""
    result = load("frontier")
    rows = sorted((r["bytes"], name, r) for name, points in result["methods"].items() for r in points)
    parameters = 8 * result["methods"]["trellis"][0]["bytes"] / result["methods"]["trellis"][0]["bpw"]

    def point(r: dict[str, Any]) -> str:
        return f"`{r['recipe'].partition(':')[0]}`" if "recipe" in r else f"QP {r['qp']}"

    return table(
        ("bits per weight", "bytes", "method", "", "perplexity", "KL"),
        ((f"{8 * size / parameters:.2f}", f"{size:,}", name, point(r), *loss(r)) for size, name, r in rows),
    )


def gaussian() -> str:
    """Independent normal weights."""
    rows = load("trellis")["gaussian"]["bits"].values()
    return table(
        ("bits per weight", "above the bound", "bytes over the levels' conditional entropy"),
        (
            (f"{r['bits_per_weight']:.3f}", f"{r['above_bound']:.3f}", f"{r['over_conditional_entropy']:+.2%}")
            for r in rows
        ),
    )


def pace() -> str:
    """Encoding and decoding of the flagship codec."""
    r = load("trellis")["speed"]
    rows = [
        (f"encode, feedback included, {r['threads']} threads", f"{r['encode_weights_per_second'] / 1e6:.1f}"),
        ("decode at load, one thread", f"{r['decode_weights_per_second_and_core'] / 1e6:.0f}"),
    ]
    return table((f"{r['shape'][0]} × {r['shape'][1]}, {r['bits_per_weight']:.2f} bits", "M weights/s"), rows)


def parts() -> str:
    """Low rank of one part at a time."""
    return policies("parts", "compressed, everything else dense")


def whole() -> str:
    """Policies for whole models."""
    return policies("whole", "recipe, policy")


def mlps() -> str:
    """Codecs of the MLPs alone."""
    return policies("mlp", "codec of the MLPs")


def policies(name: str, first: str) -> str:
    return table(
        (first, "bytes", "bits per weight", "perplexity", "KL"),
        ((row, f"{r['bytes']:,}", f"{r['bpw']:.2f}", *loss(r)) for row, r in load("policies")[name].items()),
    )


def machine() -> str:
    """Where and when."""
    lines = []
    for name in sorted(path.stem for path in RESULTS.glob("*.json")):
        for case, env in environments(load(name)):
            versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
            what = f"{name}, {case}" if case else name
            lines.append(f"- {what}: {env['cpu']}, {env['cores']} cores, {versions}; commit `{env['commit'][:12]}`")
    return "\n".join(lines) + "\n"


def table(head: tuple[str, ...], rows: Any) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(cells) + " |\n"

    def lines() -> Iterator[str]:
        yield line(head)
        yield "|" + "---|" * len(head) + "\n"
        yield from (line(row) for row in rows)

    return "".join(lines())


def of(name: str, rows: Callable[[dict[str, Any]], Iterator[tuple[str, ...]]]) -> str:
    """A table whose header comes first."""
    header, *rest = rows(load(name))
    return table(header, rest)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


PICTURES = {"frontier": (picture.frontier, "frontier"), "findings": (picture.findings, "seeds")}
TABLES = {
    "budgets": budgets,
    "rivals": rivals,
    "ten": ten,
    "ingredients": ingredients,
    "anatomy": anatomy,
    "contexts": contexts,
    "steps": steps,
    "frontier": frontier,
    "gaussian": gaussian,
    "pace": pace,
    "ablation": ablation,
    "feedback": feedback,
    "headline": headline,
    "quality": quality,
    "speed": speed,
    "large": large,
    "codecs": codecs,
    "footprint": footprint,
    "resident": resident,
    "peers": peers,
    "parts": parts,
    "whole": whole,
    "mlps": mlps,
    "machine": machine,
    "claims": partial(of, "seeds", findings.claims),
    "samebytes": partial(of, "seeds", findings.same_bytes),
    "scaling": partial(of, "seeds", findings.scaling),
    "singles": partial(of, "mixtures", findings.single_recipes),
    "tables": partial(of, "mixtures", findings.tables),
    "sizes": partial(of, "mixtures", findings.sizes),
    "limits": partial(of, "mixtures", findings.limits),
    "solver": partial(of, "mixtures", findings.solver),
    **{
        name: partial(of, "families", partial(findings.family, name))
        for name in ("lowrank", "sparsehalf", "sparse", "pattern", "vector", "shared", "additive")
    },
    "coded": partial(of, "families", findings.coded),
    "pixel": partial(of, "pixel", findings.pixel),
}

if __name__ == "__main__":
    main()
