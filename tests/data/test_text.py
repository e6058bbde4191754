import json
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from mach.config import TextConfig
from mach.data import text as module
from mach.data.text import TextFeatures
from mach.errors import ConfigError, DataError, StorageError
from tests.data.test_words import words_of

TEXTS = [
    "A red apple, a GREEN apple; a-b c++ x_1",
    "red red wine 2 3 22",
    "",
    "straße ﬁne K ² naïve नमस्ते e\u0301 İstanbul ΑΣ",
    "emoji 😀 👩‍👩‍👧 (family)",
    "   \t\n ",
    "apple",
]
words = st.text(alphabet=st.sampled_from("aAbßé1_ -.,ﬁ😀\u0301\n+#\u093f"), max_size=25)
spans = st.tuples(st.integers(1, 5), st.integers(0, 3)).map(lambda pair: [pair[0], pair[0] + pair[1]])


def matrix(features: TextFeatures, texts: list[str]) -> sp.csr_matrix:
    indptr, indices, values = features.transform(texts)
    assert [array.dtype.name for array in (indptr, indices, values)] == ["int64", "int32", "float32"]
    assert len(indptr) == len(texts) + 1
    for begin, end in pairwise(indptr):
        assert (np.diff(indices[begin:end]) > 0).all(), "indices ascend and are unique within a row"
    return sp.csr_matrix((values, indices, indptr), shape=(len(texts), features.n_features))


def terms(features: TextFeatures, folder: Path) -> list[str]:
    features.save(folder)
    return (folder / "terms.txt").read_bytes().decode("utf-8", "surrogatepass").split("\n")


def oracle(rule: int, **options) -> TfidfVectorizer:
    is_word = options["analyzer"] == "word"
    return TfidfVectorizer(
        preprocessor=lambda text: unicodedata.normalize("NFKC", text).lower(),
        token_pattern=r"(?u)\b\w+\b" if is_word and rule == 1 else None,
        tokenizer=words_of if is_word and rule == 2 else None,
        **options,
    )


def assert_equal_to_oracle(
    texts: list[str], queries: list[str], config: TextConfig, folder: Path, rule: int = 2
) -> None:
    is_word = config.words is not None
    vectorizer = oracle(
        rule,
        analyzer="word" if is_word else "char_wb",
        ngram_range=tuple(config.words or config.characters or ()),
        sublinear_tf=config.sublinear,
        min_df=config.min_rows,
    )
    try:
        vectorizer.fit(texts)
    except ValueError:  # an empty vocabulary
        with pytest.raises(DataError):
            TextFeatures(config, rule).fit(texts)
        return
    features = TextFeatures(config, rule).fit(texts)
    names = terms(features, folder)
    assert sorted(names) == sorted(vectorizer.vocabulary_)
    columns = [vectorizer.vocabulary_[name] for name in names]
    expected = vectorizer.transform(queries)[:, columns].toarray()
    np.testing.assert_allclose(matrix(features, queries).toarray(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sublinear", [False, True])
@pytest.mark.parametrize(
    ("words", "characters"),
    [([1, 1], None), ([1, 3], None), ([2, 2], None), (None, [1, 1]), (None, [3, 5]), (None, [2, 16])],
)
def test_equals_sklearn(words, characters, sublinear, tmp_path):
    config = TextConfig(words=words, characters=characters, sublinear=sublinear)
    for rule in (1, 2):
        assert_equal_to_oracle(TEXTS, [*TEXTS, "unknown zebra apple apple"], config, tmp_path, rule)


@given(texts=st.lists(words, min_size=1, max_size=6), queries=st.lists(words, max_size=3), span=spans, data=st.data())
@settings(max_examples=60)
def test_equals_sklearn_on_any_text(tmp_path_factory, texts, queries, span, data):
    is_word = data.draw(st.booleans())
    config = TextConfig(
        words=span if is_word else None,
        characters=None if is_word else span,
        min_rows=data.draw(st.integers(1, min(2, len(texts)))),
    )
    assert_equal_to_oracle(
        texts, [*queries, *texts], config, tmp_path_factory.mktemp("text"), data.draw(st.integers(1, 2))
    )


LONG = " ".join(f"w{n % 17} c++" for n in range(20))


@pytest.mark.parametrize(
    "config", [TextConfig(), TextConfig(sublinear=True), TextConfig(words=None, characters=[2, 3])]
)
def test_the_first_twelve_words_count_three_times(config):
    features, former = TextFeatures(config).fit([LONG]), TextFeatures(config, rule=2).fit([LONG])
    first = " ".join(LONG.split()[:12])
    for mine, other in zip(features.transform([LONG]), former.transform([f"{LONG} {first} {first}"]), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert features.counted([LONG])[2].tolist() == former.counted([LONG])[2].tolist()  # a class's name has no beginning


def test_of_longer_terms_the_first_twelve_count_three_times():
    features = TextFeatures(TextConfig(words=[2, 2])).fit(["x y", "p q"])
    values = features.transform(["x y " + "z " * 12 + "p q"])[2]  # of "p q", which stands beyond them, and "x y"
    np.testing.assert_allclose(values, np.array([1, 3]) / np.sqrt(10), rtol=1e-6)


def test_words_and_characters_share_one_norm_but_no_term(tmp_path):
    features = TextFeatures(TextConfig(words=[1, 1], characters=[2, 2])).fit(["ab", "ab c"])
    assert terms(features, tmp_path) == ["ab", "c", " a", "ab", "b ", " c", "c "]  # words first, frequent first
    assert matrix(features, ["ab"]).toarray().tolist() == [[0.5, 0.0, 0.5, 0.5, 0.5, 0.0, 0.0]]


def test_keeps_the_terms_of_most_rows_and_breaks_ties_by_spelling(tmp_path):
    texts = ["b a d d d", "c b a", "b c", "e"]
    features = TextFeatures(TextConfig(n_features=3)).fit(texts)
    assert terms(features, tmp_path) == ["b", "a", "c"]
    assert TextFeatures(TextConfig(n_features=3)).fit(reversed(texts)).fingerprint() == features.fingerprint()
    few = TextFeatures(TextConfig(n_features=2, min_rows=3)).fit(texts)
    assert terms(few, tmp_path) == ["b"]
    assert few.n_features == 1


def test_blocks_and_pieces_do_not_show(monkeypatch):
    config = TextConfig(words=[1, 2], characters=[2, 3])
    texts = [" ".join(f"w{(i * j) % 37}" for j in range(i % 9)) for i in range(200)]
    whole = TextFeatures(config).fit(texts)
    expected = whole.transform(texts)
    for name, value in {"BLOCK_IDS": 50, "BLOCK_ROWS": 7, "MAX_PIECES": 3, "LONGEST_PIECE": 2}.items():
        monkeypatch.setattr(module, name, value)
    pieced = TextFeatures(config).fit(iter(texts))
    assert pieced.fingerprint() == whole.fingerprint()
    for mine, other in zip(pieced.transform(texts), expected, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_row_depends_on_its_text_alone():
    features = TextFeatures(TextConfig(characters=[1, 4])).fit(TEXTS)
    together = matrix(features, TEXTS)
    for n, text in enumerate(TEXTS):
        alone = matrix(features, [text])
        assert alone.indices.tolist() == together[n].indices.tolist()
        assert alone.data.tobytes() == together[n].data.tobytes()
        assert alone.nnz == 0 or np.linalg.norm(alone.data) == pytest.approx(1.0)


def test_forgets_rare_terms_only_when_there_are_too_many(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MIN_CANDIDATES", 20)
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    texts = [f"common often{i % 3} rare{i}" for i in range(200)]
    features = TextFeatures(TextConfig(n_features=4)).fit(texts)
    assert terms(features, tmp_path) == ["common", "often0", "often1", "often2"]
    frequencies = np.array([200, 67, 67, 66])
    np.testing.assert_allclose(np.load(tmp_path / "idf.npy"), np.log(201 / (1 + frequencies)) + 1, rtol=1e-6)


def hashed(text: str, n_features: int) -> dict[int, int]:
    """Straight from the definition: single words and bigrams of characters, counted a bucket."""
    pieces = [f" {piece} " for piece in text.split()]
    grams = [piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)]
    buckets = [crc32(word.encode(), 0) for word in text.split()] + [crc32(gram.encode(), 1) for gram in grams]
    return Counter(bucket % n_features for bucket in buckets)


def test_hashing_follows_its_definition():
    config = TextConfig(words=[1, 1], characters=[2, 2], hashing=True, n_features=31)
    row = matrix(TextFeatures(config).fit(["größe ab ab größe"]), ["größe ab ab größe"])
    counts = hashed("größe ab ab größe", 31)
    norm = np.sqrt(sum(count**2 for count in counts.values()))
    assert dict(zip(row.indices.tolist(), (row.data * norm).round(4).tolist(), strict=True)) == counts


def test_hashed_buckets_are_frozen():
    config = TextConfig(words=[1, 2], characters=[3, 3], hashing=True, n_features=2**18)
    indices = TextFeatures(config).fit(["Äpfel sind rot"]).transform(["Äpfel sind rot"])[1]
    assert indices.tolist() == [
        41186,
        41997,
        77510,
        79759,
        98947,
        107266,
        108385,
        114317,
        115625,
        121700,
        129437,
        132620,
        151920,
        168568,
        242102,
        243238,
        249174,
    ]  # a model of last year reads this year's text: these may never change


def test_hashing_needs_fit():
    config = TextConfig(hashing=True, n_features=64)
    with pytest.raises(ConfigError, match="call fit"):
        TextFeatures(config).transform(["a"])
    with pytest.raises(ConfigError, match="call fit"):
        TextFeatures(config).save(Path())
    features = TextFeatures(config).fit(["a b", "a c", "a"])
    (a, b), values = (crc32(letter) % 64 for letter in (b"a", b"b")), matrix(features, ["a b"]).toarray()[0]
    assert features.n_features == 64
    assert values[b] / values[a] == pytest.approx((np.log(4 / 2) + 1) / (np.log(4 / 4) + 1))


def test_hashing_refuses_min_rows():
    with pytest.raises(ConfigError, match="min_rows = 2"):
        TextFeatures(TextConfig(hashing=True, min_rows=2))


@pytest.mark.parametrize("hash_seed", ["1", "2"])
@pytest.mark.parametrize("hashing", [False, True])
def test_is_the_same_in_every_process(hashing, hash_seed):
    program = (
        "from mach.config import TextConfig; from mach.data.text import TextFeatures; import sys;"
        f"features = TextFeatures(TextConfig(words=[1, 2], characters=[2, 4], hashing={hashing})).fit({TEXTS!r});"
        f"print(features.fingerprint(), features.transform({TEXTS!r})[1].tolist());"
        "assert not {'sklearn', 'torch', 'numba', 'pandas'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONUTF8": "1", "PYTHONPATH": str(Path(module.__file__).parents[2])},
        capture_output=True,
        check=True,
        text=True,
        encoding="utf-8",
    )
    features = TextFeatures(TextConfig(words=[1, 2], characters=[2, 4], hashing=hashing)).fit(TEXTS)
    assert run.stdout.strip() == f"{features.fingerprint()} {features.transform(TEXTS)[1].tolist()}"


CONFIGS = [
    TextConfig(words=[1, 2], characters=[3, 5], sublinear=True),
    TextConfig(words=None, characters=[1, 2]),
    TextConfig(hashing=True, n_features=100),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_comes_back_from_disk_and_pickle(config, tmp_path):
    texts = [*TEXTS, "lone \ud800 surrogate", "odd\x1cblank\x85s\u2028here"]
    features = TextFeatures(config).fit(texts)
    features.save(tmp_path)
    for copy in (TextFeatures.load(tmp_path), pickle.loads(pickle.dumps(features))):
        assert (copy.config, copy.n_features) == (config, features.n_features)
        assert copy.fingerprint() == features.fingerprint()
        for mine, other in zip(copy.transform([*texts, "new"]), features.transform([*texts, "new"]), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_fingerprint_tells_config_terms_and_weights_apart():
    fitted = [
        TextFeatures(config).fit(texts).fingerprint()
        for config in CONFIGS
        for texts in (["a", "b"], ["a", "c"], ["a", "a b"], ["a", "a", "b"])
    ]
    assert len(set(fitted)) == 4 + 3 + 4 + 1  # terms alone tell apart without idf; nothing with hashing


@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_file_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    features = TextFeatures(TextConfig(characters=[2, 3])).fit(TEXTS)
    features.save(folder)
    path = folder / data.draw(st.sampled_from(["text.json", "terms.txt", "idf.npy"]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] = data.draw(st.integers(0, 255))
    else:
        del content[at:]
    path.write_bytes(content)
    try:
        loaded = TextFeatures.load(folder)
    except StorageError as error:
        message = str(error)
    else:
        assert loaded.fingerprint() == features.fingerprint()  # say, another blank in the JSON
        return
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["text.json", "terms.txt", "idf.npy"])
def test_a_missing_or_foreign_file_is_refused(name, tmp_path):
    features = TextFeatures(TextConfig()).fit(TEXTS)
    features.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    unclosed = content.replace(b"}", b" ")  # of the header of idf.npy: numpy raises tokenize.TokenError
    for foreign in (unclosed + b" ", b"", b"[]", b"PK\x03\x04", pickle.dumps({}), content[::-1]):
        (tmp_path / name).write_bytes(foreign)
        with pytest.raises(StorageError, match=name):
            TextFeatures.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(StorageError, match=name):
        TextFeatures.load(tmp_path)


def test_files_of_two_saves_or_of_a_later_format_are_refused(tmp_path):
    TextFeatures(TextConfig()).fit(["b"]).save(tmp_path)
    terms_of_b = (tmp_path / "terms.txt").read_bytes()
    TextFeatures(TextConfig()).fit(["a"]).save(tmp_path)
    description = json.loads((tmp_path / "text.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps(description | {"format": 4}))
    with pytest.raises(StorageError, match="has format 4, this version reads 1 to 3"):
        TextFeatures.load(tmp_path)
    (tmp_path / "text.json").write_text(json.dumps(description))
    (tmp_path / "terms.txt").write_bytes(terms_of_b)
    with pytest.raises(StorageError, match="do not belong together"):
        TextFeatures.load(tmp_path)


def test_wrong_input_is_named():
    features = TextFeatures(TextConfig()).fit(["a"])
    with pytest.raises(DataError, match="single string"):
        features.transform("a")
    with pytest.raises(DataError, match="text 1 is nan"):
        features.transform(["a", float("nan")])  # type: ignore[list-item]
    with pytest.raises(DataError, match="min_rows = 2 of the 3 texts"):
        TextFeatures(TextConfig(min_rows=2)).fit(["a", "b", ""])


def test_no_text_gives_no_row():
    indptr, indices, values = TextFeatures(TextConfig()).fit(["a"]).transform([])
    assert (indptr.tolist(), len(indices), len(values)) == ([0], 0, 0)


@pytest.mark.parametrize(
    ("config", "fingerprint", "values"),
    [
        (
            TextConfig(words=[1, 1], characters=[2, 2]),
            "c28ee6c669a33e58219e4546d19eae1b",
            [1, 2, 1, 1, 2, 1, 1, 2, 1, 1],
        ),
        (TextConfig(hashing=True, n_features=100), "95fff609762ef4717d57aa43ddd12f1c", [1, 2, 1]),
    ],
)
def test_features_of_earlier_versions_without_weights_load_and_answer(config, fingerprint, values, tmp_path):
    former = TextFeatures(config, rule=1).fit(["ab", "ab c", "c c d"])
    former._is_weighted, former._idf = False, np.ones(0, np.float32)
    former.save(tmp_path)
    features = TextFeatures.load(tmp_path)
    assert features.fingerprint() == fingerprint  # of the version that wrote such features
    found = features.transform(["ab c c d"])[2]
    np.testing.assert_allclose(found / found.min(), values, rtol=1e-6)


def test_a_hashed_term_is_known_where_the_texts_had_it(tmp_path):
    features = TextFeatures(TextConfig(hashing=True, n_features=2**16)).fit(["red apple", "red car"])
    features.save(tmp_path)
    for known in (features, TextFeatures.load(tmp_path)):
        indices = np.concatenate([known.transform([word])[1] for word in ("red", "apple", "zebra")])
        assert known.is_known(indices).tolist() == [True, True, False]


def test_files_of_earlier_versions_keep_their_rule(tmp_path):
    texts = ["हिन्दी c++", "C# हिन्दी"]
    former = TextFeatures(TextConfig(words=[1, 2]), rule=1).fit(texts)
    former.save(tmp_path)
    features = TextFeatures.load(tmp_path)
    assert json.loads((tmp_path / "text.json").read_text())["format"] == 1
    assert (features.rule, features.fingerprint()) == (1, former.fingerprint())
    for mine, other in zip(features.transform(texts), former.transform(texts), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert features.n_features != TextFeatures(TextConfig(words=[1, 2])).fit(texts).n_features


def test_features_have_the_fingerprint_of_earlier_versions():
    features = TextFeatures(TextConfig(words=[1, 2], sublinear=True), rule=1).fit(["ab", "ab c", "c c d"])
    assert features.fingerprint() == "51e2f74e607590e6df0c3131e7d51fb0"


def test_hashed_terms_fit_the_columns(tmp_path: Path):
    """Else ids beyond the last column would be read as those of further rows."""
    TextFeatures(TextConfig(hashing=True, n_features=64)).fit(["red cup"]).save(tmp_path)
    told = json.loads((tmp_path / "text.json").read_text())
    del told["config"]["n_features"]
    (tmp_path / "text.json").write_text(json.dumps(told))
    with pytest.raises(StorageError, match="terms are hashed to 262144 columns, and n_features is 64"):
        TextFeatures.load(tmp_path)
