// Argument checks of hidden_match, the same for the CPU and the CUDA kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "hidden_match/hidden_match.h"

namespace kd {

// The arguments of the operators.
struct MatchInputs {
  const char* op;
  const std::vector<Tensor>& students;  // [rows, width of the layer]
  const std::vector<Tensor>& teachers;
  const std::optional<Tensor>& mask;         // [rows] bool
  const std::optional<Tensor>& row_weights;  // [rows] float32
  const std::optional<Tensor>& denominator;  // [] float32
  const std::vector<double>& weights;        // of the layers
  MatchSpec spec;

  int64_t rows() const { return students[0].size(0); }
  int layers() const { return static_cast<int>(students.size()); }

  // Of the tensor that holds the gradients of all layers.
  int64_t gradient_elements() const {
    int64_t elements = 0;
    for (const Tensor& x : students) elements += rows() * x.size(1);
    return elements;
  }
};

inline void check_match_layer(const MatchInputs& in, size_t layer) {
  const Tensor &student = in.students[layer], &teacher = in.teachers[layer];
  check_rows(student, in.op, "students");
  check_rows(teacher, in.op, "teachers");
  STD_TORCH_CHECK(student.size(0) == in.rows() && student.size(1) > 0, in.op,
                  ": students must have ", in.rows(), " rows, got ", student.size(0), " in layer ",
                  layer);
  STD_TORCH_CHECK(teacher.size(0) == in.rows() && teacher.size(1) == student.size(1), in.op,
                  ": teachers must have the shape of their students [", student.size(0), ", ",
                  student.size(1), "], got [", teacher.size(0), ", ", teacher.size(1),
                  "] in layer ", layer);
  STD_TORCH_CHECK(student.scalar_type() == in.students[0].scalar_type() &&
                      teacher.scalar_type() == in.teachers[0].scalar_type(),
                  in.op, ": students and teachers must have one dtype each, got others in layer ",
                  layer);
}

inline void check_match_dtype(const MatchInputs& in, const Tensor& x, const char* name) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      in.op, ": ", name, " must be float32, bfloat16 or float16, got dtype ",
      static_cast<int>(dtype));
}

inline MatchInputs checked_match(const char* op, const std::vector<Tensor>& students,
                                 const std::vector<Tensor>& teachers,
                                 const std::optional<Tensor>& mask,
                                 const std::optional<Tensor>& row_weights,
                                 const std::optional<Tensor>& denominator,
                                 const std::vector<double>& weights,
                                 const std::vector<double>& numbers) {
  STD_TORCH_CHECK(numbers.size() == kMatchSpecNumbers, op, ": spec must have ", kMatchSpecNumbers,
                  " numbers, got ", numbers.size());
  STD_TORCH_CHECK(0 <= numbers[0] && numbers[0] < kMatchKinds, op, ": kind must be in [0, ",
                  kMatchKinds, "), got ", numbers[0]);
  STD_TORCH_CHECK(
      !students.empty() && students.size() == teachers.size() && students.size() == weights.size(),
      op, ": students, teachers and weights must have one entry a layer, got ", students.size(),
      ", ", teachers.size(), " and ", weights.size());
  const MatchInputs in{op,          students,    teachers, mask,
                       row_weights, denominator, weights,  make_match_spec(numbers)};
  for (size_t layer = 0; layer < students.size(); ++layer) check_match_layer(in, layer);
  check_match_dtype(in, students[0], "students");
  check_match_dtype(in, teachers[0], "teachers");
  check_per_row(mask, in.rows(), ScalarType::Bool, op, "mask");
  check_per_row(row_weights, in.rows(), ScalarType::Float, op, "row_weights");
  if (denominator.has_value()) {
    STD_TORCH_CHECK(denominator->numel() == 1 && denominator->scalar_type() == ScalarType::Float,
                    op, ": denominator must be one float32, got ", denominator->numel(),
                    " of dtype ", static_cast<int>(denominator->scalar_type()));
  }
  return in;
}

}  // namespace kd
