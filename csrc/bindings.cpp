// Python bindings. The extension takes raw pointers and knows nothing of torch, so that one build serves every torch
// version; the ops check dtypes, devices, shapes and strides before vcpo_kernels/backends/native/ hands addresses over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "row_ops.h"
#include "sequence_ops.h"

namespace py = pybind11;

namespace vcpo {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // 0, an absent tensor, gives null
}

#if defined(VCPO_HAS_CUDA)
constexpr bool kHasCuda = true;
using AnyPlace = std::variant<CpuPlace, CudaPlace>;
#else
constexpr bool kHasCuda = false;
using AnyPlace = std::variant<CpuPlace>;
#endif

// Where an op's arrays are, and what runs it there.
struct Place {
  AnyPlace place;

  static Place cpu(int threads) { return {CpuPlace{threads}}; }
  static Place cuda(int device, std::uintptr_t stream) {
#if defined(VCPO_HAS_CUDA)
    return {CudaPlace{device, pointer<void>(stream)}};
#else
    (void)stream;
    throw std::runtime_error("Place.cuda: device " + std::to_string(device) +
                             ", but the compiled extension was built without nvcc; install the CUDA toolkit and run "
                             "`CMAKE_ARGS=-DVCPO_CUDA=ON pip install .` in the source folder");
#endif
  }
  // op(place), for the overload of that place.
  template <class Op>
  void run(const Op& op) const {
    const py::gil_scoped_release release;
    std::visit(op, place);
  }
};

Rows rows_of(std::uintptr_t data, int dtype, std::int64_t outer, std::int64_t inner, std::int64_t vocabulary,
             std::int64_t stride_outer, std::int64_t stride_inner) {
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  if (outer < 0 || inner < 0 || vocabulary < 1) throw std::invalid_argument("sizes must be >= 0, vocabulary >= 1");
  return {pointer<const void>(data), static_cast<Dtype>(dtype), outer, inner, vocabulary, stride_outer, stride_inner};
}

void bind_arguments(py::module_& m) {
  py::class_<Place>(m, "Place")
      .def_static("cpu", &Place::cpu, py::arg("threads"))
      .def_static("cuda", &Place::cuda, py::arg("device"), py::arg("stream"));
  py::class_<Rows>(m, "Rows").def(py::init(&rows_of), py::arg("data"), py::arg("dtype"), py::arg("outer"),
                                  py::arg("inner"), py::arg("vocabulary"), py::arg("stride_outer"),
                                  py::arg("stride_inner"));
  py::class_<Output>(m, "Output")
      .def(py::init([](std::uintptr_t data, std::int64_t stride_outer, std::int64_t stride_inner) {
             return Output{pointer<void>(data), stride_outer, stride_inner};
           }),
           py::arg("data"), py::arg("stride_outer"), py::arg("stride_inner"));
  py::class_<Tokens>(m, "Tokens")
      .def(py::init([](std::uintptr_t ids, std::uintptr_t mask, bool shift) {
             return Tokens{pointer<const std::int64_t>(ids), pointer<const std::uint8_t>(mask), shift};
           }),
           py::arg("ids"), py::arg("mask"), py::arg("shift"));
  py::class_<Scaling>(m, "Scaling").def(py::init<float, float>(), py::arg("temperature"), py::arg("softcap"));
  py::class_<StatisticsOut>(m, "Statistics")
      .def(py::init([](std::uintptr_t logp, std::uintptr_t entropy, std::uintptr_t score_sqnorm, std::uintptr_t lse) {
             return StatisticsOut{pointer<float>(logp), pointer<float>(entropy), pointer<float>(score_sqnorm),
                                  pointer<float>(lse)};
           }),
           py::arg("logp"), py::arg("entropy"), py::arg("score_sqnorm"), py::arg("lse"));
  py::class_<TokenGradients>(m, "TokenGradients")
      .def(py::init([](std::uintptr_t logp, std::uintptr_t entropy, std::uintptr_t lse, std::uintptr_t grad_logp,
                       std::uintptr_t grad_entropy, std::uintptr_t target_logits) {
             return TokenGradients{pointer<const float>(logp),         pointer<const float>(entropy),
                                   pointer<const float>(lse),          pointer<const float>(grad_logp),
                                   pointer<const float>(grad_entropy), pointer<const float>(target_logits)};
           }),
           py::arg("logp"), py::arg("entropy"), py::arg("lse"), py::arg("grad_logp"), py::arg("grad_entropy"),
           py::arg("target_logits"));
}

void bind_row_ops(py::module_& m) {
  m.def(
      "token_stats_forward",
      [](const Rows& rows, const Tokens& tokens, const Scaling& scaling, const StatisticsOut& statistics,
         const Place& place) {
        place.run([&](const auto& p) { token_stats_forward(rows, tokens, scaling, statistics, p); });
      },
      py::arg("rows"), py::arg("tokens"), py::arg("scaling"), py::arg("statistics"), py::arg("place"));
  m.def(
      "token_states",
      [](const Rows& rows, const Tokens& tokens, const Scaling& scaling, std::uintptr_t states, const Place& place) {
        const ShardStatesOut out{pointer<float>(states), rows.outer * rows.inner};
        place.run([&](const auto& p) { token_states(rows, tokens, scaling, out, p); });
      },
      py::arg("rows"), py::arg("tokens"), py::arg("scaling"), py::arg("states"), py::arg("place"));
  m.def(
      "token_stats_backward",
      [](const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling,
         const TokenGradients& gradients, const Place& place) {
        place.run([&](const auto& p) { token_stats_backward(out, rows, tokens, scaling, gradients, p); });
      },
      py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("scaling"), py::arg("gradients"), py::arg("place"));
  m.def(
      "score_rows",
      [](const Output& out, const Rows& rows, const Tokens& tokens, const Scaling& scaling, std::uintptr_t coefficients,
         const StatisticsOut& statistics, const Place& place) {
        const float* c = pointer<const float>(coefficients);
        place.run([&](const auto& p) { score_rows(out, rows, tokens, scaling, c, statistics, p); });
      },
      py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("scaling"), py::arg("coefficients"),
      py::arg("statistics"), py::arg("place"));
}

Segments segments_of(std::uintptr_t mask, std::uintptr_t offsets, std::uintptr_t order, std::int64_t sequences,
                     std::int64_t tokens) {
  if (sequences < 0 || tokens < 0) throw std::invalid_argument("sizes must be >= 0");
  return {pointer<const std::uint8_t>(mask), pointer<const std::int64_t>(offsets), pointer<const std::int64_t>(order),
          sequences, tokens};
}

template <class T>
void bind_sequence_ops(py::module_& m, const std::string& suffix) {
  using In = SequenceInputs<T>;
  using Out = SequenceOutputs<T>;
  m.def(("segment_sum" + suffix).c_str(),
        [](std::uintptr_t out, std::uintptr_t values, const Segments& segments, int threads) {
          const py::gil_scoped_release release;
          segment_sum(pointer<T>(out), pointer<const T>(values), segments, threads);
        },
        py::arg("out"), py::arg("values"), py::arg("segments"), py::arg("threads"));
  m.def(("segment_spread" + suffix).c_str(),
        [](std::uintptr_t out, std::uintptr_t per_sequence, const Segments& segments, int threads) {
          const py::gil_scoped_release release;
          segment_spread(pointer<T>(out), pointer<const T>(per_sequence), segments, threads);
        },
        py::arg("out"), py::arg("per_sequence"), py::arg("segments"), py::arg("threads"));
  m.def(("vcpo_coefficients" + suffix).c_str(),
        [](const std::array<std::uintptr_t, 6>& in, std::int64_t group_size, std::int64_t num_groups,
           const std::array<std::uintptr_t, 7>& out, const Segments& segments, const Switches& switches, int threads) {
          const py::gil_scoped_release release;
          const In inputs{pointer<const T>(in[0]),
                          pointer<const T>(in[1]),
                          pointer<const T>(in[2]),
                          pointer<const T>(in[3]),
                          pointer<const T>(in[4]),
                          pointer<const std::int64_t>(in[5]),
                          group_size,
                          num_groups};
          const Out outputs{pointer<T>(out[0]), pointer<T>(out[1]), pointer<double>(out[2]), pointer<T>(out[3]),
                            pointer<T>(out[4]), pointer<T>(out[5]), pointer<T>(out[6])};
          vcpo_coefficients(inputs, outputs, segments, switches, threads);
        },
        py::arg("inputs"), py::arg("group_size"), py::arg("num_groups"), py::arg("outputs"), py::arg("segments"),
        py::arg("switches"), py::arg("threads"));
}

void bind_sequences(py::module_& m) {
  py::class_<Segments>(m, "Segments")
      .def(py::init(&segments_of), py::arg("mask"), py::arg("offsets"), py::arg("order"), py::arg("sequences"),
           py::arg("tokens"));
  py::class_<Switches>(m, "Switches")
      .def(py::init([](int weighting, int aggregation, bool normalize_std, bool skip_first, double max_weight,
                       double ess_max_weight, double num_sequences, double num_tokens, double max_tokens) {
             return Switches{static_cast<Weighting>(weighting),
                             static_cast<Aggregation>(aggregation),
                             normalize_std,
                             skip_first,
                             max_weight,
                             ess_max_weight,
                             num_sequences,
                             num_tokens,
                             max_tokens};
           }),
           py::arg("weighting"), py::arg("aggregation"), py::arg("normalize_std"), py::arg("skip_first"),
           py::arg("max_weight"), py::arg("ess_max_weight"), py::arg("num_sequences"), py::arg("num_tokens"),
           py::arg("max_tokens"));
  bind_sequence_ops<float>(m, "_f32");
  bind_sequence_ops<double>(m, "_f64");
}

void bind_cpu(py::module_& m) {
  m.def(
      "isa_available",
      [] {
        std::vector<std::string> names;
        for (Isa isa : isa_available()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Instruction sets this build has and this CPU runs, slowest first.");
  m.def("isa_chosen", [] { return std::string(isa_name(isa_chosen())); });
  m.def("isa_choose", &isa_choose, py::arg("name"));
  m.def(
      "prepare_if_fresh",
      [](std::uintptr_t data, std::size_t bytes) { return prepare_if_fresh(pointer<void>(data), bytes); },
      py::arg("data"), py::arg("bytes"), "Asks for huge pages where the buffer has no memory behind it yet.");
}

}  // namespace
}  // namespace vcpo

PYBIND11_MODULE(_native, m) {
  m.doc() = "vcpo_kernels' compiled kernels, on raw addresses.";
  m.attr("cuda") = vcpo::kHasCuda;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  vcpo::bind_cpu(m);
  vcpo::bind_arguments(m);
  vcpo::bind_row_ops(m);
  vcpo::bind_sequences(m);
}
