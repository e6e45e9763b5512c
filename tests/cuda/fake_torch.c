/* SPDX-License-Identifier: Apache-2.0 */
/* fake_torch.c -- what the bridge asks torch about a GPU, answered without one.
 *
 * Loaded ahead of torch, under the name of the library that a torch with CUDA has:
 * every tensor seems to lie on cuda:0, whose current stream is 5. */
#include <stdint.h>

static int guards;

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
    (void)tensor;
    *type = 1; /* c10::DeviceType::CUDA */
    return 0;
}

int32_t
aoti_torch_get_device_index(void *tensor, int32_t *index)
{
    (void)tensor;
    *index = 0;
    return 0;
}
