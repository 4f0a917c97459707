// The Python module fusedres._C: what no tensor op carries. Loading it registers ops.cpp's ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/product.h"
#include "params.h"

namespace py = pybind11;

namespace {

std::string simd() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64 (NEON)";
#else
  return "compiler default";
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"c++", std::to_string(__cplusplus)},
      {"simd", simd()},
      {"cuda", "none"},
  };
}

// The CPU's plan for a layer of M rows, N outputs and K inputs.
std::map<std::string, std::string> plan(int64_t M, int64_t N, int64_t K, bool float32) {
  const bool onednn = float32 && fusedres::cpu::prefer_onednn(M, N, K);
  return {{"product", onednn ? "oneDNN" : "ATen"}, {"rows", "one pass, row in L1"}};
}

bool knows(const std::string& text) {
  fusedres::recipe(text);
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the planner of fusedres' C++ kernels";
  m.def("build_info", &build_info,
        "Compiler, language level, SIMD level of this machine, CUDA version.");
  m.def("plan", &plan, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("float32") = true);
  m.def("knows", &knows, py::arg("recipe"),
        "True if the kernels run this recipe, else ValueError with the reason.");
}
