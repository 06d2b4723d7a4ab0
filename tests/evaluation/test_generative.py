"""What counts of a sampled row, and the figures made of it."""

import math

import numpy as np
import pytest

from duo_jax import sampling
from duo_jax.evaluation import generative
from duo_jax.evaluation.judge import Scores, published_tokens

EOS = 1


class Words:
    """A tokenizer whose ids are words."""

    eos_id = EOS

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids if i != EOS)


class Counter:
    """A judge to whom a word costs half a nat and an end two; it keeps what it was asked."""

    def nll(self, texts, ended, done):
        self.texts, self.ended = list(texts), list(ended)
        done(len(self.texts))
        words = np.array([len(text.split()) for text in texts])
        characters = np.array([len(text) for text in texts])
        return Scores(0.5 * words + 2.0 * np.array(ended), words + np.array(ended), characters)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([5, 6, 7], ([5, 6, 7], False)),
        ([5, 6, 1, 7], ([5, 6], True)),
        ([5, 1, 6, 1], ([5], True)),
        ([5, 6, 1], ([5, 6], True)),
        # At the first place it is where the text before this one ended.
        ([1, 5, 6], ([1, 5, 6], False)),
        ([1, 5, 1, 6], ([1, 5], True)),
        ([1, 1, 6], ([1], True)),
        ([1], ([1], False)),
        ([], ([], False)),
    ],
)
def test_a_row_ends_at_its_first_eos(row, expected):
    assert sampling.until_end(row, EOS) == expected
    assert sampling.until_end(np.array(row, np.int32), EOS) == expected


def test_distinct_counts_the_different_ngrams_of_all_texts():
    texts = ["a b a b", "a b c", "c"]
    assert generative.distinct(texts, 1) == 3 / 8  # a, b, c
    assert generative.distinct(texts, 2) == 3 / 5  # ab ba ab | ab bc; none across texts
    assert generative.distinct(texts, 3) == 3 / 3  # aba bab | abc
    assert math.isnan(generative.distinct(texts, 5))
    assert math.isnan(generative.distinct([], 1))


def test_quality_judges_the_texts_up_to_their_ends():
    judge, told = Counter(), []
    tokens = np.array([[1, 5, 5, 6, 1, 9], [1, 5, 6, 7, 8, 9]])
    quality, texts = generative.quality(tokens, Words(), judge, told.append)
    assert judge.texts == texts == ["w5 w5 w6", "w5 w6 w7 w8 w9"]
    assert judge.ended == [True, False]
    assert quality.judged == 9
    assert quality.ppl == pytest.approx(math.exp((8 * 0.5 + 2) / 9))
    assert quality.bits == pytest.approx((8 * 0.5 + 2) / math.log(2) / (8 * 2 + 2 + 4))  # letters, and spaces between
    assert quality.distinct == (5 / 8, 5 / 6, 4 / 4)  # bigrams 55 56 | 56 67 78 89, trigrams 556 | 567 678 789
    # Of the whole rows: the first has 1 and 5 twice, 6 and 9 once; the second six different ids.
    first = -2 * (1 / 3) * math.log(1 / 3) - 2 * (1 / 6) * math.log(1 / 6)
    assert quality.entropy == pytest.approx((first + math.log(6)) / 2)
    assert told == [2]


def test_quality_of_nothing_is_not_a_number():
    quality, texts = generative.quality(np.array([[1], [1]]), Words(), Counter())
    assert math.isnan(quality.ppl)
    assert math.isnan(quality.bits)
    assert (quality.judged, texts) == (0, ["", ""])


def test_entropy_is_the_references(golden):
    data = golden("l_metrics")
    for row, expected in zip(data["tokens"], data["entropy_each"], strict=True):
        quality, _ = generative.quality(row[None], Words(), Counter())
        assert quality.entropy == pytest.approx(expected, rel=1e-6)


def test_the_published_protocol_judges_rows_whole():
    class Shown(Words):
        def decode(self, ids, special=False):
            return " ".join("<|endoftext|>" if i == EOS else f"w{i}" for i in ids if special or i != EOS)

    class Published(Counter):
        def published_nll(self, texts, done):
            return self.nll(texts, [False] * len(texts), done)

    judge = Published()
    tokens = np.array([[1, 5, 5, 1, 9], [5, 6, 7, 8, 9]])
    quality, texts = generative.quality(tokens, Shown(), judge, protocol="reference")
    assert judge.texts == texts == ["<|endoftext|> w5 w5 <|endoftext|> w9", "w5 w6 w7 w8 w9"]
    assert quality.ppl == pytest.approx(math.exp(0.5))
    assert generative.quality(tokens, Shown(), judge)[1] == ["w5 w5", "w5 w6 w7 w8 w9"]


def test_what_the_published_protocol_counts_is_the_references(golden):
    data = golden("l_metrics")
    for row, valid in zip(data["genppl_tokens"], data["genppl_valid"], strict=True):
        np.testing.assert_array_equal(published_tokens(row, EOS), valid)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([5, 6, 1, 7, 1, 1], [True, True, True, False, False]),
        ([1, 6, 1, 7], [True, False, True]),  # the first end is the beginning of the row, which nothing comes before
        ([5], []),
        ([], []),
    ],
)
def test_what_the_published_protocol_counts(row, expected):
    assert published_tokens(row, EOS).tolist() == expected


def test_what_counts_against_the_reference(golden):
    """The same tokens count up to the first end; beyond it this implementation departs from the reference.

    The reference counts every token of a row but EOS, and the row's first EOS. It so judges what comes after the end, as
    a continuation of it, and where the row starts with EOS, which stands for BOS in GPT-2's vocabulary, takes that one for
    the first, so that no end is ever judged. Here a text stops at its end, and the end is judged.
    """
    data = golden("l_metrics")
    assert len(data["genppl_tokens"]) == 3
    for row, valid in zip(data["genppl_tokens"], data["genppl_valid"], strict=True):
        judge = Counter()
        quality, _ = generative.quality(row[None], Words(), judge)
        counted = np.zeros(row.size, bool)
        ids, ended = sampling.until_end(row, EOS)
        end = len(ids)
        assert ended, "the golden rows all hold an EOS after the first place"
        counted[1 : end + 1] = True
        starts_with_bos = row[0] == EOS
        # The judge scores the first place too, unless BOS is there, which is its own boundary token.
        assert quality.judged == counted.sum() + (not starts_with_bos)
        valid = np.concatenate([[False], valid])
        np.testing.assert_array_equal(counted[:end], valid[:end])
        assert valid[end] == (not starts_with_bos)
        np.testing.assert_array_equal(valid[end + 1 :], row[end + 1 :] != EOS)
