// Groups of bytes of a file, one after the other and round and round, read ahead into a few slots of memory.
//
// Threads read pieces in order. A slot is filled again once its group was released; a group is used while it is still being
// read, as far as it has come. Whoever asks for another group than the next one starts a new round there.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "crc32c.h"
#include "file.h"

namespace sirius {

using Clock = std::chrono::steady_clock;

struct Piece {
    int64_t start;  // in the group
    int64_t bytes;
    uint32_t sum;  // CRC-32C
    uint8_t checked;
};

struct Group {
    int64_t offset;  // in the file
    std::vector<Piece> pieces;
};

struct StreamStatistics {
    double bytes = 0;
    double reading_seconds = 0;  // while at least one thread was reading
    double waiting_seconds = 0;  // of whoever asked for bytes that had not come
    double rounds = 0;
};

class Stream {
public:
    Stream(std::vector<Group> groups, std::vector<char*> slots, double bytes_per_second, double patience_seconds)
        : groups_(std::move(groups)), slots_(std::move(slots)), rate_(bytes_per_second), patience_(patience_seconds),
          ready_(slots_.size()), reading_(slots_.size()) {}

    std::string open(const char* path) { return file_.open(path); }
    bool direct() const { return file_.direct(); }

    // The body of a reading thread; ends when the stream is closed or has failed.
    void read() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            Task task;
            can_read_.wait(lock, [&] { return closed_ || !error_.empty() || take(task); });
            if (closed_ || !error_.empty()) break;
            if (in_flight_++ == 0) busy_since_ = Clock::now();
            lock.unlock();
            const std::string error = read_piece(task);
            lock.lock();
            finish(task, error);
        }
        num_threads_--;
        changed_.notify_all();
    }

    // Where the group lies once its first `end` bytes are there; null if they will never be, see `error`.
    const char* wait(int64_t group, int64_t end) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (group_of(released_) != group && group_of(released_ + 1) == group) advance();
        if (group_of(released_) != group && !seek(lock, group)) return nullptr;
        const auto started = Clock::now();
        while (error_.empty() && !is_ready(group, end)) {
            const auto waited_for = num_done_;
            const auto since = std::max(started, last_progress_);
            const auto until = since + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(patience_));
            if (changed_.wait_until(lock, until) == std::cv_status::timeout && waited_for == num_done_ && error_.empty())
                fail(file_.path() + ": the disk gave nothing for " + std::to_string(int(patience_)) + " s");
        }
        statistics_.waiting_seconds += seconds_since(started);
        return error_.empty() ? slots_[released_ % slots_.size()] : nullptr;
    }

    // The group that was waited for is not needed any more.
    void release(int64_t group) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (group_of(released_) == group) advance();
    }

    std::string error() {
        std::lock_guard<std::mutex> lock(mutex_);
        return error_;
    }

    StreamStatistics statistics() {
        std::lock_guard<std::mutex> lock(mutex_);
        StreamStatistics found = statistics_;
        if (in_flight_ > 0) found.reading_seconds += seconds_since(busy_since_);
        return found;
    }

    void started(int num_threads) { num_threads_ = num_threads; }

    // Ends the threads. Returns whether all of them are gone: a disk that does not answer holds them.
    bool close() {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        can_read_.notify_all();
        closing_.notify_all();
        return changed_.wait_for(lock, std::chrono::seconds(5), [&] { return num_threads_ == 0; });
    }

private:
    struct Task {
        int64_t sequence;  // number of the filling
        int64_t group;
        size_t piece;
    };

    static double seconds_since(Clock::time_point then) {
        return std::chrono::duration<double>(Clock::now() - then).count();
    }

    int64_t group_of(int64_t sequence) const { return (sequence + shift_) % int64_t(groups_.size()); }

    void advance() {
        if (group_of(released_) + 1 == int64_t(groups_.size())) statistics_.rounds++;
        released_++;
        can_read_.notify_all();
    }

    bool is_ready(int64_t group, int64_t end) const {
        if (released_ >= filling_end_) return false;
        const auto& ready = ready_[released_ % slots_.size()];
        const auto& pieces = groups_[group].pieces;
        for (size_t i = 0; i < pieces.size() && pieces[i].start < end; i++) {
            if (!ready[i]) return false;
        }
        return true;
    }

    size_t pieces_of_last_filling() const {
        return filling_end_ == 0 ? 0 : groups_[group_of(filling_end_ - 1)].pieces.size();
    }

    // The next piece to be read, if there is room for it.
    bool take(Task& task) {
        if (seeking_) return false;
        if (next_piece_ == pieces_of_last_filling()) {
            if (filling_end_ >= released_ + int64_t(slots_.size())) return false;
            // A group may have been given up before all of it had come: what is on its way would land in the next filling.
            if (reading_[filling_end_ % slots_.size()] > 0) return false;
            ready_[filling_end_ % slots_.size()].assign(groups_[group_of(filling_end_)].pieces.size(), 0);
            filling_end_++;
            next_piece_ = 0;
        }
        task = {filling_end_ - 1, group_of(filling_end_ - 1), next_piece_++};
        reading_[task.sequence % slots_.size()]++;
        return true;
    }

    std::string read_piece(const Task& task) {
        if (task.group == 0 && task.piece == 0) {
            const std::string changed = file_.changed();
            if (!changed.empty()) return changed;
        }
        Group& group = groups_[task.group];
        Piece& piece = group.pieces[task.piece];
        char* target = slots_[task.sequence % slots_.size()] + piece.start;
        const std::string error = file_.read(target, piece.bytes, group.offset + piece.start);
        if (!error.empty()) return error;
        if (!piece.checked) {
            if (crc32c(target, size_t(piece.bytes)) != piece.sum)
                return file_.path() + " is damaged at byte " + std::to_string(group.offset + piece.start) + " (checksum)";
            piece.checked = 1;
        }
        pause(piece.bytes);
        return {};
    }

    // Holds a thread back so that all of them together are no faster than they may be.
    void pause(int64_t bytes) {
        if (rate_ <= 0) return;
        Clock::time_point until;
        {
            std::lock_guard<std::mutex> lock(pace_mutex_);
            const auto span = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bytes / rate_));
            pace_ = std::max(pace_, Clock::now() - span) + span;
            until = pace_;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        closing_.wait_until(lock, until, [&] { return closed_; });
    }

    void finish(const Task& task, const std::string& error) {
        if (--in_flight_ == 0) statistics_.reading_seconds += seconds_since(busy_since_);
        if (--reading_[task.sequence % slots_.size()] == 0) can_read_.notify_all();
        if (!error.empty()) return fail(error);
        statistics_.bytes += double(groups_[task.group].pieces[task.piece].bytes);
        last_progress_ = Clock::now();
        num_done_++;
        if (!seeking_) ready_[task.sequence % slots_.size()][task.piece] = 1;
        changed_.notify_all();
        if (seeking_ && in_flight_ == 0) can_read_.notify_all();
    }

    // Begins a new round at a group; what is being read is waited for, because it lands in the slots.
    bool seek(std::unique_lock<std::mutex>& lock, int64_t group) {
        seeking_ = true;
        const bool idle = changed_.wait_for(lock, std::chrono::duration<double>(patience_), [&] { return in_flight_ == 0; });
        seeking_ = false;
        if (!idle) fail(file_.path() + ": the disk gave nothing for " + std::to_string(int(patience_)) + " s");
        if (!error_.empty()) return false;
        released_ = filling_end_;
        const int64_t count = int64_t(groups_.size());
        shift_ = ((group - released_) % count + count) % count;
        next_piece_ = pieces_of_last_filling();
        last_progress_ = Clock::now();
        can_read_.notify_all();
        return true;
    }

    void fail(const std::string& error) {
        if (error_.empty()) error_ = error;
        can_read_.notify_all();
        changed_.notify_all();
    }

    File file_;
    std::vector<Group> groups_;
    const std::vector<char*> slots_;
    const double rate_;      // bytes per second at most; 0 for no bound
    const double patience_;  // seconds without progress after which the disk counts as dead

    std::mutex mutex_;
    std::condition_variable can_read_;
    std::condition_variable changed_;
    std::condition_variable closing_;
    std::vector<std::vector<uint8_t>> ready_;  // pieces that have come, by slot
    std::vector<int> reading_;                 // pieces on their way, by slot
    int64_t released_ = 0;     // fillings that were used; also the number of the one in use
    int64_t filling_end_ = 0;  // fillings begun
    int64_t shift_ = 0;        // from the number of a filling to its group
    size_t next_piece_ = 0;    // of the last filling begun
    int64_t in_flight_ = 0;
    int64_t num_done_ = 0;
    int num_threads_ = 0;
    bool seeking_ = false;
    bool closed_ = false;
    std::string error_;
    Clock::time_point busy_since_{};
    Clock::time_point last_progress_{};
    StreamStatistics statistics_;

    std::mutex pace_mutex_;
    Clock::time_point pace_{};
};

}  // namespace sirius
