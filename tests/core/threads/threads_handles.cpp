// SPDX-License-Identifier: Apache-2.0
// Handles that threads add, find and remove at once: an object is closed once, by the
// last that has it, and a handle is never given twice.
#include <atomic>
#include <cstdio>
#include <set>
#include <thread>
#include <vector>

#include "torch/handles.h"

namespace
{

constexpr int kThreads = 4;
constexpr int kRounds = 2000;

struct Object {
    explicit Object(std::atomic<int> &count) : open(count)
    {
        open++;
    }

    ~Object()
    {
        value = -1;
        open--;
    }

    std::atomic<int> &open;
    int value = 7;
};

// What a thread found wrong, and the handles that it was given.
struct Outcome {
    int wrong = 0;
    std::vector<int64_t> handles;
};

bool
is_closed(tp::Handles<Object> &handles, int64_t handle)
{
    try {
        handles.find(handle);
    } catch (const std::invalid_argument &) {
        return true;
    }
    return false;
}

void
work(tp::Handles<Object> &handles, std::atomic<int> &open, int64_t common,
     Outcome &outcome)
{
    for (int i = 0; i < kRounds; i++) {
        const int64_t handle = handles.add(std::make_shared<Object>(open));
        outcome.handles.push_back(handle);
        const std::shared_ptr<Object> own = handles.find(handle);
        const std::shared_ptr<Object> shared = handles.find(common);
        handles.remove(handle);
        handles.remove(handle);
        outcome.wrong += !is_closed(handles, handle);
        outcome.wrong += own->value != 7 || shared->value != 7;
    }
}

}  // namespace

int
main()
{
    std::atomic<int> open{0};
    int wrong = 0;
    std::set<int64_t> given;
    {
        tp::Handles<Object> handles("closed");
        const int64_t common = handles.add(std::make_shared<Object>(open));
        std::vector<Outcome> outcomes(kThreads);
        std::vector<std::thread> threads;
        for (int i = 0; i < kThreads; i++)
            threads.emplace_back([&, i] {
                work(handles, open, common, outcomes[static_cast<size_t>(i)]);
            });
        for (std::thread &thread : threads)
            thread.join();
        wrong += open != 1;
        for (const Outcome &outcome : outcomes) {
            wrong += outcome.wrong;
            given.insert(outcome.handles.begin(), outcome.handles.end());
        }
    }
    wrong += open != 0 || given.size() != static_cast<size_t>(kThreads) * kRounds;
    std::printf("threads_handles.cpp: %d checks, %d failed\n", kThreads * kRounds,
                wrong);
    return wrong == 0 ? 0 : 1;
}
