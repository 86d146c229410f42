# cython: language_level=3, freethreading_compatible=True
"""What the machine and the OpenMP runtime allow; compiled for any processor, as it decides which kernels may run."""

cdef extern from "threads.h" nogil:
    const int XCE_OPENMP
    int xce_max_threads()
    int xce_startable(int n_threads)
    int xce_watch_forks()
    bint xce_cpu_supports(int level)


def openmp_version():
    """The date of the OpenMP specification the package was compiled for (201511 is 4.5), or 0 without OpenMP."""
    return XCE_OPENMP


def max_threads():
    """How many threads OpenMP would start here and now; 1 within a parallel region."""
    return xce_max_threads()


def startable(int n_threads):
    """How many of these threads, the caller among them, the system lets this thread have."""
    return xce_startable(n_threads)


def supports(int level):
    """Whether this CPU has the instructions of x86-64-v2, -v3 or -v4."""
    return bool(xce_cpu_supports(level))


if xce_watch_forks() != 0:
    raise MemoryError("pthread_atfork")
