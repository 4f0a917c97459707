// Tensors through torch's stable ABI: checks, allocation, rows, small parameter vectors, the matrix product.
// Included by ops.cpp alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/product.h"
#include "cpu/storage.h"
#include "params.h"

// Fast ways to three ATen ops. They are not part of the stable ABI's promise: absent from some torch, they are null here
// and the dispatcher does the same work. The last one's header cannot be included next to the stable ABI.
extern "C" AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B,
                                                           const char* attr, const double** scalars, int64_t scalars_len,
                                                           const char** algorithm, AtenTensorHandle* ret0);
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

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, "fusedres: a tensor has a dtype other than float32, bfloat16, float16, float64");
  }
}

inline Tensor empty(std::initializer_list<int64_t> shape, const Tensor& like, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (shape.size() == 2) strides[0] = shape.begin()[1] > 0 ? shape.begin()[1] : 1;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  (void)like;
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> shape, const Tensor& like) {
  return empty(shape, like, like.scalar_type());
}

inline Tensor transposed(const Tensor& t) {
  const int64_t sizes[2] = {t.size(1), t.size(0)}, strides[2] = {t.stride(1), t.stride(0)};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

// `t` with adjacent columns: itself, or a copy.
inline Tensor adjacent_columns(const Tensor& t) {
  return t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t);
}

inline Rows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.size(1)}; }

// ---- the matrix product: the vendor's -----------------------------------------------------------------------

inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b, const Optional& bias) {
  if (bias && aoti_torch_cpu_addmm_out) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0));
  } else if (!bias && aoti_torch_cpu_mm_out) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  } else {
    Tensor product = torch::stable::matmul(a, b);
    if (bias) product = torch::stable::subtract(product, *bias, -1.0);
    Tensor target = out;
    torch::stable::copy_(target, product);
  }
}

// a @ b (+ bias), a (M, K), b (K, N), any strides, in a's dtype.
inline Tensor multiply(const Tensor& a, const Tensor& b, const Optional& bias = std::nullopt) {
  const ScalarType dtype = a.scalar_type();
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (dtype == ScalarType::Half) {  // torch's own fp16 product is 10 to 80 times slower than fp32 on CPUs without it
    const auto wide = [](const Tensor& t) { return torch::stable::to(t, ScalarType::Float); };
    const Tensor z = multiply(wide(a), wide(b), bias ? Optional(wide(*bias)) : std::nullopt);
    return torch::stable::to(z, dtype);
  }
  if (dtype == ScalarType::Float && aoti_torch_cpu__linear_pointwise && cpu::prefer_onednn(M, N, K) && a.stride(1) == 1) {
    const Tensor weight = transposed(b);
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, z;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a.get(), weight.get(), bias ? &bias_handle : nullptr,
                                                            "none", nullptr, 0, nullptr, &z));
    return Tensor(z);
  }
  Tensor out = empty({M, N}, a);
  multiply_into(out, a, b, bias);
  return out;
}

// ---- parameter vectors ----------------------------------------------------------------------------------------

// A (n) tensor of any floating dtype as accumulate values. Parameters are short, so a copy costs nothing.
template <class A>
std::vector<A> values(const Tensor& t) {
  const int64_t n = t.numel(), stride = t.dim() ? t.stride(0) : 1;
  std::vector<A> out(n);
  const void* data = t.data_ptr();
  const auto bits = [&](int64_t i) { return static_cast<const uint16_t*>(data)[i * stride]; };
  for (int64_t i = 0; i < n; ++i) switch (dtype_of(t)) {
      case DType::float32: out[i] = static_cast<const float*>(data)[i * stride]; break;
      case DType::float64: out[i] = static_cast<A>(static_cast<const double*>(data)[i * stride]); break;
      case DType::bfloat16: out[i] = cpu::to_float(cpu::bfloat16{bits(i)}); break;
      case DType::float16: out[i] = cpu::to_float(cpu::float16{bits(i)}); break;
    }
  return out;
}

// Accumulate values as a (n) tensor of `like`'s dtype.
template <class A>
Tensor vector_like(const A* data, int64_t n, const Tensor& like) {
  Tensor out = empty({n}, like);
  void* to = out.data_ptr();
  for (int64_t i = 0; i < n; ++i) switch (dtype_of(like)) {
      case DType::float32: static_cast<float*>(to)[i] = static_cast<float>(data[i]); break;
      case DType::float64: static_cast<double*>(to)[i] = data[i]; break;
      case DType::bfloat16: static_cast<cpu::bfloat16*>(to)[i] = cpu::to_bfloat16(static_cast<float>(data[i])); break;
      case DType::float16: static_cast<cpu::float16*>(to)[i] = cpu::to_float16(static_cast<float>(data[i])); break;
    }
  return out;
}

}  // namespace fusedres
