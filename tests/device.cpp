// What torch's C++ asks of a kind of device that its build has not: a guard, without which nothing can be indexed or
// differentiated there, and hooks that say the device exists and lend page-locked memory. There is one device, number 0.
// The guard is there from the start, since torch counts devices at its first backward pass; the hooks are there on demand.
// The guard keeps each thread's current stream, which autograd takes over from forward to backward pass, and tells whoever
// watches (tests/device_streams.py) where autograd has one stream wait for another.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device ONE(DeviceType::CUDA, 0);

thread_local int64_t current = 0;             // this thread's stream
int64_t (*on_record)(int64_t stream) = nullptr;  // gives the number of an event
void (*on_block)(int64_t event, int64_t stream) = nullptr;

Stream numbered(int64_t stream) { return Stream(Stream::UNSAFE, ONE, stream); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return ONE; }
  Device exchangeDevice(Device) const override { return ONE; }
  Stream getStream(Device) const noexcept override { return numbered(current); }
  Stream exchangeStream(Stream stream) const noexcept override { return numbered(std::exchange(current, stream.id())); }
  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (on_record) *event = reinterpret_cast<void*>(on_record(stream.id()));
  }
  void block(void* event, const Stream& stream) const override {
    if (on_block && event) on_block(reinterpret_cast<int64_t>(event), stream.id());
  }
};

// Page-locked memory, of which this machine has none: it is ordinary, and known to be lent.
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* start = std::aligned_alloc(64, (n + 64) / 64 * 64);
    const std::lock_guard<std::mutex> held(lock);
    lent[static_cast<char*>(start)] = n;
    return {start, start, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
  static void give_back(void* start) {
    {
      const std::lock_guard<std::mutex> held(lock);
      lent.erase(static_cast<char*>(start));
    }
    std::free(start);
  }
  static bool has(const void* data) {
    const std::lock_guard<std::mutex> held(lock);
    const auto* byte = static_cast<const char*>(data);
    auto next = lent.upper_bound(const_cast<char*>(byte));
    return next != lent.begin() && byte < std::prev(next)->first + std::prev(next)->second;
  }
  inline static std::mutex lock;
  inline static std::map<char*, size_t> lent;
} pinned;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  bool isPinnedPtr(const void* data) const override { return Pinned::has(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
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

// The current stream of the calling thread, and another in its place.
extern "C" int64_t stream_here() { return current; }
extern "C" void take_stream(int64_t stream) { current = stream; }

// Whom to tell of events, or nobody.
extern "C" void watch_events(int64_t (*record)(int64_t), void (*block)(int64_t, int64_t)) {
  on_record = record;
  on_block = block;
}
