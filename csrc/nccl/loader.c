/* SPDX-License-Identifier: Apache-2.0 */
/* loader.c -- finds, opens and checks libnccl.so.2. */
#define _GNU_SOURCE /* dladdr, RTLD_NOLOAD */

#include "nccl/loader.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME "libnccl.so.2"
#define HOW "install a torch with CUDA, or set AUTOTP_NCCL to the file of NCCL"

/* Which function is where in the table. */
static const struct {
    const char *name;
    size_t at;
} symbols[] = {
    {"ncclGetVersion", offsetof(tp_nccl_functions, get_version)},
    {"ncclGetUniqueId", offsetof(tp_nccl_functions, get_id)},
    {"ncclCommInitRankConfig", offsetof(tp_nccl_functions, init)},
    {"ncclCommGetAsyncError", offsetof(tp_nccl_functions, async_error)},
    {"ncclCommAbort", offsetof(tp_nccl_functions, abort)},
    {"ncclCommFinalize", offsetof(tp_nccl_functions, finalize)},
    {"ncclCommDestroy", offsetof(tp_nccl_functions, destroy)},
    {"ncclGroupStart", offsetof(tp_nccl_functions, group_start)},
    {"ncclGroupEnd", offsetof(tp_nccl_functions, group_end)},
    {"ncclSend", offsetof(tp_nccl_functions, send)},
    {"ncclRecv", offsetof(tp_nccl_functions, receive)},
    {"ncclGetErrorString", offsetof(tp_nccl_functions, error_text)},
    {"ncclGetLastError", offsetof(tp_nccl_functions, last_error)},
};

enum { kSymbols = sizeof(symbols) / sizeof(symbols[0]) };

__attribute__((format(printf, 2, 3))) static void
refuse(tp_nccl *nccl, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(nccl->reason, sizeof(nccl->reason), format, values);
    va_end(values);
}

/* The library, or NULL with the reason written. */
static void *
open_first(tp_nccl *nccl, const char *path)
{
    const char *given = getenv("AUTOTP_NCCL");
    const int mode = RTLD_NOW | RTLD_LOCAL;
    void *opened = NULL;

    if (given != NULL && given[0] == '\0') {
        refuse(nccl,
               "AUTOTP_NCCL is empty, which turns NCCL off; unset it to use NCCL");
        return NULL;
    }
    if (given != NULL) {
        opened = dlopen(given, mode);
        if (opened == NULL)
            refuse(nccl, "the file of AUTOTP_NCCL cannot be opened: %s", dlerror());
        return opened;
    }
    /* That of torch, where it has one: two of them in a process need memory twice. */
    opened = dlopen(NAME, mode | RTLD_NOLOAD);
    if (opened == NULL && path[0] != '\0')
        opened = dlopen(path, mode);
    if (opened == NULL)
        opened = dlopen(NAME, mode);
    if (opened == NULL)
        refuse(nccl, "NCCL cannot be opened (%s); " HOW, dlerror());
    return opened;
}

/* The first function that the library lacks, or NULL. */
static const char *
find_functions(tp_nccl *nccl, void *opened)
{
    for (int i = 0; i < kSymbols; i++) {
        /* POSIX has the two kinds of pointers be alike; C does not, hence the copy. */
        void *symbol = dlsym(opened, symbols[i].name);
        if (symbol == NULL)
            return symbols[i].name;
        memcpy((char *)&nccl->calls + symbols[i].at, &symbol, sizeof(symbol));
    }
    return NULL;
}

/* Look at the version first: an old library lacks functions because it is old. */
static void
check_version(tp_nccl *nccl, void *opened)
{
    void *symbol = dlsym(opened, symbols[0].name);
    Dl_info file;

    if (symbol == NULL) {
        refuse(nccl, "what was opened for NCCL is another library: it has no %s; " HOW,
               symbols[0].name);
        return;
    }
    memcpy(&nccl->calls.get_version, &symbol, sizeof(symbol));
    if (dladdr(symbol, &file) != 0 && file.dli_fname != NULL)
        snprintf(nccl->path, sizeof(nccl->path), "%s", file.dli_fname);
    if (nccl->calls.get_version(&nccl->version) != TP_NCCL_SUCCESS) {
        refuse(nccl, "%s does not tell its version; " HOW, nccl->path);
        return;
    }
    if (nccl->version < TP_NCCL_OLDEST || nccl->version >= TP_NCCL_ABOVE) {
        char found[TP_NCCL_VERSION_SIZE];
        tp_nccl_version_write(nccl->version, found);
        refuse(nccl, "%s is NCCL %s; expected 2.14 or a later NCCL 2; " HOW, nccl->path,
               found);
    }
}

void
tp_nccl_open(tp_nccl *nccl, const char *path)
{
    memset(nccl, 0, sizeof(*nccl));
    void *opened = open_first(nccl, path);
    if (opened == NULL)
        return;
    check_version(nccl, opened);
    if (nccl->reason[0] != '\0')
        return;
    const char *missing = find_functions(nccl, opened);
    if (missing != NULL)
        refuse(nccl, "%s has no %s; " HOW, nccl->path, missing);
    nccl->on_cpu = dlsym(opened, TP_NCCL_ON_CPU) != NULL;
}

void
tp_nccl_version_write(int version, char *text)
{
    /* Up to 2.8 a major version is a thousand, from 2.9 on ten thousand. */
    const int major = version < 10000 ? 1000 : 10000;

    snprintf(text, TP_NCCL_VERSION_SIZE, "%d.%d.%d", version / major,
             version % major / 100, version % 100);
}

int
tp_nccl_id_make(const tp_nccl *nccl, tp_nccl_id *id, tp_error *err)
{
    const int result = nccl->calls.get_id(id);

    if (result == TP_NCCL_SUCCESS)
        return 0;
    return tp_fail(err, TP_PEER, "NCCL makes no id for a communicator: %s. %s",
                   nccl->calls.error_text(result), nccl->calls.last_error(NULL));
}
