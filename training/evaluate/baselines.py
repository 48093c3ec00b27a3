"""What a generator has to beat: other ways to make something of its zoo's adapters, or of a few labelled examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cond_pdiff.adapter import LoraAdapter
from cond_pdiff.classifier import NAME_WEIGHT, PrototypeClassifier
from cond_pdiff.conditions.texts import Text
from cond_pdiff.errors import TaskDataError
from cond_pdiff.models.adapter_template import AdapterTemplate
from cond_pdiff.pipelines.pipeline_cond_pdiff import CondPDiffPipeline
from cond_pdiff.training.zoo.zoo import Zoo, soup

INVERSE_STRENGTH = 3.0
"""The C (inverse strength) of `logistic_regression`: chosen on training rows of every second task of the bundled generator's zoo."""

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""The strengths that `KernelRegression.fit` chooses from."""


def multitask_adapter(zoo: Zoo) -> LoraAdapter | None:
    """Return the adapter that was trained on all tasks of a zoo, if it has been collected.

    Raises:
        TaskDataError: only its `lora_B` was trained, as it was with 0.1.0: a weaker baseline than there could be.
    """
    found = zoo.multitask()
    if found is None:
        return None
    collected = zoo.facts["collect"]
    if not found.facts.get("train_lora_a", collected["train_lora_a"] or collected.get("from_multitask", False)):
        raise TaskDataError(
            f"{found.folder} trained lora_B only, which makes a weak baseline; expected a multi-task adapter that trained both factors: "
            "delete that folder and run the same `cond-pdiff collect` again"
        )
    return found.adapter()


@dataclass(frozen=True)
class KernelRegression:
    """Kernel ridge regression from condition embeddings to params, with a linear kernel and the mean of all params as intercept.

    Args:
        conditions: an embedding a task, shape `(num_tasks, condition_dim)`.
        params: the mean of its adapters', shape `(num_tasks, num_params)`.
        ridge: in units of the kernel's mean diagonal. With little of it each task gets its own soup, with much all get the mean.
    """

    conditions: torch.Tensor
    params: torch.Tensor
    ridge: float

    @classmethod
    def fit(cls, conditions: torch.Tensor, params: torch.Tensor) -> KernelRegression:
        """Fit with the ridge of `RIDGES` by which each task's params are predicted best (least squares) from all other tasks.

        Of a single task, which leaves no others, every ridge makes the same.
        """
        gram = params.double() @ params.double().T
        count = len(conditions)

        def left_out_error(ridge: float) -> float:
            error = 0.0
            for task in range(count if count > 1 else 0):
                others = torch.arange(count) != task
                weights = gram.new_zeros(count).masked_scatter_(others, ridge_weights(conditions[others], conditions[task, None], ridge)[0])
                weights[task] = -1.0  # from here on of prediction minus soup
                error += float(weights @ gram @ weights)
            return error

        return cls(conditions, params, min(RIDGES, key=left_out_error))

    def predict(self, conditions: torch.Tensor) -> torch.Tensor:
        """Predict params, shape `(batch, num_params)`, from condition embeddings, shape `(batch, condition_dim)`."""
        return ridge_weights(self.conditions, conditions, self.ridge).to(self.params.dtype) @ self.params


def ridge_weights(known: torch.Tensor, asked: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return what each known task counts for each condition that is asked about: α = k (K + λI)⁻¹ of centred embeddings, and an even rest.

    Args:
        known: shape `(num_tasks, condition_dim)`.
        asked: shape `(batch, condition_dim)`.
        ridge: λ, in units of the mean diagonal of K.

    Returns:
        float64, shape `(batch, num_tasks)`; each row's sum is 1.
    """
    center = known.double().mean(0)
    known, asked = known.double() - center, asked.double() - center
    kernel = known @ known.T
    strength = (ridge * kernel.diagonal().mean()).clamp_min(1e-12)  # of a single task the kernel is 0
    weights = torch.linalg.solve(kernel + strength * torch.eye(len(known)).to(kernel), known @ asked.T).T
    return weights + (1 - weights.sum(1, keepdim=True)) / len(known)


class ZooBaselines:
    """Adapters for the requests that a generator gets, made of its zoo without it.

    Args:
        pipe: the generator; its condition encoder and index say how alike requests are.
        zoo: finished.
        trained: adapters by task; of those tasks that the generator was trained on, all or a part, the baselines are made.
    """

    def __init__(self, pipe: CondPDiffPipeline, zoo: Zoo, trained: Mapping[str, Sequence[LoraAdapter]]) -> None:
        self.pipe, index = pipe, pipe.condition_index
        places = [place for place, name in enumerate(index.names) if name in trained]
        names = [index.names[place] for place in places]
        if missing := [name for name in names if not trained[name]]:
            raise TaskDataError(f"{zoo.folder} has no adapter of {missing[0]!r}; run `cond-pdiff collect` to the end")
        adapters = [adapter for name in names for adapter in trained[name]]
        self.template = AdapterTemplate.from_adapters(adapters, zoo.base, int(zoo.facts["collect"]["max_length"]))
        self.multitask = multitask_adapter(zoo)
        self.mean = soup(adapters)
        """The mean of all trained adapters, one adapter for everything."""
        # Means of params, as the generator models them: a soup of adapters with an own `lora_A` each has factors like no other's.
        means = torch.stack([torch.stack([self.template.to_params(adapter) for adapter in trained[name]]).mean(0) for name in names])
        self.regression = KernelRegression.fit(index.embeddings[places].float(), means)

    def regressed(self, condition: Any) -> LoraAdapter:
        """Return what `KernelRegression` makes of a request."""
        embedding = self.pipe.encode_condition(condition, 1)[0][:1]
        return self.template.to_adapter(self.regression.predict(embedding.float())[0])


def logistic_regression(classifier: PrototypeClassifier, texts: Sequence[Text]) -> torch.Tensor:
    """Classify by logistic regression on the base's embeddings, fitted to a classifier's examples and, as further ones, its label names.

    A name counts as much as in a prototype.

    Args:
        classifier: without an adapter.
        texts: to classify; cut where the classifier cuts them.

    Returns:
        Class indices, shape `(len(texts),)`.
    """
    from sklearn.linear_model import LogisticRegression

    names, examples = classifier.example_embeddings()
    classes = [*range(len(names)), *classifier.targets.tolist()]
    weights = [NAME_WEIGHT] * len(names) + [1.0] * len(examples)
    model = LogisticRegression(C=INVERSE_STRENGTH, max_iter=1000)
    model.fit(torch.cat([names, examples]).cpu().numpy(), classes, weights)
    return torch.from_numpy(model.predict(classifier.backbone.embed(texts, classifier.max_length).cpu().numpy()))
