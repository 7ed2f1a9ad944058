// CRC-32C (Castagnoli) of a piece of memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

namespace sirius {

#if defined(__SSE4_2__)

inline uint32_t crc32c(const void* data, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    uint64_t crc = 0xffffffffu;
    for (; size >= 8; bytes += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, bytes, 8);
        crc = _mm_crc32_u64(crc, word);
    }
    for (; size > 0; bytes++, size--) crc = _mm_crc32_u8(uint32_t(crc), *bytes);
    return uint32_t(crc) ^ 0xffffffffu;
}

#else

inline const std::array<uint32_t, 256>& crc32c_table() {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> made{};
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; bit++) value = (value >> 1) ^ ((value & 1) ? 0x82f63b78u : 0u);
            made[i] = value;
        }
        return made;
    }();
    return table;
}

inline uint32_t crc32c(const void* data, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    const auto& table = crc32c_table();
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < size; i++) crc = (crc >> 8) ^ table[(crc ^ bytes[i]) & 255u];
    return crc ^ 0xffffffffu;
}

#endif

}  // namespace sirius
