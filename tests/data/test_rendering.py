"""Chat templates of strangers: none runs anything, reads anything, or takes more time and memory than it may."""

import os
import resource
import signal
import time

import pytest

from tunesmith import data
from tunesmith.data import rendering, templates
from tunesmith.data.examples import Conversation, Message, Row, Unusable
from tunesmith.errors import ModelError

TURNS = (Message("user", "what is one"), Message("assistant", "two"))
SECRET = "canary-7f3a"


@pytest.fixture
def tokenizer(tiny_tokenizer, request):
    """The tiny tokenizer, whose template a test may change."""
    import copy

    return copy.deepcopy(tiny_tokenizer)


# Each of these ran for ever, or took gigabytes, in the process that trains.
EXHAUSTING = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops in loops": "{% for a in range(9999) %}" * 4 + "x" + "{% endfor %}" * 4,
    "multiplied text": "{{ 'a' * 3000000000 }}",
    "multiplied list": "{{ ([0] * 1000000000)|length }}",
    "power": "{{ (9 ** 999999999) is even }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "sum": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "replace": "{% set n = namespace(s='aa') %}{% for i in range(9) %}{% set n.s = n.s|replace('a', 'aa' * 99) %}"
    "{% endfor %}{{ n.s }}",
    "center": "{{ 'a'|center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "format": "{{ '%2000000000d' % 1 }}",
    "format filter": "{{ '%2000000000d'|format(1) }}",
    "format method": "{{ '{:2000000000}'.format(1) }}",
    "indent": "{{ 'a\n'|indent(2000000000) }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursion by two": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "lists of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x|tojson }}",
    "comparison": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "words": "{{ lipsum(n=1000000) }}",
    "long text": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}  # fmt: skip


@pytest.mark.parametrize("name", EXHAUSTING)
def test_a_template_without_end_costs_a_row_and_no_more(tokenizer, name, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    tokenizer.chat_template = EXHAUSTING[name] + f"{{# {time.time()} #}}"
    at, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unusable, match="the chat template refuses"):
        templates._render(TURNS, templates.encoder(tokenizer), opening=False)
    assert time.process_time() - at < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_after_three_such_rows_it_is_asked_no_more(tokenizer):
    tokenizer.chat_template = EXHAUSTING["multiplied text"] + "{# asked no more #}"
    context = templates.encoder(tokenizer)
    for _ in range(rendering.STRIKES):
        with pytest.raises(Unusable):
            templates._render(TURNS, context, opening=False)
    rendering._worker.end()
    with pytest.raises(Unusable, match="not asked again"):
        templates._render(TURNS, context, opening=False)
    assert rendering._worker.process is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_somebody_else_ends_costs_no_row(tokenizer, number):
    tokenizer.chat_template += "{# ended from outside #}"
    context = templates.encoder(tokenizer)
    expected = templates._render(TURNS, context, opening=False)
    for _ in range(rendering.STRIKES + 1):
        os.kill(rendering._worker.process.pid, number)
        assert templates._render(TURNS, context, opening=False) == expected
    assert not rendering.is_exhausting(tokenizer.chat_template)


def test_a_model_s_template_without_end_is_its_error_not_every_row_s(tokenizer):
    tokenizer.chat_template = EXHAUSTING["doubling"] + "{# the model's error #}"
    with pytest.raises(ModelError, match="goes beyond its limits"):
        templates.set_template(tokenizer, None)


def test_rows_that_set_a_trap_off_are_dropped_and_the_others_stay(tokenizer):
    plain = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if 'bomb' in messages[0].content %}{{ 'a' * 3000000000 }}{% endif %}" + plain
    )
    rows = [Conversation((Message("user", f"{word} {n}"), TURNS[1]), Row("a", n))
            for n, word in enumerate(("one", "bomb", "two"))]  # fmt: skip
    one, bomb, two = templates.encode_all(rows, tokenizer)
    assert isinstance(bomb, Unusable)
    tokenizer.chat_template = plain
    assert [one, two] == templates.encode_all([rows[0], rows[2]], tokenizer)


# What tries to leave the sandbox, and what it would find there.
ESCAPES = (
    "''.__class__.__mro__[1].__subclasses__()", "''['__class__']['__mro__']", "''|attr('__class__')",
    "''|attr('\\x5f\\x5fclass\\x5f\\x5f')", "lipsum.__globals__['os'].environ",
    "cycler.__init__.__globals__.os.environ", "joiner.__init__.__globals__", "namespace.__init__.__globals__",
    "dict.__init__.__globals__", "self.__init__.__globals__", "self._TemplateReference__context",
    "raise_exception.__globals__", "strftime_now.__globals__['json']", "strftime_now.__code__",
    "(x for x in ()).gi_frame.f_back.f_globals", "range.__self__", "messages.__class__.__base__",
    "messages[0].__init__.__globals__", "get_flashed_messages", "config.items()", "request.application",
    "'{0.__class__}'.format(1)", "'{x.__class__.__mro__}'.format_map({'x': 1})",
    "'%s'|format(''.__class__.__mro__)", "messages|map(attribute='__class__')|list",
    "messages|selectattr('__class__')|list|first|attr('__class__')", "messages|groupby('__class__')|list",
    "messages|sum(attribute='__class__')", "[''.join]|map(attribute='__self__')|list|first|attr('__class__')",
    "namespace(__class__=1)", "namespace(**{'_x': 1})", "dict.fromkeys.__globals__", "loop.__class__",
    "''.join.__self__", "namespace.__class__.__mro__", "(1).__class__.__bases__",
    "true.__class__.__base__.__subclasses__()", "caller.__globals__", "varargs.__class__", "url_for.__globals__.os",
)  # fmt: skip
STATEMENTS = (
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os.environ }}", "{% from 'os' import environ %}",
    "{% extends '/etc/passwd' %}", "{% set messages.x = 1 %}", "{% do messages.append(1) %}",
    "{% macro m() %}{{ m.__globals__ }}{% endmacro %}{{ m() }}",
    "{% set x = messages.append({}) %}{{ messages|length }}",
    "{% set x = messages[0].update({'role': 'system'}) %}", "{% set x = messages.clear() %}",
)  # fmt: skip


@pytest.mark.parametrize("template", [*(f"{{{{ {said} }}}}" for said in ESCAPES), *STATEMENTS])
def test_no_template_leaves_its_sandbox(tokenizer, template, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    tokenizer.chat_template = template
    try:
        said = templates._render(TURNS, templates.encoder(tokenizer), opening=False)
    except Unusable as refusal:
        said = str(refusal)
    assert SECRET not in said
    assert "root:" not in said
    assert "<class" not in said.replace("has no attribute", "")
    assert "function" not in said or "is undefined" in said or "unsafe" in said
    assert TURNS[0].role == "user"


def test_the_process_has_no_secret_and_can_write_nothing(tokenizer, monkeypatch, tmp_path):
    """The second wall: what a hole in the sandbox would find."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    rendering._worker.end()
    templates.prompt_ids(TURNS[:1], tokenizer)
    process = rendering._worker.process
    assert process
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert SECRET.encode() not in file.read()
    with open(f"/proc/{process.pid}/limits") as file:
        limits = file.read()
    assert "Max file size             0                    0" in limits
    assert f"Max address space         {rendering.MEMORY}" in limits
    assert f"Max open files            {rendering.FILES}" in limits


def test_forks_have_processes_of_their_own(tokenizer):
    context = templates.encoder(tokenizer)
    expected = templates.asked(TURNS[:1], context)
    process = rendering._worker.process
    readers = []
    for _ in range(3):
        reader, writer = os.pipe()
        if not os.fork():
            same = all(templates.asked(TURNS[:1], context) == expected for _ in range(20))
            os.write(writer, b"1" if same and rendering._worker.process is not process else b"0")
            rendering._worker.end()
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    assert all(templates.asked(TURNS[:1], context) == expected for _ in range(20))
    assert [os.read(reader, 1) for reader in readers] == [b"1"] * 3
    for reader in readers:
        os.close(reader)
        os.wait()
    assert rendering._worker.process is process


OURS = [*templates.NAMED_TEMPLATES.values()]
WILD = (
    "{%- for m in messages -%}{%- if loop.first and m.role != 'system' -%}{{ 'sys\\n' }}{%- endif -%}"
    "{{- m.role + ':' + m.content|trim -}}{%- if loop.last %}{% break %}{% endif %}{%- endfor -%}",
    "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n ~ m.content }}{% endfor %}",
    "{{ messages|tojson(indent=2) }}{{ tools|tojson }}{{ strftime_now('%%') }}",
    "{% if messages|length > 1 %}{{ raise_exception('two \\'turns\\'') }}{% endif %}",
    "{% macro w(m) %}{{ m.content.split(' ')[-1].strip() | upper }}{% endmacro %}"
    "{% for m in messages %}{{ w(m) }}{% endfor %}",
    "{{ messages[0].missing.deeper }}", "{{ messages|map(attribute='role')|join(', ') }}{{ bos_token }}",
    "{% for k, v in messages[0]|dictsort %}{{ k }}={{ v }};{% endfor %}{{ dict(a=1) }}", "{% if %}", "{{ 1 / 0 }}",
)  # fmt: skip


@pytest.mark.parametrize("template", [*OURS, *WILD])
def test_a_template_writes_what_transformers_own_writes(tokenizer, template):
    """The independent source is transformers' environment, in this process."""
    rendering.install()
    values = {
        "messages": [{"role": t.role, "content": t.content + " é 😀 \ud83d \u2028"} for t in TURNS],
        "tools": [{"a": "<"}],
        "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True,
    }  # fmt: skip

    def told(made):
        try:
            return made(template).render(**values)
        except Exception as error:
            return type(error).__name__, getattr(error, "message", None) or str(error)

    own, other = told(rendering.Template), told(rendering._stock[0])
    assert own == other or (template == "{{ 1 / 0 }}" and own[0] == "TemplateError")


def test_whatever_renders_in_this_process_renders_there(tokenizer, monkeypatch):
    """`apply_chat_template` is what trainers, the harness and the exporters call."""
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    rendering.install()
    tokenizer.chat_template = EXHAUSTING["power"] + "{# everywhere #}"
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="more than"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_prepared_rows_tell_what_became_of_them(tokenizer, tmp_path):
    from tunesmith.recipe import Data

    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "{p}", "response": "b"}}\n' for p in ("a", "bomb", "c", "d", "e", "f"))
    )
    tokenizer.chat_template = (
        "{% if 'bomb' in messages[0].content %}{{ 'a' * 3000000000 }}{% endif %}" + tokenizer.chat_template
    )
    section = Data(dataset=str(file), cache=False, validation=0.0, held_out=0.0, on_breach="drop")
    made = data.encoded(data.prepare(section), tokenizer, data=section, loss_on="answers")
    entries = [entry for entry in made.ledger.entries if entry.fate == "dropped"]
    assert [(entry.row.number, "chat template" in entry.reason) for entry in entries] == [(2, True)]
