"""The pages: what is on them, what stays text, what is said where something is missing."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, QUALITY, diagnosis, profile, search, write_json, write_model

from tenpak.artifact.verify import verify
from tenpak.artifact.writer import check_output
from tenpak.errors import AllocationError, ArtifactError, EvaluationError, OutputExistsError
from tenpak.report.comparison import entries
from tenpak.report.contents import place, read_contents, short_kinds, short_recipe
from tenpak.report.page import compare_page, default_page, report_page, write_page
from tenpak.report.provenance import command
from tenpak.report.report import measured

MIXED = {"self_attn.v_proj": "int8:row", "mlp.down_proj": "int4:g16+int2:g16", "embed": "ec-int8:row"}


class Document(HTMLParser):
    """A page as a browser reads it: text outside of scripts, the data, tags."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._raw = ""
        self.feed(page)
        self.data: Any = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        self.text += "\n" if tag in ("td", "th", "p", "li", "dt", "dd") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        return {figure["id"]: figure for figure in self.data["figures"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("page") / "artifact", recipes=MIXED, recorded=search())


@pytest.fixture(scope="module")
def full(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Document:
    """A page with everything on it."""
    more = tmp_path_factory.mktemp("more")
    found = write_json(more / "diagnosis.json", diagnosis(folder))
    return Document(report_page(folder, diagnosis=found, profile=write_json(more / "profile.json", profile(folder))))


# What is on it ---------------------------------------------------------------------------------------------------


def test_everything_is_there(full: Document, folder: Path) -> None:
    figures = {
        "frontier", "search", "treemap", "bits", "relative-error", "kl", "drift", "peaks", "losses",
    }  # fmt: skip
    assert set(full.figures) == figures
    report = measured(folder)
    for fact in (
        f"{report.ratio_fp32:.2f}×", f"{report.bpw:.3f}", "+1.81%", "± 0.09%", "0.01230", "± 0.00040", "95.10%",
        "evaluation.txt", "65,536 tokens", "someone/model", f"{report.bytes:,}", "Nothing is wrong",
        "tenpak compress someone/model", "2026-01-02T03:04:05Z", "ab" * 32, "had a red ball",
    ):  # fmt: skip
        assert fact in full.text, fact


def test_plotly_accepts_every_figure(full: Document) -> None:
    from plotly import graph_objects

    for figure in full.figures.values():
        text = re.sub(r'"@(\w+)"', '"#123456"', json.dumps({"data": figure["data"], "layout": figure["layout"]}))
        graph_objects.Figure(json.loads(text))  # raises where a property is unknown or a value is out of range


def test_the_treemap_holds_every_byte(full: Document, folder: Path) -> None:
    trace = full.figures["treemap"]["data"][0]
    values = dict(zip(trace["ids"], trace["values"], strict=True))
    children: dict[str, int] = {}
    for parent, value in zip(trace["parents"], trace["values"], strict=True):
        children[parent] = children.get(parent, 0) + value
    assert values["root"] == children["root"] == measured(folder).bytes
    assert all(values[parent] == total for parent, total in children.items() if parent)
    assert {f"/t{name}" for name in read_contents(folder).tensors} <= values.keys()


def test_heat_maps_have_the_bits_of_the_manifest(full: Document, folder: Path) -> None:
    trace = full.figures["bits"]["data"][0]
    assert trace["x"] == ["q", "k", "v", "o", "gate", "up", "down"]
    entry = read_contents(folder).manifest.weights["model.layers.2.mlp.down_proj.weight"]
    assert trace["z"][2][6] == pytest.approx(entry.bits / (16 * 32))


def test_the_bill_on_the_page_adds_up(full: Document, folder: Path) -> None:
    rows = re.search(r"Every byte of the weight files(.*?)all weight files\s*([\d,]+)", full.text, re.S)
    assert rows is not None
    assert int(rows[2].replace(",", "")) == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_labels_of_near_points_do_not_overlap(full: Document) -> None:
    traces = [trace for trace in full.figures["frontier"]["data"] if "text" in trace]
    assert traces[-1]["text"][0].endswith("×")
    assert all(trace["hovertext"] for trace in traces)


def test_it_is_the_same_each_time(folder: Path) -> None:
    assert report_page(folder) == report_page(folder)


def test_it_loads_nothing(full: Document) -> None:
    assert not [tags for tags in full.tags if tags[0] in ("link", "img", "iframe", "object", "embed", "base")]
    assert not [attributes for _, attributes in full.tags if {"src", "srcset", "action"} & attributes.keys()]
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in full.tags)  # type: ignore[union-attr]


# What stays text -------------------------------------------------------------------------------------------------


def test_names_and_texts_stay_text(tmp_path: Path) -> None:
    quality = {**QUALITY, "text": HOSTILE}
    folder = write_model(tmp_path / "artifact", name=HOSTILE, prefix=f"{HOSTILE}.layers", quality=quality)
    content = diagnosis(folder)
    content["verdict"] = [HOSTILE, "`code`"]
    content["generation"][0] |= {"prompt": HOSTILE, "original": HOSTILE + "a", "compressed": HOSTILE + "b"}
    content["step"]["original"][0]["token"] = HOSTILE
    page = report_page(folder, diagnosis=write_json(tmp_path / "d.json", content))
    plain = Document(report_page(write_model(tmp_path / "plain")))
    found = Document(page)
    assert len(found.scripts) == len(plain.scripts) == 3
    assert "alert(1)" not in found.scripts[1] + found.scripts[2]
    assert found.text.count(HOSTILE) > 10
    trace = found.figures["treemap"]["data"][0]
    assert html.escape(HOSTILE) in trace["labels"][0]
    # What plotly shows may hold line breaks and bold letters of ours, and no other tag.
    told = json.dumps([[figure["data"], figure["layout"]] for figure in found.data["figures"]])
    assert set(re.findall(r"<[^>]*>", told)) <= {"<br>", "<b>", "</b>", "<extra>", "</extra>"}


def test_nothing_ends_the_data(tmp_path: Path) -> None:
    page = report_page(write_model(tmp_path / "artifact", name="</script><!--\u2028&", quality=None))
    data = page.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(data)
    assert Document(page).figures["treemap"]["data"][0]["labels"][0] == "&lt;/script&gt;&lt;!--\u2028&amp;"


def test_scripts_are_allowed_by_their_hashes_only(full: Document) -> None:
    import base64
    import hashlib

    metas = [attributes for tag, attributes in full.tags if tag == "meta"]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for script in full.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    (rule,) = [part for part in policy.split(";") if "script-src" in part]
    assert "unsafe" not in rule


# What is missing -------------------------------------------------------------------------------------------------


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    found = Document(report_page(write_model(tmp_path / "artifact", quality=None)))
    assert set(found.figures) == {"treemap", "bits"}
    assert "--evaluation TEXT" in found.text
    assert found.text.count("tenpak diagnose ORIGINAL ARTIFACT --json > FILE") == 3
    assert "--profile FILE" in found.text


@pytest.mark.parametrize("part", ["layers", "weights", "step", "generation", "verdict", "culprit"])
def test_a_diagnosis_may_lack_any_part(part: str, folder: Path, tmp_path: Path) -> None:
    content = diagnosis(folder)
    content[part] = None
    Document(report_page(folder, diagnosis=write_json(tmp_path / "null.json", content)))
    del content[part]
    Document(report_page(folder, diagnosis=write_json(tmp_path / "gone.json", content)))


def test_numbers_may_be_missing_or_not_finite(folder: Path, tmp_path: Path) -> None:
    content = diagnosis(folder)
    for layer in content["layers"]:
        layer |= {"relative_error": float("nan"), "cosine": None, "peak": float("inf")}
    for weight in content["weights"]:
        weight |= {"kl": None, "relative_error": float("nan")}
    found = Document(report_page(folder, diagnosis=write_json(tmp_path / "d.json", content)))
    assert not {"drift", "peaks", "kl", "relative-error"} & set(found.figures)


def test_a_broken_report_json_says_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "artifact", recorded=search())
    (folder / "report.json").write_text('{"search": 3')
    assert "search" not in Document(report_page(folder)).figures
    (folder / "report.json").write_text('{"search": {"trials": "many"}}')
    assert "search" not in Document(report_page(folder)).figures


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is not a diagnosis"),
        ('{"layers": 3}', "layers"),
        ('{"weights": [{"name": "other.weight"}]}', "other tensors"),
        ("{", "is not a diagnosis"),
    ],
)
def test_another_file_is_no_diagnosis(content: str, message: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        report_page(folder, diagnosis=path)
    assert "tenpak diagnose" in str(caught.value.hint)


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere\.json"):
        report_page(folder, diagnosis=tmp_path / "nowhere.json")
    with pytest.raises(AllocationError, match=r"nowhere\.json"):
        report_page(folder, profile=tmp_path / "nowhere.json")


def test_a_profile_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", name="other/model")
    path = write_json(tmp_path / "p.json", profile(other))
    with pytest.raises(EvaluationError, match="profile of another model"):
        report_page(folder, profile=path)


# Several ---------------------------------------------------------------------------------------------------------


def test_two_models_and_who_is_beaten(tmp_path: Path) -> None:
    folders = [
        write_model(tmp_path / "one", name="a/one"),
        write_model(tmp_path / "worse", name="a/one", recipes={"embed": "dense"}, quality={**QUALITY, "kl": 0.02}),
        write_model(tmp_path / "other", name="b/two", recipes=MIXED, quality={**QUALITY, "kl": 0.3}),
        write_model(tmp_path / "unknown", name="b/two", quality=None),
    ]
    every = entries([read_contents(path) for path in folders])
    assert [(entry.letter, entry.name, entry.beaten_by) for entry in every] == [
        ("A", "worse", ("B",)), ("B", "one", ()), ("C", "other", ()), ("D", "unknown", ()),
    ]  # fmt: skip
    found = Document(compare_page(every))
    assert set(found.figures) == {"overview", "rivals-0", "rivals-1", "bars", "kinds"}
    for name in ("a/one", "b/two", "worse", "Not measured: D."):
        assert name in found.text
    bars = found.figures["bars"]["data"]
    totals = [sum(trace["x"][number] for trace in bars) for number in range(4)]
    assert totals == pytest.approx([entry.contents.report.bpw for entry in every])


def test_texts_that_differ_do_not_compare(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one")
    two = write_model(tmp_path / "two", quality={**QUALITY, "kl": 0.5, "text": "b.txt", "text_sha256": "cd" * 32})
    every = entries([read_contents(one), read_contents(two)])
    assert not any(entry.beaten_by for entry in every)
    assert "which do not compare" in Document(compare_page(every)).text


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / part / "artifact") for part in ("x", "y")]
    assert [entry.name for entry in entries([read_contents(path) for path in folders])] == list(map(str, folders))


# Files -----------------------------------------------------------------------------------------------------------


def test_the_page_disturbs_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "artifact")
    before = measured(folder).to_json()
    write_page(default_page(folder), report_page(folder))
    assert verify(folder).ok
    assert measured(folder).to_json() == before
    check_output(folder, overwrite=True)  # such an artifact can still be replaced
    write_page(default_page(folder), report_page(folder))  # … and its page


def test_only_pages_are_replaced(tmp_path: Path) -> None:
    page = report_page(write_model(tmp_path / "artifact"))
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    for path in (mine, tmp_path):
        with pytest.raises(OutputExistsError, match="not a page"):
            write_page(path, page)
    with pytest.raises(ArtifactError, match="not a folder"):
        write_page(tmp_path / "nowhere" / "page.html", page)
    assert mine.read_text() == "<html>mine</html>"


# Names and commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "part"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn.bias", 0, "attn.c_attn.bias"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", 3, "block_sparse_moe.experts.*.w1"),
        ("lm_head.weight", None, "lm_head"),
        ("model.layers.5", 5, "layers"),
        ("layers.123456789.x", None, "layers.123456789.x"),
    ],
)
def test_places(name: str, block: int | None, part: str) -> None:
    assert (place(name).block, place(name).part) == (block, part)


def test_short_names_are_as_long_as_needed() -> None:
    parts = ["mlp.c_proj", "attn.c_proj", "attn.c_attn", "mlp.down_proj", "self_attn.q_proj"]
    assert short_kinds(parts) == {
        "self_attn.q_proj": "q", "mlp.down_proj": "down", "attn.c_attn": "c_attn", "mlp.c_proj": "mlp.c",
        "attn.c_proj": "attn.c",
    }  # fmt: skip
    assert len(set(short_kinds(["a.x", "b.a.x", "x"]).values())) == 3


def test_recipes_for_people() -> None:
    assert short_recipe("trellis:0.000396663925388926") == "trellis:0.000397"
    assert short_recipe("int4:g32") == "int4:g32"
    assert len(short_recipe("x" * 100)) == 40


def test_the_command_repeats_what_was_done(folder: Path, tmp_path: Path) -> None:
    words = shlex.split(command(read_contents(folder)))
    start = ["tenpak", "compress", "someone/model", "-o", "artifact"]
    assert words == [*start, "--recipe", "int4:g32", "--evaluation", "evaluation.txt"]
    contents = read_contents(folder)
    manifest = contents.manifest.model_copy(
        update={"recipe": "trellis:0.01", "overrides": ("*=trellis:0.01", "a=int8:row"), "seed": 7}
    )
    words = shlex.split(command(replace(contents, manifest=manifest)))
    assert words == [
        *start, "--target", "10x", "--set", "a=int8:row", "--calibration", "none", "--tune", "0", "--seed", "7",
        "--evaluation", "evaluation.txt",
    ]  # fmt: skip
    read = {"text": "c.txt", "text_sha256": "ef" * 32, "tokens": 100, "window": 8, "propagation": "own"}
    manifest = manifest.model_copy(update={"calibration": {**read, "tuning": {"steps": 3}}})
    words = shlex.split(command(replace(contents, manifest=manifest)))
    assert words[9:21] == [
        "--calibration", "c.txt", "--calibration-tokens", "100", "--calibration-window", "8", "--propagation", "own",
        "--tune", "3", "--seed", "7",
    ]  # fmt: skip
    other = write_model(tmp_path / "it's", quality=None)
    words = shlex.split(command(read_contents(other)))
    assert words == [
        "tenpak", "compress", "someone/model", "-o", "it's", "--recipe", "int4:g32", "--evaluation", "none",
    ]  # fmt: skip
