// SPDX-License-Identifier: Apache-2.0
// handles.h -- objects that Python knows by a handle, which is never given twice.
#ifndef TP_HANDLES_H
#define TP_HANDLES_H

#include <map>
#include <memory>
#include <mutex>

#include "torch/tensor.h"

namespace tp
{

// The open objects of one type by their handles. Its user keeps an object open
// meanwhile.
template <typename Item>
class Handles
{
   public:
    // `closed` is the error for a handle that is not open any more.
    explicit Handles(const char *closed) : closed_(closed)
    {
    }

    int64_t add(std::shared_ptr<Item> item)
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        open_[++last_] = std::move(item);
        return last_;
    }

    std::shared_ptr<Item> find(int64_t handle)
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = open_.find(handle);
        require(found != open_.end(), closed_);
        return found->second;
    }

    // Removed first, so that no other thread waits while the object closes.
    void remove(int64_t handle)
    {
        std::shared_ptr<Item> item;
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto node = open_.extract(handle);
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
