"""What heads answer: a loss, the best classes; and the checks that their arguments share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from mach.errors import ConfigError, DataError
from mach.nn.targets import in_range

CHUNK_PAIRS = 2**22  # numbers of weights that are multiplied at once


class Output(NamedTuple):
    """What a training step needs: the scalar ``loss`` to minimise, and ``output`` of shape (N,).

    That is the log-probability of each row's target (of a `MACHHead` as ``log-mean``, of a `SampledHead` estimated);
    for several targets their mean, for none 0.
    """

    output: Tensor
    loss: Tensor


class Top(NamedTuple):
    """The k best classes of every row, on the device of the input.

    Attributes
    ----------
    ids : int64 Tensor of shape (N, k)
        Best first, equal scores by ascending id; -1 where there are fewer than k.
    scores : float32 Tensor of shape (N, k)
        Their ``log-mean``, of a `SampledHead` their logits; -inf beside -1.
    exact : bool Tensor of shape (N,)
        Whether these are certainly the best; only a budget can make it False.
    bound : float32 Tensor of shape (N,)
        No other class scores above it.
    """

    ids: Tensor
    scores: Tensor
    exact: Tensor
    bound: Tensor


def best(parts: Iterable[tuple[Tensor, Tensor | slice]], hidden_NH: Tensor, k: int) -> Top:
    """The exact k best of classes whose scores come in parts: (N, C), and the ids of these C, ascending over all parts.

    Raises
    ------
    DataError
        When a score is no finite number.
    """
    N, device = len(hidden_NH), hidden_NH.device
    scores_Nk = torch.full((N, k), -torch.inf, device=device)
    ids_Nk = torch.full((N, k), -1, device=device)
    for scores_NC, ids in parts:
        check_finite(scores_NC)
        some, places = _first_of_equals(scores_NC.float(), min(k, scores_NC.shape[1]))
        found = places + ids.start if isinstance(ids, slice) else ids[places]
        scores, order = torch.cat([scores_Nk, some], 1).sort(
            dim=1, descending=True, stable=True
        )  # earlier ids stay first
        scores_Nk, ids_Nk = scores[:, :k], torch.cat([ids_Nk, found], 1).gather(1, order[:, :k])
    return Top(ids_Nk, scores_Nk, torch.ones(N, dtype=torch.bool, device=device), scores_Nk[:, -1].clone())


def pair_scores(
    hidden_NH: Tensor, weight_KH: Tensor, bias_K: Tensor | None, rows_M: Tensor, classes_M: Tensor
) -> Tensor:
    """Logits of pairs of a row and a class, float32."""
    size = max(1, CHUNK_PAIRS // weight_KH.shape[1])
    pairs = zip(torch.split(rows_M, size), torch.split(classes_M, size), strict=True)
    scores_M = torch.cat([(weight_KH[ks].float() * hidden_NH[ns].float()).sum(1) for ns, ks in pairs])
    scores_M = scores_M if bias_K is None else scores_M + bias_K[classes_M].float()
    check_finite(scores_M)
    return scores_M


def best_of_pairs(rows_M: Tensor, classes_M: Tensor, scores_M: Tensor, n_rows: int, k: int) -> Top:
    """The k best of the pairs of every row, which come in ascending order and hold the k best of all classes."""
    device = scores_M.device
    ids_Nk = torch.full((n_rows, k), -1, device=device)
    scores_Nk = torch.full((n_rows, k), -torch.inf, device=device)
    scores_M, order = scores_M.sort(descending=True, stable=True)
    rows_M, by_row = rows_M[order].sort(stable=True)
    counts_N = rows_M.bincount(minlength=n_rows)
    ranks_M = torch.arange(len(rows_M), device=device) - (counts_N.cumsum(0) - counts_N)[rows_M]
    is_best = ranks_M < k
    at = rows_M[is_best], ranks_M[is_best]
    ids_Nk[at], scores_Nk[at] = classes_M[order][by_row][is_best], scores_M[by_row][is_best]
    return Top(ids_Nk, scores_Nk, torch.ones(n_rows, dtype=torch.bool, device=device), scores_Nk[:, -1].clone())


def _first_of_equals(scores_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row and their places, equal ones by place, which `torch.topk` leaves open."""
    one_more = min(k + 1, scores_NC.shape[1])
    scores, places = scores_NC.topk(one_more, dim=1)
    if one_more > k:
        is_open = scores[:, k] == scores[:, k - 1]
        if bool(is_open.any()):
            sorted_scores, order = scores_NC[is_open].sort(dim=1, descending=True, stable=True)
            scores[is_open], places[is_open] = sorted_scores[:, :one_more], order[:, :one_more]
        scores, places = scores[:, :k], places[:, :k]
    places, order = places.sort(1)
    scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, places.gather(1, by_score)


def check_known(name: str, value: str, known: Any) -> None:
    """Refuse a value that a Literal does not list."""
    if value not in get_args(known):
        raise ConfigError(f"unknown {name} {value!r}: choose one of {', '.join(get_args(known))}")


def check_finite(scores: Tensor) -> None:
    """Refuse scores that give no order."""
    if not bool(scores.isfinite().all()):
        raise DataError("input or weights hold NaN or infinity: no class is better than another")


def rows_of(input: Tensor, in_features: int) -> tuple[Tensor, bool]:
    """Hidden states of shape (N, H), and whether they were one row."""
    if input.ndim not in {1, 2} or input.shape[-1] != in_features:
        raise DataError(f"input has shape {tuple(input.shape)}: need (N, {in_features}), flatten other axes")
    return (input[None], True) if input.ndim == 1 else (input, False)


def checked_classes(classes: Tensor, n_rows: int, n_classes: int, device: torch.device) -> Tensor:
    """Classes of shape (C,) or (N, C) as int64 on a device."""
    classes = torch.as_tensor(classes, device=device)
    if classes.ndim not in {1, 2} or (classes.ndim == 2 and len(classes) != n_rows):
        raise DataError(f"classes have shape {tuple(classes.shape)} for {n_rows} rows: need (C,) or ({n_rows}, C)")
    return in_range(classes, n_classes, "classes")
