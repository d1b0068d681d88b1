"""Cases of sparse_avg_pool3d: those of max pooling, with a divisor that counts what lies inside."""

from proof.cases.sparse_max_pool3d import MEAN, cases

CASES = cases(MEAN, {"count_include_pad": False})
