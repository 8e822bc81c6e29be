"""What a page is made of: sections with figures, tables and texts. The templates only lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tenpak.allocation.profile import Profile
from tenpak.report.card import size
from tenpak.report.contents import Contents
from tenpak.report.figure import Figure
from tenpak.report.figures import bits_map, damage_map, drift, peaks, predicted_losses
from tenpak.report.frontier import frontier, searched
from tenpak.report.inputs import Diagnosis, Loss, Quality, Sample, Step
from tenpak.report.provenance import command, provenance
from tenpak.report.treemap import Legend, legend, treemap

__all__ = [
    "UNMEASURED",
    "Continuation",
    "Row",
    "Section",
    "Table",
    "Tile",
    "headline",
    "increase",
    "measured_on",
    "report_sections",
    "with_error",
]

UNMEASURED = "`tenpak compress MODEL -o OUT --evaluation TEXT` measures what it writes."
_NARROW = 9  # kinds of matrices: with more of them, three heat maps are too wide for a row
_DIAGNOSE = "`tenpak diagnose ORIGINAL ARTIFACT --json > FILE`, then `tenpak report ARTIFACT --diagnosis FILE`"


@dataclass(frozen=True)
class Tile:
    """A figure of the headline: the number, what it is, a note, and the standard error."""

    value: str
    label: str
    note: str = ""
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table; level 1 details the row above it, and a heading spans the table."""

    cells: tuple[str, ...]
    level: int = 0
    heading: bool = False


@dataclass(frozen=True)
class Table:
    """A table; ``numeric`` columns stand right, ``foot`` is the total, and one with a ``fold`` opens at a click."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: frozenset[int] = frozenset()
    foot: tuple[str, ...] = ()
    fold: str = ""


@dataclass(frozen=True)
class Continuation:
    """A prompt continued by both models: what they have in common, and how each goes on."""

    prompt: str
    common: str
    original: str
    compressed: str
    note: str


@dataclass(frozen=True)
class Section:
    """A part of a page. Where something is missing, ``missing`` says which command provides it (code in backticks)."""

    id: str
    title: str
    lead: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    legend: tuple[Legend, ...] = ()
    samples: tuple[Continuation, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    code: str = ""
    missing: tuple[str, ...] = ()


def headline(contents: Contents) -> tuple[Tile, ...]:
    """What one wants to know first."""
    report = contents.report
    tiles = [
        Tile(f"{report.ratio_fp32:.2f}×", "smaller than FP32", f"{report.ratio_checkpoint:.2f}× than the checkpoint"),
        Tile(f"{report.bpw:.3f}", "bits per weight", f"{size(report.bytes)}, everything counted"),
    ]
    quality = contents.quality
    if quality is None:
        return (*tiles, Tile("—", "quality", "not measured"))
    if quality.ppl_increase is not None:
        known = quality.ppl is not None and quality.ppl_original is not None
        ends = f"from {quality.ppl_original:.4f} to {quality.ppl:.4f}" if known else ""
        tiles.append(_tile(quality.ppl_increase, quality.ppl_increase_se, "+.2%", "perplexity", ends))
    if quality.kl is not None:
        tiles.append(_tile(quality.kl, quality.kl_se, ".5f", "KL divergence", "nats per token"))
    if quality.top1 is not None:
        tiles.append(_tile(quality.top1, quality.top1_se, ".2%", "same top token", "as the original"))
    return tuple(tiles)


def _tile(value: float, error: float | None, spec: str, label: str, note: str) -> Tile:
    return Tile(format(value, spec), label, note, "" if error is None else f"± {format(error, spec.lstrip('+'))}")


def with_error(value: float | None, error: float | None, spec: str) -> str:
    """A figure with its standard error, where there is one; a dash where it is missing."""
    if value is None:
        return "—"
    return format(value, spec) + ("" if error is None else f" ± {format(error, spec.lstrip('+'))}")


def increase(quality: Quality) -> str:
    """The increase of perplexity in per cent."""
    return with_error(quality.ppl_increase, quality.ppl_increase_se, "+.2%")


def report_sections(contents: Contents, diagnosis: Diagnosis | None, profile: Profile | None) -> list[Section]:
    """The sections of one artifact's page, in their order."""
    found = diagnosis or Diagnosis()
    sections = [
        _verdict(found),
        _frontier(contents, profile),
        _bill(contents),
        _map(contents),
        _heat(contents, found),
        _drift(found),
        _losses(found, profile),
        _samples(found),
        _tensors(contents, found),
        _provenance(contents),
    ]
    return [section for section in sections if section is not None]


def _verdict(diagnosis: Diagnosis) -> Section | None:
    notes = list(diagnosis.verdict)
    if diagnosis.culprit is not None:
        notes.append(f"Most of the damage comes from {diagnosis.culprit.layer}: {diagnosis.culprit.why}")
    if not notes:
        return None
    return Section("verdict", "What the diagnosis says", notes=tuple(notes))


def _frontier(contents: Contents, profile: Profile | None) -> Section:
    figures = [figure for figure in (frontier(contents, profile), searched(contents)) if figure is not None]
    if len(figures) == 2 and figures[0].place == "wide":
        figures[1] = replace(figures[1], place="wide", height=260)
    missing = []
    if contents.quality is None or contents.quality.kl is None:
        missing.append(f"The quality was not measured. {UNMEASURED}")
    return Section("frontier", "What the size costs", figures=tuple(figures), missing=tuple(missing))


def measured_on(contents: Contents) -> str:
    """What the headline's quality was measured on, or how to measure it."""
    quality = contents.quality
    if quality is None:
        return f"The quality was not measured. {UNMEASURED}"
    window = "" if quality.window is None else f" in windows of {quality.window}"
    return (
        f"Measured on {quality.text or 'an unnamed text'}, {quality.tokens:,} tokens{window}, {quality.dtype}, on "
        "the files as they load from disk, against the original. ± is one standard error."
    )


def _bill(contents: Contents) -> Section:
    bill, parameters = contents.bill, max(contents.report.parameters, 1)

    def row(name: str, count: str, nbytes: int, level: int = 0) -> Row:
        cells = (name, f"{nbytes:,}", f"{nbytes / bill.bytes:.2%}", f"{8 * nbytes / parameters:.4f}", count)
        return Row(cells, level)

    rows = []
    for item in bill.items:
        what = {"payload": item.name, "dense": f"dense {item.name}", "header": f"header: {item.name}"}[item.what]
        rows.append(row(what, f"{item.tensors:,}" if item.tensors else "", item.bytes))
        if len(item.fields) > 1:
            rows += [row(name, "", count, 1) for name, count in item.fields.items()]
    total = row("all weight files", f"{len(contents.tensors):,}", bill.bytes).cells
    tables = [
        Table(
            "Every byte of the weight files",
            ("", "bytes", "share", "bits per weight", "tensors"),
            tuple(rows),
            frozenset({1, 2, 3, 4}),
            total,
        )
    ]
    if len(bill.files) > 1:
        tables.append(_files(contents))
    return Section(
        "bill", "The size bill", "The rows add up to what the file system says, to the byte.", tables=tuple(tables)
    )


def _files(contents: Contents) -> Table:
    files = contents.bill.files
    columns = [[file.payload, file.dense, file.header, file.padding, file.size] for file in files]
    rows = tuple(
        Row((file.name, *(f"{count:,}" for count in counts))) for file, counts in zip(files, columns, strict=True)
    )
    foot = ("all weight files", *(f"{sum(column):,}" for column in zip(*columns, strict=True)))
    names = ("file", "payloads", "dense", "header", "padding", "size")
    return Table("The same by file, in bytes", names, rows, frozenset(range(1, 6)), foot)


def _map(contents: Contents) -> Section:
    lead = "Areas are bytes. A click on a block shows it alone, a click on the bar above leads back."
    return Section("map", "Where the bytes are", lead, figures=(treemap(contents),), legend=legend(contents))


def _heat(contents: Contents, diagnosis: Diagnosis) -> Section:
    bits = bits_map(contents)
    figures = (() if bits is None else (bits,)) + tuple(damage_map(contents, diagnosis))
    kinds = {tensor.place.part for tensor in contents.tensors.values() if tensor.is_matrix}
    if len(figures) == 3 and len(kinds) <= _NARROW:
        figures = tuple(replace(figure, place="third") for figure in figures)
    outside = [t for t in contents.tensors.values() if t.place.block is None and t.is_matrix]
    notes = tuple(f"Outside of the blocks: {t.name}, {t.bpw:.2f} bits per weight ({t.codec})." for t in outside)
    missing = () if diagnosis.weights else (f"What each weight loses: {_DIAGNOSE}.",)
    return Section("blocks", "Block by block", figures=figures, notes=notes, missing=missing)


def _drift(diagnosis: Diagnosis) -> Section:
    culprit = "" if diagnosis.culprit is None else diagnosis.culprit.layer
    figures = tuple(
        figure for figure in (drift(diagnosis.layers, culprit), peaks(diagnosis.layers)) if figure is not None
    )
    missing = () if figures else (f"How activations drift from the original's: {_DIAGNOSE}.",)
    return Section("drift", "Drift by depth", figures=figures, missing=missing)


def _losses(diagnosis: Diagnosis, profile: Profile | None) -> Section:
    figure = None if profile is None else predicted_losses(_pairs(diagnosis, profile))
    figures = () if figure is None else (figure,)
    hint = (
        "Predicted against measured losses: `tenpak profile MODEL --measure 20 -o FILE`, then `tenpak report ARTIFACT "
        "--profile FILE`."
    )
    return Section("losses", "How good the predictions were", figures=figures, missing=() if figures else (hint,))


def _pairs(diagnosis: Diagnosis, profile: Profile) -> list[Loss]:
    """Losses that are both predicted and measured: by the profile, or by the diagnosis of what was written."""
    pairs = [Loss(name=m.tensor, recipe=m.recipe, predicted=m.predicted, measured=m.kl) for m in profile.measured]
    done = {(pair.name, pair.recipe) for pair in pairs}
    measured = {(weight.name, weight.codec): weight.kl for weight in diagnosis.weights if weight.codec is not None}
    for tensor in profile.tensors:
        for option in tensor.options:
            kl = measured.get((tensor.name, option.recipe))
            if kl is not None and (tensor.name, option.recipe) not in done:
                pairs.append(Loss(name=tensor.name, recipe=option.recipe, predicted=option.loss, measured=kl))
    return pairs


def _samples(diagnosis: Diagnosis) -> Section:
    tables = () if diagnosis.step is None or not diagnosis.step.original else (_next_tokens(diagnosis.step),)
    samples = tuple(_continuation(sample) for sample in diagnosis.generation)
    missing = () if samples or tables else (f"What both models write: {_DIAGNOSE}.",)
    lead = "From the mark on they differ." if samples else ""
    return Section("samples", "What both models write", lead, tables=tables, samples=samples, missing=missing)


def _continuation(sample: Sample) -> Continuation:
    length = 0
    for one, other in zip(sample.original, sample.compressed, strict=False):
        if one != other:
            break
        length += 1
    notes = ["the same throughout" if sample.first_divergence is None else f"same for {sample.first_divergence} tokens"]
    if sample.repetition is not None and sample.repetition_original is not None:
        notes.append(f"repeated: {sample.repetition_original:.0%} → {sample.repetition:.0%}")
    if sample.distinct_2 is not None and sample.distinct_2_original is not None:
        notes.append(f"distinct pairs: {sample.distinct_2_original:.0%} → {sample.distinct_2:.0%}")
    return Continuation(
        prompt=sample.prompt,
        common=sample.original[:length],
        original=sample.original[length:],
        compressed=sample.compressed[length:],
        note="; ".join(notes),
    )


def _next_tokens(step: Step) -> Table:
    def cells(tokens: Sequence[object], number: int) -> tuple[str, str]:
        if number >= len(tokens):
            return "", ""
        token = tokens[number]
        text = getattr(token, "token", "").replace("\n", "⏎").replace(" ", "␣")
        return text, with_error(getattr(token, "probability", None), None, ".2%")

    count = max(len(step.original), len(step.compressed))
    rows = tuple(
        Row((str(number + 1), *cells(step.original, number), *cells(step.compressed, number)))
        for number in range(count)
    )
    columns = ("", "original", "probability", "compressed", "probability")
    return Table(f"The likeliest next tokens after “{step.prompt}”", columns, rows, frozenset({0, 2, 4}))


def _tensors(contents: Contents, diagnosis: Diagnosis) -> Section:
    findings = {finding.name: finding for finding in diagnosis.weights}
    columns = ["tensor", "shape", "codec", "bytes", "bits per weight"]
    told = [
        (key, label, spec)
        for key, label, spec in (
            ("relative_error", "relative error", ".4f"),
            ("kl", "KL alone", ".2e"),
            ("kurtosis", "kurtosis", ".1f"),
            ("effective_rank", "effective rank", ".1f"),
        )
        if any(getattr(finding, key) is not None for finding in findings.values())
    ]
    rows = []
    for tensor in contents.tensors.values():
        cells = [tensor.name, "×".join(map(str, tensor.shape)) or "scalar", tensor.codec]
        cells += [f"{tensor.bytes:,}", f"{tensor.bpw:.3f}"]
        finding = findings.get(tensor.name)
        cells += [with_error(getattr(finding, key, None), None, spec) for key, _, spec in told]
        rows.append(Row(tuple(cells)))
    columns += [label for _, label, _ in told]
    fold = f"all {len(rows)} tensors"
    table = Table("Every tensor", tuple(columns), tuple(rows), frozenset(range(3, len(columns))), fold=fold)
    return Section("tensors", "Every tensor", tables=(table, *_dense(contents)))


def _dense(contents: Contents) -> tuple[Table, ...]:
    groups: dict[str, list[str]] = {}
    for name, tensor in contents.tensors.items():
        if tensor.reason:
            groups.setdefault(tensor.reason, []).append(name)
    if not groups:
        return ()
    rows = tuple(
        Row((reason, f"{len(names):,}", f"{sum(contents.tensors[name].bytes for name in names):,}", names[0]))
        for reason, names in groups.items()
    )
    return (
        Table("What is not compressed, and why", ("reason", "tensors", "bytes", "such as"), rows, frozenset({1, 2})),
    )


def _provenance(contents: Contents) -> Section:
    note = "Texts stand in the command by name; their hashes tell whether they are the same."
    return Section(
        "provenance",
        "Where it comes from",
        facts=tuple(provenance(contents)),
        code=command(contents),
        notes=(note,),
    )
