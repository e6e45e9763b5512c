// SPDX-License-Identifier: Apache-2.0
// pack.cpp -- the torch operators, on the stable ABI of LibTorch, and those on a
// host.
//
// The files of this folder alone include torch headers. They adapt arguments, allocate
// results and hand ranges to torch's threads; they decide nothing. An operator reports
// failure to the dispatcher by an exception, so the operators cannot be noexcept;
// raise() is the one place that makes one. What torch's threads call is noexcept.
#include <torch/headeronly/version.h>

#include <tuple>

#include "torch/tensor.h"

namespace
{

using namespace tp;

// Work is dealt out in pages, so that two threads never write to one cache line.
constexpr int64_t kPage = 4096;
// 1 MiB takes some 50 us to copy, several times the cost of waking a thread.
constexpr int64_t kGrain = 256;

// One copy as torch's threads see it; lives on the stack of the operator.
struct Copy {
    tp_shard_cut cut;
    const void *source;  // borrowed
    void *target;        // borrowed
    int64_t bytes;       // to copy
    int64_t begin = 0;   // byte of the shard that is the first to copy
};

void
pack_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const Copy &copy = *static_cast<const Copy *>(context);
    const int64_t stop = end * kPage < copy.bytes ? end * kPage : copy.bytes;
    tp_shard_pack(&copy.cut, copy.source, copy.target, begin * kPage, stop);
}

void
part_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const Copy &copy = *static_cast<const Copy *>(context);
    const int64_t stop = end * kPage < copy.bytes ? end * kPage : copy.bytes;
    tp_shard_part(&copy.cut, copy.source,
                  static_cast<char *>(copy.target) + begin * kPage,
                  copy.begin + begin * kPage, copy.begin + stop);
}

void
unpack_pages(int64_t begin, int64_t end, void *context) noexcept
{
    const Copy &copy = *static_cast<const Copy *>(context);
    const int64_t stop = end * kPage < copy.bytes ? end * kPage : copy.bytes;
    tp_shard_unpack(&copy.cut, copy.target, copy.source, begin * kPage, stop);
}

void
run_copy(Copy *copy, ParallelFunc pages)
{
    const int64_t count = copy->bytes / kPage + (copy->bytes % kPage != 0);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, kGrain, pages, copy));
}

Tensor
pack(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
     std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_cut cut = packing(full, outer, size, inner, runs, shape);
    Tensor shard = new_like(full, shape);
    Copy copy = {cut, full.const_data_ptr(), shard.mutable_data_ptr(),
                 tp_shard_bytes(&cut)};
    tp_shard_expect(copy.target, copy.bytes);
    run_copy(&copy, pack_pages);
    return shard;
}

// Fills `part`, bytes, with those of the shard from byte `begin` on.
void
pack_part(const Tensor &part, const Tensor &full, int64_t outer, int64_t size,
          int64_t inner, std::vector<int64_t> runs, std::vector<int64_t> shape,
          int64_t begin)
{
    const tp_shard_cut cut = packing(full, outer, size, inner, runs, shape);
    require(part.is_cpu() && part.is_contiguous() && part.element_size() == 1,
            "pack_part_ takes a part of contiguous bytes on a host");
    require(begin >= 0 && begin <= tp_shard_bytes(&cut) &&
                part.numel() <= tp_shard_bytes(&cut) - begin,
            "the part ends behind the shard");
    require(!share_memory(full, part),
            "pack_part_ takes a part that shares no memory with the full tensor");
    Copy copy = {cut, full.const_data_ptr(), part.mutable_data_ptr(), part.numel(),
                 begin};
    run_copy(&copy, part_pages);
}

std::vector<Tensor>
pack_many(std::vector<Tensor> fulls, std::vector<int64_t> cuts)
{
    Table table(cuts);
    std::vector<Tensor> shards;
    shards.reserve(fulls.size());
    for (const Tensor &full : fulls) {
        table.read();
        shards.push_back(
            pack(full, table.outer, table.size, table.inner, table.runs, table.shape));
    }
    require(table.ended(), "the table of cuts goes on behind the last tensor");
    return shards;
}

void
unpack(const Tensor &full, const Tensor &shard, int64_t outer, int64_t size,
       int64_t inner, std::vector<int64_t> runs)
{
    const tp_shard_cut cut = unpacking(full, shard, outer, size, inner, runs);
    Copy copy = {cut, shard.const_data_ptr(), full.mutable_data_ptr(),
                 tp_shard_bytes(&cut)};
    run_copy(&copy, unpack_pages);
}

void
compact(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
        std::vector<int64_t> runs, std::vector<int64_t> shape)
{
    const tp_shard_cut cut = compacting(full, outer, size, inner, runs, shape);
    tp_compact_host(&cut, full.mutable_data_ptr());
}

// The compiler, the version of the torch headers, and the oldest torch that is served.
std::tuple<std::string, std::string, std::string>
build_info()
{
    constexpr uint64_t kTarget = TORCH_TARGET_VERSION;
    return {"compiler " __VERSION__, TORCH_VERSION,
            std::to_string(kTarget >> 56) + "." + std::to_string(kTarget >> 48 & 255)};
}

void
check(int64_t outer, int64_t size, int64_t inner, std::vector<int64_t> runs,
      int64_t full_items, int64_t shard_items, bool disjoint)
{
    check_cut(make_cut(outer, size, inner, runs), full_items, shard_items, disjoint);
}

}  // namespace

STABLE_TORCH_LIBRARY(deepspeed_autotp, m)
{
    m.def(
        "pack(Tensor full, int outer, int size, int inner, int[] runs, int[] shape)"
        " -> Tensor");
    m.def(
        "unpack_(Tensor(a!) full, Tensor shard, int outer, int size, int inner,"
        " int[] runs) -> ()");
    m.def(
        "pack_part_(Tensor(a!) part, Tensor full, int outer, int size, int inner,"
        " int[] runs, int[] shape, int begin) -> ()");
    m.def("pack_many(Tensor[] fulls, int[] cuts) -> Tensor[]");
    m.def(
        "compact_(Tensor(a!) full, int outer, int size, int inner, int[] runs,"
        " int[] shape) -> ()");
    m.def("build_info() -> (str, str, str)");
    m.def("vocab_statistics(Tensor logits, Tensor columns, float cap) -> Tensor");
    m.def(
        "vocab_gradient_(Tensor(a!) logits, Tensor logsumexp, Tensor columns,"
        " Tensor scale, float cap) -> ()");
    m.def(
        "check(int outer, int size, int inner, int[] runs, int full_items,"
        " int shard_items, bool disjoint) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CPU, m)
{
    m.impl("pack", TORCH_BOX(&pack));
    m.impl("pack_part_", TORCH_BOX(&pack_part));
    m.impl("pack_many", TORCH_BOX(&pack_many));
    m.impl("unpack_", TORCH_BOX(&unpack));
    m.impl("compact_", TORCH_BOX(&compact));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("build_info", TORCH_BOX(&build_info));
    m.impl("check", TORCH_BOX(&check));
}
