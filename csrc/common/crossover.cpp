#include "common/crossover.h"

#include <cstring>
#include <deque>

namespace bigops {
namespace {

struct Entry {
  std::string op, dtype;
  Crossover value;
};

// Written at import only, before any op runs; a handful of entries, so a scan is quickest.
std::deque<Entry>& table() {
  static std::deque<Entry> entries;
  return entries;
}

bool g_onednn_floats = false;  // written like the table

}  // namespace

bool onednn_floats() { return g_onednn_floats; }

void set_float_product(const std::string& library) { g_onednn_floats = library == "onednn"; }

Crossover crossover(const char* op, const char* dtype) {
  for (const Entry& e : table())
    if (e.op == op && e.dtype == dtype) return e.value;
  return {};
}

void set_crossover(const std::string& op, const std::string& dtype, Crossover value) {
  for (Entry& e : table())
    if (e.op == op && e.dtype == dtype) {
      e.value = value;
      return;
    }
  table().push_back({op, dtype, value});
}

}  // namespace bigops
