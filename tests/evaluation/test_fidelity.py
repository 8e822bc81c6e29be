from __future__ import annotations

import copy
import json
import math
from collections import defaultdict

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tenpak.calibration import load_text, tokenize, windows
from tenpak.errors import EvaluationError
from tenpak.evaluation import fidelity, perplexity, windowing

VOCABULARY = 101
KEYS = {
    "ppl_original", "ppl", "ppl_increase", "kl", "top1", "logits_cosine", "logits_mse", "tokens", "window", "stride",
    "dtype", "tokens_per_second_original", "tokens_per_second", "ppl_original_se", "ppl_se", "ppl_increase_se", "kl_se",
    "top1_se",
}  # fmt: skip


def llama(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def disturbed(model, noise: float):
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator) * parameter.std()
    return changed


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def logits_by_token(model, tokens: torch.Tensor, length: int, stride: int) -> np.ndarray:
    """The logits for each token but the first, each from its own context: float64 ``[tokens - 1, vocabulary]``.

    Only the last logits of a pass are used; contexts of one length share a pass to save time.
    """
    by_length = defaultdict(list)
    for target in range(1, len(tokens)):
        start = 0
        while start + length < target:
            start += stride
        by_length[target - start].append((target, tokens[start:target]))
    logits = np.empty((len(tokens) - 1, VOCABULARY))
    for contexts in by_length.values():
        with torch.inference_mode():
            last = model(input_ids=torch.stack([context for _, context in contexts])).logits[:, -1]
        logits[[target - 1 for target, _ in contexts]] = last.double().numpy()
    return logits


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(("length", "stride"), [(12, 6), (10, 10), (9, 2)])
def test_every_figure_equals_scipy_and_numpy(make, length, stride):
    original = make()
    compressed, tokens = disturbed(original, 0.2), random_tokens(131)
    result = fidelity(original, compressed, tokens, window=length, stride=stride)
    z, z_hat = (logits_by_token(model, tokens, length, stride) for model in (original, compressed))
    p, q = scipy.special.softmax(z, axis=-1), scipy.special.softmax(z_hat, axis=-1)
    targets = tokens[1:].numpy()
    positions = np.arange(len(targets))
    ppl_original, ppl = (np.exp(-np.log(r[positions, targets]).mean()) for r in (p, q))
    cosine = (z * z_hat).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(z_hat, axis=-1)
    # Float32 forward passes of other shapes differ by about 1e-6 of the logits; KL, a difference, by somewhat more.
    close = {"rel": 1e-5}
    assert result.ppl_original == pytest.approx(ppl_original, **close)
    assert result.ppl == pytest.approx(ppl, **close)
    assert result.ppl_increase == pytest.approx(ppl / ppl_original - 1, abs=2e-5)
    assert result.kl == pytest.approx(scipy.stats.entropy(p, q, axis=-1).mean(), rel=1e-4)
    assert result.kl > 1e-3
    assert result.top1 == (z.argmax(-1) == z_hat.argmax(-1)).mean()
    assert 0.2 < result.top1 < 1
    assert result.logits_cosine == pytest.approx(cosine.mean(), **close)
    assert result.logits_mse == pytest.approx(((z - z_hat) ** 2).mean(), rel=1e-4)
    assert (result.tokens, result.window, result.stride, result.dtype) == (130, length, stride, "float32")


def test_standard_errors_are_near_those_of_window_means():
    original = llama()
    compressed, tokens = disturbed(original, 0.2), random_tokens(60 * 10 + 1)
    result = fidelity(original, compressed, tokens, window=10, stride=10, resamples=4000)
    z, z_hat = (logits_by_token(model, tokens, 10, 10) for model in (original, compressed))
    log_p, log_q = scipy.special.log_softmax(z, axis=-1), scipy.special.log_softmax(z_hat, axis=-1)
    kl = scipy.special.rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1)
    positions, targets = np.arange(600), tokens[1:].numpy()
    nll_original, nll = -log_p[positions, targets], -log_q[positions, targets]

    def error(values):
        return values.reshape(60, 10).mean(axis=1).std() / math.sqrt(60)

    # 1.1 % sampling error of the bootstrap, and for perplexities the curvature of exp.
    assert result.kl_se == pytest.approx(error(kl), rel=0.06)
    assert result.top1_se == pytest.approx(error((z.argmax(-1) == z_hat.argmax(-1)).astype(float)), rel=0.06)
    assert result.ppl_original_se == pytest.approx(result.ppl_original * error(nll_original), rel=0.1)
    assert result.ppl_se == pytest.approx(result.ppl * error(nll), rel=0.1)
    assert result.ppl_increase_se == pytest.approx((1 + result.ppl_increase) * error(nll - nll_original), rel=0.1)
    assert result.ppl_increase_se < result.ppl_se / result.ppl  # what pairing is for


def test_a_model_against_itself():
    model = llama()
    result = fidelity(model, copy.deepcopy(model), random_tokens(200), window=16)
    assert (result.kl, result.top1, result.ppl_increase, result.logits_mse) == (0.0, 1.0, 0.0, 0.0)
    assert (result.kl_se, result.top1_se, result.ppl_increase_se) == (0.0, 0.0, 0.0)
    assert result.logits_cosine == pytest.approx(1.0, abs=1e-12)


def test_kl_is_that_of_the_original_to_the_compressed():
    original = llama()
    compressed, tokens = disturbed(original, 0.4), random_tokens(200)
    there = fidelity(original, compressed, tokens, window=16)
    back = fidelity(compressed, original, tokens, window=16)
    assert there.kl != pytest.approx(back.kl, rel=1e-3)
    assert there.ppl_original == pytest.approx(back.ppl, rel=1e-9)
    assert there.logits_mse == pytest.approx(back.logits_mse, rel=1e-9)


def test_tiny_kl_is_resolved():
    """KL is quadratic in a small error: a tenth of the head's error is a hundredth of the KL, far below 1e-6 too."""
    original, tokens = llama(), random_tokens(200)
    direction = torch.randn(original.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    measured = []
    for size in (2**-9, 2**-12):
        compressed = copy.deepcopy(original)
        with torch.no_grad():
            compressed.lm_head.weight += size * 0.2 * direction
        measured.append(fidelity(original, compressed, tokens, window=16).kl)
    assert measured[1] < 1e-6
    assert measured[0] / measured[1] == pytest.approx(64, rel=0.01)


def test_perplexities_are_those_of_perplexity():
    original = llama()
    compressed, tokens = disturbed(original, 0.2), random_tokens(200)
    result = fidelity(original, compressed, tokens, window=16, seed=3)
    for model, value, error in (
        (original, result.ppl_original, result.ppl_original_se),
        (compressed, result.ppl, result.ppl_se),
    ):
        alone = perplexity(model, tokens, window=16, seed=3)
        assert value == pytest.approx(alone.ppl, rel=1e-6)
        assert error == pytest.approx(alone.ppl_se, rel=1e-5)


def test_batching_and_chunking_change_nothing(monkeypatch):
    original = llama()
    compressed, tokens = disturbed(original, 0.2), random_tokens(200)
    whole = fidelity(original, compressed, tokens, window=16).to_json()
    monkeypatch.setattr(windowing, "_BATCH_TOKENS", 40)
    monkeypatch.setattr(windowing, "_CHUNK_BYTES", 3 * 8 * VOCABULARY)
    parts = fidelity(original, compressed, tokens, window=16).to_json()
    for key in KEYS - {"dtype", "tokens_per_second", "tokens_per_second_original"}:
        assert parts[key] == pytest.approx(whole[key], rel=1e-4), key


def test_logits_of_a_batch_are_bounded():
    planned = list(windows(100_000, 256, 128))
    row_bytes = 256_000 * 4
    sizes = [
        batch.targets.numel() * row_bytes for batch in windowing.batches(torch.arange(100_000), planned, row_bytes)
    ]
    assert max(sizes) <= 256 * 2**20
    assert sum(sizes) == 99_999 * row_bytes


def test_dtype_is_the_originals():
    original, tokens = llama(), random_tokens(200)
    half = copy.deepcopy(original).to(torch.bfloat16)
    assert fidelity(original, half, tokens, window=16).dtype == "float32"
    assert fidelity(half, original, tokens, window=16).dtype == "bfloat16"
    assert 0 < fidelity(original, half, tokens, window=16).kl < 1e-2


def test_to_json_has_the_agreed_keys():
    result = fidelity(llama(), disturbed(llama(), 0.1), random_tokens(200), window=16)
    assert set(result.to_json()) == KEYS
    assert json.loads(json.dumps(result.to_json())) == result.to_json()


def test_progress_counts_tokens():
    calls = []
    fidelity(llama(), llama(), random_tokens(200), window=16, stride=8, progress=lambda *done: calls.append(done))
    assert calls[-1] == (199, 199)


def test_one_window_has_no_standard_errors():
    with pytest.warns(UserWarning, match="only 1 windows") as caught:
        result = fidelity(llama(), disturbed(llama(), 0.1), random_tokens(20))
    assert caught[0].filename == __file__
    assert [result.kl_se, result.top1_se, result.ppl_se, result.ppl_original_se, result.ppl_increase_se] == [None] * 5


def test_different_vocabularies_are_refused():
    with pytest.raises(EvaluationError, match="different vocabularies: 101 tokens in the original, 103"):
        fidelity(llama(), llama(103), random_tokens(200))


def test_different_logits_under_one_stated_vocabulary_are_refused():
    other = llama(103)
    other.config.vocab_size = VOCABULARY
    with pytest.raises(EvaluationError, match="different vocabularies: 101 tokens in the original, 103"):
        fidelity(llama(), other, random_tokens(200), window=16)


@pytest.mark.parametrize("which", ["the original", "the compressed model"])
def test_the_broken_model_is_named(which):
    good, bad = llama(), llama()
    with torch.no_grad():
        bad.model.norm.weight[3] = float("nan")
    pair = (bad, good) if which == "the original" else (good, bad)
    with pytest.raises(EvaluationError, match=f"{which} .*NaN or infinite logits"):
        fidelity(*pair, random_tokens(200), window=16)


def test_the_embedded_model_in_bfloat16(tinystories):
    """The weights are BF16 as they are, so that this KL is the noise of BF16 arithmetic alone."""
    tokens = tokenize(AutoTokenizer.from_pretrained(tinystories), load_text(tinystories / "texts" / "evaluation.txt"))
    original, half = (
        AutoModelForCausalLM.from_pretrained(tinystories, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    result = fidelity(original, half, tokens[:4097], window=256)
    assert 0 < result.kl < 1e-3
    assert result.top1 > 0.97
    assert abs(result.ppl_increase) < 0.01
