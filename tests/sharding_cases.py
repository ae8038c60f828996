"""What several processes find together, run by `torchrun`; in the end the main one says `same`."""

import torch

from mm_piece import sharding
from mm_piece.mask import Budgets, select, select_stream

NAMES = [f"{group}.{n}.weight" for n in range(4) for group in ("vision_tower", "model.layers")]


def selections():
    """Masks of scores that lie apart are the masks of all scores, ties included."""
    random = torch.Generator().manual_seed(5)
    scores = {
        name: torch.randint(0, 9, (40 + 7 * n, 11), generator=random).float()
        for n, name in enumerate(NAMES)
    }
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    own = sharding.own({name: score.numel() for name, score in scores.items()})
    for wanted in (
        {"density": 0.03},
        {"density": 0.9},
        {"density": {"vision": 0.1, "model.layers.3.*": 0.01}},
        {"density": 0.05, "floor": {"vision": 0.06}, "ceiling": {"language": 0.03}},
        {"density": 0.05, "scope": "tensor"},
        {"density": 0.3, "unit": "row"},
        {"density": "auto", "ceiling": 0.5},
    ):
        pieces = ((name, 0, scores[name].flatten()) for name in own)
        apart, whole = (
            select_stream(pieces, shapes, Budgets(**wanted), apart=True),
            select(scores, **wanted),
        )
        assert list(apart) == list(whole), wanted
        assert all(torch.equal(apart[name], whole[name]) for name in whole), wanted


def exchanges():
    """What is told, joined, summed, gathered."""
    me, size = sharding.rank(), sharding.size()
    assert sharding.told(f"from {me}") == "from 0"
    mine = torch.arange(me * 3, dtype=torch.int64)  # the first process has none
    expected = torch.cat([torch.arange(other * 3) for other in range(size)])
    assert torch.equal(sharding.joined(mine), expected)
    assert torch.equal(sharding.summed(torch.full((2, 3), 1.0 + me)), torch.full((2, 3), 6.0))
    places = range(me, 10, size)
    assert sharding.gathered([f"{n}" for n in places], places, 10) == [f"{n}" for n in range(10)]
    names = sharding.own(dict.fromkeys("abcdefgh", 5))
    shares = sharding.gathered([names], [me], size)
    assert sorted(sum(shares, [])) == list("abcdefgh") and all(shares)
    sharding.wait()


if __name__ == "__main__":
    sharding.start()
    exchanges()
    selections()
    if sharding.is_main():
        print("same")
