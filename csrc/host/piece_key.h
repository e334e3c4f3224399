// Pre-tokens as numbers: two words are compared, and hashed, at once.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace megascratch::bpe {

typedef uint64_t Words __attribute__((vector_size(16), aligned(8)));

inline Words load_words(const void* at) {
    Words words;
    std::memcpy(&words, at, sizeof words);
    return words;
}

/// All bits where two pairs of words differ, else none. A `bool` would make compilers branch on it.
inline uint32_t differ(Words a, Words b) {
#if defined(__SSE2__)
    const int equal = _mm_movemask_pd(_mm_castsi128_pd(__m128i(a == b)));  // a bit a word
    return uint32_t((equal - 3) >> 31);
#else
    return 0 - uint32_t(((a[0] ^ b[0]) | (a[1] ^ b[1])) != 0);
#endif
}

/// A hash of two words, in which every bit of theirs has its part.
inline uint64_t hash_of(Words words) {
#if defined(__AES__)  // two rounds of the cipher do that, and leave the arithmetic units to others
    const __m128i round_key = _mm_set_epi64x(int64_t(0x9e3779b97f4a7c15ULL), int64_t(0xd6e8feb86659fd93ULL));
    return uint64_t(_mm_cvtsi128_si64(_mm_aesenc_si128(_mm_aesenc_si128(__m128i(words), round_key), round_key)));
#else
    const unsigned __int128 product =
        (unsigned __int128)(words[0] ^ 0x9e3779b97f4a7c15ULL) * (words[1] ^ 0xd6e8feb86659fd93ULL);
    return uint64_t(product) ^ uint64_t(product >> 64);
#endif
}

/// A pre-token of 1 to 15 bytes, with its length in the sixteenth; zeros for a longer one.
struct PieceKey {
    static constexpr size_t kMaxBytes = 15;
    Words words{};

    PieceKey() = default;
    /// The key of a piece behind whose beginning 16 bytes may be read, whatever its length: nobody can guess that, so
    /// nothing branches on it.
    PieceKey(const uint8_t* piece, size_t length) : PieceKey(load_words(piece), length) {}
    /// Args: readable_end: where reading must stop, at or after the end of the piece.
    PieceKey(const uint8_t* piece, size_t length, const uint8_t* readable_end)
        : PieceKey(readable_end - piece >= 16 ? load_words(piece) : load_until(piece, readable_end), length) {}

    bool operator==(const PieceKey& other) const { return differ(words, other.words) == 0; }
    explicit operator bool() const { return words[1] != 0; }
    size_t length() const { return size_t(words[1] >> 56); }
    uint64_t hash() const { return hash_of(words); }
    const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(this); }

  private:
    PieceKey(Words read, size_t length) {
        const Shape& shape = kShapes[std::min<size_t>(length, kMaxBytes + 1)];
        words = (read & load_words(shape.kept)) | load_words(shape.length);
    }
    [[gnu::noinline]] static Words load_until(const uint8_t* at, const uint8_t* end) {
        Words words{};
        std::memcpy(&words, at, size_t(end - at));
        return words;
    }

    /// By the length of a piece: the bits that are its own, and the length where it goes.
    struct Shape {
        uint64_t kept[2], length[2];
    };
    static constexpr std::array<Shape, kMaxBytes + 2> shapes() {
        std::array<Shape, kMaxBytes + 2> made{};
        for (size_t n = 0; n <= kMaxBytes; ++n) {
            for (size_t byte = 0; byte < n; ++byte) made[n].kept[byte / 8] |= uint64_t(0xFF) << byte % 8 * 8;
            made[n].length[1] = uint64_t(n) << 56;
        }
        return made;
    }
    static const std::array<Shape, kMaxBytes + 2> kShapes;
};
inline constexpr std::array<PieceKey::Shape, PieceKey::kMaxBytes + 2> PieceKey::kShapes = PieceKey::shapes();

/// A pre-token on its way.
struct ScannedPiece {
    const uint8_t* at;
    size_t length;
    PieceKey key;   // of a short one
    uint64_t hash;  // of the key; of a longer one, of its length and its first and last 16 bytes

    ScannedPiece() = default;
    ScannedPiece(const uint8_t* begin, const uint8_t* end, const uint8_t* readable_end)
        : at(begin), length(size_t(end - begin)), key(begin, length, readable_end) {
        if (length <= PieceKey::kMaxBytes) {
            hash = key.hash();
        } else {
            const uint64_t last = hash_of(load_words(end - 16));
            hash = hash_of(load_words(begin) ^ Words{last, length});
        }
    }

    std::string_view view() const { return {reinterpret_cast<const char*>(at), length}; }
};

}  // namespace megascratch::bpe
