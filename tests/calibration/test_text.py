from __future__ import annotations

import bz2
import gzip
import itertools
import json
import logging
import lzma
import math
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from tenpak.calibration import context_length, load_text, sample_text, tokenize, windows
from tenpak.errors import CalibrationError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHARACTERS = {token: i + 2 for i, token in enumerate(ALPHABET)}


def byte_tokenizer(*, bos: str | None = "<s>", eos: str | None = "</s>", add_bos: bool = False):
    """A tokenizer of 258 tokens: <s>, </s>, and one per byte; its stated context is 16 tokens."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **CHARACTERS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, model_max_length=16)


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config |= {"initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "no_suffix", "a.text.txt"])
def test_a_file_is_read_as_it_is(tmp_path, name):
    text = "Zwölf Boxkämpfer\n\n jagen 🎈 \u2028 quer.\n"
    (tmp_path / name).write_text(text, encoding="utf-8", newline="\n")
    assert load_text(tmp_path / name) == text
    assert load_text(str(tmp_path / name)) == text


def test_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert load_text(tmp_path / "a.txt") == "one\ntwo"


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(b"ein Text"))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compress(b'{"text": "b"}\n'))
    assert load_text(tmp_path / f"a.txt.{suffix}") == "ein Text"
    assert load_text(tmp_path / f"b.jsonl.{suffix}") == "b"
    assert load_text(tmp_path) == "ein Text\n\nb"


def test_json_lines(tmp_path):
    documents = ["first\nwith a line", "second \u2028 with a separator", "third"]
    lines = [json.dumps({"text": d, "id": 1}, ensure_ascii=False) for d in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]) + "\n\n" + lines[2], encoding="utf-8")
    assert load_text(tmp_path / "a.jsonl") == "\n\n".join(documents)


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"content": "x"}', '{"text": 3}', '{"text": null}'])
def test_bad_json_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(CalibrationError, match="line 2 of"):
        load_text(tmp_path / "a.jsonl")


def test_a_folder_is_its_texts_by_name(tmp_path):
    for name, text in {
        "b.txt": "B",
        "a.md": "A",
        "c.jsonl": '{"text": "C"}',
        ".hidden.txt": "no",
        "x.bin": "no",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "sub.txt").mkdir()
    assert load_text(tmp_path) == "A\n\nB\n\nC"


def write(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda folder: None, "missing.txt", "no text at"),
        (lambda folder: None, "data/missing.txt", "no text at"),
        (lambda folder: (folder / "d").mkdir(), "d", "holds no text file"),
        (write("e.txt", b""), "e.txt", "is empty"),
        (write("e.txt", b" \n\t"), "e.txt", "is empty"),
        (write("b.txt", b"abc\x00def"), "b.txt", "not UTF-8 text"),
        (write("b.txt", b"caf\xe9"), "b.txt", "not UTF-8 text"),
        (write("b.txt.gz", b"no gzip"), "b.txt.gz", "cannot be read"),
        (write("b.txt.gz", gzip.compress(b"abc" * 99)[:-9]), "b.txt.gz", "cannot be read"),
        (write("b.txt.gz", gzip.compress(b"abc")[:10] + b"\xff" * 20), "b.txt.gz", "cannot be read"),
        (write("b.txt.xz", lzma.compress(b"abc" * 99)[:-9]), "b.txt.xz", "cannot be read"),
        (write("b.txt.bz2", b"no bzip2"), "b.txt.bz2", "cannot be read"),
    ],
)
def test_bad_sources_are_refused_with_a_hint(tmp_path, monkeypatch, make, name, message):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=message) as raised:
        load_text(name)
    assert raised.value.hint


# Datasets ------------------------------------------------------------------------------------------------------------


class Rows:
    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)
        self.features = {
            k: SimpleNamespace(dtype="string" if isinstance(v[0], str) else "int64") for k, v in columns.items()
        }

    def __getitem__(self, column):
        return self.columns[column]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package ``datasets`` with two data sets; records what was asked for."""
    store = {
        ("org/with-test", None): {"test": {"text": ["t1", "t2"], "id": [1, 2]}, "train": {"text": ["r"], "id": [1]}},
        ("org/train-only", "small"): {"train": {"story": ["s1", "s2"], "n": [1, 2]}},
        ("org/two", None): {"train": {"q": ["q"], "a": ["a"], "n": [0]}},
    }
    module = ModuleType("datasets")
    module.get_dataset_split_names = lambda name, config=None: list(store[name, config])
    module.load_dataset = lambda name, config=None, split=None: Rows(store[name, config][split])
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("org/with-test", "t1\n\nt2"),
        ("org/with-test:train", "r"),
        ("org/with-test:train:text", "r"),
        ("org/train-only/small", "s1\n\ns2"),
        ("org/train-only/small:train:story", "s1\n\ns2"),
        ("org/two::a", "a"),
    ],
)
def test_datasets(hub, source, text):
    assert load_text(source) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/unknown", "cannot be loaded"),
        ("org/with-test:validation", "cannot be loaded"),
        ("org/with-test:test:id", "no column of text"),
        ("org/two", "its columns are q, a, n"),
        ("org/two:train:b", "no column of text 'b'"),
    ],
)
def test_bad_datasets(hub, source, message):
    with pytest.raises(CalibrationError, match=message) as raised:
        load_text(source)
    assert raised.value.hint


def test_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(CalibrationError, match="needs the package 'datasets'") as raised:
        load_text("org/name:test")
    assert "pip install tenpak[datasets]" in raised.value.hint


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_bytes():
    tokens = tokenize(byte_tokenizer(), "aé", vocab_size=258)
    assert tokens.dtype == torch.int64
    assert byte_tokenizer().decode(tokens) == "aé"
    assert len(tokens) == 3


def test_bos_is_added_once_and_only_where_the_tokenizer_adds_it():
    assert tokenize(byte_tokenizer(add_bos=False), "ab")[0] != 0
    adding = byte_tokenizer(add_bos=True)
    assert tokenize(adding, "ab").tolist() == adding("ab")["input_ids"]
    assert tokenize(adding, "ab")[0] == 0
    assert Counter(tokenize(adding, "<s>ab</s>").tolist())[0] == 1


def test_long_text_gives_no_warning(caplog):
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            assert len(tokenize(tokenizer, "ab" * 50_000)) == 100_000
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than" not in caplog.text


def test_tokenizer_that_does_not_fit_the_model_is_refused():
    top = int(tokenize(byte_tokenizer(), "abc").max())
    tokenize(byte_tokenizer(), "abc", vocab_size=top + 1)
    with pytest.raises(CalibrationError, match=f"does not fit the model: it gives token {top}"):
        tokenize(byte_tokenizer(), "abc", vocab_size=top)


def test_no_tokens_is_refused():
    with pytest.raises(CalibrationError, match="no tokens"):
        tokenize(byte_tokenizer(), "")


# Windows -------------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(2, 300), length=st.integers(1, 80), data=st.data())
def test_every_token_but_the_first_is_scored_once(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    planned = list(windows(tokens, length, stride))
    scored = Counter(t for w in planned for t in range(w.stop + 1 - w.scored, w.stop + 1))
    assert scored == Counter(range(1, tokens))
    for window in planned:
        assert 1 <= window.stop - window.start <= length
        assert 1 <= window.scored <= window.stop - window.start
    for window in planned[1:]:
        # A target at t has the inputs start … t - 1 as context: never less than what the stride leaves.
        assert window.stop + 1 - window.scored - window.start >= length - stride + 1
    for window in planned[1:-1]:
        assert (window.stop - window.start, window.scored) == (length, stride)


def test_disjoint_windows_do_not_overlap():
    planned = list(windows(101, 25, 25))
    assert [(w.start, w.stop, w.scored) for w in planned] == [(25 * k, 25 * k + 25, 25) for k in range(4)]


@pytest.mark.parametrize(("tokens", "length", "stride"), [(1, 4, 2), (0, 4, 2), (9, 4, 5), (9, 4, 0), (9, 0, 0)])
def test_impossible_windows(tokens, length, stride):
    with pytest.raises(CalibrationError):
        windows(tokens, length, stride)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (LlamaConfig(max_position_embeddings=131072), 4096),
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), 2048),
    ],
)
def test_context_length(config, length):
    assert context_length(config) == length


# Sampling ------------------------------------------------------------------------------------------------------------


def test_sampling_is_deterministic_and_leaves_the_global_generator_alone():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    state = torch.get_rng_state()
    model.train()
    first = sample_text(model, tokenizer, tokens=400, seed=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert sample_text(model, tokenizer, tokens=400, seed=1) == first
    assert sample_text(model, tokenizer, tokens=400, seed=2) != first


def test_progress_reaches_the_number_of_tokens():
    calls = []
    sample_text(tiny_llama(), byte_tokenizer(), tokens=70, seed=1, window=1, progress=lambda *done: calls.append(done))
    assert calls == [(64, 70), (70, 70)]


FAMILIES = {
    "llama": tiny_llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=258,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=32,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            max_position_embeddings=32,
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_near_zero_temperature_gives_what_greedy_decoding_without_a_cache_gives(family):
    """Greedy decoding by whole forward passes uses neither the cache nor the batch: an independent path."""
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # so that the likeliest token stands out
    tokenizer = byte_tokenizer(eos=None)
    ids = [0]
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    text = sample_text(model, tokenizer, tokens=20, seed=5, temperature=1e-6, window=20)
    documents = tokenizer.decode([i for i in ids[1:] if i != 0])
    clean = "".join(c for c in documents if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f" or c == "\ufffd"))
    assert text.replace("<s>", "") == clean


def unigram(vocabulary: int, logits: dict[int, float]) -> GPT2LMHeadModel:
    """A model without dependence on context: these logits at every position, -50 for all other tokens."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=1, n_positions=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.lm_head.weight[:, 0] = -50.0
        for token, logit in logits.items():
            model.lm_head.weight[token, 0] = logit
    return model


def test_tokens_follow_the_models_distribution():
    model = unigram(258, {CHARACTERS[c]: math.log(p) for c, p in {"a": 0.5, "b": 0.3, "c": 0.2}.items()})
    counts = Counter(sample_text(model, byte_tokenizer(), tokens=8000, seed=4).replace("<s>", ""))
    # Four standard deviations of a binomial of 8000 draws are below 0.0224.
    assert counts.total() == 8000
    assert [counts[x] / 8000 for x in "abc"] == pytest.approx([0.5, 0.3, 0.2], abs=0.0224)


def test_a_padded_vocabulary_is_never_drawn():
    model = unigram(300, {CHARACTERS["a"]: 0.0, 270: 50.0, 299: 50.0})
    assert sample_text(model, byte_tokenizer(), tokens=64, seed=1, window=32) == "a" * 32 + "<s>" + "a" * 32


def test_a_document_after_another_opens_with_bos():
    model = unigram(258, {CHARACTERS["a"]: 0.0, 1: -1.0})
    fed = []
    model.transformer.wte.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    text = sample_text(model, byte_tokenizer(), tokens=32, seed=1, window=32)
    ids = torch.cat(fed, dim=1)[0].tolist()
    assert ids[0] == 0
    assert 1 in ids[:-1]
    assert all(after == 0 for before, after in itertools.pairwise(ids) if before == 1)
    assert set(text.replace("<s>", "")) == {"a"}


def test_documents_are_separated_by_the_start_token_and_read_back_as_it():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    text = sample_text(model, tokenizer, tokens=96, seed=1, window=32)
    assert text.count("<s>") >= 2  # three rows at least
    assert "</s>" not in text
    assert Counter(tokenize(tokenizer, text).tolist())[0] == text.count("<s>")


def test_without_special_tokens_rows_start_anywhere_and_are_separated_by_blank_lines():
    model = tiny_llama()
    tokenizer = byte_tokenizer(bos=None, eos=None)
    text = sample_text(model, tokenizer, tokens=96, seed=1, window=8)
    assert "\n\n" in text
    assert "<s>" not in text
    assert text == sample_text(model, tokenizer, tokens=96, seed=1, window=8)


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"temperature": 0.0}, {"window": 0}, {"temperature": float("nan")}])
def test_bad_sampling_arguments(bad):
    with pytest.raises(CalibrationError, match="cannot sample"):
        sample_text(tiny_llama(), byte_tokenizer(), **({"tokens": 8, "seed": 1} | bad))


def test_a_broken_model_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        sample_text(model, byte_tokenizer(), tokens=8, seed=1)


# Real models ---------------------------------------------------------------------------------------------------------


def test_the_embedded_texts_are_text_and_differ(tinystories):
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    calibration, evaluation = (load_text(tinystories / "texts" / f"{n}.txt") for n in ("calibration", "evaluation"))
    # Encoding drawn tokens again merges and splits a few: within 2 % of the 131,072 and 32,768 that were drawn.
    assert len(tokenize(tokenizer, calibration, vocab_size=2048)) == pytest.approx(131_072, rel=0.02)
    assert len(tokenize(tokenizer, evaluation, vocab_size=2048)) == pytest.approx(32_768, rel=0.02)
    assert calibration[:200] != evaluation[:200]


def test_real_tokenizer_adds_one_bos(shared_models):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "stories260k")
    tokens = tokenize(tokenizer, "Once upon a time", vocab_size=512)
    assert tokens.tolist() == tokenizer("Once upon a time")["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
