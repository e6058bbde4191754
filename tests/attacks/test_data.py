"""A stranger's data files: whatever they hold, one line says what is wrong, and memory stays below a stated peak."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.config import DataConfig, TextConfig
from mach.data.limits import EXPANDED_BYTES, LEAST_IDS, NAME_CHARACTERS, PEAK_BYTES, ROW_BYTES, ROW_ENTRIES
from mach.data.prepare import prepare
from mach.errors import DataError

ADDRESS_SPACE = 2 * PEAK_BYTES  # of a process that prepares: libraries map more than they touch
MEGABYTE = b"x" * 2**20


def save_npy(**changes: Any) -> bytes:
    """An npy file of two rows whose header, a text, may be any."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros((2, 3), np.float32))
    if "header" in changes:
        header = changes["header"].encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 24
    return file.getvalue()


def npz(path: Path, compression: int = zipfile.ZIP_DEFLATED, **changes: Any) -> None:
    """Three rows of six features and four classes, with other arrays, bytes or none in place of some."""
    arrays: dict[str, Any] = {
        "X_data": np.ones(3), "X_indices": np.arange(3), "X_indptr": np.arange(4), "X_shape": np.array([3, 6]),
        "Y_indices": np.arange(3), "Y_indptr": np.arange(4), "Y_shape": np.array([3, 4]),
    }  # fmt: skip
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in (arrays | changes).items():
            if isinstance(array, bytes):
                archive.writestr(f"{name}.npy", array)
            elif array is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array))


def claim(shape: Any, dtype: str = "<i8", body: bytes = b"") -> bytes:
    """An npy file whose header says more than follows."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def beside(path: Path, classes: Any) -> None:
    np.save(path.with_suffix(".classes.npy"), classes)


def npy(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)
        beside(path, np.array([0, 1]))

    return write


def text(content: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def packed(pack: Callable[[bytes], bytes], head: bytes, block: bytes, n: int) -> Callable[[Path], None]:
    """A file that repeats a block; as streams behind each other, so that it is made fast."""

    def write(path: Path) -> None:
        path.write_bytes(pack(head) + pack(block * 4) * (n // 4))

    return write


def parquet(**columns: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = columns.pop("table", None) or pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path, compression="zstd")

    return write


def dense_from(path: Path) -> None:
    npy(save_npy())(path)
    beside(path, np.array([10**9, 10**9 + 1]))


def parquet_twice(path: Path) -> None:
    import pyarrow

    parquet(table=pyarrow.table([["a"], ["b"], ["c"]], names=["text", "classes", "text"]))(path)


def parquet_dictionary(path: Path, *, in_lists: bool = False) -> None:
    """One text of 1 MiB that a million rows, or a row with a million classes, repeat: 5 kB."""
    import pyarrow

    values = pyarrow.array([MEGABYTE.decode()])
    n = 2**20
    repeated = pyarrow.DictionaryArray.from_arrays(np.zeros(n, np.int32), values)
    if in_lists:
        lists = pyarrow.ListArray.from_arrays(np.array([0, n], np.int32), repeated)
        parquet(text=["a"], classes=lists)(path)
    else:
        parquet(text=repeated, classes=["a"] * n)(path)


def parquet_nulls(path: Path) -> None:
    """Rows without anything in them, hundreds a byte."""
    import pyarrow

    nulls = pyarrow.nulls(2**22, pyarrow.string())
    parquet(text=nulls, classes=nulls)(path)


def parquet_quarrel(path: Path) -> None:
    """The schema says that no text is missing, the statistics count rows where it is: Arrow ends the process."""
    parquet(text=["a"], classes=["b"])(path)
    content = path.read_bytes()
    wrong = content.replace(b"\x15\x0c\x25\x02\x18\x04text", b"\x15\x0c\x25\x00\x18\x04text")
    assert wrong != content
    path.write_bytes(wrong)


def parquet_liar(path: Path) -> None:
    """A page whose header says that it unpacks to 2 GB, where the file's metadata say some bytes."""
    parquet(text=["a" * 50], classes=["b"])(path)
    content = path.read_bytes()
    size = content.index(bytes([0x15, 0x00, 0x15]))  # of a data page: type 0, then its size as a varint
    end = size + 3
    while content[end] & 128:
        end += 1
    big = bytearray()
    number = (2**31 - 1) << 1
    while number > 127:
        big.append(number & 127 | 128)
        number >>= 7
    big.append(number)
    path.write_bytes(content[: size + 3] + bytes(big) + content[end + 1 :])


def unknown_compression(path: Path) -> None:
    npz(path, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + place : found.start() + place + 2] = struct.pack("<H", 93)
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    npz(path, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + place] |= 1
    path.write_bytes(content)


def doubled(path: Path) -> None:
    npz(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("X_data.npy", save_npy())


def xz_dictionary(content: bytes) -> bytes:
    """Packed so that 1.5 GiB are needed to unpack it."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    data = bytearray(lzma.compress(content, filters=filters))
    header = 12
    size = (data[header] + 1) * 4
    place = data.index(bytes([0x21, 0x01]), header) + 2  # LZMA2, one byte of properties: the size of its dictionary
    data[place] = 39  # 3 GiB
    import zlib

    data[header + size - 4 : header + size] = struct.pack("<I", zlib.crc32(bytes(data[header : header + size - 4])))
    return bytes(data)


def svmlight(classes: Any, features: Any) -> Callable[[Path], None]:
    return text("".join(f"{k} {f}:1\n" for k, f in zip(classes, features, strict=True)))


LONG = f"has more than {ROW_BYTES:,} bytes"
UNPACKS = rf"unpacks to more than .* and more than {EXPANDED_BYTES:,}: unpack it yourself"
ROWS = b"1 1:1\n" * (2**20 // 6)
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # name: file, what writes it, what must be said
    "a gz bomb": ("a.svm.gz", packed(gzip.compress, b"", ROWS, 64), UNPACKS),
    "an xz bomb": ("a.svm.xz", packed(lzma.compress, b"", ROWS, 64), UNPACKS),
    "a bz2 bomb": ("a.svm.bz2", packed(bz2.compress, b"", ROWS, 64), UNPACKS),
    "a bomb of blank lines": ("a.csv.gz", packed(gzip.compress, b"text,classes\n", b"\n" * 2**20, 64), UNPACKS),
    "a bomb of one line": ("a.txt.gz", packed(gzip.compress, b"1 2 3\n", MEGABYTE, 512), f"line 2 {LONG}"),
    "a bomb of one line of JSON": ("a.jsonl.xz", packed(lzma.compress, b"", MEGABYTE, 1024), f"line 1 {LONG}"),
    "an xz of 3 GiB": ("a.svm.xz", text(xz_dictionary(ROWS)), "pack it with xz -9 or less"),
    "an endless header": ("a.txt", text("1 2 3" + " " * 2**24), "line 1: '1 2 3' is no header"),
    "an endless line of repository text": ("a.txt", text("1 2 3\n1 1:1" + " " * ROW_BYTES), f"line 2 {LONG}"),
    "an endless line of svmlight": ("a.svm", text("1 1:1\n# " + "x" * 2**24 + "\n1 1:1\n"), f"line 2 {LONG}"),
    "a field of 100 MB": ("a.csv", text(b"text,classes\n" + b"long " * 2 * 10**7 + b",a\n"), f"line 2 {LONG}"),
    "quotes that never close": (
        "a.csv",
        text(b'text,classes\na,b\n"' + b"word \n" * 2**21),
        "line 3: no valid CSV .*more than .*correct its quotes",
    ),
    "a row of many lines": (
        "a.csv",
        text(b"text,classes\n" + b'"\n",' * 2**22),
        "line 2: no valid CSV .a row of more than",
    ),
    "a class name that is a text": (
        "a.csv",
        text("text,classes\na," + "b" * 5000),
        f"line 2: .*has 5,000 characters, a class name may have {NAME_CHARACTERS:,}",
    ),
    "a header of 2^64 rows": ("a.txt", text(f"{2**64} 2 3\n1 1:1\n"), f"line 1: N = {2**64} must be at most"),
    "a header of 2^62 rows": ("a.txt", text(f"{2**47} 2 3\n1 1:1\n"), f"with 1 row, its header says N = {2**47}"),
    "a header of many digits": ("a.txt", text("9" * 150 + " 2 3\n1 1:1\n"), "line 1: N = 9999.*must be at most"),
    "a header of D = 2^40": (
        "a.txt",
        text(f"1 {2**40} 3\n1 1:1\n"),
        f"line 1: D = {2**40}.*must be at most 2147483647",
    ),
    "a header of D = 2^31 - 1": (
        "a.txt",
        text(f"1 {2**31 - 1} 3\n1 1:1\n"),
        f"D = {2**31 - 1}, and only 1 feature indices",
    ),
    "an npz of D = 2^40": (
        "a.npz",
        lambda p: npz(p, X_shape=np.array([3, 2**40])),
        f"D = {2**40} must be at most 2147483647",
    ),
    "an npz of K = 2^63": (
        "a.npz",
        lambda p: npz(p, Y_shape=np.array([3, 2**63], np.uint64)),
        f"K = {2**63} must be at most 2147483647",
    ),
    "an npz of N = 2^63": (
        "a.npz",
        lambda p: npz(p, X_shape=np.array([2**63], np.uint64)),
        "X_shape = .9223372036854775808",
    ),
    "an npz of negative shape": ("a.npz", lambda p: npz(p, X_shape=np.array([3, -1])), "are not those of a CSR matrix"),
    "an npz whose offsets wrap": (
        "a.npz",
        lambda p: npz(p, X_indptr=np.array([0, 1, 2**63, 3], np.uint64)),
        "are not those of a CSR matrix",
    ),
    "an npz whose offsets are beyond its arrays": (
        "a.npz",
        lambda p: npz(p, X_indptr=np.array([0, 1, 2, 2**22])),
        "X_indices has 3 entries, its indptr ends at",
    ),
    "an npz with a row of 2^40 entries": (
        "a.npz",
        lambda p: npz(p, X_indptr=np.array([0, 1, 2, 2**40])),
        f"row 2: {2**40 - 2} entries of X, a row may have {ROW_ENTRIES}",
    ),
    "an npz with an array that claims 2^60": (
        "a.npz",
        lambda p: npz(p, X_indices=claim(f"({2**60},)")),
        "X_indices is cut short: its header says",
    ),
    "an npz with an array that claims 2^70": (
        "a.npz",
        lambda p: npz(p, Y_indptr=claim(f"({2**70},)")),
        "Y_indptr is cut short: its header says|not those of a CSR",
    ),
    "an npz with an array of negative length": ("a.npz", lambda p: npz(p, X_data=claim("(-1,)")), "X_data"),
    "an npz bomb": ("a.npz", lambda p: npz(p, Y_data=np.zeros(2**27, np.int8)), UNPACKS),
    "an npz of unknown compression": ("a.npz", unknown_compression, "is no array of numpy's .*compression"),
    "an npz with a password": ("a.npz", encrypted, "is no array of numpy's .*encrypted"),
    "an npz with an array twice": ("a.npz", doubled, "has 2 arrays 'X_data': rename or remove"),
    "an npy that claims 2^40 rows": ("a.npy", npy(claim(f"({2**40}, 3)", "<f4", b"\0" * 24)), "is no array of numpy's"),
    "an npy whose shape overflows": (
        "a.npy",
        npy(claim(f"({2**40}, {2**40})", "<f4", b"\0" * 24)),
        "is no array of numpy's",
    ),
    "an npy whose shape is beyond all": (
        "a.npy",
        npy(claim(f"({2**70}, 1)", "<f4", b"\0" * 24)),
        "is no array of numpy's",
    ),
    "classes that claim 2^40": (
        "a.npy",
        lambda p: (npy(save_npy())(p), p.with_suffix(".classes.npy").write_bytes(claim(f"({2**40},)")))[0],
        "classes.npy is cut short",
    ),
    "classes numbered from 10^9": (
        "a.svm",
        svmlight(range(10**9, 10**9 + 20), range(20)),
        "K = 1000000020, and only 20 class ids occur: .*number those that occur from 0",
    ),
    "features up to 2 10^9": (
        "a.svm",
        svmlight([0, 1, 1], [5, 7, 2 * 10**9]),
        "D = 2000000001, and only 3 feature indices occur: .*number those",
    ),
    "dense rows with classes from 10^9": (
        "a.npy",
        dense_from,
        "K = 1000000002, and only 2 class ids",
    ),
    "a Parquet of a repeated dictionary": ("a.parquet", parquet_dictionary, UNPACKS),
    "a Parquet of a repeated dictionary in a list": (
        "a.parquet",
        lambda p: parquet_dictionary(p, in_lists=True),
        "row 0 has more than",
    ),
    "a Parquet whose page says 2 GB": ("a.parquet", parquet_liar, "has pages of 2,147,483,"),
    "a Parquet whose schema and statistics disagree": (
        "a.parquet",
        parquet_quarrel,
        "damaged .* .Definition level histogram .*: fetch",
    ),
    "a Parquet of empty rows": ("a.parquet", parquet_nulls, UNPACKS),
    "a Parquet with a column twice": ("a.parquet", parquet_twice, "has 2 columns 'text': rename or remove all but one"),
    "a Parquet with structures": (
        "a.parquet",
        parquet(text=[{"a": 1}], classes=["b"]),
        "column 'text' has type struct<a",
    ),
    "a CSV with a column twice": (
        "a.csv",
        text("text,classes,text\na,b,c\n"),
        "line 1 has 2 columns 'text': rename or remove",
    ),
    "a TSV with a column twice": ("a.tsv", text("classes\ttext\tclasses\na\tb\tc\n"), "line 1 has 2 columns 'classes'"),
    "JSON with a name twice": (
        "a.jsonl",
        text('{"text": "a", "classes": "b", "text": "c"}'),
        "line 1: .* is no JSON .'text' stands in it twice",
    ),
    "JSON with the last of many names twice": (
        "a.jsonl",
        text("{" + "".join(f'"{n}": 1, ' for n in range(2 * 10**5)) + '"x": 1, "x": 2}'),
        "line 1: .* is no JSON .'x' stands in it twice",
    ),
    "JSON with a number of many digits": (
        "a.jsonl",
        text('{"text": ' + "1" * 10**5 + "}"),
        "line 1: .* is no JSON .Exceeds",
    ),
    "a header of many columns": ("a.csv", text(",".join(f"c{n}" for n in range(10**5)) + "\n"), "c19 and 99980 more"),
    "a header with a line in it": ("a.csv", text('"a\nb",c\n'), r"there are 'a\\nb', c: set"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_line_says_what_is_wrong(name: str, tmp_path: Path):
    file, write, said = CASES[name]
    write(tmp_path / file)
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(train="x", cache=str(tmp_path / "cache")), TextConfig(), str(tmp_path / file))
    message = str(caught.value)
    assert re.search(said, message), message
    assert file.partition(".")[0] in message
    assert len(message.splitlines()) == 1
    assert len(message) < 500 + 3 * len(str(tmp_path))
    assert not list((tmp_path / "cache").glob("[!.]*"))


def fields(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


HEADERS = [
    *("", "{", "{'descr': '<f4'", "((((" * 2000, fields()[:-4], "{'shape': (2, 3), }", "[1, 2]", "5", "'" + "a" * 70),
    *(fields(shape="(2, '3')"), fields(order="3"), fields("'<q9'"), fields("[]"), fields("{'a': 1}"), fields("'|O'")),
    *(
        "{[]: 1}",
        fields(shape="(2L, 3L)")[:-9],
        fields("('<f4', 7)"),
        "\x00\x01",
        "1if 1else 2",
        "\\N{x}",
        fields("'a' 5"),
    ),
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("which", ["a.npy", "a.classes.npy", "a.npz"])
def test_a_damaged_header_of_an_array(header: str, which: str, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    damaged = save_npy(header=header)
    if which == "a.npz":
        npz(tmp_path / which, X_data=damaged)
    else:
        (tmp_path / "a.npy").write_bytes(save_npy())
        beside(tmp_path / "a.npy", np.array([0, 1]))
        (tmp_path / which).write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        prepare(
            DataConfig(train="x", cache=str(tmp_path / "cache")),
            TextConfig(),
            str(tmp_path / which.replace(".classes", "")),
        )
    assert len(str(caught.value).splitlines()) == 1
    assert which in str(caught.value)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "local fifo"])
@pytest.mark.parametrize("ending", [".txt", ".svm.gz", ".csv", ".jsonl", ".parquet", ".npz", ".npy"])
def test_what_never_ends_is_no_file(kind: str, ending: str, tmp_path: Path):
    path = tmp_path / f"a{ending}"
    os.symlink("/dev/zero", path) if kind == "/dev/zero" else os.mkfifo(path)
    beside(tmp_path / "a.npy", np.array([0, 1]))
    source = f"local://{path}" if kind.startswith("local") else str(path)
    result = CliRunner().invoke(main, ["prepare", source, str(tmp_path / "store")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert re.search(
        "a(.txt|.svm|.csv|.jsonl|.parquet|.npz|.npy).* is (a pipe|a device|no regular file).*may never end",
        result.stderr,
    )


def test_other_files_that_never_end(tmp_path: Path):
    (tmp_path / "a.npy").write_bytes(save_npy())
    os.mkfifo(tmp_path / "a.classes.npy")
    (tmp_path / "a.svm").write_text("1 1:1\n")
    os.mkfifo(tmp_path / "names.txt")
    (tmp_path / "store").mkdir()
    os.mkfifo(tmp_path / "store/meta.json")
    for source, options in (
        ("a.npy", []),
        ("a.svm", ["--set", f"data.classes={tmp_path}/names.txt"]),
        ("store", []),
    ):
        result = CliRunner().invoke(main, ["prepare", str(tmp_path / source), str(tmp_path / "made"), *options])
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.stderr
        if source != "store":  # which may not be made of a store
            assert "is a pipe, which may never end" in result.stderr


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


MEASURED = (
    "import sys; from mach.cli import main\n"
    "try: main(sys.argv[1:])\n"
    "finally: print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in CASES if re.search("bomb|endless|100 MB|never|many|Parquet|npz", name)]
)
def test_memory_stays_below_the_stated_peak(name: str, tmp_path: Path):
    file, write, said = CASES[name]
    write(tmp_path / file)
    command = [sys.executable, "-c", MEASURED, "prepare", str(tmp_path / file), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "compiling kernels" not in line]  # of a new clone
    assert len(lines) == 1, done.stderr
    assert re.search(said, done.stderr)
    assert "out of memory" not in done.stderr
    assert 1024 * int(done.stdout) < PEAK_BYTES


def test_ids_that_lack_some_are_taken(tmp_path: Path):
    """Hashed features, and a list of classes of which few occur, are no mistake."""
    svmlight([0, 1, LEAST_IDS - 1], [5, 7, LEAST_IDS - 1])(tmp_path / "a.svm")
    cache = str(tmp_path / "cache")
    assert prepare(DataConfig(train="x", cache=cache), TextConfig(), str(tmp_path / "a.svm")).n_classes == LEAST_IDS
    features = np.arange(0, LEAST_IDS * 2, 100)
    svmlight(features % 3, features)(tmp_path / "b.svm")
    assert prepare(DataConfig(train="x", cache=cache), TextConfig(), str(tmp_path / "b.svm")).n_features > LEAST_IDS


def test_later_rows_keep_to_the_rule(tmp_path: Path):
    """Test rows have the sizes of the training rows, and further training rows may add no more classes than these."""
    data = DataConfig(train="x", cache=str(tmp_path / "cache"))
    svmlight([0, 1, 2], [5, 7, 9])(tmp_path / "a.svm")
    train = prepare(data, TextConfig(), str(tmp_path / "a.svm"))
    svmlight([10**9], [5])(tmp_path / "b.svm")
    with pytest.raises(DataError, match=r"b.svm line 1: class '1000000000' is outside 0..2"):
        prepare(data, TextConfig(), str(tmp_path / "b.svm"), like=train)
    with pytest.raises(DataError, match="K = 1000000001, and only 4 class ids occur"):
        prepare(data, TextConfig(), str(tmp_path / "b.svm"), like=train, grows=True)


def test_a_store_keeps_to_the_rule(tmp_path: Path):
    data = DataConfig(train="x", cache=str(tmp_path / "cache"))
    svmlight([0, 1, 2], [5, 7, 9])(tmp_path / "a.svm")
    store = prepare(data, TextConfig(), str(tmp_path / "a.svm"))
    meta = json.loads((store.path / "meta.json").read_text())
    (store.path / "meta.json").write_text(json.dumps(meta | {"n_features": 2 * 10**9}))
    with pytest.raises(DataError, match="D = 2000000000, and only 3 feature indices occur"):
        prepare(data, TextConfig(), str(store.path))


def test_a_dry_run_refuses_sizes_that_follow_the_largest(tmp_path: Path):
    svmlight(range(10**9, 10**9 + 20), range(20))(tmp_path / "a.svm")
    result = CliRunner().invoke(main, ["train", str(tmp_path / "a.svm"), str(tmp_path / "run"), "--dry-run"])
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("mach: ")]  # behind the configuration
    assert "number those that occur from 0" in line


def words(n_bytes: int) -> str:
    return " ".join(f"{n:x}" for n in range(n_bytes // 7))


def parquet_pages(path: Path) -> None:
    """A page of 120 MB, of few rows."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [words(2**22)] * 29, "classes": [["a", "b"]] * 29})
    options: dict[str, Any] = {"use_dictionary": False, "data_page_size": 2**30, "compression": "zstd"}
    pyarrow.parquet.write_table(table, path, **options)


LARGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a text of one row": ("a.csv", text("text,classes\n" + words(ROW_BYTES) + ",b\n")),
    "rows of text": ("a.csv", text("text,classes\n" + f"{words(ROW_BYTES // 2)},b\n" * 8)),
    "lists in JSON": (
        "a.jsonl",
        text('{"text": "a", "classes": "b", "c": [' + "[]," * (ROW_BYTES // 3 - 20) + "1]}\n"),
    ),
    "names in JSON": ("a.jsonl", text(('{"text": "a", "classes": [' + '"b",' * 2**20 + '"c"]}\n') * 8)),
    "a row of features": ("a.svm", text("1 " + " ".join(f"{n}:1" for n in range(2**19)) + "\n" + "0 1:1\n" * 9)),
    "pages of Parquet": ("a.parquet", parquet_pages),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_memory_stays_below_the_stated_peak_for_large_rows(name: str, tmp_path: Path):
    file, write = LARGE[name]
    write(tmp_path / file)
    command = [sys.executable, "-c", MEASURED, "prepare", str(tmp_path / file), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1024 * int(done.stdout.splitlines()[-1]) < PEAK_BYTES
