/* What the machine and the OpenMP runtime allow. The kernels are OpenMP; without OpenMP everything here answers "one thread". */
#ifndef XCE_THREADS_H
#define XCE_THREADS_H

#if defined(_OPENMP)
#include <omp.h>
#define XCE_OPENMP _OPENMP
#else
#define XCE_OPENMP 0
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_in_parallel(void) { return 0; }
#endif

static int xce_forked_with_team; /* in a child: its threads were lost while OpenMP still counts on them */

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <pthread.h>

/* OpenMP ends the process where the system refuses it a thread (limits on memory or processes). So a team that is larger
 * than any this thread has had is started and sent home once before, as plain threads that wait for each other. */
static int xce_forks;                            /* a fork costs a process its threads */
static _Thread_local int xce_greatest_team = 1, xce_forks_then;
static void *xce_wait_for_others(void *all_started)
{
    pthread_mutex_lock(all_started);
    pthread_mutex_unlock(all_started);
    return NULL;
}
static inline int xce_startable(int n_threads)
{
    enum { MOST = 1024 };
    pthread_t others[MOST];
    pthread_attr_t attributes;
    size_t stack;
    pthread_mutex_t all_started = PTHREAD_MUTEX_INITIALIZER;
    int n = 0, wanted = n_threads - 1 < MOST ? n_threads - 1 : MOST;
    if (xce_forks_then != xce_forks) {
        xce_greatest_team = 1;
        xce_forks_then = xce_forks;
    }
    if (n_threads <= xce_greatest_team)
        return n_threads;
    pthread_attr_init(&attributes);
    /* Clang's OpenMP asks for 128 bytes more for each thread: the system keeps these stacks, and must find them large enough. */
    if (pthread_attr_getstacksize(&attributes, &stack) == 0)
        pthread_attr_setstacksize(&attributes, stack + 128 * MOST);
    pthread_mutex_lock(&all_started);
    while (n < wanted && pthread_create(&others[n], &attributes, xce_wait_for_others, &all_started) == 0)
        n++;
    pthread_mutex_unlock(&all_started);
    pthread_attr_destroy(&attributes);
    for (int i = 0; i < n; i++)
        pthread_join(others[i], NULL);
    return xce_greatest_team = n + 1;
}
#else
static inline int xce_startable(int n_threads) { return n_threads; }
#endif

#if defined(_OPENMP) && !defined(__clang__) && (defined(__unix__) || defined(__APPLE__))
/* libgomp does not survive a fork: the child waits for threads that are not there. Sending the team home before the fork
 * lets parent and child start anew. Where that fails (a fork from within a team) the child stays on one thread. Clang's
 * libomp starts anew in a child by itself. */
static int xce_team_released;
static void xce_before_fork(void)
{
    xce_forks++;
    xce_team_released = !omp_in_parallel() && omp_pause_resource_all(omp_pause_soft) == 0;
}
static void xce_after_fork_in_child(void) { xce_forked_with_team = !xce_team_released; }
static inline int xce_watch_forks(void) { return pthread_atfork(xce_before_fork, NULL, xce_after_fork_in_child); }
#else
static inline int xce_watch_forks(void) { return 0; }
#endif

static inline int xce_max_threads(void)
{
    return xce_forked_with_team || omp_in_parallel() ? 1 : omp_get_max_threads();
}

/* The x86-64 levels whose every instruction the kernels may use. */
static inline int xce_cpu_supports(int level)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (level) {
    case 4:
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd")
              && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
            return 0; /* fall through */
    case 3:
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
              && __builtin_cpu_supports("bmi2")))
            return 0; /* fall through */
    case 2:
        return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    }
#endif
    (void)level;
    return 0;
}

#endif
