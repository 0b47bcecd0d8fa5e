#include "cpu/executor.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "common/tensor.h"

namespace bigops {
namespace {

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
  steps_.push_back({'c', kernel, name, overload, std::move(arguments), std::move(outputs), {}, {}});
}

void Program::bind(int64_t slot, const Tensor& tensor) {
  bound_.push_back(tensor);
  begin_[static_cast<size_t>(slot)] = bound_.back().get();
}

void Program::size(int64_t output, int64_t tensor, int64_t dimension) {
  steps_.push_back({'s', nullptr, "", "", {}, {output}, {true, tensor}, {false, dimension}});
}

void Program::arithmetic(int64_t output, char sign, Item a, Item b) {
  steps_.push_back({sign, nullptr, "", "", {}, {output}, a, b});
}

std::vector<Tensor> Program::run(const std::vector<Tensor>& inputs) const {
  if (inputs.size() != inputs_.size())
    fail("inputs", std::to_string(inputs_.size()) + " tensors", std::to_string(inputs.size()));
  Slots slots(begin_);
  for (size_t i = 0; i < inputs.size(); ++i) slots.lend(inputs_[i], inputs[i].get());
  std::vector<StableIValue> stack;
  for (const Step& step : steps_) {
    if (step.kind == 's') {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(slots.tensor(step.a.value), step.b.value,
                                                        &slots.integer(step.outputs[0])));
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

int64_t keep_program(std::shared_ptr<Program> program) {
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
