"""Print a digest of the bits of all results, a line for each storage type: compilers and builds must agree on them.

`.ci/run` compares what GCC and Clang print, with OpenMP and without.
"""

from __future__ import annotations

import hashlib

import numpy as np
from checks import DTYPES, dtype_of
from test_bits import SMALL, results_of


def main() -> None:
    for name in DTYPES:
        digest = hashlib.sha256()
        for result in results_of(SMALL, dtype_of(name)):
            digest.update(np.asarray(result).tobytes())
        print(name, digest.hexdigest())


if __name__ == "__main__":
    main()
