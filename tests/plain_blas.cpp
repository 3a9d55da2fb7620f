// What the engine calls of OpenBLAS, in plain C++: `make sanitize-threads` links it, because ThreadSanitizer sees no
// access that it did not compile, and a library's assembly would hide which memory a product reads and writes.
#include <cblas.h>

extern "C" {

void openblas_set_num_threads(int) {}

void cblas_sgemm(CBLAS_ORDER, CBLAS_TRANSPOSE transpose_a, CBLAS_TRANSPOSE transpose_b, blasint m, blasint n, blasint k,
                 float alpha, const float* a, blasint lda, const float* b, blasint ldb, float beta, float* c,
                 blasint ldc) {
  const long along_a = transpose_a == CblasNoTrans ? 1 : lda, across_a = transpose_a == CblasNoTrans ? lda : 1;
  const long along_b = transpose_b == CblasNoTrans ? ldb : 1, across_b = transpose_b == CblasNoTrans ? 1 : ldb;
  for (long i = 0; i < m; ++i)
    for (long j = 0; j < n; ++j) {
      float sum = 0;
      for (long l = 0; l < k; ++l) sum += a[i * across_a + l * along_a] * b[l * along_b + j * across_b];
      c[i * ldc + j] = alpha * sum + (beta != 0 ? beta * c[i * ldc + j] : 0);
    }
}
}
