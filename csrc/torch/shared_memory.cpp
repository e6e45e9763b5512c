// SPDX-License-Identifier: Apache-2.0
// shared_memory.cpp -- the operators that sum and gather between the ranks of one host,
// in memory that they share.
//
// One thread of a rank makes these calls, as with any process group.
#include "torch/handles.h"

extern "C" {
#include "shared_memory/collectives.h"
}

namespace
{

using namespace tp;

Handles<tp_shm> &
open_memory()
{
    static Handles<tp_shm> handles(
        "the shared memory is closed; expected the handle of open memory");
    return handles;
}

int64_t
shm_open_(std::string name, int64_t rank, int64_t ranks, int64_t slot)
{
    require(0 <= rank && rank < ranks && ranks <= 1 << 16,
            "rank: expected 0 to ranks - 1, of at most 65536 ranks");
    require(slot > 0 && slot % 64 == 0, "slot: expected a multiple of 64 bytes");
    tp_error err = TP_NO_ERROR;
    tp_shm *shm = nullptr;
    if (tp_shm_open(&shm, name.c_str(), static_cast<int>(rank), static_cast<int>(ranks),
                    static_cast<size_t>(slot), &err) < 0)
        raise(&err);
    return open_memory().add(std::shared_ptr<tp_shm>(shm, tp_shm_close));
}

void
shm_unlink_(std::string name)
{
    tp_shm_unlink(name.c_str());
}

void
shm_close(int64_t handle)
{
    open_memory().remove(handle);
}

void
shm_set_call(int64_t handle, int64_t call, int64_t digest)
{
    tp_shm_set_call(open_memory().find(handle).get(), static_cast<uint64_t>(call),
                    static_cast<uint64_t>(digest));
}

tp_collective
collective_of(const Tensor &x)
{
    switch (x.scalar_type()) {
        case torch::headeronly::ScalarType::Float:
            return TP_SUM_F32;
        case torch::headeronly::ScalarType::Double:
            return TP_SUM_F64;
        case torch::headeronly::ScalarType::BFloat16:
            return TP_SUM_BF16;
        default:
            throw std::invalid_argument(
                "dtype of a sum in shared memory: expected float32, float64 or "
                "bfloat16");
    }
}

tp_collective_message
message_of(const Tensor &x, tp_collective use, bool backward)
{
    require(x.is_cpu() && x.is_contiguous(),
            "x: expected a contiguous tensor on the CPU");
    return {x.const_data_ptr(), static_cast<size_t>(bytes_of(x)), use, backward};
}

// The message of a sum of which `sum` gets as many items as it holds, from `first` on.
tp_collective_message
summand(const Tensor &x, const Tensor &sum, int64_t first, bool backward = false)
{
    const tp_collective_message message = message_of(x, collective_of(x), backward);
    require(sum.is_cpu() && sum.is_contiguous() && dtype_of(sum) == dtype_of(x),
            "sum: expected a contiguous tensor on the CPU, of the dtype of x");
    require(first >= 0 && first <= x.numel() && sum.numel() <= x.numel() - first,
            "first: expected the items of sum to be inside x");
    return message;
}

// All arguments are checked before anything is posted: a message that is posted and not
// read would be read as the next one.
void
shm_start_sum(int64_t handle, const Tensor &x, const Tensor &sum, int64_t first,
              bool backward, double seconds)
{
    const tp_collective_message message = summand(x, sum, first, backward);
    tp_error err = TP_NO_ERROR;
    if (tp_collective_post(open_memory().find(handle).get(), &message, seconds, &err) <
        0)
        raise(&err);
}

void
shm_take_sum(int64_t handle, const Tensor &x, const Tensor &sum, int64_t first,
             double seconds)
{
    const tp_collective_message message = summand(x, sum, first);
    tp_error err = TP_NO_ERROR;
    if (tp_collective_sum(open_memory().find(handle).get(), &message,
                          static_cast<size_t>(first), static_cast<size_t>(sum.numel()),
                          sum.mutable_data_ptr(), seconds, &err) < 0)
        raise(&err);
}

void
shm_gather(int64_t handle, const Tensor &x, const Tensor &all, bool backward,
           double seconds)
{
    const tp_collective_message message = message_of(x, TP_GATHER, backward);
    const std::shared_ptr<tp_shm> shm = open_memory().find(handle);
    require(
        all.is_cpu() && all.is_contiguous() && dtype_of(all) == dtype_of(x) &&
            all.numel() == x.numel() * tp_shm_ranks(shm.get()),
        "all: expected a contiguous tensor on the CPU, with room for x of every rank");
    tp_error err = TP_NO_ERROR;
    if (tp_collective_post(shm.get(), &message, seconds, &err) < 0 ||
        tp_collective_gather(shm.get(), &message, all.mutable_data_ptr(), seconds,
                             &err) < 0)
        raise(&err);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def("shm_open(str name, int rank, int ranks, int slot) -> int");
    m.def("shm_unlink(str name) -> ()");
    m.def("shm_close(int shm) -> ()");
    m.def(
        "shm_start_sum(int shm, Tensor x, Tensor sum, int first, bool backward, float "
        "seconds) -> ()");
    m.def(
        "shm_take_sum(int shm, Tensor x, Tensor(a!) sum, int first, float seconds)"
        " -> ()");
    m.def(
        "shm_gather(int shm, Tensor x, Tensor(a!) all, bool backward, float seconds)"
        " -> ()");
    m.def("shm_set_call(int shm, int call, int digest) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("shm_open", TORCH_BOX(&shm_open_));
    m.impl("shm_unlink", TORCH_BOX(&shm_unlink_));
    m.impl("shm_close", TORCH_BOX(&shm_close));
    m.impl("shm_set_call", TORCH_BOX(&shm_set_call));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("shm_start_sum", TORCH_BOX(&shm_start_sum));
    m.impl("shm_take_sum", TORCH_BOX(&shm_take_sum));
    m.impl("shm_gather", TORCH_BOX(&shm_gather));
}
