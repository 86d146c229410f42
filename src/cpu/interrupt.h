/* Ctrl-C within a long call: the thread that called looks for signals every few milliseconds, and tells the others to stop. */
#ifndef XCE_INTERRUPT_H
#define XCE_INTERRUPT_H

#include <Python.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

typedef struct {
    int stopped;             /* an exception is set, and all results are to be forgotten */
    unsigned long owner;     /* the thread that called */
    double next_look;        /* when it looks again; 0 before the first time, when it only begins to measure */
    ptrdiff_t units, taken;  /* portions of the work, and those that are given out */
    int at_work;             /* threads that have not ended */
} xce_watch;

static inline double xce_now(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#define XCE_LOOK_EVERY 0.01 /* seconds */

static inline void xce_watch_begin(xce_watch *w)
{
    memset(w, 0, sizeof *w);
    w->owner = PyThread_get_thread_ident();
}

static inline int xce_is_stopped(const xce_watch *w) { return __atomic_load_n(&w->stopped, __ATOMIC_RELAXED); }

/* Called without the GIL, every hundred thousand logits or so. */
static __attribute__((noinline, cold, unused)) int xce_look(xce_watch *w)
{
    double now;
    if (xce_is_stopped(w) || PyThread_get_thread_ident() != w->owner)
        return xce_is_stopped(w);
    now = xce_now();
    if (w->next_look == 0)
        w->next_look = now + XCE_LOOK_EVERY;
    if (now >= w->next_look || now < w->next_look - 2 * XCE_LOOK_EVERY) { /* or the clock was set back */
        PyGILState_STATE state = PyGILState_Ensure();
        if (PyErr_CheckSignals() != 0)
            __atomic_store_n(&w->stopped, 1, __ATOMIC_RELAXED);
        PyGILState_Release(state);
        w->next_look = xce_now() + XCE_LOOK_EVERY;
    }
    return xce_is_stopped(w);
}

static inline void xce_begin(xce_watch *w) { __atomic_add_fetch(&w->at_work, 1, __ATOMIC_SEQ_CST); }

/* The next portion, or -1 */
static inline ptrdiff_t xce_take(xce_watch *w)
{
    ptrdiff_t unit = __atomic_fetch_add(&w->taken, 1, __ATOMIC_SEQ_CST);
    return unit < w->units && !xce_is_stopped(w) ? unit : -1;
}

/* At the end of a thread's work: the one that looks for signals goes on looking until all have ended. */
static inline void xce_end(xce_watch *w)
{
    __atomic_sub_fetch(&w->at_work, 1, __ATOMIC_SEQ_CST);
    if (PyThread_get_thread_ident() != w->owner)
        return;
    for (unsigned turns = 1; __atomic_load_n(&w->at_work, __ATOMIC_SEQ_CST) > 0; turns++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (turns % 4096 == 0) {
            xce_look(w);
#if !defined(_WIN32)
            struct timespec rest = {0, 200000};
            nanosleep(&rest, NULL);
#endif
        }
    }
}

/* Raise what was found. */
static inline int xce_watch_end(const xce_watch *w) { return xce_is_stopped(w) ? -1 : 0; }

#endif
