// Memory that calls need for a moment.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace sirius {

// Grows to the largest size the calling thread has needed and is kept, so that steady calls allocate nothing. There is one
// for every T.
template <typename T>
T* workspace(int64_t count) {
    static thread_local std::vector<T> storage;
    constexpr int64_t kSlack = 64 / sizeof(T) + 1;
    if (int64_t(storage.size()) < count + kSlack) storage.resize(count + kSlack);
    void* start = storage.data();
    size_t space = storage.size() * sizeof(T);
    return static_cast<T*>(std::align(64, count * sizeof(T), start, space));
}

}  // namespace sirius
