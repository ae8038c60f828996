"""What several processes find together, run by `torchrun`; in the end the main one says `same`."""

import torch
from torch import nn

from mm_piece import distributed
from mm_piece.dtypes import view_bits
from mm_piece.importance.rows import width_of
from mm_piece.selection import Budgets, select, select_stream

NAMES = [f"{group}.{n}.weight" for n in range(4) for group in ("vision_tower", "model.layers")]


def selections():
    """Masks of scores that lie apart are the masks of all scores, ties included."""
    random = torch.Generator().manual_seed(5)
    scores = {
        name: torch.randint(0, 9, (40 + 7 * n, 11), generator=random).float()
        for n, name in enumerate(NAMES)
    }
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    for wanted in (
        {"density": 0.03},
        {"density": 0.9},
        {"density": {"vision": 0.1, "model.layers.3.*": 0.01}},
        {"density": 0.05, "floor": {"vision": 0.06}, "ceiling": {"language": 0.03}},
        {"density": 0.05, "scope": "tensor"},
        {"density": 0.3, "unit": "row"},
        {"density": "auto", "ceiling": 0.5},
    ):
        step = 11 if wanted.get("unit") == "row" else 1
        assert step in (1, width_of(shapes[NAMES[0]]))
        shares = {
            name: distributed.assign_entry_range(scores[name].numel(), step) for name in NAMES
        }
        pieces = (
            (name, share.start, scores[name].flatten()[share.start : share.stop])
            for name, share in shares.items()
        )
        apart, whole = (
            select_stream(pieces, shapes, Budgets(**wanted), sharded=True),
            select(scores, **wanted),
        )
        assert list(apart) == list(whole), wanted
        assert all(torch.equal(apart[name], whole[name]) for name in whole), wanted


def exchanges():
    """What is told, joined, summed, gathered."""
    me, size = distributed.rank(), distributed.world_size()
    assert distributed.broadcast(f"from {me}") == "from 0"
    mine = torch.arange(me * 3, dtype=torch.int64)  # the first process has none
    expected = torch.cat([torch.arange(other * 3) for other in range(size)])
    assert torch.equal(distributed.all_gather(mine), expected)
    assert torch.equal(
        distributed.all_reduce_sum(torch.full((2, 3), 1.0 + me)), torch.full((2, 3), 6.0)
    )
    places = range(me, 10, size)
    assert distributed.all_gather_items([f"{n}" for n in places], places, 10) == [
        f"{n}" for n in range(10)
    ]
    assert distributed.any_rank(me == 2) and not distributed.any_rank(False)
    distributed.barrier()


def divisions():
    """Shares and rounds have no holes and nothing twice."""
    me, size = distributed.rank(), distributed.world_size()
    for entries, step in ((0, 1), (1, 1), (5, 1), (7, 3), (30, 5), (100, 1)):
        shares = distributed.all_gather_items(
            [distributed.assign_entry_range(entries, step)], [me], size
        )
        covered = [entry for share in shares for entry in range(share.start, share.stop)]
        assert covered == list(range(entries))
        assert all(
            share.stop - share.start <= share.max_size == shares[0].max_size for share in shares
        )
        assert all(share.start % step == 0 or share.start == entries for share in shares)
    for kinds in ("", "a", "aabba", "abbbbabaa"):
        for level in (False, True):
            found = distributed.all_gather_items(
                [distributed.schedule_items(kinds, level)], [me], size
            )
            own = [item for rounds in found for item, first in rounds if first]
            assert sorted(own) == list(range(len(kinds)))
            if level:
                assert len({len(rounds) for rounds in found}) == 1
                for together in zip(*found, strict=True):
                    assert len({kinds[item] for item, _ in together}) == 1


def shards(threshold):
    """Entries of weights that ZeRO-3 has cut, in and out, bit for bit."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight[1, 2], model[0].weight[6, 4] = float("nan"), -0.0
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    config = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    filled = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    whole = {**dict.fromkeys(filled, "auto"), "zero_optimization": config}
    zero = distributed.zero_config({"deepspeed": whole}, "bfloat16")
    with zero.engine_context(model):
        assert all(map(distributed.is_partitioned, model.parameters()))
        model(torch.ones(2, 5, dtype=torch.bfloat16))
        entries_in_and_out(model, before)


def entries_in_and_out(model, before):
    for name, weight in model.named_parameters():
        expected = before[name].flatten()
        assert distributed.shape_of(weight) == before[name].shape
        everywhere = torch.arange(len(expected))
        for places in (everywhere, everywhere[::3], everywhere[-1:], everywhere[:0]):
            assert torch.equal(
                view_bits(distributed.gather_entries(weight, places)), view_bits(expected[places])
            )
            changed = -expected[places]
            distributed.scatter_entries([(weight, places, changed)])
            assert torch.equal(
                view_bits(distributed.gather_entries(weight, places)), view_bits(changed)
            )
            with distributed.gathered_parameters([weight]):
                assert torch.equal(view_bits(weight.view(-1)[places]), view_bits(changed))
            with distributed.gathered_parameters([weight]):  # what is gathered already sees it too
                distributed.scatter_entries([(weight, places.int(), expected[places])])
                assert torch.equal(view_bits(weight.view(-1)[places]), view_bits(expected[places]))
        with distributed.gathered_parameters([weight]):
            assert torch.equal(view_bits(weight), view_bits(before[name]))
        norm = torch.linalg.vector_norm(before[name].float())
        torch.testing.assert_close(torch.tensor(distributed.norm_of(weight)), norm, equal_nan=True)


if __name__ == "__main__":
    distributed.join_process_group()
    exchanges()
    divisions()
    selections()
    for threshold in (0, 10):
        shards(threshold)
    if distributed.is_main():
        print("same")
