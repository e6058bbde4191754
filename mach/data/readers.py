"""Numeric text, repository and svmlight, as chunks of rows.

========== ======================================================================================================
repository header ``N D K``, then a line a row: ``k1,k2 f:v f:v``, all from 0; a line may begin with a blank
           (no class), and ``nan`` is no class either
svmlight   ``k1,k2 qid:.. f:v f:v # comment``; indices and classes are taken as they stand (a file that counts
           features from 1 leaves column 0 empty); classes are non-negative, ``1.0`` is 1, ``nan`` is none; blank
           lines are skipped
========== ======================================================================================================

Files may be compressed (.gz, .bz2, .xz). Standard input holds the rows of repository text without a header; every line
of it is a row. Feature indices must ascend; classes of a row are sorted, and equal ones merged. Memory is bounded by
the block and the longest line (`mach.data.limits`), whatever the file's size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mach.data.limits import BLOCK_BYTES
from mach.data.sources import LIMIT, STDIN, Numbers, Shape, SourceFile, source_errors
from mach.data.store import Chunk
from mach.errors import DataError, counted

HEADER_BYTES = 200
MOST_ROWS = 2**48  # more than any file holds
_TOKEN = re.compile(rb"[^\s#]*")


@dataclass(frozen=True)
class NumericText(Numbers):
    """Rows as lines of ``index:value`` pairs; svmlight unless they follow a header or come from standard input."""

    has_header: bool = False
    is_stdin: bool = False

    def shape(self, path: Path, classes_optional: bool = False) -> Shape:
        if not self.has_header:
            return Shape(None, None, None)
        with SourceFile(path) as source, source_errors(path):
            header = source.file.readline(HEADER_BYTES)
        if not header:
            raise DataError(f"{path} is empty: the first line must be N D K")
        tokens = header.split()
        is_cut = len(header) == HEADER_BYTES and not header.endswith(b"\n")
        if is_cut or len(tokens) != 3 or not all(token.isdigit() for token in tokens):
            raise DataError(f"{path} line 1: {_quoted(header)} is no header of three numbers N D K: add it")
        n_rows, n_features, n_classes = map(int, tokens)
        if max(n_features, n_classes) > LIMIT:
            raise DataError(f"{path} line 1: D = {n_features} and K = {n_classes} must be at most {LIMIT}")
        if n_rows > MOST_ROWS:
            raise DataError(f"{path} line 1: N = {n_rows} must be at most {MOST_ROWS}: correct the header")
        return Shape(n_rows, n_features, n_classes)

    def chunks(
        self, path: Path, shape: Shape, block_bytes: int = BLOCK_BYTES, classes_optional: bool = False
    ) -> Iterator[Chunk]:
        n_features, n_classes = (LIMIT if given is None else given for given in shape[1:])
        n_rows = 0
        with SourceFile(path, STDIN if self.is_stdin else None) as source:
            if self.has_header:
                with source_errors(source.name):
                    source.file.readline(HEADER_BYTES)
                source.n_lines = 1
            for block in source.blocks(block_bytes):
                rows_left = -1 if shape.n_rows is None else shape.n_rows - n_rows
                chunk = self._parse(block, rows_left, (n_features, n_classes), source)
                n_rows += len(chunk.class_indptr) - 1
                source.n_lines += block.count(b"\n")
                yield chunk
        if shape.n_rows is not None and n_rows < shape.n_rows:
            raise DataError(
                f"{source.name} ends at line {source.n_lines} with {counted(n_rows, 'row')}, its header says "
                f"N = {shape.n_rows}: correct the header or fetch the file again"
            )

    def _parse(self, block: bytes, rows_left: int, limits: tuple[int, int], source: SourceFile) -> Chunk:
        """The rows of whole lines; ``limits`` are D and K."""
        from mach.data.kernels import parse

        # the shortest row, class and feature are "\n", "1," and " 1:1"; pages that stay untouched cost no memory
        n_rows, n_ids, n_entries = block.count(b"\n"), len(block) // 2 + 1, len(block) // 4 + 1
        class_indptr, feature_indptr = np.empty(n_rows + 1, np.int64), np.empty(n_rows + 1, np.int64)
        class_ids, indices = np.empty(n_ids, np.int32), np.empty(n_entries, np.int32)
        values, unsettled = np.empty(n_entries, np.float32), np.empty((n_entries, 2), np.int64)
        outputs: Any = (class_indptr, class_ids, feature_indptr, indices, values, unsettled)
        text, is_svmlight = np.frombuffer(block, dtype=np.uint8), not (self.has_header or self.is_stdin)
        options = is_svmlight, rows_left, *limits, parse.POWERS
        code, position, n_rows, n_unsettled = parse.parse_rows(text, *options, *outputs)
        for entry, start in unsettled[:n_unsettled].tolist():
            with np.errstate(over="ignore"):
                values[entry] = np.float32(float(_token(block, start).partition(b":")[2]))
            if np.isinf(values[entry]):
                code, position = parse.BAD_VALUE, start
                break
        if code != parse.DONE:
            line = source.n_lines + 1 + block.count(b"\n", 0, position)
            raise DataError(f"{source.name} line {line}: {_complaint(code, _token(block, position), limits)}")
        n_ids, n_entries = int(class_indptr[n_rows]), int(feature_indptr[n_rows])
        features = feature_indptr[: n_rows + 1], indices[:n_entries], values[:n_entries]
        return Chunk(class_indptr[: n_rows + 1], class_ids[:n_ids], features, source.fraction)


def _token(block: bytes, position: int) -> bytes:
    return _TOKEN.match(block, position)[0]  # type: ignore[index]  # a token starts there


def _complaint(code: int, token: bytes, limits: tuple[int, int]) -> str:
    from mach.data.kernels import parse

    n_features, n_classes = limits
    one_class, index = _quoted(token.partition(b",")[0]), _quoted(token.partition(b":")[0])
    return {
        parse.BAD_CLASS: f"class {one_class} is no integer from 0: write k1,k2 and number the classes from 0",
        parse.CLASS_RANGE: f"class {one_class} is outside 0..{n_classes - 1}: raise K = {n_classes} or correct it",
        parse.BAD_FEATURE: f"feature {_quoted(token)} is not of the form index:value with an index from 0: correct it",
        parse.FEATURE_RANGE: f"feature index {index} is outside 0..{n_features - 1}: "
        f"raise D = {n_features} or correct it",
        parse.FEATURE_ORDER: f"feature index {index} does not ascend: sort each row by index and merge equal indices",
        parse.BAD_VALUE: f"feature {_quoted(token)} has no finite float32 value: correct or remove it",
        parse.EXTRA_ROW: f"{_quoted(token)} begins a row beyond the N of the header: correct the header",
    }[code]


def _quoted(token: bytes) -> str:
    text = repr(token.strip().decode("utf-8", "backslashreplace"))
    return text if len(text) <= 60 else text[:57] + "..."
