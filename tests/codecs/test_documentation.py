"""docs/codecs.md says what the code does: its examples run, its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tenpak.codecs import registry
from tenpak.codecs.normalfloat import NORMAL_LEVELS
from tenpak.recipes import GRAMMAR, PRESETS, parse

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "codecs.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_examples_run(block: str) -> None:
    exec(compile(block, "docs/codecs.md", "exec"), {})  # our own page


def test_every_codec_has_its_section() -> None:
    assert sorted(re.findall(r"^## (\w+/\d+)$", PAGE, re.MULTILINE)) == sorted(registry.ids())


def test_presets_and_their_rates() -> None:
    rows = re.findall(r"^\| (\S+) \| `(\S+)` \| (\S.*?) \|$", PAGE, re.MULTILINE)
    table = {name: (recipe, rate) for name, recipe, rate in rows if name in PRESETS}
    assert {name: recipe for name, (recipe, _) in table.items()} == {n: p.recipe for n, p in PRESETS.items()}
    out, columns = 128, 512
    for name, (_, rate) in table.items():
        codec = parse(name)
        assert codec is not None
        bits = codec.estimate_bits((out, columns))
        if rate == "by the weight":
            assert bits is None, name
            continue
        assert bits is not None, name
        bpw = bits / (out * columns)
        words = next((words for words in ("about ", "at most ") if rate.startswith(words)), "")
        rate = rate.removeprefix(words)
        sizes = {"(out·in)": out * columns, "/in": f"/{columns}", "/out": f"/{out}"}
        for size, value in sizes.items():
            rate = rate.replace(size, str(value))
        terms = rate.split(" + ")
        expected = sum(float(top) / float(bottom or 1) for top, _, bottom in (term.partition("/") for term in terms))
        if words:
            assert 0.95 * expected <= bpw <= expected * (1 if words == "at most " else 1.01), name
        else:
            assert bpw == expected, name


def test_the_grammar_is_the_code_s() -> None:
    assert "".join(f"    {line}\n" for line in GRAMMAR.splitlines()) in PAGE


def test_normal_levels() -> None:
    for bits, levels in re.findall(r"^\| (\d) \| (-1, .*?, 1) \|$", PAGE, re.MULTILINE):
        assert tuple(float(level) for level in levels.split(", ")) == NORMAL_LEVELS[int(bits)]
