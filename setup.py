"Build fastsb: what it is comes from `settings.ini`, its version from `fastsb/__init__.py`."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(root / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
init = (root / "fastsb/__init__.py").read_text(encoding="utf-8")
extras = {name: cfg[f"{name}_requirements"].split() for name in ("bench", "test", "docs", "dev")}
extras["dev"] += sorted({*extras["test"], *extras["bench"], *extras["docs"]})

setup(
    version=re.search(r'^__version__ = "(.+)"', init, re.M)[1],
    classifiers=cfg["classifiers"].strip().splitlines(),
    packages=find_packages(include=["fastsb", "fastsb.*"]),
    package_data={"fastsb": ["py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
