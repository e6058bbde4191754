"""A model that lives: classes are added, removed, renamed and taught by feedback while weights stay as they are.

Every verb makes a new version of the run's classes (`mach.living.versions`), by which this model answers as soon as
the verb returns. Readers of older versions are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.batch import Batch, concatenated, has_features, rows_of
from mach.data.store import Reference
from mach.decoding import Subset
from mach.errors import ConfigError, DataError
from mach.living.edits import ASSOCIATE, EXAMPLE, TEXT, UPVOTE, Edits, Exemplars, hashed_buckets
from mach.living.live import Allowed, Classes
from mach.living.teaching import Teaching, place
from mach.living.versions import Step, Turn, Versions
from mach.networks.inference import wide_matrix

if TYPE_CHECKING:
    from mach.queries import Queries


class Living(Teaching):
    """The verbs that change a model's classes; `MachModel` is one.

    Attributes
    ----------
    edits : Edits
        What was changed since the run was trained.
    version : int
        Of the classes: 0 as trained.
    """

    topk: Callable[..., tuple[NDArray[np.int64], NDArray[np.float32]]]
    score: Callable[..., NDArray[np.float32]]

    def add_classes(
        self,
        names: str | Sequence[str],
        examples: Sequence[Any] | None = None,
        texts: Sequence[str | Sequence[str]] | None = None,
        *,
        by: str = "networks",
        random: float = 0.0,
    ) -> NDArray[np.int64]:
        """Add classes without touching weights; they are found at once.

        Parameters
        ----------
        names : str or sequence of str
            A new name a class.
        examples : sequence, optional
            Of each class its examples: queries of any kind that `topk` takes.
        texts : sequence of str, optional
            Of each class a text that describes it, or several; only where the model takes texts.
        by : {"networks", "hash"}
            Who places a class into buckets. The networks put it, for every hash function, where most of its examples
            and texts have their best bucket, of equal ones where their probability is higher, then where fewer added
            classes are. ``"hash"`` suits a fine-tuning that follows (``mach train --from``).
        random : float
            Share of buckets that are hashed although networks place.

        Returns
        -------
        int64 array
            Their ids: the next that were never given.

        Raises
        ------
        ConfigError
            When the model leaves out finished repetitions of its run.
        DataError
            When a name is taken, or a class has nothing to be known by.

        Notes
        -----
        Cost: a forward pass of the examples, two decodings of them, and writing all that was changed so far.
        """
        names = [names] if isinstance(names, str) else list(names)
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"names {names!r:.60}: need at least one, all strings")
        if by not in ("networks", "hash"):
            raise ConfigError(f"by {by!r}: choose networks or hash")
        if not 0 <= random <= 1:
            raise ConfigError(f"random {random} must be a share between 0 and 1")
        for kind, given in (("examples", examples), ("texts", texts)):
            if given is not None and (isinstance(given, str) or len(given) != len(names)):
                raise DataError(f"{kind}: need one entry for each of the {len(names)} names")
        self._insist_on_all_repetitions()
        kinds = [(EXAMPLE, examples), (TEXT, texts)]
        read = [(kind, *self._read_owned(given)) for kind, given in kinds if given is not None and len(given)]
        with self._turn() as turn:
            edits, A = self._live.edits, len(names)
            self._insist_on_new(names)
            first = edits.n_classes
            shown = [Exemplars.of(batch, first + owners, kind) for kind, batch, owners in read]
            exemplars = shown[0] if shown else None
            for more in shown[1:]:
                assert exemplars is not None
                exemplars = exemplars.and_also(more)
            counts_A = np.zeros(A, np.int64)
            if exemplars is not None:
                counts_A = np.bincount(exemplars.classes_M - first, minlength=A)
            if by == "networks" and not counts_A.all():
                name = names[int(np.argmin(counts_A))]
                raise DataError(
                    f"class {name!r} has no example or text with known features: give one, or place by='hash'"
                )
            functions = list(range(self.run.config.hashing.heads * self.run.config.hashing.repetitions))
            table_FA = hashed_buckets(A, functions, self.assignment.n_buckets, first=first)
            known_FA = edits.buckets(functions, self.assignment.n_buckets)  # R may have been raised
            edits = replace(edits, table_FA=known_FA)
            if exemplars is None:
                changed = edits.extended(names, table_FA, counts_A)
                self._write(turn, changed, "add", _listed(names))
                return np.arange(first, first + A)
            read_batch = concatenated([batch for _, batch, _ in read])
            read_owners = np.concatenate([owners for _, _, owners in read])
            probs_MRB, columns = self._probabilities(read_batch)
            if by == "networks":
                is_random = np.random.default_rng([first, A]).random(table_FA.shape) < random
                placed_RA = place(probs_MRB, read_owners, A, self._loads())
                rows = self.run.functions(self.repetitions)
                table_FA[rows] = np.where(is_random[rows], table_FA[rows], placed_RA)
            anchors_22, n_anchored = self._anchored(edits, read_batch, probs_MRB, columns)
            changed = edits.extended(names, table_FA, counts_A, anchors_22=anchors_22, n_anchored=n_anchored)
            lifted = self._lift(changed, exemplars, 1, (read_batch, probs_MRB, columns))
            self._write(turn, changed.shown(lifted), "add", _listed(names))
        return np.arange(first, first + A)

    def remove_classes(self, classes: Classes) -> None:
        """Remove classes, by ids or names: they are never returned again, and their buckets are free.

        Raises
        ------
        DataError
            When a class is not there.
        """
        with self._turn() as turn:
            ids = np.unique(self.ids_of(classes))
            if not len(ids):
                raise DataError("there is no class to remove: give ids or names")
            self._write(
                turn, self._live.edits.without(ids), "remove", _listed([self._live.name(k) for k in ids.tolist()])
            )

    def rename_class(self, k: int | str, name: str) -> None:
        """Give a class another name.

        Raises
        ------
        DataError
            When the class is not there, or the name is taken.
        """
        with self._turn() as turn:
            found = int(self.ids_of(k)[0])
            old = self._live.name(found)
            self._insist_on_new([name])
            self._write(turn, self._live.edits.called(found, name), "rename", f"{old} to {name}")

    def name_subset(self, name: str, classes: Classes | None) -> None:
        """Store classes under a name that ``allowed=`` takes from now on; None forgets it.

        Raises
        ------
        DataError
            When a class is not there, or the subset to forget is not.
        """
        if not (isinstance(name, str) and name.strip()):
            raise DataError(f"subset {name!r}: need a name")
        with self._turn() as turn:
            subsets = dict(self._live.edits.subsets)
            if classes is None:
                if name not in subsets:
                    raise DataError(f"there is no subset {name!r}: there are {sorted(subsets)}")
                del subsets[name]
            else:
                subsets[name] = np.unique(self.ids_of(classes))
            self._write(turn, replace(self._live.edits, subsets=subsets), "subset", name)

    def upvote(self, queries: Queries, classes: Classes) -> None:
        """Teach that a query is of a class: it will be the first of that query, and higher for similar ones.

        Parameters
        ----------
        queries : as of `topk`
        classes : ids or names, one a query

        Raises
        ------
        DataError
            When a class is not there, or their numbers differ.

        Notes
        -----
        Cost: two decodings of the queries, and writing all that was changed so far.
        """
        self._teach(queries, lambda: self.ids_of(classes)[:, None], UPVOTE, 1)

    def associate(self, sources: str | Sequence[str], targets: str | Sequence[str], *, k: int = 3) -> None:
        """Teach that a text means another: the best k classes of the target come among the best of the source.

        Parameters
        ----------
        sources, targets : str or sequences of str
            Pairs.
        k : int
            Classes of each target. All of them will be among the best five of the source if k is at most 5.
        """
        sources, targets = ([texts] if isinstance(texts, str) else list(texts) for texts in (sources, targets))
        if len(sources) != len(targets):
            raise DataError(f"{len(sources)} sources and {len(targets)} targets: give as many")

        for batch in self.ensemble.read(targets, 2**20):
            if not has_features(batch).all():
                target = targets[int(np.argmin(has_features(batch)))]
                raise DataError(f"target {target!r:.60} has no known feature: no class is known to be meant")

        self._teach(sources, lambda: self.topk(targets, k)[0], ASSOCIATE, max(1, 6 - k))

    def undo(self) -> Step:
        """Go back to the version before this one; returns what was undone. Undoing again goes further back.

        Raises
        ------
        ConfigError
            When the classes are as trained.
        """
        with Versions(self.run).turn() as turn:
            edits, step = turn.undo()
            self._use(edits)
        return step

    def history(self) -> list[Step]:
        """All changes that were made, undone ones among them."""
        return Versions(self.run).current().steps

    def similar_classes(self, classes: Classes, k: int = 10) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Classes that the networks treat most alike: the cosine of the mean of their buckets' output rows.

        Parameters
        ----------
        classes : id or name, or several
        k : int
            Classes that share buckets resemble each other for that reason alone, a little.

        Returns
        -------
        ids, cosines : int64 and float32 arrays of shape (n, k), or (k,) for one class
            The class itself is left out.

        Raises
        ------
        ConfigError
            When weights are kept in another process.

        Notes
        -----
        Cost: O(R J B H) once a model; O(R J (B + K)) a class; 4 bytes a class and hash function while it lasts.
        """
        ids = self.ids_of(classes)
        rows = self._output_rows
        everything = np.arange(self.n_classes)
        buckets_RK = self._buckets(everything)
        # cosines of all pairs of vectors (sum over functions of unit output rows): one table of B products a function
        found = []
        for k_ in ids.tolist():
            scores_K = np.zeros(self.n_classes, np.float32)
            for row_BH, buckets_K in zip(rows, buckets_RK, strict=True):
                scores_K += (row_BH @ row_BH[buckets_K[k_]])[buckets_K]
            scores_K /= len(rows)
            is_there_K = self.edits.is_there_K
            if is_there_K is not None:
                scores_K[~is_there_K] = -np.inf
            scores_K[k_] = -np.inf
            best = np.argsort(-scores_K, kind="stable")[:k]
            found.append((np.where(np.isneginf(scores_K[best]), -1, best), scores_K[best]))
        ids_nk, scores_nk = (np.stack(parts) for parts in zip(*found, strict=True))
        return (ids_nk[0], scores_nk[0]) if np.ndim(classes) == 0 else (ids_nk, scores_nk)

    @property
    def accuracy_curve(self) -> list[dict[str, Any]] | None:
        """Accuracy for the first 1, 2, ... repetitions, as ``mach evaluate`` last measured it; None if it never did."""
        from mach.accuracy import AccuracyCurve

        found = AccuracyCurve.load(self.run)
        return None if found is None else found.rows

    def subset(self, allowed: Allowed) -> Subset | None:
        """Prepare classes for ``allowed=``: it costs less to give the result to many calls than what it is made of.

        Removed classes are left out. None allows all.

        Raises
        ------
        DataError
            When a mask does not fit, a class is not there, or there is no such subset.
        """
        return self._live.subset(allowed)

    def ids_of(self, classes: Classes) -> NDArray[np.int64]:
        """Ids of classes given by ids or names.

        Raises
        ------
        DataError
            When one is not there.
        """
        return self._live.ids_of(classes)

    def names(self, ids: ArrayLike) -> list[Any]:
        """Names of classes, in the shape of ``ids`` as nested lists; padding (-1) gives None.

        Raises
        ------
        DataError
            When the model's data had no class names.
        """
        live, K = self._live, self.n_classes
        if not live.has_names:
            raise DataError(f"{self.run.path} has no class names: set data.class_names when training, or use ids")
        outside = [int(k) for k in np.ravel(ids) if not -1 <= k < K]
        if outside:
            raise DataError(f"class {outside[0]} is none of the {K} classes 0..{K - 1}")
        nested: list[Any] = _nested(np.asarray(ids), lambda k: live.name(k) if k >= 0 else None)
        return nested

    def name_function(self) -> Callable[[ArrayLike], list[Any]] | None:
        """`names`, or None where the model has none."""
        return self.names if self._live.has_names else None

    def reference(self) -> Reference:
        """What other rows must agree with to be this model's queries, with added and renamed classes."""
        return Versions(self.run).reference(self._live.edits)

    def class_counts_K(self) -> NDArray[np.int64]:
        """Training rows of every trained class, and examples of every added one."""
        return np.concatenate([self.run.class_counts_K(), self._live.edits.counts_A])

    def _read_owned(self, given: Sequence[Any]) -> tuple[Batch, NDArray[np.int64]]:
        """All rows of several sets of queries, and which set each is of."""
        if all(isinstance(queries, Sequence) and all(isinstance(q, str) for q in queries) for queries in given):
            flat = [text for texts in given for text in ([texts] if isinstance(texts, str) else texts)]
            counts = [1 if isinstance(texts, str) else len(texts) for texts in given]
            batch = concatenated(list(self.ensemble.read(flat, max(len(flat), 1))))
            return batch, np.repeat(np.arange(len(given)), counts)
        if all(hasattr(queries, "tocsr") for queries in given):
            from scipy.sparse import vstack

            stacked = vstack([queries.tocsr() for queries in given], format="csr")
            counts = [queries.shape[0] for queries in given]
            batch = concatenated(list(self.ensemble.read(stacked, max(stacked.shape[0], 1))))
            return batch, np.repeat(np.arange(len(given)), counts)
        batches = [concatenated(list(self.ensemble.read(queries, 2**20))) for queries in given]
        return concatenated(batches), np.repeat(np.arange(len(given)), [len(batch) for batch in batches])

    def _probabilities(self, batch: Batch) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        probs_NRB, columns = self.ensemble.scorer.probabilities(batch)
        if len(columns) < len(self.repetitions):
            raise ConfigError("some repetitions do not answer: an edit needs them all: try again")
        return probs_NRB, columns

    def _buckets(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Buckets of classes, the added ones last, by the model's hash functions."""
        K0 = self.edits.n_trained
        added = self._live.recall.table_RA[:, ids[ids >= K0] - K0]
        return np.concatenate([self.assignment.buckets(ids[ids < K0]), added.astype(np.int32)], axis=1)

    @cached_property
    def _output_rows(self) -> list[NDArray[np.float32]]:
        weights_of = getattr(self.ensemble.scorer, "weights", None)
        if weights_of is None:
            raise ConfigError("similar_classes reads the weights: load the model with the launcher local")
        found: list[NDArray[np.float32]] = []
        for weights in weights_of:
            if "output.weight" not in weights:
                raise ConfigError("similar_classes needs an output layer: this network has none")
            wide = wide_matrix(weights, "output")
            for rows_BH in wide.reshape(-1, self.assignment.n_buckets, wide.shape[1]):
                found.append(rows_BH / np.maximum(np.linalg.norm(rows_BH, axis=1, keepdims=True), 1e-12))
        return found

    def _teach(self, queries: Queries, classes: Callable[[], NDArray[np.int64]], kind: int, rank: int) -> None:
        """Lift classes, (N, k) or -1 for none, so that each is among the best ``rank`` of its query."""
        self._insist_on_all_repetitions()
        batch = concatenated(list(self.ensemble.read(queries, 2**20)))
        with self._turn() as turn:
            ids_Nk = classes()
            if len(ids_Nk) != len(batch):
                raise DataError(f"{len(batch)} queries and {len(ids_Nk)} classes: give one class a query")
            rows, places = np.nonzero((ids_Nk >= 0) & has_features(batch)[:, None])
            if not len(rows):
                raise DataError("no query has a known feature: there is nothing to recognise it by")
            probs_NRB, columns = self._probabilities(batch)
            batch, ids, probs_NRB = rows_of(batch, rows), ids_Nk[rows, places], probs_NRB[rows]
            edits = self._live.edits
            if not edits.n_anchored:
                anchors_22, n_anchored = self._anchored(edits, batch, probs_NRB, columns)
                edits = replace(edits, anchors_22=anchors_22, n_anchored=n_anchored)
            lifted = self._lift(edits, Exemplars.of(batch, ids, kind), rank, (batch, probs_NRB, columns))
            verb = "upvote" if kind == UPVOTE else "associate"
            self._write(turn, edits.shown(lifted), verb, f"{len(ids)} pairs")

    def _insist_on_all_repetitions(self) -> None:
        finished = self.run.finished()
        if sorted(self.repetitions) != finished:
            raise ConfigError(f"an edit needs all finished repetitions {finished}, the model has {self.repetitions}")

    def _insist_on_new(self, names: Sequence[str]) -> None:
        seen = set[str]()
        for name in names:
            if not name or "\n" in name:
                raise DataError(f"class name {name!r}: need a line of text")
            taken = self._live.id_of(name)
            if taken is not None or name in seen:
                where = "it is given twice" if taken is None else f"class {taken} has it"
                raise DataError(f"the class name {name!r} is taken ({where}): choose another, or rename that class")
            seen.add(name)

    @contextmanager
    def _turn(self) -> Iterator[Turn]:
        """Be the only editor, on the version that holds: what others did meanwhile is taken over first."""
        with Versions(self.run).turn() as turn:
            if turn.current.version != self._live.edits.version:
                self._use(turn.latest())
            yield turn

    def _write(self, turn: Turn, edits: Edits, verb: str, what: str) -> None:
        self._use(turn.write(edits, verb, what))

    def _use(self, edits: Edits) -> None:
        self._live = self._prepared(edits)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{len(names)} classes: {shown}, ..."


def _nested(ids: NDArray[Any], name: Any) -> Any:
    return name(int(ids)) if ids.ndim == 0 else [_nested(part, name) for part in ids]
