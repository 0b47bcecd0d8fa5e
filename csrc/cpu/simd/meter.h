// Inner loops of the meters. Each returns the operations (a multiply-add counts 2) it has done.
#pragma once

#include <stdint.h>

namespace bigops {

constexpr int kMeterRounds = 20'000;

double portable_meter_f32();
double avx2_meter_f32();
double avx512_meter_f32();
double avx512bf16_meter_bf16();
double avx512vnni_meter_s8();
double amx_meter_bf16();
double amx_meter_s8();
uint64_t portable_meter_read(const uint64_t* p, int64_t words);
uint64_t avx2_meter_read(const uint64_t* p, int64_t words);
uint64_t avx512_meter_read(const uint64_t* p, int64_t words);

}  // namespace bigops
