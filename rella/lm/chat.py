"""A model's own conversation template as a wrapper around the prompt (option to D.1.2's one template for all)."""

from __future__ import annotations

from typing import Any

from rella.backbones import backbone_of
from rella.errors import InputError
from rella.prompts import ChatWrapper

_PROMPT, _ANSWER = "PROMPTSTANDSHERE", "ANSWERSTANDSHERE"
_DATE = "26 Jul 2024"
"""Today, for templates that print a date: an adapter is scored on another day with the prompt it was tuned on."""


def native_wrapper(tokenizer: Any, source: str) -> ChatWrapper:  # noqa: ANN401 - transformers is untyped here
    """Return the conversation format that the model was instructed with.

    That of a backbone of the paper is built in; for others it is read off the tokenizer's chat template. Blanks at its
    end become the wrapper's separator, line breaks stay in front of the answer, and the begin token is left to the
    tokenizer where that sets it.

    Args:
        tokenizer: the model's.
        source: its hub name or folder.

    Raises:
        InputError: there is no template, or it does not render one user's message as it is.
    """
    backbone = backbone_of(source)
    if backbone is not None and backbone.native is not None:
        before, after, separator = backbone.native
        return ChatWrapper(name="native", before=before, after=after, separator=separator)
    before, after, separator = _split(tokenizer, source)
    begin = tokenizer.bos_token
    if begin and before.startswith(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        before = before[len(begin) :]
    return ChatWrapper(name="native", before=before, after=after, separator=separator)


def _split(tokenizer: Any, source: str) -> tuple[str, str, str]:  # noqa: ANN401
    """Render the tokenizer's template around a stand-in: what is before it, after it, and then before the answer."""
    remedy = "take --prompt.wrapper vicuna or plain"
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{source} has no conversation template of its own: {remedy}")
    try:
        pieces = _render(tokenizer, answered=False).split(_PROMPT)
    except Exception as error:  # whatever a template that was written elsewhere can raise
        raise InputError(f"the conversation template of {source} fails ({error}): {remedy}") from error
    if len(pieces) != 2:
        raise InputError(
            f"the conversation template of {source} prints the user's message {len(pieces) - 1}×: {remedy}"
        )
    before, opening = pieces
    whole = opening + _blanks_before_answer(tokenizer, opening)
    after = whole.rstrip(" ")
    return before, after, whole[len(after) :]


def _blanks_before_answer(tokenizer: Any, opening: str) -> str:  # noqa: ANN401
    """Return what the template puts between its opening of the answer and an answer, if that is blanks or nothing."""
    try:
        between = _render(tokenizer, answered=True).partition(_PROMPT)[2].partition(_ANSWER)[0]
    except Exception:  # some render no finished conversation
        between = ""
    blanks = between.removeprefix(opening)
    if between.startswith(opening) and not blanks.strip(" "):
        return blanks
    # Such as a template that words a finished answer in another way than one to come.
    return "" if opening[-1:].isspace() else " "


def _render(tokenizer: Any, answered: bool) -> str:  # noqa: ANN401
    template: str = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = f"{{% macro strftime_now(form) %}}{_DATE}{{% endmacro %}}{{{{ '' }}}}{template}"
    messages = [{"role": "user", "content": _PROMPT}] + [{"role": "assistant", "content": _ANSWER}] * answered
    text: str = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=not answered,
        # Qwen 3 and others: the answer comes at once, without a chain of thought before it.
        enable_thinking=False,
    )
    return text
