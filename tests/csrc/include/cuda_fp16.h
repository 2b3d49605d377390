// What stands for the toolkit's cuda_fp16.h on the host?
#pragma once
#include "narrow_floats.h"

struct __half : NarrowFloat<5> {};

inline __half __float2half_rn(float x) { return {__half::of(x)}; }
inline __half __double2half(double x) { return {__half::of(x)}; }
inline float __half2float(__half x) { return static_cast<float>(x.value()); }
