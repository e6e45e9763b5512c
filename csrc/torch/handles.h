// SPDX-License-Identifier: Apache-2.0
// handles.h -- what Python knows by a number that is never given twice.
//
// Included in csrc/torch alone. See pack.cpp.
#ifndef TP_BRIDGE_REGISTRY_H
#define TP_BRIDGE_REGISTRY_H

#include <map>
#include <memory>
#include <mutex>

#include "torch/tensor.h"

namespace tp
{

// What is open, by its number. Who uses it keeps it open until he is done.
template <typename Item>
class Registry
{
   public:
    // `closed` is the error for a number that is not open any more.
    explicit Registry(const char *closed) : closed_(closed)
    {
    }

    int64_t add(std::shared_ptr<Item> item)
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        open_[++last_] = std::move(item);
        return last_;
    }

    std::shared_ptr<Item> find(int64_t number)
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = open_.find(number);
        require(found != open_.end(), closed_);
        return found->second;
    }

    // Taken out first, so that nobody waits while it closes.
    void remove(int64_t number)
    {
        std::shared_ptr<Item> item;
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto node = open_.extract(number);
        if (!node.empty())
            item = std::move(node.mapped());
    }

   private:
    const char *closed_;
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<Item>> open_;
    int64_t last_ = 0;
};

}  // namespace tp

#endif
