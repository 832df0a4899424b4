import lzma
import math

import numpy as np
import pytest

from lcpt.evaluation.text_baselines import unigram_bits_per_byte, xz_bits_per_byte


def test_xz_is_that_of_all_texts_together():
    texts = ["abc " * 300, "abd " * 300]
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress("".join(texts).encode(), preset=9)) / 2400


def test_unigram_by_hand():
    train, scored = [np.array([0, 1, 1, 2])], [np.array([0, 1, 2])]
    p = {1: 3 / 6, 2: 2 / 6}  # counts 2 and 1 and 0 of three tokens, one added to each
    assert unigram_bits_per_byte(train, scored, 3, 4) == pytest.approx(-(math.log2(p[1]) + math.log2(p[2])) / 4)
