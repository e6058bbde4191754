"""One version of a run's classes: their names, and which of them a query may return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.class_texts import ClassTexts
from mach.data.names import class_name
from mach.errors import DataError, did_you_mean
from mach.model.ask import Allowed, shown
from mach.model.classes.edits import Edits
from mach.runs.run import Run
from mach.sketch.answers import Subset

MOST_SPELT = 100_000  # classes among which the one that a mistyped name was to be is looked for
Classes = Any  # ids, names, or one of them


@dataclass(frozen=True, eq=False)
class Catalogue:
    """One version of the classes: what they are called, and which are there; the run may name the trained ones."""

    edits: Edits
    run: Run
    _left: WeakKeyDictionary[Subset, Subset | None] = field(default_factory=WeakKeyDictionary)  # None: all of it
    _trained: WeakKeyDictionary[Subset, Subset] = field(default_factory=WeakKeyDictionary)

    @cached_property
    def everything(self) -> Subset | None:
        """All that may be returned; None where that is every class."""
        is_there_K = self.edits.is_there_K
        return None if is_there_K is None else Subset(self.edits.n_classes, mask_K=is_there_K)

    @cached_property
    def _stored(self) -> dict[str, Subset]:
        return {name: Subset(self.edits.n_classes, ids=ids) for name, ids in self.edits.subsets.items()}

    def left_of(self, subset: Subset) -> Subset:
        """What is there of a subset that was prepared before, when other classes may have been."""
        if self.everything is None or subset is self.everything:
            return subset
        if subset not in self._left:
            is_there_K = self.everything.mask_K
            is_whole = is_there_K[subset.ids_C].all()
            self._left[subset] = (  # a value that held its own key would never go
                None if is_whole else Subset(len(is_there_K), ids=subset.ids_C[is_there_K[subset.ids_C]])
            )
        return self._left[subset] or subset

    def trained_of(self, subset: Subset | None) -> Subset | None:
        """The trained classes of a subset; None where all classes are allowed."""
        if subset is None or self.edits.is_trained_only:
            return subset
        if subset not in self._trained:
            K0, ids_C = self.edits.n_trained, subset.ids_C
            self._trained[subset] = Subset(K0, ids=ids_C[: np.searchsorted(ids_C, K0)])
        return self._trained[subset]

    @property
    def has_names(self) -> bool:
        """Whether any class has a name: as trained, added or renamed."""
        return self.run.class_texts is not None or bool(self.edits.names) or bool(self.edits.renamed)

    @cached_property
    def texts(self) -> ClassTexts | None:
        """What all classes say of themselves, as trained, renamed and added; None where none has a name."""
        edits, trained = self.edits, self.run.class_texts
        if not (edits.n_added or edits.renamed):
            return trained
        if trained is None:
            trained = ClassTexts.of([str(k) for k in range(edits.n_trained)])
        if edits.renamed:
            trained = replace(trained, names=[edits.renamed.get(k, name) for k, name in enumerate(trained.names)])
        return trained.and_also(edits.texts or ClassTexts.of(edits.names))

    def name(self, k: int) -> str:
        """The name of a class as people read it; what rows call it, or its number, where it has none."""
        edits, trained = self.edits, self.run.class_texts
        if k >= edits.n_trained:
            return edits.names[k - edits.n_trained]
        return edits.renamed.get(k) or (trained.names[k] if trained is not None else "") or self.key(k)

    def key(self, k: int) -> str:
        """What rows call a class: an id that it has beside its name, or else the name."""
        edits, keys = self.edits, self.run.class_names
        if k >= edits.n_trained:
            return edits.names[k - edits.n_trained]
        if k in edits.renamed and not self._has_id(k):
            return edits.renamed[k]
        return str(k) if keys is None else keys[k]

    def _has_id(self, k: int) -> bool:
        """Whether rows call a trained class otherwise than people did when it was trained."""
        keys, texts = self.run.class_names, self.run.class_texts
        return keys is not None and texts is not None and keys[k] != texts.names[k]

    def uris(self, ids: ArrayLike) -> list[str]:
        """Addresses of classes, "" where there is none."""
        n, trained, added = self.edits.n_trained, self.run.class_texts, self.edits.texts
        places = [(trained, k) if k < n else (added, k - n) for k in np.asarray(ids).tolist()]
        return ["" if texts is None else texts.uris[k] for texts, k in places]

    @cached_property
    def has_uris(self) -> bool:
        """Whether any class has an address."""
        return any(texts is not None and texts.has_uris for texts in (self.run.class_texts, self.edits.texts))

    def names(self, ids: ArrayLike) -> Any:
        """Names of classes, in the shape of ``ids`` as nested lists; padding (-1) gives None."""
        if not self.has_names:
            raise DataError("the run has no class names: set data.classes when training, or use ids")
        K = self.edits.n_classes
        given = np.asarray(ids)
        if given.size and given.dtype.kind not in "iu":
            raise DataError(f"ids {shown(ids)}: need whole numbers below {K}")
        outside = given[(given < -1) | (given >= K)]
        if len(outside):
            raise DataError(f"class {outside[0]} is none of the {K} classes 0..{K - 1}")
        names = np.frompyfunc(lambda k: self.name(int(k)) if k >= 0 else None, 1, 1)(given)
        return names.tolist() if np.ndim(ids) else names

    def id_of(self, name: str) -> int | None:
        """The class of a name, as it is given or as `class_name` writes it; the first of equal ones, None of none."""
        found = (self._spelled(spelling) for spelling in dict.fromkeys((name, class_name(name))))
        return next((k for k in found if k is not None), None)

    def _spelled(self, name: str) -> int | None:
        if name in self._changed_ids:
            return self._changed_ids[name]
        if self.run.class_texts is None:
            k = int(name) if name.isdecimal() and str(int(name)) == name else self.edits.n_trained
        else:
            k = self.run.class_ids.get(name, self.edits.n_trained)
        is_called = k < self.edits.n_trained and (k not in self.edits.renamed or self.key(k) == name)
        is_there = is_called and (self.everything is None or self.everything.mask_K[k])
        return k if is_there else None

    @cached_property
    def _changed_ids(self) -> dict[str, int]:
        gone, edits = set(self.edits.removed.tolist()), self.edits
        changed = sorted({*edits.renamed, *range(edits.n_trained, edits.n_classes)} - gone, reverse=True)
        return {class_name(self.name(k)): k for k in changed} | {self.name(k): k for k in changed}

    def subset(self, allowed: Allowed) -> Subset | None:
        """What `MachModel.topk` takes for ``allowed``, prepared; removed classes are left out."""
        K = self.edits.n_classes
        if allowed is None:
            return self.everything
        if isinstance(allowed, Subset):
            if allowed.n_classes != K:
                raise DataError(
                    f"the subset was prepared for {allowed.n_classes} classes, now there are {K}: prepare it anew"
                )
            return self.left_of(allowed)
        if isinstance(allowed, str):
            allowed = allowed if allowed in self.edits.subsets else class_name(allowed)
            if allowed not in self._stored:
                known = ", ".join(sorted(self._stored)) or "none"
                raise DataError(f"no subset is called {allowed!r}, stored: {known}; a list allows classes by name")
            return self._stored[allowed]
        given = np.asarray(allowed)
        if given.shape == (K,) and given.dtype.kind in "iu" and K > 2 and given.max() <= 1:
            raise DataError(f"allowed holds {K} integers of 0 and 1: give a mask as bool, or ids")
        if given.dtype != bool:
            return Subset(K, ids=self.ids_of(allowed, drop_removed=True))
        if given.shape not in ((K,), (self.edits.n_trained,)):
            raise DataError(f"allowed has shape {given.shape}: need one bool a class, shape ({K},)")
        mask_K = np.pad(given, (0, K - len(given)))
        return Subset(K, mask_K=mask_K if self.everything is None else mask_K & self.everything.mask_K)

    def ids_of(self, classes: Classes, *, drop_removed: bool = False) -> NDArray[np.int64]:
        """Ids of classes given by ids or names; removed ones are refused, or left out."""
        given: Iterable[Any] = [classes] if isinstance(classes, str) or np.ndim(classes) == 0 else classes
        K = self.edits.n_classes
        if isinstance(given, np.ndarray) and given.dtype.kind in "iu":
            ids = given.astype(np.int64).ravel()
        else:
            found = []
            for k in given:
                named = self.id_of(k) if isinstance(k, str) else k
                if named is None:
                    meant = did_you_mean(str(k), self.run.class_names or ()) if K <= MOST_SPELT else ""
                    raise DataError(f"there is no class named {k!r}{meant}; `mach classes list --all RUN` has all")
                if not isinstance(named, int | np.integer) or isinstance(named, bool):
                    raise DataError(f"class {k!r}: need ids or names")
                if not 0 <= named < K:
                    raise DataError(f"class {named} is none of the {K} classes 0..{K - 1}")
                found.append(int(named))
            ids = np.array(found, np.int64)
        outside = ids[(ids < 0) | (ids >= K)]
        if len(outside):
            raise DataError(f"class {outside[0]} is none of the {K} classes 0..{K - 1}")
        is_removed = self.edits.is_removed(ids)
        if is_removed.any() and not drop_removed:
            k = int(ids[is_removed][0])
            raise DataError(f"class {k} ({self.name(k)}) has been removed: undo brings it back")
        return ids[~is_removed]
