/* SPDX-License-Identifier: Apache-2.0 */
/* fake_torch.c -- what the operators ask torch about a GPU, answered without one.
 *
 * Loaded ahead of torch, under the name of the library that a torch with CUDA has:
 * every tensor seems to be on cuda:0, whose current stream is 5. But one of 128 items
 * is an id of NCCL's, which is on the CPU. */
#define _GNU_SOURCE /* RTLD_NOLOAD */

#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

static int guards;

/* A function of torch itself, which is loaded after this; NULL where there is none. */
static void *
torchs(const char *name)
{
    void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch == NULL ? NULL : dlsym(torch, name);
}

static int64_t
items_of(void *tensor)
{
    int32_t (*numel)(void *, int64_t *) = NULL;
    void *symbol = torchs("aoti_torch_get_numel");
    int64_t items = 0;
    memcpy(&numel, &symbol, sizeof(numel));
    return numel == NULL || numel(tensor, &items) != 0 ? -1 : items;
}

/* On the CPU, whatever device is asked for. */
int32_t
aoti_torch_empty_strided(int64_t dims, const int64_t *sizes, const int64_t *strides,
                         int32_t dtype, int32_t type, int32_t index, void **made)
{
    int32_t (*empty)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t,
                     int32_t, void **) = NULL;
    void *symbol = torchs("aoti_torch_empty_strided");
    memcpy(&empty, &symbol, sizeof(empty));
    return type != 1 || index != 0 || empty == NULL
               ? 1
               : empty(dims, sizes, strides, dtype, 0, 0, made);
}

int32_t
aoti_torch_get_current_cuda_stream(int32_t device, void **stream)
{
    *stream = (void *)(uintptr_t)(guards == 1 && device == 0 ? 5 : 6);
    return 0;
}

int32_t
aoti_torch_create_device_guard(int32_t device, void **guard)
{
    if (device == 9) /* one that is full, or another process's alone */
        return 1;
    guards++;
    *guard = &guards;
    return 0;
}

int32_t
aoti_torch_delete_device_guard(void *guard)
{
    (void)guard;
    guards--;
    return 0;
}

int32_t
aoti_torch_get_device_type(void *tensor, int32_t *type)
{
    *type = items_of(tensor) != 128; /* c10::DeviceType: 0 is the CPU, 1 CUDA */
    return 0;
}

int32_t
aoti_torch_get_device_index(void *tensor, int32_t *index)
{
    (void)tensor;
    *index = 0;
    return 0;
}
