// The Python module bigops._C: what is no tensor op. Loading it registers the CPU kernels.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common/codes.h"
#include "common/crossover.h"
#include "common/isa.h"
#include "common/record.h"
#include "cpu/attention.h"
#include "cpu/compressed_linear.h"
#include "cpu/executor.h"
#include "cpu/fused_linear.h"
#include "cpu/library_product.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/meter.h"
#include "cpu/norm.h"
#include "cpu/packed_linear.h"
#include "cpu/quantized_embedding.h"
#include "cpu/rotary.h"

namespace py = pybind11;

namespace {

template <size_t N>
std::vector<std::string> list(const bigops::Words<N>& words) {
  return {words, words + N};
}

// (kind, number or items): as bigops/graph/deploy/executor.py writes them.
using Number = std::variant<int64_t, double>;
using Items = std::vector<std::pair<bool, int64_t>>;

std::vector<bigops::Item> items_of(const Items& given) {
  std::vector<bigops::Item> made;
  for (const auto& [slot, value] : given) made.push_back({slot, value});
  return made;
}

bigops::Argument argument(char kind, const std::variant<Number, Items>& value) {
  bigops::Argument made{static_cast<bigops::ArgumentKind>(kind)};
  if (const auto* items = std::get_if<Items>(&value)) {
    made.items = items_of(*items);
  } else if (const auto* number = std::get_if<int64_t>(&std::get<Number>(value))) {
    made.number = *number;
  } else {
    made.real = std::get<double>(std::get<Number>(value));
  }
  return made;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace bigops;
  m.doc() = "CPU features, the record of kernels, crossovers, meters; ops register themselves.";

  m.def("isa", [] { return isa_name(active_isa()); }, "Instruction set that kernels use now.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
          names.emplace_back(isa_name(static_cast<Isa>(i)));
        return names;
      },
      "Instruction sets that this CPU can run, lowest first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        const std::string before = isa_name(active_isa());
        if (!set_isa(name.c_str()))
          throw py::value_error("isa: expected " + std::string(isa_names()) + ", at most " +
                                std::string(isa_name(best_isa())) + " on this CPU; got " + name);
        return before;
      },
      py::arg("name"), "Use an instruction set from now on; returns the one before.");
  m.def("set_bf16_dot", &set_bf16_dot, py::arg("pays"),
        "Whether packed and weight-only products of bf16 use vdpbf16ps where the CPU has it.");
  m.def("vendor", &cpu_vendor, "The maker of the CPU: amd, intel or other.");
  m.def(
      "features",
      [] {
        std::istringstream text(cpu_features());
        std::vector<std::string> words;
        for (std::string word; text >> word;) words.push_back(word);
        return words;
      },
      "CPU features that matter to the kernels.");

  m.def(
      "codes",
      [] {
        return std::map<std::string, std::vector<std::string>>{
            {"activation", list(kActivationWords)},
            {"activations", list(kActivateWords)},
            {"choice", list(kChoiceWords)},
            {"dtype", list(kStoredWords)},
            {"kind", list(kNormWords)}};
      },
      "The words of the arguments that kernels take as numbers; a word's position is its code.");
  m.def("has_onednn_linear", &has_onednn_linear,
        "Whether this torch has the product of oneDNN that set_float_product(\"onednn\") wants.");

  m.def("record_start", &record_start);
  m.def("record_stop", &record_stop);
  m.def(
      "set_crossover",
      [](const std::string& op, const std::string& dtype, int64_t rows, int64_t flops) {
        set_crossover(op, dtype, {rows, flops});
      },
      py::arg("op"), py::arg("dtype"), py::arg("max_rows"), py::arg("max_flops"));
  m.def("set_float_product", &set_float_product, py::arg("library"));
  m.def("choose_attention", &choose_attention, py::arg("items"), py::arg("group"), py::arg("t"),
        py::arg("s"), py::arg("d"), py::arg("dv"), py::arg("dtype"), py::arg("bf16") = false);
  m.def("choose_fused_linear", &choose_fused_linear, py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("dtype"));
  m.def("choose_packed_linear", &choose_packed_linear, py::arg("m"), py::arg("dtype"));
  m.def("choose_linear_cross_entropy", &choose_linear_cross_entropy, py::arg("dtype"));
  m.def("choose_norm", &choose_norm, py::arg("op"), py::arg("dtype"), py::arg("kind"));
  m.def("choose_quantized_embedding", &choose_quantized_embedding, py::arg("bits"),
        py::arg("dtype"));
  m.def("choose_quantized_linear", &choose_quantized_linear, py::arg("m"), py::arg("bits"),
        py::arg("group"), py::arg("activations"), py::arg("dtype"), py::arg("y_u8") = false);
  m.def("choose_act_quant", &choose_act_quant, py::arg("dtype"), py::arg("symmetric"));
  m.def("choose_rotary", &choose_rotary, py::arg("dtype"));
  m.def("choose_sparse_linear", &choose_sparse_linear, py::arg("m"), py::arg("values"),
        py::arg("dtype"), py::arg("y_u8") = false);

  using Item = std::pair<bool, int64_t>;
  py::class_<Program, std::shared_ptr<Program>>(m, "Program",
                                                "Calls that the op execute runs without Python.")
      .def(py::init<int64_t, std::vector<int64_t>, std::vector<int64_t>>(), py::arg("slots"),
           py::arg("inputs"), py::arg("results"))
      .def("call",
           [](Program& self, const std::string& name, const std::string& overload,
              const std::vector<std::pair<char, std::variant<Number, Items>>>& arguments,
              const std::vector<int64_t>& outputs) {
             std::vector<Argument> made;
             for (const auto& [kind, value] : arguments) made.push_back(argument(kind, value));
             self.call(name, overload, std::move(made), outputs);
           })
      .def("size", &Program::size)
      .def("arithmetic",
           [](Program& self, int64_t output, char sign, const Item& a, const Item& b) {
             self.arithmetic(output, sign, {a.first, a.second}, {b.first, b.second});
           })
      .def("transpose", &Program::transpose)
      .def("slice",
           [](Program& self, int64_t output, int64_t tensor, int64_t dimension, const Item& begin,
              const Item& end, int64_t step) {
             self.slice(output, tensor, dimension, {begin.first, begin.second},
                        {end.first, end.second}, step);
           })
      .def("reshape", [](Program& self, int64_t output, int64_t tensor,
                         const Items& sizes) { self.reshape(output, tensor, items_of(sizes)); })
      .def("drop", [](Program& self, const Items& slots) { self.drop(items_of(slots)); })
      .def("keep", [](std::shared_ptr<Program> self) { return keep_program(std::move(self)); });
  m.def("drop_program", &drop_program);

  m.def("peak", &measure_peak, py::arg("kind"), py::arg("threads"), py::arg("seconds") = 0.1,
        py::call_guard<py::gil_scoped_release>(),
        "Measured operations a second of a unit: f32 (fma), bf16 (vdpbf16ps), s8 (vpdpbusd); at "
        "level amx bf16 and s8 are those of its tiles.");
  m.def("bandwidth", &measure_bandwidth, py::arg("bytes"), py::arg("threads"),
        py::arg("seconds") = 0.1, py::call_guard<py::gil_scoped_release>(),
        "Measured read bandwidth in bytes a second over a buffer of that size for each thread.");
}
