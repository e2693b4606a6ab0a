/* What NEON's files share. */
#ifndef MG_NEON_H
#define MG_NEON_H
#include "kernels.h"

#include <arm_neon.h>

/* 2^x for x <= 0; 0 below -126 */
MG_INLINE float32x4_t exp2_of(float32x4_t x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    float32x4_t lowest = vdupq_n_f32(-126.0f);
    uint32x4_t normal = vcgtq_f32(x, lowest);
    x = vmaxq_f32(x, lowest);
    float32x4_t n = vrndnq_f32(x), f = vsubq_f32(x, n), p = vdupq_n_f32(c[5]);
    MG_UNROLL
    for (int i = 4; i >= 0; i--)
        p = vfmaq_f32(vdupq_n_f32(c[i]), p, f);
    uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(n)), 23);
    return vreinterpretq_f32_u32(vandq_u32(normal, vaddq_u32(vreinterpretq_u32_f32(p), power)));
}

#endif
