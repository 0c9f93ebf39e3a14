"""Are texts found where they stand, whether a rendering of sentinels is kept or made anew for each conversation?"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ray.data.chat import Finder, find_texts, pin_template
from dpa_ray.errors import UserError
from tests.encoders import CHATML, IM, LLAMA2, STYLES, byte_level, style

ODD = {
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "newlines, trimmed": "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}",
    "users' words rewritten": CHATML.replace("message.content", "(message.content if loop.index0 % 2 else 'X')"),
    "users' words left out": "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}|{% endif %}{% endfor %}",
    "answers rewritten": "{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}",
    "by the answer's words": "{% for m in messages %}{{ m.content }}{{ '!' if 'a' in m.content else '?' }}{% endfor %}",
    "backwards": "{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}",
    "no blanks": LLAMA2.replace(" ' + message.content.strip() + ' ", "' + message.content + '"),
}
WORDS = st.sampled_from(
    [
        "a",
        "Yes",
        " ",
        "\n",
        "\t",
        "<think>",
        "</think>",
        "<|im_end|>",
        "zqMark",
        "zqMark0bz",
        "<image>",
        "é 東",
        "|",
        "user",
    ]
)
TEXTS = st.lists(WORDS, max_size=6).map("".join)


def outcome(find, *arguments, **options):
    """What it returns, or refuses in which words."""
    try:
        return find(*arguments, **options)
    except UserError as err:
        return str(err)


@pytest.mark.parametrize("name", [*STYLES, *ODD])
def test_a_kept_rendering_gives_the_same_spans_and_refusals(name):
    """A Finder that has seen all conversations before, beside the two renderings of each."""
    tokenizer = byte_level(IM) if name in ODD else style(name)[0]
    template = ODD.get(name) or pin_template(tokenizer.chat_template, "26 Jul 2024")
    finder = Finder(tokenizer, template)

    @settings(max_examples=150, deadline=None)
    @given(
        texts=st.lists(TEXTS, min_size=1, max_size=4), system=st.booleans(), prompt=st.booleans(), every=st.booleans()
    )
    def check(texts, system, prompt, every):
        roles = ["system"] * system + ["user", "assistant"] * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        wanted = {"system", "user", "assistant"} if every else {"assistant"}
        expected = outcome(find_texts, tokenizer, template, messages, wanted, generation_prompt=prompt)
        assert outcome(finder, messages, wanted, generation_prompt=prompt) == expected

    check()


def test_a_conversation_of_roles_seen_before_is_rendered_once(monkeypatch):
    tokenizer = style("llama-3.1")[0]
    finder, rendered = Finder(tokenizer, tokenizer.chat_template), []
    inner = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *a, **k: rendered.append(1) or inner(*a, **k), raising=True
    )
    for i in range(5):
        messages = [{"role": "user", "content": f"What? {i}"}, {"role": "assistant", "content": f" {i} is it. "}]
        text, spans = finder(messages, {"assistant"})
        assert [text[s.start : s.end] for s in spans] == [f"{i} is it."]
    assert len(rendered) == 6
