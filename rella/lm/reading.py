"""How a model reads an experiment's prompts: conversation template, what titles may hold, answer tokens, encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rella.config import PromptConfig
from rella.lm.chat import native_wrapper
from rella.lm.encoding import PromptEncoder
from rella.lm.loading import Answers, answers_for, check_answer_ids
from rella.models import ModelIdentity
from rella.prompts import ChatWrapper, Display, wrapper_for
from rella.wording import Wording


@dataclass(frozen=True)
class Reader:
    """One model's tokenizer under one experiment's `prompt` options."""

    tokenizer: Any
    model: ModelIdentity
    config: PromptConfig
    wording: Wording

    @property
    def _template(self) -> ChatWrapper:
        if self.config.wrapper == "native":
            return native_wrapper(self.tokenizer, self.model.source)
        return wrapper_for(self.config.wrapper)

    @property
    def wrapper(self) -> ChatWrapper:
        """The conversation template around a prompt, up to where the answer begins."""
        found = self._template
        if self.config.trailing_blank:
            return replace(found, after=found.after + found.separator, separator="")
        return found

    @property
    def display(self) -> Display:
        """What titles and profiles are made fit with: the authors' data keep the dump's escapes."""
        special = {t for t in self.tokenizer.all_special_tokens if len(t) > 1}
        special |= {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special and len(str(t)) > 1}
        return Display(self.config.title_chars, self.config.variant != "authors", tuple(sorted(special)))

    def answers(self) -> Answers:
        """Return the answers' tokens, which do not depend on where the blank before them is counted.

        Raises:
            InputError: "Yes" or "No" is not one token behind the prompt, or not the one known for this model.
        """
        found = answers_for(self.tokenizer, self._template)
        if self._template.separator == " ":
            check_answer_ids(found, self.model.source)
        return found

    def trained(self, label: int) -> tuple[int, ...]:
        """Return the tokens that a training row of this label ends with."""
        end = (self.tokenizer.eos_token_id,) if self.config.answer_eos else ()
        return self.answers().of(label) + end

    def encoder(self) -> PromptEncoder:
        """Return a new encoder, its counts at zero; `prompt.max_tokens` must be resolved."""
        return PromptEncoder(self.tokenizer, self.wording, self.wrapper, int(self.config.max_tokens))
