// simd.h - SIMD helpers for the CPU's fast operations: the processor's vectors, sums of products, e^x.
//
// GCC's and clang's vector extensions: + and * work on all lanes at once; a float operand is broadcast to all lanes.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../base/bf16.h"

namespace speed::fast {

// The widest vector of floats that the program is compiled for.
#if defined(__AVX512F__)
constexpr size_t lanes = 16;
#elif defined(__AVX__)
constexpr size_t lanes = 8;
#else
constexpr size_t lanes = 4;
#endif
typedef float Vector __attribute__((vector_size(lanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(sizeof(Vector))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vector load(const bf16* p) {
  typedef uint16_t Bits __attribute__((vector_size(lanes * sizeof(uint16_t))));
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return std::bit_cast<Vector>(__builtin_convertvector(bits, Words) << 16);
}

// The sum of the lanes of each of four vectors: four such sums cost little more than one.
inline Four sums(const Vector (&v)[4]) {
  Four x[4];
  for (size_t r = 0; r < 4; ++r) {
    const auto parts = std::bit_cast<std::array<Four, lanes / 4>>(v[r]);
    x[r] = parts[0];
    for (size_t i = 1; i < parts.size(); ++i) x[r] += parts[i];
  }
  auto pairs = [](Four a, Four b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  };
  return pairs(pairs(x[0], x[1]), pairs(x[2], x[3]));
}

// {w . x[0], ..., w . x[R-1]}          w [n]; x [R, n]
// With prefetching some lines ahead this is up to 1.7 times as fast, because the processor's own prefetcher stops at the end of
// each 4 KiB page. (A prefetch beyond the end of the file does nothing.) It prefetches one line at a time: a processor
// has only few loads in flight, and stalls when a whole row is requested at once.
template <size_t R>
std::array<float, R> dot(const bf16* w, const float* x, size_t n) {
  constexpr size_t line = 32, near = 256, far = 2048;  // in weights of 2 bytes: a cache line, two distances ahead
  Vector sum[R][line / lanes] = {};
  size_t i = 0;
  for (; i + line <= n; i += line) {
    __builtin_prefetch(w + i + far, 0, 2);  // to the second-level cache
    __builtin_prefetch(w + i + near);
    for (size_t j = 0; j < line / lanes; ++j) {
      const Vector wide = load(w + i + j * lanes);
      for (size_t r = 0; r < R; ++r) sum[r][j] += wide * load(x + r * n + i + j * lanes);
    }
  }
  std::array<float, R> all = {};
  for (size_t r = 0; r < R; ++r) {
    for (size_t j = 1; j < line / lanes; ++j) sum[r][0] += sum[r][j];
    for (size_t j = 0; j < lanes; ++j) all[r] += sum[r][0][j];
    for (size_t j = i; j < n; ++j) all[r] += to_float(w[j]) * x[r * n + j];
  }
  return all;
}

// use(r, w . x[r]) for every row r of x [rows, n], R of them at once; how many are at once changes no bit.
template <size_t R = 4, class Use>
void dots(const bf16* w, const float* x, size_t rows, size_t n, Use use, size_t r = 0) {
  for (; r + R <= rows; r += R) {
    const std::array<float, R> sums = dot<R>(w, x + r * n, n);
    for (size_t i = 0; i < R; ++i) use(r + i, sums[i]);
  }
  if constexpr (R > 1) dots<R - 1>(w, x, rows, n, use, r);
}

// e^x to 2 ulp, of a number or of each lane of a vector, in steps that the compiler can vectorise, unlike std::exp (GCC also
// needs -fno-trapping-math): e^x = 2^n e^r with |r| <= ln2 / 2, e^r by its polynomial (Cephes). It is 0
// below -87, and stays at e^88 above 88; NaN stays NaN.
template <class T>
T exp(T x) {
  using Bits = std::conditional_t<std::is_same_v<T, float>, uint32_t, Words>;
  x = x > 88.0f ? T{} + 88.0f : x;
  const T shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // rounds to a whole number
  const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  T p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  // The last bits of `shifted` are n; a conversion to int would not be defined where x is NaN.
  const T y = (p * r * r + r + 1.0f) * std::bit_cast<T>((std::bit_cast<Bits>(shifted) + 127) << 23);
  return x < -87.0f ? T{} : y;
}

}  // namespace speed::fast
