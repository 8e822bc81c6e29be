from __future__ import annotations

import math
import warnings
from collections import defaultdict

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tenpak.calibration import load_text, tokenize
from tenpak.errors import EvaluationError
from tenpak.evaluation import perplexity, windowing

VOCABULARY = 101


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(config | {"initializer_range": 0.3} | changes))).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def random_tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def explicit_loop(model, tokens: torch.Tensor, length: int, stride: int) -> float:
    """Mean NLL of each token from a context of its own, the window found from its definition by search.

    Only the last logits of a pass are used; contexts of one length share a pass to save time.
    """
    by_length = defaultdict(list)
    for target in range(1, len(tokens)):
        start = 0
        while start + length < target:  # inputs start … start + length - 1 predict up to start + length
            start += stride
        by_length[target - start].append((tokens[target], tokens[start:target]))
    total = 0.0
    for contexts in by_length.values():
        with torch.inference_mode():
            logits = model(input_ids=torch.stack([context for _, context in contexts])).logits[:, -1]
        for (target, _), row in zip(contexts, logits.double().log_softmax(-1), strict=True):
            total -= float(row[target])
    return total / (len(tokens) - 1)


# Float32 forward passes of other shapes differ by rounding, about 1e-6 relative here; float64 sums add nothing.
TOLERANCE = 1e-5


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(("length", "stride"), [(16, 5), (16, 1), (7, 7), (40, 20)])
@pytest.mark.filterwarnings("ignore:the text of")
def test_sliding_windows_equal_one_pass_per_token(make, length, stride):
    model, tokens = make(), random_tokens(83)
    result = perplexity(model, tokens, window=length, stride=stride)
    assert result.ppl == pytest.approx(math.exp(explicit_loop(model, tokens, length, stride)), rel=TOLERANCE)
    assert (result.tokens, result.window, result.stride) == (82, length, stride)


def test_disjoint_windows_equal_the_models_own_loss():
    model, tokens = llama(), random_tokens(12 * 16 + 1)
    rows = torch.stack([tokens[i : i + 17] for i in range(0, 192, 16)])
    with torch.inference_mode():
        loss = float(model(input_ids=rows, labels=rows).loss)  # 16 predictions per row, all rows equally long
    assert perplexity(model, tokens, window=16, stride=16).ppl == pytest.approx(math.exp(loss), rel=TOLERANCE)


def test_a_ragged_last_window_is_weighted_by_its_tokens():
    model, tokens = llama(), random_tokens(11 * 16 + 4)
    nll, count = 0.0, 0
    for i in range(0, len(tokens) - 1, 16):
        row = tokens[i : i + 17][None]
        with torch.inference_mode():
            nll += float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
        count += row.shape[1] - 1
    result = perplexity(model, tokens, window=16, stride=16)
    assert count == result.tokens
    assert result.ppl == pytest.approx(math.exp(nll / count), rel=TOLERANCE)


def test_defaults_are_the_context_and_half_of_it():
    result = perplexity(llama(), random_tokens(500))
    assert (result.window, result.stride) == (64, 32)


def test_the_default_stride_is_at_most_512():
    model = llama(max_position_embeddings=2048, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="only 3 windows"):
        result = perplexity(model, random_tokens(2900))
    assert (result.window, result.stride) == (2048, 512)


def test_a_window_longer_than_the_text_is_shortened_to_it():
    model, tokens = llama(), random_tokens(30)
    with pytest.warns(UserWarning, match="only 1 windows"):
        result = perplexity(model, tokens, window=4096, stride=512)
    assert result.window == 29
    assert result.ppl_se is None
    with torch.inference_mode():
        loss = float(model(input_ids=tokens[None], labels=tokens[None]).loss)
    assert result.ppl == pytest.approx(math.exp(loss), rel=TOLERANCE)


def test_batching_and_chunking_change_nothing(monkeypatch):
    model, tokens = llama(), random_tokens(300)
    whole = perplexity(model, tokens, window=20, stride=10)
    monkeypatch.setattr(windowing, "_BATCH_TOKENS", 1)
    monkeypatch.setattr(windowing, "_CHUNK_BYTES", 3 * 8 * VOCABULARY)
    assert perplexity(model, tokens, window=20, stride=10).ppl == pytest.approx(whole.ppl, rel=TOLERANCE)


def test_chunks_bound_memory_and_cover_every_position():
    parts = list(windowing.chunks(1000, 256_000))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(1000))
    assert max(part.stop - part.start for part in parts) * 256_000 * 8 <= 64 * 2**20
    assert list(windowing.chunks(2, 10**9)) == [slice(0, 1), slice(1, 2)]


def test_only_scored_positions_reach_the_head():
    model, tokens = llama(), random_tokens(400)
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    perplexity(model, tokens, window=20, stride=10)
    assert sum(rows * scored for rows, scored in shapes) == 399


def test_a_model_that_cannot_keep_only_some_logits():
    model, tokens = llama(), random_tokens(300)
    expected = perplexity(model, tokens, window=20, stride=10).ppl
    forward = model.forward
    model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    assert perplexity(model, tokens, window=20, stride=10).ppl == pytest.approx(expected, rel=TOLERANCE)


def test_a_model_without_a_stated_context():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.warns(UserWarning, match="windows"):
        assert perplexity(model, random_tokens(100)).window == 99


def test_sums_are_in_float64_whatever_the_models_dtype():
    model, tokens = llama().to(torch.bfloat16), random_tokens(14 * 20 + 1)
    result = perplexity(model, tokens, window=20, stride=20)
    assert result.dtype == "bfloat16"
    with torch.inference_mode():  # the same single batch, so that the logits are the same bit for bit
        log_p = model(input_ids=tokens[:-1].view(14, 20)).logits.double().log_softmax(-1)
    nll = -log_p.gather(-1, tokens[1:].view(14, 20, 1)).mean()
    assert result.ppl == pytest.approx(math.exp(nll), rel=1e-12)


def test_training_mode_dropout_and_gradients_stay_out():
    model, tokens = gpt2(), random_tokens(200)
    expected = perplexity(model, tokens, window=16, stride=16).ppl
    model.train()  # GPT-2 drops 10 % by default
    assert perplexity(model, tokens, window=16, stride=16).ppl == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_tokens():
    calls = []
    perplexity(llama(), random_tokens(200), window=16, stride=8, progress=lambda *done: calls.append(done))
    assert calls[-1] == (199, 199)
    assert calls == sorted(calls)


def test_to_json():
    result = perplexity(llama(), random_tokens(200), window=16)
    assert list(result.to_json()) == ["ppl", "ppl_se", "tokens", "window", "stride", "dtype", "tokens_per_second"]
    assert result.dtype == "float32"
    assert result.tokens_per_second > 0
    assert 0 < result.ppl_se < result.ppl


def test_few_windows_warn_and_many_do_not():
    with pytest.warns(UserWarning, match="only 9 windows") as caught:
        perplexity(llama(), random_tokens(91), window=10, stride=10)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perplexity(llama(), random_tokens(101), window=10, stride=10)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (random_tokens(1), {}, "a text of 1 tokens"),
        (random_tokens(0), {}, "a text of 0 tokens"),
        (random_tokens(50).float(), {}, "int64"),
        (random_tokens(50)[None], {}, "int64"),
        (torch.full((50,), VOCABULARY), {}, f"token {VOCABULARY}, the model knows 0 … {VOCABULARY - 1}"),
        (torch.full((50,), -1), {}, "token -1"),
        (random_tokens(50), {"window": 0}, "window of 0"),
        (random_tokens(50), {"window": 8, "stride": 9}, "stride 9"),
        (random_tokens(50), {"stride": 0}, "stride 0"),
    ],
)
def test_impossible_evaluations(tokens, options, message):
    with pytest.raises(EvaluationError, match=message):
        perplexity(llama(), tokens, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_model_is_named(value):
    model = llama()
    model.config._name_or_path = "some/model"
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(EvaluationError, match=r"some/model.*NaN or infinite"):
        perplexity(model, random_tokens(200), window=16)


def test_a_ruined_model_is_reported_rather_than_overflowing():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    result = perplexity(model, random_tokens(200), window=16)
    assert 1e300 < result.ppl < math.inf


def test_the_embedded_model_on_its_own_text(tinystories):
    """On text that it wrote itself, a model's perplexity is the exponential of its entropy: near 9 for this one."""
    model = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32)
    tokens = tokenize(AutoTokenizer.from_pretrained(tinystories), load_text(tinystories / "texts" / "evaluation.txt"))
    tokens = tokens[:8193]
    result = perplexity(model, tokens, window=256, stride=256)
    rows = torch.stack([tokens[i : i + 257] for i in range(0, 8192, 256)])
    with torch.inference_mode():
        loss = float(model(input_ids=rows, labels=rows).loss)
    assert result.ppl == pytest.approx(math.exp(loss), rel=TOLERANCE)
    assert 7 < result.ppl < 12
