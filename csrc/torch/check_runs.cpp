// SPDX-License-Identifier: Apache-2.0
// check_runs.cpp -- the operator that checks runs where torch copies them itself.
#include "torch/runs.h"

namespace
{

using namespace tp;

void
check(int64_t outer, int64_t size, int64_t inner, std::vector<int64_t> runs,
      int64_t full_items, int64_t shard_items, bool disjoint)
{
    check_view(make_view(outer, size, inner, runs), full_items, shard_items, disjoint);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeed_autotp, m)
{
    m.def(
        "check(int outer, int size, int inner, int[] runs, int full_items,"
        " int shard_items, bool disjoint) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeed_autotp, CompositeExplicitAutograd, m)
{
    m.impl("check", TORCH_BOX(&check));
}
