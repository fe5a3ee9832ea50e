// A stand-in for what wgmma.py writes.
#pragma once

template <int N> DEVICE void multiply_registers(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u64 x) { machine::multiply_registers<N>(d, a0, a1, a2, a3, x, false); }
template <int N> DEVICE void begin_registers(float *d, u32 a0, u32 a1, u32 a2, u32 a3, u64 x) { machine::multiply_registers<N>(d, a0, a1, a2, a3, x, true); }
template <int N> DEVICE void multiply_shared(float *d, u64 w, u64 x) { machine::multiply_shared<N>(d, w, x, false); }

template <int N> DEVICE void multiply_stage(float *d, u64 w, u64 x) {
    for (int k = 0; k < 4; k++) machine::multiply_shared<N>(d, w + 2 * k, x + 2 * k, k == 0);
    products_wait<0>();
}
