"""MACHClassifier: training and prediction by scikit-learn's rules; the only module that imports scikit-learn.

It writes rows in memory into a store, trains an ordinary run in a temporary folder (`mach.estimator.fitted`), and gives
answers back as the class values that it was given (`mach.estimator.vocabulary`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError, DataError, StorageError
from mach.estimator.fitted import Fitted
from mach.estimator.fitting import fit, small_choices
from mach.estimator.frames import FrameKind, frame_of, is_table, texts_of, values_of
from mach.estimator.growing import go_on
from mach.estimator.parameters import given_by, refuse_large, spelled
from mach.estimator.rows import Features, Rows, n_rows_of
from mach.estimator.vocabulary import Form, Targets, Vocabulary
from mach.queries import canonical
from mach.recipe import Shape
from mach.storage import Run
from mach.trunk import Trunk, name_of

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        assert_all_finite,
        check_consistent_length,
        check_is_fitted,
        check_random_state,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise ConfigError(
        f"mach.MACHClassifier needs scikit-learn 1.6 or newer ({error}): pip install 'mach[sklearn]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mach.model import MachModel

FILE = "classifier.json"
FORMAT = 1
LATER_SHARE = 1 / 3  # of passes and rate, where training goes on without new classes


@dataclass(frozen=True)
class _Form:
    """In which form y came, and answers go."""

    form: Form
    dtype: Any
    is_sparse: bool = False


class MACHClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Classifier for thousands to millions of classes: R independent networks over hashed classes.

    Parameters
    ----------
    repetitions : int, optional
        R, independent networks. Here and below None leaves the choice to the shape of the data: with more than 1,024
        classes to `mach.recipe`; with fewer, every class has a bucket of its own in one network for dense rows, or in
        two for sparse rows and texts.
    buckets : int, optional
        B, at most as many as classes.
    hidden : int or sequence of int, optional
        Widths of hidden layers; ``()`` is a linear network.
    heads : int, optional
        Hash functions of a network.
    epochs, batch : int, optional
        Passes over the rows, and rows a step.
    rate : float, optional
        Peak learning rate of Adam.
    dropout : float, optional
        On hidden activations.
    candidates : int, optional
        Best classes of a row that linear classifiers order anew (`mach.reranking`, sparse rows and texts); 0: none.
        None is 0 for multi-label data of fewer than 5,000 rows, where no rows calibrate what comes out.
    n_jobs : int, optional
        Processes that train repetitions; None and 1 train in this one, -1 uses all cores. It never changes a bit.
    launcher : {"local", "ray"}
        With "ray", repetitions are trained by workers of a Ray cluster, which must see this machine's temporary folder.
    address : str, optional
        Head of the Ray cluster.
    device : str
        "cpu", "cuda" or "cuda:N".
    random_state : int, RandomState or None
        Of hash functions, weights, row order and dropout; an int makes training repeatable, on a CPU bit for bit.
    verbose : int
        0 is silent; 1 shows progress on standard error.
    max_proba_bytes : int
        `predict_proba` and `decision_function` refuse to make a larger matrix.
    kept_rows : int
        Training rows, drawn at random, at most 64 MiB of them, that are kept and pickled with the classifier, for
        `partial_fit` to learn them again lest it forget. `save` leaves them out.
    trunk : class or str, optional
        A `torch.nn.Module` of your own instead of the hidden layers, or its name "package.module:Class"; see
        ``docs/pytorch.md``. With ``n_jobs`` or Ray, other processes must be able to import it.
    config : dict, optional
        Any other key of `mach.config`, such as ``{"text.words": [1, 2], "network.weights": "int8"}``.

    Attributes
    ----------
    classes_ : array of shape (K,)
        Class values; column and id of a class are its position. Ascending where they can be sorted, else as they first
        appeared; classes that joined by `partial_fit` come last, in the order in which they came.
    n_features_in_ : int
        D, unless X was text.
    feature_names_in_ : array of str
        Where X had string column names.

    Notes
    -----
    X is a dense or sparse matrix of shape (N, D), a numeric table, or texts: a list, array or series of strings, or a
    table of text columns. Features of very different size should be scaled first, as for any network.

    y holds a class a row, any hashable value (a tuple is one value), or any number of classes a row (multi-label):
    lists, sets or arrays of classes, or an indicator matrix, dense or sparse. `predict` answers in the same form. As in
    scikit-learn, lists of one length that hold nothing but 0 and 1 are an indicator.

    Probabilities: with 5,000 rows or more, 2 % of them (500 to 2,000) are held out of training to calibrate on. Where
    classes exclude each other, their temperature is fitted and rows sum to one. In multi-label data each class's own
    probability follows a fitted curve. With fewer rows they are the networks' own.

    Examples
    --------
    >>> from mach import MACHClassifier
    >>> texts = ["sour green apple", "sweet red apple", "long yellow banana", "ripe yellow banana"] * 5
    >>> fruits = MACHClassifier(random_state=0).fit(texts, ["apple", "apple", "banana", "banana"] * 5)
    >>> [str(fruit) for fruit in fruits.predict(["a green apple", "one banana"])]
    ['apple', 'banana']
    """

    classes_: NDArray[Any]
    _form: _Form
    _fitted: Fitted

    def __init__(
        self,
        *,
        repetitions: int | None = None,
        buckets: int | None = None,
        hidden: int | Sequence[int] | None = None,
        heads: int | None = None,
        epochs: int | None = None,
        batch: int | None = None,
        rate: float | None = None,
        dropout: float | None = None,
        candidates: int | None = None,
        n_jobs: int | None = None,
        launcher: str = "local",
        address: str | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        max_proba_bytes: int = 2**30,
        kept_rows: int = 10_000,
        trunk: Trunk | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.repetitions = repetitions
        self.buckets = buckets
        self.hidden = hidden
        self.heads = heads
        self.epochs = epochs
        self.batch = batch
        self.rate = rate
        self.dropout = dropout
        self.candidates = candidates
        self.n_jobs = n_jobs
        self.launcher = launcher
        self.address = address
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.max_proba_bytes = max_proba_bytes
        self.kept_rows = kept_rows
        self.trunk = trunk
        self.config = config

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows; what was fitted before is dropped.

        Parameters
        ----------
        X : matrix, table or texts of N rows
        y : array-like, lists, or indicator matrix of N rows

        Returns
        -------
        self

        Raises
        ------
        ValueError
            When X or y is none of these, holds NaN or infinity, or their rows differ in number.
        mach.MachError
            When a parameter or key cannot work.
        """
        features = self._features(X, y, reset=True)
        targets = self._targets(y)
        check_consistent_length(features, targets)
        vocabulary = Vocabulary.of(targets)
        self._learn(features, targets, vocabulary)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn from more rows, beginning with the present weights; classes that were never seen may join.

        The first call, on a classifier that is not fitted, trains as `fit` does, but hashes the terms of texts, so that
        later words count. Every further call makes a third as many passes as `fit` would over its rows and as many kept
        ones (at least 512), at a third of the rate; where classes join, as many passes at the full rate. Only
        ``n_jobs``, ``launcher``, ``device`` and ``verbose`` may have changed.

        Classes keep their ids, new ones follow. The linear classifiers of ``candidates`` are dropped by a further call,
        and so is what was held out to calibrate probabilities on, but for the temperature.

        Parameters
        ----------
        X, y
            As for `fit`, and of the same kind and form as before.
        classes : array-like, optional
            Classes to make room for; those of y need not be among them.

        Returns
        -------
        self
        """
        if not hasattr(self, "classes_"):
            features, targets = self._features(X, y, reset=True), self._targets(y)
            check_consistent_length(features, targets)
            self._learn(features, targets, Vocabulary.of(targets, classes), partial=True)
            return self
        features, targets = self._features(X, y), self._targets(y)
        check_consistent_length(features, targets)
        self._refuse_other(targets)
        vocabulary = Vocabulary(self.classes_).grown(targets, classes)
        rows = Rows(features, *vocabulary.rows(targets), n_classes=len(vocabulary))
        given, fitted = given_by(self.get_params(deep=False)), self._fitted
        manifest = fitted.model.run.manifest
        shape = Shape(2 * len(rows), manifest.n_features, len(vocabulary), manifest.dense_input)
        small = small_choices(shape, is_exclusive=fitted.is_exclusive, seed=0)["training"]
        stated = small | given.get("training", {})
        share = 1.0 if len(vocabulary) > len(self.classes_) else LATER_SHARE
        self._fitted = go_on(
            fitted,
            rows,
            epochs=max(1, round(share * stated.get("epochs", 12))),
            batch=stated["batch"],
            rate=share * fitted.rate,
            seed=self._seed(),
            most_kept=self.kept_rows,
            launch=given["launch"],
            device=self._device,
            console=self._console(),
        )
        self.classes_ = vocabulary.array
        return self

    def predict(self, X: Any) -> Any:
        """The class of every row; in multi-label data those of probability 0.5 or more.

        Returns
        -------
        array of shape (N,), or in multi-label data, as y was, an indicator or a list of N arrays
        """
        features = self._features(X)
        if self._form.form == "classes":
            ids_N1, _ = self._fitted.topk(features, 1)
            return self.classes_[ids_N1[:, 0]]
        indptr, ids = self._fitted.likely(features)
        if self._form.form == "lists":
            return [self.classes_[part] for part in np.split(ids, indptr[1:-1])] if len(indptr) > 1 else []
        from scipy.sparse import csr_array

        ones = np.ones(len(ids), self._form.dtype)
        matrix = csr_array((ones, ids, indptr), shape=(len(indptr) - 1, len(self.classes_)))
        return matrix if self._form.is_sparse else matrix.toarray()

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Probabilities of all classes of every row, in the order of `classes_`; see the notes of the class.

        Returns
        -------
        float32 array of shape (N, K)
            Rows sum to one, but in multi-label data, where each is a probability of its own.

        Raises
        ------
        mach.MachError
            When it would take more than ``max_proba_bytes``; `predict_topk` never does.
        """
        features = self._features(X)
        refuse_large(n_rows_of(features), len(self.classes_), self.max_proba_bytes, "predict_proba")
        return self._all(self._fitted.probabilities(features))

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """Log-probabilities of all classes, not normalised; log-odds in multi-label data, and of two classes.

        Returns
        -------
        float32 array of shape (N, K), or (N,) of two classes that exclude each other, above 0 for the second

        Raises
        ------
        mach.MachError
            When it would take more than ``max_proba_bytes``.
        """
        features = self._features(X)
        refuse_large(n_rows_of(features), len(self.classes_), self.max_proba_bytes, "decision_function")
        logits_NK = self._all(self._fitted.logits(features))
        is_binary = self._form.form == "classes" and len(self.classes_) == 2
        return logits_NK[:, 1] - logits_NK[:, 0] if is_binary else logits_NK

    def predict_topk(self, X: Any, k: int = 10, *, as_frame: FrameKind | None = None) -> Any:
        """The k best classes of every row, best first, and their probabilities; cheap for any number of classes.

        Parameters
        ----------
        X : matrix, table or texts
        k : int
            At most K are returned.
        as_frame : {"pandas", "pyarrow"}, optional
            Return a table instead.

        Returns
        -------
        classes, probabilities : arrays of shape (N, k), or a table
            The table has a row for each pair, with columns ``query``, ``rank``, ``class`` and ``probability``. Beyond
            1,024 classes probabilities follow each class's own score, and a row's do not sum to one.
        """
        features = self._features(X)
        if k < 1:
            raise ConfigError(f"k = {k}: ask for at least one class")
        ids_Nk, probs_Nk = self._fitted.topk(features, min(int(k), len(self.classes_)))
        classes_Nk = self.classes_[ids_Nk]
        if as_frame is None:
            return classes_Nk, probs_Nk
        n, n_found = ids_Nk.shape
        columns = {
            "query": np.repeat(np.arange(n), n_found),
            "rank": np.tile(np.arange(1, n_found + 1), n),
            "class": classes_Nk.ravel(),
            "probability": probs_Nk.ravel(),
        }
        return frame_of(columns, as_frame)

    def score(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> float:
        """Share of rows whose prediction is right; in multi-label data, right in all classes.

        Parameters
        ----------
        X : matrix, table or texts
        y : as in `fit`
        sample_weight : array of shape (N,), optional

        Returns
        -------
        float
        """
        features, targets = self._features(X), self._targets(y)
        check_consistent_length(features, targets, sample_weight)
        self._refuse_other(targets)
        vocabulary = Vocabulary(self.classes_)
        ids, indptr = vocabulary.ids(targets), targets.indptr
        if targets.form == "classes":
            right_N = self._fitted.topk(features, 1)[0][:, 0] == ids
        else:
            found_indptr, found = self._fitted.likely(features)
            right_N = np.array(
                [
                    set(ids[indptr[n] : indptr[n + 1]]) == set(found[found_indptr[n] : found_indptr[n + 1]])
                    for n in range(len(targets))
                ]
            )
        return float(np.average(right_N, weights=None if sample_weight is None else np.asarray(sample_weight)))

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier into a new folder, whole or not at all; `load` reads it.

        The folder is also a run, which `mach.load` and the command line open. Nothing of it is pickled.

        Raises
        ------
        mach.MachError
            When something is there already, writing fails, or a class is no string, number, bytes, None or tuple or
            frozenset of such.
        """
        check_is_fitted(self)
        parameters = self.get_params(deep=False)
        if isinstance(self.random_state, np.random.RandomState):
            parameters["random_state"] = None
        if self.trunk is not None:
            parameters["trunk"] = name_of(self.trunk)
        description = {
            "format": FORMAT,
            "parameters": parameters,
            "classes": Vocabulary(self.classes_).to_json(),
            "form": {"form": self._form.form, "dtype": self._form.dtype.str, "is_sparse": self._form.is_sparse},
            "temperature": self._fitted.temperature,
            "rate": self._fitted.rate,
            "n_features_in": getattr(self, "n_features_in_", None),
            "feature_names_in": getattr(self, "feature_names_in_", np.array([])).tolist(),
        }
        try:
            content = json.dumps(description, indent=1, default=spelled).encode()
        except TypeError as error:
            raise StorageError(f"a parameter cannot be saved: {error}") from error
        names = [str(value) for value in self.classes_.tolist()]
        self._fitted.copy_to(Path(path), {FILE: content}, names)

    @classmethod
    def load(cls, path: str | Path, *, trunk: Trunk | None = None) -> Self:
        """Open what `save` wrote; weights are mapped where they lie, which must stay.

        Parameters
        ----------
        path : str or Path
        trunk : class or str, optional
            As of `mach.load`: where the classifier has one it must be passed here too, since it is code.

        Raises
        ------
        mach.MachError
            When the folder is none of these, or damaged, or has a trunk that was not passed.
        """
        try:
            description = json.loads((Path(path) / FILE).read_bytes())
            if description["format"] != FORMAT:
                raise StorageError(f"{path} has format {description['format']!r}, this version reads {FORMAT}")
            classifier = cls(**description["parameters"] | {"trunk": trunk})  # never what the file says
            classifier.classes_ = Vocabulary.from_json(description["classes"]).array
            form = description["form"]
            classifier._form = _Form(form["form"], np.dtype(form["dtype"]), form["is_sparse"])
            temperature, rate = float(description["temperature"]), float(description["rate"])
            if description["n_features_in"] is not None:
                classifier.n_features_in_ = int(description["n_features_in"])
            if description["feature_names_in"]:
                classifier.feature_names_in_ = np.array(description["feature_names_in"], object)
        except OSError as error:
            raise StorageError(
                f"{path} is no saved classifier ({FILE}: {error.strerror}): give one made by `save`"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: {FILE} is damaged ({error}): save the classifier anew") from error
        Run.open(path, trunk).agreed_trunk()
        classifier._fitted = Fitted(Path(path), len(classifier.classes_), temperature, rate=rate, trunk=trunk)
        return classifier

    @property
    def model_(self) -> MachModel:
        """The model behind it, with all that `mach.MachModel` does; its ids are positions in `classes_`."""
        check_is_fitted(self)
        return self._fitted.model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_label = True
        return tags

    def _features(self, X: Any, y: Any = "predict", *, reset: bool = False) -> Features:
        """Rows as networks read them; at prediction of the kind that was fitted."""
        if not reset:
            check_is_fitted(self)
        texts = None if X is None else texts_of(X)
        if y is None:
            raise ValueError("MACHClassifier requires y to be passed, but the target y is None")
        if reset and texts is not None:
            for name in ("n_features_in_", "feature_names_in_"):
                self.__dict__.pop(name, None)
        if not reset and (texts is None) != hasattr(self, "n_features_in_"):
            is_text = texts is not None
            raise DataError(
                f"X holds {'texts' if is_text else 'numbers'}, the classifier was fitted to "
                f"{'numbers' if is_text else 'texts'}: give the same kind"
            )
        if texts is not None:
            if not texts and reset:
                raise ValueError("Found array with 0 sample(s): give at least one text")
            return texts
        values = validate_data(self, X, accept_sparse="csr", dtype=np.float32, reset=reset)
        if not hasattr(values, "tocsr"):
            return np.ascontiguousarray(values)
        from scipy.sparse import csr_array

        return canonical(csr_array(values))

    def _targets(self, y: Any) -> Targets:
        """Read y in whatever form, with scikit-learn's own refusals and warnings."""
        if is_table(y) or (isinstance(y, np.ndarray) and y.ndim == 2):
            y = values_of(y)
            if y.shape[1] == 1:
                y = column_or_1d(y, warn=True)
            else:
                check_classification_targets(y)
        targets = Targets.read(y)
        if targets.form == "classes":
            if targets.values.dtype.kind in "fcO":
                assert_all_finite(targets.values, input_name="y")
            if targets.values.dtype.kind != "O":
                check_classification_targets(targets.values)
        return targets

    def _refuse_other(self, targets: Targets) -> None:
        if targets.form != self._form.form:
            raise DataError(
                f"y holds {targets.form}, the classifier was fitted to {self._form.form}: give the same form"
            )

    def _learn(self, features: Features, targets: Targets, vocabulary: Vocabulary, *, partial: bool = False) -> None:
        """Train a new run, and remember what its ids stand for."""
        if not len(vocabulary):
            raise DataError(f"y has {len(targets)} rows and no class in them: there is nothing to learn")
        rows = Rows(features, *vocabulary.rows(targets), n_classes=len(vocabulary))
        given = given_by(self.get_params(deep=False))
        if partial and isinstance(features, list):
            given["text"] = {"hashing": True} | given.get("text", {})
        fitted = fit(
            rows,
            given,
            seed=self._seed(),
            is_exclusive=targets.form == "classes",
            most_kept=self.kept_rows,
            device=self._device,
            console=self._console(),
            trunk=self.trunk,
        )
        self.classes_ = vocabulary.array
        self._form = _Form(targets.form, targets.dtype, targets.is_sparse)
        self._fitted = fitted

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    @property
    def _device(self) -> str:
        return "cuda:0" if self.device == "cuda" else self.device

    def _console(self) -> Any:
        from rich.console import Console

        return Console(stderr=True, quiet=not self.verbose)

    def _all(self, blocks: Iterator[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate([np.empty((0, len(self.classes_)), np.float32), *blocks])
