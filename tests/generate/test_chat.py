"""A conversation over a kept cache is the one that would be computed anew for every turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

import smedjan
from smedjan.errors import ConfigError, TokenizerError
from smedjan.generate import Chat, Sampling, generate
from smedjan.generate import chat as module
from smedjan.generate.chat import template_stops
from tests.families import CASES, make_model, make_session_of
from tests.train.conftest import CHAT, tiny  # noqa: F401  (fixture)

SHORTENED = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][:2] }}{% endfor %}"
)
"""Shows but the beginning of earlier answers, as templates do that drop the model's thoughts."""


def with_template(tokenizer, template):
    return replace(tokenizer, chat_template=template, chat_templates={"default": template} if template else {})


@pytest.fixture(params=["torch_reference", "cpu_native"])
def model(request, tiny):  # noqa: F811
    return smedjan.load(tiny, backend=request.param)


def anew(chat: Chat, count: int) -> tuple[list[int], list[int]]:
    """The prompt of the last turn, and its answer from an empty cache."""
    text, _ = chat.tokenizer.apply_chat_template(chat.conversation()[:-1], add_generation_prompt=True)
    ids = chat.tokenizer.encode(text, False)
    return ids, list(generate(chat.session, ids, max_new_tokens=count, stop=chat.stop_ids))


@pytest.mark.parametrize("template", [CHAT, SHORTENED], ids=["adds", "rewrites"])
def test_turns_are_those_of_an_empty_cache(model, template):
    chat = Chat(model.session, with_template(model.tokenizer, template), max_new_tokens=6)
    cached = []
    for said in ("hello", "tiny text", "is it"):
        pieces = []
        turn = chat.say(said, show=pieces.append)
        ids, expected = anew(chat, 6)
        assert list(turn.token_ids) == expected
        assert turn.prompt_tokens == len(ids)
        assert "".join(pieces) == turn.text == chat.messages[-1]["content"]
        cached.append(turn.cached_tokens)
        kept = turn.prompt_tokens + len(turn.token_ids) - 1
    assert cached[0] == 0
    assert 0 < cached[1] < cached[2]
    if template is CHAT:  # all of the turn before, but where its text is tokenised otherwise than it was made
        assert cached[2] > kept // 2


def test_another_system_prompt_is_seen_at_once(model):
    chat = Chat(model.session, model.tokenizer, max_new_tokens=4)
    chat.say("hello")
    chat.system = "text"
    turn = chat.say("world")
    assert list(turn.token_ids) == anew(chat, 4)[1]
    assert chat.conversation()[0] == {"role": "system", "content": "text"}
    chat.reset()
    assert chat.conversation() == [{"role": "system", "content": "text"}]


def test_a_cache_that_grows_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(module, "CAPACITY_STEP", 4)
    chat, made = Chat(model.session, model.tokenizer, max_new_tokens=12), []
    monkeypatch.setattr(module, "Cache", lambda *a, **k: made.append(k["capacity"]) or smedjan_cache(*a, **k))
    for said in ("hello", "tiny"):
        turn = chat.say(said)
        assert list(turn.token_ids) == anew(chat, 12)[1]
    assert made == sorted(made)
    assert len(made) >= 2


smedjan_cache = module.Cache


def test_a_rope_that_changes_with_the_length_starts_over(tiny):  # noqa: F811
    """phi3's long factors: past `restart_after` everything is turned anew, and back below it again."""
    case = next(name for name in CASES["phi3"] if "rope" in name)
    session = make_session_of(make_model("phi3", CASES["phi3"][case], attention="eager"), attention="eager")
    assert session.config.restart_after is not None
    tokenizer = with_template(
        smedjan.load(tiny).tokenizer,
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else '' }}{% endfor %}",
    )
    chat = Chat(session, Small(tokenizer, session.config.vocab_size), max_new_tokens=4)
    chat.stop_ids = set()
    lengths = []
    for said in ("a" * (session.config.restart_after - 2), "b", "c"):
        turn = chat.say(said)
        lengths.append(turn.prompt_tokens)
        assert list(turn.token_ids) == anew(chat, 4)[1]
    chat.reset()
    assert list(chat.say("ab").token_ids) == anew(chat, 4)[1]
    assert lengths[0] <= session.config.restart_after < lengths[-1] + 4


class Small:
    """A tokenizer whose ids are folded into a smaller vocabulary."""

    def __init__(self, tokenizer, size):
        self.inner, self.size = tokenizer, size

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, text, add_special_tokens=True):
        return [4 + token % (self.size - 4) for token in self.inner.encode(text, add_special_tokens)]


def test_an_answer_may_be_interrupted_and_gone_on_from(model):
    chat = Chat(model.session, model.tokenizer, max_new_tokens=20)
    asked = iter([False, False, True])
    turn = chat.say("hello", interrupted=lambda: next(asked))
    assert (turn.finish_reason, len(turn.token_ids)) == ("interrupted", 3)
    assert list(chat.say("world").token_ids) == anew(chat, 20)[1]


def test_stop_strings_and_draws(model):
    free = Chat(model.session, model.tokenizer, max_new_tokens=20).say("hello").text
    stopped = Chat(model.session, model.tokenizer, max_new_tokens=20, stop=[free[3:5]]).say("hello")
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(free[3:5])], "stop")
    chat = Chat(model.session, model.tokenizer, max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=2))
    first = chat.say("hello").text
    chat.reset()
    assert chat.say("hello").text != first  # another turn, other draws
    again = Chat(model.session, model.tokenizer, max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=2))
    assert again.say("hello").text == first


def test_a_full_context_ends_the_answer_and_the_next_is_refused(model):
    chat = Chat(model.session, model.tokenizer)
    chat.stop_ids = set()
    turn = chat.say("hello world")
    assert turn.finish_reason == "length"
    assert turn.prompt_tokens + len(turn.token_ids) == 64
    before = list(chat.messages)
    with pytest.raises(ConfigError, match="tokens long, and the context ends at 64; begin a new one"):
        chat.say("word " * 60)
    assert chat.messages == before
    chat.reset()
    assert chat.say("hello").text


def test_without_a_template_there_is_one_error(model):
    with pytest.raises(TokenizerError, match=r"no chat template.*use an instruct model"):
        Chat(model.session, with_template(model.tokenizer, None))


def test_the_token_that_ends_an_answer_is_found_in_the_template(tiny):  # noqa: F811
    tokenizer = smedjan.load(tiny).tokenizer
    assert template_stops(tokenizer) == (tokenizer.token_to_id("<eos>"),)
    assert template_stops(with_template(tokenizer, SHORTENED)) == ()
    assert template_stops(with_template(tokenizer, CHAT.replace("<eos>", "\n"))) == ()
