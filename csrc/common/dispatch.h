// dtype dispatch by templated lambda: body is called as body.template operator()<scalar_t>().
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace kd {

using torch::headeronly::ScalarType;
using bf16_t = torch::headeronly::BFloat16;
using half_t = torch::headeronly::Half;

// float, bfloat16 and half: what every GPU kernel takes.
template <typename Body>
void dispatch_float(ScalarType dtype, const char* op, const char* name, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::BFloat16:
      return body.template operator()<bf16_t>();
    case ScalarType::Half:
      return body.template operator()<half_t>();
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16, got dtype ",
                      static_cast<int>(dtype));
  }
}

}  // namespace kd
