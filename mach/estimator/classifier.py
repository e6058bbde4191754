"""MACHClassifier: training and prediction by scikit-learn's rules.

It trains an ordinary run in a temporary folder (`mach.estimator.engine`), and answers with the class values that it was
given (`mach.estimator.targets`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import _check_sample_weight as check_sample_weight
from sklearn.utils.validation import check_consistent_length, check_is_fitted, check_random_state

from mach.data.omissions import rows_without
from mach.errors import ConfigError, DataError, OmissionWarning
from mach.estimator.archive import restore, save
from mach.estimator.engine import Engine
from mach.estimator.fitting import fit, go_on
from mach.estimator.frames import frame_of
from mach.estimator.parameters import sections_of
from mach.estimator.rows import Features, Rows, features_of, n_rows_of, name_of
from mach.estimator.targets import Layout, Targets, grown, ids_of
from mach.estimator.texts import texts_of, told_of, untold
from mach.estimator.weights import weighted
from mach.networks.trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mach.config import Effort
    from mach.model.model import MachModel


class NoClassError(DataError, ValueError):
    """A target without a class, which scikit-learn wants to be a ValueError."""


class MACHClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Classifier for thousands to millions of classes: R independent networks over hashed classes.

    Parameters
    ----------
    effort : {"fast", "balanced", "best"}, optional
        Of a fit with more than 1,024 classes; None is "balanced", below 5,000 rows "best". Given arguments stay.
    minutes : float, optional
        Of a fit at most: as much effort, epochs and repetitions are taken as are planned to end in time.
    repetitions : int, optional
        R, independent networks. Here and below None leaves the choice to the shape of the data: with more than 1,024
        classes to `mach.training.recipe`; with fewer, every class has a bucket of its own in one network for dense
        rows, or in two for sparse rows and texts.
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
        Processes that train repetitions, as in joblib: None is 1, -1 all cores. It never changes a bit.
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
    class_weight : dict or "balanced", optional
        Rows of classes of more weight are learned more often; "balanced" gives all classes as much.
    warm_start : bool
        Whether `fit` goes on from the present weights, as `partial_fit` does.
    trunk : class or str, optional
        A `torch.nn.Module` of your own instead of the hidden layers, or its name "package.module:Class"; see
        ``docs/pytorch.md``. With ``n_jobs`` or Ray, other processes must be able to import it.
    class_texts : dict, table or path, optional
        What classes say of themselves, by class value: a name, or a dictionary with some of ``name``, ``alternatives``,
        ``text`` and ``uri``; a table, or a file as of ``data.classes``, has them as columns beside ``id``. A class that
        is in no row joins the classes, unless y is an indicator.
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
    table of text columns.

    y holds a class a row, any hashable value (a tuple is one value), or any number of classes a row (multi-label):
    lists, sets or arrays of classes, or an indicator matrix, dense or sparse. `predict` answers in the same form. As in
    scikit-learn, lists of one length that hold nothing but 0 and 1 are an indicator. None, NaN, NA and empty strings
    are no class; where each row has one class, rows without it are left out with a warning. Classes that are texts lose
    the blanks around them and are brought to Unicode's NFC, so that equal names are one class.

    Probabilities of classes that exclude each other sum to one in a row. ``docs/scikit-learn.md`` says how they are
    calibrated.

    Examples
    --------
    >>> from mach import MACHClassifier
    >>> texts = ["sour green apple", "sweet red apple", "long yellow banana", "ripe yellow banana"] * 5
    >>> fruits = MACHClassifier(random_state=0).fit(texts, ["apple", "apple", "banana", "banana"] * 5)
    >>> [str(fruit) for fruit in fruits.predict(["a green apple", "one banana"])]
    ['apple', 'banana']
    """

    classes_: NDArray[Any]
    _layout: Layout
    _engine: Engine

    def __init__(
        self,
        *,
        effort: Effort | None = None,
        minutes: float | None = None,
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
        class_weight: dict[Any, float] | Literal["balanced"] | None = None,
        warm_start: bool = False,
        trunk: Trunk | None = None,
        class_texts: Any = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.effort = effort
        self.minutes = minutes
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
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.trunk = trunk
        self.class_texts = class_texts
        self.config = config

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on N rows; what was fitted before is dropped, unless ``warm_start``.

        Rows of whole ``sample_weight`` are learned so many times; others are scaled to 2 on average, rounded by chance.

        Raises
        ------
        ValueError, mach.MachError
            When X or y is nothing that the class takes, X holds NaN or either infinity, or their rows differ in number;
            when a parameter or key cannot work.
        """
        if self.warm_start and hasattr(self, "classes_"):
            return self.partial_fit(X, y, sample_weight=sample_weight)
        return self._train(X, y, sample_weight=sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Learn from more rows, beginning with the present weights; classes that were never seen may join.

        The first call, on a classifier that is not fitted, trains as `fit` does, but hashes the terms of texts, so that
        later words count. Every further call makes a third as many passes as `fit` would over its rows and as many kept
        ones (at least 512), at a third of the rate; where classes join, as many passes at the full rate. Only
        ``n_jobs``, ``launcher``, ``device`` and ``verbose`` may have changed.

        Classes keep their ids, new ones follow. The linear classifiers of ``candidates`` are dropped by a further call,
        and so is what was held out to calibrate probabilities on, but for the temperature.

        X and y are as for `fit`, and of the same kind and form as before. ``classes`` are some more to make room for;
        those of y need not be among them.
        """
        if not hasattr(self, "classes_"):
            return self._train(X, y, classes, sample_weight, goes_on=True)
        features, targets, name, weights = self._read(X, y, sample_weight)
        told = told_of(self.class_texts)
        all_classes = grown(self.classes_, targets, classes)
        rows = Rows(features, ids_of(all_classes, targets)[:, : len(all_classes)], name)
        rows = weighted(rows, all_classes, weights, self.class_weight, check_random_state(self.random_state))
        given = sections_of(self.get_params(deep=False))
        self._engine = go_on(self._engine, rows, given, texts=partial(texts_of, all_classes, told), **self._options())
        self.classes_ = all_classes
        return self

    def predict(self, X: Any) -> Any:
        """The class of every row, an array of shape (N,); in multi-label data those of probability 0.5 or more.

        These are an indicator or a list of N arrays, as y was.
        """
        features = features_of(self, X)
        if self._layout.form == "classes":
            return self.classes_[self._engine.topk(features, 1)[0][:, 0]]
        likely_NK = self._engine.likely(features)
        if self._layout.form == "lists":
            ids_N = np.split(likely_NK.indices, likely_NK.indptr[1:-1])[: likely_NK.shape[0]]
            return [self.classes_[ids] for ids in ids_N]
        matrix = likely_NK.astype(self._layout.dtype)
        return matrix if self._layout.is_sparse else matrix.toarray()

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Probabilities of all classes of every row, in the order of `classes_`: float32 of shape (N, K).

        Rows sum to one, but in multi-label data, where each is a probability of its own. A `mach.MachError` is raised
        when they would take more than ``max_proba_bytes``; `predict_topk` never does.
        """
        features = features_of(self, X)
        return self._all(self._engine.probabilities(features), n_rows_of(features), "predict_proba")

    def decision_function(self, X: Any) -> NDArray[np.float32]:
        """Log-probabilities of all classes, not normalised; log-odds in multi-label data, and for two classes.

        As large as of `predict_proba`, and refused as that is: float32 of shape (N, K), or (N,) of two classes that
        exclude each other, above 0 for the second.
        """
        features = features_of(self, X)
        logits_NK = self._all(self._engine.logits(features), n_rows_of(features), "decision_function")
        is_binary = self._layout.form == "classes" and len(self.classes_) == 2
        return logits_NK[:, 1] - logits_NK[:, 0] if is_binary else logits_NK

    def predict_topk(self, X: Any, k: int = 10, *, as_frame: Literal["pandas", "pyarrow"] | None = None) -> Any:
        """The k best classes of every row, best first, and their probabilities; cheap for any number of classes.

        Returns
        -------
        classes, probabilities : arrays of shape (N, k), or as many columns as there are classes
            Or, ``as_frame``, a table of pandas or pyarrow: a row for each pair, with columns ``query``, ``rank``,
            ``class`` and ``probability``. Beyond 1,024 classes probabilities follow each class's own score, and a row's
            do not sum to one. Calibrated ones of a row without a known feature (of text, or sparse) are the classes'
            shares of the training rows.
        """
        if k < 1:
            raise ConfigError(f"k = {k}: ask for at least one class")
        if as_frame not in (None, "pandas", "pyarrow"):
            raise ConfigError(f"as_frame = {as_frame!r} is unknown: choose 'pandas' or 'pyarrow'")
        features = features_of(self, X)
        ids_Nk, probs_Nk = self._engine.topk(features, min(int(k), len(self.classes_)))
        classes_Nk = self.classes_[ids_Nk]
        if as_frame is None:
            return classes_Nk, probs_Nk
        return frame_of(classes_Nk, probs_Nk, as_frame)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of rows, weighted if N weights are given, whose prediction is right: in all classes if in several."""
        features, targets, _, weights = self._read(X, y, sample_weight)
        truth = ids_of(self.classes_, targets)
        if targets.layout.form == "classes":
            right_N = self._engine.topk(features, 1)[0][:, 0] == truth.indices
        else:
            likely = self._engine.likely(features)
            likely.resize(truth.shape)
            right_N = np.diff((likely != truth).indptr) == 0
        return float(np.average(right_N, weights=weights))

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier into a new folder, whole or not at all; `load` reads it.

        The folder is also a run, which `mach.load` and the command line open. Nothing of it is pickled. A
        `mach.MachError` is raised when something is there already, writing fails, or a class is no string, number,
        bytes, None or tuple or frozenset of such.
        """
        check_is_fitted(self)
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, trunk: Trunk | None = None) -> Self:
        """Open what `save` wrote; weights are mapped where they lie, which must stay; ``trunk`` as of `mach.load`.

        A `mach.MachError` is raised when the folder is none of these, or damaged, or has a trunk that was not passed.
        """
        return restore(cls, Path(path), trunk)

    @property
    def model_(self) -> MachModel:
        """The model behind it, with all that `mach.MachModel` does; its ids are positions in `classes_`."""
        check_is_fitted(self)
        return self._engine.model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_label = True
        return tags

    def _read(
        self, X: Any, y: Any, sample_weight: Any = None, *, reset: bool = False
    ) -> tuple[Features, Targets, str, NDArray[Any] | None]:
        """Rows, their classes, name and weights; not to ``reset`` is to refuse others than those that were fitted.

        Where a row has one class, rows without it teach nothing, and are left out with a warning.
        """
        features, targets = features_of(self, X, y, reset=reset), Targets.read(y)
        check_consistent_length(features, targets)
        if sample_weight is not None:
            sample_weight = check_sample_weight(sample_weight, np.empty(len(targets)), ensure_non_negative=True)
        if not reset and targets.layout.form != self._layout.form:
            raise DataError(
                f"y holds {targets.layout.form}, the classifier was fitted to {self._layout.form}: give the same form"
            )
        rows = np.arange(len(targets))
        if targets.layout.form == "classes" and len(targets.values) < len(targets):
            rows = np.flatnonzero(np.diff(targets.indptr))
            if not len(rows):
                raise NoClassError(f"y has {len(targets)} rows and no class in them: there is nothing to learn")
            told = rows_without("class", "y", targets.indptr, len(targets) - len(rows))
            warnings.warn(f"{told}; they are left out", OmissionWarning, stacklevel=4)
            targets = targets.chosen(rows)
            features = [features[n] for n in rows] if isinstance(features, list) else features[rows]
            sample_weight = None if sample_weight is None else sample_weight[rows]
        return features, targets, name_of(rows), sample_weight

    def _train(self, X: Any, y: Any, more: Any = None, sample_weight: Any = None, *, goes_on: bool = False) -> Self:
        """Train a new run, and remember what its ids stand for."""
        features, targets, name, weights = self._read(X, y, sample_weight, reset=True)
        told, classes = told_of(self.class_texts), grown(np.empty(0), targets, more)
        if (unseen := untold(classes, told)) and targets.layout.form != "indicator":
            classes = grown(classes, targets, unseen)
        if not len(classes):
            raise NoClassError(f"y has {len(targets)} rows and no class in them: there is nothing to learn")
        rows = Rows(features, ids_of(classes, targets)[:, : len(classes)], name)
        rows = weighted(rows, classes, weights, self.class_weight, check_random_state(self.random_state))
        given = sections_of(self.get_params(deep=False))
        if goes_on and isinstance(features, list):
            given["text"] = {"hashing": True} | given.get("text", {})
        is_exclusive = targets.layout.form == "classes"
        options = self._options() | {"texts": partial(texts_of, classes, told), "minutes": self.minutes}
        self._engine = fit(rows, given, is_exclusive=is_exclusive, trunk=self.trunk, **options)
        self.classes_, self._layout = classes, targets.layout
        return self

    def _options(self) -> dict[str, Any]:
        """What first and further training both take."""
        from rich.console import Console

        return {
            "seed": int(check_random_state(self.random_state).randint(2**31 - 1)),
            "most_kept": self.kept_rows,
            "device": None if self.device == "cpu" else self.device,
            "console": Console(stderr=True, quiet=not self.verbose),
        }

    def _all(self, blocks: Iterator[NDArray[np.float32]], n_rows: int, method: str) -> NDArray[np.float32]:
        """Values of all classes, unless they take too much memory."""
        n_classes = len(self.classes_)
        n_bytes = 4 * n_rows * n_classes
        if n_bytes > self.max_proba_bytes:
            raise ConfigError(
                f"{method} of {n_rows} rows and {n_classes} classes takes {n_bytes} bytes, max_proba_bytes is "
                f"{self.max_proba_bytes}: ask predict_topk for the best classes, give fewer rows, or raise it"
            )
        return np.concatenate([np.empty((0, n_classes), np.float32), *blocks])
