// SPDX-License-Identifier: Apache-2.0
// cross_entropy.cpp -- the torch operators on a GPU, around libautotp_cuda.so.
//
// Kernels are started and never waited for. See pack.cpp.
#include <tuple>

#include "torch/device.h"

namespace
{

using namespace tp;

struct Copies {
    Copies() = default;
    Copies(const Copies &) = delete;
    Copies &operator=(const Copies &) = delete;
    ~Copies()
    {
        tp_copies_clear(&list);
    }

    void start(const Device &device, bool in_order = false)
    {
        const auto begin = in_order ? device.api->copy_in_order : device.api->copy;
        device.check(begin(list.items, list.count, device.stream), "a copy of runs");
    }

    tp_copies list = TP_NO_COPIES;
};

void
require_same_device(const Tensor &a, const Tensor &b)
{
    require(a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index(),
            "the tensors lie on different devices");
}

Tensor
pack(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
     std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_cut cut = packing(full, outer, size, inner, runs, shape);
    const Device device(full);
    Tensor shard = new_like(full, shape);
    Copies copies;
    tp_error err = TP_NO_ERROR;
    if (tp_copies_pack(&copies.list, &cut, full.const_data_ptr(),
                       shard.mutable_data_ptr(), &err) < 0)
        raise(&err);
    copies.start(device);
    return shard;
}

std::vector<Tensor>
pack_many(std::vector<Tensor> fulls, std::vector<int64_t> cuts)
{
    Table table(cuts);
    std::vector<Tensor> shards;
    if (fulls.empty())
        return shards;
    const Device device(fulls[0]);
    Copies copies;
    shards.reserve(fulls.size());
    for (const Tensor &full : fulls) {
        table.read();
        require_same_device(full, fulls[0]);
        const tp_shard_cut cut = packing(full, table.outer, table.size, table.inner,
                                         table.runs, table.shape);
        shards.push_back(new_like(full, table.shape));
        tp_error err = TP_NO_ERROR;
        if (tp_copies_pack(&copies.list, &cut, full.const_data_ptr(),
                           shards.back().mutable_data_ptr(), &err) < 0)
            raise(&err);
    }
    require(table.ended(), "the table of cuts goes on behind the last tensor");
    copies.start(device);
    return shards;
}

void
unpack(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
       int64_t inner, std::vector<int64_t> runs)
{
    const tp_shard_cut cut = unpacking(full, shard, outer, size, inner, runs);
    require_same_device(full, shard);
    const Device device(full);
    Copies copies;
    tp_error err = TP_NO_ERROR;
    if (tp_copies_unpack(&copies.list, &cut, full.mutable_data_ptr(),
                         shard.const_data_ptr(), &err) < 0)
        raise(&err);
    copies.start(device);
}

void
compact(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
        std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_cut cut = compacting(full, outer, size, inner, runs, shape);
    const Device device(full);
    tp_compaction at = {&cut, 0, 0, 0};
    tp_compact_step step;
    while (tp_compact_next(&at, &step)) {
        Copies copies;
        tp_error err = TP_NO_ERROR;
        if (tp_compact_copies(&step, full.mutable_data_ptr(), &copies.list, &err) < 0)
            raise(&err);
        copies.start(device, step.in_order);
    }
}

// Checked arguments of the cross-entropy kernels, without what only one of them takes.
tp_vocab_args
vocab_args(const Tensor &logits, const Tensor &columns, double cap)
{
    require(
        logits.dim() == 2 && columns.dim() == 1 && columns.size(0) == logits.size(0),
        "logits are [tokens, width] and columns [tokens]");
    require(logits.is_contiguous() && columns.is_contiguous(),
            "logits and columns are contiguous");
    require(dtype_of(columns) == aoti_torch_dtype_int64(), "columns are int64");
    require(cap >= 0, "the soft cap is not negative; 0 is none");
    require_same_device(logits, columns);
    const int32_t dtype = dtype_of(logits);
    tp_vocab_args args = {};
    if (dtype == aoti_torch_dtype_float32())
        args.type = TP_LOGIT_FLOAT;
    else if (dtype == aoti_torch_dtype_float16())
        args.type = TP_LOGIT_HALF;
    else
        args.type = TP_LOGIT_BRAIN;
    require(args.type != TP_LOGIT_BRAIN || dtype == aoti_torch_dtype_bfloat16(),
            "logits are float32, float16 or bfloat16");
    args.columns = static_cast<const int64_t *>(columns.const_data_ptr());
    args.tokens = logits.size(0);
    args.width = logits.size(1);
    args.cap = static_cast<float>(cap);
    return args;
}

Tensor
vocab_statistics(const Tensor &logits, const Tensor &columns, double cap)
{
    tp_vocab_args args = vocab_args(logits, columns, cap);
    const Device device(logits);
    Tensor found = torch::stable::new_empty(logits, {3, args.tokens},
                                            torch::headeronly::ScalarType::Float);
    args.logits = const_cast<void *>(logits.const_data_ptr());  // read only
    args.found = static_cast<float *>(found.mutable_data_ptr());
    device.check(device.api->vocab_statistics(&args, device.stream),
                 "the statistics of logits");
    return found;
}

// The numbers of a tensor that has one float32 for each token.
const float *
for_tokens(const Tensor &tensor, const Tensor &logits)
{
    require(tensor.dim() == 1 && tensor.size(0) == logits.size(0) &&
                tensor.is_contiguous() &&
                dtype_of(tensor) == aoti_torch_dtype_float32(),
            "logsumexp and scale are contiguous float32 [tokens]");
    require_same_device(tensor, logits);
    return static_cast<const float *>(tensor.const_data_ptr());
}

void
vocab_gradient(const Tensor &logits, const Tensor &logsumexp, const Tensor &columns,
               const Tensor &scale, double cap)
{
    tp_vocab_args args = vocab_args(logits, columns, cap);
    args.logsumexp = for_tokens(logsumexp, logits);
    args.scale = for_tokens(scale, logits);
    const Device device(logits);
    args.logits = logits.mutable_data_ptr();
    device.check(device.api->vocab_gradient(&args, device.stream),
                 "the gradient of logits");
}

// Why there is no library, its file, its architectures and its toolkit.
std::tuple<std::string, std::string, std::string, int64_t>
cuda_library()
{
    const tp_library *library = tp_library_open();
    if (library->api == nullptr)
        return {library->reason, library->path, "", 0};
    return {"", library->path, library->api->archs, library->api->toolkit};
}

// How many devices the library sees, and the CUDA error with its words, 0 for none.
std::tuple<int64_t, int64_t, std::string>
cuda_devices()
{
    const tp_library *library = tp_library_open();
    if (library->api == nullptr)
        throw std::runtime_error(library->reason);
    int count = 0;
    const int error = library->api->devices(&count);
    return {count, error, error == 0 ? "" : library->api->error_text(error)};
}

// Why the kernels do not run on a device; empty where they do. Makes a context there,
// which a device that is full, or another process's alone, refuses.
std::string
cuda_probe(int64_t index)
{
    const tp_library *library = tp_library_open();
    if (library->api == nullptr)
        return library->reason;
    if (stream_of() == nullptr)
        return kNoCuda;
    int error = 0;
    try {
        const DeviceGuard guard(static_cast<int32_t>(index));
        error = library->api->probe();
    } catch (const std::exception &refusal) {
        return std::string("the device cannot be selected: ") + refusal.what();
    }
    if (error == 0)
        return "";
    return "its CUDA library has code for the architectures " +
           std::string(library->api->archs) + ": " + library->api->error_text(error) +
           " (CUDA error " + std::to_string(error) + ")";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def("cuda_library() -> (str, str, str, int)");
    m.def("cuda_devices() -> (int, int, str)");
    m.def("cuda_probe(int index) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("pack_many", TORCH_BOX(&pack_many));
    m.impl("unpack_", TORCH_BOX(&unpack));
    m.impl("compact_", TORCH_BOX(&compact));
    m.impl("vocab_statistics", TORCH_BOX(&vocab_statistics));
    m.impl("vocab_gradient_", TORCH_BOX(&vocab_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("cuda_library", TORCH_BOX(&cuda_library));
    m.impl("cuda_devices", TORCH_BOX(&cuda_devices));
    m.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}
