/* SPDX-License-Identifier: Apache-2.0 */
/* fake_library.c -- a libautotp_cuda.so that does on the host what kernels do.
 *
 * With it the bridge runs where there is no GPU: its tiles, steps and arguments are the
 * real ones. */
#include "../../csrc/cuda/api.h"
#include "../core/copy_host.h"
#include "../core/lookup_host.h"

void host_run(const tp_vocab_args *args, int wants_gradient);

/* The stream that fake_torch.c gives; any other is cudaErrorInvalidResourceHandle. */
static int
check_stream(const void *stream)
{
    if (check_failures > 0) /* a tile was wrong, and check.h has said how */
        return 999;
    const char *wanted = getenv("FAKE_GPU_ERROR");
    if (wanted != NULL)
        return atoi(wanted);
    return (uintptr_t)stream == 5 ? 0 : 400;
}

static int
devices(int *count)
{
    *count = 1;
    return 0;
}

static int
probe(void)
{
    return check_stream((const void *)5);
}

static const char *
error_text(int error)
{
    return error == 209 ? "no kernel image" : "another error";
}

static int
copy(tp_copy *copies, int64_t count, void *stream)
{
    host_start(copies, count, 500, 7);
    return check_stream(stream);
}

static int
copy_in_order(tp_copy *copies, int64_t count, void *stream)
{
    host_start(copies, count, 500, 0);
    return check_stream(stream);
}

static int
statistics(const tp_vocab_args *args, void *stream)
{
    host_run(args, 0);
    return check_stream(stream);
}

static int
gradient(const tp_vocab_args *args, void *stream)
{
    host_run(args, 1);
    return check_stream(stream);
}

static int
lookup(const tp_lookup *args, void *stream)
{
    host_lookup_start(args);
    return check_stream(stream);
}

/* Done when it is asked for the third time, and the times after that. */
static int
stream_done(void *stream)
{
    static int asked;
    const int error = check_stream(stream);
    return error != 0 ? -error : ++asked > 2;
}

const tp_cuda_api *
tp_cuda_api_get(void)
{
    static const tp_cuda_api api = {
        TP_CUDA_ABI, 13000,         "90",       devices,  probe,       error_text,
        copy,        copy_in_order, statistics, gradient, stream_done, lookup,
    };
    return &api;
}
