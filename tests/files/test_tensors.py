from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file

from mach.errors import StorageError
from mach.files.tensors import map_tensors, write_tensors
from mach.networks.kernels.memory import from_bfloat16, to_bfloat16


def save(path: Path, tensors: dict, metadata: dict | None = None) -> str:
    with path.open("wb") as file:
        return write_tensors(file, tensors, metadata or {})


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=3, min_side=0), elements=st.floats(width=32)))
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path_factory, array):
    folder = tmp_path_factory.mktemp("tensors")
    tensors = {"a": array, "b": np.arange(3), "empty": np.empty((0, 4), np.int32)}
    save(folder / "ours", tensors, {"note": "x"})
    theirs = safetensors.numpy.load_file(folder / "ours")
    safetensors.numpy.save_file(tensors, folder / "theirs", {"note": "x"})
    ours, metadata = map_tensors(folder / "theirs")
    assert metadata == {"note": "x"}
    for name, expected in tensors.items():
        np.testing.assert_array_equal(theirs[name], expected)
        np.testing.assert_array_equal(ours[name], expected)


def test_golden_bytes():
    file = io.BytesIO()
    digest = write_tensors(file, {"w": np.array([[1.0, -2.0]], np.float32), "n": np.array([7])}, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"n":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}'
    )
    header += b" " * (-len(header) % 8)
    body = bytes.fromhex("0000803f000000c0" + "0700000000000000")
    assert file.getvalue() == len(header).to_bytes(8, "little") + header + body
    assert digest == hashlib.blake2b(body, digest_size=16).hexdigest()


def test_bfloat16_is_stored_as_the_library_knows_it(tmp_path: Path):
    wide = np.linspace(-3, 3, 64, dtype=np.float32).reshape(8, 8)
    save(tmp_path / "half", {"w": to_bfloat16(wide)})
    assert torch.equal(load_file(tmp_path / "half")["w"], torch.from_numpy(wide).bfloat16())


@given(arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_bfloat16_rounds_as_torch_does(array):
    halves = from_bfloat16(to_bfloat16(array))
    np.testing.assert_array_equal(halves, torch.from_numpy(array).bfloat16().float().numpy())


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    "header",
    [
        {"w": entry(data_offsets=[0, 4])},
        {"w": entry(data_offsets=[0, 800])},
        {"w": entry(data_offsets=[8, 0])},
        {"w": entry(data_offsets=[-8, 0])},
        {"w": entry(shape=[-2])},
        {"w": entry(shape=[2**40])},
        {"w": entry(dtype="F8")},
        {"w": entry(dtype=["F32"])},
        {"w": entry(shape="2")},
        {"w": {"dtype": "F32"}},
        {"w": 3},
        ["w"],
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header):
    text = json.dumps(header).encode()
    (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(StorageError, match="bad"):
        map_tensors(tmp_path / "bad")


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"\xff" * 64, (4).to_bytes(8, "little") + b"{nul"])
def test_garbage_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        map_tensors(tmp_path / "bad")


def test_a_truncated_file_is_refused(tmp_path: Path):
    save(tmp_path / "w", {"w": np.ones(100, np.float32)})
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[:-4])
    with pytest.raises(StorageError, match="truncated"):
        map_tensors(tmp_path / "w")


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot read .*absent: No such file"):
        map_tensors(tmp_path / "absent")
