// The Python module fusedres._C: what no tensor op carries. Loading it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cuda/family.h"
#include "params.h"

#ifndef FUSEDRES_CUDA
#define FUSEDRES_CUDA "none"
#endif

namespace py = pybind11;
namespace cuda = fusedres::cuda;

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"c++", std::to_string(__cplusplus)},
      {"simd", fusedres::cpu::instruction_set()},
      {"cuda", FUSEDRES_CUDA},
      {"hopper", fusedres::cuda::built_for_hopper() ? "built" : "left out"},
  };
}

fusedres::DType dtype_of(const std::string& name) {
  static const std::map<std::string, fusedres::DType> names = {
      {"float32", fusedres::DType::float32},
      {"bfloat16", fusedres::DType::bfloat16},
      {"float16", fusedres::DType::float16},
      {"float64", fusedres::DType::float64}};
  const auto found = names.find(name);
  if (found == names.end()) throw std::invalid_argument("dtype " + name + " is none of ours");
  return found->second;
}

// Who multiplies for a layer of M rows, N outputs and K inputs.
std::string product(int64_t M, int64_t N, int64_t K, fusedres::DType dtype, bool backward) {
  if (fusedres::cpu::own_product(M, N, K, dtype, backward)) return "own";
  if (fusedres::cpu::multiply_in_float32(dtype, M)) return "library, in fp32";
  const bool fp32 = dtype == fusedres::DType::float32;
  return fp32 && fusedres::cpu::prefer_onednn(M, N, K) ? "oneDNN" : "ATen";
}

// The CPU's plan for it.
std::map<std::string, std::string> plan(int64_t M, int64_t N, int64_t K, const std::string& dtype) {
  const std::string forward = product(M, N, K, dtype_of(dtype), false);
  const bool own = forward == "own";
  return {{"product", forward},
          {"backward's products", product(M, N, K, dtype_of(dtype), true)},
          {"rows", own ? "with the product, block by block" : "one pass, row in L1"}};
}

// Why the CUDA kernels cannot run a layer of any number of rows on a GPU whose blocks may have
// `shared_limit` bytes of shared memory; `gradients`: its backward. None: they can.
std::optional<std::string> cuda_why_not(const std::string& recipe, const std::string& dtype,
                                        int64_t N, int64_t K, int shared_limit, bool gradients) {
  const fusedres::Recipe& r = fusedres::recipe(recipe);
  if (r.batch_stats) return "its CUDA kernels take batch norm's running statistics only";
  const cuda::Layer layer = cuda::layer_of(r, dtype_of(dtype), 1, N, K);
  const char* reason = cuda::why_not(layer, shared_limit, gradients);
  return reason ? std::optional<std::string>(reason) : std::nullopt;
}

// The forward's plan on a GPU of that kind.
py::dict cuda_plan(const std::string& recipe, const std::string& dtype, int64_t M, int64_t N,
                   int64_t K, int multiprocessors, int shared_limit, int major) {
  const cuda::Layer layer = cuda::layer_of(fusedres::recipe(recipe), dtype_of(dtype), M, N, K);
  const cuda::Device device = {multiprocessors, shared_limit, major, 0};
  const bool hopper = cuda::on_hopper(layer, device);
  const cuda::Tile tile = hopper ? cuda::sm90::plan_forward(layer, multiprocessors)
                                 : cuda::plan_forward(layer, multiprocessors, shared_limit);
  py::dict found;
  found["kernel"] = hopper ? "residual_forward_sm90_kernel" : "residual_forward_sm80_kernel";
  found["BLOCK_M"] = tile.block_m;
  found["BLOCK_N"] = tile.block_n;
  found["programs"] = tile.programs;
  found["shared"] = tile.shared_bytes;
  return found;
}

// If dicts still hold what they held, a list of what `wanted` (dict, key, and so on) finds; else
// None. Of the tuple `facts`: a list of dict, key, value, and so on; dicts that have no entry;
// tuples (dict, its size); tuples (object, its type). Values are compared as Python does, the very
// same object first. Python's own calling convention: asked at each call of a converted module
// (fusedres/models/guard.py), where pybind11's costs as much again.
PyObject* if_unchanged(PyObject*, PyObject* const* args, Py_ssize_t) {
  PyObject *facts = args[0], *wanted = args[1];
  const auto each = [facts](int i) {
    return py::reinterpret_borrow<py::list>(PyTuple_GET_ITEM(facts, i));
  };
  for (py::handle dict : each(1))
    if (PyDict_GET_SIZE(dict.ptr()) != 0) Py_RETURN_NONE;
  for (py::handle pair : each(2)) {
    PyObject *dict = PyTuple_GET_ITEM(pair.ptr(), 0), *size = PyTuple_GET_ITEM(pair.ptr(), 1);
    if (PyDict_GET_SIZE(dict) != PyLong_AsSsize_t(size)) Py_RETURN_NONE;
  }
  for (py::handle pair : each(3)) {
    PyObject *object = PyTuple_GET_ITEM(pair.ptr(), 0), *kind = PyTuple_GET_ITEM(pair.ptr(), 1);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != kind) Py_RETURN_NONE;
  }
  const auto find = [](PyObject* list, Py_ssize_t i) {
    PyObject *dict = PyList_GET_ITEM(list, i), *key = PyList_GET_ITEM(list, i + 1);
    return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict, key));
  };
  PyObject* values = PyTuple_GET_ITEM(facts, 0);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(values); i += 3) {
    const py::object found = find(values, i);
    PyObject* known = PyList_GET_ITEM(values, i + 2);
    if (found.ptr() == known) continue;
    if (!found && PyErr_Occurred()) return nullptr;
    const int equal = found ? PyObject_RichCompareBool(found.ptr(), known, Py_EQ) : 0;
    if (equal < 0) return nullptr;
    if (equal == 0) Py_RETURN_NONE;
  }
  const Py_ssize_t n = PyList_GET_SIZE(wanted) / 2;
  py::list result(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    py::object found = find(wanted, 2 * i);
    if (!found && PyErr_Occurred()) return nullptr;
    if (!found) Py_RETURN_NONE;
    PyList_SET_ITEM(result.ptr(), i, found.release().ptr());
  }
  return result.release().ptr();
}

PyMethodDef kIfUnchanged = {"if_unchanged", reinterpret_cast<PyCFunction>(if_unchanged),
                            METH_FASTCALL, "What `wanted` finds if modules are as they were."};

bool knows(const std::string& text) {
  fusedres::recipe(text);
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the planner of fusedres' C++ kernels";
  m.def("build_info", &build_info,
        "Compiler, language level, SIMD level of this machine, CUDA version, Hopper's kernels.");
  m.def("plan", &plan, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("dtype") = "float32");
  m.def("cuda_why_not", &cuda_why_not, py::arg("recipe"), py::arg("dtype"), py::arg("N"),
        py::arg("K"), py::arg("shared_limit"), py::arg("gradients"));
  m.def("cuda_plan", &cuda_plan, py::arg("recipe"), py::arg("dtype"), py::arg("M"), py::arg("N"),
        py::arg("K"), py::arg("multiprocessors"), py::arg("shared_limit"), py::arg("major"));
  m.attr("if_unchanged") =
      py::reinterpret_steal<py::object>(PyCFunction_New(&kIfUnchanged, nullptr));
  m.def("knows", &knows, py::arg("recipe"),
        "True if the kernels run this recipe, else ValueError with the reason.");
}
