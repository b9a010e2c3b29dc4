// What this machine can run: the CPU says it has an instruction, and the operating system saves its registers.
#pragma once

#include <string>

namespace graphwright {

// One member per question; false throughout on a machine that is not x86-64.
struct CpuFlags {
  bool neon = false;
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx_vnni = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512cd = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512_vnni = false;
  bool avx512vbmi = false;
  bool avx512_vbmi2 = false;
  bool avx512_bf16 = false;
  bool amx_tile = false;
  bool amx_int8 = false;
  bool amx_bf16 = false;
  bool os_avx = false;     // the system saves the 256-bit registers
  bool os_avx512 = false;  // and the 512-bit and mask registers
  bool os_amx = false;     // and the tiles, for a process that asks
};

// Detected once, on the first call.
const CpuFlags& cpu_flags();

// The CPU's own name for itself ("AMD EPYC ..."), or "" where it has none to give.
const std::string& cpu_name();

}  // namespace graphwright
