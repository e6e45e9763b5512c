/* SPDX-License-Identifier: Apache-2.0 */
/* stepping_clock.c -- preloaded, sets the system's time back by an hour and forward
 * again, twice a second. The monotonic clock goes on as it is. */
#define _GNU_SOURCE /* RTLD_NEXT */

#include <dlfcn.h>
#include <pthread.h>
#include <sys/time.h>
#include <time.h>

enum { kStep = -3600, kMostUptime = 1000000000 };

typedef int (*clock_function)(clockid_t, struct timespec *);
typedef int (*wait_function)(pthread_cond_t *, pthread_mutex_t *,
                             const struct timespec *);

static int
real_time(clockid_t clock, struct timespec *at)
{
    static clock_function real;

    if (real == NULL)
        real = (clock_function)dlsym(RTLD_NEXT, "clock_gettime");
    return real(clock, at);
}

/* Seconds by which the system's time is off now. */
static time_t
step(void)
{
    struct timespec at;

    real_time(CLOCK_MONOTONIC, &at);
    return at.tv_nsec >= 250000000 && at.tv_nsec < 750000000 ? kStep : 0;
}

int
clock_gettime(clockid_t clock, struct timespec *at)
{
    const int failed = real_time(clock, at);

    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        at->tv_sec += step();
    return failed;
}

int
gettimeofday(struct timeval *restrict at, void *restrict zone)
{
    struct timespec now;

    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    *at = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}

time_t
time(time_t *at)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    if (at != NULL)
        *at = now.tv_sec;
    return now.tv_sec;
}

/* The kernel, whose clock does not step, is given its own time. A time by the monotonic
 * clock is known by its size. */
int
pthread_cond_timedwait(pthread_cond_t *restrict condition,
                       pthread_mutex_t *restrict lock,
                       const struct timespec *restrict until)
{
    static wait_function real;
    struct timespec at = *until;

    /* Where there is an older one of another layout, dlsym finds that. */
    if (real == NULL)
        real =
            (wait_function)dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (real == NULL)
        real = (wait_function)dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    if (at.tv_sec > kMostUptime)
        at.tv_sec -= step();
    return real(condition, lock, &at);
}
