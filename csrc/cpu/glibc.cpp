// What would bind the library to a later glibc than 2.28, which is all that torch's own wheels ask for.
#include <cstddef>  // tells whether this is glibc

#if defined(__GLIBC__) && defined(__x86_64__)
#define FASTLM_OWN extern "C" __attribute__((visibility("hidden")))

// Read by shared_ptr of g++ 11 and later, which counts without atomics where it is not 0: new in glibc 2.32.
FASTLM_OWN char __libc_single_threaded;
char __libc_single_threaded = 0;

// The log of glibc 2.29 leaves errno alone, else it is the one before. Under another name here: g++ has a
// declaration of log, which is visible.
extern "C" double log_before_2_29(double) __asm__("log_before_2_29");
__asm__(".symver log_before_2_29, log@GLIBC_2.2.5");
FASTLM_OWN double own_log(double) __asm__("log");
double own_log(double x) { return log_before_2_29(x); }

#endif
