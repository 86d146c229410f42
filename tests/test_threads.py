"""How many threads run, and what calls survive: forks, Ctrl-C, many callers, labels that change meanwhile.

What could hang or kill the interpreter runs in one of its own, with a time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from checks import machine_of, same_bits

import xce
from xce import _threads
from xce._cpu import runtime

X = np.random.default_rng(0).standard_normal((3000, 100), np.float32)
Y = np.arange(3000) % 100

needs_openmp = pytest.mark.skipif(runtime.openmp_version() == 0, reason="built without OpenMP")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def run_apart(code: str, timeout: float = 60, **environment: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")} | environment
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(autouse=True)
def cap() -> Iterator[None]:
    """Leave the cap as it was."""
    before = _threads._cap
    yield
    _threads._cap = before


# How many


def test_the_cap_is_set_and_removed() -> None:
    with machine_of(8):
        assert xce.get_num_threads() == 8
        xce.set_num_threads(3)
        assert xce.get_num_threads() == 3
        xce.set_num_threads(100_000)
        assert xce.get_num_threads() == 8
        xce.set_num_threads(None)
        assert xce.get_num_threads() == 8


def test_the_context_restores_the_cap_also_after_an_error() -> None:
    with machine_of(8):
        xce.set_num_threads(5)
        with xce.num_threads(2):
            assert xce.get_num_threads() == 2
            with xce.num_threads(None):
                assert xce.get_num_threads() == 5
            assert xce.get_num_threads() == 2
        with pytest.raises(KeyError), xce.num_threads(1):
            raise KeyError
        assert xce.get_num_threads() == 5
        with pytest.raises(ValueError, match="n=0"), xce.num_threads(0):
            pass
        assert xce.get_num_threads() == 5


@pytest.mark.parametrize(
    ("kind", "n"), [(ValueError, 0), (ValueError, -1), (TypeError, 2.0), (TypeError, "2"), (TypeError, True)]
)
def test_caps_that_are_refused(kind: type[Exception], n: Any) -> None:
    before = _threads._cap
    with pytest.raises(kind, match="n"):
        xce.set_num_threads(n)
    assert _threads._cap == before


def test_the_team_is_the_least_of_all_limits() -> None:
    plenty = 10**9
    with machine_of(8):
        assert _threads.team(None, plenty) == 8
        assert _threads.team(3, plenty) == 3
        assert _threads.team(100_000, plenty) == 8
        assert _threads.team(2**62, plenty) == 8
        assert _threads.team(None, 1) == _threads.team(8, 1) == 1  # too little work
        assert 1 < _threads.team(None, 3 * _threads.LOGITS_PER_THREAD) <= 3
        with xce.num_threads(2):
            assert _threads.team(None, plenty) == _threads.team(5, plenty) == 2


def test_hardware_limits(tmp_path: Any) -> None:
    assert 1 <= _threads.hardware_limit() <= (os.cpu_count() or 1)
    for text, n in (("max 100000", sys.maxsize), ("150000 100000", 2), ("400000 100000", 4), ("1000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert _threads._group_quota(tmp_path) == n
    (tmp_path / "cpu.max").unlink()
    assert _threads._group_quota(tmp_path) == sys.maxsize
    (tmp_path / "cpu").mkdir()
    for quota, n in (("-1", sys.maxsize), ("300000", 3)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
        assert _threads._group_quota(tmp_path) == n


COUNT = "import xce; from xce import _threads; _threads.hardware_limit = lambda: 8; print(xce.get_num_threads())"


@needs_openmp
@pytest.mark.parametrize(
    ("environment", "n"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "64"}, 8),
        ({"XCE_NUM_THREADS": "2", "OMP_NUM_THREADS": "5"}, 2),
        ({"XCE_NUM_THREADS": "7", "OMP_NUM_THREADS": "5"}, 5),
    ],
)
def test_environment_variables(environment: dict[str, str], n: int) -> None:
    assert int(run_apart(COUNT, **environment)) == n


REFUSED = """
import numpy as np, xce

u, p, y = np.zeros((1, 2)), np.full((1, 2), 0.5), np.zeros(1, int)
for compute in (
    xce.get_num_threads, xce.show_config, lambda: xce.cross_entropy(u, y), lambda: xce.softmax(u),
    lambda: xce.binary_cross_entropy(p, p), lambda: xce.linear_cross_entropy(u, u, y),
    lambda: xce.LossState().update(u, y), lambda: xce.metrics.brier_score(p, y),
):
    try:
        compute()
    except ImportError as error:
        print(error)
xce.set_num_threads(1)
print(xce.get_num_threads(), xce.cross_entropy(u, y, reduction="sum") > 0)
"""


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " "])
def test_environment_variables_that_are_refused(value: str) -> None:
    """As XCE_CPU: by the first call, however small; who then says how many threads need not care."""
    refusal = f"XCE_NUM_THREADS={value!r} is not allowed: expected an integer of at least 1"
    assert run_apart(REFUSED, XCE_NUM_THREADS=value).splitlines() == [refusal] * 8 + ["1 True"]


@needs_openmp
def test_threadpoolctl_limits_the_threads() -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = xce.get_num_threads()
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert xce.get_num_threads() == 1
        assert _threads.team(8, 10**9) == 1
    assert xce.get_num_threads() == before


@pytest.mark.parametrize("n", [1, 2, 100_000, 2**62, np.int8(3), None])
def test_any_number_may_be_asked_for(n: Any) -> None:
    expected = xce.cross_entropy(X, Y, n_threads=1)
    assert xce.cross_entropy(X, Y, n_threads=n) == expected
    with machine_of(4):
        assert xce.cross_entropy(X, Y, n_threads=n) == expected


@needs_openmp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at what Linux tells of a process")
@pytest.mark.parametrize("room", [0, 1 << 20, 20 << 20])  # bytes: a thread's stack takes 8 MiB
def test_a_system_without_room_for_threads_gets_fewer(room: int) -> None:
    """OpenMP would end the process."""
    code = f"""
import resource, numpy as np, xce
from xce import _threads
_threads.hardware_limit = lambda: 8
logits, labels = np.zeros((8192, 100), np.float32), np.zeros(8192, int)
xce.cross_entropy(logits, labels, n_threads=1)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + {room}, -1))
small = _threads.team(None, logits.size), xce.cross_entropy(logits, labels)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(*small, _threads.team(None, logits.size), xce.cross_entropy(logits, labels))
"""
    small, loss, all_threads, same_loss = run_apart(code, OMP_NUM_THREADS="8").split()
    assert 1 <= int(small) < int(all_threads) == 8
    assert loss == same_loss


# A build without OpenMP


@pytest.fixture
def build_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_is_serial_untold", True)
    monkeypatch.setattr(runtime, "openmp_version", lambda: 0)


def test_one_thread_is_told_once_where_the_call_is(build_without_openmp: None) -> None:
    with machine_of(8), warnings.catch_warnings(record=True, action="always") as told:
        for _ in range(3):
            xce.cross_entropy(X, Y)
    assert [warning.category for warning in told] == [RuntimeWarning]
    assert str(told[0].message).startswith("xce computes on one thread of the 8 that this process may use")
    assert told[0].filename == __file__


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("function", [xce.softmax, lambda x: xce.binary_cross_entropy_with_logits(x, x > 0)])
def test_one_thread_is_told_at_the_first_large_call(function: Any, library: str, build_without_openmp: None) -> None:
    x = X if library == "numpy" else pytest.importorskip("torch").from_numpy(X)
    with machine_of(8), pytest.warns(RuntimeWarning, match="one thread") as told:
        function(x)
    assert told[0].filename == __file__


def test_one_thread_is_not_told_where_no_call_would_have_more(build_without_openmp: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with machine_of(8):
            xce.cross_entropy(X[:100], Y[:100])
            xce.cross_entropy(X, Y, n_threads=1)
            with xce.num_threads(1):
                xce.cross_entropy(X, Y)
        with machine_of(1):
            xce.cross_entropy(X, Y)


def test_what_a_build_lacks_is_shown(build_without_openmp: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = xce.show_config(mode="dicts")
    assert config is not None
    assert any(line.startswith("OpenMP: every call runs on one thread") for line in config["missing"])
    xce.show_config()
    assert "missing  OpenMP: every call runs on one thread" in capsys.readouterr().out


TWO_LARGE_CALLS = f"""
import sys, warnings
warnings.filterwarnings(sys.argv[1], message="xce computes on one thread")
import numpy, xce
from xce import _threads
_threads.hardware_limit = lambda: 8
for _ in range(2):
    xce.softmax(numpy.zeros({X.shape}))
"""


@pytest.mark.parametrize("action", ["error", "always", "ignore"])
def test_only_a_build_without_openmp_tells_and_can_be_silenced(action: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TWO_LARGE_CALLS, action], capture_output=True, text=True, timeout=60, check=False
    )
    is_told = action != "ignore" and not runtime.openmp_version()
    assert result.stderr.count("RuntimeWarning: xce computes on one thread of the 8") == is_told
    assert (result.returncode != 0) == (is_told and action == "error")
    assert bool(result.stderr) == is_told


# Forks

FORK = """
import os, sys, numpy, xce
from xce import _threads
_threads.hardware_limit = lambda: 4
x, y = numpy.random.default_rng(0).standard_normal((3000, 100), numpy.float32), numpy.arange(3000) % 100

def call():
    value, grad = xce.cross_entropy(x, y, return_grad=True)
    return value.tobytes() + grad.tobytes()

def n_tasks():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0

before = call()
"""

FORK_OS = (
    FORK
    + """
def child(depth):
    pid = os.fork()
    if pid == 0:
        alone = n_tasks()
        good = call() == before
        parallel = n_tasks() - alone == 3 or not n_tasks()
        print("child", good, parallel, _threads.get_num_threads(), flush=True)
        if depth > 1:
            child(depth - 1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

child(2)
child(1)
print("parent", call() == before)
"""
)

FORK_POOL = (
    FORK
    + """
import multiprocessing

def work(i):
    return call() == before, _threads.get_num_threads()

with multiprocessing.get_context("fork").Pool(3) as pool:
    print(pool.map(work, range(6)))
"""
)


@needs_fork
@needs_openmp
def test_a_forked_child_computes_in_parallel_and_so_does_its_child() -> None:
    lines = run_apart(FORK_OS, OMP_NUM_THREADS="4").splitlines()
    assert lines == ["child True True 4"] * 3 + ["parent True"]


@needs_fork
def test_processes_of_multiprocessing() -> None:
    result = run_apart(FORK_POOL, OMP_NUM_THREADS="4")
    assert eval(result) == [(True, 4 if runtime.openmp_version() else 1)] * 6


# Ctrl-C

INTERRUPTED = """
import os, signal, threading, time, numpy, xce
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
rows = 2**25
x = numpy.broadcast_to(numpy.arange(4096, dtype="f4"), (rows, 4096))  # 137,000,000,000 logits
y = numpy.broadcast_to(numpy.int64(7), (rows,))
sent = []

def interrupt():
    time.sleep(0.3)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

thread = threading.Thread(target=interrupt)
thread.start()
try:
    xce.cross_entropy(x, y, validate=False, n_threads={n})
except KeyboardInterrupt:
    print(time.perf_counter() - sent[0])
thread.join()
print(xce.cross_entropy(x[:3], y[:3]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize("n", [1, 2])
def test_ctrl_c_ends_a_long_call(n: int) -> None:
    seconds, value = map(float, run_apart(INTERRUPTED.format(n=n)).split())
    assert seconds < 1
    assert value == pytest.approx(4095 - 7 + 0.4586751453870819)


IN_EACH_CALL = """
def interrupt():
    time.sleep(0.2)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

for call in calls:
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        call()
        time.sleep(9)
    except KeyboardInterrupt:
        late.append(time.perf_counter() - sent[-1])
    thread.join()
print(*late)
"""
LONG_ROWS = """
import os, signal, threading, time, numpy, xce
signal.signal(signal.SIGINT, signal.default_int_handler)
n, sent, late = 2**30, [], []
x, q = numpy.broadcast_to(numpy.float32(1), (2, n)), numpy.broadcast_to(0.5, (2, n))
y, w = numpy.array([3, 5]), numpy.broadcast_to(True, (2, n))
rows, labels = numpy.broadcast_to(numpy.float32(1), (n, 2)), numpy.broadcast_to(numpy.float32(1), (n,))
calls = [
    lambda: xce.cross_entropy(x, y),
    lambda: xce.cross_entropy(x.T, y, axis=0, where=w.T, label_smoothing=0.1),
    lambda: xce.focal_loss(x, q, gamma=2.5, where=w, softcap=3.0, validate=False),
    lambda: xce.distillation_loss(x, q, divergence="js", temperature=2.0),
    lambda: xce.logit_stats(x, y),
    lambda: xce.logsumexp(x),
    lambda: xce.binary_cross_entropy_with_logits(x, q, validate=False),
    lambda: xce.multilabel_soft_margin_loss(x, q, validate=False, reduction="none"),
    lambda: xce.cross_entropy(rows, labels, sample_weight=numpy.broadcast_to(1.5, (n,))),
]
"""
# what is read before the rows are computed: `where` for the denominator and for errors, the classes of a teacher
LONG_CHECKS = """
import os, signal, threading, time, numpy, xce
signal.signal(signal.SIGINT, signal.default_int_handler)
n, sent, late = 2**20, [], []
as_wide, zeros = numpy.broadcast_to, lambda *shape: numpy.broadcast_to(numpy.float32(0), shape)
last = numpy.zeros(n, bool)
last[-1] = True
bad, weight = numpy.full(2**14, n - 1), numpy.ones(2**14)
bad[7], weight[7] = -5, 0
classes = numpy.arange(2**22)[::-1].astype(">i8")  # whose order is slow to find
calls = [
    lambda: xce.cross_entropy(zeros(2**14, n), numpy.full(2**14, n - 1), where=as_wide(last, (2**14, n))),
    lambda: xce.cross_entropy(zeros(2**14, n), numpy.zeros(2**14, int), where=as_wide(False, (2**14, n))),
    lambda: xce.cross_entropy(zeros(1, 2**33), numpy.zeros(1, int), where=as_wide(False, (1, 2**33))),
    lambda: xce.distillation_loss(zeros(2**14, n), zeros(2**14, n), where=as_wide(last, (2**14, n))),
    lambda: xce.cross_entropy(zeros(2**14, n), bad, where=as_wide(last, (2**14, n)), sample_weight=weight),
    lambda: xce.cross_entropy(
        zeros(2**14, n), as_wide(-1.0, (2**14, n)), sample_weight=0.0, where=as_wide(last, (2**14, n))
    ),
    lambda: xce.distillation_loss(zeros(2, 2**22), zeros(2, 2**22), teacher_indices=as_wide(classes, (2, 2**22))),
    lambda: xce.distillation_loss(
        zeros(99, 2**22), zeros(99, 2**22), teacher_indices=as_wide(classes, (99, 2**22)), validate=False
    ),
]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize(("calls", "count"), [(LONG_ROWS, 9), (LONG_CHECKS, 8)], ids=["rows", "checks"])
@pytest.mark.parametrize("n", [1, 2])
def test_ctrl_c_ends_a_long_row(n: int, calls: str, count: int) -> None:
    seconds = list(map(float, run_apart(calls + IN_EACH_CALL, XCE_NUM_THREADS=str(n)).split()))
    assert len(seconds) == count
    assert max(seconds) < 1  # 0.1 where nothing else runs


# Small stacks

SMALL_STACK = """
import sys, threading, numpy, xce
from xce import _threads
_threads.hardware_limit = lambda: 4
dtypes, failed, rng = ["f4", "f8", "f2"], [], numpy.random.default_rng(0)
try:
    import ml_dtypes
    dtypes.append(ml_dtypes.bfloat16)
except ImportError:
    pass

def all_calls():
    for dtype in dtypes:
        for shape in ((3, 5), (700, 300), (4, 30000)):
            x, t = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
            y, q = rng.integers(shape[1], size=shape[0]), rng.random(shape)
            both = dict(return_grad=True, return_hess=True)
            every = dict(where=numpy.ones(shape, bool), label_smoothing=0.1, softcap=5.0, temperature=0.7, **both)
            for loss in (xce.cross_entropy, xce.focal_loss, xce.poly_loss, xce.generalized_cross_entropy):
                for target in (y, y.astype("f4") % 7, q):
                    loss(x, target, **both)
                    loss(x, target, **every)
            xce.nll_loss(x, y, **both)
            for divergence in ("forward", "reverse", "js"):
                xce.distillation_loss(x, t, divergence=divergence, **both)
            some = numpy.tile(numpy.arange(3), (shape[0], 1))
            xce.distillation_loss(x, t[:, :3], teacher_indices=some, **both)
            for function in (xce.softmax, xce.log_softmax, xce.logsumexp):
                function(x)
            xce.logit_stats(x, y)
            b, p = q > 0.5, q.astype(x.dtype)
            for loss in (xce.binary_cross_entropy_with_logits, xce.sigmoid_focal_loss, xce.asymmetric_loss):
                loss(x, b, **both)
            xce.binary_cross_entropy(p, b, **both)
            xce.kl_div(x, q, **both)
            xce.soft_margin_loss(x, 2.0 * b - 1, **both)
            xce.multilabel_soft_margin_loss(x, b, **both)
            inputs, weight = (rng.standard_normal((n, 7)).astype(dtype) for n in shape)
            xce.linear_cross_entropy(inputs, weight, y, return_grad=True)
            state = xce.LossState()
            state.update(x, y)

def run():
    try:
        all_calls()
    except BaseException as error:
        failed.append(repr(error))

all_calls()  # imports need more
if {small_caller}:
    threading.stack_size(65536)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
print(failed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="stacks have another least size elsewhere")
@pytest.mark.parametrize("small_caller", [True, False])
def test_a_stack_of_64_kib_is_enough(small_caller: bool) -> None:
    code = SMALL_STACK.replace("{small_caller}", str(small_caller))
    assert run_apart(code, timeout=200, OMP_STACKSIZE="64k", OMP_NUM_THREADS="4") == "[]"


# Many callers


def test_fifty_threads_at_once() -> None:
    shapes = [(1 + i % 7, 3 + 17 * (i % 11)) for i in range(49)] + [(3000, 100)]
    calls = []
    for i, shape in enumerate(shapes):
        rng = np.random.default_rng(i)
        calls.append(
            (rng.standard_normal(shape).astype(("f4", "f8", "f2")[i % 3]), rng.integers(shape[1], size=shape[0]))
        )

    def call(i: int) -> Any:
        return xce.cross_entropy(*calls[i], return_grad=True, return_hess=True, label_smoothing=0.1 * (i % 2))

    expected = [call(i) for i in range(50)]
    start = threading.Barrier(50)

    def repeat(i: int) -> bool:
        start.wait()
        for _ in range(20):
            for result, value in zip(call(i), expected[i], strict=True):
                same_bits(result, value)
        return True

    with machine_of(4), ThreadPoolExecutor(50) as pool:
        assert all(pool.map(repeat, range(50)))


def test_other_threads_run_during_a_call() -> None:
    x, y = np.broadcast_to(np.arange(1024, dtype=np.float32), (2**19, 1024)), np.broadcast_to(np.int64(7), (2**19,))
    started, ended = threading.Event(), threading.Event()

    def call() -> None:
        started.set()
        xce.cross_entropy(x, y, n_threads=1)
        ended.set()

    thread = threading.Thread(target=call)
    thread.start()
    started.wait()
    ticks = 0
    while not ended.is_set():
        ticks += 1
        time.sleep(0.001)
    thread.join()
    assert ticks >= 10  # with the GIL held it would be 1 or 2


CHANGING = """
import threading, time, numpy, xce
rng = numpy.random.default_rng(0)
x, y = rng.standard_normal((4000, 70)).astype("f4"), numpy.zeros(4000, int)
w, ended, outcomes = numpy.ones(70, "f4"), False, set()

def spoil():
    while not ended:
        y[:] = 2**62
        y[::7] = -(2**63)
        y[:] = 3

thread = threading.Thread(target=spoil)
thread.start()
end = time.perf_counter() + 2
try:
    while time.perf_counter() < end:
        for validate in (True, False):
            for options in ({}, {"weight": w}, {"label_smoothing": 0.1, "weight": w}):
                try:
                    value, grad = xce.cross_entropy(x, y, validate=validate, return_grad=True, **options)
                    outcomes.add("NaN" if numpy.isnan(value) else "value")
                    stats = xce.logit_stats(x, y, validate=validate)
                except xce.LabelError:
                    outcomes.add("error")
finally:
    ended = True
    thread.join()
print(*sorted(outcomes))
"""


def test_labels_that_another_thread_changes() -> None:
    assert set(run_apart(CHANGING).split()) <= {"NaN", "error", "value"}


def test_the_cap_of_a_block_is_of_its_thread() -> None:
    def work() -> None:
        for _ in range(200):
            with xce.num_threads(1):
                assert xce.get_num_threads() == 1

    before = xce.get_num_threads()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert xce.get_num_threads() == before
