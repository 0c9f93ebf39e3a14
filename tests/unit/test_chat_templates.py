"""Is a template that cannot be trained on refused with an explanation, and is its clock pinned?"""

from __future__ import annotations

import pickle

import pytest

from dpa_ray.data.chat import begun_with_bos, pin_template
from dpa_ray.data.encode import Encoder
from dpa_ray.errors import UserError
from tests.encoders import CHATML, IM, STYLES, byte_level, encoder, sample, style


def test_a_template_that_rewrites_answers_is_refused_with_an_explanation():
    tokenizer = byte_level(IM)
    for rewrite in ("message.content | upper", "message.content[:3]", "'' if loop.last else message.content"):
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message.role }}: {{ " + rewrite + " }}<|im_end|>{% endfor %}"
        )
        with pytest.raises(UserError, match="no way to find the texts"):
            encoder(tokenizer).check()


def test_a_template_that_repeats_answers_is_refused():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="no way to find the texts"):
        encoder(tokenizer)(sample("What?", "Yes"))


def test_a_template_that_drops_the_image_is_refused():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.replace('<image>', '') }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="expected 1 <image>, found 0"):
        encoder(tokenizer)(sample("<image>\nWhat?", "Yes", images=1))


def test_check_refuses_a_template_without_an_end_of_turn():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="would never stop"):
        encoder(tokenizer).check()


def test_no_chat_template_is_an_error_in_stage_3_only():
    tokenizer = byte_level(IM)
    with pytest.raises(UserError, match="expected a tokenizer with a chat template"):
        encoder(tokenizer)
    encoder(tokenizer, "plain").check()


@pytest.mark.parametrize("name", STYLES)
def test_check_accepts_every_style(name):
    encoder(style(name)[0]).check()


def test_the_clock_is_pinned():
    tokenizer = byte_level(IM)
    tokenizer.chat_template = (
        "{{ 'Today: ' + strftime_now('%Y-%m-%d') + strftime_now(' %d %B %Y, %-d') + '\n' }}" + CHATML
    )
    text = tokenizer.decode(encoder(tokenizer, date="6 Jul 2024")(sample("What?", "Yes")).input_ids)
    assert text.startswith("Today: 2024-07-06 06 July 2024, 6\n")
    llama = style("llama-3.1")[0]
    assert "Today Date: 3 Feb 2021\n" in llama.decode(
        encoder(llama, date="3 Feb 2021")(sample("What?", "Yes")).input_ids
    )
    with pytest.raises(UserError, match="expected a date like"):
        encoder(llama, date="yesterday")


def test_a_template_without_clock_is_left_as_it_is():
    assert pin_template(CHATML, "26 Jul 2024") == CHATML
    assert (
        pin_template("\n  {% if true %}x{% endif %} date_string", None) == "\n  {% if true %}x{% endif %} date_string"
    )


def test_pinning_keeps_the_blanks_at_the_start_of_a_template():
    tokenizer = byte_level(IM)
    for template in ("\n\n{{ date_string }}", "  {% if true %}{{ date_string }}{% endif %}", "  {{ date_string }}"):
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=template, tokenize=False, date_string="1 Jan 2024"
        )
        pinned = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=pin_template(template, "1 Jan 2024"), tokenize=False
        )
        assert pinned == given


@pytest.mark.parametrize("adds_bos", [True, False])
def test_chats_begin_as_the_tokenizer_begins_texts(adds_bos: bool) -> None:
    """Else training has no BOS, and transformers' processors, which add the one that they miss, another first token."""
    tokenizer = byte_level([*IM, "<s>"], bos="<s>", adds_bos=adds_bos)
    tokenizer.chat_template = begun_with_bos(CHATML, tokenizer)
    assert (tokenizer.chat_template == CHATML) == (not adds_bos)
    ids = list(encoder(tokenizer)(sample("What?", "Yes")).input_ids)
    assert ids.count(tokenizer.bos_token_id) == ids[:1].count(tokenizer.bos_token_id) == int(adds_bos)
    own = "{{ bos_token }}" + CHATML
    assert begun_with_bos(own, tokenizer) == own


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="fast tokenizer"):
        Encoder(object(), "plain", 10, 1, 0)


def test_an_encoder_survives_pickling():
    tokenizer = style("llama-3.1")[0]
    encode = encoder(tokenizer)
    one = sample("<image>\nWhat?", "Yes", images=1)
    again = pickle.loads(pickle.dumps(encode))
    assert again(one).input_ids.tolist() == encode(one).input_ids.tolist()
