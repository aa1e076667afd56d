"""Turns settings.ini, the one source of package metadata, into arguments of setuptools."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
ini = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): ini[key].split() for key in ini if key.endswith("_requirements")}

setup(
    name=ini["lib_name"], version=ini["version"], description=ini["description"], keywords=ini["keywords"].split(),
    author=ini["author"], author_email=ini["author_email"], url=ini["git_url"], license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=f">={ini['min_python']}", install_requires=ini["requirements"].split(),
    extras_require={**extras, "all": sorted({r for group in extras.values() for r in group})},
    packages=["ultra_nb", "ultra_nb.assets"], package_dir={"ultra_nb.assets": "data"},
    package_data={"ultra_nb": ["py.typed", "*.html", "*.css", "*.js"], "ultra_nb.assets": ["*"]},
    entry_points={"console_scripts": ini["console_scripts"].split(),
                  "nbdev": [f"{ini['lib_name']}={ini['lib_name']}._modidx:d"]}, zip_safe=False,
)
