// What all instructions of the executor are, for Python.
#include "instruction.h"

#include "bindings.h"

namespace graphwright {

void bind_instruction(nb::module_& m) {
  nb::class_<Instruction>(m, "Instruction", "A kernel with its constants, which the executor calls on tensors.");
}

}  // namespace graphwright
