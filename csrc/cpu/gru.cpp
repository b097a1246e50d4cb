// fastlm::gru_layer and its backward: tensors to the parameters of gru.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../gru_call.h"
#include "dispatch.h"

namespace fastlm {
namespace {

using Optional = std::optional<Tensor>;

Tensor bytes(int64_t n) { return new_tensor({n}, ScalarType::Byte); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_layer(
    const Tensor& input, const Optional& batch_sizes, const Tensor& hx,
    const std::vector<Tensor>& weights, bool has_biases, bool layer_norm, const Optional& update,
    double zoneout, bool save) {
  GruCall call("gru_layer", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout);
  GruParams& p = call.p;
  const GruResults results(call, layer_norm, save);
  const GruKernels& k = kernels().gru;
  p.pool = torch_pool();
  Tensor workspace = bytes(k.forward_workspace[call.dtype](p));
  p.workspace = workspace.mutable_data_ptr();
  k.forward[call.dtype](p);
  return {results.out, results.hn, results.gates, results.normed, results.rstd};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_layer_backward(
    const Optional& grad_output, const Optional& grad_hn, const Tensor& input,
    const Optional& batch_sizes, const Tensor& hx, const std::vector<Tensor>& weights, bool has_biases,
    bool layer_norm, const Optional& update, double zoneout, const Tensor& output, const Tensor& gates,
    const Tensor& normed, const Tensor& rstd, bool input_wanted, bool weights_wanted) {
  GruCall call("gru_layer_backward", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout);
  GruParams& p = call.p;
  const GruKept kept(call, layer_norm, grad_output, grad_hn, output, gates, normed, rstd);
  const GruGradientTensors grads(call, input_wanted, weights_wanted);
  GruGradients g{data_of(kept.dout), data_of(kept.dhn), input_wanted ? grads.dx.mutable_data_ptr() : nullptr,
                 grads.dh0.mutable_data_ptr(), weights_wanted, {}};
  for (int64_t d = 0; weights_wanted && d < p.D; ++d) {
    const Tensor* next = &grads.dw[size_t(d * call.per_direction)];
    const auto take = [&] { return (next++)->mutable_data_ptr(); };
    auto& to = g.d[d];
    to.dw_ih = take();
    to.dw_hh = take();
    if (has_biases) {
      to.db_ih = take();
      to.db_hh = take();
    }
    if (layer_norm) {
      to.dg_ih = take();
      to.dg_hh = take();
    }
  }
  const GruKernels& k = kernels().gru;
  p.pool = torch_pool();
  Tensor workspace = bytes(k.backward_workspace[call.dtype](p, g));
  p.workspace = workspace.mutable_data_ptr();
  k.backward[call.dtype](p, g);
  return {grads.dx, grads.dh0, grads.dw};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("gru_layer", TORCH_BOX(&fastlm::gru_layer));
  m.impl("gru_layer_backward", TORCH_BOX(&fastlm::gru_layer_backward));
}
