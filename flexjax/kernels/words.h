// Sixteen words of 32 bits at a time: integers, or what a lane multiplies at once.

#pragma once

#ifdef FLEXJAX_AVX2
#include "words_avx2.h"
#else
#include "words_avx512.h"
#endif
