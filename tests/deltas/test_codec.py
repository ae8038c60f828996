"""Laws of the codec: exact, near the entropy bound, never fooled into more than was promised."""

import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mm_piece.deltas import codec
from mm_piece.errors import DamageError

GAPS = st.one_of(
    st.integers(0, 3),
    st.integers(0, 2**17),
    st.sampled_from([2**8, 2**16, 2**31, 2**32, 2**40]).flatmap(
        lambda edge: st.integers(edge - 3, edge + 3)
    ),
)


@st.composite
def index_rows(draw):
    gaps = np.array(draw(st.lists(GAPS, max_size=60)), np.int64)
    return np.cumsum(gaps + 1) - 1


def uniform(density: float, count: int = 200_000) -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).geometric(density, count)) - 1


@given(index_rows(), st.integers(0, 5))
def test_indices_come_back(indices, slack):
    size = int(indices[-1]) + 1 + slack if indices.size else slack
    decoded = codec.decode_indices(codec.encode_indices(indices), indices.size, size)
    assert decoded.dtype == np.int64
    assert np.array_equal(decoded, indices)


@pytest.mark.parametrize("density", [1e-9, 1e-5, 1e-3, 0.003, 0.02, 0.3, 1.0])
def test_long_rows_of_indices_come_back(density):
    indices = uniform(density)
    decoded = codec.decode_indices(codec.encode_indices(indices), len(indices), 2**62)
    assert np.array_equal(decoded, indices)


def test_borders_between_slices_leave_no_trace(monkeypatch):
    rows = [uniform(density, 1000) for density in (1e-9, 1e-3, 0.3, 1.0)]
    whole = [codec.encode_indices(indices) for indices in rows]
    monkeypatch.setattr(codec, "SLICE", 7)
    assert [codec.encode_indices(indices) for indices in rows] == whole
    with pytest.raises(ValueError, match="sorted"):
        codec.encode_indices(np.array([*range(7), 6]))


@given(st.sampled_from([1, 2, 4, 8]), st.data())
def test_values_come_back(width, data):
    numbers = st.integers(0, 2 ** (8 * width) - 1) | st.integers(0, 3)
    values = np.array(data.draw(st.lists(numbers, max_size=80)), f"<u{width}")
    decoded = codec.decode_values(codec.encode_values(values), values.size, width)
    assert decoded.dtype == values.dtype
    assert np.array_equal(decoded, values)


def test_the_example_of_the_specification():
    row = bytes.fromhex("01 000300ff 0028 0000")
    assert codec.encode_indices(np.array([3, 4, 300])) == row
    assert codec.decode_indices(row, 3, 301).tolist() == [3, 4, 300]


def test_strided_values_come_back():
    values = np.arange(4000, dtype=np.uint32)[::3]
    assert np.array_equal(codec.decode_values(codec.encode_values(values), values.size, 4), values)


@pytest.mark.parametrize("density", [1e-6, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.1])
def test_indices_cost_little_more_than_their_entropy(density):
    p = density
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p / 8
    cost = len(codec.encode_indices(uniform(density))) / 200_000
    assert cost <= 1.02 * entropy
    if density == 1e-3:
        assert cost <= 1.44


def test_clustered_indices_cost_little_more_than_their_entropy():
    rng = np.random.default_rng(1)
    dense = rng.random(400_000) < 0.6
    gaps = np.where(dense, rng.geometric(0.1, 400_000), rng.geometric(0.0005, 400_000))
    _, counts = np.unique(gaps, return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert len(codec.encode_indices(np.cumsum(gaps) - 1)) <= 1.02 * entropy


def test_a_full_mask_costs_next_to_nothing():
    assert len(codec.encode_indices(np.arange(1_000_000))) < 2000


@pytest.mark.parametrize("indices", [[3, 3], [4, 2], [-1], [-5, 2], [0, 1, 1]])
def test_unsorted_indices_are_not_coded(indices):
    with pytest.raises(ValueError, match="sorted, unique"):
        codec.encode_indices(np.array(indices, np.int64))


@given(index_rows().filter(len))
def test_a_size_that_the_last_index_exceeds_is_damage(indices):
    data = codec.encode_indices(indices)
    with pytest.raises(DamageError):
        codec.decode_indices(data, indices.size, int(indices[-1]))


@given(index_rows(), st.sampled_from([-1, 1, 2, 3]))
@example(np.array([65535, 65536, 131072, 131328]), 2)
def test_a_wrong_count_never_gives_unsound_indices(indices, off):
    """The count is no part of the code: the same bytes may be a sound row of another count.

    It stands in a delta's header, and the digest of the file covers it.
    """
    data = codec.encode_indices(indices)
    count = max(0, indices.size + off)
    require_sound_or_damage(data, count, int(indices[-1]) + 1 if count and indices.size else 0)


@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.02])
def test_cut_and_extended_rows_are_damage(density):
    indices = uniform(density, 300)
    data = codec.encode_indices(indices)
    cases = [data[:length] for length in range(len(data))] + [data + b"\0"]
    for case in cases:
        with pytest.raises(DamageError):
            codec.decode_indices(case, 300, 2**40)
    values = codec.encode_values(indices.astype(np.uint32))
    cases = [values[:length] for length in range(len(values))] + [values + b"\0"]
    for case in cases:
        with pytest.raises(DamageError):
            codec.decode_values(case, 300, 4)


@settings(max_examples=400)
@given(st.binary(max_size=60), st.integers(0, 20), st.sampled_from([0, 30, 2**31, 2**62, 2**63]))
def test_foreign_bytes_never_give_unsound_indices(data, count, size):
    require_sound_or_damage(data, count, size)


@pytest.mark.parametrize("density", [1e-9, 1e-3, 0.02])
def test_altered_bytes_never_give_unsound_indices(density):
    indices = uniform(density, 300)
    data = bytearray(codec.encode_indices(indices))
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        altered = data.copy()
        altered[position] ^= int(rng.integers(1, 256))
        require_sound_or_damage(bytes(altered), 300, int(indices[-1]) + 1)


def require_sound_or_damage(data: bytes, count: int, size: int) -> None:
    try:
        indices = codec.decode_indices(data, count, size)
    except DamageError:
        return
    assert len(indices) == count
    assert (np.diff(indices) > 0).all()
    assert not count or (indices[0] >= 0 and indices[-1] < size)


@pytest.mark.parametrize(
    "gaps", [[2**63], [2**64 - 1], [2**61, 2**61, 2**61, 2**61], [2**62], [2**62 - 1] * 3]
)
@pytest.mark.parametrize("size", [2**62, 2**63])
def test_gaps_cannot_wrap_around(gaps, size):
    data = bytes([8]) + codec.encode_values(np.array(gaps, np.uint64))
    with pytest.raises(DamageError):
        codec.decode_indices(data, len(gaps), size)


def test_the_widest_gaps_have_no_escape():
    data = bytes([8]) + codec.encode_values(np.array([2**64 - 1], np.uint64))
    with pytest.raises(DamageError, match="wider"):
        codec.decode_indices(data + 16 * b"\0\1", 1, 2**62)


def test_a_gap_behind_an_escape_cannot_wrap_around():
    data = b"".join(
        codec.encode_values(np.array([symbol], f"<u{width}"))
        for width, symbol in [(1, 255), (2, 65535), (4, 2**32 - 1), (8, 2**64 - 2**33)]
    )
    with pytest.raises(DamageError):
        codec.decode_indices(b"\1" + data, 1, 2**62)


def test_a_bomb_is_not_inflated():
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = bytes([codec.DEFLATE]) + coder.compress(bytes(100_000_000)) + coder.flush()
    tracemalloc.start()
    with pytest.raises(DamageError):
        codec.decode_values(bomb, 1000, 1)
    with pytest.raises(DamageError):
        codec.decode_indices(b"\1" + bomb, 1000, 2**40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(bomb)  # the bomb itself is .1 MB; it would be 100 MB


def test_a_false_promise_costs_no_memory():
    data = codec.encode_values(np.arange(1000, dtype=np.uint16))
    tracemalloc.start()
    with pytest.raises(DamageError):
        codec.decode_values(data, 2**50, 2)
    with pytest.raises(DamageError):
        codec.decode_indices(b"\2" + data, 2**50, 2**55)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
