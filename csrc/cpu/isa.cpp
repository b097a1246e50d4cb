// The kernels of one operator family for one ISA: setup.py compiles this file once per pair, with
// the ISA's compiler flags, FASTLM_ISA set to its name and FASTLM_FAMILY to the family's header.
#include FASTLM_FAMILY
