/* SPDX-License-Identifier: Apache-2.0 */
/* fake_nccl.c -- a libnccl.so.2 for tensors on a CPU, between processes of one host.
 *
 * A message is a file, in a folder whose name is the id; it is sent once the receiver
 * has taken it away. Nothing moves but when the state is asked for, so every call is in
 * progress for a while, and as strict as NCCL's about being asked until it is done.
 *
 *   FAKE_NCCL_FOLDER    where the folders are made; has to be set
 *   FAKE_NCCL_VERSION   in place of 22703
 *   FAKE_NCCL_MOST      most bytes of one message
 *   FAKE_NCCL_STREAM    the one stream that is right, as a number; else 0
 *   FAKE_NCCL_FAULT     what fails: id, init, send, group, late, hang, close
 *   FAKE_NCCL_RANK      the one rank on which it does; else on all */
#define _GNU_SOURCE

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nccl/abi.h"

enum { INTERNAL = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6 };
enum { RANKS = 8, MESSAGES = 64, ASKED = 3 };

const int autotp_nccl_on_cpu = 1;

typedef enum { JOINING, READY, MOVING, FINALIZING, FINALIZED } stage;

typedef struct {
    bool sends;
    bool begun;
    bool done;
    int peer;
    int number; /* among those to this peer, or from it */
    char *at;
    size_t bytes;
} message;

typedef struct {
    char folder[TP_NCCL_ID_BYTES];
    int rank;
    int ranks;
    stage at;
    int asked; /* how often for the state, in this stage */
    int sent[RANKS];
    int received[RANKS];
    message messages[MESSAGES];
    int count;
} comm;

static comm *open_one; /* of this process; a group belongs to it */
static bool in_group;
static char last[200];

static bool
fails(const char *fault, int rank)
{
    const char *wanted = getenv("FAKE_NCCL_FAULT");
    const char *where = getenv("FAKE_NCCL_RANK");
    return wanted != NULL && strcmp(wanted, fault) == 0 &&
           (where == NULL || atoi(where) == rank);
}

static int
fail(int result, const char *words)
{
    snprintf(last, sizeof(last), "%s", words);
    return result;
}

/* Write a whole file at once, by its name. */
static void
put(const char *path, const char *at, size_t bytes)
{
    char half[300];
    snprintf(half, sizeof(half), "%s.half", path);
    FILE *file = fopen(half, "wb");
    if (file == NULL || fwrite(at, 1, bytes, file) != bytes || fclose(file) != 0 ||
        rename(half, path) != 0)
        abort();
}

static void
name_message(const comm *c, const message *m, char *path)
{
    const int from = m->sends ? c->rank : m->peer;
    const int to = m->sends ? m->peer : c->rank;
    snprintf(path, 256, "%s/%d-%d-%d", c->folder, from, to, m->number);
}

static int
advance(comm *c, message *m)
{
    char path[256];
    struct stat found;

    name_message(c, m, path);
    if (m->sends && !m->begun) {
        put(path, m->at, m->bytes);
        m->begun = true;
        return TP_NCCL_SUCCESS;
    }
    const bool there = stat(path, &found) == 0;
    if (m->sends || !there) {
        m->done = m->sends && !there;
        return TP_NCCL_SUCCESS;
    }
    if ((size_t)found.st_size != m->bytes)
        return fail(INVALID_USAGE, "the sizes of a message differ");
    FILE *file = fopen(path, "rb");
    if (file == NULL || fread(m->at, 1, m->bytes, file) != m->bytes)
        abort();
    fclose(file);
    unlink(path);
    m->done = true;
    return TP_NCCL_SUCCESS;
}

static int
advance_all(comm *c)
{
    bool done = true;

    for (int i = 0; i < c->count; i++) {
        message *m = &c->messages[i];
        const int result = m->done ? TP_NCCL_SUCCESS : advance(c, m);
        if (result != TP_NCCL_SUCCESS)
            return result;
        done = done && m->done;
    }
    if (!done || c->asked < ASKED)
        return TP_NCCL_IN_PROGRESS;
    c->at = READY;
    c->count = 0;
    return TP_NCCL_SUCCESS;
}

/* Whether every rank has come. */
static int
join(comm *c)
{
    for (int rank = 0; rank < c->ranks; rank++) {
        char path[256];
        snprintf(path, sizeof(path), "%s/rank-%d", c->folder, rank);
        if (access(path, F_OK) != 0)
            return TP_NCCL_IN_PROGRESS;
    }
    if (c->asked < ASKED)
        return TP_NCCL_IN_PROGRESS;
    c->at = READY;
    return TP_NCCL_SUCCESS;
}

static int
state_of(comm *c)
{
    c->asked++;
    switch (c->at) {
        case JOINING:
            return join(c);
        case MOVING:
            if (fails("late", c->rank))
                return fail(REMOTE, "the cable was pulled");
            return fails("hang", c->rank) ? TP_NCCL_IN_PROGRESS : advance_all(c);
        case FINALIZING:
            if (c->asked < ASKED || fails("close", c->rank))
                return TP_NCCL_IN_PROGRESS;
            c->at = FINALIZED;
            return TP_NCCL_SUCCESS;
        case READY:
        case FINALIZED:
            break;
    }
    return TP_NCCL_SUCCESS;
}

int
ncclGetVersion(int *version)
{
    const char *wanted = getenv("FAKE_NCCL_VERSION");
    *version = wanted != NULL ? atoi(wanted) : 22703;
    return TP_NCCL_SUCCESS;
}

int
ncclGetUniqueId(tp_nccl_id *id)
{
    const char *folder = getenv("FAKE_NCCL_FOLDER");

    if (fails("id", 0))
        return fail(INTERNAL, "no network");
    memset(id, 0, sizeof(*id));
    if (folder == NULL ||
        snprintf(id->bytes, sizeof(id->bytes), "%s/XXXXXX", folder) >= 128 ||
        mkdtemp(id->bytes) == NULL)
        return fail(INTERNAL, "FAKE_NCCL_FOLDER is no folder, or its name is too long");
    return TP_NCCL_SUCCESS;
}

int
ncclCommInitRankConfig(void **made, int ranks, tp_nccl_id id, int rank,
                       tp_nccl_config *config)
{
    char path[256];

    if (config->size != sizeof(*config) || config->magic != 0xcafebeef ||
        config->version != 21400 || config->blocking != 0)
        return fail(INVALID_ARGUMENT, "the configuration is not one of NCCL 2.14");
    if (ranks > RANKS || rank < 0 || rank >= ranks)
        return fail(INVALID_ARGUMENT, "there is no such rank");
    if (fails("init", rank))
        return fail(INTERNAL, "no memory on the device");
    comm *c = calloc(1, sizeof(*c));
    if (c == NULL)
        abort();
    memcpy(c->folder, id.bytes, sizeof(c->folder));
    c->rank = rank;
    c->ranks = ranks;
    c->at = JOINING;
    snprintf(path, sizeof(path), "%s/rank-%d", c->folder, rank);
    put(path, "", 0);
    *made = open_one = c;
    return TP_NCCL_IN_PROGRESS;
}

int
ncclCommGetAsyncError(void *handle, int *result)
{
    *result = state_of(handle);
    return TP_NCCL_SUCCESS;
}

static void
release(comm *c)
{
    if (open_one == c)
        open_one = NULL;
    free(c);
}

int
ncclCommAbort(void *handle)
{
    comm *c = handle;
    char path[256];

    snprintf(path, sizeof(path), "%s/aborted-%d", c->folder, c->rank);
    put(path, "", 0);
    release(c);
    return TP_NCCL_SUCCESS;
}

int
ncclCommFinalize(void *handle)
{
    comm *c = handle;

    if (c->at != READY)
        return fail(INVALID_ARGUMENT, "the call before is not done");
    c->at = FINALIZING;
    c->asked = 0;
    return TP_NCCL_IN_PROGRESS;
}

int
ncclCommDestroy(void *handle)
{
    comm *c = handle;
    char path[256];

    if (c->at != FINALIZED)
        return fail(INVALID_USAGE, "not finalized");
    snprintf(path, sizeof(path), "%s/closed-%d", c->folder, c->rank);
    put(path, "", 0);
    release(c);
    return TP_NCCL_SUCCESS;
}

int
ncclGroupStart(void)
{
    in_group = true;
    return TP_NCCL_SUCCESS;
}

int
ncclGroupEnd(void)
{
    if (!in_group)
        return fail(INVALID_USAGE, "no group was started");
    in_group = false;
    if (open_one != NULL && fails("group", open_one->rank))
        return fail(INTERNAL, "the group was not launched");
    return TP_NCCL_IN_PROGRESS;
}

static int
add(comm *c, message m, int type, const void *stream)
{
    const char *most = getenv("FAKE_NCCL_MOST");
    const char *right = getenv("FAKE_NCCL_STREAM");

    if ((uintptr_t)stream != (uintptr_t)(right == NULL ? 0 : atoi(right)))
        return fail(INVALID_ARGUMENT, "another stream");
    if (!in_group || type != 1 || m.peer < 0 || m.peer >= c->ranks)
        return fail(INVALID_ARGUMENT, "not in a group, not bytes, or no such rank");
    if (c->at != READY && !(c->at == MOVING && c->asked == 0))
        return fail(INVALID_ARGUMENT, "the call before is not done");
    if (fails("send", c->rank))
        return fail(INVALID_USAGE, "the pointer is not registered");
    if (c->count == MESSAGES || (most != NULL && m.bytes > (size_t)atoll(most)))
        return fail(INVALID_ARGUMENT, "too many bytes at once");
    m.number = m.sends ? c->sent[m.peer]++ : c->received[m.peer]++;
    c->messages[c->count++] = m;
    c->at = MOVING;
    c->asked = 0;
    return TP_NCCL_SUCCESS;
}

int
ncclSend(const void *at, size_t count, int type, int peer, void *handle, void *stream)
{
    const message m = {
        .sends = true, .peer = peer, .at = (char *)(uintptr_t)at, .bytes = count};
    return add(handle, m, type, stream);
}

int
ncclRecv(void *at, size_t count, int type, int peer, void *handle, void *stream)
{
    const message m = {.peer = peer, .at = at, .bytes = count};
    return add(handle, m, type, stream);
}

const char *
ncclGetErrorString(int result)
{
    static const char *const words[] = {
        "no error",         "unhandled cuda error", "system error", "internal error",
        "invalid argument", "invalid usage",        "remote error", "in progress"};
    return result < 8 ? words[result] : "unknown";
}

const char *
ncclGetLastError(void *handle)
{
    (void)handle;
    return last;
}
