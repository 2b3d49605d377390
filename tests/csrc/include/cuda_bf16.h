// What stands for the toolkit's cuda_bf16.h on the host?
#pragma once
#include "narrow_floats.h"

struct __nv_bfloat16 : NarrowFloat<8> {};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {__nv_bfloat16::of(x)}; }
inline __nv_bfloat16 __double2bfloat16(double x) { return {__nv_bfloat16::of(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x.value()); }
