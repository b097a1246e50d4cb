"""The Triton kernels by the tables of cases: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

import pytest
from cases import DTYPES
from harness import compare
from test_operators import every_case, name_of, only_in

import fastlm
import fastlm.triton

pytest.importorskip("triton")
# Logarithms of 0 and differences of infinities are meant; numpy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OF_FUNCTION = {
    "scaled_dot_product_attention": "attention_forward",
    "varlen_attn": "varlen_attention_forward",
    "gru": "gru_layer",
    "gru_cell": "gru_layer",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
}


def served(operator, dtype):
    if OF_FUNCTION[operator.name] not in fastlm.triton.MODULES:
        pytest.skip("no Triton kernel for this operator yet")
    reason = fastlm.triton.refuses(operator.name, dtype)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_case
def test_matches_reference(operator, case, dtype, triton_device):
    only_in(case, dtype)
    served(operator, dtype)
    compare(operator, case, dtype, device=triton_device)
