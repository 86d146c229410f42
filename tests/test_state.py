"""LossState against cross_entropy on whole rows, over shards, batches, orders and options."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import struct
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
from cases import oracle

import xce

RNG = np.random.default_rng(0)
N, C = 23, 60
LOGITS = RNG.normal(0, 4, (N, C))
LABELS = RNG.integers(0, C, N)
LABELS[5] = -100
WEIGHT = RNG.random(C) + 0.5
SAMPLE_WEIGHT = RNG.random(N) + 0.5
SHARDS = ((0, 17), (17, 18), (18, 49), (49, 60))
OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"weight": WEIGHT},
    {"weight": WEIGHT, "label_smoothing": 0.3},
    {"ignore_index": int(LABELS[0])},
)


def sharded(logits, labels, order=(0, 1, 2, 3), sample_weight=None, **options):
    state = xce.LossState(C, keep_rows=True, **options)
    for i in order:
        start, stop = SHARDS[i]
        state.update(logits[:, start:stop], labels, start, sample_weight=sample_weight)
    return state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sample_weight", [None, SAMPLE_WEIGHT])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shards_agree_with_whole_rows(options, sample_weight, dtype, reduction):
    labels = np.where(LABELS == -100, options.get("ignore_index", -100), LABELS)
    logits = LOGITS.astype(dtype)
    expected = oracle(
        xce.cross_entropy,
        logits.astype(np.float64),
        labels,
        sample_weight=sample_weight,
        reduction=reduction,
        **options,
    )
    found = sharded(logits, labels, sample_weight=sample_weight, **options).result(reduction)
    np.testing.assert_allclose(found, expected, rtol=1e-13 if dtype == np.float64 else 2e-6)


def test_the_order_of_arrival_does_not_change_a_bit():
    results = {
        sharded(LOGITS, LABELS, order, label_smoothing=0.1, weight=WEIGHT).result()
        for order in itertools.permutations(range(4))
    }
    assert len(results) == 1


def test_a_grid_of_batches_and_shards_merges_in_any_order():
    cells = [(rows, shard) for rows in ((0, 9), (9, 10), (10, N)) for shard in SHARDS]

    def cell(rows, shard):
        state = xce.LossState(C, keep_rows=True)
        part = slice(*rows)
        return state.update(LOGITS[part, slice(*shard)], LABELS[part], shard[0], row_offset=rows[0])

    results = set()
    for seed in range(10):
        states = [pickle.loads(pickle.dumps(cell(*c))) for c in cells]
        rng = np.random.default_rng(seed)
        while len(states) > 1:
            i, j = rng.choice(len(states), 2, replace=False)
            states[i].merge(states[j])
            del states[j]
        results.add(states[0].result())
        np.testing.assert_allclose(
            states[0].result("none"), oracle(xce.cross_entropy, LOGITS, LABELS, reduction="none"), rtol=1e-13
        )
    assert len(results) == 1


def test_whole_rows_stream_in_batches():
    state = xce.LossState()
    for start in range(0, N, 4):
        state.update(LOGITS[start : start + 4], LABELS[start : start + 4])
    assert state.result() == pytest.approx(oracle(xce.cross_entropy, LOGITS, LABELS), rel=1e-14)


def test_edges():
    x = np.array([[-np.inf, -np.inf, 1.0, 0.0], [0.0, -np.inf, -np.inf, -np.inf], [0.0, np.nan, 1.0, 2.0],
                  [-np.inf] * 4, [0.0, 0.0, np.inf, 0.0], [50.0, 0.0, 0.0, 0.0]])  # fmt: skip
    y = np.array([2, 3, 0, 1, 0, 0])
    state = xce.LossState(4, keep_rows=True)
    state.update(x[:, :2], y).update(x[:, 2:], y, 2)
    expected = oracle(xce.cross_entropy, x, y, reduction="none")
    np.testing.assert_allclose(state.result("none"), expected, rtol=1e-14)
    assert state.result("none")[-1] == pytest.approx(3 * math.exp(-50), rel=1e-14)


def test_nothing_came():
    assert math.isnan(xce.LossState().result())
    assert xce.LossState(5).result("sum") == 0


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda: xce.LossState(0), ValueError, "n_classes=0"),
        (lambda: xce.LossState("7"), TypeError, "n_classes is a str"),
        (lambda: xce.LossState(7, label_smoothing=2.0), ValueError, "label_smoothing=2.0"),
        (lambda: xce.LossState(7, weight=np.ones(6)), ValueError, r"weight has shape \(6,\)"),
        (
            lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS).result(),
            ValueError,
            r"classes 9..59 of rows 0..22",
        ),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS, 55), ValueError, r"classes 55..63"),
        (lambda: xce.LossState().update(LOGITS, LABELS, 3), ValueError, r"give LossState\(n_classes\)"),
        (lambda: sharded(LOGITS, LABELS, [0, 0]), ValueError, "classes 0..16 of rows 0..22 came twice"),
        (
            lambda: sharded(LOGITS, LABELS, [0]).merge(sharded(LOGITS, LABELS[::-1], [1])),
            ValueError,
            "target of row 0 differs",
        ),
        (
            lambda: xce.LossState(4).merge(xce.LossState(5)),
            ValueError,
            "n_classes differs: 4 here, 5 in other",
        ),
        (lambda: xce.LossState(4).merge(3), TypeError, "other is an int"),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS + C), xce.LabelError, r"target\[0\]"),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS + 0.5), xce.LabelError, r"target\[0\] = .*\.5 "),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS * np.nan), xce.LabelError, r"target\[0\] = nan "),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS > 3), TypeError, "target has dtype bool"),
        (lambda: xce.LossState(C).update(LOGITS[:, :0], LABELS), ValueError, r"logits has shape \(23, 0\)"),
        (lambda: xce.LossState(C).update(np.float64(3), 0), ValueError, r"logits has shape \(\)"),
        (lambda: xce.LossState(10**30), ValueError, "n_classes=10+ "),
        (lambda: xce.LossState(ignore_index=None), TypeError, "ignore_index is None"),
        (lambda: xce.LossState(ignore_index=2**63), ValueError, "ignore_index=9223372036854775808"),
        (lambda: xce.LossState(4, weight=[1, 2, 3, 4]), TypeError, "weight is a list"),
        (lambda: xce.LossState(keep_rows=1), TypeError, "keep_rows is an int"),
        (lambda: xce.LossState(C).update(LOGITS, LABELS, -1), ValueError, "class_offset=-1"),
        (lambda: xce.LossState(C).update(LOGITS, LABELS, row_offset=-1), ValueError, "row_offset=-1"),
        (lambda: xce.LossState(C).update(LOGITS, LABELS, row_offset="0"), TypeError, "row_offset is a str"),
        (
            lambda: xce.LossState(C).update(LOGITS, LABELS, sample_weight=[1.0]),
            TypeError,
            "sample_weight is a list",
        ),
        (
            lambda: xce.LossState(C).update(LOGITS, LABELS, sample_weight=np.full(N, np.inf)),
            ValueError,
            r"sample_weight\[0\] = inf is not allowed: expected finite entries",
        ),
        (
            lambda: sharded(LOGITS, LABELS, [0]).merge(sharded(LOGITS, LABELS, [1], sample_weight=SAMPLE_WEIGHT)),
            ValueError,
            "sample_weight of row 0 differs",
        ),
        (
            lambda: xce.LossState(3, weight=np.ones(3)).merge(xce.LossState(3)),
            ValueError,
            "weight differs between the two states",
        ),
        (lambda: xce.LossState().update(LOGITS, LOGITS), TypeError, "class indices"),
        (lambda: xce.LossState().result("none"), ValueError, "keep_rows=True"),
        (lambda: xce.LossState().result("avg"), ValueError, "'avg' is unknown"),
    ],
)
def test_errors(act, error, text):
    with pytest.raises(error, match=text):
        act()


def test_an_error_changes_nothing():
    state = xce.LossState(C).update(LOGITS[:, :17], LABELS)
    before = contents(state)
    with pytest.raises(ValueError, match="came twice"):
        state.update(LOGITS[:, :17], LABELS)
    with pytest.raises(ValueError, match="expected"):
        state.update(LOGITS[:3, 17:], LABELS, 17)
    assert contents(state) == before


def test_a_shard_of_infinities_with_smoothing():
    x, y = np.array([[-np.inf, -np.inf, 0.0, 1.0]]), np.array([3])
    state = xce.LossState(4, label_smoothing=0.1)
    assert state.update(x[:, :2], y).update(x[:, 2:], y, 2).result() == np.inf


def test_sums_beyond_float64():
    state = xce.LossState()
    for _ in range(2):
        state.update(np.array([[-1.7e308, 0.0]]), np.array([0]))
    assert state.result("sum") == np.inf
    assert state.result() == 1.7e308


def test_a_refused_merge_changes_nothing():
    def half(start, stop):
        return xce.LossState(6, keep_rows=True).update(x[:, start:stop], y, start, row_offset=10)

    x, y = np.zeros((2, 6)), np.array([0, 5])
    left, right = half(0, 3), half(3, 6).update(x, y, row_offset=0)
    left.update(x, y, row_offset=0)
    before = contents(left)
    with pytest.raises(ValueError, match=r"classes 0\.\.5 of rows 0\.\.1 came twice"):
        left.merge(right)
    assert contents(left) == before


def test_a_state_shares_nothing():
    weight, x, y = np.ones(3), np.zeros((1, 3)), np.array([1])
    state = xce.LossState(3, weight=weight)
    weight[:] = 100
    copied = copy.copy(state)
    copied.update(x, y)
    assert math.isnan(state.result())
    assert state.update(x, y).result("sum") == pytest.approx(math.log(3))


def test_labels_in_foreign_byte_order():
    assert sharded(LOGITS, LABELS.astype(">i2")).result() == sharded(LOGITS, LABELS).result()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_shard_of_infinities_and_nan(dtype):
    """Rows of -inf add nothing to those of other shards, a NaN among them everything."""
    x = np.array([[-np.inf, -np.inf, 1, 2], [-np.inf, np.nan, 1, 2], [-np.inf, 0, -np.inf, -np.inf]], dtype)
    y = np.array([2, 2, 1])
    state = xce.LossState(4, keep_rows=True).update(x[:, :2], y).update(x[:, 2:], y, 2)
    expected = oracle(xce.cross_entropy, x.astype(np.float64), y, reduction="none")
    np.testing.assert_allclose(state.result("none"), expected, rtol=1e-6)


def test_weights_that_float32_does_not_hold():
    x, y, w = np.array([[0, 1, 2, -1]] * 3, np.float32), np.array([0, 1, 3]), np.array([1e-40, 1.0, 1.0, 2.0])
    for options in ({}, {"label_smoothing": 0.1}):
        state = xce.LossState(4, weight=w, **options).update(x[:, :2], y).update(x[:, 2:], y, 2)
        expected = oracle(xce.cross_entropy, x.astype(np.float64), y, weight=w, **options)
        np.testing.assert_allclose(state.result(), expected, rtol=1e-6)


def test_arrays_of_other_libraries():
    """Logits stay where they are; one of a kind that has no kernels becomes one of NumPy."""
    torch, strict = pytest.importorskip("torch"), pytest.importorskip("array_api_strict")
    x, w, s = LOGITS.astype(np.float32), WEIGHT.astype(np.float32), SAMPLE_WEIGHT.astype(np.float32)
    expected = sharded(x, LABELS, sample_weight=s, weight=w).result()
    for convert in (torch.from_numpy, strict.asarray):
        found = sharded(convert(x), convert(LABELS), sample_weight=convert(s), weight=convert(w)).result()
        assert found == expected
    narrow = [torch.from_numpy(a).to(torch.bfloat16) for a in (x, s, w)]
    wide = [a.float().numpy() for a in narrow]
    found = sharded(narrow[0], LABELS, sample_weight=narrow[1], weight=narrow[2]).result()
    np.testing.assert_allclose(found, sharded(wide[0], LABELS, sample_weight=wide[1], weight=wide[2]).result(), 1e-6)


def contents(x):
    """All that a state holds, for comparisons."""
    if isinstance(x, np.ndarray):
        return x.dtype, x.shape, x.tobytes()
    if isinstance(x, (list, tuple, set)):
        return [contents(entry) for entry in x]
    return {name: contents(entry) for name, entry in vars(x).items()} if hasattr(x, "__dict__") else x


def in_long_double(logits, labels, sample_weight):
    """The weighted loss of each row, 0 where its weight is, from the textbook's formula."""
    losses = np.zeros(len(labels), np.longdouble)
    for i in np.flatnonzero(sample_weight):
        x = logits[i].astype(np.longdouble)
        losses[i] = sample_weight[i] * (np.log(np.exp(x - x.max()).sum()) + x.max() - x[int(labels[i])])
    return losses


@pytest.mark.parametrize("keep_rows", [False, True])
def test_an_empty_batch_changes_nothing(keep_rows):
    def state():
        return xce.LossState(C, keep_rows=keep_rows)

    none, part = LOGITS[:0], LOGITS[:0, :17]
    for filled in (state().update(LOGITS, LABELS), state().update(LOGITS[:, :17], LABELS), state()):
        before = contents(filled)
        filled.update(none, LABELS[:0]).update(none, LABELS[:0], row_offset=99)
        filled.update(part, LABELS[:0], 3).update(part, LABELS[:0], row_offset=4)
        filled.merge(state().update(none, LABELS[:0])).merge(state().update(part, LABELS[:0]))
        assert contents(filled) == before


# classes and rows that are there, those that come, and what they have in common
OVERLAPS = [
    ((0, 2, 0, 6), (0, 2, 3, 6), "classes 0..1 of rows 3..5"),
    ((0, 2, 0, 6), (1, 3, 5, 8), "classes 1..1 of rows 5..5"),
    ((1, 4, 2, 6), (0, 3, 0, 9), "classes 1..2 of rows 2..5"),
    ((0, 4, 0, 6), (0, 2, 3, 6), "classes 0..1 of rows 3..5"),  # finished
    ((0, 2, 0, 6), (0, 4, 3, 9), "classes 0..1 of rows 3..5"),
    ((0, 4, 0, 6), (0, 4, 5, 9), "classes 0..3 of rows 5..5"),
]


@pytest.mark.parametrize(("known", "new", "text"), OVERLAPS)
@pytest.mark.parametrize("keep_rows", [False, True])
def test_classes_of_rows_that_come_twice(known, new, text, keep_rows):
    x, y = LOGITS[:9, :4], LABELS[:9] % 4

    def add(state, start, stop, first, end):
        return state.update(x[first:end, start:stop], y[first:end], start, row_offset=first)

    def state(cell):
        return add(xce.LossState(4, keep_rows=keep_rows), *cell)

    one = state(known)
    before = contents(one)
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        add(one, *new)
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        one.merge(state(new))
    other = state(new).update(x, y, row_offset=20)  # in this one, something could be merged
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        one.merge(other)
    assert contents(one) == before


def test_rows_that_are_not_numbered_are_different_ones():
    """Each worker counts its own rows, which may be whole, or in shards that have been merged."""
    total = xce.LossState(C)
    for _ in range(3):
        total.merge(sharded(LOGITS, LABELS) if total.keep_rows else xce.LossState(C).update(LOGITS, LABELS))
    shards = [xce.LossState(C).update(LOGITS[:, start:stop], LABELS, start) for start, stop in SHARDS]
    for shard in shards[1:]:
        shards[0].merge(shard)
    total.merge(shards[0])
    assert total.result("sum") == pytest.approx(4 * oracle(xce.cross_entropy, LOGITS, LABELS, reduction="sum"))
    with pytest.raises(ValueError, match=r"classes 0\.\.59 of rows 1\.\.22 came twice"):
        total.update(LOGITS, LABELS, row_offset=1)


@pytest.mark.parametrize("seed", range(20))
def test_shards_that_cut_the_rows_differently(seed):
    """Cells that cover each class of each row once, in any order, by updates and by merges."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=N)
    cells = []
    for start, stop in SHARDS:
        cuts = [0, *sorted(rng.choice(np.arange(1, N), rng.integers(0, 6), replace=False).tolist()), N]
        cells += [(start, stop, first, end) for first, end in itertools.pairwise(cuts)]

    def add(state, start, stop, first, end):
        rows = slice(first, end)
        state.update(LOGITS[rows, start:stop], LABELS[rows], start, row_offset=first, sample_weight=weight[rows])

    expected = in_long_double(LOGITS, np.where(LABELS < 0, 0, LABELS), np.where(LABELS < 0, 0, weight))
    results, denominator = set(), weight[LABELS >= 0].sum()
    for _ in range(4):
        states = [xce.LossState(C, keep_rows=True) for _ in range(rng.integers(1, 5))]
        for cell in rng.permutation(cells).tolist():
            add(states[rng.integers(len(states))], *cell)
        for other in states[1:]:
            before = contents(other)
            states[0].merge(other)
            assert contents(other) == before
        np.testing.assert_allclose(states[0].result("none"), expected.astype(float), rtol=1e-13)
        assert states[0].result() == pytest.approx(float(expected.sum()) / denominator, rel=1e-12)
        results.add((states[0].result(), states[0].result("sum"), states[0].result("none").tobytes()))
    assert len(results) == 1


def test_batches_of_any_length_have_the_same_bits():
    x, y, s = LOGITS.repeat(9, axis=0), LABELS.repeat(9), RNG.normal(size=9 * N)
    results = set()
    for length in (1, 7, 50, 9 * N):
        state = xce.LossState()
        for i in range(0, 9 * N, length):
            part = slice(i, i + length)
            state.update(x[part], y[part], sample_weight=s[part])
        results.add((state.result(), state.result("sum")))
    assert len(results) == 1


def test_sums_are_exact():
    x = np.concatenate([RNG.normal(size=70000) * 10.0 ** RNG.integers(-300, 300, 70000), [5e-324, -5e-324, 1e308, 0.0]])
    total = xce.state._ExactSum()
    total.add(x[:7])
    total.add(x[7:])
    assert total.value() == float(sum(map(Fraction, x.tolist())))
    total.add(-x)
    assert total.value() == 0


def test_results_of_nan_have_the_same_bits_in_any_order():
    x = np.array([[0.0, np.nan], [np.inf, 0.0], [0.0, -np.inf], [-np.inf, 0.0], [-np.nan, -np.nan], [-np.inf, -np.inf]])
    y, s = np.array([0, 1, 1, 0, 1, 0]), np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    for rows in ([0, 1], [2, 3], [2], [3], range(6)):
        results = set()
        for order in itertools.islice(itertools.permutations(rows), 100):
            for cut in (1, 2):
                state = xce.LossState(2, keep_rows=True)
                for i in order:
                    row = {"row_offset": i, "sample_weight": s[i : i + 1]}
                    other = xce.LossState(2, keep_rows=True)
                    if cut == 1:
                        other.update(x[i : i + 1], y[i : i + 1], **row)
                    else:
                        other.update(x[i : i + 1, 1:], y[i : i + 1], 1, **row)
                        state.update(x[i : i + 1, :1], y[i : i + 1], 0, **row)
                    state.merge(other)
                results.add(struct.pack("2d", state.result("sum"), state.result()) + state.result("none").tobytes())
        assert len(results) == 1
        assert b"\xf8\xff" not in next(iter(results))  # NaN is positive


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": WEIGHT}])
def test_a_row_of_weight_zero_is_removed_whatever_it_holds(dtype, options):
    x, s, y = LOGITS.astype(dtype), RNG.normal(size=N), LABELS.astype(float)
    y[5] = 2
    removed = np.array([1, 2, 3, 7, 22])
    x[1], x[2, 3], x[3] = np.nan, np.inf, -np.inf
    y[[1, 2, 7, 22]] = 0.5, np.nan, -5, C + 3
    s[removed] = 0
    rest = np.setdiff1d(np.arange(N), removed)
    expected = np.zeros(N)
    expected[rest] = (
        oracle(xce.cross_entropy, x[rest].astype(float), y[rest].astype(int), reduction="none", **options) * s[rest]
    )
    pieces = sharded(x, y, sample_weight=s, **options)
    whole = xce.LossState(C, keep_rows=True, **options).update(x, y, sample_weight=s)
    share = np.ones(N) if "weight" not in options else WEIGHT[np.where(s, y, 0).astype(int)]
    for state in (pieces, whole):
        found = state.result("none")
        np.testing.assert_allclose(found, expected, rtol=1e-13 if dtype == np.float64 else 2e-6)
        assert not np.signbit(found[removed]).any()
        assert not found[removed].any()
        np.testing.assert_allclose(state.result(), expected.sum() / (share * s).sum(), rtol=1e-5)
    # a shard of other states may call the removed rows what it likes
    y[removed] = -7
    part = xce.LossState(C, **options).update(x[:, :17], y, sample_weight=s)
    y[removed] = np.nan
    assert part.update(x[:, 17:], y, 17, sample_weight=s).result("sum") == pytest.approx(expected.sum(), rel=1e-5)


def test_weights_that_sum_to_zero():
    x, y = np.zeros((2, 3)), np.array([0, 1])
    assert math.isnan(xce.LossState().update(x, y, sample_weight=np.array([1.0, -1.0])).result())
    state = xce.LossState().update(x, y, sample_weight=0)
    assert (state.result("sum"), math.isnan(state.result())) == (0, True)


def test_weights_are_numbers_masks_or_counts():
    arrays = np.array(2), np.arange(N), np.arange(N) % 2 == 0, np.arange(N, dtype=np.uint8)
    for s in (True, 2, np.int64(3), 0.5, *arrays):
        expected = in_long_double(LOGITS, np.where(LABELS < 0, 0, LABELS), np.where(LABELS < 0, 0, s)).sum()
        assert xce.LossState().update(LOGITS, LABELS, sample_weight=s).result("sum") == pytest.approx(float(expected))
    counts = xce.LossState(C, weight=np.arange(1, C + 1)).update(LOGITS, LABELS)
    assert counts.result() == pytest.approx(oracle(xce.cross_entropy, LOGITS, LABELS, weight=np.arange(1.0, C + 1)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint64", "int4", ">f4", ">u2"])
def test_labels_of_any_kind(dtype):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype) if dtype == "int4" else dtype)
    labels = np.arange(N) % 7
    expected = sharded(LOGITS, labels).result()
    assert sharded(LOGITS, labels.astype(dtype)).result() == expected
    assert xce.LossState().update(LOGITS, labels.astype(dtype)).result() == pytest.approx(expected)


def test_one_row():
    x = np.array([1.0, 2.0, 4.0])
    whole, pieces = xce.LossState().update(x, 1), xce.LossState(3).update(x[:2], np.int8(1)).update(x[2:], 1, 2)
    assert whole.result() == pytest.approx(math.log(sum(map(math.exp, x))) - 2, rel=1e-14)
    assert pieces.result() == pytest.approx(whole.result(), rel=1e-14)


def test_any_number_of_classes():
    state = xce.LossState(2**62, keep_rows=True, label_smoothing=0.1)
    state.update(np.zeros((2, 3)), np.array([2**62 - 1, 0]), 2**62 - 3)
    with pytest.raises(ValueError, match=rf"classes 0\.\.{2**62 - 4} of rows 0\.\.1 have not come"):
        state.result()
    with pytest.raises(xce.LabelError, match=rf"target\[1\] = {2**62}"):
        state.update(np.zeros((2, 3)), np.array([0, 2**62]))


def test_a_matrix_is_an_array():
    state = xce.LossState(C, keep_rows=True).update(LOGITS.view(np.matrix), LABELS)
    assert state.result() == xce.LossState(C).update(LOGITS, LABELS).result()
    pieces = xce.LossState(C, keep_rows=True)
    for start, stop in SHARDS:
        pieces.update(LOGITS[:, start:stop].view(np.matrix), LABELS, start)
    assert type(pieces.result("none")) is np.ndarray
    assert pieces.result() == sharded(LOGITS, LABELS).result()


def calls_of(act, *args, **options):
    """How many functions run."""
    count = 0

    def count_one(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_one)
    try:
        act(*args, **options)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("keep_rows", [False, True])
def test_updates_and_merges_cost_what_they_add(keep_rows):
    """After 2000 batches the next one takes as many steps as in the beginning, but for a logarithm."""
    x, y = np.zeros((1, 4)), np.array([1])

    def state():
        return xce.LossState(4, keep_rows=keep_rows)

    for prepare in (
        lambda s, i: s.update(x, y),
        lambda s, i: s.update(x, y, row_offset=2 * i),  # with gaps
        lambda s, i: s.update(x[:, :2], y, row_offset=2 * i),  # open
        lambda s, i: s.merge(state().update(x, y, row_offset=2 * i)),
        lambda s, i: s.merge(state().update(x[:, :2], y, row_offset=2 * i)),
    ):
        filled = state()
        costs = []
        for i in range(2000):
            if i in (1, 1999):
                costs.append(calls_of(prepare, filled, i))
            else:
                prepare(filled, i)
        assert costs[1] < costs[0] + 60


def test_many_shards_of_a_row():
    """A class at a time, from both ends."""
    x, n = RNG.normal(size=(3, 2000)), 2000
    y, state = np.array([0, 999, 1999]), xce.LossState(2000)
    costs = []
    for i in range(n):
        c = i // 2 if i % 2 else n - 1 - i // 2
        costs.append(calls_of(state.update, x[:, c : c + 1], y, c))
    assert max(costs[500:-1]) < costs[1] + 60
    assert state.result() == pytest.approx(oracle(xce.cross_entropy, x, y), rel=1e-13)


def test_nothing_warns():
    jax = pytest.importorskip("jax.numpy")
    x = np.array([[-np.inf, 200, 0, np.inf], [0, 1e30, -1e30, 3], [-np.inf] * 4, [0, 1e-30, 1, 2]], np.float32)
    y, s = np.array([0, 0, 1, 2]), np.array([1e30, -1e300, 1e-300, 0])
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for convert in (np.asarray, jax.asarray):
            state = xce.LossState(4, label_smoothing=0.1, keep_rows=True)
            state.update(convert(x), convert(y.astype(np.int32)), row_offset=9)
            for start in (0, 2):
                state.update(convert(x[:, start : start + 2]), convert(y.astype(np.int32)), start, sample_weight=s)
            for reduction in ("sum", "mean", "none"):
                state.result(reduction)


@pytest.mark.parametrize("seed", range(30))
def test_random_cells_against_a_table_of_what_came(seed):
    """An error if and only if a class of a row comes twice, and all that came is kept."""
    rng = np.random.default_rng(seed)
    rows, classes = 8, 5
    x, y = LOGITS[:rows, :classes], RNG.integers(classes, size=rows)
    losses = in_long_double(x, y, np.ones(rows))

    def random_state(n):
        state, came = xce.LossState(classes, keep_rows=bool(seed % 2)), np.zeros((rows, classes), bool)
        for _ in range(n):
            first, stop = sorted(rng.choice(rows + 1, 2, replace=False).tolist())
            start, end = sorted(rng.choice(classes + 1, 2, replace=False).tolist())
            is_new = not came[first:stop, start:end].any()
            before = contents(state)
            try:
                state.update(x[first:stop, start:end], y[first:stop], start, row_offset=first)
                assert is_new
                came[first:stop, start:end] = True
            except ValueError:
                assert not is_new
                assert contents(state) == before
        return state, came

    total, came = random_state(3)
    for _ in range(40):
        other, others = random_state(rng.integers(1, 4))
        before = contents(total)
        try:
            total.merge(other)
            assert not (came & others).any()
            came |= others
        except ValueError:
            assert (came & others).any()
            assert contents(total) == before
    for row, start in np.argwhere(~came).tolist():
        total.update(x[row : row + 1, start : start + 1], y[row : row + 1], start, row_offset=row)
    assert total.result() == pytest.approx(float(losses.mean()), rel=1e-13)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_products_of_weights_beyond_float64(size):
    x, y = np.zeros((2, 2)), np.array([0, 1])
    w, s = np.array([size, 1.0]), np.array([size, 1.0])
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        state = xce.LossState(2, weight=w).update(x, y, sample_weight=s)
        with pytest.raises(ValueError, match="came twice"):
            state.update(x, y, row_offset=0, sample_weight=s)
        value = state.result()
        shards = xce.LossState(2, weight=w).update(x[:, :1], y, sample_weight=s)
        assert struct.pack("d", shards.update(x[:, 1:], y, 1, sample_weight=s).result()) == struct.pack("d", value)
    expected = xce.cross_entropy(x, y, weight=w, sample_weight=s)
    assert value == pytest.approx(float(expected), nan_ok=True)


def test_class_weights_whose_sum_is_infinite():
    x, y = np.zeros((2, 3)), np.array([0, 2])
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        state = xce.LossState(3, weight=np.full(3, 1e308)).update(x[:, :2], y).update(x[:, 2:], y, 2)
        whole = xce.LossState(3, weight=np.full(3, 1e308)).update(x, y)
        for one in (whole, state):  # losses and weights are added exactly
            assert one.result() == pytest.approx(math.log(3))
        assert whole.result("sum") == state.result("sum") == math.inf


@pytest.mark.parametrize(("dtype", "label"), [("float16", 2048), ("float32", 2**24), ("float64", 2**53)])
def test_a_float_label_is_ignored_only_if_it_is_that_number(dtype, label):
    x, y = np.zeros((2, 3)), np.array([label, 1], dtype)
    assert xce.LossState(3, ignore_index=label).update(x, y).result() == pytest.approx(math.log(3))
    with pytest.raises(xce.LabelError, match=r"^target\[0\] = .* is no label"):
        xce.LossState(3, ignore_index=label + 1).update(x, y)


def test_rows_in_several_blocks(rng: np.random.Generator) -> None:
    """The blocks of rows that an update computes on do not show, nor does a bad label leave some of them behind."""
    x, y = rng.standard_normal((3, 7000, 4)).astype(np.float32), rng.integers(4, size=(3, 7000))
    s, weight = rng.standard_normal(7000), rng.random(4)
    x[1, 5, 2], y[2, 6] = np.inf, -100
    for n_classes in (4, 6):
        whole, parts = (xce.LossState(n_classes, weight=np.resize(weight, n_classes), keep_rows=True) for _ in range(2))
        bad = y.copy()
        bad[2, 6999] = 9
        with pytest.raises(xce.LabelError, match=r"target\[2, 6999\] = 9 is out of range"):
            whole.update(x, bad, sample_weight=s)
        whole.update(x, y, sample_weight=s)
        for i in range(3):
            parts.update(x[i], y[i], sample_weight=s, row_offset=7000 * i)
        if n_classes == 6:
            more = rng.standard_normal((21000, 2)).astype(np.float32)
            for state in (whole, parts):
                state.update(more, y.ravel(), 4, sample_weight=np.tile(s, 3), row_offset=0)
        for reduction in ("sum", "mean", "none"):
            np.testing.assert_array_equal(whole.result(reduction), parts.result(reduction))
        if n_classes == 4:
            losses = xce.cross_entropy(x, y, weight=weight, reduction="none").astype(float).ravel()
            np.testing.assert_array_equal(whole.result("none"), losses * np.tile(s, 3))
