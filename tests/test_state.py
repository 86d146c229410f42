"""LossState against cross_entropy on whole rows, over shards, batches, orders and options."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

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
        (lambda: sharded(LOGITS, LABELS, [0, 0]), ValueError, "classes 0..16 of the rows from 0 came twice"),
        (
            lambda: sharded(LOGITS, LABELS, [0]).merge(sharded(LOGITS, LABELS[::-1], [1])),
            ValueError,
            "target of the rows",
        ),
        (
            lambda: xce.LossState(4).merge(xce.LossState(5)),
            ValueError,
            "n_classes differs: 4 here, 5 in other",
        ),
        (lambda: xce.LossState(4).merge(3), TypeError, "other is a int"),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS + C), xce.LabelError, r"target\[0\]"),
        (lambda: xce.LossState(C).update(LOGITS[:, :9], LABELS * 1.0), TypeError, "class indices"),
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
    before = pickle.dumps(state)
    with pytest.raises(ValueError, match="came twice"):
        state.update(LOGITS[:, :17], LABELS)
    with pytest.raises(ValueError, match="must have"):
        state.update(LOGITS[:3, 17:], LABELS, 17)
    assert pickle.dumps(state) == before


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
    before = pickle.dumps(left)
    with pytest.raises(ValueError, match="row 0 is finished already"):
        left.merge(right)
    assert pickle.dumps(left) == before


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
