"""Chat templates: what they may do, what they may not, and what the client hears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from trained_models import trained_model

from swarmcpp.core import ChatMessage
from swarmcpp.errors import BadRequest
from swarmcpp.llama.chat import ChatCodec
from swarmcpp.llama.vocab import Vocab, VocabModel
from swarmcpp.models.synthetic_vocab import CHAT_TEMPLATE

TALK = (ChatMessage("system", "Be brief."), ChatMessage("user", "Hi <b>&\n"), ChatMessage("assistant", "Ho"))
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>&\n<|im_end|>\n"
    "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def vocab(tiny_path: Path) -> Iterator[Vocab]:
    model = VocabModel(tiny_path)
    yield model.vocab
    model.close()


class MarkedVocab:
    """A vocabulary whose control tokens have texts, with or without a BOS that the tokenizer adds."""

    bos, eos, n_vocab = 1, 2, 3

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos

    def special_text(self, token: int) -> str:
        return {1: "<s>", 2: "</s>"}.get(token, "")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [1] * (add_special and self.adds_bos) + [3] * len(text)

    def piece(self, token: int) -> bytes:
        return b""


def render(vocab: Vocab, template: str | None, extra: dict[str, Any] | None = None) -> str:
    return ChatCodec(vocab, template).render_chat(TALK, extra)


@pytest.mark.parametrize("template", [None, "", CHAT_TEMPLATE])
def test_chatml_is_the_default(vocab: Vocab, template: str | None) -> None:
    assert render(vocab, template) == CHATML


def test_control_tokens_of_a_chat_become_single_tokens(vocab: Vocab) -> None:
    codec = ChatCodec(vocab, None)
    tokens = codec.tokenize_chat(TALK)
    assert tokens.count(257) == 4
    assert tokens.count(258) == 3
    assert codec.tokenize_text("<|im_end|>x") == [258, ord("x")]
    assert codec.n_vocab == vocab.n_vocab
    assert b"".join(map(codec.piece, tokens)).decode() == CHATML.replace("<|im_start|>", "").replace("<|im_end|>", "")


def test_names_and_extra_values_reach_the_template(vocab: Vocab) -> None:
    codec = ChatCodec(vocab, "{{ messages[0].name }}/{{ messages[1].name is defined }}/{{ thinking }}")
    messages = [ChatMessage("user", "x", name="Ann"), ChatMessage("user", "y")]
    assert codec.render_chat(messages, {"thinking": False}) == "Ann/False/False"


def test_blocks_leave_no_blank_lines(vocab: Vocab) -> None:
    template = "{% for m in messages %}\n    {% if true %}\n{{ m.role }};\n    {% endif %}\n{% endfor %}\n"
    assert render(vocab, template) == "system;\nuser;\nassistant;\n"


def test_loop_controls_work(vocab: Vocab) -> None:
    assert render(vocab, "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}") == "x"


def test_tojson_is_plain_json(vocab: Vocab) -> None:
    assert render(vocab, "{{ messages[1].content | tojson }}") == json.dumps("Hi <b>&\n")
    assert render(vocab, "{{ {'é': 1} | tojson(indent=2) }}") == '{\n  "é": 1\n}'
    assert render(vocab, "{{ [1, 2] | tojson(ensure_ascii=False, sort_keys=True) }}") == "[1, 2]"


def test_strftime_now(vocab: Vocab) -> None:
    before = datetime.now().year
    assert before <= int(render(vocab, "{{ strftime_now('%Y') }}")) <= datetime.now().year


def test_raise_exception_is_the_clients_error(vocab: Vocab) -> None:
    with pytest.raises(BadRequest, match="roles must alternate") as caught:
        render(vocab, "{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ '{0.__class__.__mro__}'.format('x') }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(vocab: Vocab, template: str) -> None:
    """A forbidden attribute is refused, or is as good as absent; nothing of Python's insides comes out."""
    codec = ChatCodec(vocab, template)
    try:
        text = codec.render_chat(TALK)
    except BadRequest:
        return
    assert text == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ nothing.more }}",
        "{{ messages | sort }}",
        "{{ 'x' + 1 }}",
        "{{ nothing | tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 1000000000000000 }}",
        "{% include 'elsewhere' %}",
    ],
)
def test_a_template_that_fails_is_the_clients_error(vocab: Vocab, template: str) -> None:
    with pytest.raises(BadRequest, match="the model's chat template refuses this conversation"):
        render(vocab, template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}no end",
        "{{ 1 + }}",
        "{% unknown %}",
        "{{ x | no_such_filter }}",
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    ],
)
def test_a_broken_template_only_breaks_chats(vocab: Vocab, template: str) -> None:
    codec = ChatCodec(vocab, template)
    assert codec.tokenize_text("ab") == [97, 98]
    with pytest.raises(BadRequest, match=r"cannot be compiled \(.*/v1/completions"):
        codec.tokenize_chat(TALK)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", ["{{ bos_token }}a{{ eos_token }}", "a{{ eos_token }}"])
def test_bos_is_never_doubled(adds_bos: bool, template: str) -> None:
    vocab = cast(Vocab, MarkedVocab(adds_bos))
    text = ChatCodec(vocab, template).render_chat(TALK)
    writes_bos = template.startswith("{{ bos") and not adds_bos
    assert text == ("<s>" if writes_bos else "") + "a</s>"


def test_bos_of_a_real_vocabulary_is_there_once() -> None:
    model = VocabModel(trained_model())
    try:
        assert model.vocab.adds_bos
        for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
            tokens = ChatCodec(model.vocab, template).tokenize_chat(TALK)
            assert tokens.count(model.vocab.bos) == 1
            assert tokens[0] == model.vocab.bos
    finally:
        model.close()
