"""Models' own conversation templates: what the wrapper gives is, to the token, what the template gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rella.backbones import BACKBONES
from rella.lm.chat import native_wrapper
from rella.lm.loading import answers_for
from rella.prompts import WRAPPERS

INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's: the begin token is printed, the answer follows a blank that belongs to the answer."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ending_in(opening: str, answer: str = "{{ m['content'] }}") -> str:
    """A template that opens an answer with these characters; `answer` is what a finished one looks like behind them."""
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] }}{% else %}"
        f"{{{{ {opening!r} }}}}{answer}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}"
    )


def with_template(tokenizer: Any, template: str | None) -> Any:
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = template
    return mine


TEMPLATES = {
    "Llama 2": (INST, ("[INST] ", " [/INST]", " ")),
    "ChatML": (CHATML, ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "")),
    "newline at the end": (ending_in("\n\nA:\n"), ("Q: ", "\n\nA:\n", "")),
    "blank at the end": (ending_in("\nA: "), ("Q: ", "\nA:", " ")),
    "nothing before the answer": (ending_in("[A]"), ("Q: ", "[A]", "")),
    # A finished answer is worded in another way: the blank is a guess, but none is added behind a line break.
    "another way": (
        ending_in("\nA:", "").replace("{{ '\\nA:' }}{% endif %}{% endfor %}", "{{ '\\nB' }}{% endif %}{% endfor %}"),
        ("Q: ", "\nA:", " "),
    ),
    "only questions": (
        "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}"
        "{{ 'Q: ' + messages[0]['content'] + '\nA:\n' }}",
        ("Q: ", "\nA:\n", ""),
    ),
}


@pytest.mark.parametrize("which", TEMPLATES)
@pytest.mark.parametrize("kind", ["llama_tokenizer", "falcon_tokenizer"])
def test_a_template_becomes_a_wrapper(which: str, kind: str, request: pytest.FixtureRequest) -> None:
    template, (before, after, separator) = TEMPLATES[which]
    tokenizer = with_template(request.getfixturevalue(kind), template)
    if kind == "falcon_tokenizer":
        # As for ChatML's models: no begin token, so nothing is printed for it.
        assert tokenizer.bos_token is None
        template = tokenizer.chat_template = template.replace("bos_token + ", "")
    found = native_wrapper(tokenizer, "someone/some-model")
    assert (found.name, found.before, found.after, found.separator) == ("native", before, after, separator)


@pytest.mark.parametrize("adds_begin", [True, False])
@pytest.mark.parametrize("which", ["Llama 2", "blank at the end"])
def test_the_begin_token_is_there_as_often_as_it_should(which: str, adds_begin: bool, llama_tokenizer: Any) -> None:
    """Once if tokenizer or template set it, whoever of them does; the rest of the tokens are the template's."""
    tokenizer = with_template(llama_tokenizer, TEMPLATES[which][0])
    if not adds_begin:
        tokenizer.add_bos_token = False
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == adds_begin
    wrapper = native_wrapper(tokenizer, "someone/some-model")
    ids = tokenizer(wrapper.wrap("Will she like it?"))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == int(adds_begin or which == "Llama 2")
    message = [{"role": "user", "content": "Will she like it?"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # But for the blank at its end, which is the separator's.
    text = text.rstrip(" ")
    assert ids == tokenizer(text.removeprefix("<s>") if adds_begin else text)["input_ids"]


def test_the_answer_follows_as_the_template_has_it(llama_tokenizer: Any) -> None:
    """A finished conversation of Llama 2's format: prompt, separator and answer are its tokens."""
    tokenizer = with_template(llama_tokenizer, INST)
    wrapper = native_wrapper(tokenizer, "someone/some-model")
    messages = [{"role": "user", "content": "Will she like it?"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    finished = tokenizer(text.removeprefix("<s>"))["input_ids"]
    prompt = tokenizer(wrapper.wrap("Will she like it?"))["input_ids"]
    ours = prompt + list(answers_for(tokenizer, wrapper).yes)
    assert finished[: len(ours)] == ours


@pytest.mark.parametrize("template", [None, ""])
def test_no_template_is_an_error(template: str | None, llama_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"some-model has no conversation template of its own: take --prompt\.wrapper"):
        native_wrapper(with_template(llama_tokenizer, template), "someone/some-model")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message first') }}", r"fails \(a system message first\): take"),
        ("{{ messages[0]['nothing'] + 1 }}", "fails"),
        ("Hello.", "prints the user's message 0×"),
        ("{{ messages[0]['content'] * 2 }}", "prints the user's message 2×"),
        ("{{ messages[0]['content'] | lower }}", "prints the user's message 0×"),
    ],
)
def test_a_template_that_is_of_no_use(template: str, message: str, llama_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        native_wrapper(with_template(llama_tokenizer, template), "someone/some-model")


def test_a_template_that_prints_today_prints_one_day(llama_tokenizer: Any) -> None:
    """An adapter is scored on another day than it was tuned."""
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}\n"
    found = native_wrapper(with_template(llama_tokenizer, template), "someone/some-model")
    assert found.before == "26 Jul 2024 "


def test_an_answer_comes_without_a_chain_of_thought(llama_tokenizer: Any) -> None:
    template = ending_in("\nA:\n") + "{% if add_generation_prompt and enable_thinking %}{{ '<think>' }}{% endif %}"
    assert native_wrapper(with_template(llama_tokenizer, template), "someone/some-model").after == "\nA:\n"


@pytest.mark.parametrize("name", BACKBONES)
def test_the_paper_s_backbones_need_no_template(name: str, llama_tokenizer: Any, falcon_tokenizer: Any) -> None:
    backbone = BACKBONES[name]
    tokenizer = falcon_tokenizer if backbone.model_type == "falcon" else llama_tokenizer
    assert tokenizer.chat_template is None
    wrapper = native_wrapper(tokenizer, backbone.source)
    assert (wrapper.before, wrapper.after, wrapper.separator) == backbone.native
    if name.startswith("vicuna"):
        paper = WRAPPERS["vicuna"]
        assert backbone.native == (paper.before, paper.after, paper.separator)
    ids = tokenizer(wrapper.wrap("Will she like it?"))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == int(backbone.model_type != "falcon")
    answers = answers_for(tokenizer, wrapper)
    assert [tokenizer.decode([t]).strip() for t in answers.pair] == ["Yes", "No"]


def test_a_built_in_format_wins_over_the_tokenizer_s(llama_tokenizer: Any) -> None:
    """Which versions of a tokenizer come with which template differs."""
    backbone = BACKBONES["llama-2-70b-chat"]
    found = native_wrapper(with_template(llama_tokenizer, CHATML), backbone.source)
    assert (found.before, found.after, found.separator) == backbone.native
