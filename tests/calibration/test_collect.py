"""Statistics collected block by block, against the plain formulas on the whole model, for many families."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tenpak.calibration.collect import collect
from tenpak.calibration.observe import Product
from tenpak.calibration.skeleton import OUTSIDE, Skeleton
from tenpak.calibration.sums import BatchSums, Key, Sums
from tenpak.checkpoint.source import open_checkpoint
from tenpak.checkpoint.structure import bind, build_meta_model
from tenpak.codecs.base import Statistics
from tenpak.errors import CalibrationError

TOKENS = torch.randint(3, 90, (50,), generator=torch.Generator().manual_seed(0))
WINDOW = 16


def skeleton_of(folder: Path) -> Skeleton:
    checkpoint = open_checkpoint(folder)
    return Skeleton.build(checkpoint, bind(build_meta_model(folder), checkpoint.tensors))


def collected(source: Path, **options: object) -> tuple[dict[Key, Statistics], dict[str, Tensor], list[int]]:
    """Statistics of every weight, what is said of the embedding, and the parts in their order."""
    found: dict[Key, Statistics] = {}
    extras: dict[str, Tensor] = {}
    parts: list[int] = []

    def sink(part: int, sums: Sums, extra: dict[str, Tensor]) -> None:
        parts.append(part)
        found.update(sums.statistics())
        extras.update(extra)

    collect(skeleton_of(source), TOKENS, sink, **{"window": WINDOW, **options})
    return found, extras, parts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("collect") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("tied") / "model")


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}


def recorded(model: torch.nn.Module) -> dict[str, Tensor]:
    """Layer → all its inputs, FP64 ``[tokens, in]``."""
    rows: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda m, x, y, n=n: rows.setdefault(n, []).append(x[0].flatten(0, -2).double()))
        for n, layer in linear_layers(model).items()
    ]
    with torch.no_grad():
        for start in range(0, len(TOKENS), WINDOW):
            model(TOKENS[None, start : start + WINDOW])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_the_formulas(family: str, curvature: bool, tmp_path: Path) -> None:
    """Every linear layer that the whole model runs, prelude and head included, with no line about its family."""
    folder = make_tiny(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found, _, parts = collected(folder, curvature=curvature)
    assert parts[-1] == OUTSIDE
    assert sorted(parts[:-1]) == [0, 1]
    inputs = recorded(model)
    assert inputs
    for name, x in inputs.items():
        own = f"{name}.weight"
        statistics = found.get((own, 0)) or found[model.all_tied_weights_keys[own], 0]
        assert statistics.count == len(x)
        # FP32 products of some 50 tokens, of activations that are FP32 themselves.
        hessian = x.T @ x / len(x)
        torch.testing.assert_close(
            statistics.hessian.double(), hessian, rtol=1e-5, atol=1e-6 * float(hessian.abs().max())
        )
        torch.testing.assert_close(statistics.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.mean_abs.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
        assert (statistics.output_curvature is not None) == curvature


def fisher(folder: Path, labels: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The formula on the whole model: E[(∂ℓ/∂y)²] of each layer, and of the embedding, for these labels."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    squares: dict[str, Tensor] = {}

    def add(name: str, output: Tensor) -> None:
        def hook(gradient: Tensor) -> None:
            squares[name] = squares.get(name, 0) + gradient.flatten(0, -2).double().square().sum(0)

        output.register_hook(hook)

    for name, layer in linear_layers(model).items():
        layer.register_forward_hook(lambda m, x, y, n=name: add(n, y))
    model.get_input_embeddings().register_forward_hook(lambda m, x, y: add("embedding", y))
    for number, start in enumerate(range(0, len(TOKENS), WINDOW)):
        logits = model(TOKENS[None, start : start + WINDOW]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[number], reduction="sum").backward()
    embedding = squares.pop("embedding")
    return {name: value / len(TOKENS) for name, value in squares.items()}, embedding / len(TOKENS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mamba", "falcon"])
def test_curvature_is_the_squared_gradient(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny(family, tmp_path / "model")
    drawn: list[Tensor] = []

    def keep(*args: object, **kwargs: object) -> Tensor:
        drawn.append(multinomial(*args, **kwargs))
        return drawn[-1]

    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", keep)
    torch.set_num_threads(1)  # labels are kept in the order of the windows
    try:
        found, extras, _ = collected(folder)
    finally:
        torch.set_num_threads(2)
    expected, embedding = fisher(folder, [labels.flatten() for labels in drawn])
    head = {name for name in expected if name in ("lm_head", "embed_out")}
    for name in expected.keys() - head:
        scale = float(expected[name].max())
        torch.testing.assert_close(
            found[f"{name}.weight", 0].output_curvature.double(), expected[name], rtol=1e-3, atol=1e-5 * scale
        )
    torch.testing.assert_close(
        extras["input_curvature"].double(), embedding, rtol=1e-3, atol=1e-5 * float(embedding.max())
    )


def test_the_heads_curvature_is_exact(llama: Path) -> None:
    """E[p(1 - p)] needs no labels."""
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        p = torch.cat([model(TOKENS[None, s : s + WINDOW]).logits[0].softmax(-1) for s in range(0, 50, WINDOW)])
    found, _, _ = collected(llama)
    torch.testing.assert_close(found["lm_head.weight", 0].output_curvature, (p * (1 - p)).mean(0), rtol=1e-4, atol=1e-8)


def test_the_curvature_predicts_the_divergence(tied: Path) -> None:
    """½·Σ gᵢ (E H Eᵀ)ᵢᵢ against the KL that a small random error of a layer really costs."""
    found, _, _ = collected(tied)
    model = AutoModelForCausalLM.from_pretrained(tied).eval()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    error = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    windows = [TOKENS[None, s : s + WINDOW] for s in range(0, 50, WINDOW)]
    with torch.no_grad():
        before = torch.cat([model(w).logits[0] for w in windows]).double().log_softmax(-1)
        weight += error
        after = torch.cat([model(w).logits[0] for w in windows]).double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    statistics = found[name, 0]
    predicted = 0.5 * float(statistics.output_curvature @ ((error @ statistics.hessian) * error).sum(1))
    # One draw of labels at 50 tokens, and a diagonal for a matrix: the order of magnitude is what can be asked for.
    assert 0.3 < predicted / kl < 3


def test_layers_that_share_their_input_share_statistics(llama: Path) -> None:
    found, _, _ = collected(llama)
    first = "model.layers.0"

    def hessian(name: str) -> Tensor | None:
        return found[f"{name}.weight", 0].hessian

    assert hessian(f"{first}.self_attn.q_proj") is hessian(f"{first}.self_attn.k_proj")
    assert hessian(f"{first}.self_attn.k_proj") is hessian(f"{first}.self_attn.v_proj")
    assert hessian(f"{first}.mlp.gate_proj") is hessian(f"{first}.mlp.up_proj")
    assert hessian(f"{first}.self_attn.q_proj") is not hessian(f"{first}.mlp.gate_proj")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_have_their_own_statistics(family: str, tmp_path: Path) -> None:
    found, _, _ = collected(make_tiny(family, tmp_path / "model"))
    counts: dict[str, list[int]] = {}
    for (name, _), statistics in found.items():
        if ".experts." in name:
            counts.setdefault(name, []).append(statistics.count)
    assert counts
    for name, seen in counts.items():
        assert len(seen) > 1, "several experts were chosen"
        assert sum(seen) == 2 * len(TOKENS), f"two experts a token in {name}"


def test_the_embedding_is_described(tied: Path) -> None:
    found, extras, _ = collected(tied)
    frequency = torch.bincount(TOKENS, minlength=96) / len(TOKENS)
    torch.testing.assert_close(extras["token_frequency"], frequency)
    assert extras["input_curvature"].shape == (32,)
    assert found["model.embed_tokens.weight", 0].output_curvature.shape == (96,), "it is the head as well"


def assert_same(a: dict[Key, Statistics], b: dict[Key, Statistics]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        for name in ("count", "hessian", "mean", "mean_abs", "output_curvature"):
            first, second = getattr(a[key], name), getattr(b[key], name)
            assert first == second if isinstance(first, int) or first is None else torch.equal(first, second), name


def test_spilling_changes_nothing(llama: Path, tmp_path: Path) -> None:
    kept, _, _ = collected(llama, spill_bytes=1 << 30)
    spilled, _, _ = collected(llama, spill_bytes=5000, folder=tmp_path)
    assert_same(kept, spilled)
    assert not any(tmp_path.iterdir()), "what was spilled is gone"


def test_the_number_of_threads_changes_nothing(llama: Path) -> None:
    two, _, _ = collected(llama)
    torch.set_num_threads(1)
    try:
        one, _, _ = collected(llama)
    finally:
        torch.set_num_threads(2)
    assert_same(one, two)


def test_a_full_disk_is_told(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tenpak.calibration.activations.np.save", full)
    with pytest.raises(CalibrationError, match="No space left"):
        collected(llama, spill_bytes=0, folder=tmp_path)


def test_only_one_block_is_loaded_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    load = Skeleton.load

    def watch(self: Skeleton, *args: object, **kwargs: object) -> None:
        nonlocal most
        load(self, *args, **kwargs)
        held = {self.place(name) for name in self.loaded(name for name, _ in self.model.named_parameters())}
        most = max(most, len(held - {OUTSIDE}))

    monkeypatch.setattr(Skeleton, "load", watch)
    collected(llama)
    assert most == 1


def test_no_graph_outlives_its_batch(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that holds the tensor it hangs on keeps everything behind it, which no collector can see."""
    results: list[weakref.ref[Tensor]] = []
    see = BatchSums.see

    def watch(self: BatchSums, product: Product) -> None:
        results.append(weakref.ref(product.result))
        see(self, product)

    monkeypatch.setattr(BatchSums, "see", watch)
    collected(llama)
    gc.collect()
    assert len(results) > 20
    alive = [result() for result in results if result() is not None]
    assert not alive, f"{len(alive)} of {len(results)}: {[(tuple(a.shape), a.grad_fn) for a in alive[:5]]}"


def test_a_text_without_tokens_is_refused(llama: Path) -> None:
    with pytest.raises(CalibrationError, match="fewer than 2 tokens"):
        collect(skeleton_of(llama), TOKENS[:1], lambda *_: None, window=16)


def test_a_block_that_overflows_is_named(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
        model.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    model.save_pretrained(folder)
    with pytest.raises(CalibrationError, match="block 1"):
        collected(folder)


def test_a_text_shorter_than_a_window_is_one_window(llama: Path) -> None:
    found, _, _ = collected(llama, window=64)
    assert found["model.layers.0.mlp.up_proj.weight", 0].count == len(TOKENS)
