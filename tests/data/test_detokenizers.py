"""Each evaluation set's text as people write it."""

import pytest

from duo_jax.data import detokenizers
from duo_jax.errors import UserError

CASES = {
    "none": [(" kept 's as it . is \n", " kept 's as it . is \n")],
    "ptb": [
        ("no it was n't black monday", "no it wasn't black monday"),
        ("the company 's profits rose N N to $ N million", "the company's profits rose 1 1 to $1 million"),
        ("rates N N N N N a year", "rates 1 1 1 1 1 a year"),
        ("investors ' <unk> and\\/or <unk>", "investors' ? and/or ?"),
        ("one \n two", "one\ntwo"),
        (" \n N points", "\nN points"),  # the order is the published one: of this N the leading space is gone
    ],
    "wikitext": [
        (" = = Gameplay = = \n", " == Gameplay ==\n"),
        (" = Valkyria Chronicles III = \n", " = Valkyria Chronicles III =\n"),
        ("it sold 1 @,@ 500 units , a 2 @.@ 5 @-@ fold rise .", "it sold 1,500 units, a 2.5-fold rise ."),
        ("the game 's name ( Japanese : 3 , lit . Valkyria ) is", "the game's name (Japanese: 3, lit. Valkyria) is"),
        ('he said " go on " [ sic ] ; then left', 'he said "go on" [sic]; then left'),
        ("the players ' turn", "the players' turn"),
        ("45 ° N of here", "45°N of here"),
    ],
    "lm1b": [
        ("It 's late , he said .", "It's late, he said."),
        ('" I see , " ( at last ) she said !', '"I see," (at last) she said!'),
        ("Is it $ 5 or £ 3 ?", "Is it $5 or £3?"),
        ("http : / / example.com and / or [ x ]", "http://example.com and/or [x]"),
        ("One more . Two : three ; four", "One more. Two: three; four"),
    ],
    "lambada": [("  “ Go , ” he said \n", '\n" Go , " he said')],
    # Both sets of rules: WikiText's leave the last full stop alone, and LM1B's do not know @-@.
    "scientific_papers": [("a well @-@ known result , see ( 3 ) .", "a well-known result, see (3) .")],
}


@pytest.mark.parametrize("name", detokenizers.NAMES)
def test_text_as_people_write_it(name):
    for written, expected in CASES[name]:
        assert detokenizers.by_name(name)(written) == expected


def test_both_sets_of_rules_for_papers():
    assert detokenizers.scientific_papers("we show @-@ it .") == "we show-it ."
    assert detokenizers.scientific_papers("we show it .") == "we show it."


def test_unknown():
    with pytest.raises(UserError, match=r"config.eval.detokenizer is 'wiki'; choose one of none, ptb, wikitext, lm1b"):
        detokenizers.by_name("wiki")
