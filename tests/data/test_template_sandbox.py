"""A chat template can neither leave the sandbox nor take time and memory without bound, and plain ones lose nothing."""

from __future__ import annotations

import re
import time
import tracemalloc
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from smedjan.data import template_bounds
from smedjan.data.chat_template import render
from smedjan.errors import DataError, TokenizerError

MESSAGES = [{"role": "user", "content": "hi"}]


def run(source: str, messages: list[dict[str, Any]] = MESSAGES, **kw: Any) -> str:
    return render(source, messages, bos_token="<s>", eos_token="</s>", **kw)[0]


DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x|length }}"
HOSTILE = {
    "long product": "{{ 'a' * 10000000000 }}",
    "list product": "{{ ([0] * 100000000 * 100)|length }}",
    "power": "{{ 3 ** 100000000 }}",
    "square of squares": DOUBLED.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops of text": "{% for a in range(99999) %}{% for b in range(9999) %}longer text{% endfor %}{% endfor %}",
    "range": "{{ range(1000000000) }}",
    "doubled by +": DOUBLED.replace("START", "'aaaa'").replace("STEP", "ns.x + ns.x"),
    "doubled by ~": DOUBLED.replace("START", "'aaaa'").replace("STEP", "ns.x ~ ns.x"),
    "doubled list": DOUBLED.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "doubled by set": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "nested list printed": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]").replace("|length", ""),
    "nested list as json": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]").replace("length", "tojson"),
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    + " " * 4000,
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "loop in itself": "{% for x in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "kept slices": "{% set ns = namespace(l=[], s='a' * 1000000) %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + [ns.s[1:]] %}{% endfor %}",
    "percent width": "{{ '%0999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent often": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "format filter": "{{ '%0999999999d'|format(1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 999999999) }}",
    "format_map": "{{ '{:{w}}'.format_map({'w': 999999999}) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": r"{{ ('\t' * 1000).expandtabs(1000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "join": "{{ ('b' * 100000).join('a' * 100000) }}",
    "join filter": "{{ (['a' * 100000] * 100000)|join }}",
    "join of map": "{{ range(99999)|map('center', 99999)|join }}",
    "sum of lists": "{{ ([[1] * 1000] * 10000)|sum(start=[]) }}",
    "indent": r"{{ ('\n' * 100000)|indent(100000) }}",
    "json indent": "{{ [1]|tojson(indent=1000000) }}",
    "wordwrap": "{{ ('a b ' * 1000000)|wordwrap(1, wrapstring='x' * 100000) }}",
    "batch": "{{ 'x'|batch(1000000000, 'y')|list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of error, seconds, and memory of the size of the bound: here 2^20 characters, of 4 bytes and copied."""
    monkeypatch.setattr(template_bounds, "MAX_CHARACTERS", 1 << 20)
    monkeypatch.setattr(template_bounds, "MAX_STEPS", 1 << 15)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(DataError, match="the chat template refuses these messages") as caught:
        run(HOSTILE[name])
    seconds, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert seconds < 10
    assert peak < 50e6


@pytest.mark.parametrize(
    "name", ["long product", "nested loops", "doubled by set", "nested list printed", "join of map"]
)
def test_the_bounds_themselves_are_reached_within_seconds(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"more than \d+ (characters|steps)"):
        run(HOSTILE[name])
    assert time.monotonic() - began < template_bounds.MAX_SECONDS


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "MAX_SECONDS", 0.05)
    with pytest.raises(DataError, match=r"more than 0\.05 seconds"):
        run("{% for a in range(9999) %}{% for b in range(99) %}{{ b }}{% endfor %}{% endfor %}")


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner().__class__.__mro__[1].__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "{{ [['']]|map(attribute='0.__class__.__mro__')|list }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ dict.__class__.__init__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% set messages[0].role = 1 %}",
    "{{ loop.__init__ }}{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% generation %}x{% endgeneration %}{{ caller.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source: str) -> None:
    """Refused, or printed as nothing: nothing of Python's internals is ever text. transformers' sandbox is no wider."""
    before = [dict(message) for message in MESSAGES]
    try:
        out = run(source)
    except (DataError, TokenizerError) as error:
        # What is refused names the attribute and its type, no more
        out = re.sub(r"attribute '\w+' of '\w+' object", "", error.message)
    assert not any(word in out for word in ("<class", "<function", "<module", "object at", "root:"))
    assert before == MESSAGES


def test_objects_of_other_types_are_placeholders() -> None:
    class Open:
        def read(self) -> str:
            return "secret"

    messages = [{"role": "user", "content": Open(), "deep": {"list": [Open()]}}]
    assert run("{{ messages[0].content }} {{ messages[0].deep.list[0] }}", messages) == "<Open> <Open>"
    with pytest.raises(DataError):
        run("{{ messages[0].content.read() }}", messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ x | nofilter }}",
        "{% for x in y %}" * 40 + "{% endfor %}" * 40,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (1 << 20) + "y",
        "{{ 1" + "0" * 5000 + " }}",
    ],
)
def test_what_does_not_compile_is_one_line(source: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        run(source)
    assert caught.value.field == "chat_template"
    assert len(str(caught.value).splitlines()) == 1


LARGE = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}
    {%- for other in messages -%}
        {%- if other.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
    {%- endfor -%}
    {{ '<' ~ m.role ~ '>' + m.content | trim + (m.content if loop.last else '') }}{{ m | tojson }}
{%- endfor -%}{{ ns.last }}"""


def test_a_long_conversation_is_below_every_bound() -> None:
    """500 messages gone through once for each, and one of 5 million characters: the text of transformers' own Jinja."""
    many = [{"role": ("user", "assistant")[index % 2], "content": f" message {index} é"} for index in range(500)]
    long = [{"role": "user", "content": "0123456789" * 500_000}]
    for messages in (many, long):
        expected = _compile_jinja_template(LARGE).render(messages=messages)
        assert run(LARGE, messages) == expected


FORMS = [
    "{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for x in 'aab' %}{{ loop.nextitem }}{{ loop.changed(x) }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for x in 'ab' %}{{ loop.revindex }}{{ loop.depth0 }}{{ loop.revindex0 }}{{ loop.previtem }}{% endfor %}",
    "{% for x in missing %}{% else %}empty{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
    "{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ loop.length }}{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ loop.depth }}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% for x in range(3)|reverse %}{{ loop.length }}{% if x == 1 %}{% break %}{% endif %}{% endfor %}",
    "{{ 1.0 ~ true ~ none ~ missing }}{{ [1, 2, 3][::-1] }}{{ 'abc'[1:] }}{{ messages[0:1] }}{{ messages[-1].role }}",
    "{{ '%s' % [1] }}{{ '%d%%' % 5 }}{{ '{0[a]} {b!r:>5}'.format({'a': 1}, b='c') }}{{ '{x}'.format_map({'x': 1}) }}",
    "{{ [3, 1]|sort|join(',') }}{{ ['a', 'b']|map('upper')|join }}",
    "{{ 'a,b'.split(',')|last }}{{ ','.join(['a']|list) }}",
    "{{ [1, 2]|sum }}{{ [[1], [2]]|sum(start=[]) }}{{ messages|sum(attribute='n', start=2) }}{{ messages|join(', ') }}",
    "{{ 5 % 3 }}{{ [1] * 2 }}{{ 'a' * 3 }}{{ 2 * 3.5 }}",
    "{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 2 ** 0.5 }}{{ 7 // 2 }}{{ -3 * 'x' }}",
    "{{ ['x']|batch(2, 'f')|list }}{{ range(5)|slice(2)|list }}",
    "{{ 'a b'|wordwrap(1) }}{{ 'x'|center(3) }}|{{ 'x'.rjust(3) }}",
    "{{ 3.14159|round(2) }}{{ 'a\nb'|indent(2, true) }}{{ 'aa'|replace('a', 'b', 1) }}{{ 'aa'.replace('a', 'b', 1) }}",
    "{{ {'a': [1, {'b': none}]}|tojson(indent=2) }}{{ '<é>'|tojson(ensure_ascii=true) }}{{ {'a': 1}|string|length }}",
    "{% set x %}{{ 1 }}<>{% endset %}{{ x ~ x }}{% filter upper %}a{{ x }}{% endfilter %}{{ x|e }}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 3, 4, c=5) }}{{ m(1)|length }}",
    "{{ dict(a=1) }}{{ namespace(a=1).a }}{{ cycler('x').next() }}",
    "{{ joiner(',')() }}{{ 'tab\tx'.expandtabs(4) }}{{ 'é'.encode() }}",
    "{{ 'abc'.translate({97: 'x'}) }}{{ '7'.zfill(3) }}",
    "{{ 'x'.center(3, '-') }}{{ 'a-b'.partition('-') }}{{ 'aXb'.swapcase() }}",
]


@pytest.mark.parametrize("source", FORMS)
def test_the_weighed_forms_behave_as_jinja_s_own(source: str) -> None:
    messages = [{"role": "user", "content": "hi", "n": 3}]
    assert run(source, messages) == _compile_jinja_template(source).render(messages=messages)
