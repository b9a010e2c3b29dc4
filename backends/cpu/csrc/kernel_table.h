// The kernels that every instruction set offers; what one leaves null is its parent's (isa.cpp). One table of function pointers per folder csrc/<isa>.
//
// Rules for the files in those folders, which are compiled with flags that not every machine understands:
// * everything but the table is `static` or in an anonymous namespace, and nothing inline comes from a header that other
//   files include too (no standard library beyond <cstddef> and <cstdint>): the linker keeps one copy of an inline
//   function, and it may be the copy that only some machines can run;
// * nothing runs before `main` (no global constructors);
// * the scalar file is the specification: the others are tested against it at every length and alignment.
#pragma once

#include <cstddef>
#include <cstdint>

namespace graphwright {

struct ByteLinear;
struct ByteRowsKernels;
struct FloatLinearKernels;
struct KronKernels;
struct AttentionKernels;
struct RowKernels;
struct SparseByteKernels;
struct SparseFloatKernels;

struct KernelTable {
  // The exact sum of a[i] * b[i]. No alignment is asked for. n <= kMaxDotLength.
  std::int32_t (*dot_u8s8)(const std::uint8_t* a, const std::int8_t* b, std::size_t n) = nullptr;
  const ByteLinear* byte_linear = nullptr;     // linear_kernels.h
  const ByteRowsKernels* byte_rows = nullptr;
  const FloatLinearKernels* float_linear = nullptr;  // float_linear_kernels.h
  const KronKernels* kron_linear = nullptr;          // kron_kernels.h
  const AttentionKernels* attention = nullptr;       // attention_kernels.h
  const RowKernels* rows = nullptr;                  // row_kernels.h
  const SparseByteKernels* sparse_bytes = nullptr;   // sparse_linear_kernels.h
  const SparseFloatKernels* sparse_floats = nullptr;
};

// 65536 * 255 * 128 < 2^31: a sum of this many products cannot overflow.
inline constexpr std::size_t kMaxDotLength = 65536;

namespace scalar { extern const KernelTable kernels; }
namespace neon { extern const KernelTable kernels; }
namespace avx2 { extern const KernelTable kernels; }
namespace avx_vnni { extern const KernelTable kernels; }
namespace avx512 { extern const KernelTable kernels; }
namespace avx512_vnni { extern const KernelTable kernels; }
namespace avx512_vbmi2 { extern const KernelTable kernels; }
namespace avx512_bf16 { extern const KernelTable kernels; }
namespace amx { extern const KernelTable kernels; }

}  // namespace graphwright
