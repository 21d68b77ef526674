"""Published splits by case of KiTS19 and LiTS, fixed lists for comparable numbers.

The authors of HLFD publish no list. Ours have the sizes of theirs, 168/42 cases for
KiTS19 and 61/70 for LiTS, and are the first entries of
`numpy.random.default_rng(2311).permutation(n)`, sorted (2311 from the number of the
paper, arXiv 2311.16700).
"""

from __future__ import annotations

KITS19_COUNT = 210
LITS_COUNT = 131

# fmt: off
KITS19_TEST = (
    1, 13, 18, 23, 24, 28, 33, 34, 40, 51, 54, 55, 61, 68, 72, 78, 79, 80, 84,
    93, 97, 98, 102, 104, 107, 110, 115, 118, 120, 124, 129, 130, 132, 136, 141,
    144, 161, 162, 166, 179, 190, 202,
)

LITS_TEST = (
    1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 16, 18, 23, 26, 27, 28, 30, 33, 34, 36,
    39, 47, 50, 51, 53, 54, 55, 56, 59, 61, 62, 63, 64, 65, 68, 69, 72, 73, 75,
    76, 78, 79, 83, 84, 85, 86, 88, 90, 93, 97, 98, 99, 101, 105, 107, 108, 109,
    111, 114, 115, 117, 118, 119, 120, 121, 124, 125, 126, 130,
)
# fmt: on


def kits19_case(number: int) -> str:
    """The name of a KiTS19 case, as its folder: `case_00042`."""
    return f"case_{number:05d}"


def lits_case(number: int) -> str:
    """The name of a LiTS case, as its file: `volume-42`."""
    return f"volume-{number}"


def kits19_split() -> tuple[list[str], list[str]]:
    """Names of the 168 training and 42 test cases of KiTS19."""
    return _split(KITS19_COUNT, KITS19_TEST, kits19_case)


def lits_split() -> tuple[list[str], list[str]]:
    """Names of the 61 training and 70 test cases of LiTS."""
    return _split(LITS_COUNT, LITS_TEST, lits_case)


def _split(count: int, test: tuple[int, ...], name) -> tuple[list[str], list[str]]:
    in_test = set(test)
    train = [name(i) for i in range(count) if i not in in_test]
    return train, [name(i) for i in test]
