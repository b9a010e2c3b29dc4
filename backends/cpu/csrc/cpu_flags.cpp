// CPUID and XGETBV: Intel SDM vol. 1, ch. 13.5 (enabling) and 14.3 (detection of AVX), ch. 15.2 (AVX-512), ch. 18 (AMX).
#include "cpu_flags.h"

#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define GRAPHWRIGHT_X86_64 1
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace graphwright {
namespace {

#if defined(GRAPHWRIGHT_X86_64)

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf that this CPU does not have.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(std::uint64_t word, unsigned index) { return ((word >> index) & 1U) != 0; }

// XCR0: the register sets that the operating system saves. Readable only where CPUID reports OSXSAVE.
std::uint64_t xcr0() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// Linux hands tiles only to processes that ask (arch_prctl); this reads whether it would.
bool system_grants_tiles() {
#if defined(__linux__)
  constexpr long kGetSupportedStates = 0x1021;  // ARCH_GET_XCOMP_SUPP
  constexpr unsigned kTileData = 18;
  std::uint64_t states = 0;
  return syscall(SYS_arch_prctl, kGetSupportedStates, &states) == 0 && bit(states, kTileData);
#else
  return false;
#endif
}

CpuFlags detect() {
  CpuFlags f;
  const Registers basic = cpuid(1), extended = cpuid(7, 0);
  // EAX of leaf 7 is the number of its last subleaf.
  const Registers further = extended.eax >= 1 ? cpuid(7, 1) : Registers{};

  f.fma = bit(basic.ecx, 12);
  f.f16c = bit(basic.ecx, 29);
  f.avx2 = bit(extended.ebx, 5);
  f.avx512f = bit(extended.ebx, 16);
  f.avx512dq = bit(extended.ebx, 17);
  f.avx512cd = bit(extended.ebx, 28);
  f.avx512bw = bit(extended.ebx, 30);
  f.avx512vl = bit(extended.ebx, 31);
  f.avx512vbmi = bit(extended.ecx, 1);
  f.avx512_vbmi2 = bit(extended.ecx, 6);
  f.avx512_vnni = bit(extended.ecx, 11);
  f.amx_bf16 = bit(extended.edx, 22);
  f.amx_tile = bit(extended.edx, 24);
  f.amx_int8 = bit(extended.edx, 25);
  f.avx_vnni = bit(further.eax, 4);
  f.avx512_bf16 = bit(further.eax, 5);

  const bool osxsave = bit(basic.ecx, 27);
  const std::uint64_t saved = osxsave ? xcr0() : 0;
  constexpr std::uint64_t kAvx = 0x6, kAvx512 = kAvx | 0xE0, kAmx = 0x60000;
  f.os_avx = (saved & kAvx) == kAvx;
  f.os_avx512 = (saved & kAvx512) == kAvx512;
  f.os_amx = (saved & kAmx) == kAmx && system_grants_tiles();
  return f;
}

std::string brand() {
  constexpr std::uint32_t kFirst = 0x80000002, kLast = 0x80000004;
  if (__get_cpuid_max(0x80000000, nullptr) < kLast) return "";
  std::string text;
  for (std::uint32_t leaf = kFirst; leaf <= kLast; ++leaf) {
    const Registers r = cpuid(leaf);
    for (const std::uint32_t word : {r.eax, r.ebx, r.ecx, r.edx}) {
      for (unsigned shift = 0; shift < 32; shift += 8) text.push_back(static_cast<char>((word >> shift) & 0xFFU));
    }
  }
  text.erase(text.find_last_not_of(std::string(" \0", 2)) + 1);
  text.erase(0, text.find_first_not_of(' '));
  return text;
}

#else

CpuFlags detect() {
  CpuFlags f;
#if defined(__aarch64__)
  f.neon = true;
#endif
  return f;
}

std::string brand() { return ""; }

#endif

}  // namespace

const CpuFlags& cpu_flags() {
  static const CpuFlags flags = detect();
  return flags;
}

const std::string& cpu_name() {
  static const std::string name = brand();
  return name;
}

}  // namespace graphwright
