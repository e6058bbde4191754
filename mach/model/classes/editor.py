"""The editor of a model's classes: added, removed, renamed and taught by feedback while weights stay as they are.

Every verb makes a new version of the run's classes (`mach.model.classes.versions`), by which the model answers as soon
as the verb returns. Readers of older versions are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.batch import Batch, SparseBatch, concatenated, has_features
from mach.data.class_texts import ClassTexts
from mach.data.missing import is_missing
from mach.data.names import class_name
from mach.errors import ConfigError, DataError, counted
from mach.model.ask import Allowed, Ask, n_best
from mach.model.classes.answerer import Answerer
from mach.model.classes.catalogue import Classes
from mach.model.classes.edits import ASSOCIATE, EXAMPLE, UPVOTE, Edits, Exemplars, hashed_buckets
from mach.model.classes.teaching import abridged, anchored, best_buckets, lifted, loads, warn_of_empty, warn_of_unknown
from mach.model.classes.versions import Current, Step, Versions
from mach.networks.inference import wide_matrix
from mach.runs.ensemble import BucketScores
from mach.runs.scorer import LocalScorer
from mach.sketch.answers import Subset

if TYPE_CHECKING:
    from mach.data.queries import Queries


class ClassEditor:
    """Changes and names of a model's classes; ``model.classes`` is one.

    Attributes
    ----------
    answerer : Answerer
        By the version that holds for this model; another one after every change.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self._ensemble = answerer.ensemble
        self._versions = Versions(answerer.ensemble.run)

    @property
    def edits(self) -> Edits:
        """What was changed since the run was trained."""
        return self.answerer.edits

    @property
    def version(self) -> int:
        """Number of the version: 0 as trained."""
        return self.edits.version

    def add(
        self,
        names: str | Sequence[str],
        examples: Sequence[Any] | None = None,
        texts: Sequence[str | Sequence[str]] | None = None,
        *,
        alternatives: Sequence[Sequence[str]] | None = None,
        uris: Sequence[str] | None = None,
        by: str = "networks",
    ) -> NDArray[np.int64]:
        """Add classes without touching weights; they are found at once.

        Parameters
        ----------
        names : str or sequence of str
            A new name a class. Where trained classes have names and rows are texts, it may be known by that alone.
        examples : sequence, optional
            Of each class its examples: queries of any kind that `MachModel.topk` takes.
        texts : sequence of str, optional
            Of each class a text that describes it, or several; only where the model takes texts. They are examples and,
            with the names, what is known of it by words (`mach.data.class_texts`).
        alternatives : sequence of sequences of str, optional
            Of each class its other names.
        uris : sequence of str, optional
            Of each class its address or identifier elsewhere, "" for none.
        by : {"networks", "hash"}
            Who places a class into buckets. The networks put it, for every hash function, where most of its examples
            and texts have their best bucket, of equal ones where their probability is higher, then where fewer added
            classes are. ``"hash"`` suits a fine-tuning that follows (``mach train --from``).

        Returns
        -------
        int64 array
            Their ids: the next that were never given.

        Raises
        ------
        ConfigError, DataError
            When the model leaves out finished repetitions; when a name is taken, or a class has nothing to be known by.

        Notes
        -----
        Cost: a forward pass of the examples, three decodings of them, and writing all that was changed so far.
        """
        names = [names] if isinstance(names, str) else list(names)
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"names {names!r:.60}: need at least one, all strings")
        if by not in ("networks", "hash"):
            raise ConfigError(f"by {by!r}: choose networks or hash")
        given_K = {"examples": examples, "texts": texts, "alternatives": alternatives, "uris": uris}
        for kind, given in given_K.items():
            if given is not None and (isinstance(given, str) or len(given) != len(names)):
                raise DataError(f"{kind}: need one entry for each of the {len(names)} names")
        said = ClassTexts.given(names, alternatives, texts, uris)
        self._insist_on_all_repetitions()
        named_alone = examples is texts is None and by == "networks" and self.answerer.memory.reads_names
        if named_alone:
            texts = ["\n".join(said.spellings(a) if said else [name]) for a, name in enumerate(names)]
        read = [self._read(given) for given in (examples, texts) if given is not None]
        with self._turn() as current:
            names = self._insist_on_new(names)
            first, A, n_buckets = self.edits.n_classes, len(names), self._ensemble.n_buckets
            exemplars, known_A = Exemplars.none(), np.zeros(A, np.int64)
            if read:
                batch, owners = concatenated([part for part, _ in read]), np.concatenate([whose for _, whose in read])
                is_known = has_features(batch)
                if named_alone and isinstance(batch, SparseBatch):
                    is_known = np.diff(batch.indptr) > 0  # words that only names have count for nothing but in names
                else:
                    warn_of_empty(batch, "examples and texts", [names[a] for a in owners.tolist()])
                known_A = np.bincount(owners[is_known], minlength=A)
                self._tell_unknown(examples, texts)
            if read and not named_alone:
                exemplars = Exemplars.of(batch, first + owners, EXAMPLE)
            if by == "networks" and not known_A.all():
                name = names[int(np.argmin(known_A))]
                raise DataError(
                    f"class {name!r} has no example or text with known features: give one (--example, --text), or "
                    "place it by='hash' (--by hash)"
                )
            hashing = self._ensemble.run.config.hashing
            functions = range(hashing.heads * hashing.repetitions)
            table_FA = hashed_buckets(A, functions, n_buckets, first=first)
            scores = self._scored(batch) if read else None
            if scores and by == "networks":
                mine = self._ensemble.run.functions(self._ensemble.repetitions)
                table_FA[mine] = best_buckets(scores.probs_NRB, owners, A, loads(self.answerer))
            before_FA = self.edits.buckets(functions, n_buckets)  # R may have been raised
            changed = replace(
                self.edits,
                names=(*self.edits.names, *names),
                texts=self.edits.texts_and(said and replace(said, names=names), names),
                table_FA=np.hstack([before_FA, table_FA]),
                counts_A=np.hstack([self.edits.counts_A, 0 * known_A if named_alone else known_A]),
            )
            if scores and len(exemplars):
                changed = lifted(self.answerer, anchored(self.answerer, changed, scores), exemplars, 1, scores)
            self._write(current, changed, "add", abridged(names))
        return np.arange(first, first + A)

    def remove(self, classes: Classes) -> None:
        """Remove classes, by ids or names: they are never returned again; DataError when one is not there."""
        with self._turn() as current:
            ids = np.unique(self.ids_of(classes))
            if not len(ids):
                raise DataError("there is no class to remove: give ids or names")
            what = abridged([self.answerer.catalogue.name(k) for k in ids.tolist()])
            self._write(current, self.edits.without(ids), "remove", what)

    def rename(self, k: int | str, name: str) -> None:
        """Give a class another name; DataError when the class is not there, or the name is taken."""
        with self._turn() as current:
            ids = self.ids_of(k)
            if len(ids) != 1:
                raise DataError(f"{len(ids)} classes to rename: give one")
            renamed = int(ids[0])
            [name] = self._insist_on_new([name])
            what = f"{self.answerer.catalogue.name(renamed)} to {name}"
            self._write(current, self.edits.called(renamed, name), "rename", what)

    def name_subset(self, name: str, classes: Classes | None) -> None:
        """Store classes under a name that ``allowed=`` takes from now on; None forgets it.

        Raises DataError when a class is not there, or the subset to forget is not.
        """
        if not (isinstance(name, str) and name.strip()):
            raise DataError(f"subset {name!r}: need a name")
        with self._turn() as current:
            subsets = dict(self.edits.subsets)
            name = name if name in subsets else class_name(name)
            if classes is not None:
                subsets[name] = np.unique(self.ids_of(classes))
            elif subsets.pop(name, None) is None:
                raise DataError(f"no subset is called {name!r}, stored: {', '.join(sorted(subsets)) or 'none'}")
            self._write(current, replace(self.edits, subsets=subsets), "subset", name)

    def upvote(self, queries: Queries, classes: Classes) -> None:
        """Teach that a query is of a class: it will be the first of that query, and higher for similar ones.

        Queries are as of `MachModel.topk`, with the id or name of a class for each: DataError when one is not there, or
        their numbers differ. Cost: two or three decodings of the queries, and writing all that was changed so far.
        """
        self._teach(queries, lambda: self.ids_of(classes)[:, None], UPVOTE, 1)

    def associate(self, sources: str | Sequence[str], targets: str | Sequence[str], *, k: int = 3) -> None:
        """Teach that a text means another: the best k classes of the target come among the best of the source.

        Sources and targets are pairs of texts. If k is at most 5, all k will be among the best five of the source.
        """
        sources, targets = ([texts] if isinstance(texts, str) else list(texts) for texts in (sources, targets))
        if len(sources) != len(targets):
            raise DataError(f"{len(sources)} sources and {len(targets)} targets: give as many")
        is_known_N = has_features(concatenated(list(self._ensemble.read(targets))))
        if not is_known_N.all():
            raise DataError(f"target {targets[int(np.argmin(is_known_N))]!r:.60} has no known feature: none is meant")

        def meant() -> NDArray[np.int64]:
            return np.concatenate([answer.ids_Nk for answer in self.answerer.answers(targets, k, Ask())])

        self._teach(sources, meant, ASSOCIATE, max(1, 6 - k))

    def undo(self) -> Step:
        """Go back to the version before this one; returns what was undone. Undoing again goes further back.

        Raises ConfigError when the classes are as trained.
        """
        with self._versions.turn() as current:
            edits, step = self._versions.undo(current)
            self.answerer = self.answerer.with_edits(edits)
        return step

    def history(self) -> list[Step]:
        """All changes that were made, undone ones among them."""
        return self._versions.current().steps

    def changes(self, *, everything: bool = False) -> list[dict[str, Any]]:
        """Id, name, state and number of examples of the classes that were changed, or of all.

        The state is ``trained``, ``renamed``, ``added`` or ``removed``; the examples of trained classes are None.
        """
        edits, catalogue = self.edits, self.answerer.catalogue
        changed = {*edits.renamed, *edits.removed.tolist(), *range(edits.n_trained, edits.n_classes)}
        rows = []
        for k in range(edits.n_classes) if everything else sorted(changed):
            is_added = k >= edits.n_trained
            state = "added" if is_added else "renamed" if k in edits.renamed else "trained"
            state = "removed" if edits.is_removed(k) else state
            examples = int(edits.counts_A[k - edits.n_trained]) if is_added else None
            rows.append({"id": k, "name": catalogue.name(k), "state": state, "examples": examples})
        return rows

    def similar(self, classes: Classes, k: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Classes that the networks treat most alike: the cosine of the mean of their buckets' output rows.

        Classes that share buckets resemble each other for that reason alone, a little.

        Returns
        -------
        ids, cosines : int64 and float32 arrays of shape (n, k), or (k,) for one class
            The class itself is left out; -1 and -inf where there are fewer.

        Notes
        -----
        Cost: O(R J B H) once a model; O(R J (B + K)) a class; 4 bytes a class and hash function while it lasts.
        ConfigError when weights are kept in another process.
        """
        k = n_best(k, self.edits.n_classes)
        answers = [self._similar_to(one, k) for one in self.ids_of(classes).tolist()]
        if not answers:
            raise DataError("there is no class to compare with: give ids or names")
        ids_nk, cosines_nk = (np.stack(parts) for parts in zip(*answers, strict=True))
        return (ids_nk[0], cosines_nk[0]) if np.ndim(classes) == 0 else (ids_nk, cosines_nk)

    def subset(self, allowed: Allowed) -> Subset | None:
        """Prepare classes for ``allowed=``: it costs less to give the result to many calls than what it is made of.

        Removed classes are left out. None allows all. DataError when a mask does not fit, a class is not there, or
        there is no such subset.
        """
        return self.answerer.catalogue.subset(allowed)

    def ids_of(self, classes: Classes) -> NDArray[np.int64]:
        """Ids of classes given by ids or names; DataError when one is not there."""
        return self.answerer.catalogue.ids_of(classes)

    def names(self, ids: ArrayLike) -> list[Any]:
        """Names of classes, in the shape of ``ids`` as nested lists; padding (-1) gives None.

        Raises DataError when the model's data had no class names.
        """
        return self.answerer.catalogue.names(ids)

    def _similar_to(self, k: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        edits, memory = self.edits, self.answerer.memory
        trained_RK = self._ensemble.assignment.buckets(np.arange(edits.n_trained))
        buckets_RK = np.concatenate([trained_RK, memory.table_RA.astype(np.int32)], axis=1)
        scores_K = np.zeros(edits.n_classes, np.float32)
        for row_BH, buckets_K in zip(self._output_rows, buckets_RK, strict=True):  # one table of B products a function
            scores_K += (row_BH @ row_BH[buckets_K[k]])[buckets_K]
        scores_K /= len(self._output_rows)
        scores_K[[k, *edits.removed]] = -np.inf
        best = np.argsort(-scores_K, kind="stable")[:n]
        return np.where(np.isneginf(scores_K[best]), -1, best), scores_K[best]

    @cached_property
    def _output_rows(self) -> list[NDArray[np.float32]]:
        """Rows of the output layers brought to length 1, (B, H) for every hash function."""
        if not isinstance(self._ensemble.scorer, LocalScorer):
            raise ConfigError("similar classes are read from the weights: load the model with the launcher local")
        rows: list[NDArray[np.float32]] = []
        for weights in self._ensemble.scorer.weights:
            if "output.weight" not in weights:
                raise ConfigError("similar classes need an output layer: this network has none")
            wide = wide_matrix(weights, "output")
            for rows_BH in wide.reshape(-1, self._ensemble.n_buckets, wide.shape[1]):
                rows.append(rows_BH / np.maximum(np.linalg.norm(rows_BH, axis=1, keepdims=True), 1e-12))
        return rows

    def _read(self, given: Sequence[Any]) -> tuple[Batch, NDArray[np.int64]]:
        """All rows of several sets of queries, and which set each is of."""
        if all(isinstance(queries, Sequence) and all(isinstance(q, str) for q in queries) for queries in given):
            sets = [[texts] if isinstance(texts, str) else list(texts) for texts in given]
            texts = [text for texts in sets for text in texts]
            batches, counts = list(self._ensemble.read(texts)), [len(texts) for texts in sets]
        else:
            read = [list(self._ensemble.read(queries)) for queries in given]
            batches, counts = [batch for parts in read for batch in parts], [sum(map(len, parts)) for parts in read]
        return concatenated(batches), np.repeat(np.arange(len(given)), counts)

    def _tell_unknown(self, *given: Sequence[Any] | None) -> None:
        features = self._ensemble.run.text_features
        if features is not None:
            sets = [[one] if isinstance(one, str) else one for several in given for one in several or ()]
            warn_of_unknown(features, [text for texts in sets for text in texts if isinstance(text, str)])

    def _scored(self, batch: Batch) -> BucketScores:
        scores = self._ensemble.scored(batch)
        if len(scores.columns) < self._ensemble.n_repetitions:
            raise ConfigError("some repetitions do not answer: an edit needs them all: try again")
        return scores

    def _teach(self, queries: Queries, classes: Callable[[], NDArray[np.int64]], kind: int, rank: int) -> None:
        """Lift classes, (N, k) or -1 for none, so that each is among the best ``rank`` of its query."""
        self._insist_on_all_repetitions()
        batch = concatenated(list(self._ensemble.read(queries)))
        with self._turn() as current:
            ids_Nk = classes()
            if len(ids_Nk) != len(batch):
                raise DataError(f"{len(batch)} queries and {len(ids_Nk)} classes: give one class a query")
            rows, places = np.nonzero((ids_Nk >= 0) & has_features(batch)[:, None])
            if not len(rows):
                raise DataError("no query has a known feature: there is nothing to recognise it by")
            warn_of_empty(batch, "queries")
            scores, edits = self._scored(batch).rows(rows), self.edits
            if not edits.n_anchored:
                edits = anchored(self.answerer, edits, scores)
            exemplars = Exemplars.of(scores.batch, ids_Nk[rows, places], kind)
            edits = lifted(self.answerer, edits, exemplars, rank, scores)
            self._write(current, edits, "upvote" if kind == UPVOTE else "associate", counted(len(rows), "pair"))

    def _insist_on_all_repetitions(self) -> None:
        finished, mine = self._ensemble.run.finished(), self._ensemble.repetitions
        if sorted(mine) != finished:
            raise ConfigError(f"an edit needs all finished repetitions {finished}, the model has {mine}")

    def _insist_on_new(self, names: Sequence[str]) -> list[str]:
        """Names as they are spelt, none of which is taken."""
        seen = dict[str, None]()
        for name in (name if is_missing(name) else class_name(name) for name in names):
            if is_missing(name) or "\n" in name:
                raise DataError(f"class name {name!r}: need a line of text")
            taken = self.answerer.catalogue.id_of(name)
            if taken is not None or name in seen:
                where = "it is given twice" if taken is None else f"class {taken} has it"
                raise DataError(f"the class name {name!r} is taken ({where}): choose another, or rename that class")
            seen[name] = None
        return list(seen)

    @contextmanager
    def _turn(self) -> Iterator[Current]:
        """Be the only editor, on the version that holds: what others did meanwhile is taken over first."""
        with self._versions.turn() as current:
            if current.version != self.version:
                self.answerer = self.answerer.with_edits(self._versions.load(current=current))
            yield current

    def _write(self, current: Current, edits: Edits, verb: str, what: str) -> None:
        self.answerer = self.answerer.with_edits(self._versions.write(current, edits, verb, what))
