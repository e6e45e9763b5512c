/* SPDX-License-Identifier: Apache-2.0 */
/* cuda_library.c -- finds, opens and checks libautotp_cuda.so, once in a process. */
#define _GNU_SOURCE /* dladdr */

#include "torch/cuda_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME "libautotp_cuda.so"
#define AGAIN "install the package again where nvcc is in PATH, with AUTOTP_CUDA=1"

/* What a library is opened into. It stays open: kernels that were started may still run
 * when the process ends. */
static struct {
    pthread_once_t once;
    tp_cuda_library found;
    char path[PATH_MAX];
    char reason[PATH_MAX + 512];
} state = {.once = PTHREAD_ONCE_INIT};

__attribute__((format(printf, 1, 2))) static void
refuse(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(state.reason, sizeof(state.reason), format, values);
    va_end(values);
}

/* The path of the library, which is beside the one that this is linked into. */
static bool
find(void)
{
    const char *given = getenv("AUTOTP_CUDA_LIBRARY");
    if (given != NULL) {
        snprintf(state.path, sizeof(state.path), "%s", given);
        return true;
    }
    Dl_info own;
    if (dladdr(&state, &own) == 0 || own.dli_fname == NULL)
        return false;
    const char *slash = strrchr(own.dli_fname, '/');
    const int folder = slash == NULL ? 0 : (int)(slash - own.dli_fname) + 1;
    snprintf(state.path, sizeof(state.path), "%.*s" NAME, folder, own.dli_fname);
    return true;
}

static void
open_library(void)
{
    state.found.path = state.path;
    state.found.reason = state.reason;
    if (!find()) {
        refuse("the folder of " NAME
               " cannot be found; set AUTOTP_CUDA_LIBRARY to the "
               "path of the file");
        return;
    }
    if (state.path[0] == '\0') {
        refuse("AUTOTP_CUDA_LIBRARY is empty, which turns " NAME
               " off; unset it to use the library");
        return;
    }
    void *opened = dlopen(state.path, RTLD_NOW | RTLD_LOCAL);
    if (opened == NULL) {
        refuse("the CUDA library cannot be opened (%s); " AGAIN, dlerror());
        return;
    }
    /* POSIX has the two kinds of pointers be alike; C does not, hence the copy. */
    void *symbol = dlsym(opened, TP_CUDA_ENTRY);
    tp_cuda_entry entry = NULL;
    memcpy(&entry, &symbol, sizeof(entry));
    const tp_cuda_api *api = entry == NULL ? NULL : entry();
    if (api != NULL && api->abi == TP_CUDA_ABI) {
        state.found.api = api;
        return;
    }
    refuse(
        "%s belongs to another build of this package (interface %d, expected "
        "%d); " AGAIN,
        state.path, api == NULL ? 0 : (int)api->abi, TP_CUDA_ABI);
    dlclose(opened);
}

const tp_cuda_library *
tp_cuda_library_open(void)
{
    (void)pthread_once(&state.once, open_library);
    return &state.found;
}
