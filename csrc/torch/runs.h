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

inline tp_shard_view
make_view(int64_t outer, int64_t size, int64_t inner, const std::vector<int64_t> &runs)
{
    return {outer, size, inner, 0, runs.data(), static_cast<int64_t>(runs.size())};
}

inline void
check_view(const tp_shard_view &view, int64_t full_items, int64_t shard_items,
           bool disjoint)
{
    tp_error err = TP_NO_ERROR;
    if (tp_shard_check(&view, full_items, shard_items, &err) < 0)
        raise(&err);
    if (disjoint && tp_shard_disjoint(&view, &err) < 0)
        raise(&err);
}

inline int64_t
count_items(const std::vector<int64_t> &shape)
{
    int64_t items = 1;
    for (const int64_t size : shape)
        require(size >= 0 && !__builtin_mul_overflow(items, size, &items),
                "shape has a negative size, or 2^63 elements or more");
    return items;
}

// The runs that pack `full` to a shard of `shape`.
inline tp_shard_view
view_to_pack(const Tensor &full, int64_t outer, int64_t size, int64_t inner,
             const std::vector<int64_t> &runs, const std::vector<int64_t> &shape)
{
    tp_shard_view view = make_view(outer, size, inner, runs);
    check_view(view, full.numel(), count_items(shape), false);
    require(full.is_contiguous(),
            "full is not contiguous; call full.contiguous() first");
    view.item = static_cast<int64_t>(full.element_size());
    return view;
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
    tp_shard_view next(const Tensor &full)
    {
        const std::vector<int64_t> head = read(5);
        runs_ = read(head[3]);
        shape = read(head[4]);
        return view_to_pack(full, head[0], head[1], head[2], runs_, shape);
    }

    void require_end() const
    {
        require(at_ == values_.size(),
                "slices has entries for more tensors than fulls has");
    }

    std::vector<int64_t> shape;

   private:
    std::vector<int64_t> read(int64_t count)
    {
        require(count >= 0 && static_cast<uint64_t>(count) <= values_.size() - at_,
                "slices has entries for fewer tensors than fulls has");
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
