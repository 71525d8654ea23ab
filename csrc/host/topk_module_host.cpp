// The codec of packed top-k rows for Python: kdkernels._host.topk_*.
#include "host/host.h"
#include "host/topk_codec.h"

#include <pybind11/numpy.h>

#include <stdexcept>

namespace py = pybind11;

namespace kd {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

TopKFormat checked_format(int64_t k, int64_t vocab, int bits) {
  const auto require = [](bool good, const std::string& message) {
    if (!good) throw std::invalid_argument("TopKCodec: " + message);
  };
  require(vocab >= 1 && vocab <= int64_t{1} << 31,
          "vocab_size must be in [1, 2^31], got " + std::to_string(vocab));
  require(k >= 1 && k <= 65535, "k must be in [1, 65535], got " + std::to_string(k));
  require(k <= vocab,
          "k must be at most vocab_size " + std::to_string(vocab) + ", got " + std::to_string(k));
  require(bits >= 4 && bits <= 16, "bits must be in [4, 16], got " + std::to_string(bits));
  return {k, vocab, bits};
}

void check_columns(const char* name, const py::array& array, int64_t columns) {
  if (array.ndim() == 2 && array.shape(1) == columns) return;
  throw std::invalid_argument("TopKCodec: " + std::string(name) + " must be [rows, " +
                              std::to_string(columns) + "], got " +
                              std::string(py::str(array.attr("shape"))));
}

void require_row(const std::string& wrong, int64_t row) {
  if (wrong.empty()) return;
  throw std::invalid_argument("TopKCodec: " + wrong + " in row " + std::to_string(row));
}

Array<uint8_t> encode(const Array<int64_t>& ids, const Array<float>& logprobs, int64_t k,
                      int64_t vocab, int bits) {
  const TopKFormat format = checked_format(k, vocab, bits);
  const int64_t width = format.row_bytes();
  check_columns("ids", ids, k);
  check_columns("logprobs", logprobs, k);
  const int64_t rows = ids.shape(0);
  if (logprobs.shape(0) != rows) {
    throw std::invalid_argument("TopKCodec: logprobs must have " + std::to_string(rows) +
                                " rows, got " + std::to_string(logprobs.shape(0)));
  }
  Array<uint8_t> packed({rows, width});
  const int64_t* id = ids.data();
  const float* logprob = logprobs.data();
  uint8_t* out = packed.mutable_data();
  py::gil_scoped_release release;
  TopKCodec codec(format);
  for (int64_t row = 0; row < rows; ++row) {
    require_row(codec.encode(id + row * k, logprob + row * k, out + row * width), row);
  }
  return packed;
}

py::tuple decode(const Array<uint8_t>& packed, int64_t k, int64_t vocab, int bits) {
  const TopKFormat format = checked_format(k, vocab, bits);
  const int64_t width = format.row_bytes();
  check_columns("rows", packed, width);
  const int64_t rows = packed.shape(0);
  Array<int64_t> ids({rows, k});
  Array<float> logprobs({rows, k});
  const uint8_t* in = packed.data();
  int64_t* id = ids.mutable_data();
  float* logprob = logprobs.mutable_data();
  {
    py::gil_scoped_release release;
    TopKCodec codec(format);
    for (int64_t row = 0; row < rows; ++row) {
      require_row(codec.decode(in + row * width, id + row * k, logprob + row * k), row);
    }
  }
  return py::make_tuple(ids, logprobs);
}

int64_t row_bytes(int64_t k, int64_t vocab, int bits) {
  return checked_format(k, vocab, bits).row_bytes();
}

const HostBindings kBindings([](py::module_& m) {
  m.def("topk_row_bytes", &row_bytes, "Bytes of one packed row.", py::arg("k"), py::arg("vocab"),
        py::arg("bits"));
  m.def("topk_encode", &encode, "Packs rows of ids and log-probabilities.",
        py::arg("ids").noconvert(), py::arg("logprobs").noconvert(), py::arg("k"), py::arg("vocab"),
        py::arg("bits"));
  m.def("topk_decode", &decode, "Ids and log-probabilities, the largest first.",
        py::arg("rows").noconvert(), py::arg("k"), py::arg("vocab"), py::arg("bits"));
});

}  // namespace

}  // namespace kd
