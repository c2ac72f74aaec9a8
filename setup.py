"""Package metadata: version, dependencies, extras, packages, the `eclip` command.

Exact tested versions are in constraints.txt.
"""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "eclip/__init__.py").read_text(encoding="utf-8"))[1]

# Every folder with code. eclip/kernels and eclip/dataloading are links to the top-level folders of those names, which
# have no __init__.py: setuptools' own search would leave them out.
PACKAGES = sorted(
    ".".join(Path(folder).relative_to(ROOT).parts)
    for folder, _, files in os.walk(ROOT / "eclip", followlinks=True)
    if any(name.endswith(".py") for name in files)
)

# DALI reads and decodes on the CPU as well; its wheels exist for Linux only, and the loader works without it.
DALI = 'nvidia-dali-cuda130>=2.4; sys_platform == "linux"'

setup(
    name="eclip",
    version=VERSION,
    description="Instance-level vision-language pretraining for e-commerce (ECLIP), with memory-efficient kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_data={"eclip.dataloading.demo": ["catalog/*"], "eclip.serve": ["page/*"]},
    include_package_data=False,
    entry_points={"console_scripts": ["eclip = eclip.cli:main"]},
    install_requires=[
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "tokenizers>=0.19",
        "torch>=2.11",
        "tqdm>=4.66",
        'triton>=3.6; sys_platform == "linux"',
        "tyro>=0.9",
    ],
    extras_require={
        "gpu": [DALI, "xformers>=0.0.35"],
        "towers": ["onnx>=1.16"],
        # `eclip embed`, `eclip search` and `eclip serve`: the index, and the page with its API.
        "serve": [
            "fastapi>=0.115",
            "lancedb>=0.40",
            "pyarrow>=16",
            "python-multipart>=0.0.18",
            "uvicorn>=0.30",
        ],
        # `eclip export --onnx`.
        "export": ["onnx>=1.16", "onnxruntime>=1.20"],
        # What only the tests of the page want; they also want a Chromium.
        "browser": ["httpx>=0.27", "playwright>=1.50"],
        # Noto for the letters of many scripts in the pictures; fonts of the system serve as well.
        "fonts": ["manimgx-fonts", "manimgx-fonts-cjk"],
        "dev": [
            DALI,
            "hypothesis>=6.100",
            "mypy>=2.4",
            "onnx>=1.16",
            "pytest>=9",
            "pytest-benchmark>=5.3.1",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "transformers>=5",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
