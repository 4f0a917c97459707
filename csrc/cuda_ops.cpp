// The ops fusedres::cuda_residual_forward and fusedres::cuda_residual_backward on CUDA tensors:
// from tensors to the plain structs of cuda/layer.h, memory, launches.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <map>
#include <mutex>

#include "call.h"
#include "cuda/family.h"

// Absent from a torch without CUDA, where this file's ops cannot be called but must load.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#pragma weak aoti_torch_get_current_cuda_stream

namespace fusedres::cuda {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fusedres: ", what, ": ", cudaGetErrorString(error));
}

// ---- devices and streams

Device make_device(int index) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, index), "asking the device");
    return value;
  };
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          ask(cudaDevAttrComputeCapabilityMajor), ask(cudaDevAttrComputeCapabilityMinor)};
}

// What lives as long as the process: arrival counters of each device, a slot a stream. Kernels
// leave them at 0. No tensor: made within a CUDA graph's memory pool, it would die with it.
struct Resident {
  static constexpr int64_t kSlot = 1 << 16, kSlots = 16;
  Device device;
  int32_t* counters = nullptr;
  int32_t* slot(int64_t i) const { return counters + i * kSlot; }
  std::map<unsigned long long, int64_t> slots;  // by the stream's id: handles are used again
};

std::mutex resident_mutex;

Resident& resident(int index) {
  static std::map<int, Resident> all;
  const auto found = all.find(index);
  return found != all.end() ? found->second
                            : all.emplace(index, Resident{make_device(index)}).first->second;
}

// Lets this thread allocate while another one captures a CUDA graph, as torch's allocator does.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

int32_t* allocate_counters() {
  const Relaxed while_another_thread_captures;
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, Resident::kSlots * Resident::kSlot * sizeof(int32_t)),
             "allocating arrival counters");
  return static_cast<int32_t*>(memory);
}

// The device and stream of one call, its workspace.
struct Where {
  int index;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  Device device;
  std::vector<Tensor> workspace;  // until the launches are enqueued

  // Encoding boxes for TMA needs a context, and the guard alone gives a new thread none.
  explicit Where(const Tensor& x) : index(x.get_device_index()), guard(index) {
    check_cuda(cudaSetDevice(index), "choosing the device");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    const std::lock_guard<std::mutex> lock(resident_mutex);
    device = resident(index).device;
  }

  Tensor make(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    try {
      return empty(shape, dtype, index);
    } catch (const std::exception&) {  // of the reason, the stable ABI keeps nothing
      const cudaError_t error = cudaStreamQuery(static_cast<cudaStream_t>(stream));
      if (error != cudaErrorNotReady) check_cuda(error, "allocating");
      int64_t elements = 1;
      for (const int64_t size : shape) elements *= size;
      STD_TORCH_CHECK(false, "fusedres: CUDA out of memory for a tensor of ", elements,
                      " elements");
    }
  }

  template <class T>
  T* scratch(int64_t count, ScalarType dtype) {
    if (count == 0) return nullptr;
    workspace.push_back(make({count}, dtype));
    return static_cast<T*>(workspace.back().data_ptr());
  }

  // `count` zeros. A graph being captured gets its own, cleared within the graph, and so does
  // whoever needs more than there are.
  int32_t* counters(int64_t count) {
    if (count == 0) return nullptr;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(cuda_stream, &capturing), "asking the stream");
    if (count <= Resident::kSlot && capturing == cudaStreamCaptureStatusNone) {
      const std::lock_guard<std::mutex> lock(resident_mutex);
      Resident& here = resident(index);
      unsigned long long id = 0;
      check_cuda(cudaStreamGetId(cuda_stream, &id), "asking the stream");
      const auto known = here.slots.find(id);
      if (known != here.slots.end()) return here.slot(known->second);
      if (here.slots.size() < Resident::kSlots) {
        if (!here.counters) here.counters = allocate_counters();
        int32_t* const first = here.slot(here.slots.size());
        clear(first, Resident::kSlot);
        here.slots.emplace(id, here.slots.size());
        return first;
      }
    }
    int32_t* const fresh = scratch<int32_t>(count, ScalarType::Int);
    clear(fresh, count);
    return fresh;
  }

  void clear(int32_t* counters, int64_t count) const {
    check_cuda(
        cudaMemsetAsync(counters, 0, count * sizeof(int32_t), static_cast<cudaStream_t>(stream)),
        "clearing arrival counters");
  }

  template <class Out>
  void give_memory(Out& out, const Tile& tile) {
    out.partial = scratch<float>(tile.partial_floats, ScalarType::Float);
    out.arrived = counters(tile.counters);
  }
};

void check_launch(const char* error, const char* what) {
  STD_TORCH_CHECK(error == nullptr, "fusedres: ", what, ": ", error);
}

// ---- tensors to structs

Matrix matrix_of(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }
Matrix matrix_of(const Optional& t) { return t ? matrix_of(*t) : Matrix{}; }
void* data_of(const Optional& t) { return t ? t->data_ptr() : nullptr; }

// A call as the kernels get it, and the tensors that must outlive the launches.
struct Prepared {
  Layer layer;
  std::vector<Tensor> copies;

  explicit Prepared(const Call& c)
      : layer(layer_of(c.recipe, dtype_of(c.weight), c.M(), c.N(), c.K())) {
    layer.x_dtype = dtype_of(c.x);
    layer.x = matrix_of(c.x);
    layer.weight = matrix_of(adjacent(c.weight));
    layer.residual_is_x = !c.residual;
    const Tensor& residual = c.residual ? *c.residual : c.x;
    layer.residual = matrix_of(residual);
    layer.residual_dtype = dtype_of(residual);
    layer.R = residual.size(1);
    layer.bias = vector_of(c.bias);
    layer.norm_weight = vector_of(c.norm_weight);
    layer.norm_bias = vector_of(c.norm_bias);
    layer.running_mean = vector_of(c.running_mean);
    layer.running_var = vector_of(c.running_var);
    layer.gate = vector_of(c.gate);
    layer.seed = static_cast<const int64_t*>(data_of(c.seed));
    layer.sample_rows = c.sample_rows;
    if (layer.K == 0) without_features(c.weight);
  }

 private:
  const Tensor& keep(Tensor t) { return copies.emplace_back(std::move(t)); }
  Tensor adjacent(const Tensor& t) { return keep(adjacent_columns(t)); }
  Vector vector_of(const Optional& t) {
    if (!t) return {};
    const Tensor& dense = t->is_contiguous() ? *t : keep(torch::stable::contiguous(*t));
    return {dense.data_ptr(), dtype_of(dense)};
  }

  // x has no columns, so x @ weight.T is 0: the same with one column of zeros.
  void without_features(const Tensor& weight) {
    const auto zeros = [&](int64_t rows) {
      const Tensor t = empty({rows, 1}, type_of(weight), weight.get_device_index());
      return matrix_of(keep(torch::stable::fill_(t, 0.0)));
    };
    layer.x = zeros(layer.M);
    layer.x_dtype = layer.dtype;
    layer.weight = zeros(layer.N);
    layer.K = 1;
    layer.prologue.count = 0;
  }
};

void check_device(const Device& device) {
  STD_TORCH_CHECK(device.major >= 8, "fusedres: the GPU has compute capability ", device.major, ".",
                  device.minor, ", the CUDA kernels need 8.0");
}

void check_recipe(const Call& c) {
  STD_TORCH_CHECK(!c.recipe.batch_stats,
                  "fusedres: the CUDA kernels do not compute batch statistics");
}

// ---- forward

// y, and what backward needs if `save`: see Saved.
std::vector<Tensor> forward(const Call& c, bool save) {
  check_recipe(c);
  const Recipe& r = c.recipe;
  const Tensor& x = c.x;
  Where where(x);
  const Device& device = where.device;
  check_device(device);
  const bool rows = save && r.has(Stage::norm) && r.norm != Norm::batch;
  std::vector<Tensor> results = {where.make({c.M(), c.N()}, c.y_dtype())};
  ForwardOut out = {};
  out.y = matrix_of(results[0]);
  if (save && r.saves_z()) {
    results.push_back(where.make({c.M(), c.N()}, c.product_dtype()));
    out.z = matrix_of(results.back());
  }
  if (rows) {
    results.push_back(where.make({2 * c.M()}, ScalarType::Float));
    out.stats = static_cast<float*>(results.back().data_ptr());
  }
  if (save && c.casts()) {
    results.push_back(where.make({c.M(), c.K()}, c.product_dtype()));
    if (c.K() > 0) out.operand = matrix_of(results.back());
  }
  if (c.M() == 0 || c.N() == 0) return results;

  const Prepared prepared(c);
  const Layer& layer = prepared.layer;
#ifdef FUSEDRES_SM90
  if (on_hopper(layer, device)) {
    const Tile tile = sm90::plan_forward(layer, device.multiprocessors);
    where.give_memory(out, tile);
    check_launch(residual_forward_sm90(layer, out, tile, where.stream), "the Hopper forward");
    return results;
  }
#endif
  const char* reason = why_not(layer, device.shared_limit, false);
  STD_TORCH_CHECK(reason == nullptr, "fusedres: the CUDA kernels cannot run this layer: ", reason);
  const Tile tile = plan_forward(layer, device.multiprocessors, device.shared_limit);
  where.give_memory(out, tile);
  check_launch(residual_forward_sm80(layer, out, tile, where.stream), "the forward");
  return results;
}

// ---- backward

bool saves_statistics(const Call& c) {
  return c.recipe.has(Stage::norm) && c.recipe.norm != Norm::batch;
}

std::vector<Tensor> backward(const Call& c, const Tensor& dy, const Saved& saved, int64_t needs) {
  check_recipe(c);
  check_matrix("dy", dy, c.M(), c.N(), c.x);
  STD_TORCH_CHECK(type_of(dy) == c.y_dtype(), "fusedres: dy and y have different dtypes");
  const Recipe& r = c.recipe;
  const Tensor& x = c.x;
  if (const Optional& stats = saved.stats)
    STD_TORCH_CHECK(together(*stats, x) && stats->is_contiguous() && stats->numel() == 2 * c.M() &&
                        type_of(*stats) == ScalarType::Float,
                    "fusedres: stats has shape ", shape_text(*stats), ", expected (", 2 * c.M(),
                    ",), float32, on x's device");

  Where where(x);
  const Device& device = where.device;
  check_device(device);
  // The gradients asked for, each contiguous in its tensor's shape and dtype.
  const std::array<const Optional, kInputs> inputs = {
      x, c.weight, c.bias, c.norm_weight, c.norm_bias, c.gate, c.residual};
  std::array<Optional, kInputs> grads;
  std::vector<Tensor> results;
  for (int i = 0; i < kInputs; ++i) {
    if (!(needs >> i & 1)) continue;
    STD_TORCH_CHECK(inputs[i].has_value(), "fusedres: the gradient of input ", i,
                    " was asked for, but there is none");
    const Tensor& t = *inputs[i];
    grads[i] = t.dim() == 2 ? where.make({t.size(0), t.size(1)}, type_of(t))
                            : where.make({t.size(0)}, type_of(t));
    results.push_back(*grads[i]);
  }
  if (results.empty()) return results;
  if (c.M() == 0 || c.N() == 0 || (c.K() == 0 && !r.prologue.empty())) {
    for (Tensor& t : results) torch::stable::fill_(t, 0.0);
    return results;
  }
  const std::pair<Input, Stage> users[] = {{kNormWeight, Stage::norm},
                                           {kNormBias, Stage::norm},
                                           {kGate, Stage::gate},
                                           {kResidual, Stage::add}};
  for (const auto& [input, stage] : users)  // what no stage uses has a gradient of 0
    if (grads[input] && !r.has(stage)) torch::stable::fill_(*grads[input], 0.0);

  const Prepared prepared(c);
  const Layer& layer = prepared.layer;
  const char* reason = why_not(layer, device.shared_limit, true);
  STD_TORCH_CHECK(reason == nullptr, "fusedres: the CUDA kernels cannot run this layer: ", reason);
  const bool features = c.K() > 0;  // else layer.x and layer.weight are stand-ins
  const bool sums = needs & ~(1 << kX | 1 << kResidual);
  BackwardOut first = {};
  first.dy = matrix_of(dy);
  if (saved.z) first.z = matrix_of(*saved.z);
  if (saved.stats) first.stats = static_cast<const float*>(saved.stats->data_ptr());
  if (features) first.dx = matrix_of(grads[kX]);
  first.dresidual = matrix_of(grads[kResidual]);
  const bool reads_dz = walks_z(layer) && (grads[kWeight] || grads[kBias]);
  bool reads_dt = layer.prologue.count > 0 && grads[kX];
  for (const auto& [input, stage] : users) reads_dt |= grads[input] && c.in_prologue(stage);
  if (reads_dz) first.dz = {where.scratch<void>(c.M() * c.N(), c.product_dtype()), c.N()};
  if (reads_dt) first.dt = {where.scratch<void>(c.M() * c.K(), c.product_dtype()), c.K()};
  if (needs_row_means(layer)) first.row_means = where.scratch<float>(2 * c.M(), ScalarType::Float);
  if (first.dz.data || first.dt.data || first.dx.data || first.dresidual.data || first.row_means) {
    const Tile tile = plan_backward(layer, first, device.multiprocessors, device.shared_limit);
    where.give_memory(first, tile);
    check_launch(residual_backward_sm80(layer, first, tile, where.stream), "the backward of dx");
  }
  if (!sums) return results;

  SumsOut second = {};
  second.from = first;
  if (saved.operand && grads[kWeight])
    second.operand = matrix_of(where.workspace.emplace_back(adjacent_columns(*saved.operand)));
  if (features) second.dweight = matrix_of(grads[kWeight]);
  second.dbias = data_of(grads[kBias]);
  second.dnorm_weight = data_of(grads[kNormWeight]);
  second.dnorm_bias = data_of(grads[kNormBias]);
  second.dgate = data_of(grads[kGate]);
  const Tile cut = plan_sums(layer, second, device.multiprocessors);
  if (cut.programs == 0) return results;
  where.give_memory(second, cut);
  check_launch(residual_sums_sm80(layer, second, cut, where.stream), "the backward of parameters");
  return results;
}

// ---- the ops

void residual_forward(StableIValue* stack, uint64_t, uint64_t) {
  const Call c(stack, true);
  stack[0] = from(forward(c, to<bool>(stack[Call::kMore])));
}

void residual_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor dy = adjacent_columns(to<Tensor>(stack[0]));
  const std::vector<Tensor> kept = to<std::vector<Tensor>>(stack[1]);
  StableIValue* operands = stack + Call::kBefore;
  const int64_t needs = to<int64_t>(operands[Call::kMore]);
  const Call c(operands, true, needs);
  stack[0] = from(backward(c, dy, Saved(c, kept, saves_statistics(c)), needs));
}

}  // namespace
}  // namespace fusedres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def(fusedres::forward_schema("cuda_residual_forward").c_str());
  m.def(fusedres::backward_schema("cuda_residual_backward").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CUDA, m) {
  m.impl("cuda_residual_forward", &fusedres::cuda::residual_forward);
  m.impl("cuda_residual_backward", &fusedres::cuda::residual_backward);
}
