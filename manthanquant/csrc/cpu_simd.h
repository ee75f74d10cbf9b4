// Vectors of the widest kind that the target has, in the compiler's own vector types, and conversions of float formats.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mq::cpu {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < kWidth; ++i) total += v[i];
    return total;
}

inline float maximum(Floats v) {
    float most = v[0];
    for (int i = 1; i < kWidth; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// 2^x to 2 units in the last place; 0 below 2^-126, so that -infinity gives 0.
inline Floats exp2(Floats x) {
    const Floats clamped = maximum(x, broadcast(-126.0f));
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const Floats shifted = clamped + to_integer;
    const Floats f = clamped - (shifted - to_integer);  // in [-0.5, 0.5]
    Floats poly = broadcast(1.5403530e-4f);             // Taylor's series of 2^f
    poly = poly * f + 1.3333558e-3f;
    poly = poly * f + 9.6181291e-3f;
    poly = poly * f + 5.5504109e-2f;
    poly = poly * f + 2.4022651e-1f;
    poly = poly * f + 6.9314718e-1f;
    poly = poly * f + 1.0f;
    const Ints exponent = (Ints)shifted << 23;
    const Floats scaled = (Floats)((Ints)poly + exponent);
    return x < -126.0f ? broadcast(0.0f) : scaled;
}

inline Floats tanh(Floats x) {
    const Floats e = exp2((x < 20.0f ? x : broadcast(20.0f)) * 2.8853900818f);  // e^2x, kept from overflowing
    return 1.0f - 2.0f / (e + 1.0f);
}

// -- float formats ----------------------------------------------------------------------------------------------------

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float from_bfloat16(uint16_t x) { return float_of(uint32_t{x} << 16); }

inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    return x != x ? 0x7fc0 : uint16_t(rounded);
}

inline float from_half(uint16_t h) {
    const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
    const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN
    const uint32_t subnormal = bits_of(float(h & 0x3ff) * 0x1p-24f);    // no fp32 subnormal on the way: they may be off
    const uint32_t value = (h & 0x7c00) == 0 ? subnormal : (magnitude + (112u << 23)) | special;
    return float_of(value | uint32_t(h & 0x8000) << 16);
}

inline uint16_t to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) {                                  // subnormal: the sum's low bits are the result
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    }
    return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// `count` elements of any dtype, `stride` elements apart, to fp32.
inline void read_row(const void* from, Dtype dtype, int64_t stride, int count, float* to) {
    const auto* halves = static_cast<const uint16_t*>(from);
    const auto* floats = static_cast<const float*>(from);
    if (dtype == Dtype::kFloat32) {
        for (int i = 0; i < count; ++i) to[i] = floats[i * stride];
    } else if (dtype == Dtype::kFloat16) {
        for (int i = 0; i < count; ++i) to[i] = from_half(halves[i * stride]);
    } else if (stride == 1) {
        for (int i = 0; i < count; ++i) to[i] = from_bfloat16(halves[i]);
    } else {
        for (int i = 0; i < count; ++i) to[i] = from_bfloat16(halves[i * stride]);
    }
}

inline void write_row(const float* from, Dtype dtype, int64_t stride, int count, void* to) {
    auto* halves = static_cast<uint16_t*>(to);
    auto* floats = static_cast<float*>(to);
    if (dtype == Dtype::kFloat32) {
        for (int i = 0; i < count; ++i) floats[i * stride] = from[i];
    } else if (dtype == Dtype::kFloat16) {
        for (int i = 0; i < count; ++i) halves[i * stride] = to_half(from[i]);
    } else {
        for (int i = 0; i < count; ++i) halves[i * stride] = to_bfloat16(from[i]);
    }
}

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// -- dense products ---------------------------------------------------------------------------------------------------

// Calls `body(integral_constant rows, first)` for four rows at a time, then for the rest at once.
template <class Body>
inline void for_rows(int first, int last, const Body& body) {
    for (; first + 4 <= last; first += 4) body(std::integral_constant<int, 4>(), first);
    switch (last - first) {
        case 3: return body(std::integral_constant<int, 3>(), first);
        case 2: return body(std::integral_constant<int, 2>(), first);
        case 1: return body(std::integral_constant<int, 1>(), first);
    }
}

template <int kRows, int kVectors>
inline void product_block(const float* const* a, int depth, const float* b, int64_t b_stride, float* const* out,
                          int column, bool add) {
    Floats sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? load(out[r] + column + v * kWidth) : Floats{};
    }
    for (int k = 0; k < depth; ++k) {
        for (int v = 0; v < kVectors; ++v) {
            const Floats row = load(b + k * b_stride + column + v * kWidth);
            for (int r = 0; r < kRows; ++r) sums[r][v] += a[r][k] * row;
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) store(out[r] + column + v * kWidth, sums[r][v]);
    }
}

// out[r] (+)= a[r] [depth] @ b [depth, columns], for kRows rows; `columns` is a multiple of kWidth.
template <int kRows>
inline void product(const float* const* a, int depth, const float* b, int64_t b_stride, int columns, float* const* out,
                    bool add) {
    int column = 0;
    for (; column + 2 * kWidth <= columns; column += 2 * kWidth) {
        product_block<kRows, 2>(a, depth, b, b_stride, out, column, add);
    }
    if (column < columns) product_block<kRows, 1>(a, depth, b, b_stride, out, column, add);
}

// out [rows, kSize] = x [rows, kSize] @ matrix [kSize, kSize], all contiguous.
template <int kSize>
inline void multiply(const float* x, int rows, const float* matrix, float* out) {
    for_rows(0, rows, [&](auto count, int first) {
        const float* a[count()];
        float* to[count()];
        for (int r = 0; r < count(); ++r) {
            a[r] = x + (first + r) * kSize;
            to[r] = out + (first + r) * kSize;
        }
        product<count()>(a, kSize, matrix, kSize, kSize, to, false);
    });
}

}  // namespace mq::cpu
