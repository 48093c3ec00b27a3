"""Default numbers and names: what the command line tells and the library uses where nobody says anything else.

They stand in a module of their own that imports nothing, so that help can name them at once.
"""

TEXT_GENERATOR = "cond-pdiff/minilm-text-tasks"
STYLE_GENERATOR = "cond-pdiff/pixart-mini-styles"
LANGUAGE_GENERATOR = "cond-pdiff/smollm2-tasks"

DEFAULT_STEPS = 20
"""The number of denoising steps. Adapters of one task then vary as much as after 200 steps (`benchmarks/spread.py`): on the four narrowest
tasks of the bundled text generator 0.98 as much; with exponential noise levels, which new generators have, a few hundredths more, and with
those of the bundled styles, which vary by 0.03 only, 1.2 as much. After ten equal steps, the last of which begins at a noise of 0.34, it
was 0.7 on those tasks, and 3 on the styles."""
CHOOSE_FROM = 20
"""The number of candidates where there are examples to choose on (the paper's number)."""
MAX_EXAMPLES = 64
"""The most examples that are taken from a file: each is read by every candidate, and kept with the adapter."""

REFINE_STEPS = 12
"""The steps of refining on labelled examples where nobody says how many."""

ANSWER_TOKENS = 64
"""The most tokens of a language model's answer."""

MAX_REFINE_STEPS = 1000
REFINE_BATCH = 8
"""Pictures in each step of refining a style."""
STYLE_REFINE_RATE = 0.015
"""The learning rate of refining a style, which is that of the bundled generator's zoo."""

EVALUATED_SAMPLES = 20
"""The number of adapters generated per task (the paper's number)."""
EVALUATED_ROWS = 200
CALIBRATION_DRAWS = 3
CALIBRATION_ROWS = 160

STYLE_TRAIN_PICTURES = 128
STYLE_TEST_PICTURES = 64
CONTINUUM_MIXTURES = 1000
