#include "isa.h"

#include <array>
#include <stdexcept>

namespace graphwright {
namespace {

// The table of a folder, or null where GRAPHWRIGHT_HAVE_<ISA> (set by CMakeLists.txt) is 0.
#define TABLE_IF_1(isa) &isa::kernels
#define TABLE_IF_0(isa) nullptr
#define TABLE_IF(have, isa) TABLE_IF_(have, isa)
#define TABLE_IF_(have, isa) TABLE_IF_##have(isa)

constexpr Requirement kNeonFlags[] = {{"neon", &CpuFlags::neon}};
constexpr Requirement kAvx2Flags[] = {
    {"os_avx", &CpuFlags::os_avx}, {"avx2", &CpuFlags::avx2}, {"fma", &CpuFlags::fma}, {"f16c", &CpuFlags::f16c}};
constexpr Requirement kAvxVnniFlags[] = {{"avx_vnni", &CpuFlags::avx_vnni}};
constexpr Requirement kAvx512Flags[] = {{"os_avx512", &CpuFlags::os_avx512}, {"avx512f", &CpuFlags::avx512f},
                                        {"avx512bw", &CpuFlags::avx512bw},   {"avx512cd", &CpuFlags::avx512cd},
                                        {"avx512dq", &CpuFlags::avx512dq},   {"avx512vl", &CpuFlags::avx512vl}};
constexpr Requirement kAvx512VnniFlags[] = {{"avx512_vnni", &CpuFlags::avx512_vnni}};
constexpr Requirement kAvx512Vbmi2Flags[] = {{"avx512vbmi", &CpuFlags::avx512vbmi}, {"avx512_vbmi2", &CpuFlags::avx512_vbmi2}};
constexpr Requirement kAvx512Bf16Flags[] = {{"avx512_bf16", &CpuFlags::avx512_bf16}};
constexpr Requirement kAmxFlags[] = {{"os_amx", &CpuFlags::os_amx},
                                     {"amx_tile", &CpuFlags::amx_tile},
                                     {"amx_int8", &CpuFlags::amx_int8},
                                     {"amx_bf16", &CpuFlags::amx_bf16}};

const std::array<Isa, 9>& table() {
  static const std::array<Isa, 9> all = {{
      {"scalar", nullptr, &scalar::kernels, {}},
      {"neon", &all[0], TABLE_IF(GRAPHWRIGHT_HAVE_NEON, neon), kNeonFlags},
      {"avx2", &all[0], TABLE_IF(GRAPHWRIGHT_HAVE_AVX2, avx2), kAvx2Flags},
      {"avx_vnni", &all[2], TABLE_IF(GRAPHWRIGHT_HAVE_AVX_VNNI, avx_vnni), kAvxVnniFlags},
      {"avx512", &all[2], TABLE_IF(GRAPHWRIGHT_HAVE_AVX512, avx512), kAvx512Flags},
      {"avx512_vnni", &all[4], TABLE_IF(GRAPHWRIGHT_HAVE_AVX512_VNNI, avx512_vnni), kAvx512VnniFlags},
      {"avx512_vbmi2", &all[5], TABLE_IF(GRAPHWRIGHT_HAVE_AVX512_VBMI2, avx512_vbmi2), kAvx512Vbmi2Flags},
      {"avx512_bf16", &all[6], TABLE_IF(GRAPHWRIGHT_HAVE_AVX512_BF16, avx512_bf16), kAvx512Bf16Flags},
      {"amx", &all[7], TABLE_IF(GRAPHWRIGHT_HAVE_AMX, amx), kAmxFlags},
  }};
  return all;
}

}  // namespace

std::vector<std::string_view> Isa::missing() const {
  std::vector<std::string_view> names;
  if (parent != nullptr) names = parent->missing();
  for (const Requirement& requirement : needs) {
    if (!(cpu_flags().*requirement.present)) names.push_back(requirement.flag);
  }
  return names;
}

namespace {

template <typename... Entry>
void take_missing(KernelTable& table, const KernelTable& from, Entry KernelTable::*... entries) {
  ((table.*entries = table.*entries == nullptr ? from.*entries : table.*entries), ...);
}

}  // namespace

KernelTable Isa::kernels() const {
  if (!compiled()) throw std::invalid_argument(std::string(name) + " was not compiled into this build");
  if (!missing().empty()) throw std::invalid_argument(std::string(name) + " is not supported by this machine");
  KernelTable merged = *own;
  for (const Isa* from = parent; from != nullptr; from = from->parent) {
    if (!from->compiled()) continue;
    take_missing(merged, *from->own, &KernelTable::dot_u8s8, &KernelTable::byte_linear, &KernelTable::byte_rows,
                 &KernelTable::float_linear, &KernelTable::kron_linear, &KernelTable::attention, &KernelTable::rows,
                 &KernelTable::sparse_bytes, &KernelTable::sparse_floats);
  }
  return merged;
}

std::span<const Isa> isas() { return table(); }

const Isa& isa(std::string_view name) {
  for (const Isa& candidate : isas()) {
    if (candidate.name == name) return candidate;
  }
  throw std::invalid_argument("no instruction set is called '" + std::string(name) + "'");
}

}  // namespace graphwright
