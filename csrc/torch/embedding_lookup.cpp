// SPDX-License-Identifier: Apache-2.0
// embedding_lookup.cpp -- the operator that looks up rows of a sharded embedding, on a
// CPU and on a GPU.
#include "torch/cpu_copies.h"
#include "torch/device.h"

extern "C" {
#include "pack/embedding_lookup.h"
}

namespace
{

using namespace tp;

Tensor
new_found(const Tensor &weight, const Tensor &ids)
{
    require(weight.dim() == 2, "weight: expected 2 dimensions, [rows, features]");
    require(weight.is_contiguous() && ids.is_contiguous(),
            "weight or ids are not contiguous; call .contiguous() first");
    std::vector<int64_t> shape;
    for (int64_t dim = 0; dim < ids.dim(); dim++)
        shape.push_back(ids.size(dim));
    shape.push_back(weight.size(1));
    return new_like(weight, shape);
}

tp_lookup
lookup_of(const Tensor &weight, const Tensor &ids, const Tensor &found, int64_t start,
          int64_t size)
{
    const int32_t dtype = dtype_of(ids);
    require(dtype == aoti_torch_dtype_int64() || dtype == aoti_torch_dtype_int32(),
            "ids: expected int64 or int32; call ids.long() first");
    require(start >= 0 && start <= size && weight.size(0) <= size - start,
            "start: expected 0 to size - rows; the rows of this rank are inside of the "
            "vocabulary");
    const auto item = static_cast<int64_t>(weight.element_size());
    tp_lookup lookup = tp_lookup_make(weight.const_data_ptr(), found.mutable_data_ptr(),
                                      ids.numel(), weight.size(1) * item);
    lookup.ids = ids.const_data_ptr();
    lookup.start = start;
    lookup.rows = weight.size(0);
    lookup.vocabulary = size;
    lookup.id_bytes = dtype == aoti_torch_dtype_int64() ? 8 : 4;
    return lookup;
}

void
look_up_tokens(int64_t begin, int64_t end, void *context) noexcept
{
    tp_lookup_on_cpu(static_cast<const tp_lookup *>(context), begin, end);
}

// `padding` is for the gradient alone.
Tensor
on_cpu(const Tensor &weight, const Tensor &ids, int64_t start, int64_t size,
       int64_t /*padding*/)
{
    Tensor found = new_found(weight, ids);
    tp_lookup lookup = lookup_of(weight, ids, found, start, size);
    const int64_t outside = tp_lookup_outside(&lookup);
    if (outside >= 0)  // torch makes an IndexError of it
        throw std::out_of_range("ids: got " +
                                std::to_string(tp_lookup_id(&lookup, outside)) +
                                ", expected 0 to " + std::to_string(size - 1) +
                                ", the rows of the embedding over all ranks; is the "
                                "tokenizer another one?");
    if (found.numel() == 0)
        return found;
    tp_shard_expect(lookup.copy.to, lookup.copy.rows * lookup.copy.row_bytes);
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_parallel_for(0, lookup.copy.rows, kGrainBytes / lookup.copy.row_bytes + 1,
                           look_up_tokens, &lookup));
    return found;
}

Tensor
on_gpu(const Tensor &weight, const Tensor &ids, int64_t start, int64_t size,
       int64_t /*padding*/)
{
    require_same_device(weight, ids);
    const Device device(weight);
    Tensor found = new_found(weight, ids);
    const tp_lookup lookup = lookup_of(weight, ids, found, start, size);
    device.check(device.api->lookup(&lookup, device.stream), "a lookup of rows");
    return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def(
        "lookup(Tensor weight, Tensor ids, int start, int size, int padding)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("lookup", TORCH_BOX(&on_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CUDA, m)
{
    m.impl("lookup", TORCH_BOX(&on_gpu));
}
