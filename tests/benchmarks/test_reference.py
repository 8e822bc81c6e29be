"""The trainer of the reference models, on a corpus of a few sentences and in sizes of a few steps."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "reference"))

import card
import export
import train as command
import training
import windows
from corpus import END, documents
from curve import curve, points
from data import Data, prepare, tokens_of, train_tokenizer
from muon import Muon, orthogonalized
from recipes import RECIPES, Recipe, config

from tenpak import cli
from tenpak.errors import CalibrationError, CheckpointError

WORDS = ("the", "of", "a", "river", "mountain", "stone", "walks", "sings", "under", "over", "where", "green", "birds")
TINY = Recipe(
    "tiny",
    width=64,
    layers=1,
    ffn=128,
    vocabulary=300,
    key_values=2,
    tokens=2048,
    batch=2,
    micro=128,
    head=16,
    context=128,
    stages=((0.0, 64), (0.5, 128)),
)
PLANTED = "An utterly unmistakable sentence about seven hundred marmalade clocks stands in this very place."
# Long enough for a perplexity without a warning.
OTHER = "Another sentence, of a kind that no document of the corpus has ever held within itself."
HELD_OUT = f"{PLANTED}\n\n{OTHER}{' Neither this' * 60}"


def sentences(rng: random.Random, count: int) -> str:
    return " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(count))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other at every one of these small products, long where others compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus of 420 documents, the eighth with a held-out sentence in another dress, and the held-out text."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [sentences(rng, 6) for _ in range(420)]
    texts[7] += " " + PLANTED.replace("seven hundred", "seven @-@ hundred").replace(" ", "  \n") + " " + texts[7]
    corpus, held_out = folder / "corpus.txt.xz", folder / "held_out.txt"
    with lzma.open(corpus, "wt", encoding="utf-8") as file:
        file.write(f"\n{END}\n".join(texts))
    held_out.write_text(HELD_OUT)
    return corpus, held_out


@pytest.fixture(scope="module")
def data(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Data:
    corpus, held_out = files
    return prepare(corpus, [held_out], tmp_path_factory.mktemp("cache"), TINY.vocabulary)


def run(recipe: Recipe, data: Data, out: Path, **options: Any) -> tuple[Any, Any, bool]:
    tokens, validation = (tokens_of(data.folder / f"{name}.bin") for name in ("train", "validation"))
    return training.train(recipe, tokens, validation, out, training.Budget(recipe.tokens), **options)


# Windows and documents ------------------------------------------------------------------------------------------------


def test_overlap_finds_a_planted_sentence_in_another_dress_and_no_other() -> None:
    rng = random.Random(1)
    corpus = [sentences(rng, 50) for _ in range(5)]
    assert windows.overlap(corpus, PLANTED) == 0
    corpus[3] += PLANTED.upper().replace(" ", "\n @,@ ") + "and so on"
    assert windows.overlap(corpus, PLANTED) == 1
    assert 0 < windows.overlap(corpus, HELD_OUT) < 0.7  # the other sentence is in no document
    assert [len(windows.shared(windows.index([PLANTED]), text)) > 0 for text in corpus] == [False] * 3 + [True, False]


def test_windows_are_those_of_a_search_of_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_PIECE", 64)  # windows across the pieces of a document count too
    rng = random.Random(2)
    text, other = ("".join(rng.choices("ab", k=3000)) for _ in range(2))
    other += text[100:149] + "-" + text[149:151] + "c" + text[500:700] + "c" + text[900:949]
    size = windows.WINDOW
    expected = {text[i : i + size] for i in range(len(text) - size + 1) if text[i : i + size] in other.replace("-", "")}
    assert len(windows.shared(windows.index([text]), other)) == len(expected) == 2 + 151


def test_texts_shorter_than_a_window_have_none() -> None:
    assert windows.overlap(["short"], "short") == 0
    assert len(windows.shared(windows.index(["", "short"]), PLANTED)) == 0


def test_documents_end_where_the_corpus_says_and_where_an_article_begins(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(f" = One = \n a\n = = Part = = \n b\n = Two = \n c\n{END}\nd{END}e\n\nf{END}\n")
    assert list(documents(path)) == ["= One = \n a\n = = Part = = \n b", "= Two = \n c", "d", "e\n\nf"]


# Data -----------------------------------------------------------------------------------------------------------------


def test_the_document_with_a_held_out_sentence_is_dropped_and_counted(data: Data) -> None:
    assert data.facts["documents"] == 420
    assert data.facts["dropped"] == 1
    assert data.facts["windows_in_corpus"] > 20
    assert data.facts["windows_in_training"] == data.facts["windows_in_validation"] == 0
    text = data.tokenizer().decode(tokens_of(data.folder / "train.bin").tolist(), skip_special_tokens=False)
    assert "marmalade" not in text
    assert text.count(END) == 417  # two for validation


def test_prepared_data_is_not_made_twice(data: Data, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.index", lambda _: pytest.fail("made again"))
    corpus, held_out = files
    assert prepare(corpus, [held_out], data.folder.parent, TINY.vocabulary) == data


def test_a_corpus_of_the_held_out_text_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "held_out.txt"
    path.write_text(HELD_OUT)
    with pytest.raises(CalibrationError, match="too few documents"):
        prepare(path, [path], tmp_path, 300)


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = train_tokenizer(iter([PLANTED]), 280)
    text = bytes(range(128)).decode() + "żółć 🙂 数 \u2028" + "".join(map(chr, range(128, 256))) + "  two  blanks\n\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(END) == 0
    assert tokenizer.get_vocab_size() == 280
    assert json.loads(tokenizer.to_str())["pre_tokenizer"]["use_regex"]  # GPT-2's words


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (96, 24), (3, 32, 48)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrices)
    assert result.shape == matrices.shape
    # The polynomial keeps all but the tiniest in about [0.7, 1.2]; square Gaussian matrices have tiny ones.
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.25
    assert values.median() > 0.65
    if shape[-1] != shape[-2]:
        assert values.min() > 0.6
    # and the singular vectors: U·Vᵀ of the matrix is close
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_muon_moves_matrices_by_its_rate_whatever_the_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    optimizer = Muon([weight], 0.1)
    weight.grad = 1e-4 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.linalg.svdvals(weight.detach()) / (0.1 * 2**0.5) == pytest.approx(torch.ones(32), abs=0.4)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_builds_and_takes_two_steps(recipe: Recipe, data: Data, tmp_path: Path) -> None:
    assert not any(width % 256 for width in (recipe.width, recipe.ffn, recipe.vocabulary))
    assert (recipe.width // recipe.head) % recipe.key_values == 0
    assert recipe.key_values < recipe.width // recipe.head
    assert all(recipe.context % length == 0 for _, length in recipe.stages)
    # Two layers of its own sizes: the others are like them, and all of the largest would take most of a minute.
    small = dataclasses.replace(
        recipe, layers=2, context=32, stages=((0.0, 16), (0.5, 32)), batch=1, micro=16, tokens=64
    )
    model, at, complete = run(small, data, tmp_path)
    assert complete
    assert at.step == 2
    initial = training.build(small)
    for (name, before), after in zip(initial.named_parameters(), model.parameters(), strict=True):
        assert torch.isfinite(after).all(), name
        assert not torch.equal(before, after), name
    first, second = (json.loads(line)["validation"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first == pytest.approx(np.log(recipe.vocabulary), rel=0.2)
    assert second < first


def test_names_of_recipes_tell_their_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: training.LlamaForCausalLM(config(recipe)).num_parameters() for name, recipe in RECIPES.items()}
    assert sizes == {"ref-8m": 7_344_384, "ref-30m": 29_368_832, "ref-110m": 81_808_128}


def test_a_resumed_training_is_bit_for_bit_an_uninterrupted_one(data: Data, tmp_path: Path) -> None:
    model, at, complete = run(TINY, data, tmp_path / "whole")
    assert complete
    assert at.tokens == TINY.tokens
    run(TINY, data, tmp_path / "parts", stop_after=3)
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:  # as if it had gone on and been killed
        file.write('{"step": 4, "validation": 0.0}\n')
    resumed, there, _ = run(TINY, data, tmp_path / "parts", resume=True)
    assert there.step == at.step == 8
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["00000008"]
    with pytest.raises(CheckpointError, match="other recipe"):
        run(dataclasses.replace(TINY, seed=1), data, tmp_path / "parts", resume=True)


def test_a_training_learns_and_its_rates_end_near_zero(data: Data, tmp_path: Path) -> None:
    tokens = tokens_of(data.folder / "validation.bin")
    recipe = dataclasses.replace(TINY, tokens=16_384)
    before = training.evaluate(training.build(recipe), recipe, tokens, 128)
    model, _, _ = run(recipe, data, tmp_path)
    assert training.evaluate(model, recipe, tokens, 128) < before - 1
    for decay in ("linear", "cosine"):
        rates = [training.rate(dataclasses.replace(recipe, decay=decay), at / 100) for at in range(101)]
        assert rates[0] == 0.05
        assert max(rates) == rates[2] == 1
        assert rates[100] == 0
        assert rates[2:] == sorted(rates[2:], reverse=True)


def test_minutes_end_a_training_whatever_its_tokens(data: Data, tmp_path: Path) -> None:
    tokens = tokens_of(data.folder / "train.bin")
    _, at, complete = training.train(TINY, tokens, tokens, tmp_path, training.Budget(1, seconds=0.5))
    assert complete
    assert at.seconds >= 0.5
    assert at.step >= 1


def test_every_block_is_read_once_per_pass() -> None:
    recipe = dataclasses.replace(TINY, batch=3)
    read = np.concatenate([training.order(recipe, 10, step) for step in range(10)])
    for start in (0, 10, 20):
        assert sorted(read[start : start + 10]) == list(range(10))
    assert list(read[:10]) != list(read[10:20])


# The command, the folder and the card ---------------------------------------------------------------------------------


def test_one_command_makes_a_folder_that_transformers_and_tenpak_load(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, held_out = files
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    monkeypatch.setattr(export, "CALIBRATION_BLOCKS", 16)
    monkeypatch.setenv("RAYON_NUM_THREADS", os.environ.get("RAYON_NUM_THREADS", "1"))  # restored afterwards
    arguments = [
        "tiny",
        "--out",
        str(tmp_path),
        "--corpus",
        str(corpus),
        "--held-out",
        str(held_out),
        "--device",
        "cpu",
    ]
    assert command.main([*arguments, "--threads", "1", "--stop-after", "2"]) == 1
    assert command.main([*arguments, "--threads", "1", "--resume"]) == 0
    folder = tmp_path / "tiny"
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert "polyline" in (folder / "loss.svg").read_text()
    assert all((folder / "texts" / f"{name}.txt").stat().st_size > 200 for name in ("calibration", "evaluation"))

    assert card.main([str(folder), "--text", str(held_out), "--threads", "1"]) == 0
    measured = json.loads((folder / card.MEASURED).read_text())
    assert measured["word_ppl"] == pytest.approx(measured["ppl"] ** (measured["tokens"] / measured["words"]))
    text = (folder / "README.md").read_text()
    assert f"{measured['ppl']:.2f}" in text
    assert "the 1 documents that held one" in text
    capsys.readouterr()

    artifact = tmp_path / "artifact"
    monkeypatch.setattr(
        sys, "argv", ["tenpak", "compress", str(folder), "--out", str(artifact), "--recipe", "int8:g64"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr().err
    assert artifact.is_dir()
    shutil.rmtree(artifact)


def test_a_curve_marks_each_evaluation() -> None:
    log = [{"tokens": 1_000_000, "loss": 5.0}, {"tokens": 2_000_000, "loss": 4.5}, {"tokens": 2e6, "validation": 4.6}]
    picture = curve("a title", points(log))
    assert picture.count("<polyline") == 2
    assert picture.count("<circle") == 1
    assert "a title" in picture
