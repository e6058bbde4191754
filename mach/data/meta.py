"""The content of a store's meta.json: what the store holds, and how large its files must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mach.files.records import Digest

FORMAT: Literal[1] = 1
DTYPES = {
    "feature_indptr": "<i8",
    "feature_indices": "<i4",
    "feature_values": "<f4",
    "features": "<f4",
    "class_indptr": "<i8",
    "class_ids": "<i4",
    "class_name_bytes": "|u1",
    "class_name_offsets": "<i8",
    "class_texts.safetensors": "|u1",  # `mach.data.class_texts`
}
SPARSE = frozenset({"feature_indptr", "feature_indices", "feature_values", "class_indptr", "class_ids"})
DENSE = frozenset({"features", "class_indptr", "class_ids"})
NAMES = frozenset({"class_name_bytes", "class_name_offsets"})
TEXTS = frozenset({"class_texts.safetensors"})
Count = Annotated[int, Field(ge=0, lt=2**48)]
Id = Annotated[int, Field(ge=0, lt=2**31)]  # ids are int32


class OldPart(BaseModel):
    """Rows of a store that an earlier run was trained on, and how it drew those that it held out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    n_rows: Count
    fraction: float = Field(ge=0, lt=1)
    seed: int = Field(ge=0)


class Meta(BaseModel):
    """What meta.json says; further entries are for the record alone."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    format: Literal[1]
    kind: Literal["sparse", "dense"]
    source: str
    key: str
    n_rows: Count
    n_features: Id
    n_classes: Id
    n_rows_without_features: Count
    n_rows_without_classes: Count
    n_unknown_classes: Count
    row_features: Count = 0
    old_parts: list[OldPart] = Field(default=[])
    text_features: Digest | None
    fingerprint: str = Field(pattern="^[0-9a-f]{1,64}$")  # `mach.data.transfer` wants a digest, as it names a folder
    bytes: dict[str, Count]

    @model_validator(mode="after")
    def _check(self) -> Meta:
        names, sizes = self.bytes.keys(), self.sizes()
        needed = SPARSE if self.kind == "sparse" else DENSE
        unknown, missing = names - needed - NAMES - TEXTS, needed - names
        if len(NAMES & names) == 1:
            missing |= NAMES - names
        if unknown:
            raise ValueError(f"it lists an unknown array {min(unknown)!r:.80}")
        if missing:
            raise ValueError(f"it lists no array {min(missing)}")
        for name, size in sizes.items():
            if self.bytes[name] != size:
                raise ValueError(f"{name} has {self.bytes[name]} bytes, its count needs {size}")
        for name in names:
            if self.bytes[name] % int(DTYPES[name][2]):
                raise ValueError(f"{name} has {self.bytes[name]} bytes, no multiple of an entry's")
        if sum(part.n_rows for part in self.old_parts) > self.n_rows:
            raise ValueError(f"old_parts have more than the {self.n_rows} rows")
        return self

    def sizes(self) -> dict[str, int]:
        """Bytes of the arrays that follow from the counts."""
        counted: dict[str, Any] = {
            "feature_indptr": 8 * (self.n_rows + 1),
            "features": 4 * self.n_rows * self.n_features,
            "class_indptr": 8 * (self.n_rows + 1),
            "class_name_offsets": 8 * (self.n_classes + 1),
            "feature_values": self.bytes.get("feature_indices", 0),
        }
        return {name: size for name, size in counted.items() if name in self.bytes}
