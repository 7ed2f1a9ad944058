// A file that is read in large pieces: past the page cache where the file system can do that.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace sirius {

class File {
public:
    ~File() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }

    // Returns what went wrong, or nothing.
    std::string open(const char* path) {
        path_ = path;
        descriptor_ = ::open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
        direct_ = descriptor_ >= 0;
        if (!direct_) descriptor_ = ::open(path, O_RDONLY | O_CLOEXEC);
        if (descriptor_ < 0 || ::fstat(descriptor_, &opened_) != 0) return failed("cannot be opened");
        return {};
    }

    bool direct() const { return direct_; }
    int64_t size() const { return opened_.st_size; }

    // Reads exactly `size` bytes. Offsets, sizes and addresses are multiples of 4096. Returns what went wrong, or nothing.
    std::string read(void* target, int64_t size, int64_t offset) {
        int64_t done = 0;
        while (done < size) {
            const ssize_t count = ::pread(descriptor_, static_cast<char*>(target) + done, size - done, offset + done);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) return failed("cannot be read at byte " + std::to_string(offset + done));
            if (count == 0) return path_ + " ends at byte " + std::to_string(offset + done) + ", too early";
            done += count;
        }
        if (!direct_) ::posix_fadvise(descriptor_, offset, size, POSIX_FADV_DONTNEED);
        return {};
    }

    // Whether somebody wrote to the file since it was opened. Returns what was found, or nothing.
    std::string changed() const {
        struct stat now;
        if (::fstat(descriptor_, &now) != 0) return failed("cannot be looked at");
        const bool same = now.st_size == opened_.st_size && now.st_mtim.tv_sec == opened_.st_mtim.tv_sec &&
                          now.st_mtim.tv_nsec == opened_.st_mtim.tv_nsec;
        return same ? std::string() : path_ + " was changed while it was being read";
    }

    const std::string& path() const { return path_; }

private:
    std::string failed(const std::string& what) const { return path_ + " " + what + ": " + std::strerror(errno); }

    std::string path_;
    int descriptor_ = -1;
    bool direct_ = false;
    struct stat opened_ {};
};

}  // namespace sirius
