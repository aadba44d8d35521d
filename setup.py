"""Package metadata. Tool settings (ruff, mypy, pytest) are in pyproject.toml, tested versions in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Read, not imported: importing the package would need torch before pip has installed it.
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "mols_ds/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
if VERSION is None:
    raise SystemExit('mols_ds/__init__.py has no line __version__ = "..."')

SHIPPED = ("configs", "studies", "launch", "examples", "train.py", "finetune.py", "train_megatron.py")


class BuildWithFiles(build_py):
    """Puts SHIPPED into a wheel, as mols_ds/shipped: mols_ds/training/shipped.py finds them there. A checkout and an
    editable install use the files where they are."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib, "mols_ds", "shipped")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in () if self.editable_mode else SHIPPED:
            if (HERE / name).is_dir():
                shutil.copytree(HERE / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(HERE / name, target / name)


TRAIN = [
    "transformers>=4.56",
    "datasets>=3.0",
    "tokenizers>=0.21",
    "rich>=13.0",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "scipy>=1.13",
    "pandas>=2.2",
    "jinja2>=3.1",
    "markdown-it-py>=3.0",
]
FINETUNE = ["peft>=0.14"]
REPORT = ["matplotlib>=3.8", "rich>=13.0"]
COMPLETION = ["shtab>=1.7"]
MEGATRON = ["megatron-core>=0.16", "filelock>=3.13"]
# The training loops of docs/clients.md, which are tested with their real classes
CLIENTS = ["accelerate>=1.15", "trl>=1.16", "lightning>=2.6"]
# What docs/optimizers.md takes from other projects.
OPTIMIZERS = ["pytorch-optimizer>=4.0", "bitsandbytes>=0.45"]
DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=1.0", "ruff>=0.6"]  # ruff formats the signatures
TEST_TOOLS = ["pytest>=8.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"]
# adam-mini: the authors' implementation, which this package's is tested against.
TEST_TOOLS += ["ruff>=0.6", "mypy>=1.11", "import-linter>=2.17", "types-PyYAML", "adam-mini>=1.1.1"]

setup(
    name="mols-ds",
    version=VERSION[1],
    description="Module-wise learning rates from gradient signal-to-noise ratios (MoLS), for DeepSpeed and Megatron",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithFiles},
    packages=find_packages(include=["mols_ds", "mols_ds.*", "megatron_patches", "megatron_patches.*"]),
    package_data={"mols_ds": ["py.typed", "apps/study/templates/*"], "megatron_patches": ["py.typed"]},
    # torch is deliberately not pinned: its build has to match the machine's accelerator.
    install_requires=[
        "torch>=2.4",
        "deepspeed>=0.19",
        "hjson>=3.1",
        "psutil>=5.9",
        "pydantic>=2.0",
        "PyYAML>=6.0",
        "regex>=2024.4",
    ],
    extras_require={
        "train": TRAIN,
        "megatron": MEGATRON,
        "finetune": [*TRAIN, *FINETUNE],
        "evaluate": ["lm-eval>=0.4"],
        "optimizers": OPTIMIZERS,
        "report": REPORT,
        "completion": COMPLETION,
        "docs": DOCS,
        "dev": [*TEST_TOOLS, *TRAIN, *REPORT, *MEGATRON, *OPTIMIZERS, *CLIENTS, *COMPLETION, "peft>=0.14"],
    },
    # No script named `deepspeed` is installed: it would overwrite DeepSpeed's own. The shim is launch/deepspeed.
    entry_points={"console_scripts": ["mols-ds = mols_ds.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
