// Products with inputs of bfloat16, and weights that are made so.

#pragma once

#ifdef FLEXJAX_AVX2
#include "bfloat16_avx2.h"
#else
#include "bfloat16_avx512.h"
#endif
