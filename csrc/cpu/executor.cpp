#include "cpu/executor.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <cstdlib>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "common/tensor.h"

namespace bigops {

using torch::stable::detail::from;

// The slots of one run, which has handles of its own for what its calls made.
class Slots {
 public:
  explicit Slots(const std::vector<AtenTensorHandle>& begin)
      : tensors_(begin), made_(begin.size()), integers_(begin.size()) {}
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;
  ~Slots() {
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (made_[i]) aoti_torch_delete_tensor_object(tensors_[i]);
  }

  AtenTensorHandle tensor(int64_t slot) const { return tensors_[static_cast<size_t>(slot)]; }
  AtenTensorHandle copy(int64_t slot) const {
    AtenTensorHandle copied = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor(slot), &copied));
    return copied;
  }
  AtenTensorHandle take(int64_t slot) {
    made_[static_cast<size_t>(slot)] = false;
    return tensor(slot);
  }
  void drop(int64_t slot) {
    if (made_[static_cast<size_t>(slot)]) aoti_torch_delete_tensor_object(take(slot));
  }
  void lend(int64_t slot, AtenTensorHandle tensor) { tensors_[static_cast<size_t>(slot)] = tensor; }
  void put(int64_t slot, AtenTensorHandle tensor) {
    lend(slot, tensor);
    made_[static_cast<size_t>(slot)] = true;
  }

  int64_t& integer(int64_t slot) { return integers_[static_cast<size_t>(slot)]; }
  int64_t value(const Item& item) { return item.slot ? integer(item.value) : item.value; }

 private:
  std::vector<AtenTensorHandle> tensors_;
  std::vector<char> made_;
  std::vector<int64_t> integers_;
};

namespace {

// `from` does not take a handle for a pointer on all versions.
template <class Opaque>
StableIValue of_handle(Opaque* handle) {
  return static_cast<StableIValue>(reinterpret_cast<uintptr_t>(handle));
}

StableIValue optional_of(StableIValue value) { return from(std::optional<StableIValue>(value)); }

// A list that a call consumes.
template <class Each>
StableIValue list_of(const std::vector<Item>& items, const Each& each) {
  StableListHandle list = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(items.size(), &list));
  for (const Item& item : items)
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, each(item)));
  return of_handle(list);
}

StableIValue value_of(const Argument& a, Slots& slots) {
  switch (a.kind) {
    case ArgumentKind::tensor: return of_handle(slots.copy(a.number));
    case ArgumentKind::last_tensor: return of_handle(slots.take(a.number));
    case ArgumentKind::optional_tensor: return optional_of(of_handle(slots.copy(a.number)));
    case ArgumentKind::none: return from(std::nullopt);
    case ArgumentKind::integer: return from(a.number);
    case ArgumentKind::size: return from(slots.integer(a.number));
    case ArgumentKind::optional_integer: return optional_of(from(a.number));
    case ArgumentKind::real: return from(a.real);
    case ArgumentKind::optional_real: return optional_of(from(a.real));
    case ArgumentKind::boolean: return from(a.number != 0);
    case ArgumentKind::integers:
      return list_of(a.items, [&](const Item& item) { return from(slots.value(item)); });
    case ArgumentKind::tensors:
      return list_of(a.items, [&](const Item& item) { return of_handle(slots.copy(item.value)); });
    case ArgumentKind::optional_tensors:
      return list_of(a.items, [&](const Item& item) {
        return item.value < 0 ? from(std::nullopt) : optional_of(of_handle(slots.copy(item.value)));
      });
  }
  fail("argument", "a known kind", std::string(1, static_cast<char>(a.kind)));
}

void by_dispatcher(const std::string& name, const std::string& overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name.c_str(), overload.c_str(), stack, TORCH_ABI_VERSION));
}

int64_t floor_divided(int64_t a, int64_t b) {
  STD_TORCH_CHECK(b != 0, "size: expected a divisor above 0; got 0");
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

int64_t result_of(char sign, int64_t a, int64_t b) {
  switch (sign) {
    case '+': return a + b;
    case '-': return a - b;
    case '*': return a * b;
    default: return floor_divided(a, b);
  }
}

constexpr int64_t kMostDims = 16;

// Sizes and strides of another view of a tensor.
struct View {
  int64_t dims = 0, offset = 0;
  int64_t sizes[kMostDims], strides[kMostDims];

  explicit View(AtenTensorHandle tensor) {
    int64_t *from_sizes = nullptr, *from_strides = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
    STD_TORCH_CHECK(dims <= kMostDims, "tensor: expected at most 16 dimensions; got ", dims);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &from_sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &from_strides));
    for (int64_t i = 0; i < dims; ++i) {
      sizes[i] = from_sizes[i];
      strides[i] = from_strides[i];
    }
  }

  int64_t dimension(int64_t d) const {
    const int64_t at = d < 0 ? d + dims : d;
    STD_TORCH_CHECK(0 <= at && at < dims, "dimension: expected one of ", dims, "; got ", d);
    return at;
  }

  AtenTensorHandle of(AtenTensorHandle tensor) const {
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(tensor, dims, sizes, strides, offset, &made));
    return made;
  }

  // Takes other sizes; false where the elements do not lie so, and where torch should judge them.
  bool reshape(const int64_t* to, int64_t count) {
    int64_t total = 1, known = 1, free = -1;
    for (int64_t i = 0; i < dims; ++i) total *= sizes[i];
    for (int64_t i = 0; i < count; ++i) {
      if (to[i] == -1 && free < 0)
        free = i;
      else
        known *= to[i];
    }
    if (total <= 0 || known <= 0) return false;
    if (free < 0 ? known != total : total % known != 0) return false;
    int64_t new_sizes[kMostDims], new_strides[kMostDims];
    for (int64_t i = 0; i < count; ++i) new_sizes[i] = i == free ? total / known : to[i];
    int64_t at = count - 1;  // of the new dimensions, which fill runs of the old from behind
    for (int64_t i = dims - 1; i >= 0;) {
      if (sizes[i] == 1) {  // whose stride means nothing
        --i;
        continue;
      }
      const int64_t stride = strides[i];
      int64_t run = sizes[i--];
      for (; i >= 0 && (sizes[i] == 1 || strides[i] == run * stride); --i) run *= sizes[i];
      int64_t step = 1;
      for (; at >= 0 && (step < run || new_sizes[at] == 1); --at) {
        new_strides[at] = step * stride;
        step *= new_sizes[at];
      }
      if (step != run) return false;
    }
    for (; at >= 0; --at) new_strides[at] = 1;  // sizes of 1
    dims = count;
    for (int64_t i = 0; i < count; ++i) {
      sizes[i] = new_sizes[i];
      strides[i] = new_strides[i];
    }
    return true;
  }
};

}  // namespace

void Program::call(const std::string& name, const std::string& overload,
                   std::vector<Argument> arguments, std::vector<int64_t> outputs) {
  const std::string own = "bigops::";
  BoxedKernel kernel = nullptr;
  if (name.compare(0, own.size(), own) == 0) {
    const std::string local = name.substr(own.size()) + (overload.empty() ? "" : "." + overload);
    if (const auto found = cpu_kernels().find(local); found != cpu_kernels().end())
      kernel = found->second;
  }
  Step step{};
  step.kind = 'c';
  step.kernel = kernel;
  step.name = name;
  step.overload = overload;
  step.arguments = std::move(arguments);
  step.outputs = std::move(outputs);
  steps_.push_back(std::move(step));
}

void Program::bind(int64_t slot, const Tensor& tensor) {
  bound_.push_back(tensor);
  begin_[static_cast<size_t>(slot)] = bound_.back().get();
}

void Program::size(int64_t output, int64_t tensor, int64_t dimension) {
  Step& step = plain('s', output);
  step.a = {true, tensor};
  step.dimension = dimension;
}

void Program::arithmetic(int64_t output, char sign, Item a, Item b) {
  Step& step = plain(sign, output);
  step.a = a;
  step.b = b;
}

void Program::transpose(int64_t output, int64_t tensor, int64_t a, int64_t b) {
  Step& step = plain('t', output);
  step.a = {true, tensor};
  step.dimension = a;
  step.step = b;
}

void Program::slice(int64_t output, int64_t tensor, int64_t dimension, Item begin, Item end,
                    int64_t by) {
  Step& step = plain('l', output);
  step.a = {true, tensor};
  step.dimension = dimension;
  step.items = {begin, end};
  step.step = by;
}

void Program::reshape(int64_t output, int64_t tensor, std::vector<Item> sizes) {
  Step& step = plain('r', output);
  step.a = {true, tensor};
  step.items = std::move(sizes);
}

void Program::drop(std::vector<Item> slots) { plain('d', -1).items = std::move(slots); }

Program::Step& Program::plain(char kind, int64_t output) {
  Step step{};
  step.kind = kind;
  step.outputs = {output};
  steps_.push_back(std::move(step));
  return steps_.back();
}

void Program::view(const Step& step, Slots& slots) {
  const AtenTensorHandle source = slots.tensor(step.a.value);
  View view(source);
  if (step.kind == 't') {
    const int64_t a = view.dimension(step.dimension), b = view.dimension(step.step);
    std::swap(view.sizes[a], view.sizes[b]);
    std::swap(view.strides[a], view.strides[b]);
  } else if (step.kind == 'l') {
    const int64_t d = view.dimension(step.dimension), size = view.sizes[d];
    const auto within = [size](int64_t at, int64_t low) {
      at = at < 0 ? at + size : at;
      return at < low ? low : at > size ? size : at;
    };
    const int64_t begin = within(slots.value(step.items[0]), 0);
    const int64_t end = within(slots.value(step.items[1]), begin);
    view.offset = begin * view.strides[d];
    view.sizes[d] = (end - begin + step.step - 1) / step.step;
    view.strides[d] *= step.step;
  } else {
    int64_t sizes[kMostDims];
    const auto dims = static_cast<int64_t>(step.items.size());
    for (int64_t i = 0; i < dims; ++i) sizes[i] = slots.value(step.items[static_cast<size_t>(i)]);
    if (!view.reshape(sizes, dims)) {
      std::vector<Item> items;
      for (int64_t i = 0; i < dims; ++i) items.push_back({false, sizes[i]});
      StableIValue stack[2] = {of_handle(slots.copy(step.a.value)),
                               list_of(items, [](const Item& item) { return from(item.value); })};
      by_dispatcher("aten::reshape", "", stack);
      slots.put(step.outputs[0], torch::stable::detail::to<AtenTensorHandle>(stack[0]));
      return;
    }
  }
  slots.put(step.outputs[0], view.of(source));
}

std::vector<Tensor> Program::run(const std::vector<Tensor>& inputs) const {
  if (inputs.size() != inputs_.size())
    fail("inputs", std::to_string(inputs_.size()) + " tensors", std::to_string(inputs.size()));
  Slots slots(begin_);
  for (size_t i = 0; i < inputs.size(); ++i) slots.lend(inputs_[i], inputs[i].get());
  std::vector<StableIValue> stack;
  for (const Step& step : steps_) {
    if (step.kind == 's') {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(slots.tensor(step.a.value), step.dimension,
                                                        &slots.integer(step.outputs[0])));
      continue;
    }
    if (step.kind == 'd') {
      for (const Item& item : step.items) slots.drop(item.value);
      continue;
    }
    if (step.kind == 't' || step.kind == 'l' || step.kind == 'r') {
      view(step, slots);
      continue;
    }
    if (step.kind != 'c') {
      slots.integer(step.outputs[0]) =
          result_of(step.kind, slots.value(step.a), slots.value(step.b));
      continue;
    }
    const size_t arguments = step.arguments.size(), outputs = step.outputs.size();
    stack.resize(arguments > outputs ? arguments : outputs);
    for (size_t i = 0; i < arguments; ++i) stack[i] = value_of(step.arguments[i], slots);
    if (step.kernel != nullptr)
      step.kernel(stack.data(), arguments, outputs);
    else
      STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(step.name.c_str(), step.overload.c_str(),
                                                          stack.data(), TORCH_ABI_VERSION));
    for (size_t i = 0; i < outputs; ++i) {
      const auto made = torch::stable::detail::to<AtenTensorHandle>(stack[i]);
      if (step.outputs[i] < 0)
        aoti_torch_delete_tensor_object(made);
      else
        slots.put(step.outputs[i], made);
    }
  }
  std::vector<Tensor> results;
  results.reserve(results_.size());
  for (const int64_t slot : results_) results.emplace_back(slots.copy(slot));
  return results;
}

namespace {

struct Programs {
  std::shared_mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Program>> by_number;
  int64_t next = 1;
};

Programs& programs() {
  static Programs all;
  return all;
}

std::shared_ptr<Program> program_of(int64_t number) {
  std::shared_lock lock(programs().mutex);
  const auto found = programs().by_number.find(number);
  if (found == programs().by_number.end())
    fail("program", "the number of one that is kept", std::to_string(number));
  return found->second;
}

std::vector<Tensor> execute(int64_t program, std::vector<Tensor> inputs) {
  return program_of(program)->run(inputs);
}

void bind_program(int64_t program, std::vector<int64_t> slots, std::vector<Tensor> tensors) {
  if (slots.size() != tensors.size())
    fail("tensors", std::to_string(slots.size()), std::to_string(tensors.size()));
  const std::shared_ptr<Program> known = program_of(program);
  for (size_t i = 0; i < slots.size(); ++i) known->bind(slots[i], tensors[i]);
}

}  // namespace

namespace {

// What a run frees is at the end of the heap, and glibc gives it back to the system, so that the
// next run is paged in anew: MiniLM int8 at 8x64 600 to 900 faults a call, 14 ms instead of 11.
// With Python between the calls small objects lie behind the tensors, and nothing is given back.
// Who has set it otherwise is left alone.
void keep_freed_memory() {
#if defined(__GLIBC__)
  constexpr int kKept = 256 << 20, kMostOfHeap = 32 << 20;  // glibc takes no larger threshold
  for (const char* name : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"})
    if (std::getenv(name) != nullptr) return;
  mallopt(M_MMAP_THRESHOLD, kMostOfHeap);
  mallopt(M_TRIM_THRESHOLD, kKept);
#endif
}

}  // namespace

int64_t keep_program(std::shared_ptr<Program> program) {
  static std::once_flag once;
  std::call_once(once, keep_freed_memory);
  std::unique_lock lock(programs().mutex);
  const int64_t number = programs().next++;
  programs().by_number[number] = std::move(program);
  return number;
}

void drop_program(int64_t number) {
  std::unique_lock lock(programs().mutex);
  programs().by_number.erase(number);
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CompositeExplicitAutograd, m) {
  m.impl("execute", TORCH_BOX(&bigops::execute));
  m.impl("bind_program", TORCH_BOX(&bigops::bind_program));
}
