// Tensors through torch's stable ABI: checks, allocation, rows, small parameter vectors, the matrix
// product. For call.h and what includes it alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "params.h"

// Fast ways to three ATen ops. They are not part of the stable ABI's promise: absent from some
// torch, they are null here and the dispatcher does the same work. The last one's header cannot be
// included next to the stable ABI.
extern "C" AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const char* attr,
    const double** scalars, int64_t scalars_len, const char** algorithm, AtenTensorHandle* ret0);
#pragma weak aoti_torch_cpu_addmm_out
#pragma weak aoti_torch_cpu_mm_out
#pragma weak aoti_torch_cpu__linear_pointwise

namespace fusedres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// A `str` argument, ours to delete. By hand: torch 2.11's own conversion leaks the copy it makes.
inline std::string take_text(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  const std::string copy(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return ScalarType::BFloat16;
    case DType::float16:
      return ScalarType::Half;
    case DType::float64:
      return ScalarType::Double;
    default:
      return ScalarType::Float;
  }
}

// As t.scalar_type(), which asks torch at each call for the number of every dtype that there is.
inline ScalarType type_of(const Tensor& t) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_float64(), ScalarType::Double},
      {aoti_torch_dtype_int64(), ScalarType::Long}};
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  for (const auto& [its, type] : known)
    if (its == number) return type;
  return t.scalar_type();
}

// A device's kind and index, as torch numbers them.
inline std::pair<int32_t, int32_t> device_of(const Tensor& t) {
  std::pair<int32_t, int32_t> found;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &found.first));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &found.second));
  return found;
}

inline DType dtype_of(const Tensor& t) {
  switch (type_of(t)) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      STD_TORCH_CHECK(
          false, "fusedres: a tensor has a dtype other than float32, bfloat16, float16, float64");
  }
}

// Of memory that a CPU lacks torch speaks in these words, by which programs know it.
constexpr const char* kNoMemory = "fusedres: DefaultCPUAllocator: can't allocate memory: ";

// On the CPU, or on CUDA device `device`.
inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype, int device = -1) {
  int64_t strides[2] = {1, 1};
  if (shape.size() == 2) strides[0] = shape.begin()[1] > 0 ? shape.begin()[1] : 1;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t kind = device < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, type,
                               kind, std::max(device, 0), &handle);
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  // Of the reason the stable ABI keeps nothing; on a CPU there is one.
  STD_TORCH_CHECK(!error || device >= 0, kNoMemory, "you tried to allocate ", elements,
                  " elements");
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> shape, const Tensor& like) {
  return empty(shape, type_of(like));
}

inline Tensor transposed(const Tensor& t) {
  const int64_t sizes[2] = {t.size(1), t.size(0)}, strides[2] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// A matrix with adjacent columns: `t` or a copy. What is no matrix stays, to fail the checks.
inline Tensor adjacent_columns(const Tensor& t) {
  return t.dim() != 2 || t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

inline Rows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.size(1), dtype_of(t)}; }

// ---- the matrix product: the vendor's

// Whether the product adds the bias. In bf16 and fp16 it must: bias and product may cancel, and a
// product rounded by itself would leave its rounding. float64 is there to be compared with torch,
// so it adds in torch's order. In fp32 the row pass adds the bias, which saves a pass over z.
inline bool bias_in_product(DType dtype) { return dtype != DType::float32; }

inline Tensor multiply(const Tensor& a, const Tensor& b, const Optional& bias = std::nullopt);

// The same in fp32, rounded once, b's columns a few at a time: as many as stay in the cache between
// conversion and product, and no fewer than a has rows, which are read again for each such part.
inline Tensor multiply_in_float32(const Tensor& a, Tensor b, Optional bias) {
  constexpr int64_t kElements = 1 << 20;
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  const int64_t most = std::max({M, kElements / std::max<int64_t>(K, 1), int64_t{1}});
  const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
  const Tensor left = wide(a);
  if (N <= most) {
    const Tensor z = multiply(left, wide(b), bias ? Optional(wide(*bias)) : std::nullopt);
    return torch::stable::to(z, type_of(a));
  }
  Tensor out = empty({M, N}, a);
  for (int64_t first = 0; first < N; first += most) {
    const auto part = [&](Tensor& t, int64_t dim) {
      return torch::stable::narrow(t, dim, first, std::min(most, N - first));
    };
    const Optional some = bias ? Optional(wide(part(*bias, 0))) : std::nullopt;
    Tensor columns = part(out, 1);
    torch::stable::copy_(columns, multiply(left, wide(part(b, 1)), some));
  }
  return out;
}

// a @ b (+ bias), a (M, K), b (K, N), any strides, in a's dtype.
inline Tensor multiply(const Tensor& a, const Tensor& b, const Optional& bias) {
  const ScalarType dtype = type_of(a);
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (cpu::multiply_in_float32(dtype_of(a), M)) return multiply_in_float32(a, b, bias);
  if (dtype == ScalarType::Float && aoti_torch_cpu__linear_pointwise && a.stride(1) == 1 &&
      cpu::prefer_onednn(M, N, K)) {
    const Tensor weight = transposed(b);
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, z;
    if (!aoti_torch_cpu__linear_pointwise(a.get(), weight.get(), bias ? &bias_handle : nullptr,
                                          "none", nullptr, 0, nullptr, &z))
      return Tensor(z);
    // Else most likely there is no memory for z, which `empty` below says.
  }
  if (bias && aoti_torch_cpu_addmm_out) {
    Tensor out = empty({M, N}, a);
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
    return out;
  }
  if (bias) {
    const int64_t arguments = 5;
    StableIValue stack[arguments] = {torch::stable::detail::from(*bias),
                                     torch::stable::detail::from(a), torch::stable::detail::from(b),
                                     torch::stable::detail::from(1.0),
                                     torch::stable::detail::from(1.0)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::addmm", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  if (!aoti_torch_cpu_mm_out) return torch::stable::matmul(a, b);
  Tensor out = empty({M, N}, a);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  return out;
}

// ---- parameter vectors

// Elements of any floating dtype, `stride` apart; without data: there are none.
struct Vector {
  void* data = nullptr;
  int64_t stride = 1;
  DType dtype = DType::float32;
};

inline Vector vector_of(const Optional& t) {
  if (!t) return {};
  return {t->data_ptr(), t->dim() ? t->stride(0) : 1, dtype_of(*t)};
}

// Calls f(pointer) with the data as its storage type.
template <class F>
void with_storage(const Vector& v, F&& f) {
  switch (v.dtype) {
    case DType::float32:
      return f(static_cast<float*>(v.data));
    case DType::float64:
      return f(static_cast<double*>(v.data));
    case DType::bfloat16:
      return f(static_cast<cpu::bfloat16*>(v.data));
    case DType::float16:
      return f(static_cast<cpu::float16*>(v.data));
  }
}

// n elements as accumulate values.
template <class A>
std::vector<A> values(const Vector& v, int64_t n) {
  std::vector<A> out(n);
  with_storage(v, [&](const auto* data) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(cpu::to_float(data[i * v.stride]));
  });
  return out;
}

// The same where they lie, if they are such; else in `memory`. Null: there are none.
template <class A>
const A* values(const Vector& v, int64_t n, std::vector<A>& memory) {
  constexpr DType kOwn = std::is_same_v<A, double> ? DType::float64 : DType::float32;
  if (!v.data) return nullptr;
  if (v.dtype == kOwn && v.stride == 1) return static_cast<const A*>(v.data);
  memory = values<A>(v, n);
  return memory.data();
}

// Accumulate values into elements that are adjacent.
template <class A>
void store_vector(const A* data, int64_t n, const Vector& into) {
  with_storage(into, [&](auto* to) {
    for (int64_t i = 0; i < n; ++i) cpu::from_float(data[i], to[i]);
  });
}

}  // namespace fusedres
