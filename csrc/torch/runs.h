// SPDX-License-Identifier: Apache-2.0
// runs.h -- the runs of a shard as the operators are given them, checked.
//
// `outer`, `size` and `inner` are the view of the full tensor around the sharded
// dimension; `runs` is start, length, start, length, ... along `size`.
#ifndef TP_TORCH_RUNS_H
#define TP_TORCH_RUNS_H

#include "torch/tensor.h"

extern "C" {
#include "pack/compact.h"
#include "pack/shard.h"
}

namespace tp
{

inline tp_shard_cut
make_cut(int64_t outer, int64_t size, int64_t inner, const std::vector<int64_t> &runs)
{
    return {outer, size, inner, 0, runs.data(), static_cast<int64_t>(runs.size())};
}

inline void
check_cut(const tp_shard_cut &cut, int64_t full_items, int64_t shard_items,
          bool disjoint)
{
    tp_error err = TP_NO_ERROR;
    if (tp_shard_check(&cut, full_items, shard_items, &err) < 0)
        raise(&err);
    if (disjoint && tp_shard_disjoint(&cut, &err) < 0)
        raise(&err);
}

inline int64_t
count_items(const std::vector<int64_t> &shape)
{
    int64_t items = 1;
    for (const int64_t size : shape)
        require(size >= 0 && !__builtin_mul_overflow(items, size, &items),
                "the shape of the shard has a negative size or too many elements");
    return items;
}

// What packs `full` to a shard of `shape`.
inline tp_shard_cut
packing(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
        const std::vector<int64_t> &runs, const std::vector<int64_t> &shape)
{
    tp_shard_cut cut = make_cut(outer, size, inner, runs);
    check_cut(cut, full.numel(), count_items(shape), false);
    require(full.is_contiguous(), "pack takes a contiguous full tensor");
    cut.item = static_cast<int64_t>(full.element_size());
    return cut;
}

// The runs of many tensors as one list of integers: for each of them outer, size,
// inner, the number of values in its runs, the number of its dimensions, the runs, the
// shape.
class RunsTable
{
   public:
    explicit RunsTable(const std::vector<int64_t> &values) : values_(values)
    {
    }

    // Reads the next entry and checks it for `full`; `shape` and what the result
    // borrows are valid until the next call.
    tp_shard_cut next(const Tensor &full)
    {
        const std::vector<int64_t> head = read(5);
        runs_ = read(head[3]);
        shape = read(head[4]);
        return packing(full, head[0], head[1], head[2], runs_, shape);
    }

    void require_end() const
    {
        require(at_ == values_.size(),
                "the table of cuts goes on behind the last tensor");
    }

    std::vector<int64_t> shape;

   private:
    std::vector<int64_t> read(int64_t count)
    {
        require(count >= 0 && static_cast<uint64_t>(count) <= values_.size() - at_,
                "the table of cuts ends early");
        const auto from = values_.begin() + static_cast<std::ptrdiff_t>(at_);
        at_ += static_cast<size_t>(count);
        return {from, from + static_cast<std::ptrdiff_t>(count)};
    }

    const std::vector<int64_t> &values_;
    std::vector<int64_t> runs_;
    size_t at_ = 0;
};

}  // namespace tp

#endif
