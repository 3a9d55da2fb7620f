// bf16.h - bfloat16, the number format of weights: the upper half of an IEEE float.
#pragma once

#include <bit>
#include <cstdint>

namespace speed {

struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

}  // namespace speed
