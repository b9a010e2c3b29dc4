// The instruction sets, from the plainest to the most able, and which of them this build and this machine have.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cpu_flags.h"
#include "kernel_table.h"

namespace graphwright {

struct Requirement {
  std::string_view flag;
  bool CpuFlags::* present;
};

struct Isa {
  std::string_view name;
  const Isa* parent;                       // whatever runs this runs its parent too
  const KernelTable* own;                  // null where the compiler could not build it
  std::span<const Requirement> needs;      // on top of what the parent needs

  bool compiled() const { return own != nullptr; }
  // The flags that this machine lacks, the parents' first; empty where it can run the instruction set.
  std::vector<std::string_view> missing() const;
  // Its kernels: its own, and its parents' where it has none. Throws std::invalid_argument where it cannot run.
  KernelTable kernels() const;
};

// Every instruction set graphwright knows, in ascending order.
std::span<const Isa> isas();

// By name; throws std::invalid_argument for a name that is none.
const Isa& isa(std::string_view name);

}  // namespace graphwright
