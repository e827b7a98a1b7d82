"""Texts without HTML: what a shopper would read, and none of the markup's own words."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1.tasks.markup import without_markup
from rec_r1.tasks.raw_files import plain

SIGNS = st.text(alphabet="abc <>&;/!?'\"=#1é\n", max_size=60)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("no markup", "no markup"),
        ("&lt; 5 kg", "< 5 kg"),
        ("a < 5 kg & more", "a < 5 kg & more"),
        ("fits <XL only", "fits <XL only"),
        ("fits <XL, <b>not</b> L", "fits <XL, not L"),
        ("5<6>4 and <3 love", "5<6>4 and <3 love"),
        ("<p>one<br/>two&nbsp;three</p>", "one two three"),
        ("<ul><li>soft</li><li>warm</li></ul>", "soft warm"),
        ("<td>1</td><td>2", "1 2"),  # cells without a table
        ("R&D, AT&amp;T, AT&amp;amp;T", "R&D, AT&T, AT&T"),
        ("&copy; 2026 &#8364;5 &#x20AC;6", "© 2026 €5 €6"),
        ("&lt;ul&gt;&lt;li&gt;soft&lt;/li&gt;&lt;/ul&gt;&amp;nbsp;x", "soft x"),  # escaped by the shop's export
        ("&amp;lt;li&amp;gt;deep&amp;lt;/li&amp;gt;", "deep"),
        ("x &lt;y and z&gt;", "x <y and z>"),  # no tag of HTML
        ("a<!-- hidden -->b", "a b"),
        ("<style>p {color: red}</style>t<script>if (a<b) f()</script>u", "t u"),
        ('<a href="x.html" title="more">link</a>', "link"),
        ("<title>T</title><body>text", "T text"),
        ("<i>", ""),
        ("ソファ &amp; グレー", "ソファ & グレー"),
    ],
)
def test_what_a_shopper_reads(given, expected):
    assert plain(given) == expected


@pytest.mark.parametrize("levels", range(4))
def test_no_word_of_the_markup_is_left_however_often_it_was_escaped(levels):
    text = "<div class='x'><br><li>warm</li>&nbsp;<b>wool</b></div>"
    for _ in range(levels):
        text = html.escape(text)
    assert plain(text) == "warm wool"


@given(st.text(alphabet="abc xyz 0123456789.,-äß日本", max_size=80))
def test_a_text_without_brackets_and_entities_stays_as_it_is(text):
    assert without_markup(text) == text


@given(st.lists(st.text(alphabet="abcxyz0189", min_size=1, max_size=8), min_size=1, max_size=8), st.data())
def test_words_survive_whatever_tags_stand_between_them(words, data):
    tags = ["<br>", "<p>", "</p>", "<li class='a'>", "</li>", "<b>", "</b>", "&nbsp;", "<td>", "</div>", "<hr/>"]
    marked = "".join(word + data.draw(st.sampled_from(tags)) for word in words)
    assert plain(marked) == " ".join(words)


@given(SIGNS)
def test_nothing_raises_and_stray_brackets_lose_no_words(text):
    found = plain(text)
    assert isinstance(found, str) and found == " ".join(found.split())
    if ">" not in text and "&" not in text:  # no tag is closed: all of it is text
        assert found == " ".join(text.split())
