// C interface of the stream. What the arguments must be is checked by the caller in Python.

#include "stream.h"

namespace {

struct Handle {
    std::shared_ptr<sirius::Stream> stream;
    std::string text;
};

void keep(char* target, int64_t size, const std::string& text) {
    std::strncpy(target, text.c_str(), size_t(size) - 1);
    target[size - 1] = 0;
}

}  // namespace

extern "C" {

uint32_t sirius_crc32c(const void* data, int64_t size) { return sirius::crc32c(data, size_t(size)); }

// Groups lie at `offsets`; `counts` has how many pieces each has, `bytes` and `sums` size and checksum of all pieces, group
// by group. Returns null and a text in `error` if the file cannot be opened.
void* sirius_stream_open(const char* path, int64_t num_groups, const int64_t* offsets, const int64_t* counts,
                         const int64_t* bytes, const uint32_t* sums, void* const* slots, int num_slots, int num_threads,
                         double bytes_per_second, double patience_seconds, char* error, int64_t error_size) {
    std::vector<sirius::Group> groups;
    for (int64_t i = 0; i < num_groups; i++) {
        sirius::Group group{offsets[i], {}};
        int64_t start = 0;
        for (int64_t j = 0; j < counts[i]; start += *bytes, bytes++, sums++, j++) {
            group.pieces.push_back({start, *bytes, *sums, 0});
        }
        groups.push_back(std::move(group));
    }
    std::vector<char*> places;
    for (int i = 0; i < num_slots; i++) places.push_back(static_cast<char*>(slots[i]));
    auto stream =
        std::make_shared<sirius::Stream>(std::move(groups), std::move(places), bytes_per_second, patience_seconds);
    const std::string problem = stream->open(path);
    if (!problem.empty()) {
        keep(error, error_size, problem);
        return nullptr;
    }
    stream->started(num_threads);
    for (int i = 0; i < num_threads; i++) std::thread([stream] { stream->read(); }).detach();
    return new Handle{stream, {}};
}

const void* sirius_stream_wait(void* handle, int64_t group, int64_t end) {
    return static_cast<Handle*>(handle)->stream->wait(group, end);
}

void sirius_stream_release(void* handle, int64_t group) { static_cast<Handle*>(handle)->stream->release(group); }

int sirius_stream_direct(void* handle) { return static_cast<Handle*>(handle)->stream->direct(); }

void sirius_stream_error(void* handle, char* error, int64_t error_size) {
    keep(error, error_size, static_cast<Handle*>(handle)->stream->error());
}

void sirius_stream_statistics(void* handle, double* found) {
    const auto statistics = static_cast<Handle*>(handle)->stream->statistics();
    found[0] = statistics.bytes;
    found[1] = statistics.reading_seconds;
    found[2] = statistics.waiting_seconds;
    found[3] = statistics.rounds;
}

// Returns whether the slots may be freed: no thread writes to them any more.
int sirius_stream_close(void* handle) {
    auto* held = static_cast<Handle*>(handle);
    const bool ended = held->stream->close();
    delete held;
    return ended;
}

}  // extern "C"
