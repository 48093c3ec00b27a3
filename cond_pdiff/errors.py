"""The errors that a user of cond-pdiff can meet. Every message says what was expected, what came, and what to do."""


class CondPDiffError(Exception):
    """The base class of every refusal of this package."""


class AdapterError(CondPDiffError):
    """An adapter, its layout or its base model is not what it claims to be."""


class ConditionError(CondPDiffError):
    """A condition (task prompt, style image) cannot be used."""


class HubError(CondPDiffError):
    """A generator or a backbone cannot be found, fetched, or trusted."""


class OutputExistsError(CondPDiffError):
    """The place to write to already holds something."""


class TaskDataError(CondPDiffError):
    """A task folder, a zoo, or a table of texts is malformed."""


class TrainingError(CondPDiffError):
    """Training cannot start, or cannot go on (for example because the loss is not finite)."""
