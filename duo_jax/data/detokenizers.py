"""Restores the usual spacing of evaluation texts: PTB, WikiText and LM1B put spaces between words and punctuation.

Networks that were trained on ordinary text should be evaluated on ordinary text. The rules and their order are those of
SEDD, MDLM and Duo, so that scores can be compared. They include rules that are sometimes wrong (see the comments), and leave
out those that never match.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from duo_jax.errors import UserError

Detokenize = Callable[[str], str]

# Pairs (plain string or pattern, replacement), applied in this order.
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
    (" N ", " 1 "),  # PTB's placeholder for a number; in WikiText it is also the letter
    (" 's", "'s"),
)

_PTB: _Rules = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    # Twice, because one pass replaces only the first of two numbers with a single space between them.
    (" N ", " 1 "),
    (" N ", " 1 "),
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

_LM1B: _Rules = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),  # wrong for the opening quote of a word
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
    """Returns the text unchanged: for AG News, and for your own text."""
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
    """Returns a passage of LAMBADA with straight double quotes, after a line break."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    """Returns an article of arXiv or PubMed after the rules of WikiText and then those of LM1B."""
    return lm1b(wikitext(text))


_ALL: dict[str, Detokenize] = {f.__name__: f for f in (none, ptb, wikitext, lm1b, lambada, scientific_papers)}
NAMES = tuple(_ALL)


def by_name(name: str) -> Detokenize:
    """Returns one of the functions above.

    Raises:
        UserError: the name is unknown.
    """
    if name not in _ALL:
        raise UserError(f"config.eval.detokenizer is {name!r}; choose one of {', '.join(NAMES)}.")
    return _ALL[name]
