/* What the machine can do at most, measured beside the kernels: reading memory, and INT8 dot products and fp32
 * multiply-adds in registers. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define REGISTERS                                                                                                      \
  "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",      \
      "xmm13", "xmm14", "xmm15"

#ifdef __AVX512VNNI__

#define MORE_REGISTERS                                                                                                 \
  "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm30", "xmm31"
#define TIMES_24(text)                                                                                                 \
  "1:\n.irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n" text ".endr\ndec %0\njnz 1b\n"

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

/* 24 independent chains of u8 x s8 dot products, `steps` times. */
void dot_products(size_t steps) {
  __asm__ volatile(TIMES_24("vpdpbusd %%zmm30, %%zmm31, %%zmm\\i\n") : "+r"(steps) : : REGISTERS, MORE_REGISTERS);
}
size_t dot_operations(void) { return 24 * 64 * 2; }

/* 24 independent chains of fp32 multiply-adds, `steps` times. */
void multiply_adds(size_t steps) {
  __asm__ volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\nvpxorq %%zmm31, %%zmm31, %%zmm31\n" TIMES_24(
                       "vfmadd231ps %%zmm30, %%zmm31, %%zmm\\i\n")
                   : "+r"(steps)
                   :
                   : REGISTERS, MORE_REGISTERS);
}
size_t multiply_add_operations(void) { return 24 * 16 * 2; }

#else /* AVX2 */

#define TIMES_12(text) "1:\n.irp i,0,1,2,3,4,5,6,7,8,9,10,11\n" text ".endr\ndec %0\njnz 1b\n"

int64_t read_bytes(const uint8_t* data, size_t n) {
  __m256i sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_si256();
  for (size_t at = 0; at < n; at += 256) {
    for (int i = 0; i < 8; ++i) {
      sum[i] = _mm256_or_si256(sum[i], _mm256_load_si256((const __m256i*)(data + at + 32 * i)));
    }
  }
  for (int i = 1; i < 8; ++i) sum[0] = _mm256_or_si256(sum[0], sum[i]);
  return _mm256_extract_epi64(sum[0], 0) | _mm256_extract_epi64(sum[0], 1) | _mm256_extract_epi64(sum[0], 2) |
         _mm256_extract_epi64(sum[0], 3);
}

/* 12 independent chains of u8 x s8 products that are added up in 16 bits, which 4-bit codes allow for a while. */
void dot_products(size_t steps) {
  __asm__ volatile(TIMES_12("vpmaddubsw %%ymm14, %%ymm15, %%ymm13\nvpaddw %%ymm13, %%ymm\\i, %%ymm\\i\n")
                   : "+r"(steps)
                   :
                   : REGISTERS);
}
size_t dot_operations(void) { return 12 * 32 * 2; }

void multiply_adds(size_t steps) {
  __asm__ volatile("vpxor %%ymm14, %%ymm14, %%ymm14\nvpxor %%ymm15, %%ymm15, %%ymm15\n" TIMES_12(
                       "vfmadd231ps %%ymm14, %%ymm15, %%ymm\\i\n")
                   : "+r"(steps)
                   :
                   : REGISTERS);
}
size_t multiply_add_operations(void) { return 12 * 8 * 2; }

#endif
