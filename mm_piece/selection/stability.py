"""How far a mask depends on which examples were drawn: masks of disjoint parts of them, compared.

Two disjoint parts of the examples are two fresh sets. Each gives scores at a sample of entries, and
by the same budgets a mask among them; what the two masks share is what any two fresh sets of as
many examples would share, half of all examples at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mm_piece.importance import Folds
from mm_piece.selection import Contest, Mask, Part, choose

Score = Callable[[Mapping[str, Tensor], int], Tensor]  # means by kind, their count -> scores

_PAIRS = 16  # of disjoint parts for each number of examples
_LEAST = 10  # places among the sampled entries
_PARTS = (8, 4, 2)  # an eighth of the examples, a quarter, a half


def overlaps(folds: Folds, score: Score, rounds: Sequence[Contest], seed: int) -> dict[int, float]:
    """The mean share of a mask that a second one has too, by number of examples (ascending).

    `score` gives the entries of `folds` their scores, `rounds` are the contests among them, see
    `among`. Empty where there are fewer than two folds, or too few places to tell a share.
    """
    random = torch.Generator().manual_seed(seed)
    examples, found = sum(folds.counts), {}
    enough = sum(contest.k for contest in rounds) >= _LEAST
    for size in dict.fromkeys(folds.number // part for part in _PARTS):
        if size and enough:
            pairs = [_pair(folds, score, rounds, size, random) for _ in range(_PAIRS)]
            found[round(examples * size / folds.number)] = sum(pairs) / _PAIRS
    return found


def told(results: Mapping[str, Any], task: str) -> list[tuple[int, float]]:
    """Examples and overlap, ascending, that a store's results tell of a task, if they do."""
    found = results.get("stability", {}).get(task, {})
    plain = {k: v for k, v in found.items() if k.isdecimal() and type(v) in (int, float)}
    return sorted((int(count), share) for count, share in plain.items())


def among(
    folds: Folds, rounds: Sequence[Contest], sizes: Mapping[str, int], chosen: Mapping[str, int]
) -> list[Contest]:
    """The contests among sampled units, at the densities that came out among all of them.

    `sizes` counts all units of each tensor, `chosen` those that were selected.
    """
    found = []
    for contest in rounds:
        share = sum(chosen.get(name, 0) for name in contest.names) / _sum(sizes, contest.names)
        parts = [
            replace(
                part,
                low=int(part.low * _sampled(folds, part.names) / _sum(sizes, part.names)),
                high=_most(part, contest, _sampled(folds, part.names), _sum(sizes, part.names)),
            )
            for part in contest.parts
        ]
        there = sum(part.high for part in parts)
        complete = there == _sum(sizes, contest.names)
        # One place of the one or two units that were drawn would always be the same.
        if there and (complete or share * there >= _LEAST):
            k = min(there, max(1, round(share * there)))
            found.append(replace(contest, parts=tuple(parts), k=k, auto=False))
    return found


def _pair(
    folds: Folds, score: Score, rounds: Sequence[Contest], size: int, random: torch.Generator
) -> float:
    """The overlap of the masks of two disjoint sets of `size` folds."""
    order = torch.randperm(folds.number, generator=random)
    one, other = (_mask(folds, score, rounds, part) for part in order[: 2 * size].split(size))
    shared = sum(int(torch.isin(one[name], other[name]).sum()) for name in one if name in other)
    return shared / sum(len(index) for index in one.values())


def _mask(folds: Folds, score: Score, rounds: Sequence[Contest], part: Tensor) -> Mask:
    """The sampled units that win when only a part of the folds counts."""
    flat = score(*folds.means(torch.bincount(part, minlength=folds.number)))
    units = {
        name: scores.view(-1, folds.widths[name]).sum(1)
        for name, scores in folds.split(flat).items()
    }
    pieces = ((name, 0, scores) for name, scores in units.items())
    return choose(pieces, {name: len(s) for name, s in units.items()}, rounds, squares=False)


def _most(part: Part, contest: Contest, sampled: int, size: int) -> int:
    """The ceiling among sampled units; there is none where a part may have all places."""
    return sampled if part.high >= contest.k else round(part.high * sampled / size)


def _sampled(folds: Folds, names: Sequence[str]) -> int:
    return sum(len(folds.units[name]) for name in names)


def _sum(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(sizes[name] for name in names)
