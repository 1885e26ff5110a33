// A device that is not there: host memory behind torch's PrivateUse1, every operation done by the
// CPU. Numbers are real, so whole trainings run; what differs from a CPU is what torch checks: on
// which device a tensor lies, and when the host asks for a value.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
template <class T>
using Maybe = std::optional<T>;

constexpr auto kStandIn = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(std::max<size_t>(bytes, 1));
    return {data, data, &c10::free_cpu, c10::Device(kStandIn, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
HostMemory memory;
REGISTER_ALLOCATOR(kStandIn, &memory);

// One device with one stream on which nothing is ever under way.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device device() { return {kStandIn, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return kStandIn; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void grow(c10::StorageImpl* storage, size_t bytes) {
  auto data = memory.allocate(bytes);
  std::memcpy(data.get(), storage->data(), std::min(bytes, storage->nbytes()));
  storage->set_data_ptr(std::move(data));
  storage->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return {kStandIn, 0}; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    grow(storage.unsafeGetStorageImpl(), bytes);
  }
};

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& x) {
  if (!x.defined() || x.is_cpu()) return x;
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), x.storage().nbytes(),
      c10::DataPtr(x.storage().mutable_data(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(),
      false);
  auto y = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return y;
}

Tensor like(const Tensor& y, const Tensor& x) { return y.defined() ? y.to(x.device()) : y; }

Tensor empty(SymIntArrayRef size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>,
             Maybe<at::Device>, Maybe<bool>, Maybe<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, Maybe<at::ScalarType> dtype,
                     Maybe<at::Layout>, Maybe<at::Device>, Maybe<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &memory, kKeys,
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView guard;
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar number_of(const Tensor& x) { return on_host(x).item(); }

const Tensor& resize(const Tensor& x, SymIntArrayRef size, Maybe<at::MemoryFormat>) {
  auto* impl = x.unsafeGetTensorImpl();
  at::native::resize_impl_cpu_(impl, C10_AS_INTARRAYREF_SLOW(size), std::nullopt, false);
  const size_t bytes = (impl->storage_offset() + x.numel()) * x.itemsize();
  if (x.storage().nbytes() < bytes) grow(x.storage().unsafeGetStorageImpl(), bytes);
  return x;
}

Tensor& set_strided(Tensor& x, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                    c10::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return x;
}

Tensor& set_storage(Tensor& x, at::Storage storage) {
  const int64_t count = storage.nbytes() / x.itemsize();
  return set_strided(x, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& x, const Tensor& y) {
  return set_strided(x, y.storage(), y.storage_offset(), y.sizes(), y.strides());
}

Tensor convolution(const Tensor& x, const Tensor& w, const Maybe<Tensor>& bias,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   bool transposed, SymIntArrayRef output_padding, SymInt groups) {
  Maybe<Tensor> b;
  if (bias.has_value() && bias->defined()) b = on_host(*bias);
  return like(at::convolution_symint(on_host(x), on_host(w), b, stride, padding, dilation,
                                     transposed, output_padding, groups), x);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
    SymIntArrayRef output_padding, SymInt groups, std::array<bool, 3> mask) {
  std::vector<SymInt> bias{g.sym_size(1)};
  auto [dx, dw, db] = at::convolution_backward_symint(
      on_host(g), on_host(x), on_host(w), at::OptionalSymIntArrayRef(bias), stride, padding,
      dilation, transposed, output_padding, groups, mask);
  return {like(dx, x), like(dw, x), like(db, x)};
}

// 0: attention by plain products, which has a second derivative.
int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const Maybe<Tensor>&, double,
                        bool, Maybe<double>, bool) {
  return 0;
}

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", number_of);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_strided);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", [](const Tensor& x, SymIntArrayRef size) {
    return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
  });
  library.impl("_reshape_alias", [](const Tensor& x, SymIntArrayRef size, SymIntArrayRef stride) {
    return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
  });
  library.impl("unfold", at::native::unfold);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("_fused_sdp_choice", plain_attention);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
}
