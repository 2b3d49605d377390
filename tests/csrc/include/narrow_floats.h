// What are float16 and bfloat16 on the host?
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

// A binary floating-point number of 16 bits, rounded to nearest, ties to even, once from whatever it is made of.
template <int exponent_bits>
struct NarrowFloat {
  uint16_t bits;

  static constexpr int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1, lowest = 1 - bias;
  static constexpr uint16_t infinity = ((1 << exponent_bits) - 1) << mantissa_bits;

  static NarrowFloat of(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) {
      return {static_cast<uint16_t>(sign | 0x7FFF)};
    }
    if (std::isinf(x)) {
      return {static_cast<uint16_t>(sign | infinity)};
    }
    const int exponent = x == 0 ? lowest : std::max(std::ilogb(x), lowest);
    // The leading bit, where the number is normal, adds 1 to the exponent's field; rounding up to a power of two adds another.
    const double spacings = std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent));
    const double magnitude = std::ldexp(double(exponent - lowest), mantissa_bits) + spacings;
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::min<double>(magnitude, infinity)))};
  }

  double value() const {
    const int field = (bits & infinity) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
    const double magnitude = (bits & infinity) == infinity ? (mantissa ? NAN : INFINITY)
                             : field == 0                  ? std::ldexp(mantissa, lowest - mantissa_bits)
                                          : std::ldexp(mantissa + (1 << mantissa_bits), field - bias - mantissa_bits);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
};
