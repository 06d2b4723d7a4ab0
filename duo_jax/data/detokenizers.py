"""Undoes what evaluation sets did to their text: PTB, WikiText and LM1B keep words and punctuation apart by spaces.

Networks that learnt from text as people write it are evaluated on text as people write it. The rules, and their order, are
those that SEDD, MDLM and Duo evaluated with, including the ones that go wrong now and then (a comment tells), so that
figures can be compared; rules of theirs that never match are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from duo_jax.errors import UserError

Detokenize = Callable[[str], str]

# What is replaced by what, in this order: plain strings, and patterns.
_Rules = tuple[tuple[str | re.Pattern[str], str], ...]

_WIKITEXT: _Rules = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),  # PTB's mark of a number; here it also meets the letter
    (" 's", "'s"),
)

_PTB: _Rules = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    # Twice: of two marks of a number with one space between them, one pass sees the first only.
    (" N ", " 1 "),
    (" N ", " 1 "),
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

_LM1B: _Rules = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),  # the opening quote of a word, too
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("£ ", "£"),
)


def _apply(rules: _Rules, text: str) -> str:
    for old, new in rules:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


def none(text: str) -> str:
    """Returns the text as it is: AG News, and text of your own."""
    return text


def ptb(text: str) -> str:
    """Returns a text of the Penn Treebank with contractions joined, 1 for N, and ? for <unk>."""
    return _apply(_PTB, text)


def wikitext(text: str) -> str:
    """Returns a text of WikiText-2 or WikiText-103 with its punctuation, numbers, brackets and headings joined."""
    return _apply(_WIKITEXT, text)


def lm1b(text: str) -> str:
    """Returns a sentence of One Billion Words with its punctuation joined."""
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    """Returns a passage of LAMBADA with straight double quotes, on a line of its own."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    """Returns an article of arXiv or PubMed: the rules of WikiText, and then those of LM1B."""
    return lm1b(wikitext(text))


_ALL: dict[str, Detokenize] = {f.__name__: f for f in (none, ptb, wikitext, lm1b, lambada, scientific_papers)}
NAMES = tuple(_ALL)


def by_name(name: str) -> Detokenize:
    """Returns one of the functions above.

    Raises:
        UserError: there is none of that name.
    """
    if name not in _ALL:
        raise UserError(f"config.eval.detokenizer is {name!r}; choose one of {', '.join(NAMES)}.")
    return _ALL[name]
