// A straight line of calls, run without Python: what a deployed graph becomes.
//
// Tensors and integers live in numbered slots. A call of an op of this package goes to its kernel,
// any other to torch's dispatcher; all conversions are those of the stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/kernel_table.h"

namespace bigops {

enum class ArgumentKind : char {
  tensor = 'T',           // number: slot
  last_tensor = 't',      // the same, made by a call and read for the last time
  optional_tensor = 'O',  // number: slot
  none = 'N',
  integer = 'i',
  size = 's',  // number: slot of an integer
  optional_integer = 'I',
  real = 'f',
  optional_real = 'F',
  boolean = 'b',
  integers = 'L',          // items
  tensors = 'A',           // items: slots
  optional_tensors = 'B',  // items: slots, or -1
};

struct Item {
  bool slot;
  int64_t value;
};

struct Argument {
  ArgumentKind kind;
  int64_t number = 0;
  double real = 0;
  std::vector<Item> items;
};

class Slots;

class Program {
 public:
  // The number of slots, and those of the tensors that a run is given and gives.
  Program(int64_t slots, std::vector<int64_t> inputs, std::vector<int64_t> results)
      : begin_(static_cast<size_t>(slots)),
        inputs_(std::move(inputs)),
        results_(std::move(results)) {}

  // A tensor that is there in every run. Not while another thread runs the program.
  void bind(int64_t slot, const torch::stable::Tensor& tensor);
  // `outputs`: a slot for each result of the op, or -1.
  void call(const std::string& name, const std::string& overload, std::vector<Argument> arguments,
            std::vector<int64_t> outputs);
  // An integer: the size of a tensor, or '+', '-', '*', '/' (floor) of two.
  void size(int64_t output, int64_t tensor, int64_t dimension);
  void arithmetic(int64_t output, char sign, Item a, Item b);
  // Other views of a tensor's memory, as torch's transpose, slice and reshape (which copies where
  // it has to); -1 stands for the size that is left.
  void transpose(int64_t output, int64_t tensor, int64_t a, int64_t b);
  void slice(int64_t output, int64_t tensor, int64_t dimension, Item begin, Item end, int64_t step);
  void reshape(int64_t output, int64_t tensor, std::vector<Item> sizes);
  // Frees tensors that calls or views made and nothing reads any more.
  void drop(std::vector<Item> slots);

  std::vector<torch::stable::Tensor> run(const std::vector<torch::stable::Tensor>& inputs) const;

 private:
  struct Step {
    char kind;           // 'c': call, 's': size, 't', 'l', 'r': a view, 'd': drop, or a sign
    BoxedKernel kernel;  // null: by torch's dispatcher
    std::string name, overload;
    std::vector<Argument> arguments;
    std::vector<int64_t> outputs;
    Item a, b;
    int64_t dimension, step;
    std::vector<Item> items;
  };

  Step& plain(char kind, int64_t output);
  static void view(const Step& step, Slots& slots);

  std::vector<AtenTensorHandle> begin_;  // by slot: what is bound, or null
  std::vector<torch::stable::Tensor> bound_;
  std::vector<int64_t> inputs_, results_;
  std::vector<Step> steps_;
};

// Makes a program known to the op `execute` by a number, until it is dropped.
int64_t keep_program(std::shared_ptr<Program> program);
void drop_program(int64_t number);

}  // namespace bigops
