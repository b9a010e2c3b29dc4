// graphwright.backends.cpu._native: what Python sees. Its types are declared in ../_native.pyi.
#include <nanobind/stl/vector.h>

#include <string_view>

#include "bindings.h"
#include "isa.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

std::int32_t dot_u8s8(std::string_view name, const graphwright::Array<const std::uint8_t>& a, const graphwright::Array<const std::int8_t>& b) {
  graphwright::expect(a.shape(0) == b.shape(0), "the two arrays differ in length");
  graphwright::expect(a.shape(0) <= graphwright::kMaxDotLength, "more elements than an int32 sum can hold");
  return graphwright::isa(name).kernels().dot_u8s8(a.data(), b.data(), a.shape(0));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The C++ side of graphwright.backends.cpu.";

  nb::class_<graphwright::Isa>(m, "Isa", "An instruction set that kernels are written for.")
      .def_ro("name", &graphwright::Isa::name)
      .def_prop_ro("compiled", &graphwright::Isa::compiled, "Whether this build holds kernels for it.")
      .def_prop_ro("missing", &graphwright::Isa::missing, "The CPU or system features this machine lacks for it.");

  m.def("isas", [] {
    nb::list all;
    for (const graphwright::Isa& isa : graphwright::isas()) all.append(nb::cast(&isa, nb::rv_policy::reference));
    return all;
  }, "Every instruction set graphwright knows, from the plainest to the most able.");
  m.def("cpu_name", &graphwright::cpu_name, "The CPU's own name for itself, or an empty string.");
  m.def("dot_u8s8", &dot_u8s8, "isa"_a, "a"_a, "b"_a,
        "The exact sum of a[i] * b[i] by the kernel of one instruction set (uint8 and int8, at most 65536 elements).");

  graphwright::bind_instruction(m);
  graphwright::bind_attention(m);
  graphwright::bind_byte_linear(m);
  graphwright::bind_decoder_attention(m);
  graphwright::bind_float_linear(m);
  graphwright::bind_kron_linear(m);
  graphwright::bind_rows(m);
  graphwright::bind_small(m);
  graphwright::bind_sparse_linear(m);
  graphwright::bind_executor(m);
}
