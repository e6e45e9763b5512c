/* SPDX-License-Identifier: Apache-2.0 */
/* threads.h -- the same work on several threads at once.
 *
 * What check.h counts belongs to the thread that joins the others: work says by its
 * result whether all was right. */
#ifndef TP_THREADS_H
#define TP_THREADS_H

#include <pthread.h>
#include <stdlib.h>

enum { MOST_THREADS = 8 };

/* 0 is right. */
typedef int (*thread_work)(void *shared, int thread);

typedef struct {
    thread_work work;
    void *shared;
    int thread;
    int result;
} thread_call;

static void *
thread_run(void *call)
{
    thread_call *self = call;
    self->result = self->work(self->shared, self->thread);
    return NULL;
}

/* The first result that is not 0. */
static inline int
run_threads(int count, thread_work work, void *shared)
{
    pthread_t threads[MOST_THREADS];
    thread_call calls[MOST_THREADS];
    int wrong = 0;
    for (int i = 0; i < count; i++) {
        calls[i] = (thread_call){work, shared, i, 0};
        if (pthread_create(&threads[i], NULL, thread_run, &calls[i]) != 0)
            abort();
    }
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
        wrong = wrong != 0 ? wrong : calls[i].result;
    }
    return wrong;
}

#endif
