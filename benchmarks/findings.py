"""Tables of docs/findings.md, allocation.md, codecs.md and pixel.md: from seeds, mixtures, families, pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = [
    "claims", "coded", "family", "key", "limits", "pixel", "same_bytes", "scaling", "single_recipes", "sizes", "solver",
    "tables",
]  # fmt: skip

Row = tuple[str, ...]

# What a recipe gains by statistics and feedback, at the same bytes.
PAIRS = {
    "TenPak-X": "… the same bytes, statistics and feedback",
    "TenPak-X v2": "… v2, the same bytes, statistics and feedback",
    "INT3 g32": "INT3 g32, with feedback",
    "2:4 + INT4": "2:4 + INT4, with feedback",
}


def key(name: str, options: Iterable[str]) -> str:
    """Under what the figures of a claim are found: a name that is its own, "…" goes on from the claim before."""
    return f"{name}: {' '.join(options)}"


def claims(result: dict[str, Any]) -> Iterator[Row]:
    """Claim by claim, and what each model says."""
    models = list(result["models"].values())
    names = [case.partition(",")[0] for case in result["models"]]
    yield ("", "method", "recipe", "claimed", *(f"{name}: ×, perplexity, KL" for name in names), "verdict", "why")
    for claim in result["claims"]:
        ratio = "" if claim["ratio"] is None else f"{claim['ratio']:g}×"
        loss = "" if claim["loss"] is None else f"{claim['loss']:+.2%}"
        yield (
            claim["system"],
            claim["name"].strip(),
            f"`{' '.join(claim['options']).removeprefix('--recipe ').removeprefix('dense --set ')}`",
            " ".join(part for part in (ratio, loss) if part),
            *(_figures(rows[key(claim["name"], claim["options"])]) for rows in models),
            claim["verdict"],
            claim["why"],
        )


def same_bytes(result: dict[str, Any]) -> Iterator[Row]:
    """Recipes of older systems without and with what statistics and feedback give them."""
    yield (
        "model, text",
        "recipe",
        "bytes",
        "KL as published",
        "bytes",
        "KL with statistics and feedback",
        "times less",
    )
    for case, rows in result["models"].items():
        by_name = {claim["name"]: rows[key(claim["name"], claim["options"])] for claim in result["claims"]}
        for plain, better in PAIRS.items():
            a, b = by_name[plain], by_name[better]
            yield (
                case,
                plain,
                f"{a['bytes']:,}",
                f"{a['kl']:.5f}",
                f"{b['bytes']:,}",
                f"{b['kl']:.5f}",
                f"{a['kl'] / b['kl']:.1f}",
            )


def scaling(result: dict[str, Any]) -> Iterator[Row]:
    """The same recipes on models of rising size."""
    models = result["scaling"]
    yield ("method", *(f"{case.partition(',')[0]}: bits per weight, KL" for case in models))
    for name in next(iter(models.values())):
        yield (name.strip(), *(f"{rows[name]['bpw']:.2f}, {rows[name]['kl']:.5f}" for rows in models.values()))


def single_recipes(result: dict[str, Any]) -> Iterator[Row]:
    """Plans over all recipes at the bytes of each."""
    yield ("model", "bytes", "bits per weight", "best single recipe", "its KL", "plan's bytes", "plan's KL", "of it")
    for model, found in result["singles"].items():
        for recipe, row in sorted(found["plans"].items(), key=lambda item: item[1]["plan"]["limit"]):
            plan = row["plan"]
            yield (
                model,
                f"{plan['limit']:,}",
                f"{found['singles'][recipe]['bpw']:.2f}",
                f"`{row['best']}`",
                f"{row['best_kl']:.5f}",
                f"{plan['bytes']:,}",
                f"{plan['kl']:.5f}",
                f"{plan['kl'] / row['best_kl']:.2f}",
            )


def tables(result: dict[str, Any]) -> Iterator[Row]:
    """Plans over grids beside the tables of older systems."""
    yield ("model", "table", "bytes", "KL", "plan's bytes", "plan's KL", "times less")
    for model, found in result["tables"].items():
        for name, row in found.items():
            table, plan = row["table"], row["plan"]
            yield (
                model,
                name,
                f"{table['bytes']:,}",
                f"{table['kl']:.5f}",
                f"{plan['bytes']:,}",
                f"{plan['kl']:.5f}",
                f"{table['kl'] / plan['kl']:.1f}",
            )


def sizes(result: dict[str, Any]) -> Iterator[Row]:
    """Written bytes relative to what was allowed."""
    models = list(result["sizes"])
    yield ("`--bpw`", *models)
    for bits in next(iter(result["sizes"].values())):
        cells = [result["sizes"][model][bits] for model in models]
        yield (bits, *("out of reach" if c is None else f"{c['bytes'] / c['limit'] - 1:+.3%}" for c in cells))


def limits(result: dict[str, Any]) -> Iterator[Row]:
    """Budgets of quality and what was measured on the artifact."""
    yield ("model", "codecs", "budget", "reached", "of the budget", "standard error", "bits per weight", "trials")
    for model, rows in result["limits"].items():
        for row in rows:
            yield (
                model,
                row["kind"],
                f"`{row['budget']}`",
                f"{row['reached']:.5f}",
                f"{row['reached'] / row['limit']:.1%}",
                f"{row['error']:.5f}",
                f"{row['bpw']:.2f}",
                str(row["trials"]),
            )


def solver(result: dict[str, Any]) -> Iterator[Row]:
    """A thousand tensors with forty candidates."""
    yield ("budget", "seconds", "proven gap")
    for name, row in result["solver"].items():
        yield (name, f"{row['seconds']:.2f}", f"{row['gap']:.2g}")


def family(name: str, result: dict[str, Any]) -> Iterator[Row]:
    """Recipes of a family of codecs: whole weight files, by size on the first model."""
    recipes = result["tables"][name]
    models = {case: rows for case, rows in result["models"].items() if all(recipe in rows for recipe in recipes)}
    first = next(iter(models.values()))
    recipes = sorted(recipes, key=lambda recipe: first[recipe]["bytes"])

    def figures(row: dict[str, Any]) -> Row:
        return f"{row['bytes']:,}", f"{row['bpw']:.2f}", f"{row['kl']:.4f}"

    return _beside(models, {recipe: f"`{recipe}`" for recipe in recipes}, ("bytes", "bits per weight", "KL"), figures)


def coded(result: dict[str, Any]) -> Iterator[Row]:
    """What entropy coding saves of recipes of a fixed rate."""
    models = result["coded"]

    def figures(row: dict[str, Any]) -> Row:
        return f"{row['bits']:.2f}", f"{row['coded']:.2f}", f"{1 - row['coded'] / row['bits']:.1%}"

    names = {recipe: f"`{recipe}`" for recipe in next(iter(models.values()))}
    return _beside(models, names, ("bits per weight", "coded", "saves"), figures)


def pixel(result: dict[str, Any]) -> Iterator[Row]:
    """What PIXEL's classes make of models."""
    models, names = result["models"], {}
    for name in next(iter(models.values())):
        said = next((end for end in (", to nearest", ", text of its own") if name.endswith(end)), "")
        names[name] = f"`{name.removesuffix(said)}`{said}"

    def figures(row: dict[str, Any]) -> Row:
        return f"{row['ratio_fp32']:.2f}", f"{row['ppl_increase']:+.2%}", f"{row['kl']:.4f}"

    return _beside(models, names, ("×", "perplexity", "KL"), figures)


def _beside(
    models: dict[str, dict[str, Any]], names: dict[str, str], columns: Row, figures: Callable[[dict[str, Any]], Row]
) -> Iterator[Row]:
    """A row for each name, which the table has in another form; all columns for each model."""
    heads = ((f"{case.partition(',')[0]}: {columns[0]}", *columns[1:]) for case in models)
    yield ("", *(cell for head in heads for cell in head))
    for name, shown in names.items():
        yield (shown, *(cell for rows in models.values() for cell in figures(rows[name])))


def _figures(row: dict[str, Any]) -> str:
    return f"{row['ratio_fp32']:.2f}×, {row['ppl_increase']:+.2%}, {row['kl']:.5f}"
