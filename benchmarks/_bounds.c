/* What the machine can do at most, measured beside the kernels: reading memory, and INT8 dot products and fp32
 * multiply-adds in registers. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

/* Reads n bytes (a multiple of 512) once; the result keeps the loop alive. */
int64_t read_bytes(const uint8_t* data, size_t n) {
  __m512i sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = _mm512_setzero_si512();
  for (size_t at = 0; at < n; at += 512) {
    for (int i = 0; i < 8; ++i) sum[i] = _mm512_or_si512(sum[i], _mm512_load_si512(data + at + 64 * i));
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm512_or_si512(sum[0], sum[i]);
  return _mm512_reduce_or_epi64(sum[0]);
}

/* 24 independent chains of u8 x s8 dot products, `steps` times: 24 * 64 multiply-accumulates a step. */
void dot_products(size_t steps) {
  __asm__ volatile(
      "1:\n"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"
      "vpdpbusd %%zmm30, %%zmm31, %%zmm\\i\n"
      ".endr\n"
      "dec %0\n"
      "jnz 1b\n"
      : "+r"(steps)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm30", "xmm31");
}

/* 24 independent chains of fp32 multiply-adds, `steps` times: 24 * 16 multiply-accumulates a step. */
void multiply_adds(size_t steps) {
  __asm__ volatile(
      "vpxorq %%zmm30, %%zmm30, %%zmm30\n"
      "vpxorq %%zmm31, %%zmm31, %%zmm31\n"
      "1:\n"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"
      "vfmadd231ps %%zmm30, %%zmm31, %%zmm\\i\n"
      ".endr\n"
      "dec %0\n"
      "jnz 1b\n"
      : "+r"(steps)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm30", "xmm31");
}
