// Python bindings. The extension takes raw pointers and knows nothing of torch, so that one build serves every torch
// version; vcpo_kernels/backends/native/ checks dtypes, devices, shapes and strides before it hands an address over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/score_rows.h"
#include "cpu/token_stats.h"
#if defined(VCPO_HAS_CUDA)
#include "cuda/row_ops.h"
#endif

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // 0, an absent tensor, gives null
}

struct RowsArgument : vcpo::Rows {
  RowsArgument(std::uintptr_t data, int dtype, std::int64_t outer, std::int64_t inner, std::int64_t vocabulary,
               std::int64_t stride_outer, std::int64_t stride_inner)
      : vcpo::Rows{pointer<const void>(data),
                   static_cast<vcpo::Dtype>(dtype),
                   outer,
                   inner,
                   vocabulary,
                   stride_outer,
                   stride_inner} {
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    if (outer < 0 || inner < 0 || vocabulary < 1) throw std::invalid_argument("sizes must be >= 0, vocabulary >= 1");
  }
};

struct OutputArgument : vcpo::Output {
  OutputArgument(std::uintptr_t data, std::int64_t stride_outer, std::int64_t stride_inner)
      : vcpo::Output{pointer<void>(data), stride_outer, stride_inner} {}
};

struct TokensArgument : vcpo::Tokens {
  TokensArgument(std::uintptr_t ids, std::uintptr_t mask, bool shift)
      : vcpo::Tokens{pointer<const std::int64_t>(ids), pointer<const std::uint8_t>(mask), shift} {}
};

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (vcpo::Isa isa : vcpo::isa_available()) names.emplace_back(vcpo::isa_name(isa));
  return names;
}

#if defined(VCPO_HAS_CUDA)
// The same ops on addresses of device memory, with a device and a stream in place of threads. Launches; does not wait.
void bind_cuda(py::module_& m) {
  m.def(
      "cuda_token_stats_forward",
      [](const RowsArgument& rows, const TokensArgument& tokens, float temperature, float softcap, std::uintptr_t logp,
         std::uintptr_t entropy, std::uintptr_t score_sqnorm, std::uintptr_t lse, int device, std::uintptr_t stream) {
        const py::gil_scoped_release release;
        vcpo::cuda::token_stats_forward(rows, tokens, {temperature, softcap}, pointer<float>(logp),
                                        pointer<float>(entropy), pointer<float>(score_sqnorm), pointer<float>(lse),
                                        {device, pointer<void>(stream)});
      },
      py::arg("rows"), py::arg("tokens"), py::arg("temperature"), py::arg("softcap"), py::arg("logp"),
      py::arg("entropy"), py::arg("score_sqnorm"), py::arg("lse"), py::arg("device"), py::arg("stream"));

  m.def(
      "cuda_token_stats_backward",
      [](const OutputArgument& out, const RowsArgument& rows, const TokensArgument& tokens, float temperature,
         float softcap, std::uintptr_t logp, std::uintptr_t entropy, std::uintptr_t lse, std::uintptr_t grad_logp,
         std::uintptr_t grad_entropy, std::uintptr_t target_logits, int device, std::uintptr_t stream) {
        const py::gil_scoped_release release;
        vcpo::cuda::token_stats_backward(out, rows, tokens, {temperature, softcap}, pointer<const float>(logp),
                                         pointer<const float>(entropy), pointer<const float>(lse),
                                         pointer<const float>(grad_logp), pointer<const float>(grad_entropy),
                                         pointer<const float>(target_logits), {device, pointer<void>(stream)});
      },
      py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("temperature"), py::arg("softcap"), py::arg("logp"),
      py::arg("entropy"), py::arg("lse"), py::arg("grad_logp"), py::arg("grad_entropy"), py::arg("target_logits"),
      py::arg("device"), py::arg("stream"));

  m.def(
      "cuda_score_rows",
      [](const OutputArgument& out, const RowsArgument& rows, const TokensArgument& tokens, float temperature,
         float softcap, std::uintptr_t coefficients, std::uintptr_t logp, std::uintptr_t entropy,
         std::uintptr_t score_sqnorm, std::uintptr_t lse, int device, std::uintptr_t stream) {
        const py::gil_scoped_release release;
        vcpo::cuda::score_rows(out, rows, tokens, {temperature, softcap}, pointer<const float>(coefficients),
                               pointer<float>(logp), pointer<float>(entropy), pointer<float>(score_sqnorm),
                               pointer<float>(lse), {device, pointer<void>(stream)});
      },
      py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("temperature"), py::arg("softcap"),
      py::arg("coefficients"), py::arg("logp"), py::arg("entropy"), py::arg("score_sqnorm"), py::arg("lse"),
      py::arg("device"), py::arg("stream"));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "vcpo_kernels' compiled kernels, on raw addresses.";
  m.def("isa_available", &isa_available, "Instruction sets this build has and this CPU runs, slowest first.");
  m.def("isa_chosen", [] { return std::string(vcpo::isa_name(vcpo::isa_chosen())); });
  m.def("isa_choose", &vcpo::isa_choose, py::arg("name"));
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

#if defined(VCPO_HAS_CUDA)
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif

  py::class_<RowsArgument>(m, "Rows").def(
      py::init<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(),
      py::arg("data"), py::arg("dtype"), py::arg("outer"), py::arg("inner"), py::arg("vocabulary"),
      py::arg("stride_outer"), py::arg("stride_inner"));
  py::class_<TokensArgument>(m, "Tokens")
      .def(py::init<std::uintptr_t, std::uintptr_t, bool>(), py::arg("ids"), py::arg("mask"), py::arg("shift"));

  py::class_<OutputArgument>(m, "Output")
      .def(py::init<std::uintptr_t, std::int64_t, std::int64_t>(), py::arg("data"), py::arg("stride_outer"),
           py::arg("stride_inner"));

  m.def(
      "token_stats_forward",
      [](const RowsArgument& rows, const TokensArgument& tokens, float temperature, float softcap, std::uintptr_t logp,
         std::uintptr_t entropy, std::uintptr_t score_sqnorm, std::uintptr_t lse, int threads) {
        const py::gil_scoped_release release;
        vcpo::token_stats_forward(rows, tokens, {temperature, softcap}, pointer<float>(logp), pointer<float>(entropy),
                                  pointer<float>(score_sqnorm), pointer<float>(lse), threads);
      },
      py::arg("rows"), py::arg("tokens"), py::arg("temperature"), py::arg("softcap"), py::arg("logp"),
      py::arg("entropy"), py::arg("score_sqnorm"), py::arg("lse"), py::arg("threads"));

  m.def(
      "token_stats_backward",
      [](const OutputArgument& out, const RowsArgument& rows, const TokensArgument& tokens, float temperature,
         float softcap, std::uintptr_t logp, std::uintptr_t entropy, std::uintptr_t lse, std::uintptr_t grad_logp,
         std::uintptr_t grad_entropy, std::uintptr_t target_logits, int threads) {
        const py::gil_scoped_release release;
        vcpo::token_stats_backward(out, rows, tokens, {temperature, softcap}, pointer<const float>(logp),
                                   pointer<const float>(entropy), pointer<const float>(lse),
                                   pointer<const float>(grad_logp), pointer<const float>(grad_entropy),
                                   pointer<const float>(target_logits), threads);
      },
      py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("temperature"), py::arg("softcap"), py::arg("logp"),
      py::arg("entropy"), py::arg("lse"), py::arg("grad_logp"), py::arg("grad_entropy"), py::arg("target_logits"),
      py::arg("threads"));

  m.def(
      "score_rows",
      [](const OutputArgument& out, const RowsArgument& rows, const TokensArgument& tokens, float temperature,
         float softcap, std::uintptr_t coefficients, std::uintptr_t logp, std::uintptr_t entropy,
         std::uintptr_t score_sqnorm, std::uintptr_t lse, int threads) {
        const py::gil_scoped_release release;
        vcpo::score_rows(out, rows, tokens, {temperature, softcap}, pointer<const float>(coefficients),
                         pointer<float>(logp), pointer<float>(entropy), pointer<float>(score_sqnorm),
                         pointer<float>(lse), threads);
      },
      py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("temperature"), py::arg("softcap"),
      py::arg("coefficients"), py::arg("logp"), py::arg("entropy"), py::arg("score_sqnorm"), py::arg("lse"),
      py::arg("threads"));

  m.def(
      "prepare_if_fresh",
      [](std::uintptr_t data, std::size_t bytes) { return vcpo::prepare_if_fresh(pointer<void>(data), bytes); },
      py::arg("data"), py::arg("bytes"), "Asks for huge pages where the buffer has no memory behind it yet.");

#if defined(VCPO_HAS_CUDA)
  bind_cuda(m);
#endif
}
