// What torch's C++ asks of a kind of device that its build has not: a guard, without which nothing can be indexed or
// differentiated there, and hooks that say the device exists. Both do nothing; there is one device, number 0. The guard
// is there from the start, since torch counts devices at its first backward pass; the hooks are there on demand.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <utility>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device ONE(DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return ONE; }
  Device exchangeDevice(Device) const override { return ONE; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, ONE); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, ONE); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
};

struct Installed {
  Installed() { c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard()); }
} const installed;

Hooks ours;

}  // namespace

// Put our hooks in the place of torch's, or torch's back: they have no members, so what differs is the table of methods.
extern "C" void swap_hooks() {
  static_assert(sizeof(at::CUDAHooksInterface) == sizeof(void*));
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::swap(*reinterpret_cast<void**>(theirs), *reinterpret_cast<void**>(static_cast<at::CUDAHooksInterface*>(&ours)));
}
