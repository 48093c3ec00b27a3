"""HeadBackbone: a frozen transformers model with a classification head, for adapters that bring a trained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import HubError
from cond_pdiff.hub import Backbone
from cond_pdiff.models.text_backbone import TextBackbone, load_text_model


class HeadBackbone(TextBackbone):
    """A frozen model that turns texts (or pairs of texts) into logits.

    Args:
        model: an `AutoModelForSequenceClassification`.
        tokenizer: its fast tokenizer.
    """

    @classmethod
    def load(cls, backbone: Backbone, num_labels: int, heads: Sequence[str]) -> HeadBackbone:
        """Load a base model, in evaluation mode, float32, on the CPU, with new heads, which are random.

        Args:
            heads: full names of the modules that adapters bring.

        Raises:
            HubError: the base model is not to be had, or it lacks weights that are no head's: these would be random too, others
                each time, and no adapter would fit them.
        """
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it would warn of the heads, which are meant to be new
        try:
            model, tokenizer, _, missing = load_text_model(backbone, AutoModelForSequenceClassification, num_labels=num_labels)
        finally:
            transformers_logging.set_verbosity(verbosity)
        lost = sorted(key for key in missing if not any(key.startswith(head + ".") for head in heads))
        if lost:
            raise HubError(
                f"{backbone.repo_id} has no weights {lost[0]!r}; the adapters must bring them: add {lost[0].rpartition('.')[0]!r} "
                "(or the module that it belongs to) to modules_to_save"
            )
        if model.config.pad_token_id is None:  # type: ignore[union-attr]
            model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
        return cls(model, tokenizer)

    def forward(self, texts: Sequence[Text], max_length: int) -> torch.Tensor:
        """Return the logits of one batch, with gradients if any are wanted, shape `(len(texts), num_labels)`."""
        logits: torch.Tensor = self.run(self.tokenize(texts, max_length)).logits
        return logits

    def logits(self, texts: Sequence[Text], max_length: int, batch_size: int = 32) -> torch.Tensor:
        """Return the logits of one text or more, without gradients, shape `(len(texts), num_labels)`."""
        return self.rows(texts, max_length, batch_size)
