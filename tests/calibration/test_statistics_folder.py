"""Statistics on disk: written, read, merged, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import make_tiny_talker
from torch import Tensor

import tenpak
from tenpak.calibration.experts import experts, pooled, rows_before
from tenpak.calibration.merging import merge
from tenpak.calibration.skeleton import OUTSIDE
from tenpak.calibration.statistics import FILE_NAME, StatisticsFolder, part_name
from tenpak.checkpoint.structure import Weight
from tenpak.codecs.base import Statistics
from tenpak.errors import CalibrationError, OutputExistsError
from tenpak.job import open_job

pytestmark = pytest.mark.filterwarnings("ignore:.*are advised:UserWarning")

FIRST = "the moon and the sun went over the sea and the star sat on the moon. " * 10
SECOND = "a star sat over the sun and the sea went on to the old man in the moon. " * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and statistics of two texts and of both; windows as long as the texts share no window."""
    root = tmp_path_factory.mktemp("statistics")
    model = make_tiny_talker(root / "model", tie_word_embeddings=True)
    window = 32
    for name, text in (("first", FIRST), ("second", SECOND)):
        (root / f"{name}.txt").write_text(text)
        tenpak.calibrate(model, root / name, calibration=root / f"{name}.txt", window=window)
    return root


def of(root: Path, statistics: Path, name: str) -> Statistics:
    job = open_job(root / "model", "dense", ())
    weight = next(entry.weight for entry in job.plan.entries if entry.weight.name == name)
    (found,) = StatisticsFolder(statistics).of(weight)
    assert found is not None
    return found


UP = "model.layers.1.mlp.up_proj.weight"


def test_merging_weighs_by_counts(folder: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    merge([folder / "first", folder / "second"], tmp_path / "merged", progress=lambda *step: steps.append(step))
    assert steps == [("merging", done, len(steps)) for done in range(1, len(steps) + 1)]
    assert len(steps) == len(StatisticsFolder(folder / "first").parts)
    a, b, both = (of(folder, path, UP) for path in (folder / "first", folder / "second", tmp_path / "merged"))
    assert a.count is not None
    assert b.count is not None
    assert both.count == a.count + b.count
    for name in ("hessian", "mean", "mean_abs", "output_curvature"):
        mean = (getattr(a, name).double() * a.count + getattr(b, name).double() * b.count) / both.count
        torch.testing.assert_close(getattr(both, name).double(), mean, rtol=1e-5, atol=1e-9)
    origin = StatisticsFolder(tmp_path / "merged").origin
    assert origin.text == "first.txt, second.txt"
    assert origin.tokens == a.count + b.count
    embedding = of(folder, tmp_path / "merged", "model.embed_tokens.weight")
    assert embedding.token_frequency is not None
    assert float(embedding.token_frequency.sum()) == pytest.approx(1)


def test_merged_statistics_compress(folder: Path, tmp_path: Path) -> None:
    merge([folder / "first", folder / "second"], tmp_path / "merged")
    report = tenpak.compress(folder / "model", tmp_path / "out", recipe="gptq-int4:g32", statistics=tmp_path / "merged")
    assert report.calibration is not None
    assert report.calibration["propagation"] == "none"
    with pytest.raises(CalibrationError, match="are the same"):  # one of the two
        tenpak.compress(
            folder / "model",
            tmp_path / "other",
            recipe="gptq-int4:g32",
            statistics=tmp_path / "merged",
            evaluation=folder / "second.txt",
        )


def test_statistics_of_a_text_go_with_that_text(folder: Path, tmp_path: Path) -> None:
    options = {"recipe": "gptq-int4:g32", "statistics": folder / "first"}
    with pytest.raises(CalibrationError, match=r"of the text first\.txt, not of second\.txt"):
        tenpak.compress(folder / "model", tmp_path / "out", calibration=folder / "second.txt", **options)
    report = tenpak.compress(folder / "model", tmp_path / "out", calibration=folder / "first.txt", **options)
    assert report.calibration is not None
    assert report.calibration["propagation"] == "original"


def test_a_tied_embedding_knows_both_of_its_uses(folder: Path) -> None:
    found = of(folder, folder / "first", "model.embed_tokens.weight")
    for name, shape in {
        "hessian": (32, 32), "output_curvature": (128,), "token_frequency": (128,), "input_curvature": (32,)
    }.items():  # fmt: skip
        assert tuple(getattr(found, name).shape) == shape
    g, h, f, c = (
        getattr(found, name).double() for name in ("output_curvature", "hessian", "token_frequency", "input_curvature")
    )
    plain = torch.stack([g[v] * h + f[v] * torch.diag(c) for v in range(128)])
    assert found.metric is not None
    assert found.row_weight is not None
    torch.testing.assert_close(found.metric.double(), plain.mean(0), rtol=1e-5, atol=1e-12)
    traces = plain.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(found.row_weight.double(), traces, rtol=1e-5, atol=1e-12)


def test_merging_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    tenpak.calibrate(folder / "model", tmp_path / "fast", calibration=folder / "first.txt", window=32, fast=True)
    with pytest.raises(CalibrationError, match="differ in method"):
        merge([folder / "first", tmp_path / "fast"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_fast_statistics_guess_the_curvature(folder: Path, tmp_path: Path) -> None:
    tenpak.calibrate(folder / "model", tmp_path / "fast", calibration=folder / "first.txt", window=32, fast=True)
    fast, full = of(folder, tmp_path / "fast", UP), of(folder, folder / "first", UP)
    assert fast.hessian is not None
    assert full.hessian is not None
    torch.testing.assert_close(fast.hessian, full.hessian, rtol=1e-5, atol=1e-8)
    assert fast.output_curvature is not None
    assert len(set(fast.output_curvature.tolist())) == 1
    query = of(folder, tmp_path / "fast", "model.layers.1.self_attn.q_proj.weight")
    value = of(folder, tmp_path / "fast", "model.layers.1.self_attn.v_proj.weight")
    assert query.output_curvature is not None
    assert value.output_curvature is not None
    assert float(query.output_curvature.sum()) < float(value.output_curvature.sum())


def test_an_existing_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists"):
        tenpak.calibrate(folder / "model", folder / "first", calibration=folder / "first.txt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="holds no statistics"):
        tenpak.calibrate(folder / "model", tmp_path / "mine", calibration=folder / "first.txt", overwrite=True)
    assert (tmp_path / "mine" / "file").read_text() == "x"


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in (folder / "first").iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("name", [FILE_NAME, part_name(0), part_name(OUTSIDE)])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_damaged_statistics_are_refused(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    statistics = copied(folder, tmp_path / "copy")
    path = statistics / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2 if damage == "cut" else 0])
    with pytest.raises(CalibrationError) as error:
        tenpak.compress(folder / "model", tmp_path / "out", recipe="gptq-int4:g32", statistics=statistics)
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    statistics = copied(folder, tmp_path / "copy")
    content = json.loads((statistics / FILE_NAME).read_text())
    (statistics / FILE_NAME).write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(CalibrationError, match="version 99"):
        StatisticsFolder(statistics)


def test_a_failure_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    statistics = copied(folder, tmp_path / "copy")
    with pytest.raises(CalibrationError, match="there is no text"):
        tenpak.calibrate(folder / "model", statistics, calibration=tmp_path / "nothing.txt", overwrite=True)
    StatisticsFolder(statistics)
    merge([statistics, folder / "second"], statistics, overwrite=True)
    assert StatisticsFolder(statistics).origin.text == "first.txt, second.txt"
    (statistics / "notes.md").write_text("x")
    with pytest.raises(OutputExistsError, match=r"also holds notes\.md"):
        merge([folder / "first", folder / "second"], statistics, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_interrupted_calibration_can_be_repeated(folder: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tenpak.calibrate(folder / "model", tmp_path / "out", calibration=folder / "first.txt", fast=True, progress=stop)
    assert not any(tmp_path.iterdir())
    tenpak.calibrate(folder / "model", tmp_path / "out", calibration=folder / "first.txt", fast=True)


@pytest.mark.parametrize(
    "change", [{"parts": 5}, {"parts": ["a"]}, {"parts": [0]}, {"tokens": "x"}, {"text_sha256": 5}, {"extra": 1}]
)
def test_nonsense_in_the_table_is_refused(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    statistics = copied(folder, tmp_path / "copy")
    content = json.loads((statistics / FILE_NAME).read_text())
    (statistics / FILE_NAME).write_text(json.dumps({**content, **change}))
    with pytest.raises(CalibrationError):
        StatisticsFolder(statistics)


# Experts -------------------------------------------------------------------------------------------------------------


def known(count: int, value: float, columns: int = 4) -> Statistics:
    def full(*shape: int) -> Tensor:
        return torch.full(shape, value)

    return Statistics(
        count=count,
        hessian=full(columns, columns),
        mean=full(columns),
        mean_abs=full(columns),
        output_curvature=full(6),
    )


def test_a_starved_expert_takes_the_mean_of_all() -> None:
    table = {("e", 0): known(30, 1.0), ("e", 1): known(3, 4.0)}  # fewer tokens than inputs; expert 2 saw none
    stack = Weight("e", "F32", (3, 6, 4), "expert", "e")
    first, second, third = experts(table.get, stack, [0, 1])
    assert first is not None
    assert first.hessian is not None
    assert float(first.hessian[0, 0]) == 1.0
    for starved, count in ((second, 3), (third, 0)):
        assert starved is not None
        assert starved.count == count, "the report says what it saw itself"
        assert starved.hessian is not None
        assert float(starved.hessian[0, 0]) == pytest.approx((30 * 1.0 + 3 * 4.0) / 33)


def test_a_layer_that_saw_nothing_is_told_so() -> None:
    assert experts({}.get, Weight("e", "F32", (2, 6, 4), "expert", "e"), []) == (None, None)
    assert pooled([]) is None


def test_parts_of_an_expert_take_their_rows() -> None:
    parts = [Weight(f"{e}.{p}", "F32", (3, 4), "expert", "e", slot=(e, p)) for e in range(2) for p in range(2)]
    before = rows_before(parts)
    assert before == {"0.0": 0, "0.1": 3, "1.0": 0, "1.1": 3}
    curvature = torch.arange(6.0)
    table = {("e", 1): Statistics(**{**vars(known(30, 1.0)), "output_curvature": curvature})}
    (found,) = experts(table.get, parts[3], [1], rows_before=before["1.1"])
    assert found is not None
    assert found.output_curvature is not None
    assert torch.equal(found.output_curvature, curvature[3:])
